//! Errors of the host's resources.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// The host has too little of a resource.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("they need about {needed} {what}, and {left} of {limit} are left ({setting})")]
pub struct HostLimitError {
    /// The resource.
    pub what: &'static str,
    /// The number that is needed.
    pub needed: u64,
    /// The number that is left, less a reserve.
    pub left: u64,
    /// The most that the host allows.
    pub limit: u64,
    /// The name of that limit.
    pub setting: &'static str,
}

/// Reason why there is no control group.
#[derive(Debug, Error)]
#[error("the control group {}", path.display())]
pub struct CgroupError {
    /// The group's directory or file.
    pub path: PathBuf,
    /// The reason.
    #[source]
    pub source: io::Error,
}

/// Reason why an interface is not connected.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HookError {
    /// The program cannot be run.
    #[error("the network hook {} cannot be run", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The program has failed, or has not ended in time.
    #[error("the network hook {} for {tap} of {vm}: {how}{}{said}", program.display(), if said.is_empty() { "" } else { ": " })]
    Failed {
        /// The program.
        program: PathBuf,
        /// The VM.
        vm: String,
        /// The interface.
        tap: String,
        /// The end of the program.
        how: String,
        /// The last line of its standard error.
        said: String,
    },
    /// Interfaces of ended VMs are still being taken down: a new VM may have one of them.
    #[error("the network hook {} has taken {left} VMs' interfaces down for {seconds} s", program.display())]
    Busy {
        /// The program.
        program: PathBuf,
        /// VMs whose interfaces are still up.
        left: usize,
        /// The time that was waited.
        seconds: u64,
    },
}
