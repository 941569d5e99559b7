//! Egress rules: the driver's packets are judged on their way to the interface.

use clade_devices::virtio::DeviceState;
use clade_devices::virtio::net::{Egress, EgressRule, Net, NetOptions};
use clade_devices::virtio::sync_device::SyncDevice;

use crate::driver::{Driver, ram, store};
use crate::{HEADER, OUT, TX, Wire, frame, net, options, send, stats, tap};

/// An IPv4 packet with a TCP header, from `last` to `to`.
fn tcp(last: u8, to: [u8; 4], port: u16) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, last, 8, 0, 0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 192, 0, 2, 9]);
    frame.extend(to);
    frame.extend([0x9c, 0x40]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 1, 0, 0, 0, 0, 0]);
    frame
}

fn rules(rules: &[&str]) -> Vec<EgressRule> {
    rules.iter().map(|rule| rule.parse().unwrap()).collect()
}

fn set(vm: &Driver, policy: &[&str]) {
    let policy = Egress::new(rules(policy)).unwrap();
    vm.device.with_device(|device| {
        device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap().with(|net| net.set_egress(policy)).unwrap();
    });
}

fn inherited(vm: &Driver) -> usize {
    vm.device.with_device(|device| {
        device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap().with(|net| net.inherited_egress()).unwrap()
    })
}

fn counts(vm: &Driver) -> Vec<Vec<u64>> {
    let packets = vm.device.with_device(|device| {
        device.as_any().downcast_mut::<SyncDevice<Net>>().unwrap().with(|net| net.egress_packets()).unwrap()
    });
    packets.iter().map(|layer| layer.iter().map(|(_, packets)| *packets).collect()).collect()
}

/// Sends packets to these ports of 10.0.0.1. Returns the ports of those that reach the host's side.
fn reached(vm: &mut Driver, wire: &Wire, last: u8, ports: &[u16]) -> Vec<u16> {
    for port in ports {
        send(vm, &tcp(last, [10, 0, 0, 1], *port));
    }
    rustix::io::ioctl_fionbio(&wire.socket, true).unwrap();
    let mut found = Vec::new();
    let mut frame = [0; 2048];
    while let Ok(len) = rustix::io::read(&wire.socket, &mut frame) {
        // The host may send packets of its own, from another address.
        if frame[6..12] == [2, 0, 0, 0, 0, last] {
            assert_eq!((len, &frame[30..34]), (54, &[10, 0, 0, 1][..]), "as it was sent");
            found.push(u16::from_be_bytes([frame[36], frame[37]]));
        }
    }
    found
}

#[test]
fn packets_reach_the_interface_by_the_rules_and_a_child_has_them_too() {
    let (Some((tap, _)), Some((childs, _))) = (tap(1), tap(1)) else { return };
    let wires = [tap.name(), childs.name()].map(|name| Wire::of_kind(name, [8, 0]));
    let store = store();
    let mut parent = Driver::take(net(tap, 1), &ram(&store));
    assert_eq!(reached(&mut parent, &wires[0], 1, &[25, 80]), [25, 80], "without rules");
    set(&parent, &["allow:10.0.0.0/8:80-82/tcp"]);
    let before = stats(&parent);
    assert_eq!(reached(&mut parent, &wires[0], 1, &[25, 80, 82, 83]), [80, 82]);
    // A foreign source address, another destination, and a frame without IP.
    send(&mut parent, &tcp(9, [10, 0, 0, 1], 80));
    send(&mut parent, &tcp(1, [11, 0, 0, 1], 80));
    send(&mut parent, &frame(100, 1));
    let now = stats(&parent);
    assert_eq!((now.egress_dropped, now.sent, now.dropped), (5, before.sent + 2, before.dropped), "{now:?}");
    assert_eq!(counts(&parent), [[2]]);
    // One packet in three buffers, one of which ends within a header.
    let whole = tcp(1, [10, 0, 0, 1], 81);
    parent.fill(OUT, &[0; HEADER]);
    parent.fill(OUT + HEADER as u64, &whole[..20]);
    parent.fill(OUT + 0x1000, &whole[20..37]);
    parent.fill(OUT + 0x2000, &whole[37..]);
    parent.post(TX, &[(OUT, 32, false), (OUT + 0x1000, 17, false), (OUT + 0x2000, 17, false)]);
    parent.wait(TX);
    assert_eq!(reached(&mut parent, &wires[0], 1, &[]), [81]);
    // A child has its parent's rules and its own.
    let mut childs = Some(childs);
    let mut child = parent.fork(&store, |state, _| {
        let DeviceState::Net(state) = &state.device else { panic!("{state:?}") };
        let egress = Some(state.egress.narrowed(&rules(&["deny:10.0.0.1:82"])).unwrap());
        let options = NetOptions { egress, ..options(2) };
        Box::new(SyncDevice::new(Net::new(childs.take().unwrap(), &options, Some(state), true).unwrap()))
    });
    assert_eq!(reached(&mut child, &wires[1], 2, &[25, 80, 81, 82]), [80, 81]);
    assert_eq!(counts(&child), [vec![3], vec![1]]);
    assert_eq!((inherited(&parent), inherited(&child)), (0, 1));
    assert_eq!(reached(&mut parent, &wires[0], 1, &[82]), [82]);
    // The saved rules by default; and again after a reset in place.
    let moment = child.moment();
    child.rewind(&moment);
    assert_eq!(reached(&mut child, &wires[1], 2, &[81, 82, 83]), [81]);
    set(&child, &["allow:10.0.0.0/8:80-82/tcp"]);
    assert_eq!(inherited(&child), 1, "it is the parent's still");
    set(&child, &["allow:10.0.0.0/8:80-83/tcp"]);
    assert_eq!(inherited(&child), 0);
    set(&child, &[]);
    assert_eq!(reached(&mut child, &wires[1], 2, &[82, 83]), [82, 83]);
    assert!(!parent.needs_reset() && !child.needs_reset());
}
