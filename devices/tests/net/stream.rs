//! A device whose packets go to a program over a socket.

use std::io::{Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use clade_devices::virtio::DeviceState;
use clade_devices::virtio::limiter::{Limits, Rate};
use clade_devices::virtio::net::{Link, Net, NetOptions};
use clade_devices::virtio::sync_device::{DeviceOps, SyncDevice};
use clade_host_io::PacketStream;
use clade_test_support::{wait_for, wait_until};

use crate::driver::{Driver, ram, store};
use crate::{HEADER, OUT, RX, TX, frame, offer, options, received, send, set_link, stats, status};

/// The feature bits of checksum and segmentation offload.
const OFFLOADS: u64 = 0b11 | 0b11 << 7 | 0b11 << 11;

fn pair() -> (PacketStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (PacketStream::new(ours.into()), theirs)
}

fn device(stream: PacketStream) -> Box<SyncDevice<Net>> {
    Box::new(SyncDevice::new(Net::new(stream, &options(1), None, false).unwrap()))
}

fn give(program: &mut UnixStream, packet: &[u8]) {
    program.write_all(&[&(packet.len() as u32).to_be_bytes(), packet].concat()).unwrap();
}

fn taken(program: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    program.read_exact(&mut length).unwrap();
    let mut packet = vec![0; u32::from_be_bytes(length) as usize];
    program.read_exact(&mut packet).unwrap();
    packet
}

#[test]
fn packets_go_both_ways_over_a_socket_and_a_child_has_its_own() {
    let ((stream, mut program), (childs, mut childs_program)) = (pair(), pair());
    let store = store();
    let mut parent = Driver::take(device(stream), &ram(&store));
    assert_eq!(with(&parent, |net| net.features()) & OFFLOADS, 0, "nobody computes checksums for the guest");
    let out = frame(900, 3);
    parent.fill(OUT, &[0; HEADER]);
    parent.fill(OUT + HEADER as u64, &out[..10]);
    parent.fill(OUT + 0x1ff0, &out[10..]);
    parent.post(TX, &[(OUT, HEADER as u32 + 10, false), (OUT + 0x1ff0, 890, false)]);
    parent.wait(TX);
    assert_eq!(taken(&mut program), out);
    // Into one buffer, into several, and again after buffers ran out; in pieces of any size.
    (0..8).for_each(|_| offer(&mut parent, 512));
    for (len, seed) in [(60, 1), (500, 2), (1500, 3)] {
        give(&mut program, &frame(len, seed));
        assert_eq!(received(&mut parent), frame(len, seed));
    }
    let both = [frame(1400, 4), frame(1000, 5)];
    let bytes: Vec<u8> = both.iter().flat_map(|one| [&(one.len() as u32).to_be_bytes()[..], one].concat()).collect();
    for part in bytes.chunks(700) {
        program.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    // Each buffer has room for a packet: the device may use the first one as soon as it is there,
    // and cuts off the rest of a longer packet.
    (0..8).for_each(|_| offer(&mut parent, 2048));
    assert_eq!(received(&mut parent), both[0]);
    assert_eq!(received(&mut parent), both[1]);
    // The fork falls within a packet: its rest goes to the parent, like its beginning.
    program.write_all(&[&200u32.to_be_bytes()[..], &frame(200, 6)[..100]].concat()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let mut child = parent.fork(&store, |state, _| {
        let DeviceState::Net(state) = &state.device else { panic!("{state:?}") };
        Box::new(SyncDevice::new(Net::new(childs, &options(2), Some(state), true).unwrap()))
    });
    program.write_all(&frame(200, 6)[100..]).unwrap();
    give(&mut childs_program, &frame(300, 7));
    assert_eq!(received(&mut child), frame(300, 7));
    assert_eq!(received(&mut parent), frame(200, 6));
    send(&mut child, &frame(100, 8));
    send(&mut parent, &frame(100, 9));
    assert_eq!((taken(&mut childs_program), taken(&mut program)), (frame(100, 8), frame(100, 9)));
    assert!(!parent.needs_reset() && !child.needs_reset());
}

/// A pin copies a child's shared pages, and a fork waits for that.
#[test]
fn a_packet_pins_no_more_of_a_buffer_than_it_needs() {
    let ((stream, _program), (childs, mut program)) = (pair(), pair());
    let store = store();
    let parent = Driver::take(device(stream), &ram(&store));
    let mut child = parent.fork(&store, |state, _| {
        let DeviceState::Net(state) = &state.device else { panic!("{state:?}") };
        Box::new(SyncDevice::new(Net::new(childs, &options(2), Some(state), true).unwrap()))
    });
    let own = |vm: &Driver| vm.ram.stats().unwrap().exclusive;
    let before = own(&child);
    // As large as a packet can be, in a buffer of 16 MiB.
    child.post(RX, &[(0x100_0000, 16 << 20, true)]);
    give(&mut program, &frame(1000, 1));
    let (_, len) = child.wait(RX);
    assert_eq!(child.look(0x100_0000 + HEADER as u64, len as usize - HEADER), frame(1000, 1));
    // A packet has 17 pages at most; the rings have some more.
    assert!(own(&child) - before <= 32, "{} pages", own(&child) - before);
}

/// The socket accepts a packet in part. The packet is sent to its end, and later ones wait.
#[test]
fn a_slow_program_gets_every_packet_whole_also_of_a_device_that_is_closed_meanwhile() {
    let (stream, mut program) = pair();
    let mut vm = Driver::take(device(stream), &ram(&store()));
    let large = |seed| frame(40_000, seed);
    let mut posted = 0;
    // Until one waits, because the program does not read.
    for seed in 0..20 {
        vm.fill(OUT, &[0; HEADER]);
        vm.fill(OUT + HEADER as u64, &large(seed));
        vm.post(TX, &[(OUT, HEADER as u32 + 40_000, false)]);
        posted += 1;
        if !is_sent(&mut vm) {
            break;
        }
    }
    assert!((2..20).contains(&posted), "{posted} packets were taken at once");
    let sent = stats(&vm).sent;
    assert_eq!(sent, posted - 1);
    // The waiting packet is not sent any more; accepted ones are, to the last byte.
    assert!(set_link(&vm, Link::Closed));
    vm.wait_until("refused", |vm| stats(vm).blocked_sent == 1);
    for seed in 0..sent {
        assert!(taken(&mut program) == large(seed as u8), "packet {seed}");
    }
    // Packets from the program to a closed device are dropped; after opening, framing is intact.
    give(&mut program, &frame(100, 1));
    vm.wait_until("dropped", |vm| stats(vm).blocked_received == 1);
    assert!(set_link(&vm, Link::Open));
    vm.wait_until("up again", |vm| status(vm) & 1 == 1);
    (0..4).for_each(|_| offer(&mut vm, 2048));
    give(&mut program, &frame(100, 2));
    assert_eq!(received(&mut vm), frame(100, 2));
    send(&mut vm, &frame(100, 3));
    assert_eq!(taken(&mut program), frame(100, 3));
}

/// The device tries it again each millisecond, and the tokens are those of other packets.
#[test]
fn a_packet_that_waits_for_a_slow_program_takes_its_tokens_once() {
    let (stream, mut program) = pair();
    let rate = Rate { per_second: 1, burst: Some(1), once: 40 };
    let send = Limits { operations: Some(rate), bytes: None };
    let net = Net::new(stream, &NetOptions { send, ..options(1) }, None, false).unwrap();
    let mut vm = Driver::take(Box::new(SyncDevice::new(net)), &ram(&store()));
    let post = |vm: &mut Driver| {
        vm.fill(OUT, &[0; HEADER]);
        vm.post(TX, &[(OUT, HEADER as u32 + 40_000, false)]);
        is_sent(vm)
    };
    let posted = (0..20).take_while(|_| post(&mut vm)).count() + 1;
    assert!(posted < 20);
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..posted {
        taken(&mut program);
    }
    vm.wait(TX);
    assert!(post(&mut vm), "the limit is reached after {} packets", posted + 1);
}

/// Waits until the device has sent the posted packet, or a packet that the socket has not accepted to its end waits:
/// the device tries that one again at its deadline, and takes no later one before.
fn is_sent(vm: &mut Driver) -> bool {
    wait_for("the packet is sent, or one waits", || {
        let waits = with(vm, |net| net.deadline().is_some());
        vm.used(TX).map(|_| true).or(waits.then_some(false))
    })
}

#[test]
fn a_program_that_goes_or_lies_takes_the_link_down_and_nothing_else() {
    for lies in [false, true] {
        let (stream, mut program) = pair();
        let mut vm = Driver::take(device(stream), &ram(&store()));
        (0..4).for_each(|_| offer(&mut vm, 2048));
        give(&mut program, &frame(100, 2));
        assert_eq!(received(&mut vm), frame(100, 2));
        assert_eq!(status(&vm), 1);
        if lies {
            program.write_all(&u32::MAX.to_be_bytes()).unwrap();
        } else {
            drop(program);
        }
        vm.wait_until("its link is down", |vm| status(vm) == 0);
        // A descriptor that stays readable does not wake the device for ever either.
        std::thread::sleep(Duration::from_millis(150));
        assert!(!with(&vm, |net| is_readable(net.sources()[0].0)), "it would spin");
        send(&mut vm, &frame(100, 3));
        assert!(!vm.needs_reset());
    }
}

/// A VM suspended with such a packet would never be woken for it: the socket is not watched.
#[test]
fn a_packet_behind_a_full_ring_is_input_until_the_guest_has_it() {
    let (stream, mut program) = pair();
    let mut vm = Driver::take(device(stream), &ram(&store()));
    offer(&mut vm, 2048);
    assert!(!with(&vm, DeviceOps::has_input), "nothing was sent");
    (2..5).for_each(|seed| give(&mut program, &frame(100, seed)));
    assert_eq!(received(&mut vm), frame(100, 2));
    assert!(with(&vm, DeviceOps::has_input), "two wait");
    assert!(!with(&vm, DeviceOps::has_input), "a driver that takes nothing does not keep its VM awake");
    offer(&mut vm, 2048);
    assert_eq!(received(&mut vm), frame(100, 3));
    assert!(with(&vm, DeviceOps::has_input), "it has taken one, and one waits");
    // A closed device drops packets.
    set_link(&vm, Link::Closed);
    vm.wait_until("the packet is dropped", |vm| stats(vm).blocked_received == 1);
    assert!(!with(&vm, DeviceOps::has_input));
    set_link(&vm, Link::Open);
    vm.wait_until("the link is up", |vm| status(vm) == 3);
    (0..4).for_each(|_| offer(&mut vm, 2048));
    wait_until("a source announces what comes now", || {
        give(&mut program, &frame(100, 9));
        assert_eq!(received(&mut vm), frame(100, 9));
        offer(&mut vm, 2048);
        !with(&vm, DeviceOps::has_input)
    });
}

fn with<T>(vm: &Driver, read: impl FnOnce(&mut Net) -> T) -> T {
    vm.device.with_device(|device| device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap().with(read).unwrap())
}

fn is_readable(fd: RawFd) -> bool {
    let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    unsafe { libc::poll(&raw mut polled, 1, 0) == 1 }
}
