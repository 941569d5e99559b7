"""Programs whose guest stops answering, and programs whose input fails."""

import asyncio
import struct
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from clade import Agent, AgentError, AsyncAgent

from fakes import ENDED, accepting, message, shell, stream

STARTED = b"OK 1024\n" + stream((0, b'{"event":{"start":{"pid":7}}}'))
OUTPUT = message(b'{"event":{"data":{"stdout":"aGk="}}}')
KEEPALIVE = message(b'{"event":{"keepalive":{}}}')


# The time after which a guest gives a client up that waits without a limit.
PATIENCE = 600


def silent(connection):
    """Answers no more."""
    connection.settimeout(PATIENCE)
    with suppress(TimeoutError):
        while connection.recv(65536):
            pass


def takes_no_connection(connection):
    silent(connection)


def has_no_head(connection):
    connection.sendall(b"OK 1024\n")
    silent(connection)


def has_started(connection):
    connection.sendall(STARTED)
    silent(connection)
    connection.sendall(ENDED)


def repeats_itself(connection):
    """Sends what keeps the silence from being too long."""
    connection.sendall(STARTED)
    for _ in range(3000):
        connection.sendall(KEEPALIVE)
        time.sleep(0.01)
    connection.sendall(ENDED)


def has_a_long_message(connection):
    """Sends a message byte by byte."""
    connection.sendall(STARTED + struct.pack(">BI", 0, 1 << 20))
    for _ in range(3000):
        connection.sendall(b" ")
        time.sleep(0.01)


@pytest.mark.parametrize(
    "answer", [takes_no_connection, has_no_head, has_started, repeats_itself, has_a_long_message]
)
def test_a_program_with_a_time_limit_does_not_wait_for_its_guest(tmp_path, agent_at, monkeypatch, answer):
    monkeypatch.setattr("clade._limit.GRACE", 0.2)
    accepting(tmp_path / "vm.vsock", answer)
    with pytest.raises(AgentError, match="not ended the program in its time") as caught:
        agent_at(str(tmp_path / "vm.vsock")).exec(["sleep", "1000"], input=b"x", timeout=0.1)
    assert caught.value.code == "deadline_exceeded"


def test_the_time_that_the_caller_takes_is_not_the_guests(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("clade._limit.time", SimpleNamespace(monotonic=lambda: now[0]))

    def start(connection, _):
        connection.sendall(OUTPUT + ENDED)

    agent, _ = shell(tmp_path, start, None, Agent)
    seen = []
    for piece in agent.follow(["x"], timeout=100_000):
        seen.append(piece)
        now[0] += 1e6

    async def follow():
        async for piece in AsyncAgent(str(tmp_path / "vm.vsock")).follow(["x"], timeout=100_000):
            seen.append(piece)
            now[0] += 1e6

    asyncio.run(follow())
    assert [type(piece).__name__ for piece in seen] == ["Output", "ExecResult"] * 2


class Unreadable(bytes):
    """Input that cannot be read."""

    def __new__(cls, error):
        self = super().__new__(cls, b"x")
        self.error = error
        return self

    def __getitem__(self, at):
        raise self.error


def reader(tmp_path, kind, taken=b"{}"):
    """A program that waits for its input. The list has an item if it was the guest that ended the waiting."""
    given_up = []

    def start(connection, may_read):
        may_read.set()
        connection.settimeout(PATIENCE)
        try:
            while connection.recv(65536):
                pass
        except TimeoutError:
            given_up.append(connection)
            connection.sendall(ENDED)

    agent, called = shell(tmp_path, start, None, kind, taken)
    return agent, called, given_up


@pytest.mark.parametrize("kind", [OSError, KeyError, ValueError])
def test_an_error_of_the_callers_input_is_raised_as_it_is(tmp_path, agent_at, kind):
    error = kind("the disk is gone")
    agent, called, given_up = reader(tmp_path, agent_at)
    with pytest.raises(kind) as caught:
        agent.exec(["cat"], input=Unreadable(error))
    assert caught.value is error
    assert error.__cause__ is None and error.__context__ is None
    assert called == ["Start"] and not given_up


def test_input_of_another_type_is_an_error_of_the_call(tmp_path, agent_at):
    agent, _, given_up = reader(tmp_path, agent_at)
    with pytest.raises(TypeError):
        agent.exec(["cat"], input="text")
    assert not given_up


def test_an_answer_to_input_that_is_no_answer_is_an_error(tmp_path, agent_at):
    agent, _, given_up = reader(tmp_path, agent_at, taken=b"no JSON")
    with pytest.raises(AgentError) as caught:
        agent.exec(["cat"], input=b"x")
    assert caught.value.code == "unavailable" and isinstance(caught.value.__cause__, ValueError)
    assert not given_up


def test_the_end_of_a_program_does_not_hide_an_error_of_its_input(tmp_path):
    error = OSError("the disk is gone")

    def serve(connection):
        # The client has all of it before the input fails.
        connection.sendall(STARTED + OUTPUT + ENDED)
        silent(connection)

    accepting(tmp_path / "vm.vsock", serve)
    before = set(threading.enumerate())
    pieces = Agent(str(tmp_path / "vm.vsock")).follow(["cat"], input=Unreadable(error))
    assert next(pieces).data == b"hi"
    for thread in set(threading.enumerate()) - before:
        if thread.name == "clade-stdin":
            thread.join()
    with pytest.raises(OSError, match="the disk is gone"):
        next(pieces)

    async def follow():
        pieces = AsyncAgent(str(tmp_path / "vm.vsock")).follow(["cat"], input=Unreadable(error))
        assert (await anext(pieces)).data == b"hi"
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
        with pytest.raises(OSError, match="the disk is gone"):
            await anext(pieces)

    asyncio.run(follow())
