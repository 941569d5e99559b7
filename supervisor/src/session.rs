//! Sessions: VMs that end with the command that began them, however that ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::processes::ProcessId;
use clade_api::http::ClientProcess;
use clade_api::{CancelReason, DaemonError, ProblemKind, check_name};
use clade_worker::has_ended;

/// A session, and the process of its command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    pub(super) name: String,
    process: ProcessId,
}

/// A session whose command runs.
#[derive(Debug)]
pub(super) struct Live<'a> {
    pub(super) session: &'a Session,
    process: OwnedFd,
}

impl Session {
    /// Begins the session that a `client` requests. The kernel names the client's process: its own
    /// word may be of another namespace, or a lie.
    ///
    /// # Errors
    /// When the name is invalid, or the client is not a process of this host.
    pub(super) fn of(name: &str, client: Option<ClientProcess>) -> Result<Self, DaemonError> {
        check_name(name)?;
        let process = client.and_then(|client| ProcessId::of(client.pid));
        let refused = || {
            let text = "session: VMs end with a process of this host, which sends its request to the Unix socket";
            DaemonError::Refused { kind: ProblemKind::BadConfig, text: text.to_owned() }
        };
        Ok(Self { name: name.to_owned(), process: process.ok_or_else(refused)? })
    }

    /// Opens the process of the command. None if that has ended: its VMs end, and the children of a
    /// checkpoint of one belong to no session.
    pub(super) fn live(&self) -> Option<Live<'_>> {
        Some(Live { session: self, process: self.process.open()? })
    }

    /// The same for `count` VMs that are started for the command, or of a running VM of it.
    ///
    /// # Errors
    /// When the command has ended.
    pub(super) fn expect_live(&self, count: usize) -> Result<Live<'_>, DaemonError> {
        let reason = CancelReason::SessionEnded;
        self.live().ok_or(DaemonError::Cancelled { made: 0, count, reason })
    }
}

impl Live<'_> {
    /// Returns an error if the command has ended, for a request of which `made` VMs of `count` are
    /// made.
    pub(super) fn check(&self, made: usize, count: usize) -> Result<(), DaemonError> {
        let reason = CancelReason::SessionEnded;
        if has_ended(&self.process, Duration::ZERO) {
            return Err(DaemonError::Cancelled { made, count, reason });
        }
        Ok(())
    }
}

impl AsFd for Live<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

/// Deserializes the session of a VM's record. An earlier version recorded only a name, and the VM
/// ends with its supervisor: None.
pub(super) fn recorded<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Session>, D::Error> {
    let value = serde_json::Value::deserialize(from)?;
    Ok(serde_json::from_value(value).ok())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_session_is_live_as_long_as_its_command() {
        let mut command = Command::new("sleep").arg("60").spawn().unwrap();
        let client = |pid| Some(ClientProcess { pid });
        let session = Session::of("run-1", client(command.id())).unwrap();
        assert_eq!(session.live().unwrap().session.name, "run-1");
        let live = session.expect_live(1).unwrap();
        live.check(0, 1).unwrap();
        command.kill().unwrap();
        command.wait().unwrap();
        assert!(session.live().is_none());
        assert!(matches!(live.check(1, 2), Err(DaemonError::Cancelled { made: 1, count: 2, .. })));
        assert!(matches!(session.expect_live(3), Err(DaemonError::Cancelled { made: 0, count: 3, .. })));
        for client in [client(command.id()), client(0), client(u32::MAX), None] {
            let text = Session::of("run-1", client).unwrap_err().to_string();
            assert!(text.starts_with("session: "), "{text}");
        }
        assert!(Session::of("../x", client(std::process::id())).is_err());
    }
}
