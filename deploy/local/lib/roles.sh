# shellcheck shell=bash disable=SC2154
# The roles of `imd` as parts: their options, ports, secrets and schema. Needs common.sh, parts.sh, and of the cluster script $dir,
# $bin, $secrets, $base, $keyspace, $sets and services.

# role_port NAME KIND: a router has base+10i … base+10i+4, a gateway the five above.
role_port() {
    local first=$((base + 10 * ${1##*-}))
    case $1:$2 in
        router-*:link) echo "$first" ;;
        router-*:api) echo $((first + 1)) ;;
        router-*:http) echo $((first + 2)) ;;
        gateway-*:tcp) echo $((first + 5)) ;;
        # QUIC is UDP.
        gateway-*:tls | gateway-*:quic) echo $((first + 6)) ;;
        gateway-*:http) echo $((first + 7)) ;;
    esac
}

role_address() { echo "$(host "$1"):$(role_port "$1" "$2")"; }

role_kinds() {
    case $1 in
        router-*) echo link api http ;;
        gateway-*) echo tcp tls quic http ;;
    esac
}

part_ports() {
    local kind
    for kind in $(role_kinds "$1"); do
        role_port "$1" "$kind"
    done
}

addresses() {
    local kind
    for kind in $(role_kinds "$1"); do
        echo "$kind $(role_address "$1" "$kind")"
    done | tr '\n' ' '
}

# The keys, secrets and certificates of a new cluster.
roles_prepare() {
    local name hosts=()
    # Those that a later `up` adds have their names in the certificates as well.
    [ "$network" = loopback ] || for name in {router,gateway}-{1..9}; do
        hosts+=(--host "$(host "$name")")
    done
    [ -e "$secrets/services/ca.pem" ] || "$bin/imd" secrets --out "$secrets" "${hosts[@]}" >/dev/null ||
        fail "imd secrets failed: see above"
}

# A keyspace of its own for each cluster, so that what another one left in the same services is not mistaken for this one's.
roles_keyspace() {
    sed -n 's/.*"cluster_id": *"\([^"]*\)".*/\1/p' "$secrets/cluster.json" | tr -c 'a-z0-9\n' _
}

# Address and secrets, for every role and for the tools.
roles_common() {
    local variable
    eval "$(services env)"
    for variable in "${!IM_TEST_@}"; do
        unset "$variable"
    done
    common=(--etcd "$IM_ETCD" --cql "$IM_CQL" --keyspace "$keyspace" --redis "$IM_REDIS" --secrets "$secrets")
}

# Tables, and the row that says whose they are. As many copies as there are nodes.
roles_schema() {
    local common commas
    roles_common
    commas=${IM_CQL//[!,]/}
    "$bin/imd" schema apply --cql "$IM_CQL" --keyspace "$keyspace" --secrets "$secrets" --replication $((${#commas} + 1)) >&2 ||
        fail "imd schema apply failed: see above"
}

part_start() {
    local name=$1 role=${1%%-*} common kind options=()
    roles_common
    for kind in $(role_kinds "$name"); do
        options+=("--$kind" "$(role_address "$name" "$kind")")
    done
    mkdir -p "$dir/$name"
    # What makes `im --as USER --data DIR/gateway-1` work: the directory looks like the data directory of a server. The process
    # itself writes ready.json.
    for kind in ca.pem cluster.json keys; do
        [ "$role" != gateway ] || ln -sfn "$secrets/$kind" "$dir/$name/$kind"
    done
    # As `imd up` has it: made for a person who tries things.
    [ "$role" != router ] || options+=(--set token.lifetime_max=30d)
    # The bridge is inside this machine.
    [ "$network" = loopback ] || [ "$role" != gateway ] || options+=(--set plaintext=anywhere)
    # All clients come from one address, which is none of loopback: what limits an attacker would make them wait for each other.
    [ "$network" = loopback ] || [ "$role" != gateway ] || options+=(--set gateway.address_connects_per_second_max=1000)
    part_launch "$name" "$bin/imd" "$role" --data "$dir/$name" "${common[@]}" --zone local "${options[@]}" "${sets[@]}"
}

# Every listener accepts, and the process says that it can serve.
part_ready() {
    grep -qs "\"pid\": *$(part_pid "$1")\b" "$dir/$1/ready.json" || return 1
    [[ $(talk "$(host "$1")" "$(role_port "$1" http)" 'GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n') = 'HTTP/1.'?' 200 '* ]]
}
