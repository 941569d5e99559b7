//! A socket device at the limit of descriptors. A single test, because the limit applies to the
//! process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "driver/mod.rs"]
mod driver;
#[allow(dead_code, reason = "not every test uses all of it")]
#[path = "vsock/guest.rs"]
mod guest;

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::vsock::{Vsock, VsockStats};
use driver::Driver;
use guest::{REQUEST, RESET, RESPONSE, connect, guest, line};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Maximum number of connections of a device.
const MAX_CONNECTIONS: u32 = 1024;
/// Delay before the device tries to accept again.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(100);

fn limit(current: u64) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum }).unwrap();
}

fn stats(driver: &Driver) -> VsockStats {
    driver.device.with_device(|device| {
        let device: &mut SyncDevice<Vsock> = device.as_any().downcast_mut().unwrap();
        device.with(|vsock| vsock.stats()).unwrap()
    })
}

#[test]
fn descriptors_and_connections_are_limited_and_neither_keeps_the_device_busy() {
    let dir = tempfile::tempdir().unwrap();
    limit(4096);
    let mut guest = guest(dir.path());
    // A host connects without a free descriptor for it, and waits in the backlog.
    let client = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let begun = Instant::now();
    // Below the number in use: this process gets no other descriptor.
    limit(3);
    rustix::net::connect(&client, &SocketAddrUnix::new(dir.path().join("vm.sock")).unwrap()).unwrap();
    guest.driver.wait_until("tries again", |driver| stats(driver).accept_failures >= 4);
    let failures = stats(&guest.driver).accept_failures;
    let intervals = begun.elapsed().as_millis() / ACCEPT_INTERVAL.as_millis();
    limit(4096);
    assert!(u128::from(failures) <= intervals + 1, "{failures} attempts in {intervals} intervals");
    // Once a descriptor is free, the connection is accepted without another notification.
    let host = UnixStream::from(client);
    rustix::io::write(&host, b"CONNECT 9\n").unwrap();
    let asked = guest.packet();
    assert_eq!((asked.op, asked.guest), (REQUEST, 9));
    drop(host);

    // Connections of the guest to a host that does not accept them are bounded as well.
    let _listener = UnixListener::bind(dir.path().join("vm.sock_77")).unwrap();
    let mut open = 0;
    let refused = loop {
        guest.send(REQUEST, 77, 1000 + open, &[], 1 << 16);
        let answer = guest.packet();
        if answer.op != RESPONSE {
            break answer;
        }
        open += 1;
        assert!(open <= MAX_CONNECTIONS);
    };
    assert_eq!((refused.op, refused.guest), (RESET, 1000 + open));
    assert_eq!(open, MAX_CONNECTIONS - 1, "with the host's that has gone and was not answered");
    // A refused host reads the end of the stream, and one that ends makes room for another.
    let mut host = UnixStream::connect(dir.path().join("vm.sock")).unwrap();
    assert_eq!(line(&mut host), "", "the host reads the end");
    guest.send(RESET, 77, 1000, &[], 1 << 16);
    let _host = connect(dir.path(), "vm.sock", 10);
    assert_eq!(guest.packet().op, REQUEST);
}
