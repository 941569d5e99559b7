//! Arguments, and the units they come in.

#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments are help texts, in which brackets mean options")]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use clade_devices::virtio::vsock::VsockOptions;

use crate::commands::devices::{parse_net, parse_net_choice, parse_vsock, parse_vsock_choice};
use crate::commands::disk::parse_disk;
use crate::commands::units::{parse_mib, parse_size};
use clade_vmm::kvm::{CpuHide, CpuTemplate};
use clade_vmm::vm::{DiskSpec, NetChoice, NetSpec, VsockChoice};

/// A small KVM virtual machine monitor that forks running microVMs.
#[derive(Debug, Parser)]
#[command(name = "clade", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest, fork it while it runs, check every byte.
    Demo(DemoArgs),
    /// Boot a kernel with its console on this terminal (Ctrl-A x leaves).
    Run(RunArgs),
    /// Measure, beside a baseline in the same run.
    Bench(BenchArgs),
    /// Try hard to make something go wrong, and compare every byte.
    Stress(StressArgs),
    /// Look at what of this host matters to vCPUs' state, and try what can be tried.
    Check(CheckArgs),
    /// A guest to run: the embedded one, or a Linux that is built once.
    Guest(GuestArgs),
    /// List the running VMs.
    Ps(PsArgs),
    /// Show the last a VM has written to its console, and why it ended.
    Logs(ActArgs),
    /// Fork a running VM.
    Fork(ForkArgs),
    /// Put a VM that was forked back to the instant of its fork, in place.
    Reset(ActArgs),
    /// Show a VM's balloon, or ask its guest to give up memory.
    Balloon(BalloonArgs),
    /// Attach to a VM's console (Ctrl-A x leaves; the VM runs on).
    Console(ConsoleArgs),
    /// Pause a VM.
    Pause(ActArgs),
    /// Let a paused VM run.
    Resume(ActArgs),
    /// Stop a VM for good.
    Stop(ActArgs),
    /// Save a running VM to a directory, or look at what was saved.
    Snapshot(SnapshotArgs),
    /// Start VMs from a snapshot.
    Restore(RestoreArgs),
    /// Look at the journal that a VM has left beside a disk's image, put it in, or throw it away.
    #[command(subcommand)]
    Disk(DiskCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Say what the journal beside an image holds, and whether it can be used. Nothing is changed.
    Show(DiskImageArgs),
    /// Write the journal into its image although the image has changed since, or is another.
    Apply(DiskImageArgs),
    /// Throw the journal away: the image stays as it is.
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

/// What a list shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    /// Name, state, parent, memory, age.
    #[default]
    Short,
    /// Everything.
    Wide,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Also those that ended by themselves, with the reason.
    #[arg(long, short)]
    pub(crate) all: bool,
    /// Which columns.
    #[arg(long, short, value_name = "FORMAT", default_value = "short")]
    pub(crate) output: ListFormat,
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
    /// Memory the guest is to give up, in all, as in 64M. It does so when it can.
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
pub(crate) struct RunArgs {
    /// The kernel: an ELF vmlinux, or a distribution's vmlinuz. `bare` is the embedded bare guest.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// The initramfs.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line; where its disks are is added. If not given: console=ttyS0
    /// reboot=k panic=-1 tsc=reliable, and what this host's KVM needs.
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,
    /// More for the kernel's command line, behind what it is otherwise. Repeatable.
    #[arg(long, value_name = "TEXT", conflicts_with = "cmdline")]
    pub(crate) append: Vec<String>,
    /// Guest memory: bytes, or with K, M, G, T.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub(crate) mem: u64,
    /// vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u64,
    /// The VM's name; clade-PID if not given.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// What the CPUs look like: host, or the baseline x86-64-v1, x86-64-v2 or x86-64-v3, with which
    /// a snapshot moves between hosts of one vendor.
    #[arg(long, value_name = "TEMPLATE", default_value_t = CpuTemplate::Host)]
    pub(crate) cpu_template: CpuTemplate,
    /// CPU features to hide from the guest, beside those that this host's KVM cannot do.
    #[arg(long, value_name = "FEATURE,...", value_parser = parse_hide)]
    pub(crate) cpu_hide: Option<CpuHide>,
    /// Performance counters, as the host has them. What they count is the host's, and a snapshot
    /// needs a host that has them too.
    #[arg(long)]
    pub(crate) pmu: bool,
    /// A disk:
    /// PATH[,ro|,ephemeral][,id=TEXT][,cache=host|direct][,overlays=DIR][,queues=N][,bytes=RATE[,bytes-burst=N]][,ops=RATE[,ops-burst=N]].
    /// Repeatable; the guest finds them in this order. What is written to an ephemeral one goes
    /// with the VM; several VMs may have its image.
    #[arg(long, value_name = "PATH,...", value_parser = parse_disk)]
    pub(crate) disk: Vec<DiskSpec>,
    /// A network device:
    /// tap=NAME[,mac=ADDRESS][,queues=N][,rx-bytes=RATE[,rx-bytes-burst=N]][,rx-packets=..][,tx-bytes=..][,tx-packets=..].
    /// The TAP interface is opened or made; %d in its name is a number that is free. Repeatable.
    #[arg(long, value_name = "tap=NAME,...", value_parser = parse_net)]
    pub(crate) net: Vec<NetSpec>,
    /// A socket device: cid=N,socket=PATH. The host connects to PATH and says CONNECT PORT; the
    /// guest reaches who listens at PATH_PORT.
    #[arg(long, value_name = "cid=N,socket=PATH", value_parser = parse_vsock)]
    pub(crate) vsock: Option<VsockOptions>,
    /// An entropy device. There is one for every guest but the bare one; this is for that.
    #[arg(long, conflicts_with = "no_rng")]
    pub(crate) rng: bool,
    /// No entropy device.
    #[arg(long)]
    pub(crate) no_rng: bool,
    /// A balloon: memory that the guest gives back, when it has it free or when asked to (clade
    /// balloon).
    #[arg(long)]
    pub(crate) balloon: bool,
    /// A virtio console (hvc0) beside the serial one (clade console --virtio).
    #[arg(long)]
    pub(crate) virtio_console: bool,
    /// No ACPI tables: the guest finds its devices on the command line alone, and has no generation
    /// id by which to learn that it was cloned.
    #[arg(long)]
    pub(crate) no_acpi: bool,
    /// Give the guest a PIT (8254), for kernels that cannot calibrate without one.
    #[arg(long)]
    pub(crate) pit: bool,
    /// Allow more guest memory than the host has.
    #[arg(long)]
    pub(crate) overcommit: bool,
    /// Do not read the terminal; the console is on its socket.
    #[arg(long)]
    pub(crate) detached: bool,
}

/// What a Linux guest on a serial console needs, and no more.
pub(crate) const DEFAULT_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 tsc=reliable";

/// What a VM that goes on from another's instant has of its own, and how it starts.
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// For its network devices, in order: [tap=NAME][,mac=ADDRESS]. If not given: the original's
    /// name with another number, and a random address.
    #[arg(long, value_name = "tap=NAME,...", value_parser = parse_net_choice)]
    pub(crate) net: Vec<NetChoice>,
    /// For its socket device: [cid=N][,socket=PATH]; {name} in the path is the VM's name. If not
    /// given: the next CID that is free, and NAME.vsock beside the original's socket.
    #[arg(long, value_name = "cid=N,socket=PATH", value_parser = parse_vsock_choice)]
    pub(crate) vsock: Option<VsockChoice>,
    /// Leave it paused.
    #[arg(long)]
    pub(crate) paused: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// The parent's name.
    pub(crate) name: String,
    /// Children.
    #[arg(long, default_value_t = 1)]
    pub(crate) count: usize,
    // clap takes {n} in a help text for a line break, unless something stands in it.
    #[arg(
        long = "name",
        value_name = "PATTERN",
        help = "The children's names; {\u{1b}[0mn} stands for a number. NAME-{\u{1b}[0mn} if not given"
    )]
    pub(crate) pattern: Option<String>,
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
    /// Compare all of a snapshot, and of those it depends on, with its checksums.
    Verify(SnapshotDirArgs),
    /// Describe a snapshot.
    Show(SnapshotDirArgs),
    /// Merge a snapshot with those it depends on, so that it depends on none.
    Compact(SnapshotDirArgs),
    /// Record which pages a restored VM has touched, for `restore --working-set`.
    WorkingSet(ActArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SnapshotDirArgs {
    /// The snapshot's directory.
    pub(crate) dir: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// The VM's name.
    #[arg(value_name = "VM")]
    pub(crate) name: String,
    /// The snapshot's directory; a snapshot that is there is replaced when the new one is complete,
    /// unless others depend on it.
    pub(crate) dir: PathBuf,
    /// Save only what changed since the VM was last saved, or restored. The snapshot depends on
    /// that one.
    #[arg(long)]
    pub(crate) incremental: bool,
    /// Compress (zstd). What is restored from it is decompressed first instead of being mapped.
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
    /// VMs.
    #[arg(long, default_value_t = 1)]
    pub(crate) count: usize,
    #[arg(
        long = "name",
        value_name = "PATTERN",
        help = "Their names; {\u{1b}[0mn} stands for a number. The directory's name, and a number if there are several, if not given"
    )]
    pub(crate) pattern: Option<String>,
    /// Read all of the memory now, into huge pages, and compare its checksums.
    #[arg(long, conflicts_with = "working_set")]
    pub(crate) preload: bool,
    /// Read ahead what was recorded to be touched first (clade snapshot working-set).
    #[arg(long)]
    pub(crate) working_set: bool,
    /// Where disks have their overlays. If not given: beside the snapshot.
    #[arg(long, value_name = "DIR")]
    pub(crate) overlays: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) child: CloneArgs,
    /// Do not read the terminal; consoles are on their sockets. So it is for several VMs in any
    /// case.
    #[arg(long)]
    pub(crate) detached: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    /// `bare` is embedded, and written to a file. `linux` is built from Debian's packages if it is
    /// not there yet; what `clade run` needs to boot it is printed: clade run $(clade guest linux).
    #[arg(value_name = "bare|linux")]
    pub(crate) guest: String,
    /// The file that `bare` is written to; `-` is standard output. Its own name if not given.
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
    /// vCPUs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) cpus: u64,
    /// Forks of the running guest.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) forks: usize,
    /// Generations to nest.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) generations: usize,
    /// Build the Linux guest if it is not there. Where it is, it is forked too.
    #[arg(long)]
    pub(crate) linux: bool,
    /// Leave the Linux guest out even if it is there.
    #[arg(long, conflicts_with = "linux")]
    pub(crate) no_linux: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchName {
    /// A guest's disk I/O, beside the host's own on the same file.
    Disk,
    /// Forking a running VM: the parent's pause, and the child's first instruction.
    Fork,
    /// Freezing memory, by the pages written since the last time: copied in the background, and at
    /// once.
    Freeze,
    /// Pinning pages for DMA.
    Pin,
    /// Going on from a snapshot on disk, beside reading all of it first.
    Restore,
    /// Saving a running VM to disk, beside writing as many bytes.
    Save,
    /// Resetting a running VM in place, by the pages written since, beside starting another from
    /// the same image.
    Reset,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// What to measure.
    pub(crate) name: BenchName,
    /// Guest memory sizes.
    #[arg(long, value_name = "SIZE,...", default_value = "512M", value_delimiter = ',', value_parser = parse_size)]
    pub(crate) mem: Vec<u64>,
    /// Samples of each figure.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) samples: usize,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What can be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StressName {
    /// Devices' DMA beside forks: disk reads and writes in flight while the VM is forked, nested,
    /// discarded, reset, put back to its fork and destroyed.
    Dma,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct StressArgs {
    /// What to try.
    pub(crate) name: StressName,
    /// For how long. A run without unshare goes on until it has found wrong bytes.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) seconds: u64,
    /// vCPUs, an even number. Two drive the disks; the others wake each other by interrupts, in
    /// pairs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) cpus: u64,
    /// Forks of the parent a second, as far as there is time.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) forks_per_second: u32,
    /// The seed of all choices, as a failure prints it.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Where the disks' files are made; the temporary directory if not given.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// The control run: freezes take pinned pages like any others. Succeeds once wrong bytes are
    /// found, and fails if none are in 10,000 forks.
    #[arg(long)]
    pub(crate) without_unshare: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckName {
    /// This host and its KVM: docs/vtx-checklist.md says what to do beside it.
    Host,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CheckArgs {
    /// What to check.
    pub(crate) name: CheckName,
    /// Forks of each storm of interrupts.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) forks: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_hide(text: &str) -> Result<CpuHide, String> {
    text.parse().map_err(|error: clade_vmm::kvm::UnknownFeature| clade_vmm::error_chain(&error))
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
