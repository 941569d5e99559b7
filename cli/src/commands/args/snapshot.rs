//! The arguments of commands for snapshots.

#![allow(rustdoc::broken_intra_doc_links, reason = "doc comments are help texts, in which brackets mean options")]

use std::path::PathBuf;

use clade_api::Label;
use clap::{Args, Subcommand};

use clade_worker::jail::Confinement;

use super::ActArgs;
use super::launch::{CloneArgs, TimesArgs};

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
    /// A label of the VMs: key=value. Repeatable. A snapshot has none.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<Label>,
    #[command(flatten)]
    pub(crate) times: TimesArgs,
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
    /// Print JSON instead of a table.
    #[arg(long, requires = "background")]
    pub(crate) json: bool,
}
