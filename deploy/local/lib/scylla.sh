# shellcheck shell=bash disable=SC2154
# ScyllaDB from its image, where Docker is present: nodes cql-1 … cql-N as containers, reached at their own addresses (Linux). Each
# node's process is the container's, so that it is signalled like every other part. Needs common.sh, cql.sh, $cql_nodes and $base.

scylla_image=${IM_SERVICES_SCYLLA_IMAGE:-scylladb/scylla:6.2}

scylla_container() { echo "im-local-$base-cql-$1"; }

scylla_address() {
    docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$(scylla_container "$1")" 2>/dev/null
}

scylla_refuse_without_docker() {
    docker info >/dev/null 2>&1 || refuse "--scylla needs a running Docker: start it, or leave --scylla out for Cassandra"
}

scylla_start() {
    local i=$1 container pid first
    container=$(scylla_container "$i")
    mkdir -p "$dir/cql-$i"
    if docker inspect "$container" >/dev/null 2>&1; then
        docker start "$container" >/dev/null || fail "docker start $container failed: see above"
    else
        first=$(scylla_address 1)
        docker run --detach --name "$container" "$scylla_image" --smp 1 --memory 1G --overprovisioned 1 --developer-mode 1 \
            ${first:+--seeds="$first"} --commitlog-sync batch >/dev/null || fail "docker run $scylla_image failed: see above"
    fi
    pid=$(docker inspect --format '{{.State.Pid}}' "$container")
    echo "$pid $(process_field "$pid" start) $(boot_id)" >"$dir/cql-$i/pid"
    # Nodes join one after the other.
    wait_until "$wait_seconds" "cql-$i" -- scylla_up "$i"
}

# scylla_up I: it answers, and sees itself up and normal.
scylla_up() { cql_answers "$(scylla_address "$1")" 9042; }

scylla_sees_all() {
    [ "$(docker exec "$(scylla_container "$1")" nodetool status 2>/dev/null | grep -c '^UN')" -eq "$cql_nodes" ]
}

# scylla_logs: what the containers wrote, beside the logs of the others.
scylla_logs() { docker logs "$(scylla_container "$1")" >"$dir/cql-$1/log" 2>&1 || true; }

scylla_remove() { docker rm --force --volumes "$(scylla_container "$1")" >/dev/null 2>&1 || true; }
