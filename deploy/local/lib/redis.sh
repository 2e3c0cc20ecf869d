# shellcheck shell=bash disable=SC2154
# One Redis of Debian's redis-server. Needs common.sh, network.sh and $base.

redis_address() { echo "$(host redis):$((base + 20))"; }

redis_start() {
    part_launch redis redis-server --port $((base + 20)) --bind "$(host redis)" --protected-mode no --dir "$dir/redis" --save '' --appendonly yes \
        --appendfsync everysec --daemonize no
}

redis_ready() {
    [[ $(talk "$(host redis)" $((base + 20)) 'PING\r\nQUIT\r\n') = *+PONG* ]]
}
