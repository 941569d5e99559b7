//! The identity of a VM on its network: interfaces, addresses, sockets.
//!
//! A fork copies everything but these. A child's own are taken before the child is made, and before
//! its parent is paused: creating an interface waits for locks of the kernel, and a failure must
//! not affect any VM (I13).
//!
//! | file | contents |
//! |---|---|
//! | `endpoints` | taking interfaces, addresses and sockets for a VM to be made |
//! | `user_net` | a network by passt, without an interface of the host's |
//! | `spawn` | starting passt with default signals |
//! | `claim` | holding an address or a name against other VMs of the host |
//! | `generation` | the generation id, by which a guest detects that it was cloned |

mod claim;
mod endpoints;
pub(crate) mod generation;
mod spawn;
pub mod user_net;

use std::io;
use std::path::{Path, PathBuf};

use clade_devices::virtio::net::{EgressRule, Link, Mac};
use clade_devices::virtio::vsock::{HOST_CID, VsockError, VsockOptions};
use clade_host_io::TapError;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use claim::InterfaceClaim;
pub(crate) use endpoints::Claims;
pub use endpoints::{EndpointParts, Endpoints, HostLink};
pub use generation::{GenerationError, GenerationId};
pub use user_net::{PortForward, UserNet, UserNetError};

/// Stands for a child's name in the path of its socket.
const NAME: &str = "{name}";

/// An interface and the MAC address of its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetIdentity {
    /// The TAP interface's name on the host. Empty if the network is passt's.
    pub tap: String,
    /// The MAC address that the device gives the guest.
    pub mac: Mac,
}

/// The interfaces and addresses of a VM, which no other VM has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Interface and address of each network device.
    pub nets: Vec<NetIdentity>,
    /// CID and socket of the socket device, if there is one.
    pub vsock: Option<VsockOptions>,
}

impl Identity {
    /// Clears the values that belong to a host: names of interfaces, the socket's path, and the CID
    /// from which children's are counted. A snapshot is not trusted with these, because its author
    /// would choose names and paths of this host. Children have their sockets in `sockets`.
    pub(crate) fn forget_host(&mut self, sockets: Option<&Path>) {
        self.nets.iter_mut().for_each(|net| net.tap.clear());
        if let Some(vsock) = &mut self.vsock {
            vsock.socket = sockets.map_or_else(PathBuf::new, |dir| dir.join("saved.vsock"));
            vsock.cid = HOST_CID;
        }
    }
}

/// Chosen values for a child's network device. Defaults: another interface of the parent's pattern,
/// and a random address.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct NetChoice {
    /// The TAP interface's name; `%d` stands for a free number.
    #[serde(default)]
    pub tap: Option<String>,
    /// The MAC address: unicast.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>, pattern = "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$"))]
    pub mac: Option<Mac>,
}

/// Chosen values for a child's socket device. Defaults: the next free CID, and `NAME.vsock` beside
/// the parent's socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct VsockChoice {
    /// The CID.
    #[serde(default)]
    pub cid: Option<u64>,
    /// The socket's path; `{name}` stands for the child's name.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub socket: Option<PathBuf>,
}

/// Chosen values for a child's identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChildIdentity {
    /// One entry per network device. Devices beyond the last entry have the defaults.
    #[serde(default)]
    pub nets: Vec<NetChoice>,
    /// Whether its network devices let packets pass. Default: as its parent's.
    #[serde(default)]
    pub network: Option<Link>,
    /// Egress rules in addition to the parent's, so that it can at most send where its parent may.
    #[serde(default)]
    pub egress: Vec<EgressRule>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<VsockChoice>,
}

/// Why an interface, address or socket cannot be taken for a VM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Another VM of the host has the value.
    #[error("{what} {value} is in use by another VM of this host")]
    Taken {
        /// The kind of value: `TAP interface`, `MAC address` or `CID`.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// The host cannot check whether another VM has the value.
    #[error("the {what} {value} cannot be claimed")]
    Claim {
        /// The kind of value: `TAP interface`, `MAC address` or `CID`.
        what: &'static str,
        /// The value.
        value: String,
        /// The error of the socket that holds a claim.
        #[source]
        source: io::Error,
    },
    /// No free value was found.
    #[error("no {what} is free after {tries} tries")]
    NoneFree {
        /// The kind of value.
        what: &'static str,
        /// Values that were tried.
        tries: u64,
    },
    /// More interfaces are chosen than the VM has network devices.
    #[error("{chosen} network interfaces are chosen for a VM with {there}")]
    Interfaces {
        /// Interfaces that are chosen.
        chosen: usize,
        /// Network devices of the VM.
        there: usize,
    },
    /// A CID or socket is chosen for a VM without a socket device.
    #[error("a CID or a socket ({choice:?}) is chosen for a VM without a socket device")]
    NoVsock {
        /// The choice.
        choice: VsockChoice,
    },
    /// The VM is restored, and no directory or path is given for its socket.
    #[error("no socket is chosen for the socket device of {name}, which is restored: choose one (--vsock socket=PATH)")]
    NoSocket {
        /// The VM's name.
        name: String,
    },
    /// Another process has taken them, and its descriptors do not match its description.
    #[error("{found} descriptors of {wanted} for interfaces and sockets")]
    Descriptors {
        /// Descriptors received.
        found: usize,
        /// Descriptors in the description.
        wanted: usize,
    },
    /// The host has no random bytes for a MAC address.
    #[error("no random bytes for an address")]
    Random(#[source] io::Error),
    /// The TAP interface could not be opened or made.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A network by passt is impossible.
    #[error(transparent)]
    UserNet(#[from] UserNetError),
    /// The socket device could not be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

impl IdentityError {
    /// Whether another choice may succeed. False if the host itself fails.
    #[must_use]
    pub fn is_choice(&self) -> bool {
        !matches!(self, Self::Claim { .. } | Self::Random(_) | Self::Descriptors { .. })
    }
}
