#!/usr/bin/env bash
# A text file through a real cluster: piped by one user at one gateway, tailed live by another at another gateway, while routers, a
# gateway and Redis are killed and one router is stopped for longer than its lease. Everything must arrive byte for byte and in order.
#
#   bash deploy/e2e-cluster.sh     needs target/release/{imd,im}, and the services of IM_SERVICES_DIR or starts those of the tree;
#                                  E2E_CLUSTER_LINES (100000) is its size
set -euo pipefail
cd "$(dirname "$0")/.."

lines=${E2E_CLUSTER_LINES:-100000}
export IM_BIN=${IM_BIN:-$PWD/target/release}
im=$IM_BIN/im
work=$(mktemp -d)
export IM_CLUSTER_DIR=$work/cluster
export IM_SERVICES_DIR=${IM_SERVICES_DIR:-$PWD/target/local/services}
tail='' pipe=''

cluster() { deploy/local/cluster "$@"; }

end() {
    local code=$?
    trap - EXIT INT TERM
    for pid in $tail $pipe; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait 2>/dev/null || true
    if [ "$code" -ne 0 ]; then
        echo "end to end on a cluster: FAILED, the last lines of what was said:" >&2
        tail -n 5 "$work"/*.log "$IM_CLUSTER_DIR"/*/log >&2 || true
    fi
    cluster down --purge >&2 || code=1
    rm -rf "$work"
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

# arrived SHARE: waits until so many hundredths of the lines have arrived.
arrived() {
    local until=$((SECONDS + 120))
    until [ "$(wc -l <"$work/tailed.txt")" -ge $((lines * $1 / 100)) ]; do
        kill -0 "$tail" 2>/dev/null || { echo "im tail ended early" >&2; exit 1; }
        [ "$SECONDS" -lt "$until" ] || { echo "only $(wc -l <"$work/tailed.txt") of $lines lines after two minutes" >&2; exit 1; }
        sleep 0.05
    done
}

# fault SHARE COMMAND…: when so much has arrived.
fault() {
    arrived "$1"
    shift
    echo "at $(wc -l <"$work/tailed.txt") lines: $*"
    "$@"
}

seq -f 'line %.0f — ἀγάπη, любовь, 愛, ❤' 1 "$lines" >"$work/sent.txt"
cluster up --routers 3 --gateways 2 >"$work/status"
begun=$SECONDS
"$im" tail @alice --as bob --data "$IM_CLUSTER_DIR/gateway-1" --transport quic --from 1 --count "$lines" --timeout 60 \
    >"$work/tailed.txt" 2>"$work/tail.log" &
tail=$!
"$im" pipe @bob --as alice --data "$IM_CLUSTER_DIR/gateway-2" --transport tcp --timeout 60 <"$work/sent.txt" 2>"$work/pipe.log" &
pipe=$!

# One of the three owns the conversation: each is killed or stopped, with all three there before.
fault 10 cluster kill router-1
fault 20 cluster start router-1
fault 25 deploy/local/services kill redis
fault 30 deploy/local/services start redis
fault 35 cluster kill router-2
fault 40 cluster start router-2
fault 45 cluster restart router-1
fault 50 cluster kill gateway-1
cluster start gateway-1
# Longer than the lease: others have what it owned when it goes on.
fault 60 cluster stop router-3
sleep 15
cluster cont router-3
fault 80 cluster restart gateway-2

wait "$pipe" || { echo "im pipe failed" >&2; exit 1; }
pipe=
tail -n 1 "$work/pipe.log"
wait "$tail" || { echo "im tail failed" >&2; exit 1; }
tail=
echo "piped and tailed in $((SECONDS - begun)) s"
cmp "$work/sent.txt" "$work/tailed.txt"
"$im" history @alice --as bob --data "$IM_CLUSTER_DIR/gateway-2" --transport tls --from 1 --limit "$lines" >"$work/history.txt" \
    2>"$work/history.log"
cmp "$work/sent.txt" "$work/history.txt"
cluster down
echo "end to end on a cluster: $lines lines arrived byte for byte and in order, live and from history"
