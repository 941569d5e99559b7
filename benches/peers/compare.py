#!/usr/bin/env python3
"""Clade beside other VMMs on this host, in one run: VMs from a snapshot, one and many.

    benches/peers/compare.py [--clade FILE] [--firecracker FILE] [--qemu FILE] [--clones N]
                             [--samples N] [--json]

Each VMM runs the same guest: 512 MiB of RAM, 64 MiB of it written, one vCPU, no device but the serial
port. It is saved once, to a tmpfs. Then, in turn, each restores it. A time ends with the first byte that
the guest writes to its serial port; then the VM is paused, so that it does not take the processor from
the next.

    first_byte_process   a process of its own from its start, or what the VMM's users start
    first_byte_request   a request to a daemon that runs (Clade alone has one)
    clones_per_s         one after the other, until N are alive
    private_kib          private memory of each process, N alive
    first_byte_fork      a fork of a VM that runs (Clade alone has it)

It needs a compiler for the guest (gcc), and 2 GiB below /dev/shm. What is not given is left out.
"""

import argparse
import http.client
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
MIB, WRITTEN = 512, 64
# How long anything may take.
LIMIT = 20.0


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=LIMIT)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(LIMIT)
        self.sock.connect(self.path)


def await_socket(path, process):
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            connection = UnixConnection(path)
            connection.connect()
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{process.args[0]} does not listen on {path}") from None
            time.sleep(0.0002)


def ask(connection, method, path, body=None):
    text = None if body is None else json.dumps(body)
    connection.request(method, path, text, {"Content-Type": "application/json"} if text else {})
    answer = connection.getresponse()
    said = answer.read()
    if answer.status >= 300:
        raise SystemExit(f"{method} {path}: {answer.status} {said.decode(errors='replace')}")
    return json.loads(said) if said else None


def private_kib(pid):
    rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    fields = (line.split() for line in rollup.splitlines()[1:])
    return sum(int(field[1]) for field in fields if field[0] in ("Private_Clean:", "Private_Dirty:"))


def end(process):
    process.kill()
    process.wait()


class Firecracker:
    """A process for each VM, with its API on a socket."""

    name = "Firecracker"

    def __init__(self, program, work, guest):
        self.program, self.work, self.count = program, work, 0
        process, connection = self.start()
        ask(connection, "PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": MIB})
        ask(connection, "PUT", "/boot-source", {"kernel_image_path": str(guest)})
        ask(connection, "PUT", "/actions", {"action_type": "InstanceStart"})
        self.first_byte(process)
        ask(connection, "PATCH", "/vm", {"state": "Paused"})
        files = {"snapshot_path": str(work / "fc.state"), "mem_file_path": str(work / "fc.mem")}
        ask(connection, "PUT", "/snapshot/create", files)
        end(process)

    def start(self):
        self.count += 1
        path = self.work / f"fc.{self.count}"
        args = [self.program, "--api-sock", path, "--no-seccomp", "--level", "Off"]
        process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return process, await_socket(path, process)

    def first_byte(self, process):
        while (byte := os.read(process.stdout.fileno(), 1)) != b"!":
            if not byte:
                raise SystemExit("firecracker has ended")

    def restore(self):
        begun = time.perf_counter()
        process, connection = self.start()
        backend = {"backend_type": "File", "backend_path": str(self.work / "fc.mem")}
        load = {"snapshot_path": str(self.work / "fc.state"), "mem_backend": backend, "resume_vm": True}
        ask(connection, "PUT", "/snapshot/load", load)
        self.first_byte(process)
        took = time.perf_counter() - begun
        ask(connection, "PATCH", "/vm", {"state": "Paused"})
        return took, process

    def measure(self, clones, samples):
        times = []
        for _ in range(samples):
            took, process = self.restore()
            end(process)
            times.append(took * 1e3)
        begun = time.perf_counter()
        alive = [self.restore()[1] for _ in range(clones)]
        rate = clones / (time.perf_counter() - begun)
        private = [private_kib(process.pid) for process in alive]
        for process in alive:
            end(process)
        return {"first_byte_process": times, "clones_per_s": [rate], "private_kib": private}

    def close(self):
        pass


class Qemu:
    """A process for each VM. Its memory is a file that is mapped; the rest is migrated from another."""

    name = "QEMU"

    def __init__(self, program, work, guest):
        self.program, self.work, self.guest, self.count = program, work, guest, 0
        process, monitor = self.start("on", [])
        self.first_byte(process)
        self.command(monitor, "stop")
        self.command(monitor, "migrate_set_capability x-ignore-shared on")
        self.command(monitor, f"migrate exec:cat>{work / 'qemu.state'}")
        while "completed" not in self.command(monitor, "info migrate"):
            time.sleep(0.01)
        end(process)

    def start(self, share, more):
        self.count += 1
        path = self.work / f"qemu.{self.count}"
        memory = f"memory-backend-file,id=ram,size={MIB}M,mem-path={self.work / 'qemu.mem'},share={share}"
        args = [self.program, "-M", "microvm,memory-backend=ram,acpi=off,pit=off,pic=off,rtc=off", "-object", memory]
        args += ["-accel", "kvm", "-cpu", "host", "-m", f"{MIB}M", "-nodefaults", "-no-user-config", "-display", "none"]
        args += ["-kernel", self.guest, "-serial", "stdio", "-monitor", f"unix:{path},server=on,wait=off", *more]
        process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return process, await_socket(path, process).sock

    @staticmethod
    def command(monitor, text):
        monitor.sendall(text.encode() + b"\n")
        said = b""
        # The prompt before the command, and the one after its answer.
        while not said.rstrip().endswith(b"(qemu)") or text.encode()[-4:] not in said:
            said += monitor.recv(65536)
        return said.decode(errors="replace")

    first_byte = Firecracker.first_byte

    def restore(self):
        begun = time.perf_counter()
        more = ["-incoming", f"exec:cat {self.work / 'qemu.state'}"]
        process, monitor = self.start("off", more)
        self.first_byte(process)
        took = time.perf_counter() - begun
        self.command(monitor, "stop")
        return took, process

    measure = Firecracker.measure
    close = Firecracker.close


class Clade:
    """A daemon, and a process for each VM."""

    name = "Clade"

    def __init__(self, program, work, guest):
        self.program, self.dir, self.made = program, work / "run", 0
        self.env = {**os.environ, "CLADE_RUNTIME_DIR": str(self.dir)}
        self.daemon = subprocess.Popen([program, "serve", "--pool", "1"], env=self.env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + LIMIT
        while subprocess.run([program, "ps"], env=self.env, capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise SystemExit("clade serve does not answer")
        self.api = UnixConnection(self.dir / "clade.api")
        run = ["run", "-d", "--kernel", guest, "--mem", f"{MIB}M", "--name", "parent"]
        subprocess.run([program, *run], env=self.env, check=True, capture_output=True)
        self.first_byte("parent")
        ask(self.api, "POST", "/v1/vms/parent/pause", {})
        self.saved = work / "clade.saved"
        subprocess.run([program, "snapshot", "parent", self.saved], env=self.env, check=True, capture_output=True)

    def first_byte(self, name):
        connection = UnixConnection(self.api.path)
        connection.request("GET", f"/v1/vms/{name}/console")
        answer = connection.getresponse()
        while (byte := answer.read(1)) != b"!":
            if not byte:
                raise SystemExit(f"{name} has ended")
        connection.close()

    def restore(self):
        self.made += 1
        name = f"vm{self.made}"
        begun = time.perf_counter()
        ask(self.api, "POST", "/v1/restore", {"saved": {"dir": str(self.saved)}, "vms": {"name": name}})
        self.first_byte(name)
        took = time.perf_counter() - begun
        ask(self.api, "POST", f"/v1/vms/{name}/pause", {})
        return took, name

    def fork(self):
        self.made += 1
        name = f"vm{self.made}"
        begun = time.perf_counter()
        ask(self.api, "POST", "/v1/vms/parent/fork", {"count": 1, "name": name})
        self.first_byte(name)
        took = time.perf_counter() - begun
        ask(self.api, "POST", f"/v1/vms/{name}/pause", {})
        return took, name

    def process(self):
        """As a user starts it, with no daemon: a session of its own."""
        directory = tempfile.mkdtemp(dir=self.dir.parent)
        env = {**self.env, "CLADE_RUNTIME_DIR": directory}
        begun = time.perf_counter()
        args = [self.program, "restore", self.saved, "--name", "own"]
        process = subprocess.Popen(args, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        Firecracker.first_byte(self, process)
        took = time.perf_counter() - begun
        process.terminate()
        process.stdout.close()
        process.wait()
        return took

    def stop(self, names):
        for name in names:
            ask(self.api, "POST", f"/v1/vms/{name}/stop", {})

    def measure(self, clones, samples):
        request, fork, own = [], [], []
        for _ in range(samples):
            took, name = self.restore()
            self.stop([name])
            request.append(took * 1e3)
            took, name = self.fork()
            self.stop([name])
            fork.append(took * 1e3)
            own.append(self.process() * 1e3)
        begun = time.perf_counter()
        alive = [self.restore()[1] for _ in range(clones)]
        rate = clones / (time.perf_counter() - begun)
        pids = [vm["pid"] for vm in ask(self.api, "GET", "/v1/vms") if vm["name"] in alive]
        private = [private_kib(pid) for pid in pids]
        self.stop(alive)
        return {
            "first_byte_process": own,
            "first_byte_request": request,
            "first_byte_fork": fork,
            "clones_per_s": [rate],
            "private_kib": private,
        }

    def close(self):
        # VMs outlive their daemon.
        self.stop([vm["name"] for vm in ask(self.api, "GET", "/v1/vms")])
        self.daemon.terminate()
        self.daemon.wait()


UNITS = {"clones_per_s": "/s", "private_kib": "KiB"}


def spread(values):
    ordered = sorted(values)
    return {"p50": statistics.median_low(ordered), "p90": ordered[(len(ordered) * 9 - 1) // 10], "samples": len(ordered)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in (Clade, Firecracker, Qemu):
        parser.add_argument(f"--{kind.__name__.lower()}", metavar="FILE", help=f"the program of {kind.name}")
    parser.add_argument("--clones", type=int, default=100, metavar="N")
    parser.add_argument("--samples", type=int, default=20, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    programs = {kind: getattr(args, kind.__name__.lower()) for kind in (Clade, Firecracker, Qemu)}
    programs = {kind: shutil.which(program) for kind, program in programs.items() if program}
    if not programs or None in programs.values() or args.clones < 1 or args.samples < 1:
        parser.error("name at least one program that is there, and at least one clone and sample")
    results = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="peers-") as directory:
        work = pathlib.Path(directory)
        guest = work / "guest"
        flags = ["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", f"-Wl,-T,{HERE / 'guest.ld'}"]
        subprocess.run(["gcc", *flags, f"-DMIB={WRITTEN}", "-o", guest, HERE / "guest.S"], check=True)
        vmms = []
        try:
            for kind, program in programs.items():
                vmms.append(kind(program, work, guest))
            for vmm in vmms:
                measured = vmm.measure(args.clones, args.samples)
                results[vmm.name] = {name: spread(values) for name, values in measured.items()}
        finally:
            for vmm in vmms:
                vmm.close()
    if args.json:
        return print(json.dumps({"guest_mib": MIB, "written_mib": WRITTEN, "clones": args.clones, "vmms": results}))
    rows = list(dict.fromkeys(row for of in results.values() for row in of))
    print(f"{'':22}" + "".join(f"{name:>24}" for name in results))
    for row in rows:
        unit = UNITS.get(row, "ms")
        cells = (results[name].get(row) for name in results)
        text = (f"{cell['p50']:.1f} (p90 {cell['p90']:.1f}) {unit}" if cell else "-" for cell in cells)
        print(f"{row:22}" + "".join(f"{cell:>24}" for cell in text))


main()
