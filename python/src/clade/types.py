"""Generated from the daemon's OpenAPI document by `python/generate.py`: do not edit."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class AheadInfo(TypedDict):
    """Counts of the pages learned from a checkpoint's ended children."""

    children: int
    """Children that have ended and reported their written pages."""

    copied: int
    """Pages copied ahead for those children."""

    hits: int
    """Copied pages that were written: a fault less each."""

    pages: int
    """Pages that the next child is likely to write, regardless of its limit."""

    waste: int
    """Copied pages that were never written: wasted memory and time."""


class GuestMemory(TypedDict):
    """A guest's memory statistics."""

    available_kib: int
    """Memory available without swapping, in KiB."""

    caches_kib: int
    """Disk caches in KiB."""

    free_kib: int
    """Unused memory in KiB."""

    major_faults: int
    """Major page faults: those that read from a disk."""

    minor_faults: int
    """Minor page faults."""

    total_kib: int
    """Total memory in KiB."""


class BalloonInfo(TypedDict):
    """A balloon, and the guest's memory statistics."""

    actual_mib: float
    """MiB the guest reports as given up."""

    answered: bool
    """Whether the guest answered this request; otherwise its statistics are older."""

    discarded_pages: int
    """Pages discarded so far: given up to the balloon, or reported as free."""

    guest: NotRequired[GuestMemory | None]
    """The guest's statistics; absent if it never sent any."""

    pinned_pages: int
    """Pages that were not discarded because a device had them pinned."""

    target_mib: float
    """The balloon's target in MiB."""


class BalloonRequest(TypedDict):
    """A request to resize a balloon."""

    target_mib: int
    """MiB the guest should give up in total."""


class Rate(TypedDict):
    """A token bucket's parameters."""

    burst: NotRequired[int | None]
    """The bucket's size in tokens. Default: the tokens of one second."""

    once: int
    """Additional tokens at the beginning, which are not refilled."""

    per_second: int
    """Tokens added per second."""


class Limits(TypedDict):
    """The limits of a device. An absent limit means unlimited."""

    bytes: NotRequired[Rate | None]
    """Limit in bytes."""

    operations: NotRequired[Rate | None]
    """Limit in operations."""


class BlockOptions(TypedDict):
    """The configuration of a block device."""

    limits: Limits
    """Limits of its throughput."""

    queues: int
    """Number of queues."""


CpuTemplate = Literal["host", "x86-64-v1", "x86-64-v2", "x86-64-v3"]


CachePolicy = Literal["host", "direct"]


class Time(TypedDict):
    """A time."""

    nanos: int

    secs: int


class DiskConfig(TypedDict):
    """A disk's file and how it is used."""

    cache: CachePolicy
    """Whether transfers go through the host's page cache."""

    ephemeral: NotRequired[bool]
    """Whether writes end with the VM. The image is opened read-only, and several VMs may use it."""

    id: NotRequired[str | None]
    """The id that the guest reads (VIRTIO_BLK_T_GET_ID), cut to 20 bytes. Default: the last
    component of `path`.
    """

    latency: NotRequired[Time | None]
    """A delay added to every transfer, for tests."""

    overlays: NotRequired[str | None]
    """The directory of overlays. Default: the image's directory, or the temporary directory for a
    block device.
    """

    path: str
    """A raw image or a block device."""

    read_only: bool
    """Whether the guest may only read the disk."""


class DiskSpec(TypedDict):
    """A disk and its virtio block device."""

    device: BlockOptions
    """The block device: its queues and limits."""

    disk: DiskConfig
    """The disk: its file and its settings."""


Irqchip = Literal["full", "split"]


EgressRule = str


class PortForward(TypedDict):
    """A port of the host's loopback address that is forwarded to a TCP port of the guest."""

    guest: int
    """The guest's port."""

    host: int
    """The host's port."""


class UserNet(TypedDict):
    """A network by passt, which needs no privileges: the guest is 10.0.2.15/24, its gateway
    10.0.2.2, its name server 10.0.2.3.
    """

    forward: NotRequired[list[PortForward]]
    """TCP ports forwarded to the guest. Not inherited by children, because a port belongs to one
    VM.
    """


class NetSpec(TypedDict):
    """A network device."""

    egress: NotRequired[list[list[EgressRule]]]
    """Egress rules when the guest boots: layers of rules, each of which a packet has to pass.
    Later the device keeps them.
    """

    mac: NotRequired[str | None]
    """The MAC address; a random one if not given."""

    queues: int
    """Pairs of queues."""

    receive: Limits
    """Limits on received traffic."""

    send: Limits
    """Limits on sent traffic."""

    tap: str
    """The name of the TAP interface to open or create; `%d` stands for a free number. Empty for
    `user`.
    """

    user: NotRequired[UserNet | None]
    """A network by passt instead of an interface."""


class VsockOptions(TypedDict):
    """The configuration of a socket device."""

    cid: int
    """The guest's CID."""

    socket: str
    """The Unix socket to which programs on the host connect. Removed with the device."""


class VmConfig(TypedDict):
    """The configuration of a VM. Its children have an equal one, and an identity of their own."""

    acpi: bool
    """Whether the guest gets ACPI tables, with its generation id in them. Without them, or without
    an IOAPIC, it has the command line and the MP table.
    """

    balloon: bool
    """Whether there is a balloon."""

    cpu: CpuTemplate
    """The CPU model that the guest sees."""

    cpus: int
    """Number of vCPUs."""

    disks: list[DiskSpec]
    """Disks, in the order in which the guest finds them."""

    hide: str
    """CPU features to hide from the guest: Linux names, with commas between."""

    irqchip: Irqchip
    """Interrupt controllers."""

    memory: int
    """Guest memory in bytes: whole 4 KiB pages."""

    nets: list[NetSpec]
    """Network devices, in the order in which the guest finds them."""

    pit: bool
    """Whether there is a PIT. Kernels that calibrate by the TSC or kvm-clock do not need one."""

    pmu: NotRequired[bool]
    """Whether the guest has performance counters. Snapshots without this field are of guests that
    had the host's.
    """

    report_port: NotRequired[bool]
    """A flag of snapshot format 1, for a test device. Written as false, and ignored when read."""

    rng: NotRequired[Limits | None]
    """The limits of the entropy device, if there is one."""

    virtio_console: bool
    """Whether there is a virtio console (`hvc0`) beside the serial one."""

    vsock: NotRequired[VsockOptions | None]
    """The socket device, if there is one."""


class VmLimits(TypedDict):
    """Resource limits of a VM's process on the host. They need control groups."""

    cpus: NotRequired[float | None]
    """Processors, also parts of one."""

    memory_mib: NotRequired[int | None]
    """Memory in MiB: the guest's RAM, its earlier pages that forks still show, and the process
    itself.
    """


class Secret(TypedDict):
    """Secret bytes, and their name."""

    name: str
    """The name in answers and errors."""

    value: str
    """The bytes in base64: 16 to 4,096."""


class BootRequest(TypedDict):
    """A request to boot a VM in a process of its own."""

    cmdline: NotRequired[str]
    """The kernel's command line."""

    config: VmConfig
    """Its configuration."""

    initrd: NotRequired[str | None]
    """The initramfs."""

    kernel: str
    """The kernel's file, or the name of one of the program's own kernels."""

    labels: NotRequired[dict[str, str]]
    """Its labels."""

    limits: NotRequired[VmLimits]
    """Resource limits of its process, and of its children's."""

    name: str
    """Its name."""

    paused: NotRequired[bool]
    """Whether it starts paused."""

    reports_ready: NotRequired[bool]
    """Whether its guest reports that it is ready, by its agent or otherwise. The guest is
    `booting` until then.
    """

    secrets: NotRequired[list[Secret]]
    """Secrets that children may be made without: at most 16, of 16 KiB in all. This gives them to
    no guest.
    """

    session: NotRequired[str | None]
    """Its session, inherited by all its descendants: they end with the process that sends this
    request, however that ends. Refused over TCP.
    """


class KindCounts(TypedDict):
    """Guest pages by kind. Each page counts once."""

    absent: int
    """Pages not inherited, without memory."""

    exclusive: int
    """The VM's own pages, without the pinned ones."""

    pinned: int
    """The VM's own pages that are pinned for DMA."""

    reference: int
    """Pages of zeros or a pattern, which cost nothing."""

    shared: int
    """Pages of a layer."""


class CellInfo(KindCounts):
    """One of equal parts of a VM's memory."""

    first: int
    """Its first guest frame number."""

    layer: NotRequired[int | None]
    """The number of the layer that provides most of its shared pages."""


class DetachedInfo(TypedDict):
    """The cost of a detached checkpoint's copies."""

    copied_layers: int
    """Layers of memory that were copied."""

    copied_pages: int
    """Pages of memory that were copied."""

    disk_bytes: int
    """Bytes of disks that were copied."""

    disk_files: int
    """Files of disks that were copied."""

    shared_layers: int
    """Layers of memory that no process of a VM can write anyway: a snapshot's files, and copies
    for earlier checkpoints.
    """

    total_us: float
    """Time for the copies, in microseconds. The VM ran meanwhile."""


class ForkedInfo(TypedDict):
    """The cost of a checkpoint for its VM."""

    copied_pages: int
    """Pages copied."""

    freeze_us: float
    """The part of the pause that froze memory, in microseconds."""

    in_flight: int
    """Device requests in flight at that instant."""

    park_us: float
    """The part of the pause until vCPUs and devices stood still, in microseconds."""

    remapped_pages: int
    """Pages that became shared without being copied."""


Link = Literal["open", "closed"]


class CheckpointInfo(TypedDict):
    """A checkpoint: a VM at one instant, to fork from."""

    age_s: float
    """Seconds since it was taken."""

    ahead: NotRequired[AheadInfo]
    """Pages learned from its children, which the next ones have copies of before they write them."""

    cpus: int
    """vCPUs."""

    descriptors: int
    """Descriptors held: layers of memory and of disks, and its state."""

    detached: NotRequired[DetachedInfo | None]
    """The cost of its copies, if it is detached: no process of a VM can write its files. Null if
    it is not.
    """

    forked: NotRequired[ForkedInfo | None]
    """Further costs for the VM; null if it was opened from a snapshot."""

    generation: int
    """Forks between it and the VM that was booted, counting this one."""

    kept: NotRequired[bool]
    """Whether it is kept on disk. `descriptors` is 0 as long as this supervisor has not opened it."""

    mib: int
    """Guest memory in MiB."""

    name: str
    """Its name."""

    network: NotRequired[Link | None]
    """Whether packets passed at that instant, and so pass for its children. Null without a
    network, or for a checkpoint of a snapshot.
    """

    pause_us: float
    """Length of the VM's pause, in microseconds."""

    snapshot: NotRequired[str | None]
    """The snapshot that it was opened from."""

    vm: NotRequired[str | None]
    """The VM that it was taken of."""


class CheckpointRequest(TypedDict):
    """A request for a checkpoint."""

    detach: NotRequired[bool]
    """Whether its memory and disks are copied, so that no process of a VM can write what children
    start from. The answer comes once the copies are made.
    """

    full: NotRequired[bool]
    """Whether it is written in full with `keep`: the processes of its children then read no file
    of an earlier checkpoint, in which the guest's earlier memory is.
    """

    keep: NotRequired[bool]
    """Whether it is kept on disk, so that later supervisors have it too. The answer comes once it
    is durable.
    """

    name: NotRequired[str | None]
    """Its name; the VM's and a number if not given."""


class ConsoleTyped(TypedDict):
    """The input that a console has taken."""

    taken: int
    """Bytes taken, from the first on. The console had no room for the others yet."""


class CopyStats(TypedDict):
    """Pages copied since the VM was made, by cause; see `clade_memory::CowCounts`."""

    adopt: int
    """Copied when the VM was started, for want of mappings."""

    ahead: NotRequired[int]
    """Copied ahead of a write that was likely, when it was woken."""

    freeze: int
    """Copied into layers by forks and snapshots, because they were written."""

    freeze_ahead: int
    """Copied into layers because devices had them lately."""

    freeze_pinned: int
    """Copied into layers because they were pinned."""

    guest: int
    """Written by the guest."""

    pin: int
    """Copied for a pin."""


class DiskInfo(TypedDict):
    """A disk and its errors on the host."""

    direct: NotRequired[bool]
    """Whether reads and writes bypass the host's page cache."""

    lost: bool
    """Whether a write was lost; no later write is made durable then."""

    no_room: int
    """Writes that failed for lack of room on the host."""

    path: str
    """Its image."""


class EgressInfo(TypedDict):
    """An egress rule."""

    packets: int
    """Packets decided by the rule."""

    rule: str
    """The rule."""


class FlightEvent(TypedDict):
    """An event in the life of a VM."""

    at: float
    """Time, in seconds since 1970."""

    event: str
    """Description of the event."""


class StopReasonRequested(TypedDict):
    """Its owner stopped it."""

    kind: Literal["requested"]


class StopReasonTimeOver(TypedDict):
    """The time that its owner gave it is over."""

    kind: Literal["time_over"]


class StopReasonSessionEnded(TypedDict):
    """The command of its session has ended."""

    kind: Literal["session_ended"]


class StopReasonProcess(TypedDict):
    """Its process has ended without reporting a reason: it was killed, or it panicked."""

    code: NotRequired[int | None]
    """Its exit code, if there was no signal."""

    kind: Literal["process"]

    signal: NotRequired[int | None]
    """The signal that ended it."""


class StopReasonOverLimit(TypedDict):
    """Its process took more memory than its limit, and was killed."""

    kind: Literal["over_limit"]

    mib: int
    """The limit in MiB."""


class StopReasonReset(TypedDict):
    """The guest reset itself through the keyboard controller."""

    kind: Literal["reset"]


class StopReasonPowerOff(TypedDict):
    """The guest powered itself off, by ACPI."""

    kind: Literal["power_off"]


class StopReasonExited(TypedDict):
    """The guest ended itself after its main program had ended, and reported that."""

    kind: Literal["exited"]

    status: int
    """The exit status: 128 and the signal's number after a signal."""

    text: str
    """The guest's text about it."""


class StopReasonShutdown(TypedDict):
    """The guest shut down, or took a triple fault."""

    kind: Literal["shutdown"]

    vcpu: int
    """The vCPU's index."""


class StopReasonEmulation(TypedDict):
    """KVM could not emulate an instruction."""

    bytes: str
    """The instruction's bytes in hexadecimal, as far as KVM fetched them."""

    kind: Literal["emulation"]

    rip: int
    """The instruction's guest-virtual address."""

    vcpu: int
    """The vCPU's index."""


class StopReasonInternal(TypedDict):
    """KVM reported an internal error of another kind."""

    error: str
    """The error in words."""

    kind: Literal["internal"]

    vcpu: int
    """The vCPU's index."""


class StopReasonFailEntry(TypedDict):
    """The hardware refused to enter the guest."""

    kind: Literal["fail_entry"]

    reason: int
    """The hardware's reason, as KVM reports it."""

    vcpu: int
    """The vCPU's index."""


class StopReasonUnexpected(TypedDict):
    """KVM_RUN returned an exit that Clade does not handle."""

    exit: str
    """The exit, as `kvm-ioctls` shows it."""

    kind: Literal["unexpected"]

    vcpu: int
    """The vCPU's index."""


class StopReasonRun(TypedDict):
    """KVM_RUN itself failed."""

    error: str
    """The ioctl's error."""

    kind: Literal["run"]

    vcpu: int
    """The vCPU's index."""


class StopReasonStart(TypedDict):
    """The vCPU could not load its state."""

    error: str
    """The error in words."""

    kind: Literal["start"]

    vcpu: int
    """The vCPU's index."""


class StopReasonMemoryLost(TypedDict):
    """Memory shared with its parent was lost while it was still being copied."""

    error: str
    """The error in words."""

    kind: Literal["memory_lost"]


class StopReasonPanic(TypedDict):
    """The thread of a vCPU panicked."""

    kind: Literal["panic"]

    message: NotRequired[str]
    """The panic's message. Empty in records written before this field existed."""

    vcpu: int
    """The vCPU's index."""


StopReason = StopReasonRequested | StopReasonTimeOver | StopReasonSessionEnded | StopReasonProcess | StopReasonOverLimit | StopReasonReset | StopReasonPowerOff | StopReasonExited | StopReasonShutdown | StopReasonEmulation | StopReasonInternal | StopReasonFailEntry | StopReasonUnexpected | StopReasonRun | StopReasonStart | StopReasonMemoryLost | StopReasonPanic


class EndedVm(TypedDict):
    """A VM that ended by itself."""

    age_s: float
    """Its age at the end, in seconds."""

    console: str
    """The last output on its console."""

    ended_at: int
    """When it ended, in seconds since 1970."""

    flight: NotRequired[list[FlightEvent]]
    """The last events of its process's flight record, the oldest first."""

    generation: int
    """Forks between it and the VM that was booted."""

    name: str
    """Its name."""

    parent: NotRequired[str | None]
    """The name of its parent, if it had one."""

    pid: int
    """The pid of its process."""

    reason: str
    """The reason in words."""

    stopped: StopReason
    """The reason why it ended."""


class ErasedInfo(TypedDict):
    """Places at which a child's memory was erased."""

    parts: int
    """Places with a part of a secret: its beginning at the end of a page, or its end at the start
    of one.
    """

    whole: int
    """Places with a whole secret."""


class NetInfo(TypedDict):
    """A network device and its traffic."""

    blocked_received: NotRequired[int]
    """Packets to the guest that were dropped because its network is closed."""

    blocked_sent: NotRequired[int]
    """Packets of the guest that were dropped because its network is closed."""

    dropped: int
    """Packets that the interface or the driver did not accept."""

    egress: NotRequired[list[list[EgressInfo]]]
    """Egress rules: layers of rules, each of which a packet has to pass."""

    egress_dropped: NotRequired[int]
    """Packets of the guest that its egress rules have dropped."""

    egress_inherited: NotRequired[int]
    """Number of these layers, from the first on, that are its parent's."""

    mac: str
    """The guest's MAC address."""

    network: NotRequired[Link]
    """Whether packets pass."""

    received_bytes: int
    """Bytes received by the guest."""

    sent_bytes: int
    """Bytes sent by the guest."""

    tap: str
    """The interface on the host. Empty if the network is passt's."""


class VsockInfo(TypedDict):
    """A socket device."""

    cid: int
    """The guest's CID."""

    socket: str
    """The socket that programs on the host connect to."""


class IdentityInfo(TypedDict):
    """A child's own interfaces, addresses and sockets."""

    nets: list[NetInfo]
    """Its network devices."""

    vsock: NotRequired[VsockInfo | None]
    """Its socket device."""


class ForkAnswer(TypedDict):
    """The result of a fork."""

    children: list[str]
    """The children's names."""

    copied_pages: int
    """Pages copied."""

    erased: NotRequired[ErasedInfo | None]
    """Counts of secrets erased in each child's memory, if it was made without secrets."""

    freeze_us: float
    """The part of the pause that froze memory, in microseconds."""

    identities: NotRequired[list[IdentityInfo]]
    """Their own interfaces, addresses and sockets, in the same order; empty if they have no such
    devices.
    """

    network: NotRequired[Link | None]
    """Whether packets passed for the parent or the checkpoint, and so pass for the children unless
    the request had another state. Null without a network, or for a checkpoint of a snapshot.
    """

    pause_us: float
    """Length of the parent's pause, in microseconds."""

    remapped_pages: int
    """Pages that became shared without being copied."""

    total_us: float
    """The whole request, until the last child was started (several that are to be ready: made), in
    microseconds.
    """


class NetChoice(TypedDict):
    """Chosen values for a child's network device. Defaults: another interface of the parent's
    pattern, and a random address.
    """

    mac: NotRequired[str | None]
    """The MAC address: unicast."""

    tap: NotRequired[str | None]
    """The TAP interface's name; `%d` stands for a free number."""


class VsockChoice(TypedDict):
    """Chosen values for a child's socket device. Defaults: the next free CID, and `NAME.vsock`
    beside the parent's socket.
    """

    cid: NotRequired[int | None]
    """The CID."""

    socket: NotRequired[str | None]
    """The socket's path; `{name}` stands for the child's name."""


class ForkRequest(TypedDict):
    """A request to fork a VM."""

    ahead_mib: NotRequired[int | None]
    """MiB of memory that each child may have copies of before it writes there: the pages that most
    ended children of the checkpoint have written. 0 for none; the supervisor's setting if not
    given. All children of a request have 256 MiB together at most. Refused for the fork of a
    VM, which does not learn.
    """

    count: NotRequired[int]
    """The number of children; 1 if not given."""

    detach: NotRequired[bool]
    """Whether the children start from copies of what the VM's process can write, so that a guest
    which breaks into that process later cannot change their memory or disks. The VM runs on
    meanwhile. Refused for the fork of a checkpoint, which may be detached itself, and for a
    restore.
    """

    egress: NotRequired[list[EgressRule]]
    """Egress rules of the children: a layer in addition to their parent's rules, which also apply."""

    labels: NotRequired[dict[str, str] | None]
    """Their labels; the parent's if not given."""

    name: NotRequired[str | None]
    """Their names, `{n}` standing for a number; the parent's name and a number if not given."""

    nets: NotRequired[list[NetChoice]]
    """The choices for their network devices, in order."""

    network: NotRequired[Link | None]
    """Whether packets pass between their network devices and the host; as the parent's if not
    given. When closed, no packet passes in either direction, from the first instruction on.
    """

    overcommit: NotRequired[bool]
    """Whether to make them though the host has too little memory or too few processors for so
    many: without this, a fork is refused that takes more than the available memory, or that
    brings the VMs to more than 500 for each processor (children that are to stay paused do not
    count).
    """

    paused: NotRequired[bool]
    """Whether they start paused."""

    ready: NotRequired[bool]
    """Whether the agent in each guest renews its identity first. The answer comes when all are
    ready; if one fails, no VM stays. Several start paused, and run a few at a time. Not for VMs
    that are to stay paused.
    """

    vsock: NotRequired[VsockChoice | None]
    """The choices for their socket device."""

    without_secrets: NotRequired[bool]
    """Whether the secrets that the parent was made with are erased in their memory before their
    first instruction. Refused for a parent whose secrets are not known.
    """


GuestState = Literal["booting", "ready"]


class HistogramInfo(TypedDict):
    """A histogram of durations."""

    buckets: list[tuple[int, int]]
    """Upper bounds in microseconds, and the number of durations up to each bound and above the one
    before.
    """

    count: int
    """The number of durations."""

    sum_us: int
    """Their sum, in microseconds."""


class KeepRequest(TypedDict):
    """A request to keep a checkpoint."""

    full: NotRequired[bool]
    """Whether it is written in full, as with `full` of a request for a checkpoint."""


LayerHome = Literal["memory", "disk", "snapshot", "foreign"]


class LayerInfo(TypedDict):
    """A layer that provides pages of a VM."""

    alone: NotRequired[bool | None]
    """Whether no other VM, checkpoint or image uses it; null if that is unknown."""

    file: str
    """Its file, the same for all processes: device and inode."""

    home: LayerHome
    """The place of its bytes."""

    id: int
    """Its number within the VM's process."""

    resident_kib: NotRequired[int | None]
    """Memory behind its file, in KiB; null if the file cannot be queried."""

    shown_pages: int
    """Pages of the VM that it provides now."""


class LoginRequest(TypedDict):
    """A request for a session."""

    token: str
    """The token."""


class LogsAnswer(TypedDict):
    """The last output on a VM's console."""

    console: str
    """The output as text, at most 32 KiB."""

    flight: NotRequired[list[FlightEvent]]
    """The last events of the VM's flight record, the oldest first."""


class MemoryInfo(TypedDict):
    """A VM's pages by kind; see `clade_memory::RamStats`."""

    exclusive_pages: int
    """The VM's own pages."""

    mib: int
    """Guest memory in MiB."""

    pinned_pages: int
    """Exclusive pages that are pinned for DMA."""

    private_kib: int
    """Memory that is freed with the VM, in KiB."""

    reference_pages: int
    """Pages in no layer, or showing a reference page."""

    shared_kib: NotRequired[int]
    """Memory of the shared pages, in KiB: other VMs and checkpoints may use it too."""

    shared_pages: int
    """Pages provided by a layer."""


class MemoryStats(TypedDict):
    """A VM's memory."""

    alone_pages: int
    """Shared pages of layers without another user."""

    backing: NotRequired[str]
    """Page size of its memory files: `huge`, or `4k`."""

    layers: list[LayerInfo]
    """The layers that provide its pages."""

    mappings: int
    """Memory mappings in use."""

    pages: KindCounts
    """Its pages by kind."""

    private_kib: int
    """Memory that is freed with the VM, in KiB."""

    table_kib: int
    """The table of owned pages, in KiB."""

    unknown_pages: int
    """Shared pages of layers whose users are unknown."""


class MemoryWritten(TypedDict):
    """A write to a guest's memory."""

    address: int
    """Guest-physical address of the first byte."""

    length: int
    """Number of bytes written."""


class MergingVm(TypedDict):
    """An ended VM whose process has yet to merge the writes since a fork into its disks."""

    failed: NotRequired[bool]
    """Whether the process has ended, and the writes are not in the disk. The newest 16 such VMs
    are listed.
    """

    name: str
    """Its name."""

    session: NotRequired[str | None]
    """Its session's name, if it had one."""

    waits: bool
    """Whether the process waits for a VM or a checkpoint that uses a disk."""


class NetworkRequest(TypedDict):
    """A request to change a VM's network. Absent fields change nothing."""

    egress: NotRequired[list[EgressRule] | None]
    """Egress rules, which replace all existing ones; an empty list removes them."""

    keep: NotRequired[int]
    """Number of layers of rules that stay, from the first on. `egress` replaces the layers behind
    them.
    """

    network: NotRequired[Link | None]
    """Whether packets pass."""


RestoreLoad = Literal["lazy", "preload", "working_set"]


class SavedSource(TypedDict):
    """A snapshot, and how it is loaded."""

    dir: str
    """Its directory. Absolute, because this process may have another working directory than the
    client.
    """

    load: NotRequired[RestoreLoad]
    """The way to load memory."""

    overlays: NotRequired[str | None]
    """The directory of the disks' overlays; beside the snapshot if not given."""

    parents: NotRequired[list[str]]
    """Directories beneath which the snapshot may have parents. Without any, the parents must be in
    the directory that holds the snapshot.
    """


class OpenRequest(TypedDict):
    """A request to hold a snapshot as a checkpoint."""

    name: NotRequired[str | None]
    """Its name; the directory's and a number if not given."""

    saved: SavedSource
    """The snapshot."""


RunKind = Literal["absent", "reference", "shared", "exclusive", "pinned"]


class RunInfo(TypedDict):
    """Pages of one kind."""

    count: int
    """The number of pages."""

    first: int
    """The first guest frame number."""

    kind: RunKind
    """Their kind."""

    layer: NotRequired[int | None]
    """The number of their layer, if they are of one."""


class PagesAnswer(TypedDict):
    """The pages of a VM by kind."""

    cells: NotRequired[list[CellInfo]]
    """Equal parts, ascending."""

    layers: list[LayerInfo]
    """The layers that provide its pages."""

    next: NotRequired[int | None]
    """The first frame of the next request, if there are more."""

    runs: NotRequired[list[RunInfo]]
    """Runs, ascending. They leave out frames without memory, such as the gap below 4 GiB."""

    totals: KindCounts
    """All of its pages by kind."""


class PauseStats(TypedDict):
    """The pauses of a VM, by cause."""

    fork: HistogramInfo
    """Forks and checkpoints."""

    reset: HistogramInfo
    """Resets."""

    snapshot: HistogramInfo
    """Snapshots."""


class PinStats(TypedDict):
    """Pins of a VM's pages for DMA."""

    locked: int
    """Pins so far that had to take a lock. Other pins are not counted."""

    long: int
    """Long-term pins, now."""

    long_total: int
    """Long-term pins so far."""

    longest_s: float
    """The longest time that a pin is or was held, in seconds."""

    now: int
    """Pins over all pages, now."""

    reading: int
    """Shared pages that devices are reading, which takes no pin."""


class PrepareRequest(TypedDict):
    """A request to prepare workers for children of a checkpoint."""

    count: int
    """Number of workers to have ready."""


class Prepared(TypedDict):
    """Prepared workers."""

    prepared: int
    """Their number."""


class Problem(TypedDict):
    """The body of an error answer."""

    detail: str
    """This error in words, with its causes."""

    status: int
    """The HTTP status."""

    title: str
    """Its kind in words."""

    type: Literal["urn:clade:bad-request", "urn:clade:bad-name", "urn:clade:bad-count", "urn:clade:bad-path", "urn:clade:bad-address", "urn:clade:bad-config", "urn:clade:unauthorized", "urn:clade:bad-host", "urn:clade:foreign-origin", "urn:clade:forbidden", "urn:clade:no-such-path", "urn:clade:no-such-vm", "urn:clade:no-such-checkpoint", "urn:clade:method-not-allowed", "urn:clade:late-body", "urn:clade:name-taken", "urn:clade:identity-taken", "urn:clade:wrong-state", "urn:clade:not-ready", "urn:clade:no-device", "urn:clade:snapshot-conflict", "urn:clade:cancelled", "urn:clade:ending", "urn:clade:vm-gone", "urn:clade:body-too-large", "urn:clade:media-type", "urn:clade:key-reused", "urn:clade:too-many-logins", "urn:clade:internal", "urn:clade:no-thread", "urn:clade:too-many", "urn:clade:vm-silent", "urn:clade:no-room"]
    """The URN of its kind."""


class ProcessStats(TypedDict):
    """The kernel's counts for a process with one VM, in KiB."""

    anonymous_kib: int
    """Resident anonymous memory (`RssAnon`): the guest's private copies, and the process's own."""

    memory_files_kib: int
    """Resident memory of memory files (`RssShmem`): the mapped part of the layers."""

    page_tables_kib: int
    """Page tables (`VmPTE`)."""

    proportional_kib: int
    """The process's share of its mapped memory, each page divided by its users (`Pss`)."""


class ReadyAnswer(TypedDict):
    """A guest that has renewed its identity."""

    generation: int
    """Number of notifications of its agent that the VM is a new one."""

    hooks: list[str]
    """The hooks that the agent has run, in their order."""


VmState = Literal["running", "paused", "suspended", "stopped"]


class VmInfo(TypedDict):
    """A VM in a list."""

    age_s: float
    """Seconds since it was made."""

    cpus: int
    """vCPUs."""

    disks: NotRequired[list[DiskInfo]]
    """Its disks."""

    generation: int
    """Forks between it and the VM that was booted."""

    guest: NotRequired[GuestState | None]
    """The state of a guest that reports it: of one that is booted with `reports_ready`, or has
    reported that it is ready.
    """

    labels: NotRequired[dict[str, str]]
    """Its labels."""

    memory: NotRequired[MemoryInfo | None]
    """Its memory, if the kernel could be queried."""

    name: str
    """Its name."""

    nets: NotRequired[list[NetInfo]]
    """Its network devices."""

    parent: NotRequired[str | None]
    """The name of its parent, if it has one."""

    paused: NotRequired[bool]
    """Whether its owner has paused it. A suspended VM may be paused as well."""

    pid: int
    """The pid of its process."""

    secrets: NotRequired[list[str]]
    """Names of the secrets that its children may be made without."""

    state: VmState
    """Its state."""

    stopped: NotRequired[StopReason | None]
    """The reason why it stopped, if it has."""

    vsock: NotRequired[VsockInfo | None]
    """Its socket device."""


class ResetAnswer(TypedDict):
    """The result of a reset."""

    dropped_pages: int
    """The VM's own pages that were dropped: another page is shown in their place."""

    memory_us: float
    """The time to restore memory, in microseconds."""

    remapped_pages: int
    """Pages mapped anew."""

    restored_pages: NotRequired[int]
    """The VM's own pages that were kept, with the image's bytes."""

    total_us: float
    """From the request to the vCPUs until their release, in microseconds."""

    vm: VmInfo
    """The VM after the reset. `memory` is null: counting pages takes longer than the reset."""


class ResetRequest(TypedDict):
    """A request to reset a VM."""

    ready: NotRequired[bool]
    """Whether the agent in the guest then renews its identity: its clock, random numbers, tokens
    and hooks. Answers when the guest is ready. If it is not, the answer is `not-ready`, and the
    VM has been reset all the same.
    """


class RestoreRequest(TypedDict):
    """A request to start VMs from a snapshot."""

    saved: SavedSource
    """The snapshot."""

    session: NotRequired[str | None]
    """The session that they belong to, as of a VM that is booted."""

    vms: NotRequired[ForkRequest]
    """The VMs. A single one without a name is called as the snapshot's directory."""


class RollbackRequest(TypedDict):
    """A request to roll a VM back."""

    checkpoint: str
    """The name of a checkpoint in memory, of the VM itself or of one of its ancestors."""

    ready: NotRequired[bool]
    """Whether the agent in the guest then renews its identity: its clock, random numbers, tokens
    and hooks. Answers when the guest is ready. If it is not, the answer is `not-ready`, and the
    VM has been rolled back all the same.
    """


class SessionEnded(TypedDict):
    """The end of a session."""

    ended: bool
    """Always true."""


class SessionInfo(TypedDict):
    """A session of the page."""

    expires_s: int
    """Seconds until it ends."""

    key: NotRequired[str | None]
    """The value of `Clade-Session-Key` in each request, beside the cookie; in the answer to a
    login.
    """


class ShutdownInfo(TypedDict):
    """A guest's response to its power button."""

    by_itself: bool
    """Whether the guest ended by itself. Otherwise its power was cut when the time was over."""

    noticed: bool
    """Whether the guest's kernel noticed the button."""


class SnapshotAnswer(TypedDict):
    """The result of a snapshot."""

    base_elsewhere: NotRequired[bool]
    """Whether the base or one of its parents is in another directory than the snapshot, so that a
    restore has to allow that directory (`parents`).
    """

    base_untold: NotRequired[bool]
    """Whether the base is read-only, and so has no note of this dependent."""

    data_bytes: int
    """Bytes of the files."""

    data_pages: int
    """Pages of memory and disks written."""

    dir: str
    """Its directory."""

    id: str
    """Its id."""

    pause_us: float
    """Length of the VM's pause, in microseconds."""

    total_us: float
    """The whole request, until everything was on the disk, in microseconds."""

    zero_pages: int
    """Pages of zeros."""


class SnapshotProgress(TypedDict):
    """The progress of a VM's snapshot."""

    done: int
    """Bytes done."""

    running: bool
    """Whether a snapshot is being written."""

    total: int
    """Bytes to do, at most."""


class SnapshotRequest(TypedDict):
    """A request to save a VM."""

    dir: str
    """Its directory. Absolute, because this process may have another working directory than the
    client.
    """

    incremental: NotRequired[bool]
    """Whether to save only what changed since the VM was last saved, or restored."""

    replace: NotRequired[bool]
    """Whether an existing snapshot is replaced although others depend on it."""

    zstd: NotRequired[bool]
    """Whether its files are compressed (zstd), and so cannot be mapped."""


class StopAnswer(VmInfo):
    """A VM that has stopped."""

    killed: NotRequired[bool]
    """Whether its process did not answer, and was killed: writes that were not on its disks are
    lost.
    """

    shutdown: NotRequired[ShutdownInfo | None]
    """The guest's response to the power button, if it was pressed."""


class StopRequest(TypedDict):
    """A request to stop a VM. Without a body its power is cut."""

    at_once: NotRequired[bool]
    """Whether to kill the VM's process instead of asking it, if no disk of the VM is written: a
    busy host stops many VMs sooner. The checkpoint learns nothing from such a child. Without
    effect with `graceful_s`.
    """

    graceful_s: NotRequired[float | None]
    """Seconds that the guest has to power itself off after its power button was pressed. Its power
    is cut when they are over. Null: it is cut at once.
    """


class SupervisorInfo(TypedDict):
    """The supervisor in numbers."""

    checkpoints: int
    """Checkpoints."""

    dir: str
    """The runtime directory."""

    kept: NotRequired[int]
    """Those of them that are kept on disk."""

    merging: NotRequired[list[MergingVm]]
    """Ended VMs whose processes have yet to merge the writes since a fork into their disks."""

    pid: int
    """Its pid."""

    prepared: int
    """Prepared workers."""

    until_idle: NotRequired[bool]
    """Whether the supervisor ends when it has no VM, and no checkpoint that is not kept."""

    version: str
    """Its version."""

    vms: int
    """VMs whose processes it has started."""


class SupervisorKept(TypedDict):
    """The supervisor, which does not end within two seconds."""

    pid: int
    """Its pid."""


class SuspendAfterInfo(TypedDict):
    """The time after which a VM is suspended."""

    seconds: NotRequired[float | None]
    """Idle time in seconds until it is suspended; null for never."""


class SuspendAfterRequest(TypedDict):
    """A request to suspend a VM whenever it has done nothing for a time."""

    dir: NotRequired[str | None]
    """The directory, as for a request to suspend it at once."""

    seconds: float
    """Seconds for which its process takes next to no processor time."""


class SuspendAnswer(TypedDict):
    """A VM that was suspended."""

    halt_us: float
    """Microseconds until vCPUs and devices stood still."""

    kept_pages: int
    """Its own pages that its children do not inherit: they stay in memory."""

    name: str
    """Its name."""

    total_us: float
    """Microseconds in all."""

    was_suspended: bool
    """Whether it was already suspended. Then the request did nothing."""

    write_us: float
    """Microseconds to write the file and give memory back."""

    written_pages: int
    """Pages written to the file."""

    zero_pages: int
    """Zero pages among its own pages, which are not written."""


class SuspendRequest(TypedDict):
    """A request to suspend a VM."""

    dir: NotRequired[str | None]
    """The directory on a disk in which a file without a name is made for its memory; `/var/tmp` if
    not given.
    """


class TouchedRun(TypedDict):
    """A run of pages that a VM has touched."""

    count: int
    """The number of pages."""

    first: int
    """The first page."""


class TouchedAnswer(TypedDict):
    """Pages that a VM has touched."""

    runs: list[TouchedRun]
    """Runs of pages, ascending, counted over all of memory."""


class TtlInfo(TypedDict):
    """The time that a VM has to live."""

    seconds_left: NotRequired[float | None]
    """Seconds until it is stopped; null if it has no time to live."""


class TtlRequest(TypedDict):
    """A request to stop a VM after a time, in place of the time that it had."""

    seconds: float
    """Seconds from now on."""


class VmStats(TypedDict):
    """A VM in numbers."""

    age_s: float
    """Seconds since it was made."""

    copies: CopyStats
    """Pages copied so far."""

    disks: NotRequired[list[DiskInfo]]
    """Its disks."""

    generation: int
    """Forks between it and the VM that was booted."""

    memory: MemoryStats
    """Its memory."""

    name: str
    """Its name."""

    nets: NotRequired[list[NetInfo]]
    """Its network devices."""

    parent: NotRequired[str | None]
    """The name of its parent, if it has one."""

    pauses: PauseStats
    """Its pauses."""

    pid: int
    """The pid of its process."""

    pins: PinStats
    """Its pins."""

    process: NotRequired[ProcessStats | None]
    """Its process, if that has no other VM."""

    state: VmState
    """Its state."""


class WakeAnswer(VmInfo):
    """A VM that was woken."""

    total_us: float
    """Microseconds until it could run."""

    was_suspended: bool
    """Whether it was suspended."""

    working_set_pages: int
    """Pages read ahead: those touched between its previous wake and its suspension."""


class WorkingSetAnswer(TypedDict):
    """A recorded working set."""

    pages: int
    """Pages in it."""
