"""A limit bounds the time that a guest has for a program and its answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._error import AgentError

# A guest has this time beyond a program's own limit to report that the agent has killed the program.
GRACE = 30.0


class Limit:
    """The limit ends all waiting for a guest's answer. A limit without a time never ends."""

    def __init__(self, timeout: float | None = None) -> None:
        self._until = None if timeout is None else time.monotonic() + timeout + GRACE

    def cap(self, most: float | None) -> float | None:
        """The call returns the time for one step, at most `most`. A limit that is over raises `TimeoutError`."""
        if self._until is None:
            return most
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        return left if most is None else min(left, most)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The limit does not count the time of the block, in which nothing waits for the guest."""
        begun = time.monotonic()
        try:
            yield
        finally:
            if self._until is not None:
                self._until += time.monotonic() - begun

    def failure(self, message: str) -> AgentError:
        """The caller gets this error for a step that has failed, as the limit is over or the guest does not answer."""
        if self._until is not None and time.monotonic() >= self._until:
            return AgentError("deadline_exceeded", "the guest has not ended the program in its time")
        return AgentError("unavailable", message)


class LimitedSocket(socket.socket):
    """The socket's operations each take at most the time of a guest's silence, and what the limit leaves."""

    def __init__(self, limit: Limit, silence: float | None) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._limit = limit
        self.silence = silence

    def connect(self, address: Any) -> None:
        self.settimeout(self._limit.cap(self.silence))
        super().connect(address)

    def sendall(self, *args: Any) -> None:
        self.settimeout(self._limit.cap(self.silence))
        super().sendall(*args)

    def recv(self, *args: Any) -> bytes:
        self.settimeout(self._limit.cap(self.silence))
        return super().recv(*args)

    def recv_into(self, *args: Any) -> int:
        self.settimeout(self._limit.cap(self.silence))
        return super().recv_into(*args)
