//! The devices, individually and all together in the middle of a fork.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use clade_devices::Console;
use clade_devices::virtio::net::Egress;
use clade_tests::{BootedLinux, Linux, Subnet, Turn, checked, rerun, skip};
use clade_vmm::platform::virtio_slot;
use clade_vmm::vm::Vm;

use crate::{PAUSED, ask, booted, finish, forked_in_flight};

/// Bytes of the network transfer.
const BYTES: usize = 512 << 10;

/// Waits, with the VM running, until `done` returns a value.
fn wait_for<T>(vm: &Vm, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let from = vm.console().position();
    vm.resume().unwrap();
    let seen = clade_test_support::wait_for(&format!("{}: {what}", vm.name()), || {
        assert!(!Linux::has_died(vm, from), "{}: {what}: a program has died", vm.name());
        done()
    });
    vm.pause().unwrap();
    seen
}

/// Calls `once` until it no longer returns that it would block.
fn patiently<T>(what: &str, mut once: impl FnMut() -> std::io::Result<T>) -> T {
    clade_test_support::wait_for(what, || match once() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        other => Some(other.unwrap_or_else(|error| panic!("{what}: {error}"))),
    })
}

/// Listens for one connection of the guest, and gives it to `with` on a thread.
fn serve<T: Send + 'static>(
    address: Ipv4Addr,
    with: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (u16, thread::JoinHandle<T>) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let served = thread::spawn(move || {
        let (stream, _) = patiently("the guest connects", || listener.accept());
        stream.set_nonblocking(false).unwrap();
        with(stream)
    });
    (port, served)
}

fn pattern(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let word = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..BYTES / 8).flat_map(word).collect()
}

/// Gives both ends of a VM's network their addresses, and waits until the guest reaches the host.
fn connect(vm: &Vm) -> Subnet {
    let subnet = Subnet::take();
    subnet.bring_up(&vm.identity().nets[0].tap);
    let (host, guest) = (subnet.host(), subnet.guest());
    assert_eq!(
        ask(vm, &format!("ip addr flush dev eth0; ip addr add {guest}/24 dev eth0 && ip link set eth0 up && echo up")),
        "up"
    );
    wait_for(vm, "the guest reaches the host", || {
        let answer = Linux::ask(vm, &format!("ping -c 1 -W 5 {host} >/dev/null && echo reached"));
        answer.contains("reached").then_some(())
    });
    subnet
}

/// Has the guest get `data` over TCP into /tmp/data.
fn send_to(vm: &Vm, subnet: &Subnet, data: &[u8]) {
    let bytes = data.to_vec();
    let (port, sent) = serve(subnet.host(), move |mut stream| stream.write_all(&bytes).unwrap());
    let line = format!("nc {} {port} </dev/null >/tmp/data; wc -c </tmp/data", subnet.host());
    assert_eq!(ask(vm, &line), data.len().to_string());
    sent.join().unwrap();
}

fn private_kib(vm: &Vm) -> u64 {
    vm.memory_stats().unwrap().private_kib
}

#[test]
fn linux_chooses_indirect_tables_where_it_can() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let vm = booted.child("features");
    // A character a bit, and the devices in their order. The balloon driver declines: reporting
    // free memory must not allocate any.
    let chosen = ask(&vm, "cat /sys/bus/virtio/devices/*/features | cut -c 29 | tr -d '\\n'; echo");
    assert_eq!(
        chosen,
        if booted.taps { "111101" } else { "11101" },
        "disk, network, sockets, entropy, balloon, console"
    );
}

#[test]
fn linux_siblings_draw_random_bytes_of_their_own() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let (one, two) = (booted.child("one"), booted.child("two"));
    let draw = |vm: &Vm| ask(vm, "xxd -p -l 512 -c 512 /dev/hwrng");
    let (first, second, again) = (draw(&one), draw(&two), draw(&one));
    // Hexadecimal, two digits a byte. Bytes that the driver had drawn ahead at the fork, at most
    // two buffers of 64 bytes, are the same in both.
    for drawn in [&first, &second, &again] {
        assert_eq!(drawn.len(), 1024, "{drawn}");
        assert!(drawn.bytes().all(|digit| digit.is_ascii_hexdigit()), "{drawn}");
    }
    let part = |drawn: &str, at: usize| drawn[at..at + 64].to_owned();
    for at in (256..1024).step_by(64) {
        assert!(
            part(&first, at) != part(&second, at) && part(&first, at) != part(&again, at),
            "{at}: {first} {second}"
        );
    }
}

/// Waits for `text` on a console whose VM may be paused; returns all of its output.
fn heard(console: &Console, text: &str) -> String {
    clade_test_support::wait_for(text, || {
        let (seen, found) = console.wait_for(0, text, Duration::ZERO);
        found.then_some(seen)
    })
}

#[test]
fn linux_is_heard_and_typed_at_on_its_virtio_console() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let vm = booted.child("hvc");
    let hvc = vm.virtio_console().unwrap();
    assert_eq!(ask(&vm, "echo to-the-host >/dev/hvc0; echo said"), "said");
    let _ = heard(hvc, "to-the-host");
    assert_eq!(vm.type_in_virtio(b"from-the-host\n"), 14);
    assert_eq!(ask(&vm, "read -r line </dev/hvc0; echo got-$line >/dev/hvc0; echo read $line"), "read from-the-host");
    let _ = heard(hvc, "got-from-the-host");
    // A child's console begins empty, and goes on.
    let (image, _) = vm.fork().unwrap();
    let child = Vm::from_image(&booted.context, "hvc-child", &image, PAUSED).unwrap();
    assert_eq!(ask(&child, "echo of-the-child >/dev/hvc0; echo said"), "said");
    let seen = heard(child.virtio_console().unwrap(), "of-the-child");
    assert!(!seen.contains("from-the-host"), "{seen}");
    assert!(!hvc.wait_for(0, "of-the-child", Duration::ZERO).1);
}

#[test]
fn linux_gives_memory_back_when_asked_and_when_it_has_it_free() {
    const MIB: u64 = 36;
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let vm = booted.child("balloon");
    let use_memory = "dd if=/dev/zero of=/tmp/fill bs=1M count=20 2>/dev/null; rm /tmp/fill; echo used";
    assert_eq!(ask(&vm, use_memory), "used");
    let before = private_kib(&vm);
    assert!(before > 20 << 10, "{before} KiB are the VM's own");

    // Large enough to include a part of the used memory: some 48 MiB are free.
    vm.set_balloon(MIB).unwrap();
    wait_for(&vm, "the balloon inflates", || (vm.balloon_stats().unwrap().actual == MIB as u32 * 256).then_some(()));
    let (inflated, stats) = (private_kib(&vm), vm.balloon_stats().unwrap());
    println!("private memory: {before} KiB, with {MIB} MiB in the balloon {inflated} KiB; {stats:?}");
    assert!(inflated + (6 << 10) < before, "{before} then {inflated} KiB");
    assert_eq!((stats.discarded, stats.pinned), (MIB * 256, 0));
    let free = |vm: &Vm| {
        let text = ask(vm, "while read -r key kib unit; do [ $key = MemFree: ] && echo $kib; done </proc/meminfo");
        text.parse::<u64>().unwrap_or_else(|_| panic!("{text:?}"))
    };
    assert!(free(&vm) < 20 << 10, "of some 48 MiB");
    // The guest's own statistics agree.
    let answers = vm.balloon_stats().unwrap().answers;
    vm.ask_balloon().unwrap();
    wait_for(&vm, "the guest answers", || (vm.balloon_stats().unwrap().answers > answers).then_some(()));

    // After a fork, both keep their balloons; the child takes its pages back and finds them usable.
    let (image, _) = vm.fork().unwrap();
    let child = Vm::from_image(&booted.context, "deflating", &image, PAUSED).unwrap();
    assert_eq!(child.balloon_stats().unwrap().actual, MIB as u32 * 256);
    child.set_balloon(0).unwrap();
    wait_for(&child, "the balloon deflates", || (child.balloon_stats().unwrap().actual == 0).then_some(()));
    assert!(free(&child) > 36 << 10);
    assert_eq!(vm.balloon_stats().unwrap().actual, MIB as u32 * 256, "the parent's is its own");

    // From now on free runs of 128 KiB are reported; the kernel wants 4 MiB in a VM with so little
    // memory, more such runs than it has.
    let reported = child.balloon_stats().unwrap().discarded;
    assert_eq!(ask(&child, "echo 5 >/sys/module/page_reporting/parameters/page_reporting_order; echo set"), "set");
    assert_eq!(ask(&child, use_memory), "used");
    let enough = reported + (20 << 8);
    wait_for(&child, "free memory is reported", || (child.balloon_stats().unwrap().discarded > enough).then_some(()));
    println!("private memory after what is free was reported: {} KiB", private_kib(&child));
    assert!(private_kib(&child) < 16 << 10);
    let again = "dd if=/dev/zero of=/tmp/fill bs=1M count=4 2>/dev/null; rm /tmp/fill; echo used";
    assert_eq!(ask(&child, again), "used", "and can be used again");
}

/// Reads a guest program's output. A program that dies ends the connection.
fn read_exact(vm: &Vm, from: u64, stream: &mut UnixStream, bytes: &mut [u8]) {
    if let Err(error) = stream.read_exact(bytes) {
        Linux::has_died(vm, from);
        panic!("{}: {error}", vm.name());
    }
}

/// Reads the end of the guest's stream. If the host closed its socket before the guest has ended its own stream, the
/// guest might read ENOTCONN in place of the end: Linux's `shutdown` clears the flag by which a read knows the end.
fn expect_end(vm: &Vm, from: u64, stream: &mut UnixStream) {
    let mut rest = Vec::new();
    if let Err(error) = stream.read_to_end(&mut rest) {
        Linux::has_died(vm, from);
        panic!("{}: {error}", vm.name());
    }
    assert!(rest.is_empty(), "{rest:?}");
}

/// The guest connects to the host, and the host to the guest.
fn talk(vm: &Vm, word: &str) {
    let socket = vm.identity().vsock.clone().unwrap().socket;
    let path = |port: u32| PathBuf::from(format!("{}_{port}", socket.display()));
    // A repeated test finds the earlier file.
    let _ = std::fs::remove_file(path(5000));
    let listener = UnixListener::bind(path(5000)).unwrap();
    listener.set_nonblocking(true).unwrap();
    vm.resume().unwrap();
    let from = vm.console().position();
    vm.type_in(format!("echo from-{word} | vsock connect 2 5000\n").as_bytes());
    let (mut stream, _) = patiently("the guest connects", || {
        assert!(!Linux::has_died(vm, from), "a program has died before it connected");
        listener.accept()
    });
    stream.set_nonblocking(false).unwrap();
    let wanted = format!("from-{word}\n");
    let mut got = vec![0; wanted.len()];
    read_exact(vm, from, &mut stream, &mut got);
    assert_eq!(String::from_utf8_lossy(&got), wanted);
    expect_end(vm, from, &mut stream);
    stream.write_all(format!("answer-to-{word}\n").as_bytes()).unwrap();
    drop(stream);
    let text = finish(vm, from);
    assert!(text.contains(&format!("answer-to-{word}")) && text.contains("closed"), "{text}");
    std::fs::remove_file(path(5000)).unwrap();

    let from = vm.console().position();
    vm.type_in(format!("echo served-{word} | vsock listen 6000\n").as_bytes());
    let _ = Linux::expect(vm, from, "listening");
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"CONNECT 6000\n").unwrap();
    let mut said = Vec::new();
    while said.iter().filter(|byte| **byte == b'\n').count() < 2 {
        let mut byte = [0];
        read_exact(vm, from, &mut stream, &mut byte);
        said.extend(byte);
    }
    let said = String::from_utf8_lossy(&said);
    assert!(said.starts_with("OK ") && said.ends_with(&format!("\nserved-{word}\n")), "{said:?}");
    expect_end(vm, from, &mut stream);
    stream.write_all(format!("asked-of-{word}\n").as_bytes()).unwrap();
    drop(stream);
    let text = finish(vm, from);
    assert!(text.contains(&format!("asked-of-{word}")), "{text}");
    vm.pause().unwrap();
}

#[test]
fn linux_talks_through_sockets_both_ways() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    rerun(|| talks_through_sockets_both_ways(&booted));
}

fn talks_through_sockets_both_ways(booted: &BootedLinux) {
    let vm = booted.child("sockets");
    assert_eq!(vm.identity().vsock.clone().unwrap().socket, booted.dir.join("sockets.vsock"));
    talk(&vm, "one");
    // Without a listener: refused, and nothing else.
    vm.resume().unwrap();
    let text = Linux::ask(&vm, "vsock connect 2 5001 </dev/null");
    vm.pause().unwrap();
    assert!(text.contains("failed 104"), "{text}");
    talk(&vm, "two");
}

#[test]
fn linux_is_put_back_with_everything_it_has() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    rerun(|| is_put_back_with_everything_it_has(&booted));
}

fn is_put_back_with_everything_it_has(booted: &BootedLinux) {
    let vm = booted.child("reset");
    assert_eq!(ask(&vm, "mkdir -p /d && mount /dev/vda /d && echo mounted"), "mounted");
    for round in 0..3 {
        assert_eq!(ask(&vm, "echo here > /tmp/marker; cat /tmp/marker"), "here");
        // Running, with writes in flight to the disk, and a connection that the guest holds.
        vm.resume().unwrap();
        vm.type_in(b"dd if=/dev/urandom of=/d/new bs=64k count=64 conv=fsync 2>/dev/null; echo end-of-write\n");
        thread::sleep(Duration::from_millis(300));
        vm.reset_to_origin().unwrap();
        let from = vm.console().position();
        assert!(!vm.is_paused());
        vm.pause().unwrap();
        assert_eq!(ask(&vm, "ls /tmp/marker /d 2>&1 | grep -c 'No such'"), "2", "round {round}");
        assert!(!String::from_utf8_lossy(&vm.console().since(from)).contains("end-of-write"));
        assert_eq!(ask(&vm, "mkdir -p /d && mount /dev/vda /d && ls /d"), "lost+found", "round {round}");
        assert_eq!(ask(&vm, "head -c 8 /dev/hwrng | wc -c"), "8");
        talk(&vm, &format!("round-{round}"));
    }
}

#[test]
fn linux_moves_bytes_through_its_network() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    rerun(|| moves_bytes_through_its_network(&booted));
}

fn moves_bytes_through_its_network(booted: &BootedLinux) {
    if !booted.taps {
        return skip("tap", "there are no TAP interfaces");
    }
    let vm = booted.child("network");
    let subnet = connect(&vm);
    let data = pattern(1);
    send_to(&vm, &subnet, &data);
    let (port, back) = serve(subnet.host(), |mut stream| {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got
    });
    assert_eq!(ask(&vm, &format!("nc {} {port} </tmp/data; echo sent", subnet.host())), "sent");
    assert!(back.join().unwrap() == data, "every byte came back as it went");
    let stats = vm.net_stats(0).unwrap();
    println!("{stats:?}");
    assert!(stats.received_bytes > BYTES as u64 && stats.sent_bytes > BYTES as u64, "{stats:?}");
    by_rules(&vm, &subnet, &data);
}

/// The same guest with egress rules: it reaches one port of the host, from the address that the
/// host has given it alone. Its kernel leaves checksums and segments to the host.
fn by_rules(vm: &Vm, subnet: &Subnet, data: &[u8]) {
    let host = subnet.host();
    let (port, back) = serve(host, |mut stream| {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got
    });
    let other = TcpListener::bind((host, 0)).unwrap();
    let denied = other.local_addr().unwrap().port();
    let rule = format!("allow:{host}:{port}/tcp").parse().unwrap();
    vm.set_egress(&Egress::new(vec![rule]).unwrap()).unwrap();
    let attempt = |port: u16| {
        assert_eq!(ask(vm, &format!("timeout 2 nc {host} {port} </dev/null; echo tried")), "tried");
    };
    let begun = vm.net_stats(0).unwrap();
    let until = |what: &str, port: u16, done: &dyn Fn() -> bool| {
        clade_test_support::wait_until(what, || {
            // On a busy host the guest has sent nothing in two seconds.
            attempt(port);
            done()
        });
    };
    let dropped = || vm.net_stats(0).unwrap().egress_dropped;
    // The driver copied its parent's address when it booted.
    until("a packet with the parent's address is dropped", port, &|| dropped() > 0);
    let (address, spoofed) = (vm.identity().nets[0].mac, vm.net_stats(0).unwrap());
    assert_eq!(spoofed.sent, begun.sent, "{spoofed:?}");
    assert_eq!(ask(vm, &format!("ip link set eth0 address {address} && echo set")), "set");
    until("a packet to another port is dropped", denied, &|| dropped() > spoofed.egress_dropped);
    assert_eq!(ask(vm, &format!("nc {host} {port} </tmp/data; echo sent")), "sent");
    assert!(back.join().unwrap() == data, "every byte came as it went");
    other.set_nonblocking(true).unwrap();
    assert_eq!(other.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let packets = vm.egress_packets(0).unwrap()[0][0].1;
    assert!(packets > 3, "{packets} by the rule");
    vm.set_egress(&Egress::default()).unwrap();
    until("a connection without rules", denied, &|| other.accept().is_ok());
}

/// Takes half of the data, and the rest when it is released.
struct Slow {
    received: AtomicUsize,
    released: AtomicBool,
}

impl Slow {
    fn read(&self, mut stream: TcpStream) -> Vec<u8> {
        let mut got = Vec::new();
        let mut part = vec![0; 16 << 10];
        loop {
            let len = stream.read(&mut part).unwrap();
            if len == 0 {
                return got;
            }
            got.extend(&part[..len]);
            self.received.store(got.len(), Ordering::SeqCst);
            while got.len() > BYTES / 2 && !self.released.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

#[test]
fn linux_is_forked_in_the_middle_of_everything() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    rerun(|| is_forked_in_the_middle_of_everything(&booted));
}

fn is_forked_in_the_middle_of_everything(booted: &BootedLinux) {
    if !booted.taps {
        return skip("tap", "there are no TAP interfaces");
    }
    let parent = booted.child("parent");
    let subnet = connect(&parent);
    let data = pattern(2);
    send_to(&parent, &subnet, &data);
    assert_eq!(ask(&parent, "mkdir -p /tmp/d && mount -t ext4 /dev/vda /tmp/d && echo mounted"), "mounted");
    let carrier = |vm: &Vm| ask(vm, "cat /sys/class/net/eth0/carrier_changes").parse::<u64>().unwrap();
    let changes = carrier(&parent);
    // A connection without traffic.
    let held_path = booted.dir.join("parent.vsock_7000");
    for left in ["parent.vsock_7000", "at-the-fork", "of-the-parent", "of-the-child"] {
        // From an earlier run.
        let _ = std::fs::remove_file(booted.dir.join(left));
    }
    let listener = UnixListener::bind(&held_path).unwrap();
    listener.set_nonblocking(true).unwrap();
    assert_eq!(ask(&parent, "mkfifo /tmp/f; vsock connect 2 7000 <>/tmp/f & echo begun"), "begun");
    let (mut held, _) = wait_for(&parent, "the guest connects", || listener.accept().ok());

    // A transfer and a file at once, and the fork in the middle of both.
    let slow = Arc::new(Slow { received: AtomicUsize::new(0), released: AtomicBool::new(false) });
    let reader = Arc::clone(&slow);
    let (port, transfer) = serve(subnet.host(), move |stream| reader.read(stream));
    parent.resume().unwrap();
    let host = subnet.host();
    let write = "dd if=/tmp/data of=/tmp/d/big bs=64k conv=fsync 2>/dev/null; echo file-$?";
    let begin = format!("nc {host} {port} </tmp/data & net=$!; {write}");
    let (image, from) = forked_in_flight(&parent, [&begin, write], || slow.received.load(Ordering::SeqCst) > 0);
    let received = slow.received.load(Ordering::SeqCst);
    println!("forked with {received} of {BYTES} bytes sent");
    assert!(received < BYTES, "it is let go afterwards");
    slow.released.store(true, Ordering::SeqCst);
    // The parent is undisturbed.
    let text = finish(&parent, from);
    assert!(text.contains("file-0"), "{text}");
    parent.pause().unwrap();
    assert_eq!(ask(&parent, "wait $net; echo sent-$?"), "sent-0");
    assert!(transfer.join().unwrap() == data, "the transfer is whole");
    assert_eq!(ask(&parent, "cmp /tmp/data /tmp/d/big && echo same"), "same");
    let from = parent.console().position();
    held.write_all(b"are-you-there\n").unwrap();
    wait_for(&parent, "the connection goes on", || {
        parent.console().wait_for(from, "are-you-there", Duration::ZERO).1.then_some(())
    });
    assert_eq!(carrier(&parent), changes, "its link stayed up");

    let child = Vm::from_image(&booted.context, "child", &image, PAUSED).unwrap();
    let (own, parents) = (child.identity().clone(), parent.identity().clone());
    assert!(own.nets[0].mac != parents.nets[0].mac && own.nets[0].tap != parents.nets[0].tap, "{own:?} {parents:?}");
    let vsock = own.vsock.clone().unwrap();
    assert_eq!(vsock.socket, booted.dir.join("child.vsock"));
    assert!(Some(vsock.cid) != parents.vsock.map(|vsock| vsock.cid));
    // Its file is written to the end as well, and its connection was reset.
    child.resume().unwrap();
    let text = finish(&child, 0);
    assert!(text.contains("file-0"), "{text}");
    // Linux returns ENOTCONN from a read of a socket that its device has reset.
    let _ = Linux::expect(&child, 0, "failed 107");
    child.pause().unwrap();
    assert_eq!(ask(&child, "kill $net; cmp /tmp/data /tmp/d/big && echo same"), "same");
    talk(&child, "child");
    // Its link went down and came up.
    clade_test_support::wait_until("two changes of the link", || carrier(&child) >= changes + 2);
    // The device has its own address, and a driver that is bound again takes it.
    let (base, _) = virtio_slot(1).unwrap();
    let word = |at: u64, bits: u32| ask(&child, &format!("devmem {:#x} {bits}", base.0 + 0x100 + at));
    let [a, b, c, d, e, f] = own.nets[0].mac.0;
    assert_eq!(word(0, 32), format!("0x{:08X}", u32::from_le_bytes([a, b, c, d])));
    assert_eq!(word(4, 16), format!("0x{:04X}", u16::from_le_bytes([e, f])));
    let rebind = "cd /sys/bus/virtio/drivers/virtio_net; d=$(echo virtio*); echo $d >unbind; echo $d >bind; cat /sys/class/net/eth0/address";
    assert_eq!(ask(&child, rebind), own.nets[0].mac.to_string());
    let subnet = connect(&child);
    send_to(&child, &subnet, &pattern(3));

    // The disk at the instant of the fork is consistent, and so are both later ones.
    checked(&image, &booted.dir.join("at-the-fork"));
    for (vm, name) in [(&parent, "of-the-parent"), (&child, "of-the-child")] {
        assert_eq!(ask(vm, "umount /tmp/d && echo gone"), "gone");
        let (image, _) = vm.fork().unwrap();
        checked(&image, &booted.dir.join(name));
    }
}
