//! What a worker may do to the host: as little as its VM needs.
//!
//! A guest that breaks out of its VM runs code in the worker. The jail is what stands between that
//! code and everything else.
//!
//! | layer | when | what it takes away |
//! |---|---|---|
//! | namespaces | once, by the zygote | the host's network, its System V objects, its host name |
//! | seccomp | likewise, and in each worker; threads that serve the guest have a list of their own | system calls |
//! | Landlock (`Grants`) | in each worker, before it reads an image | files, signals, ptrace, abstract sockets |
//! | capabilities, `no_new_privs` | likewise | privileges of root, and ways back to them |
//! | rlimits | likewise | core files with guest memory; private memory without end |
//!
//! Everything is applied while the worker has one thread: what comes later inherits it. It cannot
//! be undone. So what a worker will need is opened before, or handed in by the supervisor.
//!
//! All of it is by the kernel. Where the kernel lacks a layer, [`Confinement`] says what happens.

mod files;
mod namespaces;
mod seccomp;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::str::FromStr;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub(crate) use files::{Grants, is_block_device};
pub(crate) use namespaces::enter_empty;

/// Whether workers are confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confinement {
    /// As far as the host can. What it lacks is logged.
    #[default]
    Auto,
    /// Wholly, or there is no worker.
    Require,
    /// Not at all: for finding out whether a problem is the jail's.
    Off,
}

/// Why a worker cannot be confined.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JailError {
    /// The kernel refuses a layer of the jail.
    #[error("a worker cannot be confined: {layer}")]
    Layer {
        /// The layer.
        layer: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The text is no kind of confinement.
    #[error("unknown confinement {text:?}: auto, require or off")]
    Kind {
        /// The text.
        text: String,
    },
}

impl FromStr for Confinement {
    type Err = JailError;

    fn from_str(text: &str) -> Result<Self, JailError> {
        match text {
            "auto" => Ok(Self::Auto),
            "require" => Ok(Self::Require),
            "off" => Ok(Self::Off),
            _ => Err(JailError::Kind { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Require => "require",
            Self::Off => "off",
        })
    }
}

impl Confinement {
    /// What a layer's failure means.
    pub(crate) fn judge(self, layer: &'static str, done: io::Result<()>) -> Result<(), JailError> {
        match done {
            Err(source) if self == Self::Require => Err(JailError::Layer { layer, source }),
            Err(error) => {
                tracing::warn!(%error, layer, "workers are confined without this layer");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Confines the zygote, which has one thread, to what it and its workers need: they inherit it.
///
/// # Errors
/// When a layer is required, and refused.
pub(crate) fn confine_zygote(confinement: Confinement) -> Result<(), JailError> {
    if confinement == Confinement::Off {
        return Ok(());
    }
    confinement.judge("no_new_privs", set_no_new_privs(true).map_err(io::Error::from))?;
    confinement.judge("seccomp", seccomp::enter_zygote())
}

/// Confines this process, which has one thread, to `grants`, and to what a VM with `ram` bytes of RAM
/// needs. `memory` is the directory in which it makes files of memory, if they have one.
///
/// # Errors
/// When a layer is required, and refused.
pub(crate) fn confine(
    confinement: Confinement,
    grants: &Grants,
    ram: u64,
    memory: Option<BorrowedFd<'_>>,
) -> Result<(), JailError> {
    if confinement == Confinement::Off {
        return Ok(());
    }
    confinement.judge("rlimits", limit(ram))?;
    confinement.judge("no_new_privs", set_no_new_privs(true).map_err(io::Error::from))?;
    confinement.judge("Landlock", grants.enforce(memory))?;
    confinement.judge("capabilities", drop_capabilities())?;
    // Last: it forbids some of the above.
    confinement.judge("seccomp", seccomp::enter(!grants.beside.is_empty(), grants.locks))
}

/// Private memory that a worker may map beside twice its VM's RAM: stacks, heaps, buffers.
const PRIVATE_OVERHEAD: u64 = 1 << 30;

/// No core files, which would have the guest's memory. Private memory that can be written only up to
/// twice the RAM and an overhead: what is beyond is refused. Files of memory are not counted by any
/// such limit. A thread may still be put in front for the microseconds of a fork: without
/// CAP_SYS_NICE that takes a limit.
fn limit(ram: u64) -> io::Result<()> {
    /// 20 - nice: the limit for nice -20.
    const ANY_NICE: u64 = 40;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let private = Some(ram.saturating_mul(2).saturating_add(PRIVATE_OVERHEAD));
    // This process may have a lower one already.
    let private = private.min(getrlimit(Resource::Data).maximum.or(private));
    setrlimit(Resource::Data, Rlimit { current: private, maximum: private })?;
    let nice = Rlimit { current: Some(ANY_NICE), maximum: Some(ANY_NICE) };
    if setrlimit(Resource::Nice, nice).is_err() {
        tracing::debug!(limit = ?getrlimit(Resource::Nice), "threads are not put in front");
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}

#[cfg(test)]
mod tests;
