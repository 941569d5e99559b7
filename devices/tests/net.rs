//! Packets between a driver and a TAP interface of the host's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod driver;
#[path = "net/egress.rs"]
mod egress;
#[path = "net/stream.rs"]
mod stream;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use clade_devices::virtio::DeviceState;
use clade_devices::virtio::limiter::Limits;
use clade_devices::virtio::net::{Link, Mac, Net, NetOptions, NetStats};
use clade_devices::virtio::regs;
use clade_devices::virtio::sync_device::SyncDevice;
use clade_host_io::Tap;
use clade_memory::{Access, PageRange, PinLifetime};
use driver::{Driver, ram, store};
use vm_memory::GuestAddress;

const RX: usize = 0;
const TX: usize = 1;
const IN: u64 = 0x20_0000;
const OUT: u64 = 0x40_0000;
const HEADER: usize = 12;
/// An EtherType that no protocol uses.
const KIND: [u8; 2] = [0x88, 0xb5];

/// The host's side of an interface: raw frames.
struct Wire {
    socket: OwnedFd,
}

fn index(name: &str) -> libc::c_int {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a C string, which outlives the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) as libc::c_int }
}

impl Wire {
    fn on(name: &str) -> Self {
        Self::of_kind(name, KIND)
    }

    fn of_kind(name: &str, kind: [u8; 2]) -> Self {
        let protocol = u16::from_be_bytes(kind).to_be();
        let kind = libc::c_int::from(protocol);
        // SAFETY: numbers only.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, kind) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the kernel has just made it, and no other owner knows it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: protocol,
            sll_ifindex: index(name),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address describes itself, and outlives the call.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        Self { socket }
    }

    fn send(&self, frame: &[u8]) {
        rustix::io::write(&self.socket, frame).unwrap();
    }

    fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let len = rustix::io::read(&self.socket, &mut frame).unwrap();
        frame.truncate(len);
        frame
    }
}

fn up(name: &str) {
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&(libc::IFF_UP as u16).to_ne_bytes());
    // SAFETY: numbers only.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0);
    // SAFETY: the kernel has just made it, and no other owner knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a `struct ifreq`, 40 bytes, which outlives the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

fn tap(queues: usize) -> Option<(Tap, Wire)> {
    match Tap::open("cladet%d", queues) {
        Ok(tap) => {
            up(tap.name());
            let wire = Wire::on(tap.name());
            Some((tap, wire))
        }
        Err(error) => {
            clade_test_support::skip("tap", &error.to_string());
            None
        }
    }
}

fn options(last: u8) -> NetOptions {
    NetOptions {
        mac: Mac([2, 0, 0, 0, 0, last]),
        link: None,
        egress: None,
        receive: Limits::default(),
        send: Limits::default(),
    }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(KIND);
    frame.extend((0..len - 14).map(|n| (n as u8).wrapping_mul(7).wrapping_add(seed)));
    frame
}

fn net(tap: Tap, last: u8) -> Box<SyncDevice<Net>> {
    Box::new(SyncDevice::new(Net::new(tap, &options(last), None, false).unwrap()))
}

/// The frame in the used chains, whose number is in the first one's header.
fn received(vm: &mut Driver) -> Vec<u8> {
    loop {
        let (frame, parts) = any(vm);
        if frame[12..14] == KIND {
            return frame;
        }
        // The host's own frame, a broadcast.
        (0..parts).for_each(|_| offer(vm, 1024));
    }
}

fn any(vm: &mut Driver) -> (Vec<u8>, usize) {
    let mut taken = 0;
    let mut bytes = Vec::new();
    let mut parts = 1;
    while parts > 0 {
        let (head, len) = vm.wait(RX);
        let part = vm.look(IN + u64::from(head) * 0x1000, len as usize);
        if bytes.is_empty() {
            parts = usize::from(u16::from_le_bytes([part[10], part[11]]));
        }
        bytes.extend(part);
        parts -= 1;
        taken += 1;
    }
    (bytes.split_off(HEADER), taken)
}

fn offer(vm: &mut Driver, len: u32) {
    // Each descriptor has a page of its own, by its number.
    let at = IN + 0x1000 * u64::from(vm.next(RX));
    vm.post(RX, &[(at, len, true)]);
}

#[test]
fn packets_go_both_ways_whole() {
    let Some((tap, wire)) = tap(1) else { return };
    let mut vm = Driver::take(net(tap, 1), &ram(&store()));
    let mut mac = [0; 6];
    vm.config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 1]);
    // Sent from two buffers, the first of which ends within the frame's header.
    let out = frame(900, 3);
    vm.fill(OUT, &[0; HEADER]);
    vm.fill(OUT + HEADER as u64, &out[..10]);
    vm.fill(OUT + 0x1ff0, &out[10..]);
    vm.post(TX, &[(OUT, HEADER as u32 + 10, false), (OUT + 0x1ff0, 890, false)]);
    vm.wait(TX);
    assert_eq!(wire.receive(), out);
    // Received into one buffer, into several, and again after buffers ran out.
    (0..8).for_each(|_| offer(&mut vm, 512));
    for (len, seed) in [(60, 1), (500, 2), (1500, 3)] {
        wire.send(&frame(len, seed));
        assert_eq!(received(&mut vm), frame(len, seed));
    }
    wire.send(&frame(1400, 4));
    std::thread::sleep(Duration::from_millis(50));
    (0..8).for_each(|_| offer(&mut vm, 512));
    assert_eq!(received(&mut vm), frame(1400, 4));
    // An invalid packet is dropped, and no other.
    vm.post(TX, &[(OUT, 5, false)]);
    vm.wait(TX);
    assert!(!vm.needs_reset());
    let stats = vm.device.with_device(|device| {
        device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap().with(|net| net.stats()).unwrap()
    });
    assert_eq!((stats.sent, stats.dropped), (1, 1));
    assert!(stats.received >= 4);
}

/// Pages with as many pins as can be counted cannot be pinned until one of the pins ends.
#[test]
fn memory_that_cannot_be_pinned_now_is_pinned_later() {
    let Some((tap, wire)) = tap(1) else { return };
    let mut vm = Driver::take(net(tap, 1), &ram(&store()));
    let pin = |at: u64| {
        let (region, page) = vm.ram.locate(GuestAddress(at)).unwrap();
        region.pin(PageRange::new(page, page + 1), Access::Write, PinLifetime::Transient)
    };
    let saturated = |at: u64| {
        let last = pin(at).unwrap();
        // Leaked: a pin that never ends.
        while let Ok(pin) = pin(at) {
            std::mem::forget(pin);
        }
        last
    };
    let (sent, received_into) = (saturated(OUT), saturated(IN));
    let retries = |vm: &Driver| {
        vm.device.with_device(|device| {
            device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap().with(|net| net.stats().pin_retries).unwrap()
        })
    };
    let out = frame(900, 3);
    vm.fill(OUT, &[0; HEADER]);
    vm.fill(OUT + HEADER as u64, &out);
    vm.post(TX, &[(OUT, HEADER as u32 + 900, false)]);
    vm.wait_until("tries again", |vm| retries(vm) >= 3);
    assert!(!vm.needs_reset() && vm.used(TX).is_none());
    drop(sent);
    vm.wait(TX);
    assert_eq!(wire.receive(), out);
    // The same for a page to receive into.
    let before = retries(&vm);
    (0..8).for_each(|_| offer(&mut vm, 512));
    wire.send(&frame(60, 5));
    vm.wait_until("tries again", |vm| retries(vm) >= before + 3);
    assert!(!vm.needs_reset() && vm.used(RX).is_none());
    drop(received_into);
    assert_eq!(received(&mut vm), frame(60, 5));
}

#[test]
fn a_child_keeps_its_buffers_and_is_made_to_renew() {
    let (Some((tap, wire)), Some((childs, childs_wire))) = (tap(1), tap(1)) else { return };
    let store = store();
    let mut parent = Driver::take(net(tap, 1), &ram(&store));
    (0..6).for_each(|_| offer(&mut parent, 2048));
    wire.send(&frame(100, 1));
    assert_eq!(received(&mut parent), frame(100, 1));
    let begun = Instant::now();
    let mut child = parent.fork(&store, |state, _| {
        let DeviceState::Net(state) = &state.device else { panic!("{state:?}") };
        Box::new(SyncDevice::new(Net::new(childs, &options(2), Some(state), true).unwrap()))
    });
    let status = |vm: &Driver| {
        let mut status = [0; 2];
        vm.config(6, &mut status);
        u16::from_le_bytes(status)
    };
    child.wait_until("told", |vm| vm.get(regs::INTERRUPT_STATUS) & 2 == 2);
    // A slow driver does not miss it.
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(status(&child), 0, "down until the driver has looked");
    child.wait_until("up again", |vm| status(vm) == 3);
    assert!(begun.elapsed() > Duration::from_millis(200));
    assert_eq!(status(&parent), 1);
    // The announcement is acknowledged by the control queue: class 3, command 0.
    child.fill(OUT, &[3, 0]);
    child.post(2, &[(OUT, 2, false), (OUT + 16, 1, true)]);
    assert_eq!(child.wait(2).1, 1);
    assert_eq!((child.look(OUT + 16, 1), status(&child)), (vec![0], 1));
    let mut mac = [0; 6];
    child.config(0, &mut mac);
    assert_eq!(mac[5], 2);
    childs_wire.send(&frame(200, 5));
    wire.send(&frame(300, 6));
    assert_eq!(received(&mut child), frame(200, 5));
    assert_eq!(received(&mut parent), frame(300, 6));
}

fn stats(vm: &Driver) -> NetStats {
    vm.device.with_device(|device| {
        device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap().with(|net| net.stats()).unwrap()
    })
}

fn set_link(vm: &Driver, link: Link) -> bool {
    vm.device.with_device(|device| {
        let device = device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap();
        let changed = device.with(|net| net.set_link(link)).unwrap();
        device.config_changed();
        device.wake();
        changed
    })
}

fn status(vm: &Driver) -> u16 {
    let mut status = [0; 2];
    vm.config(6, &mut status);
    u16::from_le_bytes(status)
}

fn send(vm: &mut Driver, bytes: &[u8]) {
    vm.fill(OUT, &[0; HEADER]);
    vm.fill(OUT + HEADER as u64, bytes);
    vm.post(TX, &[(OUT, (HEADER + bytes.len()) as u32, false)]);
    vm.wait(TX);
}

/// A driver that ignores that its link is down receives nothing, and sends nothing.
fn expect_closed(vm: &mut Driver, wire: &Wire) {
    // Broadcasts of the host while the parent's link was up.
    while vm.used(RX).is_some() {}
    let before = stats(vm);
    send(vm, &frame(100, 1));
    send(vm, &frame(200, 2));
    (0..3).for_each(|seed| wire.send(&frame(300, seed)));
    vm.wait_until("dropped", |vm| stats(vm).blocked_received >= before.blocked_received + 3);
    let now = stats(vm);
    assert_eq!(now.blocked_sent, before.blocked_sent + 2, "{now:?}");
    assert_eq!((now.sent, now.received), (before.sent, before.received));
    assert!(vm.used(RX).is_none() && status(vm) == 0 && !vm.needs_reset());
    // The wire is empty: a read would return a frame at once.
    rustix::io::ioctl_fionbio(&wire.socket, true).unwrap();
    let got = rustix::io::read(&wire.socket, &mut [0; 2048]);
    assert_eq!(got, Err(rustix::io::Errno::AGAIN));
    rustix::io::ioctl_fionbio(&wire.socket, false).unwrap();
}

#[test]
fn a_closed_child_and_its_own_have_no_network_until_they_are_opened() {
    let (Some((tap, wire)), Some((childs, childs_wire)), Some((grandchilds, grandchilds_wire))) =
        (self::tap(1), self::tap(1), self::tap(1))
    else {
        return;
    };
    let store = store();
    let mut parent = Driver::take(net(tap, 1), &ram(&store));
    (0..6).for_each(|_| offer(&mut parent, 2048));
    // Frames that arrived before the child's first turn are not for the child either.
    childs_wire.send(&frame(60, 9));
    let fork = |vm: &mut Driver, tap, link| {
        vm.fork(&store, |state, _| {
            let DeviceState::Net(state) = &state.device else { panic!("{state:?}") };
            let options = NetOptions { link, ..options(2) };
            let net = Net::new(tap, &options, Some(state), true).unwrap();
            let mut down = [1; 2];
            let expected = link.unwrap_or(state.link);
            let device = SyncDevice::new(net);
            clade_devices::virtio::VirtioDevice::read_config(&device, 6, &mut down);
            assert_eq!((expected, down), (Link::Closed, [0; 2]), "down before the first turn");
            Box::new(device)
        })
    };
    let mut child = fork(&mut parent, childs, Some(Link::Closed));
    child.wait_until("told", |vm| vm.get(regs::INTERRUPT_STATUS) & 2 == 2);
    expect_closed(&mut child, &childs_wire);
    assert!(stats(&child).blocked_received >= 4, "with the one before");
    // Longer than an open child's link is down.
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(status(&child), 0);
    // The child of a closed device is closed by default, also after a reset in place.
    let mut grandchild = fork(&mut child, grandchilds, None);
    expect_closed(&mut grandchild, &grandchilds_wire);
    let moment = grandchild.moment();
    grandchild.rewind(&moment);
    grandchild.wait_until("told", |vm| vm.get(regs::INTERRUPT_STATUS) & 2 == 2);
    expect_closed(&mut grandchild, &grandchilds_wire);
    // The parent's device is unchanged.
    wire.send(&frame(300, 6));
    assert_eq!(received(&mut parent), frame(300, 6));
    // After opening, only later frames are received, although the device had no turn to drop the
    // earlier ones.
    child.device.quiesce();
    childs_wire.send(&frame(400, 7));
    assert!(set_link(&child, Link::Open) && !set_link(&child, Link::Open));
    child.device.resume();
    assert_eq!(status(&child), 0, "down until the driver has looked");
    child.wait_until("up again", |vm| status(vm) == 3);
    childs_wire.send(&frame(500, 8));
    assert_eq!(received(&mut child), frame(500, 8));
    send(&mut child, &frame(120, 4));
    assert_eq!(childs_wire.receive(), frame(120, 4));
    // Closed while it runs.
    assert!(set_link(&child, Link::Closed));
    assert_eq!(status(&child), 0, "at once");
    expect_closed(&mut child, &childs_wire);
}

#[test]
fn a_device_that_is_put_back_has_its_buffers_its_address_and_news() {
    let Some((tap, wire)) = tap(1) else { return };
    let mut vm = Driver::take(net(tap, 1), &ram(&store()));
    (0..6).for_each(|_| offer(&mut vm, 2048));
    let moment = vm.moment();
    wire.send(&frame(100, 1));
    assert_eq!(received(&mut vm), frame(100, 1));
    // Another address: class 1, command 1.
    vm.fill(OUT, &[1, 1, 2, 2, 2, 2, 2, 2]);
    vm.post(2, &[(OUT, 8, false), (OUT + 16, 1, true)]);
    vm.wait(2);
    let config = |vm: &Driver| {
        let mut config = [0; 8];
        vm.config(0, &mut config);
        config
    };
    assert_eq!(config(&vm)[..6], [2; 6]);
    for round in 0..2 {
        vm.rewind(&moment);
        vm.wait_until("told", |vm| vm.get(regs::INTERRUPT_STATUS) & 2 == 2);
        assert_eq!(config(&vm), [2, 0, 0, 0, 0, 1, 0, 0], "its own address, and down");
        vm.wait_until("up again", |vm| config(vm)[6] == 3);
        wire.send(&frame(200, round));
        assert_eq!(received(&mut vm), frame(200, round));
    }
}

#[test]
fn queues_are_used_as_the_driver_asks() {
    let Some((tap, wire)) = tap(2) else { return };
    let mut vm = Driver::take(net(tap, 1), &ram(&store()));
    let command = |vm: &mut Driver, bytes: &[u8]| {
        vm.fill(OUT, bytes);
        vm.post(4, &[(OUT, bytes.len() as u32, false), (OUT + 16, 1, true)]);
        vm.wait(4);
        vm.look(OUT + 16, 1)[0]
    };
    assert_eq!(command(&mut vm, &[4, 0, 2, 0]), 0, "two pairs");
    assert_eq!(command(&mut vm, &[4, 0, 3, 0]), 1, "there are no three");
    assert_eq!(command(&mut vm, &[4, 0, 0, 0]), 1);
    assert_eq!(command(&mut vm, &[99, 0]), 1);
    assert_eq!(command(&mut vm, &[1, 1, 2, 9, 9, 9, 9, 9]), 0, "another address");
    // The second pair sends.
    let out = frame(300, 8);
    vm.fill(OUT + 0x1000, &[0; HEADER]);
    vm.fill(OUT + 0x1000 + HEADER as u64, &out);
    vm.post(3, &[(OUT + 0x1000, (HEADER + out.len()) as u32, false)]);
    vm.wait(3);
    assert_eq!(wire.receive(), out);
    assert_eq!(command(&mut vm, &[4, 0, 1, 0]), 0, "one again");
    (0..4).for_each(|_| offer(&mut vm, 2048));
    for seed in 0..20 {
        wire.send(&frame(100, seed));
        assert_eq!(received(&mut vm), frame(100, seed), "every packet comes by the first pair");
        offer(&mut vm, 2048);
    }
}

#[test]
fn addresses_are_parsed_and_refused_by_name() {
    assert_eq!("02:00:00:00:00:0a".parse::<Mac>().unwrap().to_string(), "02:00:00:00:00:0a");
    for bad in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "01:00:00:00:00:00", "2:0:0:0:0:0", "02:00:00:00:00:zz"] {
        assert!(bad.parse::<Mac>().unwrap_err().to_string().contains(bad), "{bad}");
    }
    let (one, two) = (Mac::random().unwrap(), Mac::random().unwrap());
    assert!(one != two && one.0[0] & 3 == 2);
}
