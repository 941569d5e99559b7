"""What goes wrong."""

from __future__ import annotations

import copyreg
from typing import Any


class _Error(Exception):
    """This is the base of the client's errors. A pickled error keeps its class, its text and its fields."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is made without `__init__`, whose arguments differ from class to class.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class CladeError(_Error):
    """The daemon has refused a request, or its answer has not come. Each kind of refusal has a class below this one."""

    def __init__(self, kind: str, status: int, title: str, detail: str) -> None:
        super().__init__(f"{detail or title} ({kind})")
        self.kind = kind
        """What it is, as `no-such-vm`."""
        self.status = status
        """The HTTP status."""
        self.title = title
        """The kind in words."""
        self.detail = detail
        """This error in words, with its causes."""


class NotRunningError(CladeError):
    """No daemon answers."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__("not-running", 0, "No daemon answers.", f"no daemon answers at {where}: {why}")


class AgentError(_Error):
    """The agent in a guest does not answer, or has refused a request."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        """As the Connect protocol names it: `not_found`, `unavailable`."""
