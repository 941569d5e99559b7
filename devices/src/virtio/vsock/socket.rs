//! The host's end of a socket device: the listener for hosts, and the targets of the guest's
//! connections.
//!
//! The guest's connection to port N goes to a listener at the socket's path with `_N` appended. A
//! process that may open no sockets uses a broker: another process, at the other end of a socket
//! that preserves message boundaries (`SOCK_SEQPACKET`).
//!
//! | message | from | content |
//! |---|---|---|
//! | request | device | the port, 4 bytes |
//! | answer | broker | 0 and the connection; or the number of the error, 4 bytes |

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clade_host_io::{private_listener, seqpacket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::device::{Key, VsockError, VsockOptions};
use super::{FIRST_GUEST_CID, HOST_CID};

/// How long the device's thread waits for an answer to the request that it has just sent. After
/// that it checks for the answer from time to time, and the guest's other connections go on.
const ANSWER_WAIT: Duration = Duration::from_millis(20);
/// Bytes of a message.
const NUMBER: usize = 4;

/// How the guest's connections to ports of the host are made.
#[derive(Debug)]
enum HostPorts {
    /// By this process.
    Direct,
    /// Through the broker at the other end.
    Broker(BrokerSlot),
}

/// The broker of a socket device, which can be replaced. None once its process has ended, or has
/// sent an invalid answer. A slow broker stays.
#[derive(Clone, Debug, Default)]
pub struct BrokerSlot(Arc<Mutex<Option<BrokerClient>>>);

/// A broker, and its request. At most one request is pending, so that each answer belongs to a
/// known request, even a late answer.
#[derive(Debug)]
struct BrokerClient {
    socket: OwnedFd,
    /// The pending request: its connection, or None if the guest has given up the connection.
    asked: Option<Option<Key>>,
    /// Answers that arrived while waiting for the answer of another connection.
    answers: BTreeMap<Key, io::Result<Attempt>>,
}

impl BrokerSlot {
    fn broker(&self) -> MutexGuard<'_, Option<BrokerClient>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `broker` make the guest's connections from now on. Connections that wait for the broker
    /// before it are requested again.
    ///
    /// # Errors
    /// When `broker` is not a socket.
    pub fn put(&self, broker: OwnedFd) -> io::Result<()> {
        // With one pending request there is always room for the next.
        set_socket_timeout(&broker, Timeout::Send, Some(ANSWER_WAIT))?;
        *self.broker() = Some(BrokerClient { socket: broker, asked: None, answers: BTreeMap::new() });
        Ok(())
    }
}

impl BrokerClient {
    /// The answer for `key`, if it has arrived. Sends the request if necessary. An error of the
    /// broker itself is the outer one.
    fn dial(&mut self, key: Key) -> io::Result<io::Result<Attempt>> {
        if self.asked.is_some() && self.is_readable(Duration::ZERO)? {
            self.take_answer()?;
        }
        if !self.answers.contains_key(&key) && self.asked.is_none() {
            seqpacket::send(&self.socket, &key.0.to_le_bytes(), &[])?;
            self.asked = Some(Some(key));
            if self.is_readable(ANSWER_WAIT)? {
                self.take_answer()?;
            }
        }
        Ok(self.answers.remove(&key).unwrap_or(Ok(Attempt::Waiting)))
    }

    fn take_answer(&mut self) -> io::Result<()> {
        let answer = answer_of(&self.socket)?;
        if let Some(Some(key)) = self.asked.take() {
            self.answers.insert(key, answer);
        }
        Ok(())
    }

    /// Whether there is an answer, or the broker has gone.
    fn is_readable(&self, wait: Duration) -> io::Result<bool> {
        let wait = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&wait)) {
            // The next attempt looks again.
            Err(Errno::INTR) => Ok(false),
            ready => Ok(ready? > 0),
        }
    }

    /// Drops the answer for `key`, or the answer that is still to come.
    fn forget(&mut self, key: Key) {
        self.answers.remove(&key);
        if let Some(asked) = &mut self.asked
            && *asked == Some(key)
        {
            *asked = None;
        }
    }
}

/// The host's end of a socket device, bound and not yet served.
#[derive(Debug)]
pub struct VsockSocket {
    pub(super) options: VsockOptions,
    pub(super) listener: UnixListener,
    ports: HostPorts,
    /// Whether dropping this removes the socket's file.
    removes: bool,
}

fn check_cid(options: &VsockOptions) -> Result<(), VsockError> {
    const { assert!(HOST_CID < FIRST_GUEST_CID) };
    if (FIRST_GUEST_CID..u64::from(u32::MAX)).contains(&options.cid) {
        Ok(())
    } else {
        Err(VsockError::Cid { cid: options.cid })
    }
}

impl VsockSocket {
    /// Listens at `options.socket`, and removes it in the end.
    ///
    /// # Errors
    /// When the CID is reserved, or the socket cannot be made. A stale socket is not removed.
    pub fn bind(options: &VsockOptions) -> Result<Self, VsockError> {
        check_cid(options)?;
        // Whoever connects reaches the guest's services.
        let listener = private_listener(&options.socket, SocketType::STREAM, SocketFlags::empty())
            .map_err(|source| VsockError::Socket { path: options.socket.clone(), source })?;
        Ok(Self { options: options.clone(), listener: listener.into(), ports: HostPorts::Direct, removes: true })
    }

    /// A socket that another process has bound, and will remove. `broker` makes the guest's
    /// connections; without one they are refused.
    ///
    /// # Errors
    /// When the CID is reserved.
    pub fn handed_in(options: VsockOptions, listener: OwnedFd, broker: Option<OwnedFd>) -> Result<Self, VsockError> {
        check_cid(&options)?;
        let slot = BrokerSlot::default();
        let put = broker.map_or(Ok(()), |broker| slot.put(broker));
        put.map_err(|source| VsockError::Socket { path: options.socket.clone(), source })?;
        Ok(Self { options, listener: listener.into(), ports: HostPorts::Broker(slot), removes: false })
    }

    /// The slot of its broker, if it has one.
    #[must_use]
    pub fn broker(&self) -> Option<BrokerSlot> {
        match &self.ports {
            HostPorts::Direct => None,
            HostPorts::Broker(slot) => Some(slot.clone()),
        }
    }

    /// Gives up the listener for another process. From here on the caller removes the socket's
    /// file.
    ///
    /// # Errors
    /// When there is no free descriptor.
    pub fn hand_over(mut self) -> io::Result<OwnedFd> {
        let listener = self.listener.as_fd().try_clone_to_owned()?;
        self.removes = false;
        Ok(listener)
    }

    /// Connects to a port of the host for the guest's connection `key`, without blocking on its
    /// listener.
    pub(super) fn dial(&self, key: Key) -> io::Result<Attempt> {
        match &self.ports {
            HostPorts::Direct => attempt(&port_path(&self.options.socket, key.0)),
            HostPorts::Broker(slot) => {
                let mut broker = slot.broker();
                let Some(asked) = broker.as_mut().map(|broker| broker.dial(key)) else {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                };
                asked.unwrap_or_else(|error| {
                    tracing::warn!(%error, "guests' connections to the host are refused until there is another broker");
                    *broker = None;
                    Err(io::ErrorKind::ConnectionRefused.into())
                })
            }
        }
    }

    /// Forgets a dialled connection that is no longer wanted.
    pub(super) fn forget(&self, key: Key) {
        if let HostPorts::Broker(slot) = &self.ports
            && let Some(broker) = slot.broker().as_mut()
        {
            broker.forget(key);
        }
    }
}

impl Drop for VsockSocket {
    fn drop(&mut self) {
        if !self.removes {
            return;
        }
        let path = &self.options.socket;
        if let Err(error) = std::fs::remove_file(path) {
            tracing::debug!(%error, socket = %path.display(), "a socket stays behind");
        }
    }
}

/// The result of an attempt to connect.
#[derive(Debug)]
pub(super) enum Attempt {
    Connected(UnixStream),
    /// The backlog is full.
    Full,
    /// The broker has not answered yet.
    Waiting,
}

fn port_path(socket: &Path, port: u32) -> PathBuf {
    let mut path = OsString::from(socket);
    path.push(format!("_{port}"));
    path.into()
}

/// Connects to `path`, without blocking.
fn attempt(path: &Path) -> io::Result<Attempt> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => Ok(Attempt::Connected(UnixStream::from(socket))),
        Err(Errno::AGAIN) => Ok(Attempt::Full),
        Err(error) => Err(error.into()),
    }
}

/// Reads a broker's answer. An error of the broker itself is the outer one.
fn answer_of(broker: &OwnedFd) -> io::Result<io::Result<Attempt>> {
    let mut answer = seqpacket::receive(broker, NUMBER)?;
    let status = answer.bytes.first_chunk().map(|bytes| i32::from_le_bytes(*bytes));
    match (status, answer.files.pop()) {
        (Some(0), Some(connection)) => Ok(Ok(Attempt::Connected(connection.into()))),
        (Some(errno), None) if errno == Errno::AGAIN.raw_os_error() => Ok(Ok(Attempt::Full)),
        (Some(errno), None) if errno != 0 => Ok(Err(io::Error::from_raw_os_error(errno))),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Handles one request as a broker: answers a request received over `device`, for the guest whose
/// socket is at `socket`. Connects only to that guest's listeners, for any request.
///
/// # Errors
/// When the device's process has gone, or sends an invalid request.
pub fn answer_broker(device: impl AsFd, socket: &Path) -> io::Result<()> {
    let request = seqpacket::receive(&device, NUMBER)?.bytes;
    let port = u32::from_le_bytes(*request.first_chunk().ok_or(io::ErrorKind::InvalidData)?);
    let (status, connection) = match attempt(&port_path(socket, port)) {
        Ok(Attempt::Connected(connection)) => (0, Some(connection)),
        Ok(Attempt::Full | Attempt::Waiting) => (Errno::AGAIN.raw_os_error(), None),
        Err(error) => (error.raw_os_error().unwrap_or(libc::ECONNREFUSED), None),
    };
    let files: Vec<_> = connection.iter().map(AsFd::as_fd).collect();
    seqpacket::send(device, &i32::to_le_bytes(status), &files)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use clade_test_support::wait_for;

    use super::*;

    fn handed(dir: &Path, broker: Option<OwnedFd>) -> VsockSocket {
        let options = VsockOptions { cid: 7, socket: dir.join("v") };
        let bound = VsockSocket::bind(&options).unwrap();
        let listener = bound.hand_over().unwrap();
        VsockSocket::handed_in(options, listener, broker).unwrap()
    }

    #[test]
    fn the_socket_is_its_owners_alone() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let options = VsockOptions { cid: 7, socket: dir.path().join("v") };
        let socket = VsockSocket::bind(&options).unwrap();
        let mode = std::fs::metadata(&options.socket).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        let client = UnixStream::connect(&options.socket).unwrap();
        socket.listener.accept().unwrap();
        // As before, a socket's file is not replaced.
        let taken = VsockSocket::bind(&options).unwrap_err();
        assert!(
            matches!(&taken, VsockError::Socket { source, .. } if source.kind() == io::ErrorKind::AddrInUse),
            "{taken:?}"
        );
        drop((client, socket));
        assert!(!options.socket.exists());
    }

    #[test]
    fn a_broker_connects_to_the_guests_listeners_and_to_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = seqpacket::pair().unwrap();
        let socket = handed(dir.path(), Some(theirs));
        let path = dir.path().join("v");
        let broker = thread::spawn(move || while answer_broker(&ours, &path).is_ok() {});
        let missing = dial(&socket, (5, 1)).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(dir.path().join("v_5")).unwrap();
        assert!(matches!(dial(&socket, (5, 1)), Ok(Attempt::Connected(_))));
        listener.accept().unwrap();
        assert!(dir.path().join("v").exists(), "whoever bound it removes it");
        drop(socket);
        assert!(dir.path().join("v").exists());
        broker.join().unwrap();
    }

    /// Dials until there is an answer.
    fn dial(socket: &VsockSocket, key: Key) -> io::Result<Attempt> {
        wait_for("the broker's answer", || match socket.dial(key) {
            Ok(Attempt::Waiting) => None,
            answer => Some(answer),
        })
    }

    #[test]
    fn a_broker_that_stands_still_keeps_its_place_and_answers_every_connection() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = seqpacket::pair().unwrap();
        let socket = handed(dir.path(), Some(theirs));
        let path = dir.path().join("v");
        let (gate, opened) = std::sync::mpsc::channel::<()>();
        let broker = thread::spawn(move || {
            // The supervisor is stopped until the gate opens.
            opened.recv().unwrap();
            while answer_broker(&ours, &path).is_ok() {}
        });
        let listeners = [5, 6].map(|port| UnixListener::bind(dir.path().join(format!("v_{port}"))).unwrap());
        // More attempts than fit into a second, after which a broker was once given up.
        for _ in 0..100 {
            for key in [(5, 1), (6, 1), (5, 2), (7, 1)] {
                assert!(matches!(socket.dial(key), Ok(Attempt::Waiting)), "{key:?}");
            }
        }
        // The guest has given up the connection whose request is pending, and opens it anew.
        socket.forget((5, 1));
        gate.send(()).unwrap();
        for key in [(6, 1), (5, 2), (5, 1)] {
            assert!(matches!(dial(&socket, key), Ok(Attempt::Connected(_))), "{key:?}");
        }
        assert_eq!(dial(&socket, (7, 1)).unwrap_err().kind(), io::ErrorKind::NotFound);
        listeners.iter().for_each(|listener| drop(listener.accept().unwrap()));
        drop(socket);
        broker.join().unwrap();
    }

    #[test]
    fn without_a_broker_and_after_a_wrong_answer_connections_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let without = handed(dir.path(), None);
        assert_eq!(without.dial((5, 1)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(without);
        std::fs::remove_file(dir.path().join("v")).unwrap();
        let (ours, theirs) = seqpacket::pair().unwrap();
        let socket = handed(dir.path(), Some(theirs));
        // An answer that announces a connection and sends none. The next answer belongs to no
        // request.
        for status in [0i32, libc::ENOENT] {
            seqpacket::send(&ours, &status.to_le_bytes(), &[]).unwrap();
        }
        for _ in 0..2 {
            assert_eq!(socket.dial((5, 1)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
        // A new broker takes its place.
        let (ours, theirs) = seqpacket::pair().unwrap();
        socket.broker().unwrap().put(theirs).unwrap();
        let path = dir.path().join("v");
        let broker = thread::spawn(move || answer_broker(&ours, &path));
        let listener = UnixListener::bind(dir.path().join("v_5")).unwrap();
        assert!(matches!(dial(&socket, (5, 1)), Ok(Attempt::Connected(_))));
        listener.accept().unwrap();
        broker.join().unwrap().unwrap();
    }
}
