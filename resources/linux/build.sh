#!/usr/bin/env bash
# Builds the Linux test guest from Debian's own packages: a small kernel (vmlinux and bzImage) and a busybox initramfs.
#
#   build.sh [OUT_DIR]         build unless it is there already; the last line of standard output is the directory
#   build.sh --path [OUT_DIR]  print the directory, without building; exit 1 if it holds no current build
#
# OUT_DIR defaults to a directory named by a hash of the inputs, in $CLADE_GUEST_CACHE or else in the user's cache.
# A build takes about 5 minutes on 2 cores and 2 GB in $TMPDIR. Its output goes to standard error.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
inputs=(build.sh guest.config kernel.patch init.c vsock.c console)
outputs=(vmlinux bzImage initramfs.cpio)
packages=(linux-source-6.1 build-essential flex bison bc libelf-dev libssl-dev busybox-static cpio patch xz-utils)

say() { echo "build.sh: $*" >&2; }
die() { say "$@"; exit 1; }

path_only=
if [ "${1-}" = --path ]; then path_only=1; shift; fi
[ $# -le 1 ] || die "one output directory at most, not: $*"
case ${1-} in -*) die "no such option: $1" ;; esac

hash=$(cd "$here" && sha256sum "${inputs[@]}" | sha256sum | cut -c1-16)
out=${1:-${CLADE_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/clade}/linux-$hash}
case $out in /*) ;; *) out=$PWD/$out ;; esac

# `inputs` is written last: without it, or with another hash in it, the directory is incomplete or out of date. So is one that
# was built from another version of the kernel's source, where that is installed.
source_version() { dpkg-query -W -f '${Version}' linux-source-6.1 2>/dev/null || true; }
current() {
    local file version
    for file in "${outputs[@]}"; do [ -s "$out/$file" ] || return 1; done
    version=$(source_version)
    [ -z "$version" ] || [ "$(cat "$out/source" 2>/dev/null)" = "$version" ] || return 1
    [ "$(cat "$out/inputs" 2>/dev/null)" = "$hash" ]
}

if current; then echo "$out"; exit; fi
if [ -n "$path_only" ]; then echo "$out"; exit 1; fi

mkdir -p "$out"
exec 9>"$out/.lock"
flock 9
if current; then echo "$out"; exit; fi  # somebody else built it while this one waited
[ "$(uname -m)" = x86_64 ] || die "the guest is built on x86_64 only"

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    sudo=()
    if [ "$(id -u)" != 0 ]; then sudo=(sudo -n); fi
    if ! command -v apt-get >/dev/null || { [ ${#sudo[@]} -gt 0 ] && ! sudo -n true 2>/dev/null; }; then
        die "please install these Debian packages: ${missing[*]}"
    fi
    say "installing ${missing[*]}"
    "${sudo[@]}" apt-get update -qq >&2
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi

rm -rf "$out"/.build.*  # of a build that was killed
work=$(mktemp -d)
aside=$(mktemp -d "$out/.build.XXXXXX")
trap 'rm -rf "$work" "$aside"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Runs a command that talks too much, and lets it talk only when it fails.
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; die "failed: $*"; }; }

say "unpacking the kernel"
tar xf /usr/src/linux-source-6.1.tar.xz -C "$work"
cd "$work/linux-source-6.1"
patch -s -p1 <"$here/kernel.patch" >&2

# The banner names nobody's machine, and the same inputs give the same kernel.
export KBUILD_BUILD_USER=clade KBUILD_BUILD_HOST=clade KBUILD_BUILD_TIMESTAMP='2026-01-01 00:00:00 UTC'
quietly make -s tinyconfig
quietly scripts/kconfig/merge_config.sh -m .config "$here/guest.config"
quietly make -s olddefconfig
# Kconfig drops an option whose dependencies are not met without a word.
while read -r option; do
    case $option in CONFIG_*) grep -qxF "$option" .config || die "the kernel's configuration does not take $option" ;; esac
done <"$here/guest.config"

say "building the kernel"
make -s -j"$(nproc)" vmlinux bzImage >&2
strip -o "$aside/vmlinux" vmlinux
cp arch/x86/boot/bzImage "$aside/bzImage"

root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp}
cp /bin/busybox "$root/bin/busybox"
install -m 644 "$here/console" "$root/console"
program() {
    gcc -Os -ffreestanding -Wall -Wextra -static -nostdlib -fno-asynchronous-unwind-tables -fno-stack-protector -fno-ident -s \
        -Wl,--build-id=none -include tools/include/nolibc/nolibc.h -o "$1" "$2" -lgcc
}
program "$root/init" "$here/init.c"
program "$root/bin/vsock" "$here/vsock.c"
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc --reproducible -R 0:0) >"$aside/initramfs.cpio"

for file in "${outputs[@]}"; do mv "$aside/$file" "$out/$file"; done
source_version >"$aside/source"
mv "$aside/source" "$out/source"
echo "$hash" >"$aside/inputs"
mv "$aside/inputs" "$out/inputs"
say "done"
echo "$out"
