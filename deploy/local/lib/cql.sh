# shellcheck shell=bash disable=SC2154
# Asks a CQL server whether it is ready, in its own protocol (version 4), with nothing but bash. Needs common.sh.

# bytes LENGTH NUMBER: big-endian, as an argument of printf.
cql_bytes() {
    local i out=
    for ((i = $1 - 1; i >= 0; i--)); do
        out+=$(printf '\\x%02x' $((($2 >> (8 * i)) & 255)))
    done
    echo "$out"
}

# cql_select HOST PORT CONSISTENCY SELECT: true when the server answers it with rows, none or many.
cql_select() {
    local startup='\x00\x01\x00\x0bCQL_VERSION\x00\x053.0.0' query
    startup='\x04\x00\x00\x00\x01'$(cql_bytes 4 22)$startup
    query='\x04\x00\x00\x01\x07'$(cql_bytes 4 $((4 + ${#4} + 3)))$(cql_bytes 4 ${#4})$4$(cql_bytes 2 "$3")'\x00'
    # READY is a frame of nine bytes; of the answer only the header counts: 8 is a result, 0 an error.
    # shellcheck disable=SC2016
    [ "$(timeout 3 bash -c 'exec 3<>"/dev/tcp/$0/$1" && printf "$2" >&3 && head -c 9 <&3 >/dev/null && printf "$3" >&3 &&
        head -c 9 <&3' "$1" "$2" "$startup" "$query" 2>/dev/null | tail -c +5 | od -An -tx1 -N1 | tr -d ' ')" = 08 ]
}

# cql_answers HOST PORT: by itself.
cql_answers() { cql_select "$1" "$2" 1 'SELECT key FROM system.local'; }

# cql_sees_all HOST PORT: three nodes are all up in this node's eyes, and answer it. The table has three replicas on every server
# of this kind, and a read with consistency ALL (5) needs each of them.
cql_sees_all() {
    cql_select "$1" "$2" 5 \
        "SELECT status FROM system_distributed.view_build_status WHERE keyspace_name = 'none' AND view_name = 'none'"
}
