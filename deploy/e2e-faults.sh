#!/usr/bin/env bash
# Every fault of deploy/local/faults once, on a cluster of its own (three routers, three gateways, three members of etcd, three CQL
# nodes, Redis) under continuous load, judged by the history checker. As root with network cuts, otherwise without.
#
#   bash deploy/e2e-faults.sh          needs target/release/{imd,im,loadtest}; leaves no process and no data behind
#   bash deploy/e2e-faults.sh NAME…    these faults only
#
# All of it takes 10 to 13 minutes on two quiet cores. FAULTS_SECONDS (1200) bounds it: what has not begun by then is left out, and that
# fails, unless FAULTS_PARTIAL=1. What this machine cannot do (no network namespaces) is named in the last line. The lease is 4 s
# (FAULTS_LEASE) instead of 10, so that what must outlive it is over sooner; the pauses are those of --quick. In full length, with a
# minute without a quorum:  deploy/local/faults etcd-quorum
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${FAULTS_SECONDS:-1200}
lease=${FAULTS_LEASE:-4}
export IM_BIN=${IM_BIN:-$PWD/target/release}
work=$(mktemp -d)
export IM_SERVICES_DIR=$work/services IM_CLUSTER_DIR=$work/cluster

end() {
    local code=$?
    trap - EXIT INT TERM
    if [ "$code" -ne 0 ]; then
        echo "faults: FAILED, the last lines of what was said:" >&2
        tail -n 5 "$IM_CLUSTER_DIR"/*/log "$work"/faults/*.log >&2 || true
    fi
    deploy/local/cluster down --purge >/dev/null 2>&1 || code=1
    deploy/local/services down --purge >/dev/null 2>&1 || code=1
    rm -rf "$work"
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

# A container's root may not be allowed to make network namespaces; then the cuts are left out.
network=loopback
probe=im-probe-$$
if [ "$(id -u)" -eq 0 ] && ! command -v ip >/dev/null; then
    apt-get install -y -q --no-install-recommends iproute2 >&2 || true
fi
if [ "$(id -u)" -eq 0 ] && ip netns add "$probe" 2>/dev/null; then
    if ip -n "$probe" link add name probe0 type bridge 2>/dev/null; then
        network=bridge
    fi
    ip netns delete "$probe"
fi
deploy/local/services up --members 3 --cql-nodes 3 --network "$network" >/dev/null
# Also for what is started again.
export IM_CLUSTER_SET=lease_ttl=${lease}s
deploy/local/cluster up --routers 3 --gateways 3 >/dev/null

names=("$@")
[ "${#names[@]}" -gt 0 ] || mapfile -t names < <(deploy/local/faults --list | grep -vx rolling && echo rolling)
cannot=() late=() lines=3
for name in "${names[@]}"; do
    if [[ $network != bridge && ( $name = cut-* || $name = late-writes ) ]] ||
        { [ "$name" = late-writes ] && ! command -v python3 >/dev/null; }; then
        cannot+=("$name")
        continue
    elif [ "$SECONDS" -ge "$seconds" ]; then
        late+=("$name")
        continue
    fi
    deploy/local/faults --quick --times 1 --lease "$lease" --rate 200 --pairs 12 --out "$work/faults" "$name" | tail -n "$lines"
    lines=1
done
summary="faults: $((${#names[@]} - ${#cannot[@]} - ${#late[@]})) of ${#names[@]}, every promise held, in $SECONDS s"
[ "${#cannot[@]}" -eq 0 ] || summary+="; LEFT OUT, this machine makes no network namespaces or has no python3: ${cannot[*]}"
[ "${#late[@]}" -eq 0 ] || summary+="; LEFT OUT, no time: ${late[*]}"
[ -z "${FAULTS_SUMMARY:-}" ] || echo "$summary" >"$FAULTS_SUMMARY"
echo "$summary"
[ "${#late[@]}" -eq 0 ] || [ "${FAULTS_PARTIAL:-}" = 1 ] || exit 1
