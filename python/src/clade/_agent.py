"""The agent in a guest: programs and files, over the VM's socket on the host."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from ._error import AgentError
from ._limit import Limit, LimitedSocket

PORT = 49983
CONNECT_TIMEOUT = 10.0
# How long a guest is asked that takes no connection, and how long it takes not to be said to refuse it.
PATIENCE = 60.0
SLOW = 1.0
# It is asked to say something every 30 s.
SILENCE = 120.0
# The largest message, as the agent takes it.
MOST = 4 << 20
PIECE = 256 << 10
END = 2


@dataclass(frozen=True)
class ExecResult:
    """A program that has ended."""

    exit_code: int
    """Its exit code; -1 if a signal ended it."""
    stdout: bytes
    stderr: bytes
    status: str
    """How it has ended, in words: `exit status 3`, `signal: killed`."""

    @property
    def text(self) -> str:
        """What it has written to its standard output."""
        return self.stdout.decode(errors="replace")


@dataclass(frozen=True)
class Output:
    """A piece of what a program writes."""

    stream: str
    """`stdout` or `stderr`."""
    data: bytes


class _Connection(http.client.HTTPConnection):
    """A connection to a port of a guest, behind the VM's socket."""

    def __init__(self, path: str, port: int, silence: float | None, limit: Limit) -> None:
        super().__init__("agent")
        self._path, self._port = path, port
        self._silence, self.limit = silence, limit
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            begun = time.monotonic()
            if self._connected():
                return
            # A guest that is slow, as one with a kernel that is interpreted, is asked again. Where nothing
            # listens, it says so at once.
            if time.monotonic() - begun < SLOW or time.monotonic() > deadline:
                where = f"port {self._port} of the guest behind {self._path}"
                raise AgentError("unavailable", f"nothing takes a connection on {where}")

    def _connected(self) -> bool:
        self.sock = self._socket = limited = LimitedSocket(self.limit, CONNECT_TIMEOUT)
        try:
            self.sock.connect(self._path)
            self.sock.sendall(f"CONNECT {self._port}\n".encode())
            line = b""
            while not line.endswith(b"\n") and len(line) < 64:
                piece = self.sock.recv(1)
                if not piece:
                    break
                line += piece
        except OSError as error:
            self.sock.close()
            raise self.limit.failure(f"no agent answers behind {self._path}: {error}") from error
        if not line.startswith(b"OK "):
            self.sock.close()
            return False
        limited.silence = self._silence
        return True

    def cut(self) -> None:
        """Ends the connection for the thread that waits on it."""
        # `sock` is None while an answer is read.
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


# Requests for files have a status for a code.
CODES = {
    400: "invalid_argument",
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    409: "already_exists",
    413: "resource_exhausted",
    429: "resource_exhausted",
    507: "resource_exhausted",
}


def refusal(status: int, text: bytes) -> AgentError:
    """What an answer of another status than 200 says."""
    try:
        said = json.loads(text)
        code = said.get("code", status)
        code = CODES.get(code, "unknown") if isinstance(code, int) else str(code)
        return AgentError(code, str(said.get("message", "")))
    except (ValueError, AttributeError):
        return AgentError("unknown", f"status {status}: {text[:200].decode(errors='replace')}")


def headers_for(user: str) -> dict[str, str]:
    """What each request of that user has."""
    name = base64.b64encode(f"{user}:".encode()).decode()
    return {"Authorization": f"Basic {name}", "Connect-Protocol-Version": "1"}


def stream_headers(user: str, timeout: float | None) -> dict[str, str]:
    """What a request for a stream has."""
    headers = {**headers_for(user), "Content-Type": "application/connect+json", "Keepalive-Ping-Interval": "30"}
    if timeout is not None:
        headers["Connect-Timeout-Ms"] = str(max(int(timeout * 1000), 1))
    return headers


def enveloped(message: Mapping[str, Any]) -> bytes:
    """A message of a stream."""
    text = json.dumps(message).encode()
    return struct.pack(">BI", 0, len(text)) + text


def opened(head: bytes) -> tuple[int, int]:
    """The flag of a message of a stream, and its length."""
    flag, length = struct.unpack(">BI", head)
    if length > MOST:
        raise AgentError("data_loss", f"a message of {length} bytes")
    return flag, length


def ends(flag: int, said: Any) -> bool:
    """Whether a message is the last one of its stream. One with an error is raised."""
    if not flag & END:
        return False
    if error := said.get("error"):
        raise AgentError(str(error.get("code", "unknown")), str(error.get("message", "")))
    return True


def start_request(
    args: Sequence[str], has_input: bool, env: Mapping[str, str] | None, cwd: str | None
) -> dict[str, Any]:
    """The message that starts a program."""
    if not args:
        raise ValueError("no program is named")
    process: dict[str, Any] = {"cmd": args[0], "args": list(args[1:]), "envs": dict(env or {})}
    if cwd is not None:
        process["cwd"] = cwd
    return {"process": process, "stdin": has_input}


def happened(event: Mapping[str, Any]) -> Iterator[Output | ExecResult]:
    """What an event of a program's stream says."""
    for stream, data in event.get("data", {}).items():
        yield Output(stream, base64.b64decode(data))
    if "end" in event:
        end = event["end"]
        yield ExecResult(int(end.get("exitCode", 0)), b"", b"", str(end.get("status", "")))


def typed(pid: int, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The calls by which a program is given its input, to the end."""
    selector = {"pid": pid}
    # A message is no more than 4 MiB, in base64.
    for at in range(0, len(data), 1 << 20):
        piece = base64.b64encode(data[at : at + (1 << 20)]).decode()
        yield "process.Process/SendInput", {"process": selector, "input": {"stdin": piece}}
    yield "process.Process/CloseStdin", {"process": selector}


def reads_no_more(error: BaseException) -> bool:
    """Whether a program's input is refused because it has ended, or has closed its standard input."""
    return isinstance(error, AgentError) and error.code in ("not_found", "failed_precondition")


def file_path(path: str, user: str) -> str:
    """The path of a file in a request."""
    return f"/files?{urlencode({'path': path, 'username': user})}"


def file_headers(user: str, data: bytes | None) -> dict[str, str]:
    """What a request for a file has."""
    if data is None:
        return headers_for(user)
    return {**headers_for(user), "Content-Type": "application/octet-stream", "Content-Length": str(len(data))}


def pieces(data: bytes) -> Iterator[bytes]:
    """Data as it is sent. Each piece has the time of an answer."""
    for at in range(0, len(data), PIECE):
        yield data[at : at + PIECE]


class Collected:
    """The output of a program, as it comes."""

    def __init__(self) -> None:
        self._written: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    def take(self, piece: Output | ExecResult) -> ExecResult | None:
        """The result, if the piece is the end."""
        if isinstance(piece, ExecResult):
            stdout, stderr = (b"".join(self._written[stream]) for stream in ("stdout", "stderr"))
            return ExecResult(piece.exit_code, stdout, stderr, piece.status)
        self._written.setdefault(piece.stream, []).append(piece.data)
        return None


def cut_off() -> AgentError:
    """A program's stream has no end."""
    return AgentError("unavailable", "the program's stream has ended before it")


def _exactly(answer: http.client.HTTPResponse, count: int) -> bytes:
    got = b""
    while len(got) < count:
        piece = answer.read(count - len(got))
        if not piece:
            raise AgentError("unavailable", "the guest has cut an answer off")
        got += piece
    return got


class _Feeder:
    """Sends a program its input on a thread of its own, because the program may write before it reads."""

    def __init__(self, agent: Agent, pid: int, data: bytes, output: _Connection) -> None:
        self._agent, self._pid, self._data, self._output = agent, pid, data, output
        self._has_stopped = False
        self._connection: _Connection | None = None
        self.error: BaseException | None = None
        threading.Thread(target=self._run, name="clade-stdin", daemon=True).start()

    def _run(self) -> None:
        try:
            for method, call in typed(self._pid, self._data):
                # A program may take any time before it reads. A guest that is gone ends the program's output.
                self._connection = self._agent._connection(None)
                if self._has_stopped:
                    return
                self._agent._unary(method, call, self._connection)
        # The call raises each error, also one of the caller's own data.
        except BaseException as error:
            if not self._has_stopped and not reads_no_more(error):
                self.error = error
                self._output.cut()

    def stop(self) -> None:
        """Sends no more."""
        self._has_stopped = True
        if self._connection is not None:
            self._connection.cut()


class Agent:
    """Runs programs and moves files in one guest."""

    def __init__(self, path: str, port: int = PORT, user: str | None = None) -> None:
        self._path, self._port = path, port
        self._user = user or "root"

    def _connection(self, silence: float | None = SILENCE, limit: Limit | None = None) -> _Connection:
        return _Connection(self._path, self._port, silence, limit or Limit())

    def _unary(self, method: str, message: Mapping[str, Any], connection: _Connection) -> Any:
        try:
            headers = {**headers_for(self._user), "Content-Type": "application/json"}
            connection.request("POST", f"/{method}", json.dumps(message), headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise refusal(answer.status, text)
            return json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AgentError("unavailable", f"the guest does not answer: {error}") from error
        finally:
            connection.close()

    def _stream(
        self, method: str, message: Mapping[str, Any], timeout: float | None, connection: _Connection
    ) -> Iterator[Any]:
        try:
            connection.request("POST", f"/{method}", enveloped(message), stream_headers(self._user, timeout))
            answer = connection.getresponse()
            if answer.status != 200:
                raise refusal(answer.status, answer.read())
            while True:
                flag, length = opened(_exactly(answer, 5))
                said = json.loads(_exactly(answer, length))
                if ends(flag, said):
                    return
                yield said
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise connection.limit.failure(f"the guest does not answer: {error}") from error
        finally:
            connection.close()

    def follow(
        self,
        args: Sequence[str],
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> Iterator[Output | ExecResult]:
        """Runs a program. Gives each piece of its output, and at last how it has ended, without output.

        The agent kills a program that runs longer than `timeout`. The call fails with `deadline_exceeded` 30 s after
        that time at the latest, also if the guest has stopped answering. The time that the caller takes for a piece
        of output does not count here.
        """
        start = start_request(args, input is not None, env, cwd)
        limit = Limit(timeout)
        connection = self._connection(limit=limit)
        feeder = None
        try:
            for message in self._stream("process.Process/Start", start, timeout, connection):
                event = message.get("event", {})
                if "start" in event and input is not None:
                    feeder = _Feeder(self, int(event["start"]["pid"]), input, connection)
                for piece in happened(event):
                    is_end = isinstance(piece, ExecResult)
                    if is_end and feeder is not None and feeder.error is not None:
                        # The handler below finds the input's error.
                        raise cut_off()
                    with limit.paused():
                        yield piece
                    if is_end:
                        return
            raise cut_off()
        except AgentError as error:
            failure = error if feeder is None or feeder.error is None else feeder.error
        finally:
            if feeder is not None:
                feeder.stop()
        # In the handler, the agent's error would become the context of an error of the caller's own.
        raise failure

    def exec(
        self,
        args: Sequence[str],
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
    ) -> ExecResult:
        """Runs a program to its end. `timeout` limits the program, and the call, as in `follow`."""
        collected = Collected()
        for piece in self.follow(args, input, env, cwd, timeout):
            if done := collected.take(piece):
                return done
        raise cut_off()

    def _file(self, method: str, path: str, data: bytes | None) -> bytes:
        connection = self._connection()
        try:
            body = None if data is None else pieces(data)
            connection.request(method, file_path(path, self._user), body, file_headers(self._user, data))
            answer = connection.getresponse()
            text = answer.read()
            if answer.status not in (200, 204):
                raise refusal(answer.status, text)
            return text
        except (OSError, http.client.HTTPException) as error:
            raise AgentError("unavailable", f"the guest does not answer: {error}") from error
        finally:
            connection.close()

    def read_file(self, path: str) -> bytes:
        """A file of the guest."""
        return self._file("GET", path, None)

    def write_file(self, path: str, data: bytes) -> None:
        """Writes a file of the guest."""
        self._file("POST", path, data)
