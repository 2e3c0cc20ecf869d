# shellcheck shell=bash disable=SC2154
# Apache Cassandra 5.0 from its jars on Maven Central: nodes cql-1 … cql-N, all on one port.
#
# It stands in for ScyllaDB where no ScyllaDB can be installed. Its commit log is synced before a write is answered (batch), so that
# what a killed node had acknowledged is there when it comes back. Needs common.sh, network.sh, install.sh, $here, $cql_nodes and $base.

cassandra_version=5.0.9
cassandra_jars=${IM_SERVICES_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/im-local-services}/cassandra-$cassandra_version
cassandra_heap=${IM_SERVICES_CQL_HEAP:-256m}

# What Cassandra reaches into, as its own start script lists it for Java 17.
cassandra_exports="java.base/jdk.internal.misc java.management.rmi/com.sun.jmx.remote.internal.rmi java.rmi/sun.rmi.registry
    java.rmi/sun.rmi.server java.rmi/sun.rmi.transport.tcp java.sql/java.sql java.base/java.lang.ref jdk.unsupported/sun.misc
    jdk.compiler/com.sun.tools.javac.file jdk.attach/sun.tools.attach"
cassandra_opens="java.base/java.lang.module java.base/jdk.internal.loader java.base/jdk.internal.ref java.base/jdk.internal.reflect
    java.base/jdk.internal.math java.base/jdk.internal.module java.base/jdk.internal.util.jar
    jdk.management/com.sun.management.internal java.base/sun.nio.ch java.base/java.io java.base/java.lang.reflect
    jdk.compiler/com.sun.tools.javac java.base/java.lang java.base/java.util java.base/java.nio java.rmi/sun.rmi.transport.tcp"

cassandra_modules() {
    local module
    for module in $cassandra_exports; do
        echo "--add-exports=$module=ALL-UNNAMED"
    done
    for module in $cassandra_opens; do
        echo "--add-opens=$module=ALL-UNNAMED"
    done
}

cassandra_has_jars() { [ -e "$cassandra_jars/cassandra-all-$cassandra_version.jar" ]; }

# Fetches the jars once for this user, 70 MB. The directory appears whole or not at all.
cassandra_fetch() {
    local new
    ! cassandra_has_jars || return 0
    mkdir -p "${cassandra_jars%/*}"
    take_lock 7 "${cassandra_jars%/*}/lock"
    if ! cassandra_has_jars; then
        say "fetching Cassandra $cassandra_version from Maven Central"
        new=$(mktemp -d "$cassandra_jars.XXXXXX")
        if ! mvn -B -q -C -Dstyle.color=never -f "$here/cassandra/pom.xml" dependency:copy-dependencies -DoutputDirectory="$new" \
            -DincludeScope=runtime </dev/null >&2; then
            rm -rf "$new"
            fail "Maven could not fetch Cassandra: see above, then try again"
        fi
        chmod 755 "$new"
        rm -rf "$cassandra_jars"
        mv "$new" "$cassandra_jars"
    fi
    exec 7>&-
}

cassandra_port() { echo $((base + 30)); }
cassandra_jmx() { echo $((base + 40 + $1)); }

# cassandra_configuration I: all of cassandra.yaml.
cassandra_configuration() {
    local i=$1 node=$dir/cql-$1 j token seeds=()
    for ((j = 1; j <= cql_nodes; j++)); do
        seeds+=("$(host "cql-$j"):$((base + 31))")
    done
    # shellcheck disable=SC2017 # the other order overflows
    token=$((-9223372036854775807 + (i - 1) * (9223372036854775807 / cql_nodes * 2)))
    cat <<YAML
cluster_name: im-local
partitioner: org.apache.cassandra.dht.Murmur3Partitioner
endpoint_snitch: SimpleSnitch
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
    parameters: [{ seeds: "$(IFS=, && echo "${seeds[*]}")" }]
listen_address: $(host "cql-$i")
rpc_address: $(host "cql-$i")
storage_port: $((base + 31))
native_transport_port: $(cassandra_port)
start_native_transport: true
# One token each, spread evenly, known in advance: all nodes of an empty cluster start at once.
num_tokens: 1
initial_token: "$token"
auto_bootstrap: false
# A write is on disk before it is answered. A write holds its thread meanwhile, hence many threads.
commitlog_sync: batch
concurrent_writes: 64
concurrent_reads: 16
concurrent_counter_writes: 2
concurrent_compactors: 1
# The largest single write is half a segment.
commitlog_segment_size: 8MiB
commitlog_total_space: 256MiB
memtable_heap_space: 64MiB
memtable_offheap_space: 64MiB
key_cache_size: 0MiB
counter_cache_size: 0MiB
file_cache_size: 32MiB
networking_cache_size: 32MiB
auto_snapshot: false
data_file_directories: [ "$node/data" ]
commitlog_directory: "$node/commitlog"
hints_directory: "$node/hints"
saved_caches_directory: "$node/saved_caches"
cdc_raw_directory: "$node/cdc_raw"
YAML
}

cassandra_start() {
    local i=$1 node=$dir/cql-$1 modules
    mkdir -p "$node"
    cassandra_configuration "$i" >"$node/cassandra.yaml"
    cp "$here/cassandra/logback.xml" "$node/logback.xml"
    mapfile -t modules < <(cassandra_modules)
    ulimit -S -n "$(ulimit -H -n | awk '{ print ($1 == "unlimited" || $1 > 65536) ? 65536 : $1 }')" || true
    part_launch "cql-$i" "$(java17)" "-Xms$cassandra_heap" "-Xmx$cassandra_heap" -XX:MaxDirectMemorySize=256m -Xss512k \
        -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:+ExitOnOutOfMemoryError -javaagent:"$cassandra_jars/jamm-0.4.0.jar" \
        -Djdk.attach.allowAttachSelf=true -Dio.netty.tryReflectionSetAccessible=true -Djava.net.preferIPv4Stack=true \
        -Dio.netty.allocator.maxOrder=11 -Dio.netty.eventLoopThreads=2 "${modules[@]}" \
        -Dcassandra.config="file://$node/cassandra.yaml" -Dcassandra.storagedir="$node" -Dcassandra-foreground=yes \
        -Dlogback.configurationFile="$node/logback.xml" -Djava.io.tmpdir="$node" -Djna.tmpdir="$node" \
        -Dcassandra.skip_wait_for_gossip_to_settle=0 -Dcassandra.ring_delay_ms=0 \
        -Dcassandra.consistent.rangemovement=false -Dcassandra.shutdown_announce_in_ms=0 \
        -Dcassandra.jmx.local.port="$(cassandra_jmx "$i")" \
        -cp "$cassandra_jars/*" org.apache.cassandra.service.CassandraDaemon
}

# cassandra_nodetool I ARGUMENT…
cassandra_nodetool() {
    local i=$1 node=$dir/cql-$1 modules
    shift
    mapfile -t modules < <(cassandra_modules)
    in_network "cql-$i" "$(java17)" -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xmx64m "${modules[@]}" -Dcassandra.storagedir="$node" \
        -Duser.home="$node" -Dlogback.configurationFile="$node/logback.xml" -cp "$cassandra_jars/*" \
        org.apache.cassandra.tools.NodeTool -h 127.0.0.1 -p "$(cassandra_jmx "$i")" "$@"
}
