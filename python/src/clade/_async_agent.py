"""The agent in a guest, awaited."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from . import _agent as a
from ._agent import ExecResult, Output
from ._error import AgentError
from ._limit import Limit

# The largest head of an answer, and the longest line in it.
MOST_HEAD = 64 << 10


class _Answer:
    """An answer's status, and its body as it comes."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence: float | None, limit: Limit
    ) -> None:
        self._reader, self._writer = reader, writer
        self._silence, self._limit = silence, limit
        self.status = 0
        self._is_chunked = False
        # Bytes of the body, or of the chunk, that have not come. None: to the connection's end.
        self._left: int | None = None

    async def _line(self) -> str:
        async with asyncio.timeout(self._limit.cap(self._silence)):
            line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise AgentError("unavailable", "the guest has cut an answer off")
        return line.decode("latin-1").rstrip("\r\n")

    def cut(self) -> None:
        """Ends the connection for the task that waits on it."""
        self._writer.close()

    async def head(self) -> None:
        """Reads the head."""
        first = (await self._line()).split(" ", 2)
        if len(first) < 2 or not first[0].startswith("HTTP/1.") or not first[1].isdigit():
            raise AgentError("unavailable", f"the guest's answer is none: {first[0][:40]!r}")
        self.status = int(first[1])
        size = 0
        while line := await self._line():
            size += len(line)
            if size > MOST_HEAD:
                raise AgentError("unavailable", "the guest's answer has no end of its head")
            name, _, value = line.partition(":")
            if name.lower() == "transfer-encoding":
                self._is_chunked, self._left = True, 0
            elif name.lower() == "content-length" and not self._is_chunked:
                self._left = int(value)

    async def read(self, most: int) -> bytes:
        """Some bytes of the body; none at its end."""
        if self._is_chunked and self._left == 0:
            self._left = int((await self._line()).partition(";")[0], 16)
            if self._left == 0:
                # Nothing is asked for behind it.
                self._is_chunked = False
        if self._left == 0:
            return b""
        count = most if self._left is None else min(most, self._left)
        async with asyncio.timeout(self._limit.cap(self._silence)):
            got = await self._reader.read(count)
        if self._left is not None:
            if not got:
                raise AgentError("unavailable", "the guest has cut an answer off")
            self._left -= len(got)
            if self._is_chunked and self._left == 0:
                await self._line()
        return got

    async def all(self) -> bytes:
        """The rest of the body."""
        pieces = []
        while piece := await self.read(1 << 16):
            pieces.append(piece)
        return b"".join(pieces)

    async def exactly(self, count: int) -> bytes:
        """So many bytes of the body."""
        got = b""
        while len(got) < count:
            piece = await self.read(count - len(got))
            if not piece:
                raise AgentError("unavailable", "the guest has cut an answer off")
            got += piece
        return got


def _failure_of(feeding: asyncio.Task[None] | None) -> BaseException | None:
    """The call returns the error that has ended the input of a program."""
    if feeding is None or not feeding.done() or feeding.cancelled():
        return None
    return feeding.exception()


class AsyncAgent:
    """Runs programs and moves files in one guest. All of it is awaited."""

    def __init__(self, path: str, port: int = a.PORT, user: str | None = None) -> None:
        self._path, self._port = path, port
        self._user = user or "root"

    async def _connected(self, limit: Limit) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            async with asyncio.timeout(limit.cap(a.CONNECT_TIMEOUT)):
                reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError as error:
            raise limit.failure(f"no agent answers behind {self._path}: {error}") from error
        try:
            async with asyncio.timeout(limit.cap(a.CONNECT_TIMEOUT)):
                writer.write(f"CONNECT {self._port}\n".encode())
                line = await reader.readline()
        except BaseException as error:
            writer.close()
            if isinstance(error, OSError):
                raise limit.failure(f"no agent answers behind {self._path}: {error}") from error
            raise
        if line.startswith(b"OK ") and line.endswith(b"\n"):
            return reader, writer
        writer.close()
        return None

    async def _connection(self, limit: Limit) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        deadline = time.monotonic() + a.PATIENCE
        while True:
            begun = time.monotonic()
            if connected := await self._connected(limit):
                return connected
            # As the one that is not awaited does.
            if time.monotonic() - begun < a.SLOW or time.monotonic() > deadline:
                where = f"port {self._port} of the guest behind {self._path}"
                raise AgentError("unavailable", f"nothing takes a connection on {where}")

    @asynccontextmanager
    async def _asked(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        silence: float | None = a.SILENCE,
        limit: Limit | None = None,
    ) -> AsyncIterator[_Answer]:
        """An answer. Its connection is closed behind it, also where who awaits it is cancelled."""
        limit = limit or Limit()
        reader, writer = await self._connection(limit)
        try:
            lines = [f"{method} {path} HTTP/1.1", "Host: agent", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            if body is not None and "Content-Length" not in headers:
                lines.append(f"Content-Length: {len(body)}")
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            for piece in a.pieces(body or b""):
                writer.write(piece)
                # Not `wait_for`, which forgets a cancellation in Python 3.11 if it comes with the result.
                async with asyncio.timeout(limit.cap(a.SILENCE)):
                    await writer.drain()
            answer = _Answer(reader, writer, silence, limit)
            await answer.head()
            yield answer
        # A line that is too long, and what is no JSON, are values that are wrong.
        except (OSError, ValueError) as error:
            raise limit.failure(f"the guest does not answer: {error}") from error
        finally:
            writer.close()

    async def _unary(self, method: str, message: Mapping[str, Any], silence: float | None) -> Any:
        headers = {**a.headers_for(self._user), "Content-Type": "application/json"}
        async with self._asked("POST", f"/{method}", json.dumps(message).encode(), headers, silence) as answer:
            text = await answer.all()
            if answer.status != 200:
                raise a.refusal(answer.status, text)
            return json.loads(text)

    async def _messages(self, answer: _Answer) -> AsyncIterator[Any]:
        if answer.status != 200:
            raise a.refusal(answer.status, await answer.all())
        while True:
            flag, length = a.opened(await answer.exactly(5))
            said = json.loads(await answer.exactly(length))
            if a.ends(flag, said):
                return
            yield said

    async def _feed(self, pid: int, data: bytes, output: _Answer) -> None:
        """Sends a program its input, beside its output: the program may write before it reads."""
        try:
            for method, call in a.typed(pid, data):
                # A program may take any time before it reads. A guest that is gone ends the program's output.
                await self._unary(method, call, None)
        # The call raises each error, also one of the caller's own data.
        except Exception as error:
            if not a.reads_no_more(error):
                output.cut()
                raise

    async def follow(
        self,
        args: Sequence[str],
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[Output | ExecResult, None]:
        """Runs a program. Gives each piece of its output, and at last how it has ended, without output.

        The agent kills a program that runs longer than `timeout`. The call fails with `deadline_exceeded` 30 s after
        that time at the latest, also if the guest has stopped answering. The time that the caller takes for a piece
        of output does not count here.
        """
        start = a.enveloped(a.start_request(args, input is not None, env, cwd))
        headers = a.stream_headers(self._user, timeout)
        limit = Limit(timeout)
        feeding: asyncio.Task[None] | None = None
        try:
            async with self._asked("POST", "/process.Process/Start", start, headers, limit=limit) as answer:
                async for message in self._messages(answer):
                    event = message.get("event", {})
                    if "start" in event and input is not None:
                        feeding = asyncio.create_task(self._feed(int(event["start"]["pid"]), input, answer))
                    for piece in a.happened(event):
                        is_end = isinstance(piece, ExecResult)
                        if is_end and _failure_of(feeding):
                            # The handler below finds the input's error.
                            raise a.cut_off()
                        with limit.paused():
                            yield piece
                        if is_end:
                            return
                raise a.cut_off()
        except AgentError as error:
            failure = _failure_of(feeding) or error
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        # In the handler, the agent's error would become the context of an error of the caller's own.
        raise failure

    async def exec(
        self,
        args: Sequence[str],
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> ExecResult:
        """Runs a program to its end. `timeout` limits the program, and the call, as in `follow`."""
        collected = a.Collected()
        async with aclosing(self.follow(args, input, env, cwd, timeout)) as pieces:
            async for piece in pieces:
                if done := collected.take(piece):
                    return done
        raise a.cut_off()

    async def _file(self, method: str, path: str, data: bytes | None) -> bytes:
        headers = a.file_headers(self._user, data)
        async with self._asked(method, a.file_path(path, self._user), data, headers) as answer:
            text = await answer.all()
            if answer.status not in (200, 204):
                raise a.refusal(answer.status, text)
            return text

    async def read_file(self, path: str) -> bytes:
        """A file of the guest."""
        return await self._file("GET", path, None)

    async def write_file(self, path: str, data: bytes) -> None:
        """Writes a file of the guest."""
        await self._file("POST", path, data)
