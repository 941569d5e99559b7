//! Claims on values that are unique on a host: interface names, MAC addresses, CIDs.

use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU64, Ordering};

use clade_devices::virtio::net::Mac;

use crate::vm::identity::IdentityError;

/// The number of values tried before [`IdentityError::NoneFree`].
const TRIES: u64 = 1 << 16;

/// A value that no other VM of this host has. It is held as the name of an abstract socket. The
/// kernel keeps these per network namespace, like interfaces, and frees the name however the
/// process ends.
#[derive(Debug)]
pub(super) struct Claim {
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

    /// The descriptor that holds it: it may be in any process.
    pub(super) fn into_descriptor(self) -> OwnedFd {
        self._held.into()
    }

    pub(super) fn of_descriptor(held: OwnedFd) -> Self {
        Self { _held: held.into() }
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

/// Claims the next free CID after the parent's. Counted for the whole process, so that each of a
/// thousand children does not try a thousand CIDs.
pub(super) fn next_cid(parent: u64) -> Result<(u64, Claim), IdentityError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let candidate = || {
        // Relaxed: if two threads get one number, the second cannot claim it.
        NEXT.fetch_max(parent + 1, Ordering::Relaxed);
        Ok(NEXT.fetch_add(1, Ordering::Relaxed))
    };
    first_free("CID", candidate, |cid| Claim::cid(*cid))
}
