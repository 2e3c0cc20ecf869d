#!/usr/bin/env bash
# A text file through real processes: piped by one user over TCP, tailed live by another over QUIC, read back over TLS, while the
# server is killed and started again. Everything must arrive byte for byte and in order.
#
#   bash deploy/e2e.sh             needs target/release/{imd,im}; E2E_LINES (200000) and E2E_KILLS (5) change its size
set -euo pipefail
cd "$(dirname "$0")/.."

lines=${E2E_LINES:-200000}
kills=${E2E_KILLS:-5}
imd=$PWD/target/release/imd
im=$PWD/target/release/im
work=$(mktemp -d)
data=$work/data
server= tail= pipe=

end() {
    local code=$?
    trap - EXIT INT TERM
    for pid in $server $tail $pipe; do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait 2>/dev/null || true
    if [ "$code" -ne 0 ]; then
        echo "end to end: FAILED, the last lines of what was said:" >&2
        tail -n 5 "$work"/*.log >&2 || true
    fi
    rm -rf "$work"
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

# address NAME: of the running server, from ready.json.
address() {
    sed -n "s/.*\"$1\": *\"\\([^\"]*\\)\".*/\\1/p" "$data/ready.json"
}

# start OPTIONS…: returns when the server listens.
start() {
    "$imd" up --data "$data" "$@" >>"$work/server.out" 2>>"$work/server.log" &
    server=$!
    until grep -q "\"pid\": *$server\\b" "$data/ready.json" 2>/dev/null; do
        kill -0 "$server" || { echo "the server did not start" >&2; return 1; }
        sleep 0.05
    done
}

# Lines of 1 to 400 characters of many scripts, emoji and tabs; the same file each time.
perl -CS -e '
    my @ranges = ([0x20, 0x7e], [0xa1, 0x17f], [0x391, 0x3c9], [0x410, 0x44f], [0x5d0, 0x5ea], [0x621, 0x64a], [0x905, 0x939],
        [0xe01, 0xe30], [0x10d0, 0x10f0], [0x1200, 0x1248], [0x3041, 0x3096], [0x4e00, 0x9fa5], [0xac00, 0xd7a3],
        [0x1f300, 0x1f5ff], [0x1f600, 0x1f64f], [0x20000, 0x20100], [0x9, 0x9]);
    my $state = 42;
    sub next_below { $state = ($state * 1103515245 + 12345) & 0x7fffffff; return ($state >> 8) % $_[0] }
    for my $line (1 .. $ARGV[0]) {
        my $length = 1 + (next_below(10) ? next_below(60) : next_below(400));
        my $range = $ranges[next_below(scalar @ranges)];
        my $text = "";
        for (1 .. $length) {
            $range = $ranges[next_below(scalar @ranges)] if !next_below(8);
            $text .= chr($range->[0] + next_below($range->[1] - $range->[0] + 1));
        }
        print "$text\n";
    }
' "$lines" >"$work/sent.txt"
echo "$lines lines, $(wc -c <"$work/sent.txt") bytes"

any=127.0.0.1:0
start --tcp $any --tls $any --quic $any --api $any --http $any
ports="--tcp $(address tcp) --tls $(address tls) --quic $(address quic) --api $(address api) --http $(address http)"

begun=$SECONDS
"$im" tail @alice --as bob --data "$data" --transport quic --from 1 --count "$lines" >"$work/tailed.txt" 2>"$work/tail.log" &
tail=$!
"$im" pipe @bob --as alice --data "$data" --transport tcp <"$work/sent.txt" 2>"$work/pipe.log" &
pipe=$!

for ((kill = 1; kill <= kills; kill++)); do
    # In mid-flow: after this share of the lines has arrived.
    until [ "$(wc -l <"$work/tailed.txt")" -ge $((lines * kill / (kills + 1))) ]; do
        kill -0 "$pipe" 2>/dev/null || { wait "$pipe" || { echo "im pipe ended early" >&2; exit 1; }; break; }
        sleep 0.05
    done
    kill -KILL "$server"
    wait "$server" 2>/dev/null || true
    # shellcheck disable=SC2086
    start $ports
    echo "killed and started again at $(wc -l <"$work/tailed.txt") lines"
done

wait "$pipe" || { echo "im pipe failed" >&2; exit 1; }
pipe=
tail -n 1 "$work/pipe.log"
wait "$tail" || { echo "im tail failed" >&2; exit 1; }
tail=
echo "piped and tailed in $((SECONDS - begun)) s"
cmp "$work/sent.txt" "$work/tailed.txt"
"$im" history @alice --as bob --data "$data" --transport tls --from 1 --limit "$lines" >"$work/history.txt" 2>"$work/history.log"
cmp "$work/sent.txt" "$work/history.txt"

kill -TERM "$server"
wait "$server" || { echo "the server did not stop with 0" >&2; exit 1; }
server=
[ ! -e "$data/ready.json" ] || { echo "ready.json is still there after a clean stop" >&2; exit 1; }
echo "end to end: $lines lines arrived byte for byte and in order, live and from history, over $kills kills"
