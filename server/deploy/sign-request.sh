#!/bin/sh
# At the authority: signs a coordinator's request, for its names and for serving TLS alone, whatever else it asks for.
#   sign-request.sh CA_DIR REQUEST.csr CERTIFICATE.crt [DAYS]
# DAYS: 1 to 398, default 365. Compare the names that it prints with what you expect before you hand the certificate out.
set -eu
umask 077

fail() {
  echo "sign-request.sh: $1" >&2
  exit 2
}

if [ "$#" -lt 3 ] || [ "$#" -gt 4 ]; then fail "expected CA_DIR, REQUEST.csr, CERTIFICATE.crt and perhaps DAYS"; fi
ca=$1 request=$2 certificate=$3 days=${4:-365}
case $days in
  *[!0-9]* | '' | ????*) fail "'$days' days: expected 1 to 398" ;;
esac
if [ "$days" -lt 1 ] || [ "$days" -gt 398 ]; then fail "$days days: expected 1 to 398"; fi
openssl req -in "$request" -noout -verify >/dev/null 2>&1 || fail "$request: not a request, or not signed with its own key"
names=$(openssl req -in "$request" -noout -text | grep -A 1 'Subject Alternative Name' | tail -n 1 | tr -d ' ')
case $names in
  '') fail "$request: names no host (subjectAltName); make it with make-request.sh" ;;
  *[!A-Za-z0-9.,:-]*) fail "$request: '$names': expected DNS names and addresses only" ;;
esac

extensions=$(mktemp)
trap 'rm -f "$extensions" "$certificate.part"' EXIT
cat >"$extensions" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
authorityKeyIdentifier = keyid
subjectAltName = $(echo "$names" | sed 's/IPAddress:/IP:/g')
END
openssl x509 -req -sha384 -in "$request" -CA "$ca/ca.crt" -CAkey "$ca/ca.key" \
  ${CHAINWARD_CA_PASSPHRASE:+-passin "$CHAINWARD_CA_PASSPHRASE"} \
  -set_serial "0x$(openssl rand -hex 16)" -days "$days" -extfile "$extensions" -out "$certificate.part"
openssl verify -CAfile "$ca/ca.crt" "$certificate.part" >/dev/null || fail "the authority's certificate does not match its key"
chmod 644 "$certificate.part"
mv "$certificate.part" "$certificate"
openssl x509 -in "$certificate" -noout -subject -enddate -ext subjectAltName
