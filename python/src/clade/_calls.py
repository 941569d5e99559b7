"""Generated from the daemon's OpenAPI document by `python/generate.py`: do not edit."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from . import types as t
from ._transport import AsyncTransport, Transport


class Calls:
    """Every call of the daemon's API that has one answer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def checkpoints(self) -> list[t.CheckpointInfo]:
        """Lists the checkpoints."""
        answer: list[t.CheckpointInfo] = self._transport.json("GET", "/v1/checkpoints")
        return answer

    def open(self, body: t.OpenRequest, *, idempotency_key: str | None = None) -> t.CheckpointInfo:
        """Holds the image of a snapshot as a checkpoint."""
        answer: t.CheckpointInfo = self._transport.json("POST", "/v1/checkpoints", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    def remove_checkpoint(self, name: str) -> t.CheckpointInfo:
        """Removes a checkpoint. Its children run on."""
        answer: t.CheckpointInfo = self._transport.json("DELETE", f"/v1/checkpoints/{quote(name, safe='')}")
        return answer

    def show_checkpoint(self, name: str) -> t.CheckpointInfo:
        """Shows a checkpoint."""
        answer: t.CheckpointInfo = self._transport.json("GET", f"/v1/checkpoints/{quote(name, safe='')}")
        return answer

    def fork_checkpoint(self, name: str, body: t.ForkRequest, *, idempotency_key: str | None = None) -> t.ForkAnswer:
        """Forks a checkpoint."""
        answer: t.ForkAnswer = self._transport.json("POST", f"/v1/checkpoints/{quote(name, safe='')}/fork", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    def keep_checkpoint(self, name: str, body: t.KeepRequest | None = None) -> t.CheckpointInfo:
        """Writes a checkpoint to the disk, where later supervisors find it. Answers when it is
        there.
        """
        answer: t.CheckpointInfo = self._transport.json("POST", f"/v1/checkpoints/{quote(name, safe='')}/keep", body=body)
        return answer

    def prepare(self, name: str, body: t.PrepareRequest) -> t.Prepared:
        """Prepares processes for children of a checkpoint."""
        answer: t.Prepared = self._transport.json("POST", f"/v1/checkpoints/{quote(name, safe='')}/prepare", body=body)
        return answer

    def ended(self) -> list[t.EndedVm]:
        """Lists the VMs that ended by themselves, with the reasons."""
        answer: list[t.EndedVm] = self._transport.json("GET", "/v1/ended")
        return answer

    def names(self) -> list[str]:
        """Lists the names of the directory's VMs, also of those that do not answer. Some may have
        ended.
        """
        answer: list[str] = self._transport.json("GET", "/v1/names")
        return answer

    def restore(self, body: t.RestoreRequest, *, idempotency_key: str | None = None) -> t.ForkAnswer:
        """Starts VMs from a snapshot: all of them or none."""
        answer: t.ForkAnswer = self._transport.json("POST", "/v1/restore", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    def info(self) -> t.SupervisorInfo:
        """Shows the supervisor in numbers."""
        answer: t.SupervisorInfo = self._transport.json("GET", "/v1/supervisor")
        return answer

    def keep(self) -> t.SupervisorKept:
        """Puts the end of a supervisor that ends when it is idle off, for two seconds."""
        answer: t.SupervisorKept = self._transport.json("POST", "/v1/supervisor")
        return answer

    def vms(self) -> list[t.VmInfo]:
        """Lists the VMs of the directory."""
        answer: list[t.VmInfo] = self._transport.json("GET", "/v1/vms")
        return answer

    def boot(self, body: t.BootRequest, *, idempotency_key: str | None = None) -> t.VmInfo:
        """Boots a VM. Answers when it runs; if it has ended by then, with its end. A VM that does
        not answer is stopped.
        """
        answer: t.VmInfo = self._transport.json("POST", "/v1/vms", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    def show(self, name: str) -> t.VmInfo:
        """Shows a VM."""
        answer: t.VmInfo = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}")
        return answer

    def balloon(self, name: str) -> t.BalloonInfo:
        """Shows a VM's balloon and its guest's memory statistics."""
        answer: t.BalloonInfo = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/balloon")
        return answer

    def set_balloon(self, name: str, body: t.BalloonRequest) -> t.BalloonInfo:
        """Sets the target of a VM's balloon."""
        answer: t.BalloonInfo = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/balloon", body=body)
        return answer

    def checkpoint(self, name: str, body: t.CheckpointRequest, *, idempotency_key: str | None = None) -> t.CheckpointInfo:
        """Takes a checkpoint of a VM."""
        answer: t.CheckpointInfo = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/checkpoint", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    def type_into_console(self, name: str, body: bytes, *, line: str | None = None) -> t.ConsoleTyped:
        """Types into a VM's console. A suspended VM wakes."""
        answer: t.ConsoleTyped = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/console", body=body, query={"line": line})
        return answer

    def fork_vm(self, name: str, body: t.ForkRequest, *, idempotency_key: str | None = None) -> t.ForkAnswer:
        """Forks a VM. Each child has a process of its own."""
        answer: t.ForkAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/fork", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    def logs(self, name: str) -> t.LogsAnswer:
        """Shows the last output on a VM's console."""
        answer: t.LogsAnswer = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/logs")
        return answer

    def read_memory(self, name: str, *, address: int, length: int) -> bytes:
        """Reads a guest's memory, as the guest sees it. A fork, a reset or a pause comes before or
        after the whole read. Aligned words of 8 bytes are read as a whole; other words may be
        torn by writes of vCPUs.
        """
        return self._transport.data("GET", f"/v1/vms/{quote(name, safe='')}/memory", query={"address": address, "length": length})

    def write_memory(self, name: str, body: bytes, *, address: int, doorbell: int | None = None) -> t.MemoryWritten:
        """Writes a guest's memory, as the guest would. A fork, a snapshot or a reset has all of it
        or nothing. Aligned words of 8 bytes are written as a whole. With `doorbell`, the vCPU
        of that number is interrupted afterwards (vector 48), if its guest has enabled its local
        APIC: a guest that takes orders from its memory can halt in between.
        """
        answer: t.MemoryWritten = self._transport.json("PUT", f"/v1/vms/{quote(name, safe='')}/memory", body=body, query={"address": address, "doorbell": doorbell})
        return answer

    def set_network(self, name: str, body: t.NetworkRequest) -> t.VmInfo:
        """Opens or closes a VM's network devices for packets, or sets their egress rules. The host
        closes a network outside of the VM's process too: it takes the VM's TAP interfaces down,
        and stops its passt.
        """
        answer: t.VmInfo = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/network", body=body)
        return answer

    def page_map(self, name: str, *, from_: int | None = None, max_runs: int | None = None) -> bytes:
        """Shows the kind of each page of a VM's memory, as runs in a few bytes each: for a
        browser's page that draws them. `docs/page.md` has the format.
        """
        return self._transport.data("GET", f"/v1/vms/{quote(name, safe='')}/page-map", query={"from": from_, "max_runs": max_runs})

    def show_pages(self, name: str, *, from_: int | None = None, max_runs: int | None = None, cells: int | None = None) -> t.PagesAnswer:
        """Shows the kind of each page of a VM's memory: as runs, or counted in parts."""
        answer: t.PagesAnswer = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/pages", query={"from": from_, "max_runs": max_runs, "cells": cells})
        return answer

    def pause(self, name: str) -> t.VmInfo:
        """Pauses a VM."""
        answer: t.VmInfo = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/pause")
        return answer

    def ready(self, name: str) -> t.ReadyAnswer:
        """Has the agent in a VM's guest renew its identity: its clock, its random numbers, its
        tokens, its hooks. Answers when it is ready.
        """
        answer: t.ReadyAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/ready")
        return answer

    def reset(self, name: str, body: t.ResetRequest | None = None) -> t.ResetAnswer:
        """Resets a forked VM to the instant of its fork."""
        answer: t.ResetAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/reset", body=body)
        return answer

    def resume(self, name: str) -> t.VmInfo:
        """Lets a paused VM run on."""
        answer: t.VmInfo = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/resume")
        return answer

    def roll_back(self, name: str, body: t.RollbackRequest) -> t.ResetAnswer:
        """Rolls a VM back to a checkpoint of its line, in place."""
        answer: t.ResetAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/rollback", body=body)
        return answer

    def cancel_snapshot(self, name: str) -> t.SnapshotProgress:
        """Cancels a VM's snapshot."""
        answer: t.SnapshotProgress = self._transport.json("DELETE", f"/v1/vms/{quote(name, safe='')}/snapshot")
        return answer

    def snapshot_progress(self, name: str) -> t.SnapshotProgress:
        """Shows the progress of a VM's snapshot."""
        answer: t.SnapshotProgress = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/snapshot")
        return answer

    def snapshot(self, name: str, body: t.SnapshotRequest) -> t.SnapshotAnswer:
        """Saves a VM. Answers when everything is on the disk."""
        answer: t.SnapshotAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/snapshot", body=body)
        return answer

    def show_stats(self, name: str) -> t.VmStats:
        """Shows a VM's memory, copies, pins and pauses in numbers."""
        answer: t.VmStats = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/stats")
        return answer

    def stop(self, name: str, body: t.StopRequest | None = None) -> t.StopAnswer:
        """Stops a VM for good. On request its guest first has time to power itself off. Answers
        when its name, interfaces and sockets are free. A process that does not answer is
        killed.
        """
        answer: t.StopAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/stop", body=body)
        return answer

    def suspend_vm(self, name: str, body: t.SuspendRequest | None = None) -> t.SuspendAnswer:
        """Suspends a VM: writes its memory to a file, and stops it until its guest is needed.
        Answers when its memory is given back.
        """
        answer: t.SuspendAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/suspend", body=body)
        return answer

    def remove_suspend_after(self, name: str) -> t.SuspendAfterInfo:
        """Has an idle VM run on."""
        answer: t.SuspendAfterInfo = self._transport.json("DELETE", f"/v1/vms/{quote(name, safe='')}/suspend-after")
        return answer

    def show_suspend_after(self, name: str) -> t.SuspendAfterInfo:
        """Shows the idle time after which a VM is suspended."""
        answer: t.SuspendAfterInfo = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/suspend-after")
        return answer

    def set_suspend_after(self, name: str, body: t.SuspendAfterRequest) -> t.SuspendAfterInfo:
        """Has a VM suspended whenever it has been idle for a time."""
        answer: t.SuspendAfterInfo = self._transport.json("PUT", f"/v1/vms/{quote(name, safe='')}/suspend-after", body=body)
        return answer

    def touched(self, name: str) -> t.TouchedAnswer:
        """Lists the pages that a VM has touched since it was started."""
        answer: t.TouchedAnswer = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/touched")
        return answer

    def remove_ttl(self, name: str) -> t.TtlInfo:
        """Lets a VM live on."""
        answer: t.TtlInfo = self._transport.json("DELETE", f"/v1/vms/{quote(name, safe='')}/ttl")
        return answer

    def show_ttl(self, name: str) -> t.TtlInfo:
        """Shows the time that a VM has to live."""
        answer: t.TtlInfo = self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/ttl")
        return answer

    def set_ttl(self, name: str, body: t.TtlRequest) -> t.TtlInfo:
        """Has a VM stopped after a time."""
        answer: t.TtlInfo = self._transport.json("PUT", f"/v1/vms/{quote(name, safe='')}/ttl", body=body)
        return answer

    def wake(self, name: str) -> t.WakeAnswer:
        """Wakes a VM, if it is suspended."""
        answer: t.WakeAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/wake")
        return answer

    def working_set(self, name: str) -> t.WorkingSetAnswer:
        """Records a VM's working set in its snapshot."""
        answer: t.WorkingSetAnswer = self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/working-set")
        return answer


class AsyncCalls:
    """Every call of the daemon's API that has one answer. Each is awaited."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport

    async def checkpoints(self) -> list[t.CheckpointInfo]:
        """Lists the checkpoints."""
        answer: list[t.CheckpointInfo] = await self._transport.json("GET", "/v1/checkpoints")
        return answer

    async def open(self, body: t.OpenRequest, *, idempotency_key: str | None = None) -> t.CheckpointInfo:
        """Holds the image of a snapshot as a checkpoint."""
        answer: t.CheckpointInfo = await self._transport.json("POST", "/v1/checkpoints", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    async def remove_checkpoint(self, name: str) -> t.CheckpointInfo:
        """Removes a checkpoint. Its children run on."""
        answer: t.CheckpointInfo = await self._transport.json("DELETE", f"/v1/checkpoints/{quote(name, safe='')}")
        return answer

    async def show_checkpoint(self, name: str) -> t.CheckpointInfo:
        """Shows a checkpoint."""
        answer: t.CheckpointInfo = await self._transport.json("GET", f"/v1/checkpoints/{quote(name, safe='')}")
        return answer

    async def fork_checkpoint(self, name: str, body: t.ForkRequest, *, idempotency_key: str | None = None) -> t.ForkAnswer:
        """Forks a checkpoint."""
        answer: t.ForkAnswer = await self._transport.json("POST", f"/v1/checkpoints/{quote(name, safe='')}/fork", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    async def keep_checkpoint(self, name: str, body: t.KeepRequest | None = None) -> t.CheckpointInfo:
        """Writes a checkpoint to the disk, where later supervisors find it. Answers when it is
        there.
        """
        answer: t.CheckpointInfo = await self._transport.json("POST", f"/v1/checkpoints/{quote(name, safe='')}/keep", body=body)
        return answer

    async def prepare(self, name: str, body: t.PrepareRequest) -> t.Prepared:
        """Prepares processes for children of a checkpoint."""
        answer: t.Prepared = await self._transport.json("POST", f"/v1/checkpoints/{quote(name, safe='')}/prepare", body=body)
        return answer

    async def ended(self) -> list[t.EndedVm]:
        """Lists the VMs that ended by themselves, with the reasons."""
        answer: list[t.EndedVm] = await self._transport.json("GET", "/v1/ended")
        return answer

    async def names(self) -> list[str]:
        """Lists the names of the directory's VMs, also of those that do not answer. Some may have
        ended.
        """
        answer: list[str] = await self._transport.json("GET", "/v1/names")
        return answer

    async def restore(self, body: t.RestoreRequest, *, idempotency_key: str | None = None) -> t.ForkAnswer:
        """Starts VMs from a snapshot: all of them or none."""
        answer: t.ForkAnswer = await self._transport.json("POST", "/v1/restore", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    async def info(self) -> t.SupervisorInfo:
        """Shows the supervisor in numbers."""
        answer: t.SupervisorInfo = await self._transport.json("GET", "/v1/supervisor")
        return answer

    async def keep(self) -> t.SupervisorKept:
        """Puts the end of a supervisor that ends when it is idle off, for two seconds."""
        answer: t.SupervisorKept = await self._transport.json("POST", "/v1/supervisor")
        return answer

    async def vms(self) -> list[t.VmInfo]:
        """Lists the VMs of the directory."""
        answer: list[t.VmInfo] = await self._transport.json("GET", "/v1/vms")
        return answer

    async def boot(self, body: t.BootRequest, *, idempotency_key: str | None = None) -> t.VmInfo:
        """Boots a VM. Answers when it runs; if it has ended by then, with its end. A VM that does
        not answer is stopped.
        """
        answer: t.VmInfo = await self._transport.json("POST", "/v1/vms", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    async def show(self, name: str) -> t.VmInfo:
        """Shows a VM."""
        answer: t.VmInfo = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}")
        return answer

    async def balloon(self, name: str) -> t.BalloonInfo:
        """Shows a VM's balloon and its guest's memory statistics."""
        answer: t.BalloonInfo = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/balloon")
        return answer

    async def set_balloon(self, name: str, body: t.BalloonRequest) -> t.BalloonInfo:
        """Sets the target of a VM's balloon."""
        answer: t.BalloonInfo = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/balloon", body=body)
        return answer

    async def checkpoint(self, name: str, body: t.CheckpointRequest, *, idempotency_key: str | None = None) -> t.CheckpointInfo:
        """Takes a checkpoint of a VM."""
        answer: t.CheckpointInfo = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/checkpoint", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    async def type_into_console(self, name: str, body: bytes, *, line: str | None = None) -> t.ConsoleTyped:
        """Types into a VM's console. A suspended VM wakes."""
        answer: t.ConsoleTyped = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/console", body=body, query={"line": line})
        return answer

    async def fork_vm(self, name: str, body: t.ForkRequest, *, idempotency_key: str | None = None) -> t.ForkAnswer:
        """Forks a VM. Each child has a process of its own."""
        answer: t.ForkAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/fork", body=body, headers={"Idempotency-Key": idempotency_key})
        return answer

    async def logs(self, name: str) -> t.LogsAnswer:
        """Shows the last output on a VM's console."""
        answer: t.LogsAnswer = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/logs")
        return answer

    async def read_memory(self, name: str, *, address: int, length: int) -> bytes:
        """Reads a guest's memory, as the guest sees it. A fork, a reset or a pause comes before or
        after the whole read. Aligned words of 8 bytes are read as a whole; other words may be
        torn by writes of vCPUs.
        """
        return await self._transport.data("GET", f"/v1/vms/{quote(name, safe='')}/memory", query={"address": address, "length": length})

    async def write_memory(self, name: str, body: bytes, *, address: int, doorbell: int | None = None) -> t.MemoryWritten:
        """Writes a guest's memory, as the guest would. A fork, a snapshot or a reset has all of it
        or nothing. Aligned words of 8 bytes are written as a whole. With `doorbell`, the vCPU
        of that number is interrupted afterwards (vector 48), if its guest has enabled its local
        APIC: a guest that takes orders from its memory can halt in between.
        """
        answer: t.MemoryWritten = await self._transport.json("PUT", f"/v1/vms/{quote(name, safe='')}/memory", body=body, query={"address": address, "doorbell": doorbell})
        return answer

    async def set_network(self, name: str, body: t.NetworkRequest) -> t.VmInfo:
        """Opens or closes a VM's network devices for packets, or sets their egress rules. The host
        closes a network outside of the VM's process too: it takes the VM's TAP interfaces down,
        and stops its passt.
        """
        answer: t.VmInfo = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/network", body=body)
        return answer

    async def page_map(self, name: str, *, from_: int | None = None, max_runs: int | None = None) -> bytes:
        """Shows the kind of each page of a VM's memory, as runs in a few bytes each: for a
        browser's page that draws them. `docs/page.md` has the format.
        """
        return await self._transport.data("GET", f"/v1/vms/{quote(name, safe='')}/page-map", query={"from": from_, "max_runs": max_runs})

    async def show_pages(self, name: str, *, from_: int | None = None, max_runs: int | None = None, cells: int | None = None) -> t.PagesAnswer:
        """Shows the kind of each page of a VM's memory: as runs, or counted in parts."""
        answer: t.PagesAnswer = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/pages", query={"from": from_, "max_runs": max_runs, "cells": cells})
        return answer

    async def pause(self, name: str) -> t.VmInfo:
        """Pauses a VM."""
        answer: t.VmInfo = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/pause")
        return answer

    async def ready(self, name: str) -> t.ReadyAnswer:
        """Has the agent in a VM's guest renew its identity: its clock, its random numbers, its
        tokens, its hooks. Answers when it is ready.
        """
        answer: t.ReadyAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/ready")
        return answer

    async def reset(self, name: str, body: t.ResetRequest | None = None) -> t.ResetAnswer:
        """Resets a forked VM to the instant of its fork."""
        answer: t.ResetAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/reset", body=body)
        return answer

    async def resume(self, name: str) -> t.VmInfo:
        """Lets a paused VM run on."""
        answer: t.VmInfo = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/resume")
        return answer

    async def roll_back(self, name: str, body: t.RollbackRequest) -> t.ResetAnswer:
        """Rolls a VM back to a checkpoint of its line, in place."""
        answer: t.ResetAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/rollback", body=body)
        return answer

    async def cancel_snapshot(self, name: str) -> t.SnapshotProgress:
        """Cancels a VM's snapshot."""
        answer: t.SnapshotProgress = await self._transport.json("DELETE", f"/v1/vms/{quote(name, safe='')}/snapshot")
        return answer

    async def snapshot_progress(self, name: str) -> t.SnapshotProgress:
        """Shows the progress of a VM's snapshot."""
        answer: t.SnapshotProgress = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/snapshot")
        return answer

    async def snapshot(self, name: str, body: t.SnapshotRequest) -> t.SnapshotAnswer:
        """Saves a VM. Answers when everything is on the disk."""
        answer: t.SnapshotAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/snapshot", body=body)
        return answer

    async def show_stats(self, name: str) -> t.VmStats:
        """Shows a VM's memory, copies, pins and pauses in numbers."""
        answer: t.VmStats = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/stats")
        return answer

    async def stop(self, name: str, body: t.StopRequest | None = None) -> t.StopAnswer:
        """Stops a VM for good. On request its guest first has time to power itself off. Answers
        when its name, interfaces and sockets are free. A process that does not answer is
        killed.
        """
        answer: t.StopAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/stop", body=body)
        return answer

    async def suspend_vm(self, name: str, body: t.SuspendRequest | None = None) -> t.SuspendAnswer:
        """Suspends a VM: writes its memory to a file, and stops it until its guest is needed.
        Answers when its memory is given back.
        """
        answer: t.SuspendAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/suspend", body=body)
        return answer

    async def remove_suspend_after(self, name: str) -> t.SuspendAfterInfo:
        """Has an idle VM run on."""
        answer: t.SuspendAfterInfo = await self._transport.json("DELETE", f"/v1/vms/{quote(name, safe='')}/suspend-after")
        return answer

    async def show_suspend_after(self, name: str) -> t.SuspendAfterInfo:
        """Shows the idle time after which a VM is suspended."""
        answer: t.SuspendAfterInfo = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/suspend-after")
        return answer

    async def set_suspend_after(self, name: str, body: t.SuspendAfterRequest) -> t.SuspendAfterInfo:
        """Has a VM suspended whenever it has been idle for a time."""
        answer: t.SuspendAfterInfo = await self._transport.json("PUT", f"/v1/vms/{quote(name, safe='')}/suspend-after", body=body)
        return answer

    async def touched(self, name: str) -> t.TouchedAnswer:
        """Lists the pages that a VM has touched since it was started."""
        answer: t.TouchedAnswer = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/touched")
        return answer

    async def remove_ttl(self, name: str) -> t.TtlInfo:
        """Lets a VM live on."""
        answer: t.TtlInfo = await self._transport.json("DELETE", f"/v1/vms/{quote(name, safe='')}/ttl")
        return answer

    async def show_ttl(self, name: str) -> t.TtlInfo:
        """Shows the time that a VM has to live."""
        answer: t.TtlInfo = await self._transport.json("GET", f"/v1/vms/{quote(name, safe='')}/ttl")
        return answer

    async def set_ttl(self, name: str, body: t.TtlRequest) -> t.TtlInfo:
        """Has a VM stopped after a time."""
        answer: t.TtlInfo = await self._transport.json("PUT", f"/v1/vms/{quote(name, safe='')}/ttl", body=body)
        return answer

    async def wake(self, name: str) -> t.WakeAnswer:
        """Wakes a VM, if it is suspended."""
        answer: t.WakeAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/wake")
        return answer

    async def working_set(self, name: str) -> t.WorkingSetAnswer:
        """Records a VM's working set in its snapshot."""
        answer: t.WorkingSetAnswer = await self._transport.json("POST", f"/v1/vms/{quote(name, safe='')}/working-set")
        return answer
