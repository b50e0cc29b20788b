#!/bin/sh
# example.sh LANGUAGE PROTOCOL LIBRARIES WORK: builds that language's example of Mooncake's C interface and runs it.
# Exit status 77 and a word where the language is not here.
set -eu
language=$1 protocol=$2 libraries=$3 work=$4
root=$(cd "$(dirname "$0")/../.." && pwd)
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

needs() {
    command -v "$1" >/dev/null || { echo "skipped: no $1 here" >&2; exit 77; }
}

mkdir -p "$work"
case $language in
go)
    needs go
    export CGO_CFLAGS="-I$root/include" CGO_LDFLAGS="-L$libraries" GOCACHE="$work/cache" GO111MODULE=off
    go build -o "$work/example" "$root/examples/go/transfer_engine.go"
    ;;
readme)
    sed -n '/^## Mooncake.s C interface/,/^## What is where/{/^```c$/,/^```$/p}' "$root/README.md" | sed '/^```/d' >"$work/readme.c"
    cc -Wall -Wextra -Werror -I"$root/include" "$work/readme.c" -L"$libraries" -ltransfer_engine -o "$work/example"
    "$work/example" | grep -x verified
    exit
    ;;
python)
    needs python3
    exec python3 "$root/examples/python/transfer_engine.py" "$protocol"
    ;;
rust)
    . "$root/scripts/env"
    needs rustc
    rustc --edition 2021 -D warnings -L "$libraries" -o "$work/example" "$root/examples/rust/transfer_engine.rs"
    ;;
esac
exec "$work/example" "$protocol"
