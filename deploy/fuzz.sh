#!/usr/bin/env bash
# Fuzzes every decoder of `proto` that reads bytes from outside.
#
#   deploy/fuzz.sh [SECONDS [TARGET…]]   for SECONDS (60), all targets together; without names all there are
#   deploy/fuzz.sh save                  writes what the runs here have found, minimized, into proto/fuzz/seeds
#
# Builds once, then runs one target after the other, with the golden vectors and proto/fuzz/seeds as seeds. A failure ends it with exit
# code 1 and leaves the input in proto/fuzz/artifacts. Needs the nightly toolchain, a C++ compiler, perl, and cargo-fuzz, which it
# installs if it is missing. Without nightly it says so and exits 0: the property tests cover the same decoders with fewer inputs.
set -euo pipefail
cd "$(dirname "$0")/../proto"

# Of the seeds of a target: the longest input, and the bytes of its file.
input_max=512
file_max=81920

seconds=${1:-60}
[ $# -eq 0 ] || shift
if ! [[ $seconds =~ ^([1-9][0-9]*|save)$ ]]; then
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
targets=${*:-$(cargo +nightly fuzz list)}
count=$(wc -w <<<"$targets")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# inputs DIRECTORY: lines `NAME DIGITS` become files of those bytes.
inputs() {
    mkdir -p "$1"
    perl -ne 'my ($name, $digits) = split; open my $file, ">", "'"$1"'/$name" or die $!; print $file pack("H*", $digits // "")'
}

# Each golden vector is a seed of every target: a file of its bytes, and one without the length of a frame.
awk '
    FNR == 1 { file++ }
    /^= / { vector++; name = file "-" vector; next }
    { sub(/#.*/, ""); gsub(/[ \t]/, ""); if (name != "") bytes[name] = bytes[name] $0 }
    END { for (name in bytes) { print name, bytes[name]; print name "-payload", substr(bytes[name], 9) } }
' vectors/client_frames.txt vectors/server_frames.txt vectors/bodies.txt vectors/api.txt vectors/link_items.txt vectors/*_batches.txt |
    inputs "$work/golden"

# What earlier runs found: an input a line, in hexadecimal digits.
for target in $targets; do
    mkdir -p "fuzz/corpus/$target" "fuzz/artifacts/$target"
    [ ! -f "fuzz/seeds/$target.hex" ] || awk '{ print NR, $1 }' "fuzz/seeds/$target.hex" | inputs "$work/$target"
    mkdir -p "$work/$target"
done

if [ "$seconds" = save ]; then
    mkdir -p fuzz/seeds
    for target in $targets; do
        mkdir "$work/minimized"
        "fuzz/target/$host/release/$target" -merge=1 -max_len="$input_max" "$work/minimized" "fuzz/corpus/$target" "$work/$target" "$work/golden" \
            >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
        # The shortest first, as many as there is room for.
        find "$work/minimized" -type f -size -"$((input_max + 1))"c -printf '%s %p\n' | sort -n | while read -r _ input; do
            perl -0777 -ne 'print unpack("H*", $_), "\n"' "$input"
        done | awk -v max="$file_max" 'NF { bytes += length($0) + 1; if (bytes <= max) print }' >"fuzz/seeds/$target.hex"
        echo "fuzz: $(wc -l <"fuzz/seeds/$target.hex") of $(find "$work/minimized" -type f | wc -l) inputs in seeds/$target.hex" >&2
        rm -r "$work/minimized"
    done
    exit 0
fi

share=$((seconds / count > 0 ? seconds / count : 1))
for target in $targets; do
    log=$work/$target.log
    echo "fuzz: $target for $share s" >&2
    if ! "fuzz/target/$host/release/$target" -max_total_time="$share" -max_len=8192 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
        -artifact_prefix="fuzz/artifacts/$target/" "fuzz/corpus/$target" "$work/$target" "$work/golden" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        echo "fuzz: $target FAILED; run it again with the input above: proto/fuzz/target/$host/release/$target INPUT" >&2
        exit 1
    fi
    sed -n 's/^stat::number_of_executed_units: */    inputs tried: /p' "$log" >&2
done
echo "fuzz: $count targets, $share s each, nothing found"
