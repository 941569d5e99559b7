#!/usr/bin/env bash
# Builds the agent of guests as one static program, and prints its path: resources/agent/build.sh
#
# `+crt-static` is a flag of a target, not of a package, so it cannot stand in a manifest. With the target named, it is not for
# build scripts and macros. The waker of mio is a pipe: small kernels have no eventfd.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
host=x86_64-unknown-linux-gnu
target=${CARGO_TARGET_DIR:-$PWD/target}/agent
# Most bytes it may have.
limit=$((4 << 20))

RUSTFLAGS='-Ctarget-feature=+crt-static -Crelocation-model=static --cfg mio_unsupported_force_waker_pipe' \
    CARGO_TARGET_DIR=$target cargo build --quiet --locked --profile agent --target $host -p clade-agent >&2

program=$target/$host/agent/clade-agent
size=$(stat -c %s "$program")
if [ "$size" -gt $limit ]; then
    echo "$program has $size bytes; $limit are allowed" >&2
    exit 1
fi
if readelf -l "$program" | grep -q INTERP; then
    echo "$program is not static" >&2
    exit 1
fi
echo "$program"
