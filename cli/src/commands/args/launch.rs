//! The arguments of commands that make VMs: boots and forks.

#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments are help texts, in which brackets mean options")]

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::commands::devices::{parse_net_choice, parse_vsock, parse_vsock_choice};
use crate::commands::disk::parse_disk;
use crate::commands::exec::parse_env_or_own;
use crate::commands::image::PullFlags;
use crate::commands::machine::MachineArgs;
use crate::commands::network::NetworkState;
use crate::commands::units::{parse_duration, parse_mib};
use clade_api::Label;
use clade_devices::virtio::net::EgressRule;
use clade_devices::virtio::vsock::VsockOptions;
use clade_vmm::vm::{DiskSpec, NetChoice, VsockChoice};
use clade_worker::jail::Confinement;

/// Settings of an image's program.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ProgramFlags {
    /// With --image: a variable of its program, and of those of clade exec. KEY alone has the value that it has
    /// here. Repeatable.
    #[arg(long, short = 'e', value_name = "KEY[=VALUE]", value_parser = parse_env_or_own, requires = "image")]
    pub(crate) env: Vec<(String, String)>,
    /// With --image: the user of its program, by name or number, instead of the image's.
    #[arg(long, short = 'u', value_name = "USER[:GROUP]", requires = "image")]
    pub(crate) user: Option<String>,
    /// With --image: the directory of its program, and of those of clade exec, instead of the image's.
    #[arg(long, short = 'w', value_name = "DIR", requires = "image")]
    pub(crate) workdir: Option<String>,
    /// With --image: the program to run instead of the image's entrypoint and its arguments.
    #[arg(long, value_name = "PROGRAM", requires = "image")]
    pub(crate) entrypoint: Option<String>,
}

/// The times of VMs that are left to the supervisor.
#[derive(Debug, Args)]
pub(crate) struct TimesArgs {
    /// Stop each VM after a time, such as 90s, 1h30m or 2w. The time also runs while the VM is
    /// paused.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "background")]
    pub(crate) ttl: Option<Duration>,
    /// Suspend each VM whenever it has been idle for a time, such as 90s or 10m: its memory goes to
    /// a disk until its guest is needed.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "background")]
    pub(crate) suspend_after: Option<Duration>,
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
    #[command(flatten)]
    pub(crate) program: ProgramFlags,
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
    #[command(flatten)]
    pub(crate) times: TimesArgs,
    /// Most memory of the VM's process, and of each of its children's: whole MiB, such as 96M or 1G.
    /// Needs a supervisor with control groups.
    #[arg(long, value_name = "SIZE", value_parser = parse_mib, requires = "background")]
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
    /// With -d: return when the guest's agent answers, and exit with 1 if it does not within a time (5m).
    /// With --image the command also waits without this option, for 15m, and exits with 0 then.
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
    /// Stop each child after a time, such as 90s, 1h30m or 2w. Children do not inherit their
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
