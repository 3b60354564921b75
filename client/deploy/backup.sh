#!/bin/sh
# At the hospital: backs up what can not be made again: the privacy ledger with its head and key.
# Ledger and head are copied under the ledger's own lock, so that they are a pair; a training waits for a moment.
#   backup.sh STATE TARGET        STATE: the `state` folder of site.yaml; TARGET: a folder, made anew for each backup
# The copy holds private keys: encrypt it, as `age` or the hospital's backup system does.
set -eu
umask 077

fail() {
  echo "backup.sh: $1" >&2
  exit 2
}

[ "$#" -eq 2 ] || fail "expected STATE and TARGET"
state=$1 target=$2
[ -f "$state/privacy/ledger.key" ] || fail "$state/privacy/ledger.key: missing; expected the state folder of a site with a privacy policy"
[ ! -e "$target" ] || fail "$target is there already; name a new folder, an older pair must not be mixed with a newer one"

mkdir -p "$target.part"
trap 'rm -rf "$target.part"' EXIT
flock --timeout 120 "$state/privacy/ledger.jsonl.lock" cp -a "$state/privacy/." "$target.part/" ||
  fail "$state/privacy: the ledger was locked for two minutes, or can't be read; is a training hanging?"
rm -f "$target.part/ledger.jsonl.lock"
for file in ledger.jsonl ledger.jsonl.head ledger.key ledger.key.pub; do
  [ -s "$target.part/$file" ] || fail "$state/privacy/$file: missing"
done
(cd "$target.part" && sha256sum ./* >SHA256SUMS)
sync "$target.part"
mv "$target.part" "$target"
echo "$(wc -l <"$target/ledger.jsonl") ledger entries in $target"
