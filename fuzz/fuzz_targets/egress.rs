//! Any packets of a guest under any egress rules. Packets that leave the device are the guest's
//! own, and a naive model permits them. A well-formed packet leaves exactly when the model permits
//! it, and each packet is counted once.
#![no_main]

use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use clade_devices::MmioDevice;
use clade_devices::virtio::limiter::Limits;
use clade_devices::virtio::net::{Egress, EgressRule, Mac, Net, NetOptions, NetStats};
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::{EventFds, VirtioMmio, regs};
use clade_host_io::PacketStream;
use clade_memory::{GuestRam, RamLayout, Store};
use libfuzzer_sys::{arbitrary, fuzz_target};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 2 << 20;
const SIZE: u16 = 16;
const TX: u64 = 1;
const OUT: u64 = 0x10_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HEADER: usize = 12;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;

/// Few bits of an address differ, so that rules meet packets.
#[derive(arbitrary::Arbitrary, Clone, Copy, Debug)]
struct Address {
    six: bool,
    bits: u8,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Rule {
    allow: bool,
    address: Address,
    prefix: u8,
    ports: Option<(u8, u8)>,
    protocol: u8,
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Shape {
    to: Address,
    protocol: u8,
    port: u8,
    tag: bool,
    /// Options without effect: 4 bytes each of IPv4, 8 of IPv6.
    options: u8,
    /// A checksum for the host to write, where the transport header has it.
    checksum: bool,
    /// The IPv4 header's flags and offset, or IPv6's, if the packet is a fragment.
    fragment: Option<u16>,
    /// Bytes behind the transport header.
    data: u16,
    /// Bytes replaced by others.
    changes: Vec<(u16, u8)>,
    cut: Option<u16>,
}

#[derive(arbitrary::Arbitrary, Debug)]
enum Packet {
    Shaped(Shape),
    Raw(Vec<u8>),
}

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    layers: Vec<Vec<Rule>>,
    /// Packets, with the size of their buffers.
    packets: Vec<(Packet, u8)>,
}

impl Address {
    fn ip(self) -> IpAddr {
        let [a, b, c, d] = [0, 1, 2, 3].map(|bit| self.bits >> bit & 1);
        if self.six {
            IpAddr::from([0xfd, a << 7, 0, 0, 0, 0, 0, b, 0, 0, 0, 0, 0, c << 4, 0, d])
        } else {
            IpAddr::from([a << 7, b, c << 4, d])
        }
    }
}

fn bits(address: IpAddr) -> Vec<bool> {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    octets.iter().flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1 == 1)).collect()
}

impl Rule {
    fn prefix(&self) -> usize {
        usize::from(self.prefix) % (if self.address.six { 129 } else { 33 })
    }

    fn ports(&self) -> Option<(u16, u16)> {
        self.ports.map(|(a, b)| (u16::from(a.min(b)), u16::from(a.max(b)))).filter(|_| self.protocol() != Some(ICMP))
    }

    fn protocol(&self) -> Option<u8> {
        [Some(TCP), Some(UDP), Some(ICMP), None][usize::from(self.protocol % 4)]
    }

    fn text(&self) -> String {
        let kept = bits(self.address.ip()).into_iter().enumerate().map(|(at, bit)| bit && at < self.prefix());
        let kept: Vec<bool> = kept.collect();
        let octets: Vec<u8> =
            kept.chunks(8).map(|octet| octet.iter().fold(0, |all, bit| all << 1 | u8::from(*bit))).collect();
        let address = match *octets {
            [a, b, c, d] => IpAddr::from([a, b, c, d]),
            _ => IpAddr::from(<[u8; 16]>::try_from(octets).expect("16 octets")),
        };
        let verdict = if self.allow { "allow" } else { "deny" };
        let ports = self.ports().map_or(String::new(), |(first, last)| format!(":{first}-{last}"));
        let protocol = match self.protocol() {
            Some(TCP) => "/tcp",
            Some(UDP) => "/udp",
            Some(_) => "/icmp",
            None => "",
        };
        format!("{verdict}:[{address}/{}]{ports}{protocol}", self.prefix())
    }

    fn matches(&self, to: IpAddr, protocol: u8, port: u16) -> bool {
        let own = self.address.ip();
        let is_there = own.is_ipv4() == to.is_ipv4() && bits(own)[..self.prefix()] == bits(to)[..self.prefix()];
        let is_port = self.ports().is_none_or(|(first, last)| protocol != ICMP && (first..=last).contains(&port));
        is_there && is_port && self.protocol().is_none_or(|own| own == protocol)
    }
}

/// Returns whether a packet of `protocol` to that port may leave.
fn allowed(layers: &[Vec<Rule>], to: IpAddr, protocol: u8, port: u16) -> bool {
    layers.iter().filter(|layer| !layer.is_empty()).all(|layer| {
        let decides = layer.iter().find(|rule| rule.matches(to, protocol, port));
        decides.map_or(!layer.iter().any(|rule| rule.allow), |rule| rule.allow)
    })
}

impl Shape {
    fn protocol(&self) -> u8 {
        [TCP, UDP, ICMP][usize::from(self.protocol % 3)]
    }

    /// Returns whether the packet is well-formed, and has its port.
    fn is_plain(&self) -> bool {
        self.fragment.is_none() && self.changes.is_empty() && self.cut.is_none()
    }

    fn transport(&self) -> Vec<u8> {
        let data = usize::from(self.data % 700);
        let mut header = vec![0x9c, 0x40, 0, self.port];
        match self.protocol() {
            TCP => header.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 1, 0, 0, 0, 0, 0]),
            UDP => {
                header.extend((8 + data as u16).to_be_bytes());
                header.extend([0, 0]);
            }
            _ => header = vec![8, 0, 0, 0, 0, 1, 0, 1],
        }
        header.resize(header.len() + data, 0x77);
        header
    }

    fn bytes(&self) -> Vec<u8> {
        let (to, protocol, mut payload) = (self.to.ip(), self.protocol(), self.transport());
        let mut packet = vec![0; HEADER];
        packet.extend([0xff; 6]);
        packet.extend(MAC);
        if self.tag {
            packet.extend([0x81, 0, 0, 7]);
        }
        match to {
            IpAddr::V4(to) => {
                let words = self.options % 5;
                packet.extend([8, 0, 0x45 + words, 0]);
                packet.extend((20 + 4 * u16::from(words) + payload.len() as u16).to_be_bytes());
                packet.extend([0, 1]);
                packet.extend(self.fragment.unwrap_or(0).to_be_bytes());
                packet.extend([64, protocol, 0, 0, 192, 0, 2, 9]);
                packet.extend(to.octets());
                packet.resize(packet.len() + 4 * usize::from(words), 1);
            }
            IpAddr::V6(to) => {
                let mut next = if protocol == ICMP { ICMP6 } else { protocol };
                if let Some(fragment) = self.fragment {
                    let [high, low] = fragment.to_be_bytes();
                    payload.splice(..0, [next, 0, high, low, 0, 0, 0, 1]);
                    next = 44;
                }
                for _ in 0..self.options % 5 {
                    payload.splice(..0, [next, 0, 1, 4, 0, 0, 0, 0]);
                    next = 60;
                }
                packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                packet.extend((payload.len() as u16).to_be_bytes());
                packet.extend([next, 64]);
                packet.extend([0xfe; 16]);
                packet.extend(to.octets());
            }
        }
        packet.extend(&payload);
        let at = (packet.len() - HEADER - self.transport().len()) as u16;
        if self.checksum && self.fragment.is_none() && protocol != ICMP {
            packet[0] = 1;
            packet[6..8].copy_from_slice(&at.to_le_bytes());
            packet[8] = if protocol == TCP { 16 } else { 6 };
        }
        for (at, byte) in &self.changes {
            // Headers, most often.
            let at = usize::from(*at) % if at % 4 == 0 { packet.len() } else { packet.len().min(150) };
            packet[at] = *byte;
        }
        if let Some(cut) = self.cut {
            packet.truncate(usize::from(cut) % (packet.len() + 1));
        }
        packet
    }
}

/// The destination of a packet, as a receiver reads it.
enum Seen {
    Neighbours,
    /// A later fragment has no port.
    To(IpAddr, u8, Option<u16>),
}

/// Reads a packet that has left, as a lenient host would.
fn seen(packet: &[u8]) -> Seen {
    let (header, frame) = packet.split_at(HEADER);
    assert_eq!(frame[6..12], MAC, "another's address");
    let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let at = if word(12) == 0x8100 { 18 } else { 14 };
    let (to, protocol, offset, transport) = match word(at - 2) {
        0x806 => {
            assert_eq!(frame[at + 8..at + 14], MAC, "ARP in another's name");
            return Seen::Neighbours;
        }
        0x800 => {
            let len = usize::from(frame[at] & 15) * 4;
            let (to, ihl) = (<[u8; 4]>::try_from(&frame[at + 16..at + 20]).expect("4 octets"), at + len);
            let mut option = at + 20;
            while option < ihl && frame[option] != 0 {
                assert!(!matches!(frame[option], 131 | 137), "a source route");
                option += if frame[option] == 1 { 1 } else { usize::from(frame[option + 1]).max(1) };
            }
            (IpAddr::from(to), frame[at + 9], word(at + 6) & 0x1fff, ihl)
        }
        0x86dd => {
            let to = IpAddr::from(<[u8; 16]>::try_from(&frame[at + 24..at + 40]).expect("16 octets"));
            let (mut next, mut place, mut offset) = (frame[at + 6], at + 40, 0);
            while matches!(next, 0 | 44 | 60) {
                if next == 44 {
                    offset = word(place + 2) >> 3;
                }
                let len = if next == 44 { 8 } else { 8 * (usize::from(frame[place + 1]) + 1) };
                (next, place) = (frame[place], place + len);
            }
            let kind = frame.get(place);
            if next == ICMP6 && place == at + 40 && frame[at + 7] == 255 && matches!(kind, Some(133 | 135 | 136)) {
                return Seen::Neighbours;
            }
            (to, if next == ICMP6 { ICMP } else { next }, offset, place)
        }
        other => panic!("{other:#x} is neither IP nor ARP"),
    };
    assert!(matches!(protocol, TCP | UDP | ICMP), "protocol {protocol}");
    if header[0] & 1 == 1 {
        let place = usize::from(header[6]) + usize::from(header[7]) * 256 + usize::from(header[8]);
        assert!(header[9] == 0 && protocol != ICMP, "a checksum of nothing");
        assert_eq!(place, transport + if protocol == TCP { 16 } else { 6 }, "a checksum elsewhere");
    }
    let port = (offset == 0 && protocol != ICMP).then(|| word(transport + 2));
    Seen::To(to, protocol, port)
}

/// Returns all ports where a rule begins or ends, and their neighbours.
fn edges(layers: &[Vec<Rule>]) -> Vec<u16> {
    let ports = layers.iter().flatten().filter_map(Rule::ports).flat_map(|(first, last)| [first, last]);
    let near = ports.flat_map(|port| [port.saturating_sub(1), port, port + 1]);
    near.chain([0, u16::MAX]).collect()
}

struct Host {
    _store: Store,
    ram: GuestRam,
    device: VirtioMmio,
    available: u16,
    program: UnixStream,
}

fn ring(queue: u64) -> u64 {
    0x1000 + 0x4000 * queue
}

impl Host {
    fn new() -> Self {
        let store = Store::open_small().expect("a store");
        let ram = GuestRam::reserve(&RamLayout::new(RAM).expect("a layout"), &store).expect("memory");
        ram.populate().expect("memory");
        let (ours, program) = UnixStream::pair().expect("sockets");
        program.set_nonblocking(true).expect("a socket");
        let options =
            NetOptions { mac: Mac(MAC), link: None, egress: None, receive: Limits::default(), send: Limits::default() };
        let net = Net::new(PacketStream::new(ours.into()), &options, None, false).expect("a device");
        let event_fds = EventFds::new(3).expect("eventfds");
        let device = VirtioMmio::new(Box::new(SyncDevice::new(net)), &ram, event_fds, false);
        let host = Self { _store: store, ram, device, available: 0, program };
        [0, 1, 3].iter().for_each(|status| host.put(regs::STATUS, *status));
        host.put(regs::DRIVER_FEATURES_SEL, 1);
        host.put(regs::DRIVER_FEATURES, 1);
        host.put(regs::STATUS, 11);
        for queue in 0..3u32 {
            let base = ring(u64::from(queue)) as u32;
            host.put(regs::QUEUE_SEL, queue);
            host.put(regs::QUEUE_NUM, u32::from(SIZE));
            host.put(regs::QUEUE_DESC_LOW, base);
            host.put(regs::QUEUE_DRIVER_LOW, base + 0x1000);
            host.put(regs::QUEUE_DEVICE_LOW, base + 0x2000);
            host.put(regs::QUEUE_READY, 1);
        }
        host.put(regs::STATUS, 15);
        host
    }

    fn put(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).expect("memory");
    }

    fn net<T>(&self, ask: impl FnOnce(&mut Net) -> T) -> T {
        self.device.with_device(|device| {
            let device: &mut SyncDevice<Net> = device.as_any().downcast_mut().expect("a network device");
            device.with(ask).expect("a device that works")
        })
    }

    /// Sends a packet in buffers of `size` bytes, and waits until the device has handled it.
    /// Returns its counts before and after.
    fn send(&mut self, packet: &[u8], size: usize) -> (NetStats, NetStats) {
        let before = self.net(|net| net.stats());
        self.poke(OUT, packet);
        let size = size.max(packet.len().div_ceil(usize::from(SIZE))).max(1);
        let count = packet.len().div_ceil(size);
        for n in 0..count {
            let (at, begin) = (ring(TX) + 16 * n as u64, n * size);
            let len = size.min(packet.len() - begin) as u32;
            self.poke(at, &(OUT + begin as u64).to_le_bytes());
            self.poke(at + 8, &len.to_le_bytes());
            self.poke(at + 12, &u16::from(n + 1 < count).to_le_bytes());
            self.poke(at + 14, &(n as u16 + 1).to_le_bytes());
        }
        self.poke(ring(TX) + 0x1004 + 2 * u64::from(self.available % SIZE), &0u16.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        let available = self.available;
        self.ram.memory().store(available, GuestAddress(ring(TX) + 0x1002), Ordering::SeqCst).expect("memory");
        self.put(regs::QUEUE_NOTIFY, TX as u32);
        let begun = Instant::now();
        loop {
            let after = self.net(|net| net.stats());
            if looked_at(after) != looked_at(before) {
                return (before, after);
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "a packet is not looked at");
            std::thread::yield_now();
        }
    }

    /// Returns the bytes that the program behind the device has received.
    fn left(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 16];
        match self.program.read(&mut bytes) {
            Ok(len) => bytes.truncate(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => bytes.clear(),
            Err(error) => panic!("the device has gone: {error}"),
        }
        bytes
    }
}

fn looked_at(stats: NetStats) -> u64 {
    stats.sent + stats.dropped + stats.egress_dropped
}

fuzz_target!(|input: Input| {
    static HOST: OnceLock<Mutex<Host>> = OnceLock::new();
    let mut host = HOST.get_or_init(|| Mutex::new(Host::new())).lock().expect("nobody has failed");
    let layers = &input.layers[..input.layers.len().min(4)];
    let rules = |layer: &Vec<Rule>| layer.iter().map(|rule| rule.text().parse().expect("a rule")).collect();
    let Ok(policy) = Egress::try_from(layers.iter().map(rules).collect::<Vec<Vec<EgressRule>>>()) else { return };
    let judges = !policy.is_empty();
    host.net(|net| net.set_egress(policy));
    for (packet, size) in input.packets.iter().take(50) {
        let bytes = match packet {
            Packet::Shaped(shape) => shape.bytes(),
            Packet::Raw(bytes) => bytes.clone(),
        };
        if bytes.is_empty() {
            continue;
        }
        let (before, after) = host.send(&bytes, usize::from(*size));
        let left = host.left();
        assert_eq!(looked_at(after), looked_at(before) + 1, "a packet is counted once");
        assert_eq!(left.is_empty(), after.sent == before.sent, "what is counted as sent is what has left");
        if let Packet::Shaped(shape) = packet
            && shape.is_plain()
        {
            let passes = allowed(layers, shape.to.ip(), shape.protocol(), u16::from(shape.port));
            assert_eq!(!left.is_empty(), passes, "{shape:?}");
        }
        if left.is_empty() {
            continue;
        }
        let frame = &bytes[HEADER..];
        assert_eq!(left[..4], (frame.len() as u32).to_be_bytes(), "one packet");
        assert_eq!(&left[4..], frame, "as it was sent");
        if !judges {
            continue;
        }
        if let Seen::To(to, protocol, port) = seen(&bytes) {
            let ports = port.map_or_else(|| edges(layers), |port| vec![port]);
            for port in ports {
                assert!(allowed(layers, to, protocol, port), "{to} {protocol} {port}");
            }
        }
    }
});
