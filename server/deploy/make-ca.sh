#!/bin/sh
# Makes the consortium's certificate authority: ca.key, which never leaves this machine, and ca.crt, which every hospital gets.
# On a machine of its own, best without a network. Where the hospitals trust a common authority already, you need none.
#   make-ca.sh DIR "Name of the consortium"
# openssl asks for a passphrase for ca.key; CHAINWARD_CA_PASSPHRASE=file:/path names a file that holds it instead.
set -eu
umask 077

fail() {
  echo "make-ca.sh: $1" >&2
  exit 2
}

[ "$#" -eq 2 ] || fail "expected DIR and NAME"
dir=$1 name=$2 days=1825 # five years; what it signs ends earlier
[ ! -e "$dir/ca.key" ] || fail "$dir holds an authority already; a new one would cut off every hospital. Choose another folder"
case $name in
  *[!A-Za-z0-9\ .-]* | '') fail "'$name': expected a name of letters, digits, spaces, dots and hyphens" ;;
esac

mkdir -p "$dir"
trap 'rm -f "$dir/ca.key.part" "$dir/ca.crt.part"' EXIT
openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -aes-256-cbc \
  ${CHAINWARD_CA_PASSPHRASE:+-pass "$CHAINWARD_CA_PASSPHRASE"} -out "$dir/ca.key.part"
openssl req -x509 -new -sha384 -key "$dir/ca.key.part" ${CHAINWARD_CA_PASSPHRASE:+-passin "$CHAINWARD_CA_PASSPHRASE"} \
  -days "$days" -subj "/CN=$name CA" -out "$dir/ca.crt.part" \
  -addext 'basicConstraints=critical,CA:TRUE,pathlen:0' -addext 'keyUsage=critical,keyCertSign,cRLSign'
mv "$dir/ca.crt.part" "$dir/ca.crt"
mv "$dir/ca.key.part" "$dir/ca.key"
chmod 644 "$dir/ca.crt"
openssl x509 -in "$dir/ca.crt" -noout -subject -enddate -fingerprint -sha256
echo "Give $dir/ca.crt to every hospital, and the fingerprint by another way (telephone). Keep $dir/ca.key offline."
