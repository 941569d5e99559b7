//! A worker's first request: the grants that it is confined to.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use clade_block::prepare_engines;
use serde::{Deserialize, Serialize};

use super::{WorkerRequest, receive};
use crate::jail::{Confinement, Grants, confine};
use clade_api::{DaemonError, RuntimeDir};
use clade_vmm::vm::Context;

/// Grants of a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConfineRequest {
    /// The runtime directory.
    pub dir: PathBuf,
    /// The confinement.
    pub confinement: Confinement,
    /// The files and descriptors that it may use.
    pub grants: Grants,
    /// Disks of its VM.
    pub disks: usize,
    /// Bytes of its VM's RAM.
    pub ram: u64,
}

/// A confined worker.
#[derive(Debug)]
pub struct ConfinedWorker {
    pub(super) dir: RuntimeDir,
}

/// Receives the first request from the process behind `socket`, and confines this process to it.
/// Call it while the process has one thread. Returns `None` if the starter no longer wants a
/// worker.
///
/// # Errors
/// When another request comes first, or the process cannot be confined.
pub fn confine_worker(context: &Context, socket: &OwnedFd) -> Result<Option<ConfinedWorker>, DaemonError> {
    let failed = |source| DaemonError::Worker { source };
    let request = match receive(socket) {
        // The worker waited in a pool, and its starter has gone.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other.map_err(failed)?.0,
    };
    let WorkerRequest::Confine(request) = request else {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidData,
            "the first request does not confine the worker",
        )));
    };
    let begun = Instant::now();
    let ConfineRequest { dir, confinement, grants, disks, ram } = *request;
    if confinement == Confinement::Off {
        return Ok(Some(ConfinedWorker { dir: RuntimeDir::create(&dir)? }));
    }
    let dir = RuntimeDir::reach(&dir)?;
    // Rings and the namespace of abstract sockets are out of reach afterwards.
    prepare_engines(disks).map_err(|error| failed(io::Error::other(error)))?;
    confine(confinement, &grants, ram, context.store().directory()).map_err(|error| failed(io::Error::other(error)))?;
    tracing::debug!(took = ?begun.elapsed(), "entered");
    Ok(Some(ConfinedWorker { dir }))
}
