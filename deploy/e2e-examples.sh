#!/usr/bin/env bash
# The examples of the SDK, each as its own text says, against a real server.
#
#   bash deploy/e2e-examples.sh    needs target/release/imd; builds the examples, which `cargo test --workspace` has built already
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --locked --quiet --workspace --examples
examples=$PWD/target/debug/examples
imd=${IM_BIN:-$PWD/target/release}/imd
work=$(mktemp -d)
data=$work/data
children=()

end() {
    local code=$?
    trap - EXIT INT TERM
    kill -KILL "${children[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    [ "$code" -eq 0 ] || { echo "the examples: FAILED" >&2; tail -n 5 "$work"/*.log >&2; }
    rm -rf "$work"
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

address() { sed -n "s/.*\"$1\": *\"\\([^\"]*\\)\".*/\\1/p" "$data/ready.json"; }
# token USER[/DEVICE]: what runs in the background needs a device of its own, or the next one takes its place.
token() {
    local device=terminal
    [[ $1 != */* ]] || device=${1#*/}
    "$imd" token --user "${1%%/*}" --device "$device" --data "$data"
}
# as USER[/DEVICE] EXAMPLE ARGUMENTS…
as() { IM_TOKEN=$(token "$1") "$examples/$2" "${@:3}"; }
# instead USER[/DEVICE] EXAMPLE ARGUMENTS…: the same in place of this shell, so that a process in the background is the example itself.
instead() {
    IM_TOKEN=$(token "$1")
    export IM_TOKEN
    exec "$examples/$2" "${@:3}"
}
# holds FILE TEXT: waits until a line of the file is the text.
holds() {
    local until=$((SECONDS + 60))
    while ! grep -qxF "$2" "$1"; do
        [ $SECONDS -lt $until ] || { echo "not in $1: $2" >&2; cat "$1" >&2; return 1; }
        sleep 0.05
    done
}

any=127.0.0.1:0
"$imd" up --data "$data" --tcp $any --tls $any --quic $any --api off --http off >"$work/server.log" 2>&1 &
children+=($!)
until [ -e "$data/ready.json" ]; do
    kill -0 "${children[0]}"
    sleep 0.05
done
tcp=tcp://$(address tcp)

instead echo/bot echo_bot "$tcp" >"$work/bot.log" 2>&1 &
children+=($!)
as alice send "$tcp" bob 'Hello, Bob' 'How are you?' >"$work/sent"
[ "$(cut -d' ' -f2 "$work/sent" | tr '\n' ' ')" = '1 2 ' ]
instead bob/follower follow "$tcp" alice 1 >"$work/followed" 2>"$work/follow.log" &
children+=($!)
holds "$work/followed" '1: Hello, Bob'
as alice send "$tcp" bob 'Still there?' >>"$work/sent"
holds "$work/followed" '3: Still there?'
# The first server cannot be reached, the second has another transport.
as alice group "tls://127.0.0.1:1,quic://$(address quic),tls://$(address tls)" "$(address ca)" walkers bob carol >"$work/group"
[ "$(sed 1d "$work/group" | tr '\n' ' ')" = 'alice bob carol ' ]
# Her list has the group a moment after it is made.
for ((try = 0; try < 600; try++)); do
    as carol unread "$tcp" >"$work/unread"
    [ ! -s "$work/unread" ] || break
    sleep 0.1
done
holds "$work/unread" 'walkers 2 alice: Welcome to walkers'
as carol unread "$tcp" >"$work/unread"
[ ! -s "$work/unread" ] || { echo "read is read" >&2; exit 1; }
as alice send "$tcp" echo ping >>"$work/sent"
instead alice/follower follow "$tcp" echo 1 >"$work/echoed" 2>"$work/echo.log" &
children+=($!)
# The bot answers what comes once it is there.
for ((try = 0; try < 60; try++)); do
    ! grep -q ': you said: ping$' "$work/echoed" || break
    as alice send "$tcp" echo ping >>"$work/sent"
    sleep 1
done
grep -q ': you said: ping$' "$work/echoed" || { echo "the bot did not answer" >&2; cat "$work/echoed" >&2; exit 1; }
echo "echo_bot, follow, group, send and unread do what they say"
