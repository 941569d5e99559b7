//! Notices of the guest: what its service manager or its agent reports, by the protocol of
//! `sd_notify`: lines `NAME=VALUE`, here in a stream to [`NOTICE_PORT`] of the host. The device
//! answers this port itself, so that no process on the host need listen.
//!
//! systemd sends these when its credential `vmm.notify_socket` is `vsock-stream:2:49982`.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The host's port for notices.
pub const NOTICE_PORT: u32 = 49_982;
/// Bytes that a connection may send in all: the credit of one is never updated.
pub(super) const MAX_NOTICE: usize = 4 << 10;
/// Connections at a time.
const MAX_CONNECTIONS: usize = 8;
/// Longest kept status text, in bytes.
const MAX_TEXT: usize = 200;

/// How the main program of a guest has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestExit {
    /// The exit status: 128 and the signal's number after a signal.
    pub status: u8,
    /// The guest's text about it. May be empty.
    pub text: String,
}

/// What the guest has reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestNotice {
    /// Whether the guest is ready (`READY=1`).
    pub is_ready: bool,
    /// The end of its main program (`EXIT_STATUS=N`), with the last `STATUS=TEXT`.
    pub exit: Option<GuestExit>,
}

#[derive(Debug, Default)]
struct Inner {
    notice: GuestNotice,
    /// The guest's port and the bytes of each connection, the oldest first.
    received: VecDeque<(u32, Vec<u8>)>,
}

/// The guest has begun a connection again that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AlreadyOpen;

/// The notices of one guest. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Notices(Arc<Mutex<Inner>>);

impl Notices {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what the guest has reported.
    #[must_use]
    pub fn get(&self) -> GuestNotice {
        self.inner().notice.clone()
    }

    /// Begins a connection from the guest's `port`, unless it has begun. Returns the port of the
    /// connection that makes room for it, if one has to: programs of the guest may leave theirs open.
    pub(super) fn open(&self, port: u32) -> Result<Option<u32>, AlreadyOpen> {
        let mut inner = self.inner();
        if inner.received.iter().any(|(open, _)| *open == port) {
            return Err(AlreadyOpen);
        }
        let displaced = if inner.received.len() < MAX_CONNECTIONS { None } else { inner.received.pop_front() };
        inner.received.push_back((port, Vec::new()));
        Ok(displaced.map(|(port, _)| port))
    }

    pub(super) fn is_open(&self, port: u32) -> bool {
        self.inner().received.iter().any(|(open, _)| *open == port)
    }

    /// Takes bytes of a connection. Returns whether it may send them.
    pub(super) fn take(&self, port: u32, bytes: &[u8]) -> bool {
        let mut inner = self.inner();
        let found = inner.received.iter_mut().find(|(open, _)| *open == port);
        let Some((_, received)) = found.filter(|(_, all)| all.len() + bytes.len() <= MAX_NOTICE) else {
            return false;
        };
        received.extend_from_slice(bytes);
        true
    }

    /// Ends a connection: its lines are a notice.
    pub(super) fn close(&self, port: u32) {
        let mut inner = self.inner();
        let Some(at) = inner.received.iter().position(|(open, _)| *open == port) else { return };
        let Some((_, received)) = inner.received.remove(at) else { return };
        let text = String::from_utf8_lossy(&received);
        let value = |name: &str| text.lines().rev().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        inner.notice.is_ready |= value("READY") == Some("1");
        if let Some(status) = value("EXIT_STATUS").and_then(|status| status.trim().parse().ok()) {
            let text = value("STATUS")
                .unwrap_or_default()
                .chars()
                .filter(|c| !c.is_control() && !matches!(c, '\u{2028}' | '\u{2029}'));
            let text = text.scan(0, |len, c| {
                Some(c).filter(|c| {
                    *len += c.len_utf8();
                    *len <= MAX_TEXT
                })
            });
            inner.notice.exit = Some(GuestExit { status, text: text.collect() });
        }
    }

    /// Forgets all connections, which the guest does not know any more, and the notices of a guest
    /// that has gone.
    pub(super) fn clear(&self) {
        *self.inner() = Inner::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_a_notice_at_the_end_of_their_connection() {
        let notices = Notices::default();
        let send = |port: u32, parts: &[&str]| {
            assert_eq!(notices.open(port), Ok(None));
            parts.iter().for_each(|part| assert!(notices.take(port, part.as_bytes())));
            let before = notices.get();
            notices.close(port);
            (before, notices.get())
        };
        let (before, after) = send(1, &["X=1\nREA", "DY=1\n"]);
        assert_eq!((before.is_ready, after.is_ready, after.exit), (false, true, None));
        let (_, after) =
            send(1, &["READY=0\nEXIT_STATUS=", "139\nSTATUS=first\nSTATUS=ki\x1b[1ml\u{2028}led\tby SIGSEGV"]);
        assert!(after.is_ready, "a notice adds to the earlier ones");
        assert_eq!(after.exit, Some(GuestExit { status: 139, text: "ki[1mlledby SIGSEGV".to_owned() }));
        for bad in ["EXIT_STATUS=256", "EXIT_STATUS=", "EXIT_STATUS=x", "exit_status=1", "EXIT_STATUS"] {
            assert_eq!(send(2, &[bad]).1.exit.unwrap().status, 139, "{bad}");
        }
        let (_, after) = send(3, &["EXIT_STATUS=0\nSTATUS=", &"ä".repeat(300)]);
        assert_eq!(after.exit.unwrap().text, "ä".repeat(100));
        notices.clear();
        assert_eq!(notices.get(), GuestNotice::default());
    }

    #[test]
    fn a_guest_cannot_fill_memory() {
        let notices = Notices::default();
        let most = MAX_CONNECTIONS as u32;
        let displaced: Vec<_> = (0..100).map(|port| notices.open(port).unwrap()).collect();
        assert!(displaced.iter().enumerate().all(|(n, one)| *one == (n as u32).checked_sub(most)));
        assert!(notices.open(99) == Err(AlreadyOpen) && !notices.take(99 - most, b"x"), "the oldest are gone");
        assert!(notices.take(99, &[b'x'; MAX_NOTICE]) && !notices.take(99, b"x"));
        assert!((0..100).all(|port| {
            notices.close(port);
            !notices.is_open(port)
        }));
        assert!(notices.inner().received.is_empty());
    }
}
