//! Messages to a service manager: datagrams to the socket that it names in the environment
//! (`sd_notify(3)`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The variable with the socket's path. One that begins with `@` is an abstract name.
const SOCKET: &str = "NOTIFY_SOCKET";

/// The process serves.
pub(super) const READY: &str = "READY=1";
/// The process ends.
pub(super) const STOPPING: &str = "STOPPING=1";

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes().split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// Sends a state to the service manager, if there is one. A failure is a warning: the service runs
/// all the same.
pub(super) fn notify(state: &str) {
    let Some(socket) = std::env::var_os(SOCKET).filter(|socket| !socket.is_empty()) else { return };
    if let Err(error) = send(&socket, state) {
        tracing::warn!(%error, socket = %socket.display(), state, "cannot notify the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_with_a_path_and_abstract_ones_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("clade-notify-{}", std::process::id());
        let bound = SocketAddr::from_abstract_name(&name).unwrap();
        let sockets = [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (UnixDatagram::bind_addr(&bound).unwrap(), format!("@{name}").into()),
        ];
        for (socket, named) in sockets {
            send(&named, READY).unwrap();
            let mut text = [0; 32];
            let length = socket.recv(&mut text).unwrap();
            assert_eq!(&text[..length], READY.as_bytes());
        }
        assert!(send(OsStr::new("/nonexistent/notify"), READY).is_err());
    }
}
