//! Workers: processes with one VM each.
//!
//! A worker gets its requests over a socket (`SOCK_SEQPACKET`). It makes its VM with a VM host and
//! sockets of its own in the runtime directory. From then on it depends on no other process, unless
//! it ends with one.
//!
//! | message | from | content |
//! |---|---|---|
//! | 1 | starter | the worker's grants: it is confined to them while it has one thread |
//! | 2.. | starter | a request as JSON. With a VM's name come its lock, sockets and interfaces |
//! | next | starter | only with a fork: the child's labels and its parent's secrets as JSON; files of the copies [`ahead`] |
//! | next | starter | only with a fork: the image ([`SealedParts`](clade_vmm::vm::SealedParts)) |
//! | next | worker | ready for the next request, or made and not running yet, or the error |
//! | next | starter | one byte, once all children are made: they may run. For a single one at once |
//! | last | worker | the VM runs |
//!
//! A worker ends if its socket is closed before its VM runs. So a request makes all of its children
//! or none (I13), and no child runs before all are made.
//!
//! The supervisor's [`zygote`] forks workers: processes with everything loaded.
//!
//! | topic | module |
//! |---|---|
//! | requests to workers, and the processes as the supervisor sees them | `process`, `workers` |
//! | confinement | `confine_request`, [`jail`] |
//! | the VM of the process, its name and its end | [`vm_host`] |
//! | its control socket (HTTP) and console sockets | [`rpc`], `console` |
//! | its image for other processes; suspension and rollback | [`image`] |
//! | checks that the host has room | [`host_limits`] |

#![deny(missing_docs)]

pub mod ahead;
mod confine_request;
mod console;
mod describe;
mod detach;
mod heap;
pub mod host_limits;
pub mod image;
pub mod jail;
mod open;
mod pace;
mod parent_death;
mod process;
pub mod rpc;
mod save;
mod serve;
mod template;
mod text;
pub mod vm_host;
mod workers;
pub mod zygote;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use clade_devices::virtio::net::Link;
use clade_host_io::seqpacket::{self, Message};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ahead::AheadRequest;
use clade_api::secrets::Secrets;
use clade_api::{DaemonError, DetachedInfo, ErasedInfo, IdentityInfo, Labels, ProblemKind};
use clade_memory::GuestRam;
use clade_snapshot::Saved;
use clade_vmm::boot::BootImage;
use clade_vmm::vm::{EndpointParts, Vm, VmConfig};

pub use confine_request::ConfineRequest;
pub use confine_request::{ConfinedWorker, confine_worker};
pub use detach::{DetachRequest, KnownFiles, KnownPart, packed};
pub use open::ReadSnapshotRequest;
pub use pace::Pace;
pub use parent_death::PARENT_DEATH_EXIT;
pub(crate) use process::WorkerProcess;
pub use process::{BeforeTheyRun, DetachedParts, Worker, has_ended};
pub use save::{WriteSnapshotRequest, written_beside};
pub use serve::{Served, WorkerHooks, serve};
pub use template::VmTemplate;
pub use workers::Workers;

/// The exit code of a worker whose VM's disks lack the writes since a fork.
pub const UNMERGED: u8 = 74;

/// Most bytes of a request or an answer.
const MAX_MESSAGE: usize = 64 << 10;

/// A request to a worker.
#[derive(Debug, Serialize, Deserialize)]
pub enum WorkerRequest {
    /// The first request: confine yourself to these grants.
    Confine(Box<ConfineRequest>),
    /// Be ready for a VM of this configuration.
    Prepare(Box<VmConfig>),
    /// Start a child. Its labels and its image follow.
    Fork(Box<StartChildRequest>),
    /// Boot a VM.
    Boot(Box<StartBootRequest>),
    /// Write a snapshot of the images that follow.
    Save(Box<WriteSnapshotRequest>),
    /// Open a snapshot, and give its image.
    Open(Box<ReadSnapshotRequest>),
    /// Copy what a VM's process can write of the image that follows, and give it back.
    Detach(Box<DetachRequest>),
}

/// Descriptors that come with a request, in this order: the name's lock, the file for the VM's end,
/// the one for its flight record, the process that it ends with, the sockets, and the interfaces.
#[derive(Debug, Serialize, Deserialize)]
pub struct PassedFds {
    /// Whether the worker ends with the command of its VM's session.
    pub ends_with_command: bool,
    /// Endings of the sockets.
    pub sockets: Vec<String>,
    /// The host's ends of its network and socket devices.
    pub ends: EndpointParts,
}

/// A child to be started.
#[derive(Debug, Serialize, Deserialize)]
pub struct StartChildRequest {
    /// The name.
    pub name: String,
    /// The template that the image must have.
    pub template: VmTemplate,
    /// The descriptors that come with the request.
    pub passed_fds: PassedFds,
    /// The parent's name, if there is one.
    pub parent: Option<String>,
    /// Whether it starts paused.
    pub paused: bool,
}

/// A VM to be booted.
#[derive(Debug, Serialize, Deserialize)]
pub struct StartBootRequest {
    /// The name.
    pub name: String,
    /// The descriptors that come with the request.
    pub passed_fds: PassedFds,
    /// The configuration.
    pub config: VmConfig,
    /// The kernel, or the name of one of the program's own.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The labels.
    pub labels: Labels,
    /// The secrets that children may be made without.
    pub secrets: Secrets,
    /// Whether it starts paused.
    pub paused: bool,
    /// Whether its guest reports that it is ready.
    pub reports_ready: bool,
}

/// The parts of its parent that a child gets beside the image.
#[derive(Debug, Serialize, Deserialize)]
pub struct Inherited {
    /// The labels.
    pub labels: Labels,
    /// The secrets that children may be made without.
    pub secrets: Secrets,
    /// Whether the secrets are erased in the child's memory before its first instruction.
    pub withhold: bool,
    /// The request to copy pages ahead.
    pub ahead: Option<AheadRequest>,
}

/// An answer of a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerAnswer {
    /// The worker is ready for the next request.
    Ready,
    Made {
        identity: Option<IdentityInfo>,
        erased: ErasedInfo,
        /// Whether packets pass. None without a network device.
        network: Option<Link>,
    },
    Running,
    /// Bytes of a snapshot already written, and bytes in all.
    Saving {
        done: u64,
        total: u64,
    },
    Saved(Box<Saved>),
    /// The image of a snapshot follows.
    Opened,
    /// The image with its copies follows.
    Detached(DetachedInfo),
    Failed {
        /// The kind of the error.
        kind: ProblemKind,
        text: String,
    },
}

/// Extensions by the program that a worker runs in.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Returns the kernel at a path. A program may have kernels of its own, under names that are
    /// not files.
    pub kernel: fn(&Path) -> BootImage,
    /// Called with a child's memory before its first instruction. For measurements.
    pub before_start: Option<fn(&GuestRam)>,
    /// Called when a booted VM runs, before the worker reports that. For measurements.
    pub booted: Option<fn(&Vm)>,
    /// Called when a child runs, before the worker reports that. For measurements.
    pub started: Option<fn(&Vm)>,
    /// Called after the report. For measurements.
    pub said: Option<fn(&Vm)>,
}

/// A VM, as its process describes it: a guest may have broken into that process.
#[derive(Clone, Debug)]
pub struct ReportedVm {
    /// Its own interfaces, addresses and sockets; `None` if it has no such devices.
    pub identity: Option<IdentityInfo>,
    /// The count of secrets erased in its memory.
    pub erased: ErasedInfo,
    /// Whether packets pass. None without a network device.
    pub network: Option<Link>,
}

fn failed(source: io::Error) -> DaemonError {
    DaemonError::Worker { source }
}

fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let Message { bytes, files } = seqpacket::receive(socket, MAX_MESSAGE)?;
    Ok((serde_json::from_slice(&bytes)?, files))
}

fn send(socket: impl AsFd, what: &impl Serialize, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    seqpacket::send(socket, &serde_json::to_vec(what)?, files)
}
