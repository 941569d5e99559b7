//! Interfaces, addresses and sockets of a VM, taken before the VM is made.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{io, mem};

use clade_devices::virtio::net::{EgressRule, Link, Mac};
use clade_devices::virtio::vsock::{BrokerSlot, VsockOptions, VsockSocket};
use clade_host_io::{NetBackend, Tap, TapError, link};
use serde::{Deserialize, Serialize};

use crate::vm::config::{NetSpec, VmConfig};
use crate::vm::identity::claim::{IdentityClaim, InterfaceClaim, first_free, next_cid};
use crate::vm::identity::{ChildIdentity, Identity, IdentityError, NAME, NetChoice, NetIdentity, UserNet, VsockChoice};

/// Longest generated interface name before its number: a name has 15 bytes, with room for 9,999.
const MAX_STEM: usize = 11;
/// Most names of interfaces tried that VMs which are about to end still claim.
const MAX_REFUSED: usize = 64;
/// Timeout for the lock on a directory of sockets that another process holds.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The host's end of a network device.
#[derive(Debug)]
pub(crate) struct NetEnd {
    pub(crate) backend: NetBackend,
    pub(crate) mac: Mac,
}

/// The backend of a network device.
enum To<'a> {
    Tap(&'a str),
    User(UserNet),
}

/// The host's end of a socket device.
#[derive(Debug)]
pub(crate) struct VsockEnd {
    pub(crate) socket: VsockSocket,
    /// Whether the device's driver knows connections that are gone.
    pub(crate) reset: bool,
}

/// The host's side of a network device. Whoever has it can close the network without the VM's
/// process, which has the queues alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostLink {
    /// A TAP interface. While it is down, the kernel takes no packet from its queues.
    Interface {
        /// Its index.
        index: u32,
    },
    /// A passt. While it is stopped, it takes no packet from its socket.
    User {
        /// Its process.
        pid: u32,
    },
}

/// Interfaces, addresses and sockets taken for a VM that is not made yet. The drop frees them.
#[derive(Debug, Default)]
pub struct Endpoints {
    pub(crate) nets: Vec<NetEnd>,
    /// Whether packets pass, if this differs from the saved state.
    pub(crate) network: Option<Link>,
    /// Rules in addition to the saved ones.
    pub(crate) egress: Vec<EgressRule>,
    pub(crate) vsock: Option<VsockEnd>,
    pub(crate) broker: Option<BrokerSlot>,
    pub(crate) identity: Identity,
    pub(crate) claims: Claims,
    links: Vec<HostLink>,
    interface_claims: Vec<InterfaceClaim>,
}

/// [`Endpoints`] whose descriptors go to another process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct EndpointParts {
    identity: Identity,
    /// Queues of each interface.
    queues: Vec<usize>,
    claims: usize,
    network: Option<Link>,
    #[serde(default)]
    egress: Vec<EgressRule>,
    reset: bool,
    broker: bool,
}

/// The claims of a VM, held for as long as it lives.
#[derive(Debug, Default)]
pub(crate) struct Claims(pub(super) Vec<IdentityClaim>);

impl Endpoints {
    /// Their names and addresses.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The host's side of each network device, if they were taken by this process.
    #[must_use]
    pub fn links(&self) -> &[HostLink] {
        &self.links
    }

    /// Takes further claims on its interfaces with several queues, for whoever starts the VM's process.
    #[must_use]
    pub fn take_interface_claims(&mut self) -> Vec<InterfaceClaim> {
        mem::take(&mut self.interface_claims)
    }

    /// Takes the endpoints in the configuration of a VM to be booted.
    ///
    /// # Errors
    /// When one is taken, or cannot be made. Then none is taken (I13).
    pub fn boot(config: &VmConfig) -> Result<Self, IdentityError> {
        let mut ends = Self::default();
        for net in &config.nets {
            let to = net.user.as_ref().map_or(To::Tap(&net.tap), |user| To::User(user.clone()));
            ends.add_net(net, &to, net.mac)?;
        }
        if let Some(options) = &config.vsock {
            let claim = IdentityClaim::cid(options.cid)?;
            ends.add_vsock(options.clone(), claim, false)?;
        }
        Ok(ends)
    }

    /// Takes the endpoints of a child called `name`. `parent` is its parent's identity.
    ///
    /// # Errors
    /// As for a booting VM.
    pub fn child(
        config: &VmConfig,
        parent: &Identity,
        name: &str,
        choice: &ChildIdentity,
    ) -> Result<Self, IdentityError> {
        let mut ends = Self { network: choice.network, egress: choice.egress.clone(), ..Self::default() };
        let (chosen, there) = (choice.nets.len(), config.nets.len());
        if chosen > there {
            return Err(IdentityError::Interfaces { chosen, there });
        }
        let none = NetChoice::default();
        for (at, (net, own)) in config.nets.iter().zip(&parent.nets).enumerate() {
            let choice = choice.nets.get(at).unwrap_or(&none);
            let pattern = choice.tap.clone().unwrap_or_else(|| pattern(&net.tap, &own.tap));
            let user = net.user.as_ref().filter(|_| choice.tap.is_none() && own.tap.is_empty());
            let to = user.map_or(To::Tap(&pattern), |user| To::User(user.of_child()));
            ends.add_net(net, &to, choice.mac)?;
        }
        match (&parent.vsock, &choice.vsock) {
            (None, None) => {}
            (None, Some(choice)) => return Err(IdentityError::NoVsock { choice: choice.clone() }),
            (Some(own), choice) => {
                let none = VsockChoice::default();
                let choice = choice.as_ref().unwrap_or(&none);
                let (cid, claim) = match choice.cid {
                    Some(cid) => (cid, IdentityClaim::cid(cid)?),
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

    /// The same for the process that makes the VM: a description, and the descriptors. The sockets'
    /// files stay; the caller removes them. `broker` is the end of a socket for the guest's
    /// connections to the host ([`clade_devices::virtio::vsock::answer_broker`]).
    ///
    /// # Errors
    /// When there is no free descriptor. The files are removed then.
    pub fn hand_over(self, broker: Option<OwnedFd>) -> io::Result<(EndpointParts, Vec<OwnedFd>)> {
        let Self { nets, network, egress, vsock, identity, claims, .. } = self;
        let mut files = Vec::new();
        let mut parts = EndpointParts { identity, network, egress, ..EndpointParts::default() };
        for net in nets {
            let (_, queues) = net.backend.into_queues();
            parts.queues.push(queues.len());
            files.extend(queues);
        }
        parts.claims = claims.0.len();
        files.extend(claims.0.into_iter().map(IdentityClaim::into_descriptor));
        if let Some(VsockEnd { socket, reset }) = vsock {
            files.push(socket.hand_over()?);
            parts.reset = reset;
            parts.broker = broker.is_some();
            files.extend(broker);
        }
        Ok((parts, files))
    }

    /// The endpoints that another process has taken. They hold the claims as long as the VM lives;
    /// the other process removes the sockets' files.
    ///
    /// # Errors
    /// When the descriptors do not match the description.
    pub fn handed_in(parts: EndpointParts, files: Vec<OwnedFd>) -> Result<Self, IdentityError> {
        let EndpointParts { identity, queues, claims, network, egress, reset, broker } = parts;
        let vsock = if identity.vsock.is_some() { 1 + usize::from(broker) } else { 0 };
        let wanted = queues.iter().sum::<usize>() + claims + vsock;
        if wanted != files.len() || queues.len() != identity.nets.len() {
            return Err(IdentityError::Descriptors { found: files.len(), wanted });
        }
        let mut files = files.into_iter();
        let mut ends = Self { network, egress, ..Self::default() };
        for (own, queues) in identity.nets.iter().zip(queues) {
            let backend = NetBackend::of_queues(own.tap.clone(), files.by_ref().take(queues).collect());
            let backend = backend.ok_or(IdentityError::Descriptors { found: 0, wanted: 1 })?;
            ends.nets.push(NetEnd { backend, mac: own.mac });
        }
        ends.claims.0 = files.by_ref().take(claims).map(IdentityClaim::of_descriptor).collect();
        if let (Some(options), Some(listener)) = (&identity.vsock, files.next()) {
            let socket = VsockSocket::handed_in(options.clone(), listener, files.next())?;
            ends.broker = socket.broker();
            ends.vsock = Some(VsockEnd { socket, reset });
        }
        ends.identity = identity;
        Ok(ends)
    }

    fn add_net(&mut self, net: &NetSpec, to: &To<'_>, mac: Option<Mac>) -> Result<(), IdentityError> {
        let (mac, claim) = match mac {
            Some(mac) => (mac, IdentityClaim::mac(mac)?),
            None => first_free(
                "MAC address",
                || Mac::random().map_err(IdentityError::Random),
                |mac| IdentityClaim::mac(*mac),
            )?,
        };
        self.claims.0.push(claim);
        let (backend, link) = match to {
            To::User(user) => {
                let (stream, pid) = user.start()?;
                (stream.into(), HostLink::User { pid })
            }
            // A known name is claimed before the interface is opened: opening one more queue of a
            // multi-queue interface would take part of another VM's packets.
            To::Tap(pattern) if pattern.contains("%d") => {
                let (tap, claim) = next_interface(pattern, usize::from(net.queues))?;
                self.add_interface(tap, claim)?
            }
            To::Tap(tap) => {
                let claim = IdentityClaim::interface(tap)?;
                self.add_interface(Tap::open(tap, usize::from(net.queues))?, claim)?
            }
        };
        self.identity.nets.push(NetIdentity { tap: backend.name().to_owned(), mac });
        self.nets.push(NetEnd { backend, mac });
        self.links.push(link);
        Ok(())
    }

    fn add_interface(&mut self, tap: Tap, claim: IdentityClaim) -> Result<(NetBackend, HostLink), IdentityError> {
        if tap.queues() > 1 {
            self.interface_claims.push(InterfaceClaim::beside(&claim, tap.name())?);
        }
        self.claims.0.push(claim);
        Ok(with_link(tap)?)
    }

    fn add_vsock(&mut self, options: VsockOptions, claim: IdentityClaim, child: bool) -> Result<(), IdentityError> {
        self.claims.0.push(claim);
        // Held while a dead socket is found and replaced, so that one of two processes finds the
        // other's live socket.
        let _lock = lock_directory(&options.socket);
        remove_dead(&options.socket);
        self.vsock = Some(VsockEnd { socket: VsockSocket::bind(&options)?, reset: child });
        self.identity.vsock = Some(options);
        Ok(())
    }
}

/// Opens an interface whose name the kernel chooses, and claims the name. An ending VM gives its
/// interface up before its claim: the kernel chooses that name again, and the claim fails.
fn next_interface(pattern: &str, queues: usize) -> Result<(Tap, IdentityClaim), IdentityError> {
    // Held meanwhile, so that the kernel chooses another name each time.
    let mut refused = Vec::new();
    loop {
        let tap = Tap::open(pattern, queues)?;
        match IdentityClaim::interface(tap.name()) {
            Err(IdentityError::Taken { .. }) if refused.len() < MAX_REFUSED => refused.push(tap),
            claim => return claim.map(|claim| (tap, claim)),
        }
    }
}

/// Returns an interface that is open, and its link.
fn with_link(tap: Tap) -> Result<(NetBackend, HostLink), TapError> {
    let what = "its index is not known";
    let index =
        link::index_of(tap.name()).map_err(|source| TapError::Refused { name: tap.name().to_owned(), what, source })?;
    Ok((tap.into(), HostLink::Interface { index }))
}

/// The pattern of a child's interface: its parent's, or the parent's name with another number. A
/// restored VM gets `clade%d`, because the name in its snapshot is another host's, or untrusted.
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
