//! The administrative state of the host's network interfaces.
//!
//! While an interface is down, the kernel refuses each packet that a process writes to its queues
//! (EIO), and queues none for it. Only a process with CAP_NET_ADMIN can change the state: a process
//! that has nothing but the queues of a TAP interface cannot.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netdevice, recv, sendto, socket_with};

const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const FLAGS: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
const UP: u32 = libc::IFF_UP as u32;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct ifinfomsg`.
const INFO: usize = 16;
/// Bytes of the largest answer: an error with the request and extended messages.
const MAX_ANSWER: usize = 4096;

fn routes() -> io::Result<OwnedFd> {
    // Protocol 0 is NETLINK_ROUTE.
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?)
}

/// Returns the index of the interface called `name`. Unlike the name, the kernel gives it to no
/// other interface.
///
/// # Errors
/// When there is no such interface.
pub fn index_of(name: &str) -> io::Result<u32> {
    Ok(netdevice::name_to_index(routes()?, name)?)
}

/// Takes the interface with this index up or down.
///
/// # Errors
/// When there is no such interface (ENODEV), or this process may not configure it (EPERM).
pub fn set_up(index: u32, is_up: bool) -> io::Result<()> {
    let routes = routes()?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&routes, &request(index, is_up), SendFlags::empty(), &kernel)?;
    answer(routes)
}

/// Returns a request for one interface: RTM_NEWLINK that changes IFF_UP alone.
fn request(index: u32, is_up: bool) -> [u8; HEADER + INFO] {
    let mut bytes = [0; HEADER + INFO];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &((HEADER + INFO) as u32).to_ne_bytes());
    put(4, &libc::RTM_NEWLINK.to_ne_bytes());
    put(6, &FLAGS.to_ne_bytes());
    // Behind the sequence number and the port come the family and the type, which stay 0.
    put(HEADER + 4, &index.to_ne_bytes());
    put(HEADER + 8, &(if is_up { UP } else { 0 }).to_ne_bytes());
    put(HEADER + 12, &UP.to_ne_bytes());
    bytes
}

/// Receives the kernel's answer: an error number, 0 for success.
fn answer(routes: impl AsFd) -> io::Result<()> {
    let mut bytes = [0; MAX_ANSWER];
    let (_, got) = recv(routes, &mut bytes[..], RecvFlags::empty())?;
    let number = |at: usize| bytes[..got.min(MAX_ANSWER)].get(at..at + 4).and_then(|part| part.try_into().ok());
    let kind = number(4).map(|part: [u8; 4]| u16::from_ne_bytes([part[0], part[1]]));
    match (kind, number(HEADER).map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => Err(io::Error::from_raw_os_error(-error)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_by_name_and_an_unknown_one_is_refused() {
        // The loopback interface is the first of every network namespace.
        assert_eq!(index_of("lo").unwrap(), 1);
        assert_eq!(index_of("clade-none").unwrap_err().raw_os_error(), Some(libc::ENODEV));
        // Beyond the largest index that the kernel gives.
        let refused = set_up(i32::MAX as u32, true).unwrap_err().raw_os_error();
        assert!(matches!(refused, Some(libc::ENODEV | libc::EPERM)), "{refused:?}");
    }
}
