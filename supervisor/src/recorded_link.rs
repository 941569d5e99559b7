//! The host's side of a VM's network device, as the VM's record has it.

use std::io;

use clade_devices::virtio::net::Link;
use clade_host_io::link;
use clade_vmm::vm::HostLink;
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::processes::ProcessId;

/// The host's side of a network device, as a VM's record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RecordedLink {
    /// The index of a TAP interface.
    Interface(u32),
    /// A passt.
    User(ProcessId),
}

impl RecordedLink {
    /// Records a link. None for a passt that has already ended.
    pub(super) fn of(link: &HostLink) -> Option<Self> {
        match *link {
            HostLink::Interface { index } => Some(Self::Interface(index)),
            HostLink::User { pid } => ProcessId::of(pid).map(Self::User),
        }
    }

    /// Opens or closes it. A passt that has ended is closed.
    ///
    /// # Errors
    /// When the host refuses it. An interface that has gone, or is in another network namespace, cannot
    /// be closed (ENODEV).
    pub(super) fn set(self, wanted: Link) -> io::Result<()> {
        let is_open = wanted == Link::Open;
        match self {
            Self::Interface(index) => link::set_up(index, is_open),
            Self::User(process) => {
                let Some(pidfd) = process.open() else { return Ok(()) };
                let signal = if is_open { Signal::CONT } else { Signal::STOP };
                match pidfd_send_signal(&pidfd, signal) {
                    Err(Errno::SRCH) => Ok(()),
                    sent => Ok(sent?),
                }
            }
        }
    }
}
