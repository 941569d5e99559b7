#!/bin/sh
# Runs fuzz targets with coverage guidance on the stable compiler: fuzz/run.sh SECONDS [TARGET...]
#
# The instrumentation that libFuzzer wants is plain LLVM; only the sanitizers need a nightly compiler. `cargo fuzz` does the
# same and more where there is one. libFuzzer itself is built with the C++ compiler, installed if it is missing.
#
# What was found to reach new code is kept, in $CLADE_FUZZ_CORPUS or else in the user's cache: the next run begins with it.
# As many targets run at a time as there are processors.
set -eu
cd "$(dirname "$0")"
seconds=$1
shift
targets=${*:-"boot_load unpack serial cpu_hide virtio virtio_state vsock saved_state image_parts snapshot_manifest snapshot_state snapshot_index snapshot_working_set snapshot_dir agent_envelopes agent_messages agent_form agent_client oci_layers oci_manifest egress egress_rule packet_stream agent_forward e2b_proxy"}
if ! command -v c++ >/dev/null; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++
fi
target_dir=${CARGO_TARGET_DIR:-$PWD/../target}/fuzz
flags='-Cpasses=sancov-module -Ccodegen-units=1 --cfg fuzzing'
for arg in level=4 inline-8bit-counters pc-table trace-compares; do
    flags="$flags -Cllvm-args=-sanitizer-coverage-$arg"
done
host=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="$flags" CARGO_TARGET_DIR=$target_dir cargo build --quiet --release --target "$host" --bins
corpus=${CLADE_FUZZ_CORPUS:-${XDG_CACHE_HOME:-$HOME/.cache}/clade/fuzz}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
one() {
    target=$1
    mkdir -p "$corpus/$target"
    if "$target_dir/$host/release/$target" -max_total_time="$seconds" -timeout=60 -rss_limit_mb=4096 \
        -artifact_prefix="$corpus/$target-" "$corpus/$target" >"$logs/$target" 2>&1; then
        echo "$target: $(grep -a 'cov:' "$logs/$target" | tail -n 1)"
    else
        echo "$target: FAILED"
        tail -n 40 "$logs/$target"
        touch "$logs/failed"
    fi
}
running=0
for target in $targets; do
    one "$target" &
    running=$((running + 1))
    if [ $running -ge "$(nproc)" ]; then
        wait
        running=0
    fi
done
wait
[ ! -e "$logs/failed" ]
