//! The host's end of a guest's network.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use clade_host_io::{Tap, TapError};
use clade_vmm::vm::IdentityError;

use crate::skip;

/// `struct ifreq` with an address, or flags.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: [u8; 24],
}

/// A network with a TAP interface and the guest behind it. No other test of the host has it while
/// this value lives. The interface loses its address when it is dropped.
#[derive(Debug)]
pub struct Subnet(clade_test_support::Subnet);

impl Subnet {
    /// Takes a network.
    #[must_use]
    pub fn take() -> Self {
        Self(clade_test_support::Subnet::take())
    }

    /// Returns the host's address.
    #[must_use]
    pub fn host(&self) -> Ipv4Addr {
        self.0.address(1).into()
    }

    /// Returns the guest's address.
    #[must_use]
    pub fn guest(&self) -> Ipv4Addr {
        self.0.address(2).into()
    }

    /// Gives the interface `tap` the host's address, and brings it up.
    ///
    /// # Panics
    /// When it cannot be done.
    pub fn bring_up(&self, tap: &str) {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket to ask with");
        let address = |ip: Ipv4Addr| {
            let mut value = [0; 24];
            value[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            value[4..8].copy_from_slice(&ip.octets());
            value
        };
        let mut flags = [0; 24];
        flags[..2].copy_from_slice(&((libc::IFF_UP | libc::IFF_RUNNING) as u16).to_ne_bytes());
        for (what, value) in [
            (libc::SIOCSIFADDR, address(self.host())),
            (libc::SIOCSIFNETMASK, address(Ipv4Addr::new(255, 255, 255, 0))),
            (libc::SIOCSIFFLAGS, flags),
        ] {
            let mut request = Request { name: [0; libc::IFNAMSIZ], value };
            request.name[..tap.len()].copy_from_slice(tap.as_bytes());
            // SAFETY: the request is a `struct ifreq`, which is 40 bytes, and outlives the call.
            let done = unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut request) };
            assert_eq!(done, 0, "{tap}: {what:#x}: {}", io::Error::last_os_error());
        }
    }
}

/// Returns whether this host permits TAP interfaces; prints the reason otherwise.
#[must_use]
pub fn can_have_taps() -> bool {
    match Tap::open("cladep%d", 1) {
        Ok(_) => true,
        Err(error @ TapError::Refused { .. }) => {
            skip("tap", &clade_vmm::error_chain(&IdentityError::from(error)));
            false
        }
        Err(error) => panic!("{error}"),
    }
}
