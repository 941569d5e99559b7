//! A worker's first order: the grants that it is confined to.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use clade_devices::disk::prepare_engines;
use serde::{Deserialize, Serialize};

use super::{Order, receive};
use crate::fleet::{FleetError, RuntimeDir};
use crate::jail::{Confinement, Grants, confine};
use clade_vmm::vm::Context;

/// Grants of a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EnterOrder {
    /// The runtime directory.
    pub(crate) dir: PathBuf,
    pub(crate) confinement: Confinement,
    pub(crate) grants: Grants,
    /// Disks of its VM.
    pub(crate) disks: usize,
    /// Bytes of its VM's RAM.
    pub(crate) ram: u64,
}

/// A confined worker.
#[derive(Debug)]
pub struct Entered {
    pub(super) dir: RuntimeDir,
}

/// Receives the first order from the process behind `socket`, and confines this process to it. Call
/// it while the process has one thread. Returns `None` if the starter no longer wants a worker.
///
/// # Errors
/// When another order comes first, or the process cannot be confined.
pub fn enter(context: &Context, socket: &OwnedFd) -> Result<Option<Entered>, FleetError> {
    let failed = |source| FleetError::Worker { source };
    let order = match receive(socket) {
        // The worker waited in a pool, and its starter has gone.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other.map_err(failed)?.0,
    };
    let Order::Enter(order) = order else {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidData,
            "an order before it was told what it may reach",
        )));
    };
    let begun = Instant::now();
    let EnterOrder { dir, confinement, grants, disks, ram } = *order;
    if confinement == Confinement::Off {
        return Ok(Some(Entered { dir: RuntimeDir::create(&dir)? }));
    }
    let dir = RuntimeDir::reach(&dir)?;
    // Rings and the namespace of abstract sockets are out of reach afterwards.
    prepare_engines(disks).map_err(|error| failed(io::Error::other(error)))?;
    confine(confinement, &grants, ram, context.store().directory()).map_err(|error| failed(io::Error::other(error)))?;
    tracing::debug!(took = ?begun.elapsed(), "entered");
    Ok(Some(Entered { dir }))
}
