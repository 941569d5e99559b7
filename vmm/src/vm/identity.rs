//! What tells a VM apart from every other on its network: interfaces, addresses, sockets.
//!
//! A fork copies everything but these. They are taken before there is the child, and before its parent is paused: making an interface waits for
//! locks of the kernel's, and one that cannot be had must cost nobody anything (I13).

use std::fs::{self, File};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clade_devices::virtio::net::Mac;
use clade_devices::virtio::vsock::{HOST_CID, Vsock, VsockError, VsockOptions};
use clade_io::{Tap, TapError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::vm::config::{NetSpec, VmConfig};

/// Stands for a child's name in the path of its socket.
const NAME: &str = "{name}";
/// Longest name of an interface that is made up here, before its number: 15 bytes in all, and room for 9,999.
const MAX_STEM: usize = 11;
/// Addresses that are tried before it is said that none is free.
const TRIES: u64 = 1 << 16;
/// How long another process may take to look whether a socket is a dead one's.
const TIMEOUT: Duration = Duration::from_secs(1);

/// An interface and the address behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetIdentity {
    /// The TAP interface's name on the host.
    pub tap: String,
    /// The guest's address, as its device says it.
    pub mac: Mac,
}

/// What is a VM's alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// By network device.
    pub nets: Vec<NetIdentity>,
    /// The socket device's address and socket.
    pub vsock: Option<VsockOptions>,
}

impl Identity {
    /// Forgets what it says of the host: names of interfaces, the socket's place, and how addresses
    /// are counted. A snapshot is not believed in
    /// that, because whoever wrote it would choose names and places of this host. Children have
    /// their sockets in `sockets`.
    pub(crate) fn forget_host(&mut self, sockets: Option<&Path>) {
        self.nets.iter_mut().for_each(|net| net.tap.clear());
        if let Some(vsock) = &mut self.vsock {
            vsock.socket = sockets.map_or_else(PathBuf::new, |dir| dir.join("saved.vsock"));
            vsock.cid = HOST_CID;
        }
    }
}

/// What is chosen for a child's network device. The rest is made up: another interface of the parent's pattern, a random address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetChoice {
    /// The interface; `%d` stands for a number that is free.
    #[serde(default)]
    pub tap: Option<String>,
    /// The address.
    #[serde(default)]
    pub mac: Option<Mac>,
}

/// What is chosen for a child's socket device. The rest is made up: the next address that is free, and `NAME.vsock` beside the parent's socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockChoice {
    /// The address.
    #[serde(default)]
    pub cid: Option<u64>,
    /// The socket; `{name}` stands for the child's name.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// What is chosen for a child.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChildIdentity {
    /// By network device; fewer than there are leave the rest as they come.
    #[serde(default)]
    pub nets: Vec<NetChoice>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<VsockChoice>,
}

/// What cannot be a VM's alone.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// Somebody has it.
    #[error("the {what} {value} is another VM's")]
    Taken {
        /// What kind of thing.
        what: &'static str,
        /// Which.
        value: String,
    },
    /// It cannot be seen whether somebody has it.
    #[error("the {what} {value} cannot be claimed")]
    Claim {
        /// What kind of thing.
        what: &'static str,
        /// Which.
        value: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// None is left.
    #[error("no {what} is free after {tries} tries")]
    NoneFree {
        /// What kind of thing.
        what: &'static str,
        /// How many were tried.
        tries: u64,
    },
    /// Chosen for devices that are not there.
    #[error("{chosen} network interfaces are chosen for a VM with {there}")]
    Interfaces {
        /// How many.
        chosen: usize,
        /// Of how many.
        there: usize,
    },
    /// Chosen for a device that is not there.
    #[error("a CID or a socket ({choice:?}) is chosen for a VM without a socket device")]
    NoVsock {
        /// What was chosen.
        choice: VsockChoice,
    },
    /// There is no parent beside whose socket it could be.
    #[error("no socket is chosen for the socket device of {name}, which is restored: choose one (--vsock socket=PATH)")]
    NoSocket {
        /// The VM.
        name: String,
    },
    /// No address.
    #[error("no random bytes for an address")]
    Random(#[source] io::Error),
    /// See [`TapError`].
    #[error(transparent)]
    Tap(#[from] TapError),
    /// See [`VsockError`].
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

impl ChildIdentity {
    /// Whether the child's socket has a path made of the child's name, so that another name is another path.
    #[must_use]
    pub fn names_socket(&self) -> bool {
        let chosen = self.vsock.as_ref().and_then(|choice| choice.socket.as_deref());
        chosen.is_none_or(|path| path.to_str().is_some_and(|path| path.contains(NAME)))
    }
}

impl IdentityError {
    /// Whether a socket's path is in use already.
    #[must_use]
    pub fn is_socket_taken(&self) -> bool {
        matches!(self, Self::Vsock(VsockError::Socket { source, .. }) if source.kind() == io::ErrorKind::AddrInUse)
    }

    /// Whether another choice would do, as against a host that cannot.
    #[must_use]
    pub fn is_choice(&self) -> bool {
        !matches!(self, Self::Claim { .. } | Self::Random(_))
    }
}

/// A value that no other VM of this host has: a name in the kernel's list of abstract sockets, of which there is one a network namespace, as
/// there is of interfaces. It goes with the process however that ends.
#[derive(Debug)]
struct Claim {
    _held: UnixDatagram,
}

impl Claim {
    fn new(what: &'static str, value: &str) -> Result<Self, IdentityError> {
        let held = SocketAddr::from_abstract_name(format!("clade/{what}/{value}"))
            .and_then(|address| UnixDatagram::bind_addr(&address));
        match held {
            Ok(held) => Ok(Self { _held: held }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(IdentityError::Taken { what, value: value.to_owned() })
            }
            Err(source) => Err(IdentityError::Claim { what, value: value.to_owned(), source }),
        }
    }

    fn mac(mac: Mac) -> Result<Self, IdentityError> {
        Self::new("MAC address", &mac.to_string())
    }

    fn interface(name: &str) -> Result<Self, IdentityError> {
        Self::new("TAP interface", name)
    }

    fn cid(cid: u64) -> Result<Self, IdentityError> {
        Self::new("CID", &cid.to_string())
    }
}

/// Claims what `candidates` come up with, until one is free.
fn first_free<T>(
    what: &'static str,
    mut candidate: impl FnMut() -> Result<T, IdentityError>,
    claim: impl Fn(&T) -> Result<Claim, IdentityError>,
) -> Result<(T, Claim), IdentityError> {
    for _ in 0..TRIES {
        let value = candidate()?;
        match claim(&value) {
            Err(IdentityError::Taken { .. }) => {}
            other => return other.map(|claim| (value, claim)),
        }
    }
    Err(IdentityError::NoneFree { what, tries: TRIES })
}

/// The end of a network device on the host.
#[derive(Debug)]
pub(crate) struct NetEnd {
    pub(crate) tap: Tap,
    pub(crate) mac: Mac,
}

/// What a VM-to-be has taken. Dropped, it is everybody's again.
#[derive(Debug, Default)]
pub struct Endpoints {
    pub(crate) nets: Vec<NetEnd>,
    pub(crate) vsock: Option<Vsock>,
    pub(crate) identity: Identity,
    pub(crate) claims: Claims,
}

/// Held for as long as the VM lives.
#[derive(Debug, Default)]
pub(crate) struct Claims(Vec<Claim>);

impl Endpoints {
    /// What they are.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// For a VM that is booted: what its configuration says.
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

    /// For a child called `name` of the VM that `parent` tells apart.
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
        // Before it is opened if the name is known: one more queue of an interface that has several would take part of another VM's packets.
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
        // Held while a dead socket is looked for and replaced, so that of two processes one finds the other's.
        let _turn = turn(&options.socket);
        remove_dead(&options.socket);
        self.vsock = Some(Vsock::new(&options, child)?);
        self.identity.vsock = Some(options);
        Ok(())
    }
}

/// The pattern of a child's interface: its parent's, or the parent's name with another number. Of a
/// restored VM, whose parent had its name on another
/// host or is not to be believed, our own.
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

/// The next address after the parent's that nobody has. Counted for the whole process, so that a thousand children do not each try a thousand.
fn next_cid(parent: u64) -> Result<(u64, Claim), IdentityError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let candidate = || {
        // Relaxed: a number that two threads get is one that the second cannot claim.
        NEXT.fetch_max(parent + 1, Ordering::Relaxed);
        Ok(NEXT.fetch_add(1, Ordering::Relaxed))
    };
    first_free("CID", candidate, |cid| Claim::cid(*cid))
}

/// Lets one process at a time look at the sockets beside `socket`. Without it, if it does not come: what is at the path then stays.
fn turn(socket: &Path) -> Option<File> {
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

/// Removes a socket that nobody answers at: a process that was killed leaves it behind.
fn remove_dead(socket: &Path) {
    if fs::symlink_metadata(socket).is_ok_and(|found| found.file_type().is_socket())
        && UnixStream::connect(socket).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        // If it stays, the bind that follows says so.
        let _ = fs::remove_file(socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_get_interfaces_named_like_their_parents() {
        let rows = [
            ("web%d", "web7", "web%d"),
            ("web0", "web0", "web%d"),
            ("tap", "tap", "tap%d"),
            ("eth%d", "", "clade%d"),
            ("eth0", "", "clade%d"),
            ("123", "123", "clade%d"),
            ("abcdefghijklmno", "abcdefghijklmno", "abcdefghijk%d"),
        ];
        for (configured, own, wanted) in rows {
            assert_eq!(pattern(configured, own), wanted);
        }
    }

    fn config(socket: &Path, cid: u64) -> VmConfig {
        let mut config = VmConfig::new(1 << 20, 1).unwrap();
        config.vsock = Some(VsockOptions { cid, socket: socket.to_owned() });
        config
    }

    #[test]
    fn nobody_shares_an_address_or_a_socket() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("parent.vsock");
        let cid = 0x7000_0000 | u64::from(std::process::id());
        let config = config(&socket, cid);
        let parent = Endpoints::boot(&config).unwrap();
        let again = Endpoints::boot(&config).unwrap_err().to_string();
        assert_eq!(again, format!("the CID {cid} is another VM's"));

        let child = |name: &str, choice: &ChildIdentity| Endpoints::child(&config, parent.identity(), name, choice);
        let none = ChildIdentity::default();
        let (one, two) = (child("one", &none).unwrap(), child("two", &none).unwrap());
        let vsock = |ends: &Endpoints| ends.identity().vsock.clone().unwrap();
        assert_eq!(vsock(&one).socket, dir.path().join("one.vsock"));
        let cids = [cid, vsock(&one).cid, vsock(&two).cid];
        assert!(cids[0] < cids[1] && cids[1] < cids[2], "{cids:?}");

        let choose = |cid, socket: Option<&str>| ChildIdentity {
            vsock: Some(VsockChoice { cid, socket: socket.map(|name| dir.path().join(name)) }),
            ..ChildIdentity::default()
        };
        let refused = child("three", &choose(Some(cids[1]), None)).unwrap_err().to_string();
        assert!(refused.contains(&cids[1].to_string()), "{refused}");
        let refused = child("three", &choose(None, Some("{name}.vsock"))).map(|ends| vsock(&ends).socket);
        assert_eq!(refused.unwrap(), dir.path().join("three.vsock"), "made, and dropped again");
        let refused = child("four", &choose(None, Some("one.vsock"))).unwrap_err().to_string();
        assert!(refused.contains("one.vsock"), "{refused}");
        let refused = child("five", &ChildIdentity { nets: vec![NetChoice::default()], vsock: None });
        assert_eq!(refused.unwrap_err().to_string(), "1 network interfaces are chosen for a VM with 0");

        let left = || fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left(), 3, "what was refused left nothing");
        drop((one, two, parent));
        assert_eq!(left(), 0);
        // And the address is free again.
        drop(Endpoints::boot(&config).unwrap());
    }

    /// What a snapshot may say: a socket and interfaces of the host's choice, and an address behind
    /// which there is none.
    #[test]
    fn what_a_snapshot_says_of_the_host_is_not_believed() {
        let (victim, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = config(&victim.path().join("vm.vsock"), u64::MAX);
        let mut saved = Identity {
            nets: vec![NetIdentity { tap: "eth0".to_owned(), mac: Mac([2, 0, 0, 0, 0, 1]) }],
            vsock: config.vsock.clone(),
        };
        saved.forget_host(None);
        assert_eq!(saved.nets[0].tap, "");
        let none = ChildIdentity::default();
        let refused = Endpoints::child(&config, &saved, "vm", &none).unwrap_err();
        assert!(matches!(&refused, IdentityError::NoSocket { name } if name == "vm"), "{refused}");
        let choice = VsockChoice { cid: None, socket: Some(ours.path().join("chosen")) };
        let chosen = ChildIdentity { vsock: Some(choice), ..ChildIdentity::default() };
        let made = Endpoints::child(&config, &saved, "vm", &chosen).unwrap();
        assert_eq!(made.identity().vsock.as_ref().unwrap().socket, ours.path().join("chosen"));
        saved.forget_host(Some(ours.path()));
        let made = Endpoints::child(&config, &saved, "vm", &none).unwrap();
        assert_eq!(made.identity().vsock.as_ref().unwrap().socket, ours.path().join("vm.vsock"));
        assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vm.vsock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let cid = 0x6000_0000 | u64::from(std::process::id());
        drop(Endpoints::boot(&config(&socket, cid)).unwrap());
        fs::write(&socket, "a file").unwrap();
        let refused = Endpoints::boot(&config(&socket, cid)).unwrap_err().to_string();
        assert!(refused.contains("vm.vsock"), "{refused}");
        assert_eq!(fs::read_to_string(&socket).unwrap(), "a file");
    }

    #[test]
    fn a_choice_for_what_is_not_there_is_refused() {
        let bare = VmConfig::new(1 << 20, 1).unwrap();
        let choice = VsockChoice { cid: Some(77), socket: None };
        let choice = ChildIdentity { vsock: Some(choice), ..ChildIdentity::default() };
        let refused = Endpoints::child(&bare, &Identity::default(), "child", &choice).unwrap_err().to_string();
        assert!(refused.contains("77"), "{refused}");
    }
}
