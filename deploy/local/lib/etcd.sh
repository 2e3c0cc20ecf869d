# shellcheck shell=bash disable=SC2154
# etcd members etcd-1 … etcd-N of Debian's etcd-server. Needs common.sh, network.sh, $members and $base.

etcd_client() { echo "$(host "etcd-$1"):$((base + $1))"; }
etcd_peer() { echo "$(host "etcd-$1"):$((base + 10 + $1))"; }

etcd_urls() {
    local i all=()
    for ((i = 1; i <= members; i++)); do
        all+=("http://$(etcd_client "$i")")
    done
    (IFS=, && echo "${all[*]}")
}

etcd_parts() {
    local i
    for ((i = 1; i <= members; i++)); do
        echo "etcd-$i"
    done
}

# The value of --initial-cluster.
etcd_cluster() {
    local i peers=()
    for ((i = 1; i <= members; i++)); do
        peers+=("etcd-$i=http://$(etcd_peer "$i")")
    done
    (IFS=, && echo "${peers[*]}")
}

etcd_start() {
    local i=$1 variable
    # Each option of etcd can also come from a variable.
    for variable in "${!ETCD_@}"; do
        unset "$variable"
    done
    part_launch "etcd-$i" etcd --name "etcd-$i" --data-dir "$dir/etcd-$i/data" \
        --listen-client-urls "http://$(etcd_client "$i")" --advertise-client-urls "http://$(etcd_client "$i")" \
        --listen-peer-urls "http://$(etcd_peer "$i")" --initial-advertise-peer-urls "http://$(etcd_peer "$i")" \
        --initial-cluster "$(etcd_cluster)" --initial-cluster-token "im-local-$base" \
        --logger zap --log-level warn
}

# etcd_healthy I: it answers, and a quorum stands behind it.
etcd_healthy() {
    [[ $(talk "$(host "etcd-$1")" $((base + $1)) 'GET /health HTTP/1.0\r\n\r\n') = *'"health":"true"'* ]]
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
        listens "$(host "etcd-$1")" $((base + $1))
    fi
}

# etcd_save FILE: a snapshot of the running etcd.
etcd_save() {
    local i
    for ((i = 1; i <= members; i++)); do
        if [ "$(part_state "etcd-$i")" = running ] && etcd_healthy "$i"; then
            ETCDCTL_API=3 timeout 60 etcdctl --endpoints "http://$(etcd_client "$i")" snapshot save "$1" >&2 ||
                fail "etcd-$i gave no snapshot: see above and its log $dir/etcd-$i/log"
            return
        fi
    done
    fail "no etcd member is healthy, so there is nothing to save: first  services up"
}

# etcd_load FILE: every member is killed, and starts again from the snapshot, as after a disaster. Under a new token, as anybody should
# restore: then etcd says in each answer that it is another one, and no router claims in it before `imd cluster recover`, whether it saw
# what is lost or not.
etcd_load() {
    local i parts token
    token="im-local-$base-$(date +%s)-$$"
    mapfile -t parts < <(etcd_parts)
    ETCDCTL_API=3 timeout 60 etcdctl snapshot status "$1" >&2 || fail "$1 is no snapshot of etcd: make one with  services snapshot FILE"
    parts_kill "${parts[@]}"
    for ((i = 1; i <= members; i++)); do
        rm -rf "$dir/etcd-$i/data"
        ETCDCTL_API=3 timeout 60 etcdctl snapshot restore "$1" --name "etcd-$i" --data-dir "$dir/etcd-$i/data" \
            --initial-cluster "$(etcd_cluster)" --initial-cluster-token "$token" \
            --initial-advertise-peer-urls "http://$(etcd_peer "$i")" >>"$dir/etcd-$i/log" 2>&1 ||
            fail "etcd-$i could not be restored; see $dir/etcd-$i/log"
    done
}
