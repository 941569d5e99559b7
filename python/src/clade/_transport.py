"""Requests to a daemon: over its user's socket, or over TCP with a token."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx

from ._error import CladeError, NotRunningError
from .errors import KINDS

# Only the connection has a time limit. A request takes as long as its guest, or its disk, does, and the daemon may
# cancel a request whose client ends the connection.
TIMEOUT = httpx.Timeout(None, connect=10.0)
Query = Mapping[str, str | int | float | bool | None]
Headers = Mapping[str, str | None]


def runtime_dir() -> Path:
    """The directory of the daemon's socket, as the command line finds it."""
    named = os.environ.get("CLADE_RUNTIME_DIR")
    if named:
        return Path(named)
    of_user = os.environ.get("XDG_RUNTIME_DIR")
    if of_user:
        return Path(of_user) / "clade"
    return Path("/run/clade") if os.getuid() == 0 else Path(f"/tmp/clade-{os.getuid()}")


def _place(url: str | None, directory: str | os.PathLike[str] | None) -> tuple[str, str | None, str]:
    """The base address, the socket, and what to call them in an error."""
    if url is not None:
        return url, None, url
    socket = Path(directory) / "clade.api" if directory is not None else runtime_dir() / "clade.api"
    return "http://localhost", str(socket), str(socket)


def _request(body: object, query: Query | None, headers: Headers | None) -> dict[str, Any]:
    kept = {name: value for name, value in (headers or {}).items() if value is not None}
    asked: dict[str, Any] = {"params": {name: value for name, value in (query or {}).items() if value is not None}}
    if isinstance(body, bytes):
        asked["content"] = body
        kept["Content-Type"] = "application/octet-stream"
    elif body is not None:
        asked["content"] = json.dumps(body).encode()
        kept["Content-Type"] = "application/json"
    return {**asked, "headers": kept}


def _refusal(status: int, text: bytes) -> CladeError:
    try:
        problem = json.loads(text)
        kind = str(problem["type"]).rsplit(":", 1)[1]
        return KINDS.get(kind, CladeError)(kind, status, str(problem["title"]), str(problem.get("detail", "")))
    except (ValueError, KeyError, IndexError, TypeError):
        return CladeError("unknown", status, "The answer is not the daemon's.", text[:200].decode(errors="replace"))


def _parsed(answer: bytes) -> Any:
    """The value of an answer in JSON. A program between this client and the daemon may have sent another answer."""
    try:
        return json.loads(answer)
    except ValueError as error:
        text = answer[:200].decode(errors="replace")
        title = "The answer is not the daemon's."
        raise CladeError("unknown", 200, title, f"the answer is not the daemon's: {text!r}") from error


def _failure(where: str, error: httpx.RequestError) -> CladeError:
    """The caller gets this error for a request that has no whole answer."""
    why = str(error) or type(error).__name__
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return NotRunningError(where, why)
    title = "The daemon's answer has not come."
    return CladeError("unavailable", 0, title, f"the answer of the daemon at {where} has not come: {why}")


class Transport:
    """Sends requests, and waits for their answers."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        directory: str | os.PathLike[str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        base, socket, self._where = _place(url, directory)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = transport or httpx.HTTPTransport(uds=socket)
        self._client = httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT, transport=transport)

    def _ask(self, method: str, path: str, body: object, query: Query | None, headers: Headers | None) -> bytes:
        try:
            answer = self._client.request(method, path, **_request(body, query, headers))
        except httpx.RequestError as error:
            raise _failure(self._where, error) from error
        if answer.status_code != 200:
            raise _refusal(answer.status_code, answer.content)
        return answer.content

    def json(
        self, method: str, path: str, body: object = None, query: Query | None = None, headers: Headers | None = None
    ) -> Any:
        """The answer, from JSON."""
        return _parsed(self._ask(method, path, body, query, headers))

    def data(
        self, method: str, path: str, body: object = None, query: Query | None = None, headers: Headers | None = None
    ) -> bytes:
        """The answer as it is."""
        return self._ask(method, path, body, query, headers)

    def lines(self, path: str, headers: Headers | None = None) -> Generator[str, None, None]:
        """The call sends the request, and returns when the answer has begun. The answer's lines have no end."""
        lines = self._begun_lines(path, headers)
        next(lines)
        return lines

    def _begun_lines(self, path: str, headers: Headers | None) -> Generator[str, None, None]:
        """The generator yields an empty line when the answer has begun, and then the answer's lines."""
        try:
            with self._client.stream("GET", path, **_request(None, None, headers)) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer.status_code, answer.read())
                yield ""
                lines = _Lines()
                for text in answer.iter_text():
                    yield from lines.take(text)
        except httpx.RequestError as error:
            raise _failure(self._where, error) from error

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


class _Lines:
    """Lines of a stream of events, which end with a line feed alone: texts of guests may have other separators."""

    def __init__(self) -> None:
        self._rest = ""

    def take(self, text: str) -> list[str]:
        """The lines that end in this text."""
        *lines, self._rest = (self._rest + text).split("\n")
        return [line.removesuffix("\r") for line in lines]


class AsyncTransport:
    """Sends requests, and awaits their answers."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        directory: str | os.PathLike[str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        base, socket, self._where = _place(url, directory)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        transport = transport or httpx.AsyncHTTPTransport(uds=socket)
        self._client = httpx.AsyncClient(base_url=base, headers=headers, timeout=TIMEOUT, transport=transport)

    async def _ask(self, method: str, path: str, body: object, query: Query | None, headers: Headers | None) -> bytes:
        try:
            answer = await self._client.request(method, path, **_request(body, query, headers))
        except httpx.RequestError as error:
            raise _failure(self._where, error) from error
        if answer.status_code != 200:
            raise _refusal(answer.status_code, answer.content)
        return answer.content

    async def json(
        self, method: str, path: str, body: object = None, query: Query | None = None, headers: Headers | None = None
    ) -> Any:
        """The answer, from JSON."""
        return _parsed(await self._ask(method, path, body, query, headers))

    async def data(
        self, method: str, path: str, body: object = None, query: Query | None = None, headers: Headers | None = None
    ) -> bytes:
        """The answer as it is."""
        return await self._ask(method, path, body, query, headers)

    async def lines(self, path: str, headers: Headers | None = None) -> AsyncGenerator[str, None]:
        """The generator yields the lines of an answer without end. The first `anext` sends the request."""
        async with aclosing(self.begun_lines(path, headers)) as lines:
            await anext(lines)
            async for line in lines:
                yield line

    async def begun_lines(self, path: str, headers: Headers | None = None) -> AsyncGenerator[str, None]:
        """The generator yields an empty line when the answer has begun, and then the answer's lines."""
        try:
            async with self._client.stream("GET", path, **_request(None, None, headers)) as answer:
                if answer.status_code != 200:
                    raise _refusal(answer.status_code, await answer.aread())
                yield ""
                lines = _Lines()
                async for text in answer.aiter_text():
                    for line in lines.take(text):
                        yield line
        except httpx.RequestError as error:
            raise _failure(self._where, error) from error

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()
