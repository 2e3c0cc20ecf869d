# shellcheck shell=bash disable=SC2154
# etcd members etcd-1 … etcd-N of Debian's etcd-server, on 127.0.0.1. Needs common.sh, $members and $base.

etcd_client() { echo "127.0.0.1:$((base + $1))"; }
etcd_peer() { echo "127.0.0.1:$((base + 10 + $1))"; }

etcd_urls() {
    local i all=()
    for ((i = 1; i <= members; i++)); do
        all+=("http://$(etcd_client "$i")")
    done
    (IFS=, && echo "${all[*]}")
}

etcd_start() {
    local i=$1 j peers=() variable
    for ((j = 1; j <= members; j++)); do
        peers+=("etcd-$j=http://$(etcd_peer "$j")")
    done
    # Each option of etcd can also come from a variable.
    for variable in "${!ETCD_@}"; do
        unset "$variable"
    done
    part_launch "etcd-$i" etcd --name "etcd-$i" --data-dir "$dir/etcd-$i/data" \
        --listen-client-urls "http://$(etcd_client "$i")" --advertise-client-urls "http://$(etcd_client "$i")" \
        --listen-peer-urls "http://$(etcd_peer "$i")" --initial-advertise-peer-urls "http://$(etcd_peer "$i")" \
        --initial-cluster "$(IFS=, && echo "${peers[*]}")" --initial-cluster-token "im-local-$base" \
        --logger zap --log-level warn
}

# etcd_healthy I: it answers, and a quorum stands behind it.
etcd_healthy() {
    talk "127.0.0.1" $((base + $1)) 'GET /health HTTP/1.0\r\n\r\n' | grep -q '"health":"true"'
}

# etcd_ready I: healthy; or, while too few members run for a quorum, listening.
etcd_ready() {
    local i running=0
    for ((i = 1; i <= members; i++)); do
        [ "$(part_state "etcd-$i")" != running ] || running=$((running + 1))
    done
    if [ $((running * 2)) -gt "$members" ]; then
        etcd_healthy "$1"
    else
        port_taken $((base + $1))
    fi
}
