#!/bin/sh
# On the coordinator: makes superlink.key, which never leaves this machine, and superlink.csr, the request to sign.
#   make-request.sh DIR DNS_NAME
# DNS_NAME: the name under which hospitals reach the coordinator. localhost and 127.0.0.1 are added: the coordinator's own
# processes, and the proxy in front, reach the SuperLink there.
set -eu
umask 077

fail() {
  echo "make-request.sh: $1" >&2
  exit 2
}

[ "$#" -eq 2 ] || fail "expected DIR and DNS_NAME"
dir=$1 name=$2
[ "${#name}" -le 64 ] || fail "'$name': longer than the 64 characters of a certificate's name"
case $name in
  *[!A-Za-z0-9.-]* | '' | -* | .*) fail "'$name': expected a DNS name, as in chain.example.org" ;;
esac

mkdir -p "$dir"
if [ ! -e "$dir/superlink.key" ]; then # kept on renewal
  trap 'rm -f "$dir/superlink.key.part"' EXIT
  openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$dir/superlink.key.part"
  mv "$dir/superlink.key.part" "$dir/superlink.key"
fi
openssl req -new -sha384 -key "$dir/superlink.key" -subj "/CN=$name" \
  -addext "subjectAltName=DNS:$name,DNS:localhost,IP:127.0.0.1" -out "$dir/superlink.csr"
chmod 644 "$dir/superlink.csr"
echo "Take $dir/superlink.csr to the authority; what comes back is $dir/superlink.crt. superlink.key stays here."
