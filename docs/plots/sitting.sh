#!/usr/bin/env bash
# The benches of docs/performance.md, one after another, on a quiet host: docs/plots/sitting.sh DIR.
# DIR then has a JSON file of each, for plot.py and tables.py. About five minutes on a fast host.
set -u
out=${1:?a directory for the results}
lab=${CLADE_LAB:-target/release/clade-lab}
mkdir -p "$out"
# Without a disk below it. Its path must be short: sockets are in it.
XDG_RUNTIME_DIR=$(mktemp -d /dev/shm/clade.XXXX)
export XDG_RUNTIME_DIR
trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
failed=0
bench() {
    local name=$1
    shift
    rm -f "$out/$name.json"
    if ! timeout 600 "$lab" "$@" --json >"$out/$name.part" 2>"$out/$name.err" ||
        ! mv "$out/$name.part" "$out/$name.json"; then
        echo "$name failed: $out/$name.err" >&2
        failed=1
    fi
    date "+%T $name"
}
bench clones bench clones --mem 64M --count 1000 --samples 100
bench fork bench fork --mem 512M,1G,2G,4G,8G,16G --samples 30
bench fork-timeline bench fork --timeline --mem 512M --samples 60
bench live bench live --mem 64M --count 1000
bench freeze bench freeze --samples 20
bench reset bench reset --mem 512M --samples 30
CLADE_QUIRKS=none bench reset-none bench reset --mem 512M --samples 30
bench rollback bench rollback --mem 512M --samples 30
bench restore bench restore --mem 512M --samples 20
bench save bench save --mem 256M --samples 10
bench suspend bench suspend --samples 20
bench ahead bench ahead --mem 64M --samples 15
bench disk bench disk --samples 20
bench pin bench pin --samples 50
bench stress stress dma --seconds 60
exit $failed
