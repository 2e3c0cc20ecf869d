#!/usr/bin/env bash
# A text file through a real cluster: piped by one user at one gateway, tailed live by another at another gateway, while routers, a
# gateway and Redis are killed and one router is stopped for longer than its lease. Everything must arrive byte for byte and in order.
# Then who is there, devices and a channel, each user at another gateway, one of which is killed.
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
tail='' pipe='' watch='' device=''

cluster() { deploy/local/cluster "$@"; }

end() {
    local code=$?
    trap - EXIT INT TERM
    for pid in $tail $pipe $watch $device; do
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

# at GATEWAY WORDS…: a command of a client there. Not for one that is to be signalled: in the background that would be a shell of its own.
at() {
    local gateway=$1
    shift
    "$im" "$@" --data "$IM_CLUSTER_DIR/$gateway" --timeout 60
}

# said TIMES TEXT FILE: waits until so many lines of a file have it.
said() {
    local until=$((SECONDS + 60))
    until [ "$(grep -c -- "$2" "$work/$3")" -ge "$1" ]; do
        [ "$SECONDS" -lt "$until" ] || { echo "$3 has not said '$2' $1 times:" >&2; cat "$work/$3" >&2; exit 1; }
        sleep 0.1
    done
}

# He has just been here: who leaves is said to be offline a while later.
: >"$work/presence.txt"
until grep -q '^bob.offline' "$work/presence.txt"; do
    [ "$SECONDS" -lt $((begun + 600)) ] || { echo "bob does not go offline" >&2; exit 1; }
    at gateway-2 presence @bob --as alice >"$work/presence.txt" 2>"$work/presence.log"
done
"$im" presence @bob --watch --as alice --data "$IM_CLUSTER_DIR/gateway-2" --timeout 60 >"$work/presence.txt" 2>"$work/presence.log" &
watch=$!
said 1 '^bob.offline' presence.txt
"$im" tail @alice --as bob/phone --data "$IM_CLUSTER_DIR/gateway-1" --timeout 60 >"$work/phone.txt" 2>"$work/phone.log" &
device=$!
said 1 '^bob.online' presence.txt
at gateway-2 device list --as bob/laptop >"$work/devices.txt"
said 1 '^phone.*connected' devices.txt
at gateway-2 device kick phone --as bob/laptop
! wait "$device" || { echo "the kicked device did not fail" >&2; exit 1; }
said 1 'kicked by another device' phone.log
said 2 '^bob.offline' presence.txt
"$im" tail @alice --as bob/phone --data "$IM_CLUSTER_DIR/gateway-1" --timeout 60 >"$work/phone.txt" 2>"$work/phone.log" &
device=$!
said 2 '^bob.online' presence.txt
# With its gateway, so that it cannot come back and nobody says goodbye for it.
kill -STOP "$device"
cluster kill gateway-1
kill -KILL "$device"
wait "$device" 2>/dev/null || true
said 3 '^bob.offline' presence.txt
cluster start gateway-1
kill -INT "$watch"
wait "$watch"
watch=''

news=$(at gateway-2 channel create news --as alice)
at gateway-1 channel subscribe "$news" --as bob
at gateway-2 channel post "$news" 'before anybody reads' --as alice
"$im" tail "$news" --as bob --from 1 --data "$IM_CLUSTER_DIR/gateway-1" --timeout 60 >"$work/news.txt" 2>"$work/news.log" &
device=$!
said 1 'before anybody reads' news.txt
at gateway-2 channel post "$news" 'while bob reads' --as alice
said 1 'while bob reads' news.txt
kill -INT "$device"
wait "$device"
device=''
cluster down
echo "presence, devices and a channel: across two gateways, one of them killed"
echo "end to end on a cluster: $lines lines arrived byte for byte and in order, live and from history"
