#!/bin/sh
# At the hospital: makes the key by which the coordinator knows this SuperNode. The private half never leaves this machine;
# take supernode.pub, and nothing else, to the coordinator.
#   make-node-key.sh DIR
set -eu
umask 077

fail() {
  echo "make-node-key.sh: $1" >&2
  exit 2
}

[ "$#" -eq 1 ] || fail "expected DIR"
[ ! -e "$1/supernode" ] || fail "$1/supernode is there already; the coordinator knows the hospital by it. Choose another folder to make a new one"
mkdir -p "$1"
# Without a passphrase: the service starts without a person. -C '': no user or host name in the public half.
ssh-keygen -q -t ecdsa -b 384 -m RFC4716 -N '' -C '' -f "$1/supernode"
chmod 644 "$1/supernode.pub"
ssh-keygen -l -E sha256 -f "$1/supernode.pub"
echo "Send $1/supernode.pub to the coordinator, and the fingerprint above by another way (telephone)."
