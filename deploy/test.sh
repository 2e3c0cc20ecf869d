#!/usr/bin/env bash
# Runs every test of the project, installing first what they need and is missing. CI runs exactly this.
#
#   bash deploy/test.sh            everything; the last line is "all tests passed"
#
# Needs Rust (rustup), and as root on Debian installs what else is missing: a C compiler, git, and the packages of the services that
# it starts for itself (etcd, Redis and a CQL server: deploy/local/services). Takes free ports, leaves no process behind.
# SIMULATION_SEEDS (200), FUZZ_SECONDS (60), FAULTS_SECONDS (1200) and E2E_LINES (200000) change the length of steps.
set -euo pipefail
cd "$(dirname "$0")/.."

# Marks every process that this run starts, so that what is left of it can be found.
export DEPLOY_TEST_RUN="$$-$(date +%s)"
export RUST_BACKTRACE=1
started=$SECONDS
steps=()

processes_of_this_run() {
    local environment pid
    for environment in /proc/[0-9]*/environ; do
        pid=${environment#/proc/}
        pid=${pid%/environ}
        if [ "$pid" != "$$" ] && grep -qzx "DEPLOY_TEST_RUN=$DEPLOY_TEST_RUN" "$environment" 2>/dev/null; then
            # Not this script's own subshells, which run while the list is made.
            [ "$(readlink "/proc/$pid/exe" 2>/dev/null)" = "$(readlink /proc/$$/exe)" ] || echo "$pid"
        fi
    done
}

end() {
    local code=$? left
    trap - EXIT INT TERM
    services down --purge || code=1
    left=$(processes_of_this_run)
    if [ -n "$left" ]; then
        echo "left behind, killed now:" >&2
        for pid in $left; do
            tr '\0' ' ' <"/proc/$pid/cmdline" >&2 || true
            echo >&2
            kill -KILL "$pid" 2>/dev/null || true
        done
        [ "$code" -ne 0 ] || code=1
    fi
    echo
    printf '%s\n' "${steps[@]}"
    if [ "$code" -eq 0 ]; then
        echo "all tests passed in $((SECONDS - started)) s"
    else
        echo "FAILED after $((SECONDS - started)) s (exit $code)"
    fi
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

# step NAME COMMAND…: runs it, prints what it prints, remembers how long it took.
step() {
    local name=$1 begun=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || { steps+=("FAILED $((SECONDS - begun)) s  $name"); return 1; }
    steps+=("$(printf 'ok %5d s  %s' $((SECONDS - begun)) "$name")")
}

# The services of this run, apart from those that a developer has running.
services_dir=$PWD/target/local/test
services() {
    deploy/local/services --dir "$services_dir" "$@"
}

services_up() {
    # What a run left that was killed.
    services down --purge
    services up
}

# The tests that talk to real services are marked `#[ignore = "needs …"]`: they run here, and fail where a service is missing.
service_tests() {
    local file crates=' ' manifest program failed='' ran=''
    while IFS= read -r file; do
        crates+="$PWD/${file%%/*} "
    done < <(git grep -lE '#\[ignore = "needs (etcd|CQL|Redis|services)' -- '*.rs')
    # Of the whole workspace, as in the step before: a selection of crates would build their dependencies anew.
    cargo test --locked --workspace --no-run --message-format=json >target/test-programs.json || return 1
    while read -r manifest program; do
        [[ $crates = *" ${manifest%/Cargo.toml} "* ]] || continue
        ran=1
        echo "${program#"$PWD"/} --ignored"
        (
            # Not IM_ETCD and its like, which imd itself would read.
            eval "$(services env | sed -n '/^export IM_TEST_/p')"
            cd "${manifest%/*}"
            "$program" --ignored </dev/null
        ) || failed=1
    done < <(sed -n 's/.*"manifest_path":"\([^"]*\)".*"profile":{[^}]*"test":true}.*"executable":"\([^"]*\)".*/\1 \2/p' target/test-programs.json)
    [ -n "$ran" ] || echo "no test is marked as one that needs services" >&2
    [ -n "$ran" ] && [ -z "$failed" ]
}

install_what_is_missing() {
    local missing=()
    command -v cc >/dev/null || missing+=(gcc libc6-dev)
    # For the fuzzer's runtime.
    command -v c++ >/dev/null || missing+=(g++)
    command -v git >/dev/null || missing+=(git)
    command -v perl >/dev/null || missing+=(perl-base)
    # For the example of a reader of the registry, and the client in Python.
    command -v python3 >/dev/null || missing+=(python3)
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    if [ "${#missing[@]}" -gt 0 ]; then
        if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
            echo "please install: ${missing[*]}" >&2
            return 1
        fi
        apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    fi
    if ! command -v cargo >/dev/null; then
        echo "please install Rust: https://rustup.rs" >&2
        return 1
    fi
    cargo fmt --version >/dev/null 2>&1 || rustup component add rustfmt
    cargo clippy --version >/dev/null 2>&1 || rustup component add clippy
    cargo --version
    # The tests that look at the dependency tree read what is here and ask no network.
    cargo fetch --locked
}

# One implementation of cryptography, and no protoc: a wrong feature somewhere would bring the other one back.
check_tree() {
    if cargo tree --locked --workspace --invert aws-lc-sys 2>/dev/null | grep .; then
        echo "aws-lc-sys is in the tree" >&2
        return 1
    fi
    if ! cargo tree --locked --workspace --invert tonic-prost-build --depth 0 | grep -q "tools/tonic-prost-build"; then
        echo "the stand-in for tonic-prost-build is not used" >&2
        return 1
    fi
    echo "aws-lc-sys is absent, tonic-prost-build is the one in tools/"
}

# Advisories need the network, so they are asked by hand; the rest of deny.toml is also tests of im-node.
deny() {
    if cargo deny --version >/dev/null 2>&1; then
        cargo deny --offline --locked check bans licenses sources
    else
        echo "cargo-deny is not installed; the tests of im-node (node/tests/edges.rs) hold the same rules"
    fi
}

step "prerequisites" install_what_is_missing
step "format" cargo fmt --all --check
step "dependency tree" check_tree
step "cargo deny" deny
step "lints" cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
# Unit, property, model, conformance, integration and doc tests.
step "tests" cargo test --locked --workspace --no-fail-fast
step "services" services_up
step "tests on services" service_tests
step "release build" cargo build --locked --release --workspace
step "demo" target/release/imd demo
step "end to end" bash deploy/e2e.sh
step "examples of the SDK" bash deploy/e2e-examples.sh
step "a client from SPEC.md alone" bash deploy/e2e-python.sh
step "end to end on a cluster" env IM_SERVICES_DIR="$services_dir" bash deploy/e2e-cluster.sh
faults_summary=$PWD/target/local/faults-summary
mkdir -p target/local
rm -f "$faults_summary"
step "faults on a cluster" env FAULTS_SUMMARY="$faults_summary" bash deploy/e2e-faults.sh
# How many of them this machine could make stands beside the steps.
steps+=("$(sed 's/^/            /' "$faults_summary")")
step "simulation" target/release/imd simulate --seeds "${SIMULATION_SEEDS:-200}"
step "fuzzing" bash deploy/fuzz.sh "${FUZZ_SECONDS:-60}"
cargo +nightly fuzz --version >/dev/null 2>&1 || steps+=("            NOT fuzzed: it needs the nightly toolchain; the property tests stand")
