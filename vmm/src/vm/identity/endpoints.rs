//! Interfaces, addresses and sockets of a VM, taken before the VM is made.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use clade_devices::virtio::net::Mac;
use clade_devices::virtio::vsock::{Vsock, VsockOptions};
use clade_io::Tap;

use crate::vm::config::{NetSpec, VmConfig};
use crate::vm::identity::claim::{Claim, first_free, next_cid};
use crate::vm::identity::{ChildIdentity, Identity, IdentityError, NAME, NetChoice, NetIdentity, VsockChoice};

/// Longest generated interface name before its number: a name has 15 bytes, with room for 9,999.
const MAX_STEM: usize = 11;
/// How long another process may hold the lock on a directory of sockets.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The host's end of a network device.
#[derive(Debug)]
pub(crate) struct NetEnd {
    pub(crate) tap: Tap,
    pub(crate) mac: Mac,
}

/// Interfaces, addresses and sockets taken for a VM that is not made yet. The drop frees them.
#[derive(Debug, Default)]
pub struct Endpoints {
    pub(crate) nets: Vec<NetEnd>,
    pub(crate) vsock: Option<Vsock>,
    pub(crate) identity: Identity,
    pub(crate) claims: Claims,
}

/// The claims of a VM, held for as long as it lives.
#[derive(Debug, Default)]
pub(crate) struct Claims(pub(super) Vec<Claim>);

impl Endpoints {
    /// Their names and addresses.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Takes what the configuration of a booting VM names.
    pub(crate) fn boot(config: &VmConfig) -> Result<Self, IdentityError> {
        let mut ends = Self::default();
        for net in &config.nets {
            ends.add_net(net, &net.tap, net.mac)?;
        }
        if let Some(options) = &config.vsock {
            let claim = Claim::cid(options.cid)?;
            ends.add_vsock(options.clone(), claim, false)?;
        }
        Ok(ends)
    }

    /// Takes what a child called `name` needs. `parent` is its parent's identity.
    pub(crate) fn child(
        config: &VmConfig,
        parent: &Identity,
        name: &str,
        choice: &ChildIdentity,
    ) -> Result<Self, IdentityError> {
        let mut ends = Self::default();
        let (chosen, there) = (choice.nets.len(), config.nets.len());
        if chosen > there {
            return Err(IdentityError::Interfaces { chosen, there });
        }
        let none = NetChoice::default();
        for (at, (net, own)) in config.nets.iter().zip(&parent.nets).enumerate() {
            let choice = choice.nets.get(at).unwrap_or(&none);
            let tap = choice.tap.clone().unwrap_or_else(|| pattern(&net.tap, &own.tap));
            ends.add_net(net, &tap, choice.mac)?;
        }
        match (&parent.vsock, &choice.vsock) {
            (None, None) => {}
            (None, Some(choice)) => return Err(IdentityError::NoVsock { choice: choice.clone() }),
            (Some(own), choice) => {
                let none = VsockChoice::default();
                let choice = choice.as_ref().unwrap_or(&none);
                let (cid, claim) = match choice.cid {
                    Some(cid) => (cid, Claim::cid(cid)?),
                    None => next_cid(own.cid)?,
                };
                let socket = match &choice.socket {
                    // A path is bytes, but a pattern is text.
                    Some(path) => path.to_str().map_or_else(|| path.clone(), |path| path.replace(NAME, name).into()),
                    None if own.socket.as_os_str().is_empty() => {
                        return Err(IdentityError::NoSocket { name: name.to_owned() });
                    }
                    None => own.socket.with_file_name(format!("{name}.vsock")),
                };
                ends.add_vsock(VsockOptions { cid, socket }, claim, true)?;
            }
        }
        Ok(ends)
    }

    fn add_net(&mut self, net: &NetSpec, tap: &str, mac: Option<Mac>) -> Result<(), IdentityError> {
        let (mac, claim) = match mac {
            Some(mac) => (mac, Claim::mac(mac)?),
            None => first_free("MAC address", || Mac::random().map_err(IdentityError::Random), |mac| Claim::mac(*mac))?,
        };
        self.claims.0.push(claim);
        // Claim a known name before the interface is opened. Opening one more queue of a
        // multi-queue interface would take part of another VM's packets.
        let tap = if tap.contains("%d") {
            let tap = Tap::open(tap, usize::from(net.queues))?;
            self.claims.0.push(Claim::interface(tap.name())?);
            tap
        } else {
            self.claims.0.push(Claim::interface(tap)?);
            Tap::open(tap, usize::from(net.queues))?
        };
        self.identity.nets.push(NetIdentity { tap: tap.name().to_owned(), mac });
        self.nets.push(NetEnd { tap, mac });
        Ok(())
    }

    fn add_vsock(&mut self, options: VsockOptions, claim: Claim, child: bool) -> Result<(), IdentityError> {
        self.claims.0.push(claim);
        // Held while a dead socket is found and replaced, so that of two processes one finds the
        // other's live socket.
        let _lock = lock_directory(&options.socket);
        remove_dead(&options.socket);
        self.vsock = Some(Vsock::new(&options, child)?);
        self.identity.vsock = Some(options);
        Ok(())
    }
}

/// The pattern of a child's interface: its parent's, or the parent's name with another number. A
/// restored VM gets `clade%d`: the name in its snapshot is another host's, or not to be trusted.
fn pattern(configured: &str, own: &str) -> String {
    if own.is_empty() {
        return "clade%d".to_owned();
    }
    if configured.contains("%d") {
        return configured.to_owned();
    }
    let stem = own.trim_end_matches(|c: char| c.is_ascii_digit());
    // Names of interfaces that exist are ASCII.
    let stem = stem.get(..MAX_STEM).unwrap_or(stem);
    format!("{}%d", if stem.is_empty() { "clade" } else { stem })
}

/// Locks the directory of `socket`: one process at a time replaces dead sockets in it. Returns None
/// after [`TIMEOUT`], or if the directory cannot be opened.
fn lock_directory(socket: &Path) -> Option<File> {
    let beside = socket.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(beside).ok()?;
    let deadline = Instant::now() + TIMEOUT;
    while directory.try_lock().is_err() {
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Some(directory)
}

/// Removes a socket on which no process listens: a killed process leaves one behind.
fn remove_dead(socket: &Path) {
    if fs::symlink_metadata(socket).is_ok_and(|found| found.file_type().is_socket())
        && UnixStream::connect(socket).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        // If it stays, the bind that follows fails.
        let _ = fs::remove_file(socket);
    }
}

#[cfg(test)]
mod tests;
