# shellcheck shell=bash disable=SC2154
# Processes that a script starts in the background and finds again: parts of a directory, each with its pid, log and data.
#
# A part is known by the pid, the start time of that pid and the boot in which it ran; a pid that was given to another process
# since then is nobody's, and is never signalled. Sourced by deploy/local/services and deploy/local/cluster, which set $dir (the
# directory) and $tool (their name for messages).

say() { echo "$tool: $*" >&2; }

# fail LINE: the operation failed, and what to do next.
fail() { say "$*"; exit 1; }

# refuse LINE: wrong usage or environment; nothing was changed.
refuse() { say "$*"; exit 2; }

boot_id() { cat /proc/sys/kernel/random/boot_id; }

# process_field PID state|start: of /proc/PID/stat, whose second field may hold blanks and brackets. Fails when there is none.
process_field() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086
    set -- "$2" ${stat##*) }
    case $1 in
        state) echo "$2" ;;
        start) echo "${21}" ;;
    esac
}

# part_pid NAME: the pid of the part's process; fails when it does not run.
part_pid() {
    local pid start boot
    { read -r pid start boot <"$dir/$1/pid"; } 2>/dev/null || return 1
    [ "$boot" = "$(boot_id)" ] && [ "$(process_field "$pid" start)" = "$start" ] || return 1
    # A zombie is dead: what it held is gone, only its parent has not looked yet.
    [ "$(process_field "$pid" state)" != Z ] || return 1
    echo "$pid"
}

# part_state NAME: running, stopped (by a signal, to be continued) or dead.
part_state() {
    local pid
    pid=$(part_pid "$1") || { echo dead; return; }
    case $(process_field "$pid" state) in
        T | t) echo stopped ;;
        '') echo dead ;;
        *) echo running ;;
    esac
}

# part_launch NAME COMMAND…: starts it in its directory, away from this terminal, with its output in NAME/log.
part_launch() {
    local name=$1 pid
    shift
    mkdir -p "$dir/$name"
    (
        cd "$dir/$name" || exit 1
        # No lock of this script may live on in the server (8, 9: see take_lock).
        # shellcheck disable=SC2046
        exec setsid $(network_words "$name") "$@"
    ) >>"$dir/$name/log" 2>&1 </dev/null 7>&- 8>&- 9>&- &
    pid=$!
    echo "$pid $(process_field "$pid" start) $(boot_id)" >"$dir/$name/pid.new" && mv "$dir/$name/pid.new" "$dir/$name/pid"
}

# part_signal NAME SIGNAL: to the part's process and no other; fails when it does not run.
part_signal() {
    local pid
    pid=$(part_pid "$1") || return 1
    kill "-$2" "$pid" 2>/dev/null
}

# part_gone NAME SECONDS: waits for the end of its process.
part_gone() {
    local until=$((SECONDS + $2))
    while part_pid "$1" >/dev/null; do
        [ "$SECONDS" -lt "$until" ] || return 1
        sleep 0.05
    done
}

# parts_end SECONDS NAME…: SIGTERM to all, then SIGKILL to those that are still there after so long.
parts_end() {
    local seconds=$1 name
    shift
    for name; do
        if part_signal "$name" TERM; then part_signal "$name" CONT || true; fi
    done
    for name; do
        if ! part_gone "$name" "$seconds"; then
            say "$name did not end within $seconds s, killed"
            part_signal "$name" KILL || true
            part_gone "$name" 10 || fail "$name does not die: look at /proc/$(part_pid "$name")/stack"
        fi
        rm -f "$dir/$name/pid"
    done
}

# parts_kill NAME…: SIGKILL, and waits until all are gone.
parts_kill() {
    local name
    for name; do
        part_signal "$name" KILL || true
    done
    for name; do
        part_gone "$name" 10 || fail "$name does not die: look at /proc/$(part_pid "$name")/stack"
    done
}

# take_lock DESCRIPTOR FILE [-s]: held until this script ends.
take_lock() {
    eval "exec $1>>\"\$2\""
    flock -n ${3:+"$3"} "$1" || {
        say "waiting for another run that holds $2"
        flock -w 300 ${3:+"$3"} "$1" || fail "another run holds $2 for 300 s: look at it with  fuser -v $2"
    }
}

# port_taken PORT: somebody on this machine listens on it, on whatever address.
port_taken() {
    local hex
    hex=$(printf '%04X' "$1")
    grep -qsE "^ *[0-9]+: [0-9A-F]+:$hex [0-9A-F:]+ 0A " /proc/net/tcp /proc/net/tcp6
}

# listens HOST PORT: a connection is accepted.
listens() {
    # shellcheck disable=SC2016
    timeout 1 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null
}

# talk HOST PORT TEXT: sends it and prints what comes back until the other side closes, or for a second.
talk() {
    # shellcheck disable=SC2016
    timeout 1 bash -c 'exec 3<>"/dev/tcp/$0/$1" && printf "$2" >&3 && cat <&3' "$1" "$2" "$3" 2>/dev/null || true
}

# wait_until SECONDS NAME… -- COMMAND…: until the command is true; says which of the parts ended meanwhile.
wait_until() {
    local until=$((SECONDS + $1)) names=() name
    shift
    while [ "$1" != -- ]; do
        names+=("$1")
        shift
    done
    shift
    until "$@"; do
        for name in "${names[@]}"; do
            if ! part_pid "$name" >/dev/null; then
                tail -n 20 "$dir/$name/log" >&2 || true
                fail "$name ended while it was starting; its log is $dir/$name/log"
            fi
        done
        [ "$SECONDS" -lt "$until" ] || fail "not ready in time: ${names[*]}; the logs are in $dir/NAME/log"
        sleep 0.1
    done
}
