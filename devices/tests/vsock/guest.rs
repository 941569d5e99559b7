//! A guest's end of a socket device, and the ends of hosts.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use clade_devices::virtio::VirtioDevice;
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::vsock::{Vsock, VsockOptions, VsockSocket};

use crate::driver::{Driver, ram, store};

pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const EVENTS: usize = 2;
pub(crate) const CID: u64 = 42;
pub(crate) const IN: u64 = 0x20_0000;
pub(crate) const OUT: u64 = 0x30_0000;
/// Length of a header.
pub(crate) const HEADER: usize = 44;
pub(crate) const REQUEST: u16 = 1;
pub(crate) const RESPONSE: u16 = 2;
pub(crate) const RESET: u16 = 3;
pub(crate) const SHUTDOWN: u16 = 4;
pub(crate) const DATA: u16 = 5;
pub(crate) const CREDIT_UPDATE: u16 = 6;
pub(crate) const CREDIT_REQUEST: u16 = 7;

/// A guest's end of the device: keeps receive buffers posted, takes packets.
pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) slots: u64,
    pub(crate) taken: u32,
    /// The directions of a shutdown.
    pub(crate) shuts: u32,
    /// The guest's address as in its packets, and as in the device's.
    pub(crate) cid: u64,
    pub(crate) addressed: u64,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Packet {
    pub(crate) op: u16,
    pub(crate) host: u32,
    pub(crate) guest: u32,
    pub(crate) room: u32,
    pub(crate) forwarded: u32,
    pub(crate) flags: u32,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn device(dir: &Path, name: &str, cid: u64, reset: bool) -> Box<dyn VirtioDevice> {
    let options = VsockOptions { cid, socket: dir.join(name) };
    Box::new(SyncDevice::new(Vsock::new(VsockSocket::bind(&options).unwrap(), reset).unwrap()))
}

impl Guest {
    pub(crate) fn new(driver: Driver) -> Self {
        let mut guest = Self { driver, slots: 0, taken: 0, shuts: 3, cid: CID, addressed: CID };
        (0..8).for_each(|_| guest.offer());
        guest
    }

    pub(crate) fn offer(&mut self) {
        let at = IN + (self.slots % 16) * 0x2000;
        self.slots += 1;
        self.driver.post(RX, &[(at, 0x1000, true)]);
    }

    pub(crate) fn header(&self, op: u16, host: u32, guest: u32, len: u32, room: u32) -> Vec<u8> {
        let mut header = Vec::new();
        header.extend(self.cid.to_le_bytes());
        header.extend(2u64.to_le_bytes());
        header.extend(guest.to_le_bytes());
        header.extend(host.to_le_bytes());
        header.extend(len.to_le_bytes());
        header.extend(1u16.to_le_bytes());
        header.extend(op.to_le_bytes());
        header.extend((if op == SHUTDOWN { self.shuts } else { 0 }).to_le_bytes());
        header.extend(room.to_le_bytes());
        header.extend(self.taken.to_le_bytes());
        header
    }

    pub(crate) fn send(&mut self, op: u16, host: u32, guest: u32, data: &[u8], room: u32) {
        let header = self.header(op, host, guest, data.len() as u32, room);
        self.driver.fill(OUT, &header);
        self.driver.fill(OUT + 0x1000, data);
        if data.is_empty() {
            self.driver.post(TX, &[(OUT, HEADER as u32, false)]);
        } else {
            self.driver.post(TX, &[(OUT, HEADER as u32, false), (OUT + 0x1000, data.len() as u32, false)]);
        }
        self.driver.wait(TX);
    }

    /// Requests a connection, without waiting for the device.
    pub(crate) fn request(&mut self, host: u32, guest: u32) {
        let header = self.header(REQUEST, host, guest, 0, 1 << 16);
        self.driver.fill(OUT, &header);
        self.driver.post(TX, &[(OUT, HEADER as u32, false)]);
    }

    /// The next packet other than a credit update.
    pub(crate) fn other(&mut self) -> Packet {
        loop {
            let packet = self.packet();
            if packet.op != CREDIT_UPDATE {
                return packet;
            }
        }
    }

    pub(crate) fn packet(&mut self) -> Packet {
        let (head, len) = self.driver.wait(RX);
        // Buffers are posted one descriptor each, by turns.
        let at = IN + (u64::from(head) % 16) * 0x2000;
        let bytes = self.driver.look(at, len as usize);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(bytes[8..16].try_into().unwrap()), self.addressed);
        assert_eq!(bytes.len(), HEADER + u32_at(24) as usize);
        self.offer();
        Packet {
            op: u16::from_le_bytes(bytes[30..32].try_into().unwrap()),
            host: u32_at(16),
            guest: u32_at(20),
            flags: u32_at(32),
            room: u32_at(36),
            forwarded: u32_at(40),
            data: bytes[HEADER..].to_vec(),
        }
    }
}

pub(crate) fn guest(dir: &Path) -> Guest {
    Guest::new(Driver::take(device(dir, "vm.sock", CID, false), &ram(&store())))
}

pub(crate) fn connect(dir: &Path, name: &str, port: u32) -> UnixStream {
    let mut host = UnixStream::connect(dir.join(name)).unwrap();
    host.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    host
}

pub(crate) fn line(host: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while host.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}
