//! Claims on values that are unique on a host: interface names, MAC addresses, CIDs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use clade_devices::virtio::net::Mac;
use clade_devices::virtio::vsock::FIRST_GUEST_CID;
use clade_host_io::link;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

use crate::vm::identity::IdentityError;

/// The number of values tried before [`IdentityError::NoneFree`].
const TRIES: u64 = 1 << 16;
/// A TAP interface in the errors and names of claims.
const INTERFACE: &str = "TAP interface";

/// A value that no other VM of this host has, held as the name of an abstract socket. The kernel
/// keeps these names per network namespace, like interfaces, and frees them at any end of the
/// process.
#[derive(Debug)]
pub(super) struct IdentityClaim {
    held: OwnedFd,
}

/// A claim on a TAP interface beside the one of its VM: the interface is taken until both are dropped.
///
/// Any process with the rights opens one more queue of a multi-queue interface, and gets part of the packets. A
/// compromised process of a VM can drop its own claim and keep its queues, so whoever has started it holds another one
/// until the process has ended or the interface is gone.
#[derive(Debug)]
pub struct InterfaceClaim {
    interface: String,
    /// Its index: an interface that is made later has another.
    index: u32,
    _held: OwnedFd,
}

impl InterfaceClaim {
    pub(super) fn beside(claim: &IdentityClaim, interface: &str) -> Result<Self, IdentityError> {
        let failed = |source| IdentityError::Claim { what: INTERFACE, value: interface.to_owned(), source };
        let index = link::index_of(interface).map_err(failed)?;
        Ok(Self { interface: interface.to_owned(), index, _held: claim.held.try_clone().map_err(failed)? })
    }

    /// Returns whether the interface is gone. One that was not made persistent is there while any process has a queue.
    #[must_use]
    pub fn is_over(&self) -> bool {
        link::index_of(&self.interface)
            .map_or_else(|error| error.raw_os_error() == Some(libc::ENODEV), |index| index != self.index)
    }

    /// Returns the interface's name.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }
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
        Self::new(INTERFACE, name)
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

/// Claims a free CID after the parent's. Counted for the whole process, so that each of a
/// thousand children does not try a thousand CIDs.
pub(super) fn next_cid(parent: u64) -> Result<(u64, IdentityClaim), IdentityError> {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    // Relaxed: the number publishes no other data.
    let candidate = || Ok(cid_after(parent, COUNT.fetch_add(1, Ordering::Relaxed)));
    first_free("CID", candidate, |cid| IdentityClaim::cid(*cid))
}

/// Returns the guest's CID that comes `count` after `cid`. The first comes after the last: a VM with a high CID has
/// children, too.
fn cid_after(cid: u64, count: u64) -> u64 {
    // All bits set stand for any CID.
    const GUESTS: u64 = u32::MAX as u64 - FIRST_GUEST_CID;
    FIRST_GUEST_CID + (cid.saturating_sub(FIRST_GUEST_CID) % GUESTS + count % GUESTS) % GUESTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_have_the_cids_of_guests_whatever_their_parents() {
        let last = u64::from(u32::MAX) - 1;
        for (cid, count, after) in [
            (FIRST_GUEST_CID, 1, FIRST_GUEST_CID + 1),
            (100, 17, 117),
            (last - 1, 1, last),
            (last, 1, FIRST_GUEST_CID),
            (last, 2, FIRST_GUEST_CID + 1),
            (FIRST_GUEST_CID, u64::from(u32::MAX) - FIRST_GUEST_CID, FIRST_GUEST_CID),
            (0, 0, FIRST_GUEST_CID),
        ] {
            assert_eq!(cid_after(cid, count), after, "{count} after {cid}");
        }
        let guests = FIRST_GUEST_CID..=last;
        let of = |parent| next_cid(parent).unwrap();
        let (high, low) = (of(last), of(FIRST_GUEST_CID));
        assert!(guests.contains(&high.0) && guests.contains(&low.0) && high.0 != low.0, "{high:?} {low:?}");
    }
}
