//! Sockets of this user alone.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Listens at `path` with a Unix socket of mode 0600. The socket has `flags`, and close-on-exec.
///
/// # Errors
/// When a file is there already, or the path is too long for a socket.
pub fn private_listener(path: &Path, kind: SocketType, flags: SocketFlags) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, kind, flags | SocketFlags::CLOEXEC, None)?;
    // The file gets the mode of the socket that is bound to it. So at no moment can others connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}
