//! The arguments of all commands.

#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments are help texts, in which brackets mean options")]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use clade_devices::virtio::net::EgressRule;
use clade_devices::virtio::vsock::VsockOptions;

use crate::commands::cp::CpArgs;
use crate::commands::devices::{parse_net_choice, parse_vsock, parse_vsock_choice};
use crate::commands::disk::parse_disk;
use crate::commands::e2b::{E2bArgs, KeyCommand};
use crate::commands::exec::{ExecArgs, ShellArgs};
use crate::commands::generate::{CompletionsArgs, ManArgs};
use crate::commands::image::{ImageCommand, ImageListArgs, PullFlags};
use crate::commands::lifecycle::{LifecycleArgs, RollbackArgs, StopArgs, SuspendArgs};
use crate::commands::machine::MachineArgs;
use crate::commands::memory::MemoryCommand;
use crate::commands::network::{NetworkArgs, NetworkState};
use crate::commands::pages::PagesArgs;
use crate::commands::session::AHEAD_MIB;
use crate::commands::stats::StatsArgs;
use crate::commands::template::TemplateCommand;
use crate::commands::tree::TreeArgs;
use crate::commands::units::{parse_duration, parse_mib, parse_size};
use crate::commands::wait::WaitArgs;
use clade_daemon::jail::Confinement;
use clade_daemon::supervisor::CgroupPlace;
use clade_daemon::vm_host::{Label, LabelError};
use clade_daemon::zygote::ZYGOTE;
use clade_vmm::vm::{DiskSpec, NetChoice, VsockChoice};

/// A small KVM virtual machine monitor that forks running microVMs.
#[derive(Debug, Parser)]
#[command(
    name = "clade",
    version,
    about,
    max_term_width = 100,
    after_help = "Environment variables: clade help environment"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest, fork it while it runs, check every byte.
    Demo(DemoArgs),
    /// Boot a kernel with its console on this terminal (Ctrl-A x leaves).
    Run(Box<RunArgs>),
    /// A guest to run: the embedded one, or a Linux that is built once.
    Guest(GuestArgs),
    /// List the running VMs.
    #[command(visible_alias = "list")]
    Ps(PsArgs),
    /// Show the memory of VMs in numbers: owners of pages, copies, pins, pauses.
    Stats(StatsArgs),
    /// Draw the pages of a VM by kind: its own, of a layer, pinned.
    Pages(PagesArgs),
    /// Read or write a guest's memory by its physical addresses.
    #[command(subcommand)]
    Memory(MemoryCommand),
    /// Draw the tree of VMs and their descendants, with the memory of each.
    Tree(TreeArgs),
    /// Show a VM's last console output and the reason of its end, or its flight record.
    Logs(LogsArgs),
    /// Fork a running VM.
    Fork(ForkArgs),
    /// Reset forked VMs in place to the instant of their fork.
    Reset(LifecycleArgs),
    /// Roll a VM back in place to a checkpoint of its own, or of a VM that it was forked from.
    Rollback(RollbackArgs),
    /// Have the agents in VMs renew their identity: clock, random numbers, tokens, hooks. For use
    /// after a restore or a reset; `clade fork --ready` does it for children.
    #[command(alias = "ready")]
    Reidentify(LifecycleArgs),
    /// Show a VM's balloon, or ask its guest to give up memory.
    Balloon(BalloonArgs),
    /// Open or close a VM's network, or set its egress rules.
    Network(NetworkArgs),
    /// Attach to a VM's console (Ctrl-A x leaves; the VM runs on).
    Console(ConsoleArgs),
    /// Run a program in a VM's guest, through its agent.
    Exec(ExecArgs),
    /// Open a shell in a VM's guest, through its agent.
    Shell(ShellArgs),
    /// Copy files and directories from and to a VM's guest, through its agent.
    Cp(CpArgs),
    /// Pause VMs.
    Pause(LifecycleArgs),
    /// Let paused VMs run.
    Resume(LifecycleArgs),
    /// Give VMs' memory back until their guests are needed: it goes to a disk.
    Suspend(SuspendArgs),
    /// Wake VMs that are suspended.
    Wake(LifecycleArgs),
    /// Stop VMs for good: by a power cut, or after their guests had time to power off.
    #[command(visible_alias = "kill")]
    Stop(StopArgs),
    /// Wait until VMs have ended, and show the reasons.
    Wait(WaitArgs),
    /// Save a running VM to a directory, or inspect a snapshot.
    Snapshot(SnapshotArgs),
    /// Start VMs from a snapshot.
    Restore(RestoreArgs),
    /// Show, apply or discard the journal that a VM has left beside a disk's image.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// OCI images: fetch, list, inspect and remove the images for VMs.
    #[command(subcommand)]
    Image(ImageCommand),
    /// List the images: clade image ls.
    #[command(hide = true)]
    Images(ImageListArgs),
    /// Templates: images that are set up, with their programs running. Sandboxes are forks of them.
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Keys of E2B's API: make, list and revoke them.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Supervise the VMs of the runtime directory: a process for each VM, forks from checkpoints.
    Serve(ServeArgs),
    /// Hold a VM's state at one instant, to fork from. It outlives the VM, not the supervisor.
    Checkpoint(CheckpointArgs),
    /// List the checkpoints.
    Checkpoints(CheckpointsArgs),
    /// Keep a checkpoint on disk, so that it outlives the supervisor. Returns once it is durable.
    Keep(KeepArgs),
    /// Print the events of VMs and checkpoints as they happen.
    Events(EventsArgs),
    /// Remove checkpoints. Children that were forked from them run on.
    Rm(LifecycleArgs),
    /// Print a shell's completions of commands and options.
    Completions(CompletionsArgs),
    /// Write a man page for each command.
    Man(ManArgs),
    /// Print the API as an OpenAPI document. No VM and no clade serve is needed.
    Openapi,
    /// Fork workers for the process that started this one, with a socket on standard input.
    #[command(hide = true, name = ZYGOTE)]
    Zygote(ZygoteArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Most processes prepared for forks of one configuration ahead of requests. The supervisor
    /// keeps as many as the last forks took.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) pool: usize,
    /// MiB of memory that a child of a checkpoint may have copies of before it writes there: the
    /// pages that most earlier children have written. 0 for none.
    #[arg(long, value_name = "MIB", default_value_t = AHEAD_MIB)]
    pub(crate) ahead: u32,
    /// Confine the processes of VMs: as far as the host can (auto), wholly or not at all (require),
    /// or leave them free (off).
    #[arg(long, value_name = "auto|require|off", default_value_t = Confinement::Auto)]
    pub(crate) confine: Confinement,
    /// Place of the VMs' control groups (v2): below this process's own if that is delegated to it
    /// (auto), in a directory, or nowhere (off).
    #[arg(long, value_name = "auto|off|DIR", default_value = "auto")]
    pub(crate) cgroup: CgroupPlace,
    /// A program that connects each interface of a VM to the host's network. The program runs
    /// before the VM does, and after its end.
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) net_hook: Option<PathBuf>,
    /// Show the running supervisor: its pid, directory and VMs. Exit code 1 if none runs.
    #[arg(long, exclusive = true)]
    pub(crate) status: bool,
    /// End the running supervisor. Its VMs run on, and the next supervisor finds them; checkpoints
    /// end with it.
    #[arg(long, exclusive = true)]
    pub(crate) stop: bool,
    /// End when there is no VM, and no checkpoint that is not kept on disk. clade run without -d
    /// starts such a supervisor if none runs.
    #[arg(long)]
    pub(crate) until_idle: bool,
    /// Serve the API also at this loopback address. Port 0 is a free one.
    #[arg(long, value_name = "ADDR", requires = "token_file")]
    pub(crate) tcp: Option<std::net::SocketAddr>,
    /// The file of the token that clients of that address show. Made if it is missing.
    #[arg(long, value_name = "FILE", requires = "tcp")]
    pub(crate) token_file: Option<std::path::PathBuf>,
    #[command(flatten)]
    pub(crate) e2b: E2bArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ZygoteArgs {
    #[arg(long, default_value_t = Confinement::Auto)]
    pub(crate) confine: Confinement,
    #[arg(long)]
    pub(crate) huge_text: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Print each event as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// The VM's name.
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// The checkpoint's name. Default: the VM's and a number.
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Keep the checkpoint on disk, so that it outlives the supervisor and the host's restart. The
    /// command returns once it is durable. The file has the guest's memory, with its secrets.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Copy the checkpoint's memory and disks, so that no process of a VM can write what its children
    /// start from, not even one that a guest has broken into. The VM runs on meanwhile.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Prepare as many processes for its children.
    #[arg(long, value_name = "N")]
    pub(crate) prepare: Option<usize>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct KeepArgs {
    /// The checkpoint's name.
    pub(crate) name: String,
    /// Print JSON instead of nothing.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointsArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Show the contents of the journal beside an image, and whether it can be used. Changes
    /// nothing.
    Show(DiskImageArgs),
    /// Write the journal into its image, even if the image has changed since or is another.
    Apply(DiskImageArgs),
    /// Discard the journal: the image stays as it is.
    Discard(DiskImageArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DiskImageArgs {
    /// The image.
    pub(crate) image: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The columns of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    /// Name, state, parent, memory, age.
    #[default]
    Short,
    /// All columns.
    Wide,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Also list VMs that ended by themselves, with the reason.
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Only VMs with a label: label=KEY=VALUE. Repeatable: then with all of them.
    #[arg(long, value_name = "label=KEY=VALUE", value_parser = parse_filter)]
    pub(crate) filter: Vec<Label>,
    /// The columns to show.
    #[arg(long, short, value_name = "FORMAT", default_value = "short")]
    pub(crate) output: ListFormat,
    /// How long to wait for the VMs' processes, such as 10s. Default: 800ms for a table, which shows the
    /// others as "no answer", and 15s for each VM with --json.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) wait: Option<Duration>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// The VM's name.
    pub(crate) name: String,
    /// Its virtio console (hvc0) instead of its serial one.
    #[arg(long = "virtio")]
    pub(crate) is_virtio: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BalloonArgs {
    /// The VM's name.
    pub(crate) name: String,
    /// Memory that the guest should give up in total, such as 64M. The guest does so when it can.
    #[arg(long, value_name = "SIZE", value_parser = parse_mib)]
    pub(crate) target: Option<u64>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ActArgs {
    /// The VM's name.
    pub(crate) name: String,
    /// Print JSON instead of a line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The VM's name.
    pub(crate) name: String,
    /// Show the flight record instead: the last events of the VM.
    #[arg(long)]
    pub(crate) flight: bool,
    /// Print JSON: both.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The kernel: an ELF vmlinux, or a distribution's vmlinuz. `bare` is the embedded bare guest.
    /// Default with --image: that of clade guest linux.
    #[arg(long, value_name = "FILE", required_unless_present = "image")]
    pub(crate) kernel: Option<PathBuf>,
    /// An OCI image to run, by its name for clade image pull. A missing image is pulled. Its disk
    /// is the root, the agent is PID 1, and the image's program is started.
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["initrd", "cmdline"])]
    pub(crate) image: Option<String>,
    /// With --image: the modules of --kernel, its directory below /lib/modules. Those that the
    /// guest needs for its disk and its agent are loaded first.
    #[arg(long, value_name = "DIR", requires = "image", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) pull: PullFlags,
    /// With --image and -d: boot the image, even if there is a checkpoint of a VM with the same
    /// arguments.
    #[arg(long, requires = "image", requires = "background")]
    pub(crate) fresh: bool,
    /// The command to run, instead of the image's cmd.
    #[arg(value_name = "COMMAND", last = true, requires = "image")]
    pub(crate) command: Vec<String>,
    /// The initramfs.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line; the addresses of its devices are added. Default: console=ttyS0
    /// reboot=k panic=-1 tsc=reliable, and the needs of this host's KVM.
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// Text to append to the default command line of the kernel. Repeatable.
    #[arg(long, value_name = "TEXT", conflicts_with = "cmdline")]
    pub(crate) append: Vec<String>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// The VM's name. Default: clade-PID.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// A label to tell VMs apart by: key=value. Repeatable. Children inherit it.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<Label>,
    /// Stop the VM after a time, such as 90s, 10m or 1h30m. The time also runs while the VM is
    /// paused.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "background")]
    pub(crate) ttl: Option<Duration>,
    /// Suspend the VM whenever it has been idle for a time, such as 90s or 10m: its memory goes to
    /// a disk until its guest is needed.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "background")]
    pub(crate) suspend_after: Option<Duration>,
    /// Most memory of the VM's process, and of each of its children's: bytes, or with K, M, G, T.
    /// Needs a supervisor with control groups.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "background")]
    pub(crate) memory_limit: Option<u64>,
    /// Most processors for the VM's process, and for each of its children's, such as 0.5.
    #[arg(long, value_name = "N", requires = "background")]
    pub(crate) cpu_limit: Option<f64>,
    /// A file with a secret that children may be made without (clade fork --without-secrets): 16 to
    /// 4,096 bytes, without line ends behind them. This does not give it to the guest. Repeatable.
    #[arg(long, value_name = "FILE")]
    pub(crate) secret: Vec<PathBuf>,
    /// The same with a variable of this command's environment. Repeatable.
    #[arg(long, value_name = "NAME")]
    pub(crate) secret_env: Vec<String>,
    /// A disk: PATH, then options with commas between: ro or ephemeral, id=TEXT, cache=host|direct,
    /// overlays=DIR, queues=N, bytes=RATE, bytes-burst=N, ops=RATE, ops-burst=N. Repeatable; the
    /// guest finds disks in this order. Writes to an ephemeral disk are lost with the VM; several
    /// VMs may use its image.
    #[arg(long, value_name = "PATH,...", value_parser = parse_disk)]
    pub(crate) disk: Vec<DiskSpec>,
    /// A socket device: socket=PATH, and cid=N for a guest that needs a certain CID. The host connects
    /// to PATH and sends CONNECT PORT; the guest's connections go to listeners at PATH_PORT.
    #[arg(long, value_name = "socket=PATH,cid=N", value_parser = parse_vsock)]
    pub(crate) vsock: Option<VsockOptions>,
    /// Leave the VM to the supervisor, which is started if none runs, and return once the VM runs.
    #[arg(long = "detach", alias = "background", short = 'd', conflicts_with = "detached")]
    pub(crate) background: bool,
    /// With -d: return when the guest's agent answers, within a time (5m). The default with
    /// --image.
    #[arg(
        long,
        value_name = "TIME",
        value_parser = parse_duration,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "5m",
        requires = "background"
    )]
    pub(crate) wait: Option<Duration>,
    /// Run in the foreground without reading the terminal; the console is on its socket.
    #[arg(long = "no-terminal", alias = "detached")]
    pub(crate) detached: bool,
    /// Confine the VM's process, if the command starts the supervisor: as far as the host can
    /// (auto), wholly or not at all (require), or leave it free (off).
    #[arg(long, value_name = "auto|require|off", default_value_t = Confinement::Auto)]
    pub(crate) confine: Confinement,
}

/// The minimal command line of a Linux guest on a serial console.
pub(crate) const DEFAULT_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 tsc=reliable";

/// The devices and the start of a forked or restored VM.
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// For its network devices, in order: [tap=NAME][,mac=ADDRESS]. Default: the original's name
    /// with another number, and a random address.
    #[arg(long, value_name = "tap=NAME,...", value_parser = parse_net_choice)]
    pub(crate) net: Vec<NetChoice>,
    /// Whether packets pass between its network devices and the host. Default: as with the
    /// original.
    #[arg(long, value_enum)]
    pub(crate) network: Option<NetworkState>,
    /// An egress rule, in the form of clade run. Adds to the original's rules, and permits nothing
    /// that those drop. Repeatable.
    #[arg(long, value_name = "RULE")]
    pub(crate) egress: Vec<EgressRule>,
    /// For its socket device: [cid=N][,socket=PATH]; {name} in the path is the VM's name. Default:
    /// the next free CID, and NAME.vsock beside the original's socket.
    #[arg(long, value_name = "cid=N,socket=PATH", value_parser = parse_vsock_choice)]
    pub(crate) vsock: Option<VsockChoice>,
    /// Start it paused.
    #[arg(long)]
    pub(crate) paused: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// The name of a VM, or of a checkpoint.
    pub(crate) name: String,
    /// Number of children.
    #[arg(long, default_value_t = 1)]
    pub(crate) count: usize,
    // clap takes {n} in a help text for a line break, unless there is something inside it.
    #[arg(
        long = "name",
        value_name = "PATTERN",
        help = "The children's names; {\u{1b}[0mn} stands for a number. NAME-{\u{1b}[0mn} if not given"
    )]
    pub(crate) pattern: Option<String>,
    /// Stop each child after a time, such as 90s, 10m or 1h30m. Children do not inherit their
    /// parent's.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) ttl: Option<Duration>,
    /// Suspend each child whenever it has been idle for a time, such as 90s or 10m: its memory goes
    /// to a disk until its guest is needed.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) suspend_after: Option<Duration>,
    /// Have the agent in each child renew its identity: its clock, random numbers, tokens and
    /// hooks. Returns when all are ready; if one fails, no child stays.
    #[arg(long, conflicts_with = "paused")]
    pub(crate) ready: bool,
    /// Erase the secrets that the VM was made with in each child's memory, before its first
    /// instruction.
    #[arg(long)]
    pub(crate) without_secrets: bool,
    /// Start the children from copies of what the VM's process can write of its memory and disks, so
    /// that a guest which breaks into that process later cannot change them. Of a VM only.
    #[arg(long)]
    pub(crate) detach: bool,
    /// MiB of memory that each child of a checkpoint may have copies of before it writes there. 0
    /// for none. Default: the supervisor's setting.
    #[arg(long, value_name = "MIB")]
    pub(crate) ahead: Option<u32>,
    /// Make the children though the host has too little memory, or more than 500 VMs for each processor.
    #[arg(long)]
    pub(crate) overcommit: bool,
    /// A label of the children: key=value. Repeatable. Default: the labels of their parent.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<Label>,
    #[command(flatten)]
    pub(crate) child: CloneArgs,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    pub(crate) command: Option<SnapshotCommand>,
    #[command(flatten)]
    pub(crate) save: Option<SaveArgs>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Verify all checksums of a snapshot and of those it depends on.
    Verify(SnapshotDirArgs),
    /// Describe a snapshot.
    Show(SnapshotDirArgs),
    /// Merge a snapshot with those it depends on, so that it needs no other.
    Compact(SnapshotDirArgs),
    /// Record which pages a restored VM has touched, for `restore --working-set`.
    WorkingSet(ActArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotDirArgs {
    /// The snapshot's directory.
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) parents: ParentsArgs,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ParentsArgs {
    /// A directory beneath which the snapshot may have parents, besides the one that holds it.
    /// Repeatable. All snapshots there may be read by the VM.
    #[arg(long = "parents", value_name = "DIR")]
    pub(crate) dirs: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// The VM's name.
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// The snapshot's directory. An existing snapshot is replaced when the new one is complete,
    /// unless others depend on it.
    pub(crate) dir: PathBuf,
    /// Save only the changes since the VM was last saved, or restored. The new snapshot depends on
    /// that one.
    #[arg(long)]
    pub(crate) incremental: bool,
    /// Compress (zstd). A restore decompresses the data first instead of mapping it.
    #[arg(long)]
    pub(crate) zstd: bool,
    /// Replace a snapshot although others depend on it. They cannot be restored then.
    #[arg(long)]
    pub(crate) replace: bool,
    /// Print JSON instead of a line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The snapshot's directory.
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) parents: ParentsArgs,
    /// Number of VMs.
    #[arg(long, default_value_t = 1)]
    pub(crate) count: usize,
    #[arg(
        long = "name",
        value_name = "PATTERN",
        help = "Their names; {\u{1b}[0mn} stands for a number. The directory's name, and a number if there are several, if not given"
    )]
    pub(crate) pattern: Option<String>,
    /// Read all of the memory now, into huge pages, and verify its checksums.
    #[arg(long, conflicts_with = "working_set")]
    pub(crate) preload: bool,
    /// Read ahead the recorded working set (clade snapshot working-set).
    #[arg(long)]
    pub(crate) working_set: bool,
    /// Directory of the disks' overlays. Default: beside the snapshot.
    #[arg(long, value_name = "DIR")]
    pub(crate) overlays: Option<PathBuf>,
    /// Have the agent in each guest renew its identity. Returns when all are ready; if one fails,
    /// no VM stays.
    #[arg(long, conflicts_with = "paused")]
    pub(crate) ready: bool,
    /// Make the VMs though the host has too little memory, or more than 500 VMs for each processor.
    #[arg(long)]
    pub(crate) overcommit: bool,
    #[command(flatten)]
    pub(crate) child: CloneArgs,
    /// Leave the VMs to the supervisor, which is started if none runs, and return once they run.
    #[arg(long = "detach", alias = "background", short = 'd', conflicts_with = "detached")]
    pub(crate) background: bool,
    /// Run in the foreground without reading the terminal; consoles are on their sockets. Several
    /// VMs never read it.
    #[arg(long = "no-terminal", alias = "detached")]
    pub(crate) detached: bool,
    /// Confine the VMs' processes, if the command starts the supervisor: as far as the host can
    /// (auto), wholly or not at all (require), or leave them free (off).
    #[arg(long, value_name = "auto|require|off", default_value_t = Confinement::Auto)]
    pub(crate) confine: Confinement,
}

#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    /// `bare` is embedded, and written to a file. `linux` is built from Debian's packages if it is
    /// missing; its arguments for `clade run` are printed: clade run $(clade guest linux).
    #[arg(value_name = "bare|linux")]
    pub(crate) guest: String,
    /// The file that `bare` is written to; `-` is standard output. Default: bare.elf.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Print the paths of `linux` as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// Guest memory: bytes, or with K, M, G, T.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(crate) mem: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) cpus: u64,
    /// Forks of the running guest.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) forks: usize,
    /// Generations to nest.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) generations: usize,
    /// Build the Linux guest if it is missing. If there is one, it is forked too.
    #[arg(long)]
    pub(crate) linux: bool,
    /// Leave the Linux guest out even if there is one.
    #[arg(long, conflicts_with = "linux")]
    pub(crate) no_linux: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_filter(text: &str) -> Result<Label, String> {
    let label =
        text.strip_prefix("label=").ok_or_else(|| format!("{text:?} is not a filter such as label=tier=web"))?;
    label.parse().map_err(|error: LabelError| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
