#!/bin/sh
# At the coordinator: backs up the run folders and the SuperLink's database (which hospitals are registered, which runs there were).
#   backup.sh TARGET [DATABASE [RUNS]]     TARGET: a folder, made anew; default: /var/lib/chainward/superlink.db and .../runs
# While runs go on: the database is copied as SQLite copies itself, run folders are whole at every moment.
set -eu
umask 077

fail() {
  echo "backup.sh: $1" >&2
  exit 2
}

if [ "$#" -lt 1 ] || [ "$#" -gt 3 ]; then fail "expected TARGET and perhaps DATABASE and RUNS"; fi
target=$1 database=${2:-/var/lib/chainward/superlink.db} runs=${3:-/var/lib/chainward/runs}
[ -f "$database" ] || fail "$database: missing; expected the SuperLink's --database"
[ -d "$runs" ] || fail "$runs: missing; expected the folder of the run folders (output.dir)"
[ ! -e "$target" ] || fail "$target is there already; name a new folder"

mkdir -p "$target.part"
trap 'rm -rf "$target.part"' EXIT
python3 - "$database" "$target.part/superlink.db" <<'END'
import sqlite3, sys
source = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
copy = sqlite3.connect(sys.argv[2])
source.backup(copy)
assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",), "the copy of the database is damaged"
END
cp -a "$runs" "$target.part/runs"
sync "$target.part"
mv "$target.part" "$target"
echo "database and $(find "$target/runs" -maxdepth 2 -name run.json | wc -l) runs in $target"
