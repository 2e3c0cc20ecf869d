# shellcheck shell=bash disable=SC2154
# The commands that services and cluster have in common: a directory with settings, and in it named parts that are started, told
# of, and disturbed.
#
# The script that sources it sets $tool, $dir, $command, $names, $wait_seconds and $settings (names of variables that the first `up`
# decides, `base` among them), and has the functions all_parts (names, one a line), ports, part_ports NAME, part_start NAME,
# part_ready NAME, addresses NAME (pairs of what and host:port) and json_rest (what stands beside the parts). Needs common.sh.

# wrong LINE: usage that nothing can be done with.
wrong() { refuse "$*; see deploy/local/$tool --help"; }

# Reads what the first `up` decided: fails when there was none.
read_settings() {
    local key value
    [ -e "$dir/settings" ] || return 1
    while IFS='=' read -r key value; do
        [[ " $settings " != *" $key "* ]] || printf -v "$key" %s "$value"
    done <"$dir/settings"
}

write_settings() {
    local key
    for key in $settings; do
        echo "$key=${!key}"
    done >"$dir/settings.new"
    mv "$dir/settings.new" "$dir/settings"
}

need_settings() { read_settings || refuse "nothing was started in $dir: first  deploy/local/$tool up"; }

# choose_ports FIRST: sets base to the first block from there on in which nobody listens. Until this script ends no other run on this
# machine chooses: then what it starts has taken its ports.
choose_ports() {
    local port
    take_lock 7 "${TMPDIR:-/tmp}/im-local-services.$(id -u).lock"
    for ((base = $1; base < 32000; base += 100)); do
        # Those who listen in network namespaces are not seen here; their bridge is.
        [ ! -e "/sys/class/net/im$((base / 100))" ] || continue
        for port in $(ports); do
            ! port_taken "$port" || continue 2
        done
        return
    done
    fail "no block of free ports from $1 to 32000: choose one with --port-base"
}

# known_names [WORD…]: fails when a NAME of the command line is no part and none of the words.
known_names() {
    local name
    [ "${#names[@]}" -gt 0 ] || wrong "$command needs the NAME of a part"
    need_settings
    for name in "${names[@]}"; do
        is_part "$name" || [[ " $* " = *" $name "* ]] || wrong "no part is named '$name', but these are: $(all_parts | tr '\n' ' ')"
    done
}

is_part() {
    local part
    for part in $(all_parts); do
        [ "$part" != "$1" ] || return 0
    done
    return 1
}

# start NAME: starts its process if none runs, continues it if it was stopped.
start() {
    local name=$1 port
    mkdir -p "$dir/$name"
    # A part is launched by one run at a time.
    take_lock 8 "$dir/$name/start.lock"
    case $(part_state "$name") in
        stopped) part_signal "$name" CONT && say "$name was stopped and goes on" ;;
        dead)
            network_join "$name"
            for port in $(part_ports "$name"); do
                [ "$network" = bridge ] || ! port_taken "$port" ||
                    fail "port $port of $name is taken by another program (ss -ltnp | grep $port): end it, or use another --dir"
            done
            part_start "$name"
            ;;
    esac
    exec 8>&-
}

wait_ready() {
    local name
    for name; do
        wait_until "$wait_seconds" "$@" -- part_ready "$name"
    done
}

print_json() {
    local name pid first=1
    printf '{"parts": ['
    if [ -n "$base" ]; then
        for name in $(all_parts); do
            [ -n "$first" ] || printf ', '
            first=
            pid=$(part_pid "$name") || pid=null
            printf '{"role": "%s", "name": "%s", "pid": %s, "state": "%s", "addresses": {' "${name%%-*}" "$name" "$pid" \
                "$(part_state "$name")"
            # shellcheck disable=SC2046,SC2183
            printf '"%s": "%s", ' $(addresses "$name") | sed 's/, $//'
            printf '}, "directory": "%s", "log": "%s"}' "$dir/$name" "$dir/$name/log"
        done
    fi
    printf '], %s}\n' "$(json_rest)"
}

print_table() {
    local name pid
    if [ -z "$base" ]; then
        echo "nothing was started in $dir"
        return
    fi
    for name in $(all_parts); do
        pid=$(part_pid "$name") || pid=-
        printf '%-10s %-8s pid %-8s %s\n' "$name" "$(part_state "$name")" "$pid" "$(addresses "$name")"
    done
}

# The faults: each for the named parts, in the order given.
fault() {
    local name
    case $command in
        kill) parts_kill "${names[@]}" ;;
        stop | cont)
            for name in "${names[@]}"; do
                part_signal "$name" "${command^^}" || fail "$name does not run: deploy/local/$tool start $name"
            done
            ;;
        restart | start)
            [ "$command" = start ] || parts_end 30 "${names[@]}"
            for name in "${names[@]}"; do
                start "$name"
            done
            wait_ready "${names[@]}"
            ;;
    esac
}
