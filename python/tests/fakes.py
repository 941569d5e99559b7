"""Sockets of agents and daemons, of which each test says what they answer."""

import asyncio
import contextlib
import json
import re
import socket
import struct
import threading

from clade import Agent, AsyncAgent


class Awaited:
    """The agent that is awaited, used as the other is."""

    def __init__(self, path):
        self._agent = AsyncAgent(path)

    def __getattr__(self, name):
        return lambda *args, **more: asyncio.run(getattr(self._agent, name)(*args, **more))


def listening(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def accepting(path, serve):
    """A socket each of whose connections has a thread of its own, which runs `serve`."""
    listener = listening(path)

    def run(connection):
        # A client that has what it wants closes its connections.
        with connection, contextlib.suppress(ConnectionError):
            serve(connection)

    def accept():
        while True:
            threading.Thread(target=run, args=[listener.accept()[0]], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def guest(tmp_path, answer, kind=Agent):
    """A VM's socket behind which `answer` is said once, after the line that asks for the port."""
    path = tmp_path / "vm.vsock"
    listener = listening(path)
    got = []

    def serve():
        connection, _ = listener.accept()
        with connection:
            got.append(connection.recv(100))
            connection.sendall(b"OK 1024\n")
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += connection.recv(65536)
            head, _, body = asked.partition(b"\r\n\r\n")
            length = int(re.search(rb"Content-Length: (\d+)", head)[1])
            while len(body) < length:
                body += connection.recv(65536)
            got.append((head, body))
            connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return kind(str(path)), got, thread


def stream(*messages):
    body = b"".join(struct.pack(">BI", flag, len(text)) + text for flag, text in messages)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\nConnection: close\r\n\r\n"
    return head + body


def shell(tmp_path, start, refused, kind, taken=b"{}"):
    """A guest whose program is `start`, a function of the connection of its output. The guest takes no input before
    that function has set an event, and answers input with `taken`."""
    path = tmp_path / "vm.vsock"
    may_read, called = threading.Event(), []

    def serve(connection):
        connection.recv(100)
        connection.sendall(b"OK 1024\n")
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += connection.recv(65536)
        head, _, body = asked.partition(b"\r\n\r\n")
        while len(body) < int(re.search(rb"Content-Length: (\d+)", head)[1]):
            body += connection.recv(65536)
        called.append(re.search(rb"Process/(\w+)", head)[1].decode())
        if called[-1] == "Start":
            connection.sendall(stream((0, b'{"event":{"start":{"pid":7}}}')))
            return start(connection, may_read)
        may_read.wait(60)
        status, text = (400, json.dumps({"code": refused}).encode()) if refused else (200, taken)
        connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text))

    accepting(path, serve)
    return kind(str(path)), called


def message(said):
    return struct.pack(">BI", 0, len(said)) + said


DATA = message(b'{"event":{"data":{"stdout":"%s"}}}' % (b"aGkh" * 25_000))
ENDED = message(b'{"event":{"end":{"exitCode":0,"status":"exit status 0"}}}')
