"""Generated from the daemon's OpenAPI document by `python/generate.py`: do not edit."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class AheadInfo(TypedDict):
    """What was learned from the children of a checkpoint that have ended."""

    children: int
    """Children that have ended and said what they had written."""

    copied: int
    """Pages that those children had copies of ahead."""

    hits: int
    """Of these, written: a fault less each."""

    pages: int
    """Pages that the next child is likely to write, whatever its budget."""

    waste: int
    """Of these, never written: memory and time for nothing."""


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
    """A token bucket."""

    burst: NotRequired[int | None]
    """The bucket's size in tokens. Default: what one second adds."""

    once: int
    """Tokens on top of that at the beginning."""

    per_second: int
    """Tokens added per second."""


class Limits(TypedDict):
    """The limits of a device. An absent limit is none."""

    bytes: NotRequired[Rate | None]
    """Limit in bytes."""

    operations: NotRequired[Rate | None]
    """Limit in operations."""


class BlockOptions(TypedDict):
    """A block device."""

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
    """Whether writes end with the VM."""

    id: NotRequired[str | None]
    """The id that the guest reads. Default: the last component of `path`."""

    latency: NotRequired[Time | None]
    """A delay added to every transfer, for tests."""

    overlays: NotRequired[str | None]
    """The directory of overlays. Default: the image's."""

    path: str
    """A raw image or a block device."""

    read_only: bool
    """Whether the guest may only read it."""


class DiskSpec(TypedDict):
    """A disk and its virtio block device."""

    device: BlockOptions

    disk: DiskConfig


Irqchip = Literal["full", "split"]


EgressRule = str


class PortForward(TypedDict):
    """A TCP port of the host's loopback address that leads to one of the guest's."""

    guest: int
    """The guest's."""

    host: int
    """The host's."""


class UserNet(TypedDict):
    """A network by passt, which needs no privileges: the guest is 10.0.2.15/24, its gateway
    10.0.2.2, its name server 10.0.2.3.
    """

    forward: list[PortForward]
    """TCP ports of the host's loopback address that lead to the guest. Children have none."""


class NetSpec(TypedDict):
    """A network device."""

    egress: list[list[EgressRule]]
    """Where the guest may send: layers of rules, each of which a packet has to pass."""

    mac: NotRequired[str | None]
    """The MAC address; a random one if not given."""

    queues: int
    """Pairs of queues."""

    receive: Limits
    """Limits on received traffic."""

    send: Limits
    """Limits on sent traffic."""

    tap: str
    """The TAP interface to open or create; `%d` stands for a free number. Empty for `user`."""

    user: NotRequired[UserNet | None]
    """A network by passt instead of an interface."""


class VsockOptions(TypedDict):
    """A socket device."""

    cid: int
    """The guest's CID."""

    socket: str
    """The Unix socket to which programs on the host connect."""


class VmConfig(TypedDict):
    """The configuration of a VM."""

    acpi: bool
    """Whether the guest gets ACPI tables."""

    balloon: bool
    """Whether there is a balloon."""

    cpu: CpuTemplate
    """The CPU model that the guest sees."""

    cpus: int
    """vCPUs."""

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
    """Whether there is a PIT."""

    pmu: NotRequired[bool]
    """Whether the guest has performance counters."""

    report_port: NotRequired[bool]
    """Without meaning."""

    rng: NotRequired[Limits | None]
    """The limits of the entropy device, if there is one."""

    virtio_console: bool
    """Whether there is a virtio console beside the serial one."""

    vsock: NotRequired[VsockOptions | None]
    """The socket device, if there is one."""


class VmLimits(TypedDict):
    """What a VM's process may take of the host. It needs control groups."""

    cpus: NotRequired[float | None]
    """Processors, also parts of one."""

    memory_mib: NotRequired[int | None]
    """Memory in MiB: the guest's RAM, what forks of it still show, and the process itself."""


class Secret(TypedDict):
    """Bytes that are not for everybody, and what they are called."""

    name: str
    """What it is called in answers and errors."""

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
    """The kernel's file, or the name of one that the program has."""

    labels: NotRequired[dict[str, str]]
    """Its labels."""

    limits: NotRequired[VmLimits]
    """What its process may take of the host, and those of its children."""

    name: str
    """Its name."""

    paused: NotRequired[bool]
    """Whether it starts paused."""

    secrets: NotRequired[list[Secret]]
    """Bytes that children may be made without: 16 of them, 16 KiB in all. They are given to no
    guest by this.
    """

    session: NotRequired[str | None]
    """The session that it belongs to, with all that descend from it: whoever has begun the session
    stops them at its end.
    """


class KindCounts(TypedDict):
    """Guest pages by what they are. Each is exactly one of these."""

    absent: int
    """Not inherited: there is no memory."""

    exclusive: int
    """The VM's own, without the pinned ones."""

    pinned: int
    """The VM's own, and pinned for DMA."""

    reference: int
    """Zeros or a pattern, which cost nothing."""

    shared: int
    """Of a layer."""


class CellInfo(KindCounts):
    """One of equal parts of a VM's memory."""

    first: int
    """Its first guest frame number."""

    layer: NotRequired[int | None]
    """The number of the layer that most of its shared pages are of."""


class ForkedInfo(TypedDict):
    """What a checkpoint cost the VM that it was taken of."""

    copied_pages: int
    """Pages copied."""

    freeze_us: float
    """The part of the pause that froze memory, in microseconds."""

    in_flight: int
    """Requests of devices in flight at that instant."""

    park_us: float
    """The part of the pause until vCPUs and devices stood still, in microseconds."""

    remapped_pages: int
    """Pages that became shared without being copied."""


class CheckpointInfo(TypedDict):
    """A checkpoint: a VM at one instant, to fork from."""

    age_s: float
    """Seconds since it was taken."""

    ahead: NotRequired[AheadInfo]
    """What its children have written, which the next ones have copies of before they write it."""

    cpus: int
    """vCPUs."""

    descriptors: int
    """Descriptors that it holds: layers of memory and of disks, and its state."""

    forked: NotRequired[ForkedInfo | None]
    """What else it cost the VM; null if it was opened from a snapshot."""

    generation: int
    """Forks between it and the VM that was booted, counting this one."""

    mib: int
    """Guest memory in MiB."""

    name: str
    """Its name."""

    network: NotRequired[Link | None]
    """Whether packets passed at that instant, as they do between a child and the host. Null without a
    network, or for a checkpoint of a snapshot."""

    pause_us: float
    """How long the VM was paused, in microseconds."""

    snapshot: NotRequired[str | None]
    """The snapshot that it was opened from."""

    vm: NotRequired[str | None]
    """The VM that it was taken of."""


class CheckpointRequest(TypedDict):
    """A request for a checkpoint."""

    name: NotRequired[str | None]
    """Its name; the VM's and a number if not given."""


class ConsoleTyped(TypedDict):
    """What a console took of what was typed."""

    taken: int
    """Bytes from the first on. For the others it had no room yet."""


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
    """Whether it is read and written past the host's page cache."""

    lost: bool
    """Whether a write was lost; nothing more is made durable then."""

    no_room: int
    """Writes that failed because there was no room for them on the host."""

    path: str
    """Its image."""


class EgressInfo(TypedDict):
    """An egress rule."""

    packets: int
    """Packets that it has decided."""

    rule: str
    """The rule."""


class FlightEvent(TypedDict):
    """Something that happened to a VM."""

    at: float
    """When, in seconds since 1970."""

    event: str
    """What."""


class StopReasonRequested(TypedDict):
    """Its owner stopped it."""

    kind: Literal["requested"]


class StopReasonProcess(TypedDict):
    """Its process has ended without a word."""

    code: NotRequired[int | None]

    kind: Literal["process"]

    signal: NotRequired[int | None]


class StopReasonOverLimit(TypedDict):
    """Its process took more memory than its limit, and was killed."""

    kind: Literal["over_limit"]

    mib: int


class StopReasonReset(TypedDict):
    """The guest reset itself."""

    kind: Literal["reset"]


class StopReasonPowerOff(TypedDict):
    """The guest powered itself off."""

    kind: Literal["power_off"]


class StopReasonShutdown(TypedDict):
    """The guest shut down, or took a triple fault."""

    kind: Literal["shutdown"]

    vcpu: int


class StopReasonEmulation(TypedDict):
    """KVM could not emulate an instruction."""

    bytes: str

    kind: Literal["emulation"]

    rip: int

    vcpu: int


class StopReasonInternal(TypedDict):
    """KVM reported an internal error of another kind."""

    error: str

    kind: Literal["internal"]

    vcpu: int


class StopReasonFailEntry(TypedDict):
    """The hardware refused to enter the guest."""

    kind: Literal["fail_entry"]

    reason: int

    vcpu: int


class StopReasonUnexpected(TypedDict):
    """KVM_RUN returned an exit that is not handled."""

    exit: str

    kind: Literal["unexpected"]

    vcpu: int


class StopReasonRun(TypedDict):
    """KVM_RUN itself failed."""

    error: str

    kind: Literal["run"]

    vcpu: int


class StopReasonStart(TypedDict):
    """The vCPU could not load its state."""

    error: str

    kind: Literal["start"]

    vcpu: int


class StopReasonMemoryLost(TypedDict):
    """Memory it shares with its parent was lost while it was still being copied."""

    error: str

    kind: Literal["memory_lost"]


class StopReasonPanic(TypedDict):
    """The thread of a vCPU panicked."""

    kind: Literal["panic"]

    message: str

    vcpu: int


StopReason = StopReasonRequested | StopReasonProcess | StopReasonOverLimit | StopReasonReset | StopReasonPowerOff | StopReasonShutdown | StopReasonEmulation | StopReasonInternal | StopReasonFailEntry | StopReasonUnexpected | StopReasonRun | StopReasonStart | StopReasonMemoryLost | StopReasonPanic


class EndedVm(TypedDict):
    """A VM that ended by itself."""

    age_s: float
    """Its age at the end, in seconds."""

    console: str
    """The last output on its console."""

    ended_at: int
    """When it ended, in seconds since 1970."""

    flight: NotRequired[list[FlightEvent]]
    """The last that happened to it, the oldest first, as its process has noted it."""

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
    """Why it ended."""


class ErasedInfo(TypedDict):
    """Places at which a child's memory was erased."""

    parts: int
    """Parts of one: a beginning at the end of a page, or an end at the start of one."""

    whole: int
    """Where a secret was as a whole."""


Link = Literal["open", "closed"]


class NetInfo(TypedDict):
    """A network device and its traffic."""

    blocked_received: NotRequired[int]
    """Packets to the guest that were dropped because its network is closed."""

    blocked_sent: NotRequired[int]
    """Packets of the guest that were dropped because its network is closed."""

    dropped: int
    """Packets that the interface or the driver did not accept."""

    egress: NotRequired[list[list[EgressInfo]]]
    """Where the guest may send: layers of rules, each of which a packet has to pass."""

    egress_dropped: NotRequired[int]
    """Packets of the guest that its egress rules have dropped."""

    egress_inherited: NotRequired[int]
    """How many of these layers, from the first on, are its parent's."""

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
    """What was erased in each child's memory, if it was made without secrets."""

    freeze_us: float
    """The part of the pause that froze memory, in microseconds."""

    identities: NotRequired[list[IdentityInfo]]
    """Their own interfaces, addresses and sockets, in the same order; empty if they have no such
    devices.
    """

    pause_us: float
    """How long the parent was paused, in microseconds."""

    remapped_pages: int
    """Pages that became shared without being copied."""

    total_us: float
    """The whole request, until the last child was started, in microseconds."""


class NetChoice(TypedDict):
    """Chosen values for a child's network device."""

    mac: NotRequired[str | None]
    """The MAC address: unicast."""

    tap: NotRequired[str | None]
    """The TAP interface's name; `%d` stands for a free number."""


class VsockChoice(TypedDict):
    """Chosen values for a child's socket device."""

    cid: NotRequired[int | None]
    """The CID."""

    socket: NotRequired[str | None]
    """The socket's path; `{name}` stands for the child's name."""


class ForkRequest(TypedDict):
    """A request to fork a VM."""

    ahead_mib: NotRequired[int | None]
    """MiB of memory that each child may have copies of before it writes there: what most children
    of the checkpoint have written that have ended. 0 for none; the supervisor's setting if not
    given. All children of a request have 256 MiB together at most. Refused for the fork of a
    VM, of which nothing is learned.
    """

    count: NotRequired[int]
    """The number of children; 1 if not given."""

    egress: NotRequired[list[EgressRule]]
    """Where they may send, within what their parent may: a layer of rules in addition to its own."""

    labels: NotRequired[dict[str, str] | None]
    """Their labels; the parent's if not given."""

    name: NotRequired[str | None]
    """Their names, `{n}` standing for a number; the parent's name and a number if not given."""

    nets: NotRequired[list[NetChoice]]
    """The choices for their network devices, in order."""

    network: NotRequired[Link | None]
    """Whether packets pass between their network devices and the host; as the parent's if not
    given. When closed, none ever has in either direction, from the first instruction on.
    """

    paused: NotRequired[bool]
    """Whether they start paused."""

    ready: NotRequired[bool]
    """Whether the agent in each guest is told that its VM is another. The answer comes when all
    are ready; if one is not, there are none. Not for VMs that start paused.
    """

    vsock: NotRequired[VsockChoice | None]
    """The choices for their socket device."""

    without_secrets: NotRequired[bool]
    """Whether the secrets that the parent was made with are erased in their memory before their
    first instruction. Refused for a parent whose secrets are not known.
    """


class HistogramInfo(TypedDict):
    """A histogram of durations."""

    buckets: list[tuple[int, int]]
    """Upper bounds in microseconds, and how many are up to each and above the one before."""

    count: int
    """How many."""

    sum_us: int
    """All together, in microseconds."""


LayerHome = Literal["memory", "disk", "snapshot", "foreign"]


class LayerInfo(TypedDict):
    """A layer that a VM is shown."""

    alone: NotRequired[bool | None]
    """Whether no other VM, checkpoint or image has it; null if that is not known."""

    file: str
    """Its file, the same for all processes: device and inode."""

    home: LayerHome
    """Where its bytes are."""

    id: int
    """Its number within the VM's process."""

    resident_kib: NotRequired[int | None]
    """Memory behind its file, in KiB; null if the file cannot be asked."""

    shown_pages: int
    """Pages of the VM that are shown from it now."""


class LoginRequest(TypedDict):
    """A request for a session."""

    token: str
    """The token."""


class LogsAnswer(TypedDict):
    """The last output on a VM's console."""

    console: str
    """At most 32 KiB, as text."""

    flight: NotRequired[list[FlightEvent]]
    """The last that happened to the VM, the oldest first."""


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

    shared_pages: int
    """Pages provided by a layer."""


class MemoryStats(TypedDict):
    """A VM's memory."""

    alone_pages: int
    """Shared pages of layers that no other VM has."""

    backing: NotRequired[str]
    """What its memory files are in: `huge` pages, or those of `4k`."""

    layers: list[LayerInfo]
    """The layers that it is shown."""

    mappings: int
    """Memory mappings that it takes."""

    pages: KindCounts
    """Its pages by kind."""

    private_kib: int
    """Memory that is freed with the VM, in KiB."""

    table_kib: int
    """The table of owned pages, in KiB."""

    unknown_pages: int
    """Shared pages of layers of which that is not known."""


class MemoryWritten(TypedDict):
    """What was written to a guest's memory."""

    address: int
    """Guest-physical address of the first byte."""

    length: int
    """How many bytes."""


class NetworkRequest(TypedDict):
    """A request to change a VM's network. What is not given stays as it is."""

    egress: NotRequired[list[EgressRule] | None]
    """Where the guest may send. It takes the place of all rules there are; an empty list removes
    them.
    """

    keep: NotRequired[int]
    """How many layers of rules stay, from the first on. `egress` takes the place of those behind
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
    """How memory is loaded."""

    overlays: NotRequired[str | None]
    """The directory of the disks' overlays; beside the snapshot if not given."""


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
    """How many."""

    first: int
    """The first guest frame number."""

    kind: RunKind
    """What they are."""

    layer: NotRequired[int | None]
    """The number of the layer, if they are of one."""


class PagesAnswer(TypedDict):
    """What the pages of a VM are."""

    cells: NotRequired[list[CellInfo]]
    """Equal parts, ascending."""

    layers: list[LayerInfo]
    """The layers that it is shown."""

    next: NotRequired[int | None]
    """Where the next request goes on, if there are more."""

    runs: NotRequired[list[RunInfo]]
    """Runs, ascending. Pages of no memory, such as the gap below 4 GiB, are in none."""

    totals: KindCounts
    """All of its pages by kind."""


class PauseStats(TypedDict):
    """How long a VM was paused, by cause."""

    fork: HistogramInfo
    """Forks and checkpoints."""

    reset: HistogramInfo
    """Resets."""

    snapshot: HistogramInfo
    """Snapshots."""


class PinStats(TypedDict):
    """Pins of a VM's pages for DMA."""

    locked: int
    """Pins so far that had to take a lock. The others are not counted."""

    long: int
    """Long-term pins, now."""

    long_total: int
    """Long-term pins so far."""

    longest_s: float
    """The longest that one was or has been held, in seconds."""

    now: int
    """Pins over all pages, now."""

    reading: int
    """Shared pages that devices read now, which takes no pin."""


class PrepareRequest(TypedDict):
    """A request to prepare workers for children of a checkpoint."""

    count: int
    """How many are to be ready."""


class Prepared(TypedDict):
    """Workers that are ready."""

    prepared: int
    """How many there are."""


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
    """What the kernel says of a process with one VM, in KiB."""

    anonymous_kib: int
    """Resident anonymous memory (`RssAnon`): the guest's private copies, and the process's own."""

    memory_files_kib: int
    """Resident memory of memory files (`RssShmem`): what of the layers is mapped."""

    page_tables_kib: int
    """Page tables (`VmPTE`)."""

    proportional_kib: int
    """The process's share of what it maps, each page divided by its users (`Pss`)."""


class ReadyAnswer(TypedDict):
    """A guest that has been told that its VM is another, and is ready."""

    generation: int
    """How often its agent was told so."""

    hooks: list[str]
    """The hooks that it has run, in their order."""


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

    pid: int
    """The pid of its process."""

    secrets: NotRequired[list[str]]
    """Names of the secrets that its children may be made without."""

    state: VmState
    """Its state."""

    stopped: NotRequired[StopReason | None]
    """Why it stopped, if it has."""

    vsock: NotRequired[VsockInfo | None]
    """Its socket device."""


class ResetAnswer(TypedDict):
    """The result of a reset."""

    dropped_pages: int
    """Pages that were written since the image, and dropped."""

    memory_us: float
    """The time to restore memory, in microseconds."""

    remapped_pages: int
    """Pages mapped anew."""

    total_us: float
    """From the request to the vCPUs until they were released, in microseconds."""

    vm: VmInfo
    """The VM after the reset."""


class RestoreRequest(TypedDict):
    """A request to start VMs from a snapshot."""

    saved: SavedSource
    """The snapshot."""

    session: NotRequired[str | None]
    """The session that they belong to."""

    vms: NotRequired[ForkRequest]
    """The VMs. A single one without a name is called as the snapshot's directory."""


class SessionEnded(TypedDict):
    """The end of a session."""

    ended: bool
    """Always true."""


class SessionInfo(TypedDict):
    """A session of the page."""

    expires_s: int
    """Seconds until it ends."""

    key: NotRequired[str | None]
    """What each request has as `Clade-Session-Key`, beside the cookie; in the answer to a login."""


class ShutdownInfo(TypedDict):
    """How a guest took its power button."""

    by_itself: bool
    """Whether the guest ended by itself. Otherwise its power was cut when the time was over."""

    noticed: bool
    """Whether the guest's kernel noticed the button."""


class SnapshotAnswer(TypedDict):
    """The result of a snapshot."""

    base_untold: NotRequired[bool]
    """Whether the base is read-only, and so has no note of this dependent."""

    data_bytes: int
    """Bytes of the files."""

    data_pages: int
    """Pages of memory and disks that were written."""

    dir: str
    """Its directory."""

    id: str
    """Its id."""

    pause_us: float
    """How long the VM was paused, in microseconds."""

    total_us: float
    """The whole request, until all was on the disk, in microseconds."""

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
    """Whether its process did not answer, and was killed: what was not on its disks is lost."""

    shutdown: NotRequired[ShutdownInfo | None]
    """How its guest took the power button, if that was pressed."""


class StopRequest(TypedDict):
    """A request to stop a VM. Without a body its power is cut."""

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

    pid: int
    """Its pid."""

    prepared: int
    """Workers that are prepared."""

    version: str
    """Its version."""

    vms: int
    """VMs whose processes it has started."""


class SuspendAfterInfo(TypedDict):
    """After which time a VM is suspended."""

    seconds: NotRequired[float | None]
    """Seconds without work; null if it is not."""


class SuspendAfterRequest(TypedDict):
    """A request to suspend a VM whenever it has done nothing for a time."""

    dir: NotRequired[str | None]
    """The directory, as for a request to suspend it at once."""

    seconds: float
    """Seconds for which its process takes next to no processor time."""


class SuspendAnswer(TypedDict):
    """A VM that was suspended."""

    halt_us: float
    """Microseconds until nothing of it moved."""

    kept_pages: int
    """Of its own pages, those that its children do not inherit: they stay in memory."""

    name: str
    """Its name."""

    total_us: float
    """Microseconds in all."""

    was_suspended: bool
    """Whether it was suspended before. Then nothing was done."""

    write_us: float
    """Microseconds to write the file and give memory back."""

    written_pages: int
    """Pages written to the file."""

    zero_pages: int
    """Of its own pages, those that were zeros: written nowhere."""


class SuspendRequest(TypedDict):
    """A request to suspend a VM."""

    dir: NotRequired[str | None]
    """The directory on a disk in which a file without a name is made for its memory; `/var/tmp` if
    not given.
    """


class TouchedRun(TypedDict):
    """A run of pages that a VM has touched."""

    count: int
    """How many."""

    first: int
    """The first."""


class TouchedAnswer(TypedDict):
    """Pages that a VM has touched."""

    runs: list[TouchedRun]
    """Runs of pages, ascending, counted over all of memory."""


class TtlInfo(TypedDict):
    """The time that a VM has to live."""

    seconds_left: NotRequired[float | None]
    """Seconds until it is stopped; null if it is not."""


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
    """Pages that were read ahead: those that it touched between the wake before and its
    suspension.
    """


class WorkingSetAnswer(TypedDict):
    """A recorded working set."""

    pages: int
    """Pages in it."""
