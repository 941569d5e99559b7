//! Sockets between guest and host: both may begin, streams are whole and bounded, a child's are reset.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod driver;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use clade_devices::virtio::VirtioDevice;
use clade_devices::virtio::plain::Plain;
use clade_devices::virtio::vsock::{Vsock, VsockError, VsockOptions};
use driver::{Driver, ram, store};

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
const CID: u64 = 42;
const IN: u64 = 0x20_0000;
const OUT: u64 = 0x30_0000;
/// Of a header.
const HEADER: usize = 44;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A guest's end of the device: keeps receive buffers posted, takes packets.
struct Guest {
    driver: Driver,
    slots: u64,
    taken: u32,
}

#[derive(Debug, PartialEq)]
struct Packet {
    op: u16,
    host: u32,
    guest: u32,
    room: u32,
    forwarded: u32,
    data: Vec<u8>,
}

fn device(dir: &Path, name: &str, cid: u64, reset: bool) -> Box<dyn VirtioDevice> {
    let options = VsockOptions { cid, socket: dir.join(name) };
    Box::new(Plain::new(Vsock::new(&options, reset).unwrap()))
}

impl Guest {
    fn new(driver: Driver) -> Self {
        let mut guest = Self { driver, slots: 0, taken: 0 };
        (0..8).for_each(|_| guest.offer());
        guest
    }

    fn offer(&mut self) {
        let at = IN + (self.slots % 16) * 0x2000;
        self.slots += 1;
        self.driver.post(RX, &[(at, 0x1000, true)]);
    }

    fn send(&mut self, op: u16, host: u32, guest: u32, data: &[u8], room: u32) {
        let mut header = Vec::new();
        header.extend(CID.to_le_bytes());
        header.extend(2u64.to_le_bytes());
        header.extend(guest.to_le_bytes());
        header.extend(host.to_le_bytes());
        header.extend((data.len() as u32).to_le_bytes());
        header.extend(1u16.to_le_bytes());
        header.extend(op.to_le_bytes());
        header.extend((if op == SHUTDOWN { 3u32 } else { 0 }).to_le_bytes());
        header.extend(room.to_le_bytes());
        header.extend(self.taken.to_le_bytes());
        self.driver.fill(OUT, &header);
        self.driver.fill(OUT + 0x1000, data);
        if data.is_empty() {
            self.driver.post(TX, &[(OUT, HEADER as u32, false)]);
        } else {
            self.driver.post(TX, &[(OUT, HEADER as u32, false), (OUT + 0x1000, data.len() as u32, false)]);
        }
        self.driver.wait(TX);
    }

    /// The next packet that is no news of credit.
    fn other(&mut self) -> Packet {
        loop {
            let packet = self.packet();
            if packet.op != CREDIT_UPDATE {
                return packet;
            }
        }
    }

    fn packet(&mut self) -> Packet {
        let (head, len) = self.driver.wait(RX);
        // Buffers are posted one descriptor each, in turn.
        let at = IN + (u64::from(head) % 16) * 0x2000;
        let bytes = self.driver.look(at, len as usize);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(bytes[8..16].try_into().unwrap()), CID);
        assert_eq!(bytes.len(), HEADER + u32_at(24) as usize);
        self.offer();
        Packet {
            op: u16::from_le_bytes(bytes[30..32].try_into().unwrap()),
            host: u32_at(16),
            guest: u32_at(20),
            room: u32_at(36),
            forwarded: u32_at(40),
            data: bytes[HEADER..].to_vec(),
        }
    }
}

fn guest(dir: &Path) -> Guest {
    Guest::new(Driver::take(device(dir, "vm.sock", CID, false), &ram(&store())))
}

fn connect(dir: &Path, name: &str, port: u32) -> UnixStream {
    let mut host = UnixStream::connect(dir.join(name)).unwrap();
    host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    host.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    host
}

fn line(host: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while host.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

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
        // Room for 10,000 bytes at a time, told of now and then.
        if got.len() % 4 == 0 || got.len() >= sent.len() {
            guest.send(CREDIT_UPDATE, 77, 5, &[], 10_000);
        } else {
            guest.send(CREDIT_UPDATE, 77, 5, &[], 10_001);
        }
    }
    assert!(got == sent, "the stream is not what was sent");
    let mut host = writer.join().unwrap();
    // And the other way, as far as there is room: the host does not read.
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
    let mut child = parent.driver.fork(&store, |_, _| device(dir.path(), "child.sock", 43, true));
    let mut cid = [0; 8];
    child.config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 43);
    assert_eq!(child.wait(EVENTS).1, 4);
    assert_eq!(child.look(0x10_0000, 4), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    host.write_all(b"still here").unwrap();
    assert_eq!(parent.packet().data, b"still here");
    assert!(child.used(RX).is_none(), "not for the child");
    assert!(parent.driver.used(EVENTS).is_none(), "nothing was reset in the parent");
    // Its own socket works.
    let _other = connect(dir.path(), "child.sock", 10);
    child.wait(RX);
    drop(child);
    assert!(!dir.path().join("child.sock").exists());
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
    // Its address and its socket are what they were, and work.
    let mut cid = [0; 8];
    vm.driver.config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID);
    let mut host = connect(dir.path(), "vm.sock", 10);
    let asked = vm.packet();
    assert_eq!((asked.op, asked.guest), (REQUEST, 10));
    vm.send(RESPONSE, asked.host, 10, &[], 1 << 16);
    assert_eq!(line(&mut host), format!("OK {}", asked.host));
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
    // More than there is room for, to a host that does not read.
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
    // Data for a connection that is not, a second request on one that is, a host that does not speak.
    guest.send(DATA, 77, 99, b"?", 1 << 16);
    assert_eq!(guest.packet().op, RESET);
    guest.send(REQUEST, 77, 6, &[], 1 << 16);
    assert_eq!(guest.packet().op, RESET);
    let mut host = UnixStream::connect(dir.path().join("vm.sock")).unwrap();
    host.write_all(b"HELO there, this is a long line that says nothing\n").unwrap();
    host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(host.read(&mut [0]).unwrap_or(0), 0);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn bad_addresses_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 2, u64::from(u32::MAX), 1 << 40] {
        let refused = Vsock::new(&VsockOptions { cid, socket: dir.path().join("x") }, false);
        assert!(matches!(refused, Err(VsockError::Cid { cid: told }) if told == cid));
    }
    let taken = dir.path().join("taken");
    std::fs::write(&taken, "somebody's").unwrap();
    let refused = Vsock::new(&VsockOptions { cid: 3, socket: taken.clone() }, false);
    assert!(refused.unwrap_err().to_string().contains("taken"));
    assert_eq!(std::fs::read(&taken).unwrap(), b"somebody's");
}
