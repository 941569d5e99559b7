//! The rights of a worker on the host: as few as its VM needs.
//!
//! A guest that breaks out of its VM runs code in the worker. The jail stands between that code and
//! the host.
//!
//! | mechanism | when | restricts |
//! |---|---|---|
//! | namespaces | once, by the zygote | the host's network, its System V objects, its host name |
//! | seccomp | likewise, and in each worker; threads that serve the guest have a list of their own | system calls |
//! | Landlock (`Grants`) | in each worker, before it reads an image | files, signals, ptrace, abstract sockets |
//! | capabilities, `no_new_privs` | likewise | privileges of root, and ways back to them |
//! | rlimits | likewise | core files with guest memory; private memory without end |
//!
//! Everything is applied while the worker has one thread; later threads inherit it. It cannot be
//! undone. So the worker opens everything that it will need before, or gets it from the supervisor.
//!
//! The kernel enforces all mechanisms. [`Confinement`] decides what happens without one of them.

mod landlock;
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

pub use landlock::{Grants, is_block_device};
pub(crate) use namespaces::enter_empty;
pub use seccomp::Role;

/// Whether workers are confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confinement {
    /// As far as the host supports it. A missing mechanism is logged.
    #[default]
    Auto,
    /// With every mechanism, or no worker starts.
    Require,
    /// Not at all: for finding out whether the jail causes a problem.
    Off,
}

/// Reason why a worker cannot be confined.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum JailError {
    /// The kernel refuses a mechanism of the jail.
    #[error("a worker cannot be confined: {mechanism}")]
    Mechanism {
        /// The mechanism.
        mechanism: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The text does not name a kind of confinement.
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
    /// Decides whether a mechanism's failure is an error.
    pub fn judge(self, mechanism: &'static str, done: io::Result<()>) -> Result<(), JailError> {
        match done {
            Err(source) if self == Self::Require => Err(JailError::Mechanism { mechanism, source }),
            Err(error) => {
                tracing::warn!(%error, mechanism, "workers are confined without this mechanism");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Confines the zygote, which has one thread, to the needs of itself and its workers: they inherit
/// it.
///
/// # Errors
/// When a mechanism is required, and refused.
pub(crate) fn confine_zygote(confinement: Confinement) -> Result<(), JailError> {
    if confinement == Confinement::Off {
        return Ok(());
    }
    confinement.judge("no_new_privs", set_no_new_privs(true).map_err(io::Error::from))?;
    confinement.judge("seccomp", seccomp::enter_zygote())
}

/// Confines this process, which has one thread, to `grants`, and to the needs of a VM with `ram`
/// bytes of RAM. `memory` is the directory for its memory files, if they have one.
///
/// # Errors
/// When a mechanism is required, and refused.
pub fn confine(
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
    // Last: it forbids some of the calls above.
    confinement.judge("seccomp", seccomp::enter(grants.role))
}

/// Private memory that a worker may map beside twice its VM's RAM: stacks, heaps, buffers.
const PRIVATE_OVERHEAD: u64 = 1 << 30;

/// Forbids core files, which would hold the guest's memory. Limits writable private memory to twice
/// the RAM and an overhead. Memory files count towards no such limit. A thread may still be
/// prioritised for the microseconds of a fork: without CAP_SYS_NICE that takes a limit.
fn limit(ram: u64) -> io::Result<()> {
    /// 20 - nice: the limit for nice -20.
    const ANY_NICE: u64 = 40;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let private = Some(ram.saturating_mul(2).saturating_add(PRIVATE_OVERHEAD));
    // This process may have a lower one already.
    let private = private.min(getrlimit(Resource::Data).maximum.or(private));
    setrlimit(Resource::Data, Rlimit { current: private, maximum: private })?;
    // The supervisor's thread that ends the real-time priority of a worker must outrank it.
    setrlimit(Resource::Rtprio, Rlimit { current: Some(0), maximum: Some(0) })?;
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
