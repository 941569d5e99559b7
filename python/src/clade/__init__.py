"""Client of Clade: fork, checkpoint and reset running microVMs.

    from clade import Clade

    with Clade() as clade, clade.vm("web").fork() as child:
        print(child.exec(["uname", "-r"]).text)
"""

from . import errors, types
from ._agent import Agent, ExecResult, Output
from ._async_agent import AsyncAgent
from ._async_objects import AsyncCheckpoint, AsyncClade, AsyncEvents, AsyncVm
from ._calls import AsyncCalls, Calls
from ._error import AgentError, CladeError, NotRunningError
from ._objects import Checkpoint, Clade, Event, Events, Vm
from ._transport import AsyncTransport, Transport, runtime_dir

__all__ = [
    "Agent",
    "AgentError",
    "AsyncAgent",
    "AsyncCalls",
    "AsyncCheckpoint",
    "AsyncClade",
    "AsyncEvents",
    "AsyncTransport",
    "AsyncVm",
    "Calls",
    "Checkpoint",
    "Clade",
    "CladeError",
    "Event",
    "Events",
    "ExecResult",
    "NotRunningError",
    "Output",
    "Transport",
    "Vm",
    "errors",
    "runtime_dir",
    "types",
]
