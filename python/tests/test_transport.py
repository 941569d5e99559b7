"""Requests to a daemon that does not answer as it should, or that answers late."""

import asyncio
import copy
import json
import pickle
import threading

import httpx
import pytest

from clade import (
    AgentError,
    AsyncCalls,
    AsyncClade,
    AsyncTransport,
    Calls,
    Clade,
    CladeError,
    NotRunningError,
    Transport,
)
from clade.errors import KINDS, TooManyError

from fakes import accepting

PROBLEM = {"type": "urn:clade:too-many", "title": "There are too many.", "status": 429, "detail": "64 clients follow"}
HEAD = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'id: 7\nevent: vm.forked\ndata: {"parent":"a"}\n\n'


def plain_call(transport):
    return Calls(transport).vms()


def plain_lines(transport):
    return list(transport.lines("/v1/events"))


def awaited_call(transport):
    return asyncio.run(AsyncCalls(transport).vms())


def awaited_lines(transport):
    async def read():
        return [line async for line in transport.lines("/v1/events")]

    return asyncio.run(read())


WAYS = [
    (Transport, plain_call),
    (Transport, plain_lines),
    (AsyncTransport, awaited_call),
    (AsyncTransport, awaited_lines),
]
ways = pytest.mark.parametrize(("kind", "ask"), WAYS, ids=[ask.__name__ for _, ask in WAYS])


@ways
def test_a_request_may_take_any_time_once_it_has_a_connection(kind, ask):
    seen = []

    def handle(request):
        seen.append(request.extensions["timeout"])
        return httpx.Response(200, json=[])

    ask(kind("http://daemon", transport=httpx.MockTransport(handle)))
    assert seen == [{"connect": 10.0, "read": None, "write": None, "pool": None}]


@ways
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (httpx.ConnectError, "not-running"),
        (httpx.ConnectTimeout, "not-running"),
        (httpx.ReadTimeout, "unavailable"),
        (httpx.WriteTimeout, "unavailable"),
        (httpx.PoolTimeout, "unavailable"),
        (httpx.ReadError, "unavailable"),
        (httpx.WriteError, "unavailable"),
        (httpx.CloseError, "unavailable"),
        (httpx.RemoteProtocolError, "unavailable"),
        (httpx.LocalProtocolError, "unavailable"),
        (httpx.ProxyError, "unavailable"),
        (httpx.UnsupportedProtocol, "unavailable"),
        (httpx.DecodingError, "unavailable"),
    ],
)
def test_a_request_without_an_answer_is_an_error_of_this_client(kind, ask, failure, expected):
    error = failure("")

    def handle(request):
        raise error

    with pytest.raises(CladeError, match=f"http://daemon.*{failure.__name__}") as caught:
        ask(kind("http://daemon", transport=httpx.MockTransport(handle)))
    assert (caught.value.kind, caught.value.status) == (expected, 0)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, NotRunningError) == (expected == "not-running")


@ways
@pytest.mark.parametrize("answer", [b"", b"no HTTP\r\n\r\n", HEAD % (b"200 OK", b"text/plain") + b"ff\r\nid: 1\n"])
def test_an_answer_that_is_cut_off_is_an_error_of_this_client(tmp_path, kind, ask, answer):
    def serve(connection):
        connection.recv(65536)
        connection.sendall(answer)

    accepting(tmp_path / "clade.api", serve)
    with pytest.raises(CladeError, match=str(tmp_path / "clade.api")) as caught:
        ask(kind(directory=tmp_path))
    assert caught.value.kind == "unavailable"
    assert isinstance(caught.value.__cause__, (httpx.RemoteProtocolError, httpx.ReadError))


@pytest.mark.parametrize(("kind", "ask"), [(Transport, plain_call), (AsyncTransport, awaited_call)])
@pytest.mark.parametrize("answer", [b"", b"<html>Log in.</html>", b"\xff\xfe["])
def test_an_answer_of_another_program_is_an_error_of_this_client(kind, ask, answer):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=answer))
    with pytest.raises(CladeError, match="not the daemon's") as caught:
        ask(kind("http://daemon", transport=transport))
    assert (caught.value.kind, caught.value.status) == ("unknown", 200)
    assert caught.value.__cause__ is not None


class Reasoned(CladeError):
    """A class of somebody else's, whose arguments differ."""

    def __init__(self):
        super().__init__("reasoned", 1, "title", "detail")


FIELDS = (409, "The title.", "The detail.")


@pytest.mark.parametrize(
    "error",
    [
        CladeError("of-another-version", *FIELDS),
        NotRunningError("/run/clade/clade.api", "no such file"),
        AgentError("not_found", "no such program"),
        Reasoned(),
        *(kind(name, *FIELDS) for name, kind in KINDS.items()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_another_process_is_the_same(error):
    error.add_note("a note")
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for copied in [*copies, copy.copy(error), copy.deepcopy(error)]:
        assert type(copied) is type(error) and copied is not error
        assert (str(copied), copied.args, vars(copied)) == (str(error), error.args, vars(error))


class Daemon:
    """A daemon that answers each request with the head of a stream and one event, and waits for the client's end."""

    def __init__(self, directory, refusal=None):
        self.requests, self.has_closed = [], threading.Event()
        self._refusal = refusal
        accepting(directory / "clade.api", self._serve)

    def _serve(self, connection):
        self.requests.append(connection.recv(65536).split(b"\r\n")[0])
        if self._refusal is not None:
            text = json.dumps(self._refusal).encode()
            head = HEAD % (b"429 No", b"application/problem+json")
            return connection.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text))
        connection.sendall(HEAD % (b"200 OK", b"text/event-stream") + b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
        while connection.recv(65536):
            pass
        self.has_closed.set()


ASKED = [b"GET /v1/events HTTP/1.1"]


def test_events_are_followed_from_the_call_on(tmp_path):
    daemon = Daemon(tmp_path)
    with Clade(directory=tmp_path) as clade:
        events = clade.events()
        assert daemon.requests == ASKED
        event = next(events)
        assert (event.id, event.kind, event.data) == ("7", "vm.forked", {"parent": "a"})
        events.close()
        assert daemon.has_closed.wait(600)
        assert list(events) == []
    assert daemon.requests == ASKED


def test_events_that_nobody_reads_are_closed(tmp_path):
    daemon = Daemon(tmp_path)
    with Clade(directory=tmp_path) as clade:
        with clade.events() as events:
            assert daemon.requests == ASKED
        assert daemon.has_closed.wait(600)
        assert list(events) == []


def test_a_refusal_of_events_is_raised_by_the_call(tmp_path):
    Daemon(tmp_path, PROBLEM)
    with Clade(directory=tmp_path) as clade, pytest.raises(TooManyError, match="64 clients follow"):
        clade.events()


def test_awaited_events_are_followed_from_the_blocks_begin_on(tmp_path):
    daemon = Daemon(tmp_path)

    async def read():
        async with AsyncClade(directory=tmp_path) as clade:
            async with clade.events() as events:
                assert daemon.requests == ASKED
                assert (await anext(events)).id == "7"
            assert await asyncio.to_thread(daemon.has_closed.wait, 600)
            assert [event async for event in events] == []

    asyncio.run(read())
    assert daemon.requests == ASKED


def test_awaited_events_that_nobody_reads_are_closed(tmp_path):
    daemon = Daemon(tmp_path)

    async def read():
        async with AsyncClade(directory=tmp_path) as clade:
            unused = clade.events()
            await unused.aclose()
            async with unused as closed:
                assert [event async for event in closed] == []
            assert daemon.requests == []
            async with clade.events():
                assert daemon.requests == ASKED
            assert await asyncio.to_thread(daemon.has_closed.wait, 600)

    asyncio.run(read())


def test_a_refusal_of_awaited_events_is_raised_at_the_blocks_begin(tmp_path):
    Daemon(tmp_path, PROBLEM)

    async def read():
        async with AsyncClade(directory=tmp_path) as clade:
            with pytest.raises(TooManyError, match="64 clients follow"):
                async with clade.events():
                    raise AssertionError("the block has begun")

    asyncio.run(read())
