"""VMs and checkpoints as objects."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from . import types as t
from ._agent import Agent, ExecResult, Output
from ._calls import Calls
from ._error import CladeError
from ._transport import Transport, runtime_dir


def fork_request(**given: object) -> t.ForkRequest:
    """The body of a fork, of what is given."""
    return cast(t.ForkRequest, {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Event:
    """Something that has happened to a VM."""

    id: str
    kind: str
    """As `vm.forked`."""
    data: dict[str, Any]


class EventLines:
    """Makes events of the lines of a stream."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}
        self._id = ""

    def take(self, line: str) -> Event | None:
        """The event that ends with the line, if one does."""
        fields = self._fields
        if line == "":
            self._fields = {}
            # An event without an id has that of the one before.
            self._id = fields.get("id", self._id)
            if "data" in fields:
                return Event(self._id, fields.get("event", "message"), json.loads(fields["data"]))
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
        return None


class Events(Iterator[Event]):
    """The iterator yields events as they happen. `close`, or the end of a `with` block, ends the request."""

    def __init__(self, lines: Generator[str, None, None]) -> None:
        self._lines = lines
        self._found = EventLines()

    def __next__(self) -> Event:
        for line in self._lines:
            if event := self._found.take(line):
                return event
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """The call ends the request, also if no event was read."""
        self._lines.close()


def run_command(
    directory: Path | None, name: str, args: Sequence[str], program: str
) -> tuple[list[str], dict[str, str]]:
    """The command that starts a VM, and its environment."""
    if directory is None:
        raise ValueError("a daemon behind a URL starts no VM by the command line: use boot()")
    return [program, "run", "-d", "--name", name, *args], {**os.environ, "CLADE_RUNTIME_DIR": str(directory)}


def not_started(args: Sequence[str], said: str) -> CladeError:
    """Why the command has not started a VM. What is behind `--` is the guest's."""
    at = args.index("--") if "--" in args else len(args)
    return CladeError("not-started", 0, "The VM was not started.", f"clade run {' '.join(args[:at])}: {said.strip()}")


def boot_request(name: str, kernel: str, config: t.VmConfig, more: Mapping[str, Any]) -> t.BootRequest:
    """The body of a boot."""
    return cast(t.BootRequest, {"name": name, "kernel": kernel, "config": config, **more})


def restore_request(directory: str | os.PathLike[str], count: int, name: str | None) -> t.RestoreRequest:
    """The body of a restore."""
    return {"saved": {"dir": os.path.abspath(directory)}, "vms": fork_request(count=count, name=name)}


def socket_of(info: t.VmInfo) -> str:
    """The socket that a VM's agent is behind."""
    vsock = info.get("vsock")
    if vsock is None:
        what = f"{info['name']!r} has no socket device"
        raise CladeError("no-device", 409, "The VM has no such device.", what)
    return vsock["socket"]


def is_gone(error: CladeError) -> bool:
    """Whether there is no such VM any more."""
    return error.kind in ("no-such-vm", "vm-gone")


class Clade:
    """A daemon. Without arguments, that of this user's socket."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self._directory = None if url is not None else Path(directory if directory is not None else runtime_dir())
        self._transport = Transport(url, token, self._directory)
        self.calls = Calls(self._transport)
        """Every call of the API, as it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. VMs run on."""
        self._transport.close()

    def boot(self, name: str, kernel: str, config: t.VmConfig, **more: Any) -> Vm:
        """Boots a guest: `more` is the rest of a `BootRequest`."""
        body = boot_request(name, kernel, config, more)
        return Vm(self, self.calls.boot(body, idempotency_key=uuid.uuid4().hex)["name"])

    def run(self, name: str, *args: str, program: str = "clade") -> Vm:
        """Starts a VM by the command line, which knows images: `args` are those of `clade run -d`.

        On the daemon's host only, with the program `clade` of the daemon's version.
        """
        command, env = run_command(self._directory, name, args, program)
        done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise not_started(args, done.stderr)
        return self.vm(name)

    def vm(self, name: str) -> Vm:
        """A VM that is there."""
        return Vm(self, self.calls.show(name)["name"])

    def vms(self) -> list[Vm]:
        """All VMs."""
        return [Vm(self, info["name"]) for info in self.calls.vms()]

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint that is there."""
        return Checkpoint(self, self.calls.show_checkpoint(name)["name"])

    def checkpoints(self) -> list[Checkpoint]:
        """All checkpoints."""
        return [Checkpoint(self, info["name"]) for info in self.calls.checkpoints()]

    def restore(self, directory: str | os.PathLike[str], count: int = 1, name: str | None = None) -> list[Vm]:
        """VMs from a snapshot: all of them or none."""
        answer = self.calls.restore(restore_request(directory, count, name), idempotency_key=uuid.uuid4().hex)
        return [Vm(self, child) for child in answer["children"]]

    def events(self, after: str | None = None) -> Events:
        """The iterator yields what happens after this call, or after the event `after`. The iterator has no end.

        The daemon has taken the request when the call returns, so the iterator misses no later event.
        """
        return Events(self._transport.lines("/v1/events", {"Last-Event-ID": after}))


class _Forkable:
    """What children can be made of."""

    def __init__(self, clade: Clade, name: str) -> None:
        self.clade = clade
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def _fork(self, body: t.ForkRequest, key: str) -> t.ForkAnswer:
        raise NotImplementedError

    def forks(
        self,
        count: int,
        name: str | None = None,
        paused: bool = False,
        ready: bool = False,
        labels: Mapping[str, str] | None = None,
        without_secrets: bool = False,
        network: t.Link | None = None,
    ) -> list[Vm]:
        """`count` children: all of them or none. `ready` ones have been told that they are others."""
        body = fork_request(
            count=count,
            name=name,
            paused=paused or None,
            ready=ready or None,
            labels=dict(labels) if labels is not None else None,
            without_secrets=without_secrets or None,
            network=network,
        )
        answer = self._fork(body, uuid.uuid4().hex)
        return [Vm(self.clade, child) for child in answer["children"]]

    def fork(self, name: str | None = None, **more: Any) -> Vm:
        """One child. `more` as in `forks`."""
        return self.forks(1, name, **more)[0]


class Checkpoint(_Forkable):
    """A VM at one instant, of which children can be made, also when the VM has gone."""

    def _fork(self, body: t.ForkRequest, key: str) -> t.ForkAnswer:
        return self.clade.calls.fork_checkpoint(self.name, body, idempotency_key=key)

    def info(self) -> t.CheckpointInfo:
        """What it is."""
        return self.clade.calls.show_checkpoint(self.name)

    def prepare(self, count: int) -> int:
        """Prepares processes for children that are asked for later. Returns how many are prepared."""
        return self.clade.calls.prepare(self.name, {"count": count})["prepared"]

    def remove(self) -> None:
        """Removes it. Its children run on."""
        self.clade.calls.remove_checkpoint(self.name)


class Vm(_Forkable):
    """A VM. In a `with` block it is stopped at the end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except CladeError as gone:
            if not is_gone(gone):
                raise

    def _fork(self, body: t.ForkRequest, key: str) -> t.ForkAnswer:
        return self.clade.calls.fork_vm(self.name, body, idempotency_key=key)

    def info(self) -> t.VmInfo:
        """What it is."""
        return self.clade.calls.show(self.name)

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """Takes a checkpoint of it. It runs on."""
        body: t.CheckpointRequest = {} if name is None else {"name": name}
        answer = self.clade.calls.checkpoint(self.name, body, idempotency_key=uuid.uuid4().hex)
        return Checkpoint(self.clade, answer["name"])

    def reset(self, *, ready: bool = False) -> t.ResetAnswer:
        """Puts it back to the instant it was forked at, in place. With `ready` the agent in it then
        renews its identity."""
        return self.clade.calls.reset(self.name, {"ready": True} if ready else None)

    def rollback(self, checkpoint: Checkpoint | str, *, ready: bool = False) -> t.ResetAnswer:
        """Puts it back to a checkpoint of its own, or of a VM that it was forked from, in place. With
        `ready` the agent in it then renews its identity."""
        name = checkpoint if isinstance(checkpoint, str) else checkpoint.name
        return self.clade.calls.roll_back(self.name, {"checkpoint": name, "ready": ready})

    def pause(self) -> None:
        """Pauses it."""
        self.clade.calls.pause(self.name)

    def resume(self) -> None:
        """Has it run on."""
        self.clade.calls.resume(self.name)

    def suspend(self) -> t.SuspendAnswer:
        """Gives its memory back to a file, until something wakes it."""
        return self.clade.calls.suspend_vm(self.name)

    def wake(self) -> t.WakeAnswer:
        """Wakes it."""
        return self.clade.calls.wake(self.name)

    def ready(self) -> t.ReadyAnswer:
        """Has the agent in it make it another VM than its parent."""
        return self.clade.calls.ready(self.name)

    def stop(self) -> t.StopAnswer:
        """Ends it at once."""
        return self.clade.calls.stop(self.name)

    def snapshot(self, directory: str | os.PathLike[str]) -> t.SnapshotAnswer:
        """Saves it to a directory. It runs on."""
        body = cast(t.SnapshotRequest, {"dir": os.path.abspath(directory)})
        return self.clade.calls.snapshot(self.name, body)

    def stats(self) -> t.VmStats:
        """Its memory, pins, copies and pauses in numbers."""
        return self.clade.calls.show_stats(self.name)

    def pages(self, cells: int | None = None) -> t.PagesAnswer:
        """What its pages are: its own, shared, pinned, absent."""
        return self.clade.calls.show_pages(self.name, cells=cells)

    def read_memory(self, address: int, length: int) -> bytes:
        """Guest memory, by its physical address."""
        return self.clade.calls.read_memory(self.name, address=address, length=length)

    def write_memory(self, address: int, data: bytes) -> None:
        """Writes guest memory, by its physical address."""
        self.clade.calls.write_memory(self.name, data, address=address)

    def console(self) -> str:
        """The last output of its serial console."""
        return self.clade.calls.logs(self.name)["console"]

    def agent(self, user: str | None = None) -> Agent:
        """The agent in it. On the daemon's host only."""
        return Agent(socket_of(self.info()), user=user)

    def exec(
        self,
        args: Sequence[str],
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> ExecResult:
        """Runs a program in it, to its end."""
        return self.agent().exec(args, input, env, cwd, timeout)

    def follow(self, args: Sequence[str], **more: Any) -> Iterator[Output | ExecResult]:
        """Runs a program in it, and gives what it writes."""
        return self.agent().follow(args, **more)

    def read_file(self, path: str) -> bytes:
        """A file of its guest."""
        return self.agent().read_file(path)

    def write_file(self, path: str, data: bytes) -> None:
        """Writes a file of its guest."""
        self.agent().write_file(path, data)
