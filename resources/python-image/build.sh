#!/usr/bin/env bash
# Makes an OCI image of Python from Debian's packages, without a registry: an interpreter with its library that answers expressions.
#
#   build.sh [OUT_DIR]         build unless it is there already; the last line of standard output is the directory, an OCI layout
#   build.sh --path [OUT_DIR]  print the directory, without building; exit 1 if it holds no current build
#
# The layout has one image, `python`. Its entrypoint is server.py; `answer EXPRESSION` in it asks that. OUT_DIR defaults to a
# directory named by a hash of the inputs, in $CLADE_GUEST_CACHE or else in the user's cache. A build takes half a minute.
set -euo pipefail
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
inputs=(build.sh server.py answer.c reseed)
tools=(umoci gcc libc6-dev binutils)
version=3.11
# All that the interpreter and its library are linked with; the build checks that nothing is missing.
packages=(
    python3-minimal python$version-minimal libpython3-stdlib libpython$version-minimal libpython$version-stdlib
    libc6 libexpat1 zlib1g libssl3 libcrypt1 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libreadline8 libtinfo6
    libncursesw6 libdb5.3 busybox-static
)

say() { echo "build.sh: $*" >&2; }
die() { say "$@"; exit 1; }

path_only=
if [ "${1-}" = --path ]; then path_only=1; shift; fi
[ $# -le 1 ] || die "one output directory at most, not: $*"
case ${1-} in -*) die "no such option: $1" ;; esac

hash=$(cd "$here" && sha256sum "${inputs[@]}" | sha256sum | cut -c1-16)
out=${1:-${CLADE_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/clade}/python-$hash}
case $out in /*) ;; *) out=$PWD/$out ;; esac

# `inputs` is written last: without it, or with another hash in it, the directory is incomplete or out of date.
current() { [ -s "$out/index.json" ] && [ "$(cat "$out/inputs" 2>/dev/null)" = "$hash" ]; }

if current; then echo "$out"; exit; fi
if [ -n "$path_only" ]; then echo "$out"; exit 1; fi

mkdir -p "$(dirname "$out")"
exec 9>"$out.lock"
flock 9
if current; then echo "$out"; exit; fi  # somebody else built it while this one waited
[ "$(uname -m)" = x86_64 ] || die "the image is built on x86_64 only"

missing=()
for tool in "${tools[@]}"; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$tool" 2>/dev/null | grep -q '^ii' || missing+=("$tool")
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

work=$(mktemp -d)
aside=$out.partial
trap 'rm -rf "$work" "$aside"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
rm -rf "$aside"  # of a build that was killed

# Runs a command that talks too much, and lets it talk only when it fails.
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; die "failed: $*"; }; }

say "fetching ${#packages[@]} packages"
mkdir "$work/packages" "$work/root"
cd "$work/packages"
quietly apt-get download "${packages[@]}"
for package in *.deb; do dpkg-deb -x "$package" "$work/root"; done
cd "$work"

root=$work/root
rm -rf "$root"/usr/share/{doc,man,lintian,doc-base,bug,apport,applications,pixmaps,binfmts}
# Half of Kerberos would come with it, and Python has given it up.
rm -f "$root/usr/lib/python$version/lib-dynload"/nis.*
mkdir -p "$root"/{dev,proc,sys,run,tmp,root,srv,bin,etc/clade/fork.d}
chmod 1777 "$root/tmp"
printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n' >"$root/etc/passwd"
printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >"$root/etc/group"
for name in $("$root/bin/busybox" --list); do
    [ -e "$root/bin/$name" ] || ln -s busybox "$root/bin/$name"
done
install -m 644 "$here/server.py" "$root/srv/server.py"
gcc -Os -static -s -Wall -Wextra -Werror -o "$root/bin/answer" "$here/answer.c"
# What Python has drawn ahead is the parent's too: a child draws anew.
install -m 755 "$here/reseed" "$root/etc/clade/fork.d/10-reseed"

say "checking what is linked"
libraries=$(find "$root"/lib* "$root/usr/lib" -name '*.so*' -printf '%f\n' | sort -u)
while read -r needed; do
    grep -qxF "$needed" <<<"$libraries" || die "no package has $needed"
done < <(find "$root" -type f \( -name '*.so*' -o -path "*/bin/python*" \) -exec readelf -d {} + 2>/dev/null |
    sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | sort -u)

# As the packages do when they are installed; the same bytes each time.
say "compiling the library"
loader=$root/lib64/ld-linux-x86-64.so.2
quietly env -i PYTHONHOME="$root/usr" PYTHONHASHSEED=0 "$loader" \
    --library-path "$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu" "$root/usr/bin/python$version" \
    -S -m compileall -q --invalidation-mode unchecked-hash -s "$root" "$root/usr/lib/python$version" "$root/srv"

say "writing the image"
# With a tool of its own: umoci's leaves the archive's end out when it takes a directory.
tar -C "$root" --sort=name --owner=0 --group=0 --numeric-owner --mtime=2026-01-01T00:00:00Z -cf layer.tar .
quietly umoci init --layout "$aside"
quietly umoci new --image "$aside:python"
quietly umoci raw add-layer --image "$aside:python" layer.tar
quietly umoci config --image "$aside:python" \
    --config.entrypoint /usr/bin/python3 --config.entrypoint /srv/server.py \
    --config.env PATH=/usr/bin:/bin --config.env LANG=C.UTF-8 --config.workingdir /srv \
    --os linux --architecture amd64 --no-history
quietly umoci gc --layout "$aside"
echo "$hash" >"$aside/inputs"
rm -rf "$out"
mv "$aside" "$out"
say "done"
echo "$out"
