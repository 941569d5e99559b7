"""A warm interpreter: it answers one expression a connection, on a Unix socket.

A client sends the expression and shuts its half of the connection down. It is sent `+` and the
value's repr, or `-` and what was raised. One is answered after the other, so an expression that
does not end holds up all.

Expressions see the names of this module: among others `token`, drawn once when the program
starts, `count`, which each expression adds one to, and `state`, an empty dictionary of theirs.
"""

import json
import math
import os
import random
import socket
import sys

SOCKET = "/run/answer.sock"
# Most bytes of an expression, and of an answer.
LIMIT = 1 << 20
# Seconds that a client may be silent.
PATIENCE = 10

token = os.urandom(16).hex()
count = 0
state = {}


def receive(connection):
    pieces, size = [], 0
    while piece := connection.recv(65536):
        size += len(piece)
        if size > LIMIT:
            raise ValueError(f"the expression has more than {LIMIT} bytes")
        pieces.append(piece)
    return b"".join(pieces).decode()


def answer(connection):
    global count
    try:
        expression = receive(connection)
        count += 1
        text = "+" + repr(eval(expression, globals()))
    except OSError:
        # The client has gone, or is silent.
        raise
    except BaseException as error:
        text = f"-{type(error).__name__}: {error}"
    data = text.encode(errors="replace")
    if len(data) > LIMIT:
        data = f"-the answer has {len(data)} bytes; {LIMIT} are allowed".encode()
    connection.sendall(data)


def main():
    # Of a run before this one, where the file system is kept.
    if os.path.exists(SOCKET):
        os.unlink(SOCKET)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen(256)
    print("python answers", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE)
            try:
                answer(connection)
            except OSError as error:
                print(f"a client is given up: {error}", file=sys.stderr, flush=True)


main()
