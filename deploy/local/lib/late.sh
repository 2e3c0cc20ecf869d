# shellcheck shell=bash disable=SC2154
# An old owner's writes that surface after two take-overs, with nothing but TCP: a router that is cut off from the CQL nodes has its writes in
# the send queues of its connections. When it is killed the kernel keeps these connections without an owner and repeats what is in them, ever
# less often, for some 100 s; when the cut is mended meanwhile, the writes of a process that is long dead reach the store.
#
# Sourced by deploy/local/faults, of which it uses begin, over, cluster, field, fail and say, $out, $json, $routers, $nodes, $settle, $cluster_id and what
# `services env` says. Needs network.sh, parts on a bridge, and
# python3 for late.py.

# The owner of each shard: shard, instance and the epoch of the claim, one a line.
late_owners() {
    etcdctl --endpoints "$IM_ETCD" get --prefix "/im/$cluster_id/v1/claims/" --write-out fields | tr -d '\\' | awk '
        # after NAME STOP: what stands between the two.
        function after(name, stop,    rest) {
            if (!match($0, name)) return ""
            rest = substr($0, RSTART + RLENGTH)
            return match(rest, stop) ? substr(rest, 1, RSTART - 1) : rest
        }
        /^"Key"/ { shard = after("claims/", "\"") + 0 }
        /^"ModRevision"/ { revision = $3 }
        /^"Value"/ { printf "%d %s %.0f\n", shard, after("\"instance\": *\"", "\""), after("\"generation\": *", "[^0-9]") * 2 ^ 40 + revision }'
}

# late_instance ROUTER: as what it has claimed its shards.
late_instance() { sed -n 's/.*"instance": *"\([^"]*\)".*/\1/p' "$(directory "$1")/ready.json"; }

# late_metric ROUTER METRIC: what it says now, 0 if it does not answer.
late_metric() {
    local address
    address=$(grep -o "\"name\": \"$1\".*" <<<"$json" | grep -o '"http": "[^"]*"' | head -n 1 | cut -d '"' -f 4)
    { timeout 2 bash -c 'exec 3<>"/dev/tcp/${0%:*}/${0##*:}" && printf "GET /metrics HTTP/1.0\r\n\r\n" >&3 && cat <&3' "$address" || true; } |
        awk -v metric="$2" '$1 == metric { value = $2 } END { print value + 0 }'
}

# late_until SECONDS ROUTER METRIC VALUE: waits until the metric has it.
late_until() {
    local until=$((SECONDS + $1))
    until [ "$(late_metric "$2" "$3")" -ge "$4" ]; do
        [ "$SECONDS" -lt "$until" ] || return 1
        sleep 0.05
    done
}

# late_taken_over INSTANCE FILE: waits until all shards have an owner, and none of them is this one. Writes who owns what then.
late_taken_over() {
    local until=$((SECONDS + 4 * lease + 10))
    until late_owners >"$2" && [ "$(wc -l <"$2")" -eq "$late_shards" ] && ! grep -qF " $1 " "$2"; do
        [ "$SECONDS" -lt "$until" ] || fail "late-writes: the shards of $1 are not all taken over"
        sleep 0.2
    done
}

# late_connections ROUTER: those to CQL nodes that nobody owns any more and that have something to send: queued bytes, both ends, `ss -i`.
late_connections() {
    in_network "$1" ss -HOtni state fin-wait-1 | awk -v nodes="$IM_CQL" '
        BEGIN { n = split(nodes, list, ","); for (i = 1; i <= n; i++) is_node[list[i]] = 1 }
        # The FIN counts as one byte.
        is_node[$4] && $2 > 1'
}

# late_route replace|delete ROUTER: the CQL nodes acknowledge what comes from it at once. Otherwise their first answer, for which nobody is there
# any more, ends the connection before its acknowledgement has made the rest be sent.
late_route() {
    local node
    for node in "${nodes[@]}"; do
        ip -n "$(network_space "$node")" route "$1" "$(host "$2")/32" dev eth0 quickack 1
    done
}

# late_writes FIRST SECOND: on a machine that is busy with other things the few conversations that wait for the store may all be of shards
# that the third router took over at once. Then it is done again, and what never happens fails.
late_writes() {
    local attempt
    [ "${#routers[@]}" -ge 3 ] || fail "late-writes needs  deploy/local/cluster up --routers 3"
    command -v python3 >/dev/null || fail "late-writes needs python3: apt-get install python3"
    for attempt in first second last; do
        late_attempt "$1" "$2"
        over "$1 and $2 start again" && cluster start "$1" "$2" && sleep "$settle"
        [[ $late_said != *", of them "[1-9]* ]] || return 0
        say "late-writes, $attempt attempt: no row of $1 reached the store after two take-overs: $late_said"
    done
    fail "late-writes: nothing surfaced"
}

# late_attempt FIRST SECOND: both are dead after it. Says in $late_said what surfaced.
late_attempt() {
    local first=$1 second=$2 one two watcher until written
    one=$(late_instance "$first")
    two=$(late_instance "$second")
    late_route replace "$first"
    # What a former fault has left behind is over: conversations are open, and it writes.
    written=$(late_metric "$first" im_storage_cql_committed_rows_total)
    late_until 60 "$first" im_storage_cql_committed_rows_total $((written + 50)) || fail "late-writes: $first writes next to nothing"
    late_owners >"$out/late.owners"
    late_shards=$(wc -l <"$out/late.owners")
    begin "$first no longer reaches ${nodes[*]}, and is killed when it waits for ten batches"
    # Stopped for a moment: then its next batches have messages of several senders, who will not send them again in the same order.
    cluster stop "$first" && sleep 0.5 && cluster cut "$first" "${nodes[@]}" && cluster cont "$first"
    # Not for long: what is repeated is repeated after 0.2, 0.6, 1.4, 3, 6.2, 12.6, 25.4, 51 s, counted from here.
    late_until 5 "$first" 'im_storage_cql_in_flight{lane="append"}' 10 || say "fewer than ten, after 5 s"
    cluster kill "$first"
    late_taken_over "$one" "$out/late.owners.1" && sleep 1
    begin "SIGKILL $second, which took shards of $first over" && cluster kill "$second"
    late_taken_over "$two" "$out/late.owners.2"
    # What the first router owned, under which epoch, if the second and then another one took it over.
    awk -v one="$one" -v two="$two" 'FILENAME != last { last = FILENAME; n++ }
        n == 1 && $2 == one { epoch[$1] = $3 } n == 2 && $2 == two { second[$1] = 1 }
        n == 3 && $2 != two && $1 in epoch && $1 in second { print $1, epoch[$1] }' \
        "$out/late.owners" "$out/late.owners.1" "$out/late.owners.2" >"$out/late.twice"
    late_connections "$first" >"$out/late.before"
    rm -f "$out/late.fifo"
    mkfifo "$out/late.fifo"
    in_network "$first" python3 "$here/lib/late.py" "$IM_CQL" "$(field keyspace)" "$late_shards" "$out/late.twice" <"$out/late.fifo" >"$out/late.surfaced" 4>&- &
    watcher=$!
    exec 5>"$out/late.fifo"
    until grep -qs '^watching' "$out/late.surfaced"; do
        kill -0 "$watcher" 2>/dev/null || fail "late-writes: nobody watches what surfaces"
        sleep 0.05
    done
    begin "what $first has under way may surface, $(awk '{ n += $2 - 1 } END { printf "%d bytes on %d connections", n, NR }' \
        "$out/late.before"): $(wc -l <"$out/late.twice") of its shards were taken over twice" && cluster mend "$first" "${nodes[@]}"
    until=$((SECONDS + 100))
    while [ -n "$(late_connections "$first")" ] && [ "$SECONDS" -lt "$until" ]; do sleep 0.2; done
    # The watcher says what it saw when its input ends.
    sleep 0.2
    exec 5>&-
    wait "$watcher" || fail "late-writes: what surfaced could not be read: see $out/late.surfaced"
    rm -f "$out/late.fifo"
    late_route delete "$first"
    late_said=$(tail -n 1 "$out/late.surfaced")
    begin "$first, long dead, has written: $late_said" && sleep "$settle"
}
