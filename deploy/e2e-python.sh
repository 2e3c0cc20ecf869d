#!/usr/bin/env bash
# A client that was written from proto/SPEC.md and the .proto files alone, in Python, against a real server: it shows that both say
# enough. It sends, repeats, follows, syncs after a Resync and after the server was killed.
#
#   bash deploy/e2e-python.sh      needs target/release/{imd,im}, python3 with venv, and pip's way to PyPI for protobuf and grpcio-tools
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$PWD/target/python
if ! "$venv/bin/python" -c 'import google.protobuf, grpc_tools' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'protobuf>=6,<8' 'grpcio-tools>=1.70,<2'
fi

work=$(mktemp -d)
end() {
    local code=$?
    trap - EXIT INT TERM
    # The server is a child of the script in Python; if that ended early, it is still there.
    pid=$(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' "$work/data/ready.json" 2>/dev/null || true)
    [ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || true
    if [ "$code" -ne 0 ]; then
        echo "the client in Python: FAILED, the last lines of the server:" >&2
        tail -n 5 "$work/server.log" >&2 || true
    fi
    rm -rf "$work"
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

mkdir "$work/pb" "$work/data"
"$venv/bin/python" -m grpc_tools.protoc -I proto/defs --python_out "$work/pb" proto/defs/im/v1/*.proto
bin=${IM_BIN:-$PWD/target/release}
PYTHONPATH=$work/pb PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" deploy/e2e_python.py "$bin/imd" "$bin/im" "$work/data"
