# shellcheck shell=bash disable=SC2154
# Where parts listen: on this machine's loopback addresses, or each in a network namespace of its own on a bridge, so that any two of
# them can be cut off from each other.
#
# A cut loses packets without a word, as a broken switch does: each of the two gets a false link-layer address of the other, which
# reaches connections that exist as well as new ones. Only the namespaces and the bridge of these parts are touched. Needs
# common.sh, $network (loopback or bridge) and $the first port of the services, $services_base or
# else $base, which numbers the bridge.

network_number() { echo $((${services_base:-$base} / 100)); }
network_bridge() { echo "im$(network_number)"; }
network_prefix() { echo "10.78.$(($(network_number) % 250))"; }
network_space() { echo "im$(network_number)-$1"; }

# host NAME: the address at which a part listens; `host` is this machine itself.
host() {
    local i=${1##*-}
    if [ "$network" = loopback ]; then
        case $1 in
            # Nodes of one CQL cluster share their port, and drivers tell them apart by address.
            cql-*) echo "127.0.0.$i" ;;
            *) echo 127.0.0.1 ;;
        esac
        return
    fi
    case $1 in
        host) i=1 ;;
        etcd-*) i=$((10 + i)) ;;
        redis) i=20 ;;
        cql-*) i=$((30 + i)) ;;
        router-*) i=$((100 + i)) ;;
        gateway-*) i=$((200 + i)) ;;
    esac
    echo "$(network_prefix).$i"
}

network_refuse_unless_possible() {
    [ "$network" = bridge ] || return 0
    [ "$(id -u)" -eq 0 ] || refuse "--network bridge makes network namespaces: run it as root, or leave it out"
    command -v ip >/dev/null || install_packages iproute2
}

# in_network NAME COMMAND…: runs it where the part lives.
in_network() {
    local name=$1
    shift
    if [ "$network" = bridge ]; then
        ip netns exec "$(network_space "$name")" "$@"
    else
        "$@"
    fi
}

# network_words NAME: what stands before the command of a part that is launched.
network_words() { [ "$network" = loopback ] || echo "ip netns exec $(network_space "$1")"; }

# network_join NAME: makes the bridge and the part's namespace, unless they are there.
network_join() {
    local bridge space link
    [ "$network" = bridge ] || return 0
    bridge=$(network_bridge)
    space=$(network_space "$1")
    if ! ip link show "$bridge" >/dev/null 2>&1; then
        if ! { ip link add "$bridge" type bridge && ip address add "$(host host)/24" dev "$bridge" && ip link set "$bridge" up; }; then
            fail "no bridge can be made: leave --network bridge out"
        fi
    fi
    # At most 15 characters, and the same for the same part.
    link=i$(network_number)${1/-/}
    link=${link/gateway/g}
    link=${link/router/r}
    # Its bridge may have been made anew.
    ! ip link set "$link" master "$bridge" up 2>/dev/null || return 0
    if ! {
        ip netns add "$space" && ip link add "$link" type veth peer name eth0 netns "$space" &&
            ip link set "$link" master "$bridge" up && ip -n "$space" link set lo up &&
            ip -n "$space" address add "$(host "$1")/24" dev eth0 && ip -n "$space" link set eth0 up
    }; then
        ip netns delete "$space" 2>/dev/null || true
        fail "no network namespace can be made for $1: leave --network bridge out"
    fi
}

# network_leave NAME…: away with their namespaces. Nothing of theirs runs any more.
network_leave() {
    local name
    [ "$network" = bridge ] || return 0
    for name; do
        ip netns delete "$(network_space "$name")" 2>/dev/null || true
    done
}

network_remove_bridge() {
    [ "$network" = loopback ] || ip link delete "$(network_bridge)" 2>/dev/null || true
}

# network_one_way cut|mend A B: A no longer reaches B, or does again.
network_one_way() {
    local there
    [ "$2" != host ] || return 0
    there=$(host "$3")
    if [ "$1" = cut ]; then
        ip -n "$(network_space "$2")" neighbour replace "$there" lladdr 02:00:00:00:00:00 dev eth0 nud permanent
    else
        ip -n "$(network_space "$2")" neighbour delete "$there" dev eth0 2>/dev/null || true
    fi
}

# network_change cut|mend A B…: between A and each of the others, both ways; with $one_way only from A to them.
network_change() {
    local what=$1 one=$2 other
    [ "$network" = bridge ] || refuse "only parts in namespaces can be cut: first  deploy/local/services up --network bridge"
    shift 2
    for other; do
        { network_one_way "$what" "$one" "$other" && { [ -n "${one_way:-}" ] || network_one_way "$what" "$other" "$one"; }; } ||
            fail "$one and $other could not be changed: both must have been started"
    done
}
