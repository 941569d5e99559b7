"""The client without a daemon: what it sends, and what it makes of answers."""

import asyncio
import inspect
import json
import socket
import struct
import threading
import time

import httpx
import pytest

import clade
from clade import AgentError, AsyncAgent, AsyncCalls, AsyncTransport, Calls, CladeError, NotRunningError, Transport
from clade._objects import Events
from clade.errors import KINDS, NoSuchVmError

from fakes import DATA, ENDED, Awaited, guest, shell, stream

PROBLEM = {"type": "urn:clade:no-such-vm", "title": "There is no such VM.", "status": 404, "detail": "no VM is \"a/b\""}


def answering(answer, seen):
    def handle(request):
        seen.append(request)
        return answer

    return httpx.MockTransport(handle)


def test_a_call_is_the_request_of_its_operation():
    seen = []
    answer = httpx.Response(200, json={"children": ["x"]})
    calls = Calls(Transport("http://daemon", token="secret", transport=answering(answer, seen)))
    assert calls.fork_vm("a/b", {"count": 2}, idempotency_key="k")["children"] == ["x"]
    (request,) = seen
    assert (request.method, request.url.raw_path) == ("POST", b"/v1/vms/a%2Fb/fork")
    assert json.loads(request.content) == {"count": 2}
    assert request.headers["idempotency-key"] == "k"
    assert request.headers["authorization"] == "Bearer secret"
    calls.show_pages("web", cells=3)
    assert seen[1].url.query == b"cells=3" and "idempotency-key" not in seen[1].headers


def test_bytes_go_both_ways_as_they_are():
    seen = []
    calls = Calls(Transport("http://daemon", transport=answering(httpx.Response(200, content=b"\0\xff"), seen)))
    assert calls.read_memory("web", address=4096, length=2) == b"\0\xff"
    assert seen[0].url.query == b"address=4096&length=2"
    calls = Calls(Transport("http://daemon", transport=answering(httpx.Response(200, json={"written": 2}), seen)))
    calls.write_memory("web", b"\0\xff", address=0)
    assert seen[1].content == b"\0\xff" and seen[1].headers["content-type"] == "application/octet-stream"


def test_the_same_calls_are_awaited():
    seen = []

    async def ask():
        transport = AsyncTransport("http://daemon", transport=answering(httpx.Response(404, json=PROBLEM), seen))
        with pytest.raises(NoSuchVmError):
            await AsyncCalls(transport).show("a")
        await transport.close()

    asyncio.run(ask())
    assert seen[0].url.path == "/v1/vms/a"
    of = lambda calls: {name for name in vars(calls) if not name.startswith("_")}  # noqa: E731
    assert of(Calls) == of(AsyncCalls) and len(of(Calls)) > 35


@pytest.mark.parametrize(
    ("answer", "kind", "status"),
    [
        (httpx.Response(404, json=PROBLEM), "no-such-vm", 404),
        (httpx.Response(409, json={**PROBLEM, "type": "urn:clade:of-another-version"}), "of-another-version", 409),
        (httpx.Response(502, text="<html>"), "unknown", 502),
        (httpx.Response(500, json=[1]), "unknown", 500),
    ],
)
def test_an_error_is_of_its_kind(answer, kind, status):
    calls = Calls(Transport("http://daemon", transport=answering(answer, [])))
    with pytest.raises(CladeError) as caught:
        calls.show("a/b")
    assert (caught.value.kind, caught.value.status) == (kind, status)
    assert type(caught.value) is KINDS.get(kind, CladeError)


def test_no_daemon_is_an_error_that_names_its_socket(tmp_path):
    with pytest.raises(NotRunningError, match=str(tmp_path / "clade.api")):
        Calls(Transport(directory=tmp_path)).vms()


def test_events_are_read_from_their_lines():
    lines = [": here", "", "id: 7", "event: vm.forked", 'data: {"parent":', 'data: "a"}', "", "retry: 1", ""]
    (event,) = Events(iter(lines))
    assert (event.id, event.kind, event.data) == ("7", "vm.forked", {"parent": "a"})


def test_events_with_a_guests_text_are_whole():
    text = "x\u2028y\u2029z\u0085"
    stream = f'id: a-1\nevent: vm.ended\ndata: {{"reason": "{text}"}}\n\nevent: lost\r\ndata: {{}}\r\n\r\n'
    answer = httpx.MockTransport(lambda request: httpx.Response(200, content=stream.encode()))

    async def awaited():
        transport = AsyncTransport("http://daemon", transport=answer)
        return [line async for line in transport.lines("/v1/events")]

    for lines in (Transport("http://daemon", transport=answer).lines("/v1/events"), asyncio.run(awaited())):
        ended, lost = Events(iter(lines))
        assert (ended.id, ended.data) == ("a-1", {"reason": text})
        assert (lost.id, lost.kind) == ("a-1", "lost"), "an event without an id has the last one"


def test_a_program_is_run_by_the_agents_protocol(tmp_path, agent_at):
    said = stream(
        (0, b'{"event":{"start":{"pid":7}}}'),
        (0, b'{"event":{"data":{"stdout":"aGk="}}}'),
        (0, b'{"event":{"data":{"stderr":"bm8="}}}'),
        (0, b'{"event":{"end":{"exitCode":3,"exited":true,"status":"exit status 3"}}}'),
        (2, b"{}"),
    )
    agent, got, thread = guest(tmp_path, said, agent_at)
    done = agent.exec(["/bin/sh", "-c", "x"], env={"A": "b"}, timeout=2.5)
    thread.join(10)
    assert (done.exit_code, done.stdout, done.stderr, done.status) == (3, b"hi", b"no", "exit status 3")
    assert got[0] == b"CONNECT 49983\n"
    head, body = got[1]
    assert head.startswith(b"POST /process.Process/Start HTTP/1.1\r\n") and b"Connect-Timeout-Ms: 2500" in head
    assert json.loads(body[5:])["process"] == {"cmd": "/bin/sh", "args": ["-c", "x"], "envs": {"A": "b"}}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (stream((2, b'{"error":{"code":"not_found","message":"no such program"}}')), "not_found"),
        (stream((0, b'{"event":{"start":{"pid":7}}}')), "unavailable"),
        (stream((0, b"garbage")), "unavailable"),
        (struct.pack(">BI", 0, 5), "unavailable"),
        (b'HTTP/1.1 403 No\r\nContent-Length: 26\r\n\r\n{"code":"unauthenticated"}', "unauthenticated"),
        (stream() + struct.pack(">BI", 0, 0xFFFFFFFF), "data_loss"),
    ],
)
def test_an_agent_that_answers_otherwise_is_an_error(tmp_path, answer, code, agent_at):
    agent, _, thread = guest(tmp_path, answer, agent_at)
    with pytest.raises(AgentError) as caught:
        agent.exec(["x"])
    thread.join(10)
    assert caught.value.code == code


def test_a_program_may_write_all_it_has_before_it_reads(tmp_path, agent_at, monkeypatch):
    monkeypatch.setattr("clade._agent.SILENCE", 5.0)

    def start(connection, may_read):
        for _ in range(100):
            connection.sendall(DATA)
        may_read.set()
        while "CloseStdin" not in called:
            time.sleep(0.01)
        connection.sendall(ENDED)

    agent, called = shell(tmp_path, start, None, agent_at)
    done = agent.exec(["cat"], input=b"x" * (3 << 20))
    assert done.exit_code == 0 and done.stdout == b"hi!" * 2_500_000
    assert called == ["Start", "SendInput", "SendInput", "SendInput", "CloseStdin"]


@pytest.mark.parametrize("refused", ["not_found", "failed_precondition"])
def test_a_program_need_not_read_its_input(tmp_path, agent_at, refused):
    def start(connection, may_read):
        may_read.set()
        while "SendInput" not in called:
            time.sleep(0.01)
        # It is refused before the program's end is told.
        time.sleep(0.2)
        connection.sendall(ENDED)

    agent, called = shell(tmp_path, start, refused, agent_at)
    assert agent.exec(["true"], input=b"x").exit_code == 0
    assert called == ["Start", "SendInput"]


def test_a_program_whose_input_fails_is_an_error(tmp_path, agent_at):
    def start(connection, may_read):
        may_read.set()
        while connection.recv(100):
            pass

    agent, _ = shell(tmp_path, start, "internal", agent_at)
    with pytest.raises(AgentError) as caught:
        agent.exec(["cat"], input=b"x")
    assert caught.value.code == "internal"


def test_the_end_of_a_program_that_reads_nothing_is_its_end(tmp_path, agent_at):
    agent, called = shell(tmp_path, lambda connection, _: connection.sendall(ENDED), None, agent_at)
    assert agent.exec(["true"], input=b"x" * (3 << 20)).exit_code == 0
    assert called.count("SendInput") <= 1


def test_an_upload_is_sent_in_pieces_that_have_time_each(tmp_path, agent_at, monkeypatch):
    from clade import _agent

    sent = []
    monkeypatch.setattr(_agent, "pieces", lambda data, cut=_agent.pieces: (sent.append(p) or p for p in cut(data)))
    path = tmp_path / "vm.vsock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    data, got = bytes(range(256)) * (24 << 10), []

    def serve():
        connection, _ = listener.accept()
        connection.recv(100)
        connection.sendall(b"OK 1024\n")
        asked = b""
        while len(asked.partition(b"\r\n\r\n")[2]) < len(data):
            asked += connection.recv(1 << 20)
        got.append(asked)
        connection.sendall(b"HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    agent_at(str(path)).write_file("/f", data)
    thread.join(60)
    head, _, body = got[0].partition(b"\r\n\r\n")
    assert body == data and f"Content-Length: {len(data)}\r\n".encode() in head + b"\r\n"
    assert head.count(b"Content-Length") == 1
    assert b"".join(sent) == data and max(map(len, sent)) == _agent.PIECE


def test_much_output_is_collected_once():
    from clade._agent import Collected, ExecResult, Output

    collected = Collected()
    for _ in range(100_000):
        assert collected.take(Output("stdout", b"x" * 1000)) is None
    assert len(collected.take(ExecResult(0, b"", b"", "exit status 0")).stdout) == 100_000_000


def test_a_guest_that_refuses_a_connection_is_not_asked_again(tmp_path, agent_at):
    path = tmp_path / "vm.vsock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    asked = []

    def serve():
        while True:
            connection, _ = listener.accept()
            asked.append(connection.recv(100))
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(AgentError, match="nothing takes a connection on port 49983"):
        agent_at(str(path)).exec(["x"])
    assert len(asked) == 1


def test_a_file_that_is_not_there_has_a_code_by_its_status(tmp_path, agent_at):
    said = b'{"code":404,"message":"no such file"}'
    head = f"HTTP/1.1 404 No\r\nContent-Length: {len(said)}\r\n\r\n".encode()
    agent, _, thread = guest(tmp_path, head + said, agent_at)
    with pytest.raises(AgentError, match="no such file") as caught:
        agent.write_file("/none", b"x")
    thread.join(10)
    assert caught.value.code == "not_found"


def test_a_guest_without_an_agent_is_an_error_that_says_so(tmp_path, agent_at):
    with pytest.raises(AgentError, match="no agent answers"):
        agent_at(str(tmp_path / "none")).exec(["x"])


def chunked(*pieces):
    return b"".join(b"%x;note=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "data"),
    [
        (b"Content-Length: 5\r\n\r\nhello, and more", b"hello"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"hel", b"l" * 9, b"o") + b"more", b"hel" + b"l" * 9 + b"o"),
        (b"\r\nto the end", b"to the end"),
        (b"Content-Length: 0\r\n\r\n", b""),
        (b"Content-Length: 5\r\n\r\nhel", None),
        (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", None),
        (b"Transfer-Encoding: chunked\r\n\r\nno\r\nhel", None),
        (b"Content-Length: none\r\n\r\n", None),
        (b"A: " + b"b" * 70_000, None),
        (b"A: b\r\n" * 20_000 + b"\r\n", None),
    ],
)
def test_an_answer_is_read_to_its_end_and_no_further(tmp_path, answer, data):
    agent, got, thread = guest(tmp_path, b"HTTP/1.1 200 OK\r\n" + answer, Awaited)
    # It has a length, which the guest here wants of all.
    if data is not None:
        assert agent._file("GET", "/a b", b"") == data
        assert got[1][0].startswith(b"GET /files?path=%2Fa+b&username=root HTTP/1.1\r\n")
    else:
        with pytest.raises(AgentError) as caught:
            agent._file("GET", "/a b", b"")
        assert caught.value.code == "unavailable"
    thread.join(10)


def test_the_connection_goes_when_nobody_awaits_the_program(tmp_path, monkeypatch):
    path = tmp_path / "vm.vsock"
    connect, kept = asyncio.open_unix_connection, []

    async def keeping(path):
        # One that nobody has any more is closed in any case.
        kept.append(await connect(path))
        return kept[-1]

    monkeypatch.setattr(asyncio, "open_unix_connection", keeping)

    async def run():
        begun, ended = asyncio.Event(), asyncio.Event()

        async def serve(reader, writer):
            await reader.readline()
            writer.write(b"OK 1\n")
            await reader.readuntil(b"\r\n\r\n")
            start = b'{"event":{"start":{"pid":7}}}'
            data = b'{"event":{"data":{"stdout":"aGk="}}}'
            messages = b"".join(struct.pack(">BI", 0, len(text)) + text for text in (start, data))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + messages)
            begun.set()
            while await reader.read(100):
                pass
            ended.set()

        async with await asyncio.start_unix_server(serve, str(path)):
            agent = AsyncAgent(str(path))
            task = asyncio.create_task(agent.exec(["x"]))
            await begun.wait()
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(ended.wait(), 600)
            # Nor does it stay when its output is not followed to the end.
            ended.clear()
            following = agent.follow(["x"])
            assert (await anext(following)).data == b"hi"
            await following.aclose()
            await asyncio.wait_for(ended.wait(), 600)

    asyncio.run(run())


def test_what_is_awaited_has_all_that_the_other_has():
    of = lambda kind: {name for name in dir(kind) if not name.startswith("_")}  # noqa: E731
    for name in ("Agent", "Checkpoint", "Clade", "Vm"):
        plain, awaited = getattr(clade, name), getattr(clade, f"Async{name}")
        assert of(plain) == of(awaited), name
        for method in of(plain):
            if callable(getattr(plain, method)):
                parameters = [list(inspect.signature(getattr(one, method)).parameters) for one in (plain, awaited)]
                assert parameters[0] == parameters[1], f"{name}.{method}"


def test_objects_are_awaited():
    seen = []

    def handle(request):
        seen.append((request.method, request.url.path))
        if request.url.path == "/v1/events":
            return httpx.Response(200, text=": here\n\nid: 7\nevent: vm.forked\ndata: {}\n\n")
        if request.url.path.endswith("/fork"):
            assert json.loads(request.content) == {"count": 1, "name": "c", "paused": True}
            assert len(request.headers["idempotency-key"]) == 32
            return httpx.Response(200, json={"children": ["c"]})
        if request.url.path.endswith("/stop"):
            return httpx.Response(404, json=PROBLEM)
        return httpx.Response(200, json={"name": "web"})

    async def ask():
        async with clade.AsyncClade("http://daemon") as daemon:
            daemon._transport = AsyncTransport("http://daemon", transport=httpx.MockTransport(handle))
            daemon.calls = AsyncCalls(daemon._transport)
            web = await daemon.vm("web")
            # It has gone by itself, which is no error.
            async with await web.fork("c", paused=True) as child:
                assert (child.name, repr(child)) == ("c", "AsyncVm('c')")
            with pytest.raises(CladeError, match="no socket device"):
                await web.exec(["x"])
            assert [event.kind async for event in daemon.events()] == ["vm.forked"]

    asyncio.run(ask())
    assert seen[:3] == [("GET", "/v1/vms/web"), ("POST", "/v1/vms/web/fork"), ("POST", "/v1/vms/c/stop")]
