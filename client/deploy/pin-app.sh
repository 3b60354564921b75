#!/bin/sh
# At the hospital, as root: installs the one Flower app that may run here, out of the hospital's own copy of Chainward.
# FLWR_HOME is read-only to the service, so that an app the hospital has not installed can't even be unpacked.
#   pin-app.sh CHECKOUT [FLWR_HOME]
# Prints the name of the bundle; the coordinator's `flwr build --app server/app` must print the same.
set -eu
umask 022

fail() {
  echo "pin-app.sh: $1" >&2
  exit 2
}

if [ "$#" -lt 1 ] || [ "$#" -gt 2 ]; then fail "expected CHECKOUT and perhaps FLWR_HOME"; fi
app=$1/server/app home=${2:-/etc/chainward/flower}
[ -f "$app/pyproject.toml" ] || fail "$app/pyproject.toml: missing; expected a checkout of Chainward"
app=$(cd "$app" && pwd)
export FLWR_HOME="$home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
PATH=/opt/chainward/bin:$PATH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
flwr build --app "$app" >/dev/null
bundle=$(echo ./*.fab)
case $(python3 -c 'import sys, zipfile; print(*sorted(zipfile.ZipFile(sys.argv[1]).namelist()))' "$bundle") in
  '.info/CONTENT pyproject.toml') ;;
  *) fail "the bundle of $app holds more than configuration; is the checkout changed?" ;;
esac
rm -rf "$home/apps"
mkdir -p "$home/apps"
flwr install "$bundle" >/dev/null
chmod -R u=rwX,go=rX "$home"
echo "installed ${bundle#./} in $home/apps; nothing else can run here"
