#!/bin/sh
# Restarts a Flower service that no longer works: its HTTP side does not answer, or its SuperExec, which starts the programs of a
# run, is gone (Flower does not notice that itself, and still answers). Three looks in a row; one good one is enough.
#   probe.sh SERVICE HEALTH_URL [CURL_OPTION...]
set -eu

if [ "$#" -lt 2 ]; then
  echo "probe.sh: expected SERVICE, HEALTH_URL and perhaps options of curl" >&2
  exit 2
fi
service=$1 url=$2
shift 2
for _ in 1 2 3; do
  main=$(systemctl show --property MainPID --value "$service")
  if curl --silent --show-error --fail --max-time 20 --output /dev/null "$@" "$url" &&
    pgrep --parent "$main" --full superexec >/dev/null; then
    exit 0
  fi
  sleep "${PROBE_PAUSE:-20}"
done
echo "probe.sh: $service does not work, restarting it"
systemctl restart "$service"
