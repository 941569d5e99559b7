#!/usr/bin/env bash
# Adds the agent, as PID 1, to the small Linux guest of resources/linux: resources/agent/initramfs.sh GUEST_DIR AGENT OUT
#
# The kernel unpacks one archive after the other, and what comes later counts. So this is the guest's archive, and one with the
# agent as /init, links for busybox's programs, and two users.
set -euo pipefail
if [ $# != 3 ]; then
    echo "usage: $0 GUEST_DIR AGENT OUT" >&2
    exit 2
fi
base=$1/initramfs.cpio agent=$2 out=$(realpath -m "$3")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root busybox=$work/busybox

mkdir -p "$root"/{bin,etc/clade/fork.d,root,home/user,var}
install -m 0755 "$agent" "$root/init"
cpio --quiet -i --to-stdout bin/busybox <"$base" >"$busybox"
chmod +x "$busybox"
for name in $("$busybox" --list); do
    [ "$name" = busybox ] || ln -s busybox "$root/bin/$name"
done
printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\ntty:x:5:\nuser:x:1000:\n' >"$root/etc/group"
chown -R 1000:1000 "$root/home/user" 2>/dev/null || true

cat "$base" >"$out.partial"
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R +0:+0) >>"$out.partial"
mv "$out.partial" "$out"
echo "$out"
