#!/usr/bin/env bash
# Fuzzes every decoder of `proto` that reads bytes from outside: deploy/fuzz.sh [SECONDS, default 60, of all targets together].
#
# Builds once, then runs one target after the other, with the golden vectors as seeds. A failure ends it with exit code 1 and leaves
# the input in proto/fuzz/artifacts. Needs the nightly toolchain, a C++ compiler, and cargo-fuzz, which it installs if it is missing.
# Without nightly it says so and exits 0: the property tests cover the same decoders with fewer inputs.
set -euo pipefail
cd "$(dirname "$0")/../proto"

seconds=${1:-60}
if ! [[ $seconds =~ ^[1-9][0-9]*$ ]]; then
    echo "fuzz: SECONDS must be a positive number, not '$seconds'" >&2
    exit 2
fi
if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "fuzz: SKIPPED, the nightly toolchain is not installed (rustup toolchain install nightly); the property tests stand" >&2
    exit 0
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    echo "fuzz: SKIPPED, libfuzzer needs a C++ compiler (c++ or g++); the property tests stand" >&2
    exit 0
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "fuzz: installing cargo-fuzz" >&2
    cargo install cargo-fuzz --locked --quiet
fi

# No address sanitizer: the code is safe Rust, which it would only slow down.
cargo +nightly fuzz build --sanitizer none
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
targets=$(cargo +nightly fuzz list)
count=$(wc -w <<<"$targets")
share=$((seconds / count > 0 ? seconds / count : 1))

# Each golden vector is a seed of every target: a file of its bytes, and one without the length of a frame.
seeds=$(mktemp -d)
trap 'rm -rf "$seeds"' EXIT
awk '
    FNR == 1 { file++ }
    /^= / { vector++; name = file "-" vector; next }
    { sub(/#.*/, ""); gsub(/[ \t]/, ""); if (name != "") bytes[name] = bytes[name] $0 }
    END { for (name in bytes) print name, bytes[name] }
' vectors/client_frames.txt vectors/server_frames.txt vectors/bodies.txt vectors/api.txt vectors/*_batches.txt |
    while read -r name digits; do
        printf "$(sed 's/../\\x&/g' <<<"$digits")" >"$seeds/$name"
        printf "$(sed 's/../\\x&/g' <<<"${digits:8}")" >"$seeds/$name-payload"
    done

for target in $targets; do
    mkdir -p "fuzz/corpus/$target" "fuzz/artifacts/$target"
    log=$(mktemp)
    echo "fuzz: $target for $share s" >&2
    if ! "fuzz/target/$host/release/$target" -max_total_time="$share" -max_len=8192 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
        -artifact_prefix="fuzz/artifacts/$target/" "fuzz/corpus/$target" "$seeds" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "fuzz: $target FAILED; run it again with the input above: proto/fuzz/target/$host/release/$target INPUT" >&2
        exit 1
    fi
    sed -n 's/^stat::number_of_executed_units: */    inputs tried: /p' "$log" >&2
    rm -f "$log"
done
echo "fuzz: $count targets, $share s each, nothing found"
