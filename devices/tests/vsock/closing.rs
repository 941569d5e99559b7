//! Ends of connections: data sent before them arrives.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::guest::{CREDIT_REQUEST, CREDIT_UPDATE, DATA, Guest, REQUEST, RESET, RESPONSE, SHUTDOWN, guest};

const PORT: u32 = 77;
const SENT: usize = 409_600;
/// Flags of a shutdown: no more receiving, no more sending.
const NO_RECEIVE: u32 = 1;
const NO_SEND: u32 = 2;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

/// A guest that is connected to a host.
fn connected(dir: &Path) -> (Guest, UnixStream) {
    let listener = UnixListener::bind(dir.join(format!("vm.sock_{PORT}"))).unwrap();
    let mut guest = guest(dir);
    guest.send(REQUEST, PORT, 5, &[], 1 << 20);
    assert_eq!(guest.packet().op, RESPONSE);
    let (host, _) = listener.accept().unwrap();
    (guest, host)
}

/// Sends `bytes` as fast as credit allows, to a host that does not read.
fn send_all(guest: &mut Guest, bytes: &[u8]) {
    let (mut room, mut forwarded, mut sent) = (256u32 << 10, 0u32, 0u32);
    for chunk in bytes.chunks(4096) {
        while sent + chunk.len() as u32 > forwarded + room {
            guest.send(CREDIT_REQUEST, PORT, 5, &[], 1 << 20);
            let update = guest.packet();
            assert_eq!(update.op, CREDIT_UPDATE);
            (room, forwarded) = (update.room, update.forwarded);
        }
        guest.send(DATA, PORT, 5, chunk, 1 << 20);
        sent += chunk.len() as u32;
    }
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_host_that_is_slow() {
    for then_resets in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, mut host) = connected(dir.path());
        let sent = pattern(SENT);
        send_all(&mut guest, &sent);
        guest.send(SHUTDOWN, PORT, 5, &[], 1 << 20);
        assert_eq!(guest.other().op, RESET, "a guest that closes is answered at once");
        if then_resets {
            guest.send(RESET, PORT, 5, &[], 1 << 20);
        }
        // Meanwhile the same ports are free for another connection.
        guest.send(DATA, PORT, 5, b"?", 1 << 20);
        assert_eq!(guest.other().op, RESET, "it knows of no connection");
        let mut got = Vec::new();
        host.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), SENT);
        assert!(got == sent, "the stream is not what was sent");
    }
}

#[test]
fn a_guest_that_resets_is_heard_to_the_end_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut host) = connected(dir.path());
    let sent = pattern(SENT);
    send_all(&mut guest, &sent);
    guest.send(RESET, PORT, 5, &[], 1 << 20);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert!(got == sent, "{} bytes arrived of {SENT}", got.len());
}

#[test]
fn a_host_reads_the_end_although_what_it_sent_was_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut host) = connected(dir.path());
    // A guest without room: the device does not read from the host.
    guest.send(CREDIT_UPDATE, PORT, 5, &[], 0);
    host.write_all(b"nobody reads this").unwrap();
    guest.send(DATA, PORT, 5, b"the last words", 0);
    guest.send(SHUTDOWN, PORT, 5, &[], 0);
    assert_eq!(guest.other().op, RESET);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"the last words");
}

#[test]
fn what_the_host_sent_before_it_closed_reaches_a_guest_that_goes_on_sending() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut host) = connected(dir.path());
    guest.send(CREDIT_UPDATE, PORT, 5, &[], 0);
    let sent = pattern(100_000);
    host.write_all(&sent).unwrap();
    drop(host);
    // Packets for unknown connections do not make the guest lose data.
    for _ in 0..100 {
        guest.send(DATA, PORT, 5, &[7; 4096], 0);
    }
    guest.send(CREDIT_UPDATE, PORT, 5, &[], 1 << 20);
    let (mut got, mut shutdowns) = (Vec::new(), 0);
    let end = loop {
        let packet = guest.other();
        if packet.op == SHUTDOWN && packet.flags == NO_RECEIVE {
            shutdowns += 1;
            continue;
        }
        if packet.op != DATA {
            break packet;
        }
        got.extend(packet.data);
    };
    assert!(got == sent, "{} bytes arrived of {}", got.len(), sent.len());
    assert_eq!((end.op, end.flags), (SHUTDOWN, NO_RECEIVE | NO_SEND));
    assert_eq!(shutdowns, 1, "the guest is told once that its data goes nowhere");
}

/// The one-shot event of the socket that was full has also ended the wait for the host's hangup.
#[test]
fn a_host_that_hangs_up_after_it_was_slow_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut host) = connected(dir.path());
    host.shutdown(Shutdown::Write).unwrap();
    let end = guest.other();
    assert_eq!((end.op, end.flags), (SHUTDOWN, NO_SEND));
    let sent = pattern(SENT);
    send_all(&mut guest, &sent);
    let mut got = vec![0; SENT];
    host.read_exact(&mut got).unwrap();
    assert!(got == sent, "the stream is not what was sent");
    // The device has its event, and has nothing left to write.
    guest.send(CREDIT_REQUEST, PORT, 5, &[], 1 << 20);
    assert_eq!(guest.packet().op, CREDIT_UPDATE);
    drop(host);
    let end = guest.other();
    assert_eq!((end.op, end.flags), (SHUTDOWN, NO_RECEIVE | NO_SEND));
}

#[test]
fn a_host_that_has_ended_its_stream_still_receives() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut host) = connected(dir.path());
    host.write_all(b"a question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.other().data, b"a question");
    let end = guest.other();
    assert_eq!((end.op, end.flags), (SHUTDOWN, NO_SEND));
    guest.send(DATA, PORT, 5, b"an answer", 1 << 20);
    guest.shuts = NO_SEND;
    guest.send(SHUTDOWN, PORT, 5, &[], 1 << 20);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"an answer");
    drop(host);
    let end = guest.other();
    assert_eq!((end.op, end.flags), (SHUTDOWN, NO_RECEIVE | NO_SEND), "and then it is gone");
}

#[test]
fn a_buffer_that_was_taken_for_nothing_is_still_the_guests() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut host) = connected(dir.path());
    guest.send(CREDIT_UPDATE, PORT, 5, &[], 0);
    host.write_all(b"wait for it").unwrap();
    // At each attempt the device has no data to send, because the guest has no room: more attempts
    // than the guest has buffers.
    for _ in 0..40 {
        guest.send(CREDIT_UPDATE, PORT, 5, &[], 0);
    }
    guest.send(CREDIT_UPDATE, PORT, 5, &[], 1 << 16);
    assert_eq!(guest.other().data, b"wait for it");
}
