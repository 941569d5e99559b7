"""VMs and checkpoints as objects whose operations are awaited."""

from __future__ import annotations

import asyncio
import os
import subprocess
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from . import types as t
from ._agent import ExecResult, Output
from ._async_agent import AsyncAgent
from ._calls import AsyncCalls
from ._error import CladeError
from ._objects import (
    Event,
    EventLines,
    boot_request,
    fork_request,
    is_gone,
    not_started,
    restore_request,
    run_command,
    socket_of,
)
from ._transport import AsyncTransport, runtime_dir


class AsyncEvents(AsyncIterator[Event]):
    """The iterator yields events as they happen. The start of an `async with` block, or else the first `anext`, sends
    the request. `aclose`, or the end of the block, ends the request."""

    def __init__(self, lines: AsyncGenerator[str, None]) -> None:
        self._lines = lines
        self._found = EventLines()
        self._has_begun = False
        self._error: Exception | None = None

    async def _begin(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._has_begun:
            self._has_begun = True
            try:
                # The first line says that the answer has begun. A closed generator has no lines.
                await anext(self._lines, None)
            except Exception as error:
                self._error = error
                raise

    async def __anext__(self) -> Event:
        await self._begin()
        async for line in self._lines:
            if event := self._found.take(line):
                return event
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """The call ends the request, also if no event was read."""
        await self._lines.aclose()


class AsyncClade:
    """A daemon. Without arguments, that of this user's socket."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self._directory = None if url is not None else Path(directory if directory is not None else runtime_dir())
        self._transport = AsyncTransport(url, token, self._directory)
        self.calls = AsyncCalls(self._transport)
        """Every call of the API, as it is."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections. VMs run on."""
        await self._transport.close()

    async def boot(self, name: str, kernel: str, config: t.VmConfig, **more: Any) -> AsyncVm:
        """Boots a guest: `more` is the rest of a `BootRequest`."""
        body = boot_request(name, kernel, config, more)
        return AsyncVm(self, (await self.calls.boot(body, idempotency_key=uuid.uuid4().hex))["name"])

    async def run(self, name: str, *args: str, program: str = "clade") -> AsyncVm:
        """Starts a VM by the command line, which knows images: `args` are those of `clade run -d`.

        On the daemon's host only, with the program `clade` of the daemon's version.
        """
        command, env = run_command(self._directory, name, args, program)
        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, env=env, stdin=null, stdout=null, stderr=pipe)
        try:
            _, said = await process.communicate()
        except asyncio.CancelledError:
            # What it has begun is broken off with it.
            process.terminate()
            raise
        if process.returncode:
            raise not_started(args, said.decode(errors="replace"))
        return await self.vm(name)

    async def vm(self, name: str) -> AsyncVm:
        """A VM that is there."""
        return AsyncVm(self, (await self.calls.show(name))["name"])

    async def vms(self) -> list[AsyncVm]:
        """All VMs."""
        return [AsyncVm(self, info["name"]) for info in await self.calls.vms()]

    async def checkpoint(self, name: str) -> AsyncCheckpoint:
        """A checkpoint that is there."""
        return AsyncCheckpoint(self, (await self.calls.show_checkpoint(name))["name"])

    async def checkpoints(self) -> list[AsyncCheckpoint]:
        """All checkpoints."""
        return [AsyncCheckpoint(self, info["name"]) for info in await self.calls.checkpoints()]

    async def restore(
        self, directory: str | os.PathLike[str], count: int = 1, name: str | None = None
    ) -> list[AsyncVm]:
        """VMs from a snapshot: all of them or none."""
        body = restore_request(directory, count, name)
        answer = await self.calls.restore(body, idempotency_key=uuid.uuid4().hex)
        return [AsyncVm(self, child) for child in answer["children"]]

    def events(self, after: str | None = None) -> AsyncEvents:
        """The iterator yields what happens from now on, or after the event `after`. The iterator has no end.

        The daemon has taken the request when an `async with` block begins, so the block misses no event. Without a
        block the first `anext` sends the request, and the iterator misses the events before.
        """
        return AsyncEvents(self._transport.begun_lines("/v1/events", {"Last-Event-ID": after}))


class _AsyncForkable:
    """What children can be made of."""

    def __init__(self, clade: AsyncClade, name: str) -> None:
        self.clade = clade
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    async def _fork(self, body: t.ForkRequest, key: str) -> t.ForkAnswer:
        raise NotImplementedError

    async def forks(
        self,
        count: int,
        name: str | None = None,
        paused: bool = False,
        ready: bool = False,
        labels: Mapping[str, str] | None = None,
        without_secrets: bool = False,
        network: t.Link | None = None,
    ) -> list[AsyncVm]:
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
        answer = await self._fork(body, uuid.uuid4().hex)
        return [AsyncVm(self.clade, child) for child in answer["children"]]

    async def fork(self, name: str | None = None, **more: Any) -> AsyncVm:
        """One child. `more` as in `forks`."""
        return (await self.forks(1, name, **more))[0]


class AsyncCheckpoint(_AsyncForkable):
    """A VM at one instant, of which children can be made, also when the VM has gone."""

    async def _fork(self, body: t.ForkRequest, key: str) -> t.ForkAnswer:
        return await self.clade.calls.fork_checkpoint(self.name, body, idempotency_key=key)

    async def info(self) -> t.CheckpointInfo:
        """What it is."""
        return await self.clade.calls.show_checkpoint(self.name)

    async def prepare(self, count: int) -> int:
        """Prepares processes for children that are asked for later. Returns how many are prepared."""
        return (await self.clade.calls.prepare(self.name, {"count": count}))["prepared"]

    async def remove(self) -> None:
        """Removes it. Its children run on."""
        await self.clade.calls.remove_checkpoint(self.name)


class AsyncVm(_AsyncForkable):
    """A VM. In an `async with` block it is stopped at the end."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        except CladeError as gone:
            if not is_gone(gone):
                raise

    async def _fork(self, body: t.ForkRequest, key: str) -> t.ForkAnswer:
        return await self.clade.calls.fork_vm(self.name, body, idempotency_key=key)

    async def info(self) -> t.VmInfo:
        """What it is."""
        return await self.clade.calls.show(self.name)

    async def checkpoint(self, name: str | None = None) -> AsyncCheckpoint:
        """Takes a checkpoint of it. It runs on."""
        body: t.CheckpointRequest = {} if name is None else {"name": name}
        answer = await self.clade.calls.checkpoint(self.name, body, idempotency_key=uuid.uuid4().hex)
        return AsyncCheckpoint(self.clade, answer["name"])

    async def reset(self, *, ready: bool = False) -> t.ResetAnswer:
        """Puts it back to the instant it was forked at, in place. With `ready` the agent in it then
        renews its identity."""
        return await self.clade.calls.reset(self.name, {"ready": True} if ready else None)

    async def rollback(self, checkpoint: AsyncCheckpoint | str, *, ready: bool = False) -> t.ResetAnswer:
        """Puts it back to a checkpoint of its own, or of a VM that it was forked from, in place. With
        `ready` the agent in it then renews its identity."""
        name = checkpoint if isinstance(checkpoint, str) else checkpoint.name
        return await self.clade.calls.roll_back(self.name, {"checkpoint": name, "ready": ready})

    async def pause(self) -> None:
        """Pauses it."""
        await self.clade.calls.pause(self.name)

    async def resume(self) -> None:
        """Has it run on."""
        await self.clade.calls.resume(self.name)

    async def suspend(self) -> t.SuspendAnswer:
        """Gives its memory back to a file, until something wakes it."""
        return await self.clade.calls.suspend_vm(self.name)

    async def wake(self) -> t.WakeAnswer:
        """Wakes it."""
        return await self.clade.calls.wake(self.name)

    async def ready(self) -> t.ReadyAnswer:
        """Has the agent in it make it another VM than its parent."""
        return await self.clade.calls.ready(self.name)

    async def stop(self) -> t.StopAnswer:
        """Ends it at once."""
        return await self.clade.calls.stop(self.name)

    async def snapshot(self, directory: str | os.PathLike[str]) -> t.SnapshotAnswer:
        """Saves it to a directory. It runs on."""
        body = cast(t.SnapshotRequest, {"dir": os.path.abspath(directory)})
        return await self.clade.calls.snapshot(self.name, body)

    async def stats(self) -> t.VmStats:
        """Its memory, pins, copies and pauses in numbers."""
        return await self.clade.calls.show_stats(self.name)

    async def pages(self, cells: int | None = None) -> t.PagesAnswer:
        """What its pages are: its own, shared, pinned, absent."""
        return await self.clade.calls.show_pages(self.name, cells=cells)

    async def read_memory(self, address: int, length: int) -> bytes:
        """Guest memory, by its physical address."""
        return await self.clade.calls.read_memory(self.name, address=address, length=length)

    async def write_memory(self, address: int, data: bytes) -> None:
        """Writes guest memory, by its physical address."""
        await self.clade.calls.write_memory(self.name, data, address=address)

    async def console(self) -> str:
        """The last output of its serial console."""
        return (await self.clade.calls.logs(self.name))["console"]

    async def agent(self, user: str | None = None) -> AsyncAgent:
        """The agent in it. On the daemon's host only."""
        return AsyncAgent(socket_of(await self.info()), user=user)

    async def exec(
        self,
        args: Sequence[str],
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> ExecResult:
        """Runs a program in it, to its end."""
        return await (await self.agent()).exec(args, input, env, cwd, timeout)

    async def follow(self, args: Sequence[str], **more: Any) -> AsyncGenerator[Output | ExecResult, None]:
        """Runs a program in it, and gives what it writes."""
        agent = await self.agent()
        async with aclosing(agent.follow(args, **more)) as pieces:
            async for piece in pieces:
                yield piece

    async def read_file(self, path: str) -> bytes:
        """A file of its guest."""
        return await (await self.agent()).read_file(path)

    async def write_file(self, path: str, data: bytes) -> None:
        """Writes a file of its guest."""
        await (await self.agent()).write_file(path, data)
