//! The arguments of all commands.

#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments are help texts, in which brackets mean options")]

mod launch;
mod snapshot;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands::cp::CpArgs;
use crate::commands::e2b::{E2bArgs, KeyCommand};
use crate::commands::exec::{ExecArgs, ShellArgs};
use crate::commands::generate::{CompletionsArgs, ManArgs};
use crate::commands::image::{ImageCommand, ImageListArgs};
use crate::commands::lifecycle::{LifecycleArgs, ResetArgs, RollbackArgs, StopArgs, SuspendArgs};
use crate::commands::memory::MemoryCommand;
use crate::commands::network::NetworkArgs;
use crate::commands::pages::PagesArgs;
use crate::commands::session::AHEAD_MIB;
use crate::commands::stats::StatsArgs;
use crate::commands::template::TemplateCommand;
use crate::commands::times::TimeArgs;
use crate::commands::tree::TreeArgs;
use crate::commands::units::{parse_duration, parse_mib, parse_size};
use crate::commands::wait::WaitArgs;
use clade_api::{Label, LabelError};
use clade_supervisor::CgroupPlace;
use clade_worker::jail::Confinement;
use clade_worker::zygote::ZYGOTE;

pub(crate) use launch::{DEFAULT_CMDLINE, ForkArgs, ProgramFlags, RunArgs, TimesArgs};
pub(crate) use snapshot::{ParentsArgs, RestoreArgs, SaveArgs, SnapshotArgs, SnapshotCommand, SnapshotDirArgs};

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
    /// Fork a VM, or start children of a checkpoint.
    Fork(ForkArgs),
    /// Reset forked VMs in place to the instant of their fork.
    Reset(ResetArgs),
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
    /// Show or change the time after which a VM is stopped.
    Ttl(TimeArgs),
    /// Show or change the idle time after which a VM is suspended.
    SuspendAfter(TimeArgs),
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
    /// OCI images: fetch, build, list, inspect and remove the images for VMs.
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
    /// Hold a VM's state at one instant, to fork from. It outlives the VM, and with `--keep` the supervisor.
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
    /// Show the running supervisor: its pid, directory and VMs. Exit code 2 if none runs.
    #[arg(long, exclusive = true)]
    pub(crate) status: bool,
    /// End the running supervisor. Its VMs run on, and the next supervisor finds them; checkpoints
    /// that are not kept on a disk end with it.
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
    /// With --keep: write all of the checkpoint, and not what changed since an earlier kept one. The
    /// processes of its children then read no file with the guest's earlier memory.
    #[arg(long, requires = "keep")]
    pub(crate) full: bool,
    /// Prepare as many processes for its children. If that fails, the checkpoint stays.
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
    /// Write all of the checkpoint, and not what changed since an earlier kept one.
    #[arg(long)]
    pub(crate) full: bool,
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
    /// Print further output as the guest writes it, until the VM ends.
    #[arg(long, short, conflicts_with_all = ["flight", "json"])]
    pub(crate) follow: bool,
    /// Show the flight record instead: the last events of the VM.
    #[arg(long)]
    pub(crate) flight: bool,
    /// Print JSON: both.
    #[arg(long)]
    pub(crate) json: bool,
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

    #[test]
    fn a_limit_of_memory_is_whole_mib_and_is_refused_by_its_value_otherwise() {
        let run = |limit| Cli::try_parse_from(["clade", "run", "-d", "--kernel", "bare", "--memory-limit", limit]);
        for (limit, mib) in [("96M", 96), ("0.5G", 512), ("32768K", 32)] {
            let parsed = run(limit).unwrap().command;
            assert!(matches!(parsed, Command::Run(args) if args.memory_limit == Some(mib)), "{limit}");
        }
        for limit in ["33.5M", "512K", "64"] {
            let build = Cli::try_parse_from(["clade", "template", "build", ".", "--memory-limit", limit]);
            for refused in [run(limit).err(), build.err()] {
                let refused = refused.unwrap().to_string();
                assert!(refused.contains(&format!("{limit:?} is not a number of whole MiB")), "{refused}");
            }
        }
    }
}
