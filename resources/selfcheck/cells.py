#!/usr/bin/env python3
"""Counts what goes wrong in guests: self-checks and deaths by kind of guest, vCPUs and load of the host.

  cells.py --guest DIR --program FILE [--clade FILE] [--qemu FILE] [--kind KIND,...] [--cpus 1,2] [--load 0,4,16]
           [--seconds 30] [--json FILE]

DIR has vmlinux and initramfs.cpio (`clade guest linux` prints it), FILE is what build.sh makes. A VM runs
`selfcheck`, and the host does what the kind says for so many seconds, one kind after the other:

  alone     nothing
  forked    it is forked four times a second; of its children three at a time run for five seconds and are looked at too
  reset     a child of it is reset twice a second
  woken     it is suspended, and woken a moment later, all the time
  restored  it is saved once; then it is restored, runs for four seconds and is stopped, all the time
  qemu      nothing; it is QEMU's microvm with the same kernel, under the same KVM

Load is so many processes that do nothing but run. A line of the table counts over all VMs of the cell: what their
programs have checked while they were looked at, values that were wrong, and programs that died.
"""

import argparse
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

# What QEMU's Linux needs where KVM interprets guest kernels: what Clade's quirks do for its own.
QEMU_CMDLINE = (
    "console=ttyS0 reboot=k panic=-1 tsc=reliable noxsave nofsgsbase random.trust_cpu=on "
    "clearcpuid=popcnt,cx16,smap,smep,erms,fsrm,bmi1,bmi2,movbe,rdpid,invpcid,pcid,xsaves,xsavec,xsaveopt,avx,avx2,"
    "rdrand,rdseed,ssse3,sse4_2,pclmulqdq,aes "
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-AVX_Fast_Unaligned_Load"
)
KINDS = ["alone", "forked", "reset", "woken", "restored", "qemu"]
COUNTS = ["regs", "fpu", "sys", "memory", "pages", "libc", "sigs", "execs", "wide", "errors", "wide-errors", "deaths"]
LINE = re.compile(r"selfcheck: \d+ s((?: [a-z-]+ \d+)+)\r?\n")
# A kernel's word on a program that died, also of those that are not selfcheck's.
KERNELS = re.compile(r"segfault at|general protection|traps:|Oops|BUG:|Kernel panic")


def counts_in(text):
    """The first and the last counts in a console's text."""
    found = [dict(zip(line.split()[::2], map(int, line.split()[1::2]))) for line in LINE.findall(text)]
    return (found[0], found[-1]) if found else (None, None)


def since(first, last):
    return {name: last[name] - first[name] for name in COUNTS}


class Load:
    """So many processes that do nothing but run."""

    def __init__(self, count):
        self.processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]

    def end(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


class Api(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("clade", timeout=120)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(120)
        self.sock.connect(self.path)


class Clade:
    """A supervisor of its own, and what is asked of it."""

    def __init__(self, program, runtime):
        self.program, self.runtime = program, runtime
        self.env = dict(os.environ, CLADE_RUNTIME_DIR=runtime)

    def run(self, *words, check=True):
        done = subprocess.run([self.program, *words], env=self.env, capture_output=True, text=True, timeout=300)
        if check and done.returncode:
            raise RuntimeError(f"clade {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def boot(self, guest, initrd, cpus, name):
        kernel = os.path.join(guest, "vmlinux")
        self.run("run", "-d", "--kernel", kernel, "--initrd", initrd, "--mem", "64M", "--cpus", str(cpus), "--name", name)

    def type(self, name, line):
        api = Api(os.path.join(self.runtime, "clade.api"))
        headers = {"content-type": "application/octet-stream"}
        api.request("POST", f"/v1/vms/{name}/console?line=serial", line.encode() + b"\n", headers)
        answer = api.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{name} takes no line: {answer.read()}")

    def console(self, name):
        return self.run("logs", name, check=False)

    def flight(self, name):
        return self.run("logs", "--flight", name, check=False)

    def stop(self, name):
        self.run("stop", name, check=False)

    def stop_all(self):
        """Ends the VMs, and the supervisor that the first of them started."""
        for line in self.run("ps", check=False).splitlines()[1:]:
            self.stop(line.split()[0])
        api = Api(os.path.join(self.runtime, "clade.api"))
        api.request("GET", "/v1/supervisor")
        os.kill(json.loads(api.getresponse().read())["pid"], signal.SIGTERM)
        while os.path.exists(os.path.join(self.runtime, "clade.api")):
            time.sleep(0.1)


class Qemu:
    def __init__(self, program, guest, initrd, cpus):
        machine = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on"
        words = [program, "-M", machine, "-accel", "kvm", "-m", "64", "-smp", str(cpus), "-nodefaults", "-display", "none"]
        cpu = "host,-arch-capabilities,-kvm-pv-ipi,-kvm-pv-sched-yield,-kvm-pv-unhalt,-kvm-pv-tlb-flush"
        words += ["-cpu", cpu, "-kernel", os.path.join(guest, "vmlinux"), "-initrd", initrd, "-append", QEMU_CMDLINE]
        words += ["-serial", "stdio", "-no-reboot"]
        self.text = ""
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        while chunk := os.read(self.process.stdout.fileno(), 4096):
            self.text += chunk.decode(errors="replace")

    def type(self, _, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def console(self, _):
        return self.text

    def flight(self, _):
        return ""

    def stop(self, _):
        self.process.kill()
        self.process.wait()


def wait_for(vm, name, wanted, seconds=600):
    """Waits for a text on a console, in time that the guest has to get there on a busy host."""
    end = time.monotonic() + seconds
    while not re.search(wanted, text := vm.console(name)):
        if time.monotonic() > end:
            raise RuntimeError(f"{name} does not print {wanted!r}:\n{text[-2000:]}")
        time.sleep(0.5)
    return text


class Cell:
    """What has been counted, over all VMs of a cell."""

    def __init__(self):
        self.total = dict.fromkeys(COUNTS, 0)
        self.vms = self.lost = self.operations = 0
        self.words = []

    def add(self, vm, name, before=None):
        """Adds what a VM has counted since `before`, or since the first line on its console."""
        text = vm.console(name)
        first, last = counts_in(text)
        self.vms += 1
        if first is None:
            return None
        for key, value in since(before or first, last).items():
            self.total[key] += value
        for line in text.splitlines():
            if line.startswith(("selfcheck: wrong", "selfcheck: died")) or KERNELS.search(line):
                self.words.append(f"{name}: {line.strip()}")
        return last

    def ended(self, vm, name):
        """Notes a VM that ended by itself."""
        self.lost += 1
        self.words.append(f"{name} ended: {vm.console(name)[-600:]} {vm.flight(name)[-1500:]}")


def do_forked(clade, cell, end):
    children, number = [], 0
    while time.monotonic() < end or children:
        begun = time.monotonic()
        name = f"c{number}"
        clade.run("fork", "vm", "--name", name)
        cell.operations += 1
        number += 1
        # Most children are looked at no longer than this: they are for what a fork does to their parent.
        if begun < end and len(children) < 3:
            # Its console begins with its parent's: what it counts itself begins at the last line of that.
            children.append((begun, name, counts_in(clade.console(name))[1]))
        else:
            clade.stop(name)
        while children and (children[0][0] + 5 < time.monotonic()):
            _, name, before = children.pop(0)
            finish(clade, cell, name, before)
        time.sleep(max(0, 0.25 - (time.monotonic() - begun)))


def finish(clade, cell, name, before):
    if name in clade.run("ps").split():
        cell.add(clade, name, before)
    else:
        cell.ended(clade, name)
    clade.stop(name)


def do_reset(clade, cell, end):
    clade.run("fork", "vm", "--name", "child")
    # A reset takes its counts back to these.
    base = counts_in(clade.console("child"))[1]
    while time.monotonic() < end:
        for _ in range(4):
            clade.run("reset", "child")
            cell.operations += 1
            time.sleep(0.1)
        lines = len(LINE.findall(clade.console("child")))
        patience = time.monotonic() + 20
        while len(LINE.findall(clade.console("child"))) == lines and time.monotonic() < patience:
            time.sleep(0.2)
        if len(LINE.findall(clade.console("child"))) > lines:
            cell.add(clade, "child", base)
    if "child" not in clade.run("ps").split():
        cell.ended(clade, "child")
    clade.stop("child")


def do_woken(clade, cell, end):
    while time.monotonic() < end:
        clade.run("suspend", "vm")
        clade.run("wake", "vm")
        cell.operations += 1
        time.sleep(0.3)


def do_restored(clade, cell, end):
    directory = os.path.join(clade.runtime, "saved")
    clade.run("snapshot", "vm", directory)
    before = counts_in(clade.console("vm"))[1]
    number = 0
    while time.monotonic() < end:
        name = f"r{number}"
        clade.run("restore", directory, "-d", "--name", name)
        time.sleep(4)
        cell.operations += 1
        number += 1
        finish(clade, cell, name, None if "selfcheck:" not in clade.console(name) else before)
    shutil.rmtree(directory)


def run_cells(args, initrd, kinds, cpus, load, runtime):
    """Runs cells of one VM, one after the other. Those that do not fork it come first."""
    if kinds == ["qemu"]:
        vm = Qemu(args.qemu, args.guest, initrd, cpus)
    else:
        vm = Clade(args.clade, runtime)
        vm.boot(args.guest, initrd, cpus, "vm")
    try:
        wait_for(vm, "vm", "clade# ")
        busy = Load(load)
        try:
            vm.type("vm", f"{args.env} selfcheck 100000 {args.workers}{' --wide' if args.wide else ''}")
            wait_for(vm, "vm", LINE)
            before = counts_in(vm.console("vm"))[0]
            for kind in kinds:
                cell = Cell()
                end = time.monotonic() + args.seconds
                if kind in ("alone", "qemu"):
                    time.sleep(args.seconds)
                else:
                    {"forked": do_forked, "reset": do_reset, "woken": do_woken, "restored": do_restored}[kind](vm, cell, end)
                before = cell.add(vm, "vm", before) or before
                yield kind, cell
        finally:
            busy.end()
    finally:
        vm.stop_all() if kinds != ["qemu"] else vm.stop("vm")


def with_program(guest, program, out):
    """The guest's initramfs with the program in it: one archive behind the other."""
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(os.path.join(root, "bin"))
        shutil.copy(program, os.path.join(root, "bin", "selfcheck"))
        os.chmod(os.path.join(root, "bin", "selfcheck"), 0o755)
        packed = subprocess.run(["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"], cwd=root, input=b"bin/selfcheck\n", capture_output=True, check=True)
    with open(os.path.join(guest, "initramfs.cpio"), "rb") as theirs, open(out, "wb") as file:
        file.write(theirs.read())
        file.write(b"\0" * (-file.tell() % 4))
        file.write(packed.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guest", required=True)
    parser.add_argument("--program", required=True)
    parser.add_argument("--clade", default="clade")
    parser.add_argument("--qemu", default="qemu-system-x86_64")
    parser.add_argument("--kind", default=",".join(KINDS))
    parser.add_argument("--cpus", default="1,2")
    parser.add_argument("--load", default="0,4,16")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--workers", default="rtcmzlp", help="see selfcheck.c")
    parser.add_argument("--env", default="", help="what stands before it on its command line: GLIBC_TUNABLES=")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    columns = ["kind", "vCPUs", "load", "VMs", "operations", *COUNTS, "VMs ended"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    with tempfile.TemporaryDirectory(prefix="selfcheck-") as directory:
        initrd, runtime = os.path.join(directory, "initramfs"), os.path.join(directory, "run")
        with_program(args.guest, args.program, initrd)
        os.mkdir(runtime, 0o700)
        for cpus in map(int, args.cpus.split(",")):
            for load in map(int, args.load.split(",")):
                kinds = [kind for kind in KINDS if kind in args.kind.split(",")]
                clades = [kind for kind in kinds if kind != "qemu"]
                ours = run_cells(args, initrd, clades, cpus, load, runtime) if clades else []
                theirs = run_cells(args, initrd, ["qemu"], cpus, load, runtime) if "qemu" in kinds else []
                for kind, cell in itertools.chain(ours, theirs):
                    row = [kind, cpus, load, cell.vms, cell.operations, *cell.total.values(), cell.lost]
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)
                    for words in cell.words[:8]:
                        print(f"    {words}", file=sys.stderr, flush=True)
                    if args.json:
                        with open(args.json, "a") as file:
                            file.write(json.dumps({"row": dict(zip(columns, row)), "words": cell.words[:100]}) + "\n")


if __name__ == "__main__":
    main()
