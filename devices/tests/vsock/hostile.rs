//! Hostile guests and hosts.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use clade_devices::virtio::VirtioMmio;
use clade_test_support::{Patience, wait_until};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

use crate::driver::Driver;
use crate::guest::{DATA, HEADER, OUT, REQUEST, RESET, RESPONSE, RX, TX, guest};

/// Interval of checks for a pause.
const TICK: Duration = Duration::from_millis(50);

/// The shortest time before the device refuses a connection to a host whose backlog stays full.
const MIN_RETRIES: Duration = Duration::from_secs(2);

fn socket() -> OwnedFd {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None).unwrap()
}

/// A listener at `path` whose backlog is full, and the sockets that fill it.
fn full(path: &Path) -> (UnixListener, Vec<OwnedFd>) {
    let address = SocketAddrUnix::new(path).unwrap();
    let listener = socket();
    bind(&listener, &address).unwrap();
    listen(&listener, 0).unwrap();
    let mut waiting = Vec::new();
    loop {
        let client = socket();
        match connect(&client, &address) {
            Ok(()) => waiting.push(client),
            Err(error) => {
                assert_eq!(error, rustix::io::Errno::AGAIN);
                return (UnixListener::from(listener), waiting);
            }
        }
    }
}

/// Pauses the device for a moment. Calls `rescue` if the pause does not end.
fn pauses(device: &VirtioMmio, rescue: impl FnOnce()) {
    std::thread::scope(|scope| {
        let (paused, heard) = channel();
        scope.spawn(move || {
            device.quiesce();
            device.resume();
            paused.send(()).unwrap();
        });
        let mut patience = Patience::default();
        let ended = loop {
            match heard.recv_timeout(TICK) {
                Ok(()) => break true,
                Err(_) if !patience.tick() => break false,
                Err(_) => {}
            }
        };
        if !ended {
            rescue();
        }
        assert!(ended, "a pause waits for a host");
    });
}

#[test]
fn a_host_whose_backlog_is_full_keeps_nobody_waiting() {
    wait_until("there is room before the device's retries end", connects_to_a_host_that_makes_room);
    wait_until("the guest resets before the device's retries end", refuses_one_and_forgets_another);
}

/// Requests two connections to a host whose backlog stays full: the one that the guest resets is forgotten, and the
/// other is refused. Returns false if the device may have refused the first one before its reset.
fn refuses_one_and_forgets_another() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let (_listener, _waiting) = full(&dir.path().join("vm.sock_78"));
    let mut guest = guest(dir.path());
    let begun = Instant::now();
    guest.send(REQUEST, 78, 5, &[], 1 << 16);
    guest.send(RESET, 78, 5, &[], 1 << 16);
    if begun.elapsed() >= MIN_RETRIES {
        return false;
    }
    guest.send(REQUEST, 78, 6, &[], 1 << 16);
    let answer = guest.packet();
    assert_eq!((answer.op, answer.guest), (RESET, 6));
    true
}

/// Connects to a host whose backlog is full at first. Returns false if the attempt took so long that the device may
/// have refused the connection.
fn connects_to_a_host_that_makes_room() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let (listener, waiting) = full(&dir.path().join("vm.sock_77"));
    let mut guest = guest(dir.path());
    let begun = Instant::now();
    // Not by `send`, which waits until the buffer is used.
    guest.request(77, 5);
    let accept = || {
        listener.set_nonblocking(true).unwrap();
        while listener.accept().is_ok() {}
    };
    pauses(&guest.driver.device, accept);
    guest.driver.wait(TX);
    let is_answered = guest.driver.used(RX).is_some();
    if begun.elapsed() >= MIN_RETRIES {
        return false;
    }
    assert!(!is_answered, "it is neither connected nor refused");
    // Once there is room, the connection is made.
    drop(waiting);
    accept();
    let op = guest.packet().op;
    if begun.elapsed() >= MIN_RETRIES {
        return false;
    }
    assert_eq!(op, RESPONSE);
    true
}

/// Highest resident memory since `reset_peak`, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

fn reset_peak() -> u64 {
    // 5 resets the peak to the present value.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    peak()
}

#[test]
fn a_length_is_not_believed_before_the_room_is_looked_at() {
    /// Length of one buffer, which a packet has twelve times.
    const BUFFER: u32 = 31 << 20;
    const LENGTH: u32 = 12 * BUFFER;
    let dir = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(dir.path().join("vm.sock_77")).unwrap();
    let mut guest = guest(dir.path());
    guest.send(REQUEST, 77, 5, &[], 1 << 16);
    assert_eq!(guest.packet().op, RESPONSE);
    let before = reset_peak();
    let header = guest.header(DATA, 77, 5, LENGTH, 1 << 16);
    guest.driver.fill(OUT, &header);
    let mut buffers = vec![(OUT, HEADER as u32, false)];
    buffers.extend([(0x1000, BUFFER, false); 12]);
    guest.driver.post(TX, &buffers);
    guest.driver.wait(TX);
    assert_eq!(guest.packet().op, RESET);
    let grown = peak().saturating_sub(before);
    assert!(grown < u64::from(LENGTH) / 2, "{grown} bytes for a packet that there is no room for");
    // A packet longer than its buffers breaks the rules of the queue.
    let header = guest.header(DATA, 77, 5, u32::MAX, 1 << 16);
    guest.driver.fill(OUT, &header);
    guest.driver.post(TX, &[(OUT, HEADER as u32, false), (0x1000, 4096, false)]);
    guest.driver.wait_until("asks for a reset", Driver::needs_reset);
}

#[test]
fn the_room_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vm.sock_77")).unwrap();
    let mut guest = guest(dir.path());
    let mut hosts: Vec<UnixStream> = Vec::new();
    for port in [5, 6] {
        guest.send(REQUEST, 77, port, &[], 1 << 16);
        let answer = guest.other();
        assert_eq!((answer.op, answer.guest), (RESPONSE, port));
        hosts.push(listener.accept().unwrap().0);
        let len = answer.room + u32::from(port == 6);
        let header = guest.header(DATA, 77, port, len, 1 << 16);
        guest.driver.fill(OUT, &header);
        guest.driver.post(TX, &[(OUT, HEADER as u32, false), (0x40_0000, len, false)]);
        guest.driver.wait(TX);
        if port == 6 {
            let answer = guest.other();
            assert_eq!((answer.op, answer.guest), (RESET, port), "a byte more than there is room for");
        }
    }
}

#[test]
fn a_buffer_without_room_for_data_does_not_end_the_hosts_stream() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vm.sock_77")).unwrap();
    let mut guest = guest(dir.path());
    guest.send(REQUEST, 77, 5, &[], 1 << 16);
    assert_eq!(guest.packet().op, RESPONSE);
    let mut host = listener.accept().unwrap().0;
    // All buffers that the guest has offered, so that the next one is used.
    for _ in 0..8 {
        host.write_all(b"x").unwrap();
        guest.driver.wait(RX);
    }
    guest.driver.post(RX, &[(0x10_0000, HEADER as u32, true)]);
    host.write_all(b"x").unwrap();
    guest.driver.wait_until("asks for a reset", Driver::needs_reset);
}
