//! Sockets between guest and host: either side may connect, streams are complete and bounded, and a
//! child's are reset.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod closing;
#[path = "../driver/mod.rs"]
mod driver;
mod guest;
mod hostile;
mod waiting;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::vsock::{GuestNotice, NOTICE_PORT, Vsock, VsockError, VsockOptions, VsockSocket};
use clade_test_support::{wait_for, wait_until};
use driver::{Driver, ram, store};
use guest::{
    CID, CREDIT_REQUEST, CREDIT_UPDATE, DATA, EVENTS, Guest, HEADER, IN, REQUEST, RESET, RESPONSE, RX, SHUTDOWN,
    connect, device, guest, line,
};

/// The time for which the device waits for a driver to close its connections.
const RESET_PATIENCE: Duration = Duration::from_secs(2);

#[test]
fn the_host_connects_and_both_talk() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = guest(dir.path());
    let mut host = connect(dir.path(), "vm.sock", 1234);
    let asked = guest.packet();
    assert_eq!((asked.op, asked.guest), (REQUEST, 1234));
    guest.send(RESPONSE, asked.host, 1234, &[], 1 << 16);
    assert_eq!(line(&mut host), format!("OK {}", asked.host));
    guest.send(DATA, asked.host, 1234, b"from the guest", 1 << 16);
    let mut bytes = [0; 14];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");
    host.write_all(b"from the host").unwrap();
    let got = guest.packet();
    assert_eq!((got.op, got.host, got.data.as_slice()), (DATA, asked.host, b"from the host".as_slice()));
    assert_eq!(got.forwarded, 14, "the line that was answered is not the guest's");
    drop(host);
    assert_eq!(guest.packet().op, SHUTDOWN);
    guest.send(RESET, asked.host, 1234, &[], 1 << 16);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn the_guest_connects_and_a_long_stream_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vm.sock_77")).unwrap();
    let mut guest = guest(dir.path());
    guest.send(REQUEST, 78, 5, &[], 1 << 16);
    assert_eq!(guest.packet().op, RESET, "nobody listens there");
    guest.send(REQUEST, 77, 5, &[], 10_000);
    let answer = guest.packet();
    assert_eq!((answer.op, answer.host, answer.guest), (RESPONSE, 77, 5));
    let (mut host, _) = listener.accept().unwrap();
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    let writer = {
        let sent = sent.clone();
        std::thread::spawn(move || {
            host.write_all(&sent).unwrap();
            host
        })
    };
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let packet = guest.packet();
        assert_eq!(packet.op, DATA);
        got.extend(packet.data);
        guest.taken = got.len() as u32;
        // Room for 10,000 bytes at a time, with a credit update now and then.
        if got.len() % 4 == 0 || got.len() >= sent.len() {
            guest.send(CREDIT_UPDATE, 77, 5, &[], 10_000);
        } else {
            guest.send(CREDIT_UPDATE, 77, 5, &[], 10_001);
        }
    }
    assert!(got == sent, "the stream is not what was sent");
    let mut host = writer.join().unwrap();
    // In the other direction, as far as there is room: the host does not read.
    let mut room = answer.room;
    let mut total = 0u32;
    while room >= 4096 {
        guest.send(DATA, 77, 5, &sent[total as usize..total as usize + 4096], 10_000);
        (total, room) = (total + 4096, room - 4096);
    }
    guest.send(CREDIT_REQUEST, 77, 5, &[], 10_000);
    let mut bytes = vec![0; total as usize];
    host.read_exact(&mut bytes).unwrap();
    assert!(bytes == sent[..total as usize], "the stream is not what was sent");
    loop {
        let update = guest.packet();
        assert_eq!(update.op, CREDIT_UPDATE);
        if update.forwarded == total {
            break;
        }
        guest.send(CREDIT_REQUEST, 77, 5, &[], 10_000);
    }
    guest.send(SHUTDOWN, 77, 5, &[], 10_000);
    assert_eq!(guest.other().op, RESET);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_child_is_told_that_its_connections_are_gone_and_the_parents_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = store();
    let mut parent = Guest::new(Driver::take(device(dir.path(), "vm.sock", CID, false), &ram(&store)));
    parent.driver.post(EVENTS, &[(0x10_0000, 8, true)]);
    let mut host = connect(dir.path(), "vm.sock", 9);
    let asked = parent.packet();
    parent.send(RESPONSE, asked.host, 9, &[], 1 << 16);
    assert_eq!(line(&mut host), format!("OK {}", asked.host));
    // The device gives up the wait for the driver at the end of its patience: an attempt that took as long is repeated.
    let child = wait_for("a child's driver closes its connections in time", || {
        let begun = Instant::now();
        let driver = parent.driver.fork(&store, |_, _| device(dir.path(), "child.sock", 43, true));
        let mut child = Guest { driver, cid: 43, addressed: 43, slots: parent.slots, taken: 0, shuts: 3 };
        let mut cid = [0; 8];
        child.driver.config(0, &mut cid);
        assert_eq!(u64::from_le_bytes(cid), 43);
        assert_eq!(child.driver.wait(EVENTS).1, 4);
        assert_eq!(child.driver.look(0x10_0000, 4), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
        host.write_all(b"still here").unwrap();
        assert_eq!(parent.packet().data, b"still here");
        assert!(child.driver.used(RX).is_none(), "not for the child");
        assert!(parent.driver.used(EVENTS).is_none(), "nothing was reset in the parent");
        // The child's own socket works once the driver has closed its old connections: earlier ones
        // would be closed with them.
        let _other = connect(dir.path(), "child.sock", 10);
        // The device looks at its sockets in each turn that takes a packet: it accepts the connection, reads the port,
        // and has a request for the guest.
        (0..4).for_each(|_| child.send(RESET, 1, 1, &[], 0));
        let is_early = child.driver.used(RX).is_some();
        if begun.elapsed() >= RESET_PATIENCE {
            return None;
        }
        assert!(!is_early, "before the driver has closed its connections");
        child.driver.post(EVENTS, &[(0x10_0000, 8, true)]);
        assert_eq!(child.packet().op, REQUEST);
        assert!(child.driver.used(EVENTS).is_none(), "it is told once");
        Some(child)
    });
    drop(child);
    assert!(!dir.path().join("child.sock").exists());
}

/// The wait for a driver ends as soon as it has closed its connections, and after two seconds at
/// most. A busy host may be slow.
#[test]
fn a_driver_that_has_closed_its_connections_is_waited_for_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let store = store();
    let mut parent = Guest::new(Driver::take(device(dir.path(), "vm.sock", CID, false), &ram(&store)));
    // More buffers than the one that the device needs.
    (0..3).for_each(|n| _ = parent.driver.post(EVENTS, &[(0x10_0000 + n * 8, 8, true)]));
    let mut round = 0;
    wait_until("a child whose driver answers goes on before its two seconds are over", || {
        round += 1;
        let name = format!("{round}.sock");
        let mut child = parent.driver.fork(&store, |_, _| device(dir.path(), &name, 43, true));
        let _host = connect(dir.path(), &name, 10);
        child.wait(EVENTS);
        let begun = Instant::now();
        child.post(EVENTS, &[(0x10_0000, 8, true)]);
        child.wait(RX);
        begun.elapsed() < Duration::from_secs(1)
    });
}

/// A child may stay paused for long after its device has posted the event.
#[test]
fn the_wait_for_a_driver_does_not_end_in_a_pause() {
    let dir = tempfile::tempdir().unwrap();
    let store = store();
    let mut parent = Guest::new(Driver::take(device(dir.path(), "vm.sock", CID, false), &ram(&store)));
    parent.driver.post(EVENTS, &[(0x10_0000, 8, true)]);
    // The wait goes on in the time that the driver needs here: an attempt that took as long is repeated.
    wait_for("a paused child's driver is waited for", || {
        let mut child = parent.driver.fork(&store, |_, _| device(dir.path(), "child.sock", 43, true));
        child.wait(EVENTS);
        let _host = connect(dir.path(), "child.sock", 10);
        child.device.quiesce();
        std::thread::sleep(RESET_PATIENCE + Duration::from_millis(100));
        child.device.resume();
        let begun = Instant::now();
        std::thread::sleep(RESET_PATIENCE / 4);
        let is_early = child.used(RX).is_some();
        if begun.elapsed() >= RESET_PATIENCE {
            return None;
        }
        assert!(!is_early, "before the driver has closed its connections");
        child.post(EVENTS, &[(0x10_0000, 8, true)]);
        child.wait(RX);
        Some(())
    });
}

/// The guest may be closing a connection of its parent's, and would close the clone's of the same
/// ports.
#[test]
fn a_clones_connections_have_other_ports_than_its_parents() {
    let dir = tempfile::tempdir().unwrap();
    let ports = ["parent", "clone", "sibling"].map(|name| {
        let device = device(dir.path(), name, 43, name != "parent");
        let mut vm = Guest::new(Driver::take(device, &ram(&store())));
        vm.addressed = 43;
        let _hosts = [connect(dir.path(), name, 9), connect(dir.path(), name, 9)];
        [vm.packet().host, vm.packet().host]
    });
    let all: std::collections::BTreeSet<_> = ports.iter().flatten().collect();
    assert_eq!(all.len(), 6, "{ports:?}");
    assert!(ports.iter().all(|[first, second]| second - first == 1 && *first >= 1 << 30), "{ports:?}");
}

#[test]
fn a_child_that_has_not_read_its_address_yet_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Guest::new(Driver::take(device(dir.path(), "child.sock", 43, true), &ram(&store())));
    child.addressed = 43;
    let mut host = connect(dir.path(), "child.sock", 9);
    // The guest answers with its parent's address.
    let mut asked = child.packet();
    for _ in 0..3 {
        assert_eq!((asked.op, asked.guest), (REQUEST, 9));
        child.send(RESPONSE, asked.host, 9, &[], 1 << 16);
        let dropped = child.packet();
        assert_eq!((dropped.op, dropped.host, dropped.guest), (RESET, asked.host, 9));
        let again = child.packet();
        assert_ne!(again.host, asked.host, "it may still have the other");
        asked = again;
    }
    child.cid = 43;
    child.send(RESPONSE, asked.host, 9, &[], 1 << 16);
    assert_eq!(line(&mut host), format!("OK {}", asked.host));
    // The requests to a guest that never reads its address end.
    child.cid = CID;
    let mut host = connect(dir.path(), "child.sock", 10);
    let mut count = 0;
    loop {
        let packet = child.packet();
        if packet.op == REQUEST {
            count += 1;
            child.send(RESPONSE, packet.host, 10, &[], 1 << 16);
        } else if count == 100 {
            assert_eq!(packet.op, RESET);
            break;
        }
    }
    assert_eq!(host.read(&mut [0]).unwrap(), 0, "the host reads the end");
    assert!(!child.driver.needs_reset());
}

#[test]
fn a_guest_that_is_put_back_is_told_that_its_connections_are_gone_and_so_is_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = guest(dir.path());
    vm.driver.post(EVENTS, &[(0x10_0000, 8, true)]);
    let mut host = connect(dir.path(), "vm.sock", 9);
    let asked = vm.packet();
    vm.send(RESPONSE, asked.host, 9, &[], 1 << 16);
    assert_eq!(line(&mut host), format!("OK {}", asked.host));
    let moment = vm.driver.moment();
    host.write_all(b"later").unwrap();
    assert_eq!(vm.packet().data, b"later");
    for _ in 0..2 {
        vm.driver.rewind(&moment);
        assert_eq!(vm.driver.wait(EVENTS).1, 4);
        assert_eq!(vm.driver.look(0x10_0000, 4), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
        assert!(vm.driver.used(RX).is_none(), "nothing of what was on its way");
    }
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0, "the host reads the end");
    // The address and the socket are unchanged, and work.
    let mut cid = [0; 8];
    vm.driver.config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    let mut host = connect(dir.path(), "vm.sock", 10);
    // The driver does not offer its buffer again: the wait for it ends.
    let asked = vm.packet();
    assert_eq!((asked.op, asked.guest), (REQUEST, 10));
    vm.send(RESPONSE, asked.host, 10, &[], 1 << 16);
    assert_eq!(line(&mut host), format!("OK {}", asked.host));
}

#[test]
fn notices_are_the_devices_own_and_a_guest_that_sends_too_much_is_reset() {
    let dir = tempfile::tempdir().unwrap();
    // A listener at the port's path gets no connection.
    let listener = UnixListener::bind(dir.path().join(format!("vm.sock_{NOTICE_PORT}"))).unwrap();
    listener.set_nonblocking(true).unwrap();
    let options = VsockOptions { cid: CID, socket: dir.path().join("vm.sock") };
    let vsock = Vsock::new(VsockSocket::bind(&options).unwrap(), false).unwrap();
    let notices = vsock.notices().clone();
    let mut guest = Guest::new(Driver::take(Box::new(SyncDevice::new(vsock)), &ram(&store())));
    let open = |guest: &mut Guest, port: u32| {
        guest.send(REQUEST, NOTICE_PORT, port, &[], 1 << 16);
        let answer = guest.packet();
        assert_eq!((answer.host, answer.guest), (NOTICE_PORT, port));
        answer.op
    };
    let expect_reset = |guest: &mut Guest, port: u32| {
        let answer = guest.packet();
        assert_eq!((answer.op, answer.host, answer.guest), (RESET, NOTICE_PORT, port));
    };
    assert_eq!(open(&mut guest, 5), RESPONSE);
    for part in [&b"READY"[..], b"=1\nX=y\n"] {
        guest.send(DATA, NOTICE_PORT, 5, part, 1 << 16);
    }
    assert!(!notices.get().is_ready, "the connection has not ended");
    guest.send(CREDIT_REQUEST, NOTICE_PORT, 5, &[], 1 << 16);
    assert_eq!(guest.packet().op, CREDIT_UPDATE);
    guest.shuts = 2;
    guest.send(SHUTDOWN, NOTICE_PORT, 5, &[], 1 << 16);
    expect_reset(&mut guest, 5);
    assert!(notices.get().is_ready);
    // Data without a connection, and more than there is room for.
    guest.send(DATA, NOTICE_PORT, 6, b"READY=1", 1 << 16);
    expect_reset(&mut guest, 6);
    assert_eq!(open(&mut guest, 7), RESPONSE);
    guest.send(DATA, NOTICE_PORT, 7, &[b'x'; 4000], 1 << 16);
    guest.send(DATA, NOTICE_PORT, 7, &[b'x'; 4000], 1 << 16);
    expect_reset(&mut guest, 7);
    // Connections without an end.
    assert!((10..18).all(|port| open(&mut guest, port) == RESPONSE));
    guest.send(REQUEST, NOTICE_PORT, 18, &[], 1 << 16);
    expect_reset(&mut guest, 10);
    assert_eq!((guest.packet().op, open(&mut guest, 18)), (RESPONSE, RESET), "begun twice");
    // A guest that is put back is another: its connections and its notices are gone.
    let moment = guest.driver.moment();
    guest.driver.rewind(&moment);
    assert_eq!(notices.get(), GuestNotice::default());
    assert!(listener.accept().is_err());
}

#[test]
fn who_breaks_the_rules_is_reset_and_the_others_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vm.sock_77")).unwrap();
    let mut guest = guest(dir.path());
    for port in [5, 6] {
        guest.send(REQUEST, 77, port, &[], 1 << 16);
        assert_eq!(guest.packet().op, RESPONSE);
    }
    let (one, _) = listener.accept().unwrap();
    let (mut other, _) = listener.accept().unwrap();
    // More than fits, to a host that does not read.
    let mut reset = None;
    for _ in 0..200 {
        guest.send(DATA, 77, 5, &[1; 4096], 1 << 16);
        if let Some((head, _)) = guest.driver.used(RX) {
            let at = IN + (u64::from(head) % 16) * 0x2000;
            let op = u16::from(guest.driver.look(at, HEADER)[30]);
            guest.offer();
            if op != CREDIT_UPDATE {
                reset = Some(op);
                break;
            }
        }
    }
    assert_eq!(reset, Some(RESET));
    drop(one);
    guest.send(DATA, 77, 6, b"fine", 1 << 16);
    let mut bytes = [0; 4];
    other.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"fine");
    // Data for an absent connection, a second request on an open one, and a host that sends no
    // line.
    guest.send(DATA, 77, 99, b"?", 1 << 16);
    assert_eq!(guest.packet().op, RESET);
    guest.send(REQUEST, 77, 6, &[], 1 << 16);
    assert_eq!(guest.packet().op, RESET);
    let mut host = UnixStream::connect(dir.path().join("vm.sock")).unwrap();
    host.write_all(b"HELO there, this is a long line that says nothing\n").unwrap();
    assert_eq!(host.read(&mut [0]).unwrap_or(0), 0);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn bad_addresses_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 2, u64::from(u32::MAX), 1 << 40] {
        let refused = VsockSocket::bind(&VsockOptions { cid, socket: dir.path().join("x") });
        assert!(matches!(refused, Err(VsockError::Cid { cid: told }) if told == cid));
    }
    let taken = dir.path().join("taken");
    std::fs::write(&taken, "somebody's").unwrap();
    let refused = VsockSocket::bind(&VsockOptions { cid: 3, socket: taken.clone() });
    assert!(refused.unwrap_err().to_string().contains("taken"));
    assert_eq!(std::fs::read(&taken).unwrap(), b"somebody's");
}
