//! Input that the device holds back: a VM suspended with it would never be woken for it.

use std::io::Write;
use std::os::unix::net::UnixListener;

use clade_devices::virtio::sync_device::{DeviceOps, SyncDevice};
use clade_devices::virtio::vsock::Vsock;
use clade_test_support::wait_until;

use crate::guest::{CREDIT_REQUEST, CREDIT_UPDATE, DATA, Guest, REQUEST, RESPONSE, connect, guest};

const PORT: u32 = 77;
/// Size of the guest's buffer.
const ROOM: u32 = 1000;

/// Calls `has_input` between two turns.
fn has_input(guest: &Guest) -> bool {
    guest.driver.device.with_device(|device| {
        let device = device.as_any().downcast_mut::<SyncDevice<Vsock>>().unwrap();
        device.with(DeviceOps::has_input).unwrap()
    })
}

fn taken(guest: &mut Guest, bytes: usize) -> usize {
    let mut taken = 0;
    while taken < bytes {
        let packet = guest.packet();
        assert_eq!(packet.op, DATA);
        taken += packet.data.len();
    }
    taken
}

/// The guest gets a packet each time, so it makes progress. So `has_input` can be false only
/// because a source announces later input.
fn has_none_with_progress(guest: &mut Guest, host: u32, port: u32) {
    wait_until("no input is held back", || {
        guest.send(CREDIT_REQUEST, host, port, &[], ROOM);
        assert_eq!(guest.packet().op, CREDIT_UPDATE);
        !has_input(guest)
    });
}

#[test]
fn bytes_behind_the_guests_credit_are_input_until_the_guest_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join(format!("vm.sock_{PORT}"))).unwrap();
    let mut guest = guest(dir.path());
    guest.send(REQUEST, PORT, 5, &[], ROOM);
    assert_eq!(guest.packet().op, RESPONSE);
    let (mut host, _) = listener.accept().unwrap();
    assert!(!has_input(&guest), "an open connection that is silent");
    host.write_all(&[7; 3 * ROOM as usize]).unwrap();
    assert_eq!(taken(&mut guest, ROOM as usize), ROOM as usize, "as much as it has room for");
    assert!(has_input(&guest), "the rest is in the socket, which is not watched");
    assert!(!has_input(&guest), "a guest that takes nothing does not stay awake for it");
    // The guest makes room, takes some bytes, and has no room again.
    guest.taken = ROOM;
    guest.send(CREDIT_UPDATE, PORT, 5, &[], ROOM);
    taken(&mut guest, ROOM as usize);
    assert!(has_input(&guest), "it has taken some, and there is more");
    guest.taken = 2 * ROOM;
    guest.send(CREDIT_UPDATE, PORT, 5, &[], 2 * ROOM);
    taken(&mut guest, ROOM as usize);
    has_none_with_progress(&mut guest, PORT, 5);
}

#[test]
fn a_connection_that_the_guest_has_not_answered_is_input() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = guest(dir.path());
    assert!(!has_input(&guest));
    let _host = connect(dir.path(), "vm.sock", 9);
    let asked = guest.packet();
    assert!(has_input(&guest), "a host waits for the answer");
    assert!(!has_input(&guest), "a guest that answers nothing does not stay awake for it");
    guest.send(RESPONSE, asked.host, 9, &[], ROOM);
    has_none_with_progress(&mut guest, asked.host, 9);
}
