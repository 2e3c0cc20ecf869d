# shellcheck shell=bash disable=SC2154
# One Redis of Debian's redis-server, on 127.0.0.1. Needs common.sh and $base.

redis_address() { echo "127.0.0.1:$((base + 20))"; }

redis_start() {
    part_launch redis redis-server --port $((base + 20)) --bind 127.0.0.1 --dir "$dir/redis" --save '' --appendonly yes \
        --appendfsync everysec --daemonize no
}

redis_ready() {
    [[ $(talk 127.0.0.1 $((base + 20)) 'PING\r\nQUIT\r\n') = *+PONG* ]]
}
