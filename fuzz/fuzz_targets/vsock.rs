//! Any guest and any hosts at a socket device, over real sockets: connections both ways, packets of
//! any header over any buffers, hosts that read, write, end and close as they like, full backlogs,
//! forks of the turn. Nothing panics, no turn waits for a host, memory and connections stay
//! bounded, and a host reads only the guest's bytes.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clade_devices::MmioDevice;
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::vsock::{Vsock, VsockOptions, VsockSocket};
use clade_devices::virtio::{EventFds, VirtioMmio, regs};
use clade_memory::{GuestRam, Quiesced, RamImage, RamLayout, Store};
use libfuzzer_sys::{arbitrary, fuzz_target};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 2 << 20;
const CID: u64 = 3;
const SIZE: u16 = 16;
const RX: u64 = 0;
const TX: u64 = 1;
const HEADER: usize = 44;
/// Ports with listeners: one accepts connections, one has a full backlog. Other ports have no
/// listener.
const OPEN_PORT: u32 = 70;
const FULL_PORT: u32 = 71;
const RX_AT: u64 = 0x4_0000;
const TX_AT: u64 = 0x10_0000;
/// The value of every byte of a guest's data.
const MARK: u8 = 0x5a;

#[derive(arbitrary::Arbitrary, Debug)]
enum Step {
    /// A well-formed packet: operation, host's port, guest's port, data, room, flags.
    Packet {
        op: u8,
        host: u8,
        guest: u8,
        len: u16,
        room: u32,
        flags: u8,
    },
    /// The same with an unrelated length, over overlapping buffers of these lengths.
    Lie {
        op: u8,
        host: u8,
        guest: u8,
        len: u32,
        buffers: Vec<u32>,
    },
    /// Any bytes for a header.
    Raw {
        header: Vec<u8>,
        cid: u64,
    },
    /// The guest posts buffers to receive into.
    Receive(u8, u16),
    Connect(Vec<u8>, bool),
    Write(u8, u16),
    Read(u8),
    Shut(u8, bool),
    Close(u8),
    Accept,
    /// A pause.
    Pause,
    /// The driver resets the device and begins anew.
    Reset,
}

struct World {
    store: Store,
    image: RamImage,
    dir: tempfile::TempDir,
    open: UnixListener,
    /// The listener whose backlog is full, and the connections that fill it.
    _full: (UnixListener, Vec<UnixStream>),
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let store = Store::open_small().expect("a store");
        let ram = GuestRam::reserve(&RamLayout::new(RAM).expect("a layout"), &store).expect("memory");
        ram.populate().expect("memory");
        ram.memory().write_slice(&vec![MARK; 0x8_0000], GuestAddress(TX_AT + 0x1000)).expect("memory");
        let (image, _) = ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).expect("an image");
        let dir = tempfile::tempdir().expect("a directory");
        let listen = |port: u32| UnixListener::bind(dir.path().join(format!("vm.sock_{port}"))).expect("a listener");
        let (open, full) = (listen(OPEN_PORT), listen(FULL_PORT));
        open.set_nonblocking(true).expect("a listener");
        rustix::net::listen(&full, 0).expect("a short backlog");
        let mut waiting = Vec::new();
        loop {
            let socket = rustix::net::socket_with(
                rustix::net::AddressFamily::UNIX,
                rustix::net::SocketType::STREAM,
                rustix::net::SocketFlags::NONBLOCK,
                None,
            );
            let socket = socket.expect("a socket");
            let path = dir.path().join(format!("vm.sock_{FULL_PORT}"));
            if rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(path).expect("a path")).is_err() {
                break;
            }
            waiting.push(UnixStream::from(socket));
        }
        World { store, image, dir, open, _full: (full, waiting) }
    })
}

struct Vm {
    ram: GuestRam,
    device: VirtioMmio,
    available: [u16; 3],
    hosts: Vec<UnixStream>,
}

fn base(queue: u64) -> u64 {
    0x1000 + 0x4000 * queue
}

impl Vm {
    fn new() -> Self {
        let World { store, image, dir, .. } = world();
        let ram = GuestRam::reserve(image.layout(), store).expect("memory");
        ram.adopt(image).expect("memory");
        let options = VsockOptions { cid: CID, socket: dir.path().join("vm.sock") };
        let device =
            SyncDevice::new(Vsock::new(VsockSocket::bind(&options).expect("a socket"), false).expect("a device"));
        let device = VirtioMmio::new(Box::new(device), &ram, EventFds::new(3).expect("eventfds"), false);
        let mut vm = Self { ram, device, available: [0; 3], hosts: Vec::new() };
        vm.set_up();
        vm
    }

    fn put(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn set_up(&mut self) {
        self.put(regs::STATUS, 0);
        self.available = [0; 3];
        self.poke(base(0), &[0; 0xc000]);
        [1, 3].iter().for_each(|status| self.put(regs::STATUS, *status));
        self.put(regs::DRIVER_FEATURES_SEL, 1);
        self.put(regs::DRIVER_FEATURES, 1);
        self.put(regs::STATUS, 11);
        for queue in 0..3u32 {
            let base = base(u64::from(queue)) as u32;
            self.put(regs::QUEUE_SEL, queue);
            self.put(regs::QUEUE_NUM, u32::from(SIZE));
            self.put(regs::QUEUE_DESC_LOW, base);
            self.put(regs::QUEUE_DRIVER_LOW, base + 0x1000);
            self.put(regs::QUEUE_DEVICE_LOW, base + 0x2000);
            self.put(regs::QUEUE_READY, 1);
        }
        self.put(regs::STATUS, 15);
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        let _ = self.ram.memory().write_slice(bytes, GuestAddress(at));
    }

    /// Makes a chain of `buffers` available in `queue`, beginning at its descriptor `head`.
    fn post(&mut self, queue: u64, head: u16, buffers: &[(u64, u32)], write: bool) {
        for (n, (address, len)) in buffers.iter().enumerate() {
            let at = base(queue) + 16 * ((u64::from(head) + n as u64) % u64::from(SIZE));
            let next = (head + n as u16 + 1) % SIZE;
            let flags = u16::from(n + 1 < buffers.len()) | if write { 2 } else { 0 };
            self.poke(at, &address.to_le_bytes());
            self.poke(at + 8, &len.to_le_bytes());
            self.poke(at + 12, &flags.to_le_bytes());
            self.poke(at + 14, &next.to_le_bytes());
        }
        let available = &mut self.available[queue as usize];
        let slot = base(queue) + 0x1004 + 2 * u64::from(*available % SIZE);
        *available = available.wrapping_add(1);
        let now = *available;
        self.poke(slot, &head.to_le_bytes());
        let _ = self.ram.memory().store(now, GuestAddress(base(queue) + 0x1002), Ordering::SeqCst);
        self.put(regs::QUEUE_NOTIFY, queue as u32);
    }

    /// Sends one packet, and waits until the device stands still, and so has handled it.
    fn send(&mut self, header: &[u8], buffers: &[(u64, u32)]) {
        self.poke(TX_AT, header);
        let mut all = vec![(TX_AT, header.len().max(1) as u32)];
        all.extend(buffers.iter().take(usize::from(SIZE) - 1));
        self.post(TX, 0, &all, false);
        self.pause();
    }

    fn pause(&self) {
        let begun = Instant::now();
        self.device.quiesce();
        self.device.resume();
        assert!(begun.elapsed() < Duration::from_secs(5), "a pause took {:?}", begun.elapsed());
    }

    fn host(&mut self, index: u8) -> Option<&mut UnixStream> {
        let count = self.hosts.len().max(1);
        self.hosts.get_mut(usize::from(index) % count)
    }

    fn keep(&mut self, host: UnixStream) {
        host.set_nonblocking(true).expect("a socket");
        if self.hosts.len() < 32 {
            self.hosts.push(host);
        }
    }

    /// A host reads the guest's bytes, behind the line that answers it.
    fn read(host: &mut UnixStream) {
        let mut bytes = vec![0; 16 << 10];
        if let Ok(got) = host.read(&mut bytes) {
            let strange = |byte: &u8| *byte != MARK && !b"OK 0123456789\n".contains(byte);
            assert!(!bytes[..got].iter().any(strange), "bytes that the guest did not send");
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Packet { op, host, guest, len, room, flags } => {
                let header = header(op, host, guest, u32::from(len), room, flags);
                let data = [(TX_AT + 0x1000, u32::from(len))];
                self.send(&header, if len == 0 { &[] } else { &data });
            }
            Step::Lie { op, host, guest, len, buffers } => {
                let header = header(op, host, guest, len, 1 << 16, 3);
                let most = (RAM - TX_AT - 0x1000) as u32;
                let buffers: Vec<_> = buffers.iter().map(|len| (TX_AT + 0x1000, len % most + 1)).collect();
                // Other data must not reach a host: only the marked part is long enough to be all
                // of it.
                let inside = len <= 0x7_0000 && buffers.iter().all(|(_, len)| *len <= 0x7_0000);
                if inside || len > 256 << 10 {
                    self.send(&header, &buffers);
                }
            }
            Step::Raw { mut header, cid } => {
                header.resize(HEADER, 0);
                header[..8].copy_from_slice(&cid.to_le_bytes());
                // Without data: its bytes would be the header's own.
                header[24..28].fill(0);
                self.send(&header, &[]);
            }
            Step::Receive(count, len) => {
                for n in 0..u16::from(count % 17) {
                    let room = HEADER as u32 + u32::from(len);
                    self.post(RX, n % SIZE, &[(RX_AT + u64::from(n % SIZE) * 0x2000, room)], true);
                }
            }
            Step::Connect(line, proper) => {
                let Ok(mut host) = UnixStream::connect(world().dir.path().join("vm.sock")) else { return };
                let line =
                    if proper { format!("CONNECT {}\n", line.first().unwrap_or(&5) % 8).into_bytes() } else { line };
                let _ = host.write_all(&line[..line.len().min(100)]);
                self.keep(host);
            }
            Step::Write(index, len) => {
                if let Some(host) = self.host(index) {
                    let _ = host.write(&vec![1; usize::from(len)]);
                }
            }
            Step::Read(index) => {
                if let Some(host) = self.host(index) {
                    Self::read(host);
                }
            }
            Step::Shut(index, write) => {
                if let Some(host) = self.host(index) {
                    let _ = host.shutdown(if write { Shutdown::Write } else { Shutdown::Read });
                }
            }
            Step::Close(index) => {
                if !self.hosts.is_empty() {
                    let at = usize::from(index) % self.hosts.len();
                    drop(self.hosts.swap_remove(at));
                }
            }
            Step::Accept => {
                if let Ok((host, _)) = world().open.accept() {
                    self.keep(host);
                }
            }
            Step::Pause => self.pause(),
            Step::Reset => self.set_up(),
        }
    }
}

fn header(op: u8, host: u8, guest: u8, len: u32, room: u32, flags: u8) -> Vec<u8> {
    // Hosts whose connections the guest began have ports from 1 << 30 on.
    let host = match host % 8 {
        0..=2 => OPEN_PORT,
        3 => FULL_PORT,
        4 => 5,
        n => (1 << 30) + u32::from(n) - 5,
    };
    let mut header = Vec::new();
    header.extend(CID.to_le_bytes());
    header.extend(2u64.to_le_bytes());
    header.extend(u32::from(guest % 8).to_le_bytes());
    header.extend(host.to_le_bytes());
    header.extend(len.to_le_bytes());
    header.extend(1u16.to_le_bytes());
    header.extend(u16::from(op % 9).to_le_bytes());
    header.extend(u32::from(flags % 8).to_le_bytes());
    header.extend(room.to_le_bytes());
    header.extend(0u32.to_le_bytes());
    header
}

fuzz_target!(|steps: Vec<Step>| {
    let mut vm = Vm::new();
    for step in steps.into_iter().take(100) {
        vm.step(step);
    }
    vm.pause();
    let connections = vm.device.with_device(|device| {
        let device: &mut SyncDevice<Vsock> = device.as_any().downcast_mut().expect("a socket device");
        device.with(|vsock| vsock.connections())
    });
    assert!(connections.is_none_or(|count| count <= 1024));
    vm.put(regs::STATUS, 0);
    let hosts = std::mem::take(&mut vm.hosts);
    drop(vm);
    // The remaining hosts read the end, and nothing else.
    hosts.into_iter().for_each(|mut host| Vm::read(&mut host));
    while world().open.accept().is_ok() {}
});
