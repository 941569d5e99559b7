//! Claims on values that are unique on a host: interface names, MAC addresses, CIDs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use clade_devices::virtio::net::Mac;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

use crate::vm::identity::IdentityError;

/// The number of values tried before [`IdentityError::NoneFree`].
const TRIES: u64 = 1 << 16;

/// A value that no other VM of this host has, held as the name of an abstract socket. The kernel
/// keeps these names per network namespace, like interfaces, and frees them at any end of the
/// process.
#[derive(Debug)]
pub(super) struct IdentityClaim {
    held: OwnedFd,
}

/// Takes an abstract name. With a stream socket, which cannot send: a process that may not open
/// sockets gets it, and a datagram socket can send to any address.
fn hold(name: &str) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    Ok(socket)
}

impl IdentityClaim {
    fn new(what: &'static str, value: &str) -> Result<Self, IdentityError> {
        let held = hold(&format!("clade/{what}/{value}"));
        match held {
            Ok(held) => Ok(Self { held }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(IdentityError::Taken { what, value: value.to_owned() })
            }
            Err(source) => Err(IdentityError::Claim { what, value: value.to_owned(), source }),
        }
    }

    /// The descriptor that holds the claim, valid in any process.
    pub(super) fn into_descriptor(self) -> OwnedFd {
        self.held
    }

    pub(super) fn of_descriptor(held: OwnedFd) -> Self {
        Self { held }
    }

    pub(super) fn mac(mac: Mac) -> Result<Self, IdentityError> {
        Self::new("MAC address", &mac.to_string())
    }

    pub(super) fn interface(name: &str) -> Result<Self, IdentityError> {
        Self::new("TAP interface", name)
    }

    pub(super) fn cid(cid: u64) -> Result<Self, IdentityError> {
        Self::new("CID", &cid.to_string())
    }
}

/// Claims one candidate after another, until one is free.
pub(super) fn first_free<T>(
    what: &'static str,
    mut candidate: impl FnMut() -> Result<T, IdentityError>,
    claim: impl Fn(&T) -> Result<IdentityClaim, IdentityError>,
) -> Result<(T, IdentityClaim), IdentityError> {
    for _ in 0..TRIES {
        let value = candidate()?;
        match claim(&value) {
            Err(IdentityError::Taken { .. }) => {}
            other => return other.map(|claim| (value, claim)),
        }
    }
    Err(IdentityError::NoneFree { what, tries: TRIES })
}

/// Claims the next free CID after the parent's. Counted for the whole process, so that each of a
/// thousand children does not try a thousand CIDs.
pub(super) fn next_cid(parent: u64) -> Result<(u64, IdentityClaim), IdentityError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let candidate = || {
        // Relaxed: if two threads get the same number, the second cannot claim it.
        NEXT.fetch_max(parent + 1, Ordering::Relaxed);
        Ok(NEXT.fetch_add(1, Ordering::Relaxed))
    };
    first_free("CID", candidate, |cid| IdentityClaim::cid(*cid))
}
