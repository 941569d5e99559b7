"""A small server of HTTP and WebSockets on port 8000. Each request has a connection of its own.

`/name` has a value that PUT sets, `/head` the head of the request, `/sum` the length and SHA-256 of a body as it
came, `/ticks` three lines with a second in between, `/zeros` 1 MiB, and `/ws` sends messages back.
"""

import base64
import hashlib
import socket
import struct
import threading
import time

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
name = "template"


def body(stream, headers):
    if headers.get("transfer-encoding") == "chunked":
        while size := int(stream.readline(), 16):
            yield stream.read(size)
            stream.readline()
        stream.readline()
        return
    left = int(headers.get("content-length", 0))
    while left and (piece := stream.read1(min(left, 65536))):
        left -= len(piece)
        yield piece


def answer(connection, text, status="200 OK"):
    data = text.encode()
    connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)


def websocket(connection, stream, headers):
    digest = hashlib.sha1(headers["sec-websocket-key"].encode() + GUID).digest()
    accept = base64.b64encode(digest).decode()
    connection.sendall(
        f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n".encode()
    )
    while first := stream.read(2):
        length = first[1] & 127
        if length == 126:
            length = struct.unpack(">H", stream.read(2))[0]
        mask = stream.read(4)
        data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(stream.read(length)))
        head = bytes([first[0], length]) if length < 126 else bytes([first[0], 126]) + struct.pack(">H", length)
        connection.sendall(head + data)
        if first[0] & 15 == 8:
            return


def serve(connection):
    global name
    with connection, connection.makefile("rb") as stream:
        method, path, _ = stream.readline().decode().split()
        raw, headers = "", {}
        while (line := stream.readline().decode()) not in ("\r\n", ""):
            raw += line
            key, value = line.split(":", 1)
            headers[key.lower()] = value.strip()
        if path == "/name":
            name = b"".join(body(stream, headers)).decode() if method == "PUT" else name
            answer(connection, name)
        elif path == "/head":
            answer(connection, raw)
        elif path == "/sum":
            digest, count = hashlib.sha256(), 0
            for piece in body(stream, headers):
                digest.update(piece)
                count += len(piece)
            answer(connection, f"{count} {digest.hexdigest()}")
        elif path == "/ticks":
            connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for number in range(3):
                connection.sendall(f"6\r\ntick {number}\r\n".encode())
                time.sleep(1)
            connection.sendall(b"0\r\n\r\n")
        elif path == "/zeros":
            connection.sendall(f"HTTP/1.1 200 OK\r\ncontent-length: {1 << 20}\r\n\r\n".encode())
            for _ in range(4):
                connection.sendall(bytes(1 << 18))
        elif path == "/ws":
            websocket(connection, stream, headers)
        else:
            answer(connection, path, "404 Not Found")


def handle(connection):
    try:
        serve(connection)
    except OSError:
        pass


listener = socket.create_server(("127.0.0.1", 8000), backlog=128)
# The test looks for it.
open("/srv/open", "w").close()
while True:
    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()
