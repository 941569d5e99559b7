#!/usr/bin/env bash
# Adds the agent, as PID 1, to the small Linux guest of resources/linux: resources/agent/initramfs.sh GUEST_DIR AGENT OUT
#
# The kernel unpacks one archive after the other, and what comes later counts. So this is the guest's archive, and one with the
# agent as /init, links for the programs of busybox that people type, and two users. All others run as `busybox NAME`: where the
# guest's kernel is interpreted it takes 70 ms to unpack a link, and busybox has 269 programs.
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
programs=(
    sh '[' awk base64 basename cat chmod chown chroot cmp cp cut date dd df diff dirname dmesg du echo env expr false find free
    grep gunzip gzip halt head hostname id ifconfig ip kill killall less ln ls md5sum mkdir mkfifo mknod mktemp mount mv nc nproc
    od pidof ping poweroff printf ps pwd readlink realpath reboot rm rmdir sed seq setsid sha256sum sleep sort stat sync tail tar
    tee test time timeout top touch tr true tty udhcpc umount uname uniq uptime vi wc wget which whoami xargs xxd yes
)
all=$("$busybox" --list)
for name in "${programs[@]}"; do
    grep -qxF -- "$name" <<<"$all" || { echo "$0: busybox has no program $name" >&2; exit 1; }
    ln -s busybox "$root/bin/$name"
done
printf 'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\ntty:x:5:\nuser:x:1000:\n' >"$root/etc/group"
chown -R 1000:1000 "$root/home/user" 2>/dev/null || true

cat "$base" >"$out.partial"
(cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R +0:+0) >>"$out.partial"
mv "$out.partial" "$out"
echo "$out"
