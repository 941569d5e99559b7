//! The arguments of the command line.

use std::path::PathBuf;

use clade::parse_size;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Benchmarks, stress tests and host checks of Clade.
#[derive(Debug, Parser)]
#[command(
    name = "clade-lab",
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
    /// Measure, against a baseline in the same run.
    Bench(BenchArgs),
    /// Stress a VM, and compare every byte.
    Stress(StressArgs),
    /// Show host properties that matter to vCPU state, and run short checks.
    Check(CheckArgs),
}

/// The measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BenchName {
    /// Children that write the same pages as their siblings: copied ahead, against copied when
    /// written.
    Ahead,
    /// The figures for comparisons with other VMMs, of all benches except `answer` and `tti`.
    All,
    /// Forking a VM with a warm interpreter: each child's first answer, against another
    /// interpreter.
    Answer,
    /// Clones in processes of their own by the API, one and many, against as many in one process.
    Clones,
    /// A guest's disk I/O, against the host's own on the same file.
    Disk,
    /// Children of a running VM that all live at once: each writes memory, and reports a checksum of inherited memory.
    Live,
    /// Forking a running VM: the parent's pause, and the child's first instruction.
    Fork,
    /// Freezing memory, by the pages written since the last time: copied in the background, and at
    /// once.
    Freeze,
    /// Pinning pages for DMA.
    Pin,
    /// Processes made by fork with a VM each, the limit of clones. Started by other benches.
    #[value(hide = true)]
    Processes,
    /// Restoring a snapshot from disk, against reading all of it first.
    Restore,
    /// One VM from a snapshot, in this process. Started by `restore`.
    #[value(hide = true)]
    Restored,
    /// Saving a running VM to disk, against writing as many bytes.
    Save,
    /// Resetting a running VM in place, by the pages written since, against starting another from
    /// the same image.
    Reset,
    /// Rolling a VM back to a checkpoint by the API, by the pages written since, against another VM forked
    /// from the checkpoint.
    Rollback,
    /// Suspending VMs: their remaining memory, the first answer after a wake, and ten VMs with nine
    /// of them suspended.
    Suspend,
    /// The time to interactive by E2B's API: from a request for a sandbox to a command's first
    /// answer, one after another, staggered, and at once, against the native API.
    Tti,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// The measurement to make.
    pub(crate) name: BenchName,
    /// Guest memory sizes, for all but `all`. Default: 512M, and 64M for `suspend`.
    #[arg(
        long,
        value_name = "SIZE,...",
        default_value = "512M",
        default_value_if("name", "suspend", "64M"),
        value_delimiter = ',',
        value_parser = parse_size
    )]
    pub(crate) mem: Vec<u64>,
    /// Samples of each figure.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) samples: usize,
    /// Most clones at once: for `clones` and `live` (default 1000), and `answer` (100).
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<usize>,
    /// Sandboxes at once, for `tti`: limited by the available memory. Default: 100.
    #[arg(long, value_name = "N")]
    pub(crate) at_once: Option<usize>,
    /// The image: of the interpreter, for `answer`, as `resources/python-image/build.sh` makes it;
    /// one with a shell, for `tti`.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// The kernel, for `answer` and `tti`. Default: that of `clade guest linux`.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Also show the time of a fork step by step. For `fork`.
    #[arg(long)]
    pub(crate) timeline: bool,
    /// The directory of the snapshot, for `restored`.
    #[arg(long, hide = true, value_name = "DIR")]
    pub(crate) snapshot: Option<PathBuf>,
    /// Pages that each guest of `processes` writes.
    #[arg(long, hide = true, value_name = "N", default_value_t = 1)]
    pub(crate) pages: u64,
    /// Read all of its memory first.
    #[arg(long, hide = true)]
    pub(crate) preload: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The stress tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum StressName {
    /// DMA under forks: disk reads and writes in flight while VMs are forked, nested, reset in
    /// place and destroyed, pages discarded and disks reset.
    Dma,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct StressArgs {
    /// The stress test to run.
    pub(crate) name: StressName,
    /// Duration in seconds. A run without unshare continues until it has found wrong bytes.
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) seconds: u64,
    /// vCPUs, an even number. Two drive the disks; the others wake each other by interrupts, in
    /// pairs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) cpus: u64,
    /// Forks of the parent per second, as far as there is time.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) forks_per_second: u32,
    /// The seed of all random choices, as printed by a failure.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Directory for the disks' files. Default: the temporary directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// All VMs in this process, instead of one in each. Pages are discarded only then.
    #[arg(long)]
    pub(crate) in_process: bool,
    /// The control run: freezes do not spare pinned pages. Succeeds once wrong bytes are found, and
    /// fails if none are in 10,000 forks. In this process.
    #[arg(long)]
    pub(crate) without_unshare: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckName {
    /// This host and its KVM; docs/vtx-checklist.md has the further steps.
    Host,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct CheckArgs {
    /// The check to run.
    pub(crate) name: CheckName,
    /// Forks in each storm of interrupts.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) forks: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
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
