//! Children in other processes: they show the instant of the fork, whatever the ends of earlier
//! processes, and their layers are kept as long as they exist and no longer.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use clade_block::{CommitError, Disk};
use clade_guests::abi::disk::{DiskRun, What};
use clade_guests::abi::{PAGE_SIZE, WORK_BASE};
use clade_memory::{Backing, PageRange};
use clade_test_support::{wait_eq, wait_until};
use clade_tests::{DiskFile, DiskGuest, Guest, Turn, Writer};
use clade_vmm::vm::{ChildOptions, ForkImage, Leases, Overlays, SealedParts, TransferError, Vm};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

const MIB: u64 = 48;
/// Work pages written and checked.
const PAGES: u64 = 3000;
const SECTORS: u64 = 2048;
/// Set in the other processes.
const ROLE: &str = "CLADE_TEST_TRANSFER";

/// An order to another process: a kind, a first page, a number of pages, a seed.
type Order = [u64; 4];
const EXPECT: u64 = 1;
const WRITE: u64 = 2;
const FORK: u64 = 3;
const VERIFY_DISK: u64 = 4;
const WRITE_DISK: u64 = 5;

/// A process with a child of an image.
struct Other {
    socket: OwnedFd,
    process: Child,
}

impl Other {
    fn start(parts: &SealedParts, role: &str) -> Self {
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["another_process", "--exact", "--nocapture", "--test-threads=1"]).env(ROLE, role);
        let process = command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).spawn().unwrap();
        parts.send(&socket).unwrap();
        let other = Self { socket, process };
        other.answered("its VM");
        other
    }

    fn answered(&self, what: &str) {
        let mut answer = [0; 8];
        let (got, _) = recv(&self.socket, &mut answer, RecvFlags::empty()).unwrap();
        assert_eq!(got, 1, "the other process has ended instead of {what}");
    }

    fn ask(&self, kind: u64, first: u64, pages: u64, seed: u64) {
        let order: Order = [kind, first, pages, seed];
        let bytes: Vec<u8> = order.iter().flat_map(|word| word.to_le_bytes()).collect();
        send(&self.socket, &bytes, SendFlags::NOSIGNAL).unwrap();
        if kind != FORK {
            self.answered(&format!("{order:?}"));
        }
    }

    /// Returns an image of its VM, to be passed on.
    fn fork(&self) -> SealedParts {
        self.ask(FORK, 0, 0, 0);
        SealedParts::receive(&self.socket).unwrap()
    }

    fn end(self) {
        let Self { socket, mut process } = self;
        drop(socket);
        assert!(process.wait().unwrap().success());
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Not a test except for [`Other::start`]: carries out the orders of the process that started it.
#[test]
fn another_process() {
    let Some(role) = std::env::var_os(ROLE) else { return };
    let Some(turn) = Turn::take() else { return };
    let socket = rustix::stdio::stdin();
    let backing = if role.to_string_lossy().contains("small") { Backing::Small } else { Backing::Huge };
    let context = turn.context(backing);
    let leases = Leases::default();
    let image =
        ForkImage::import(&context, SealedParts::receive(socket).unwrap().open().unwrap(), Overlays::AsNamed).unwrap();
    let disks = !image.config().disks.is_empty();
    let vm = Vm::from_image(&context, "other", &image, ChildOptions { paused: true, erase: &[], before_start: None })
        .unwrap();
    drop(image);
    let (bare, disk) =
        if disks { (None, Some(DiskGuest { guest: Guest::from(vm) })) } else { (Some(Guest::from(vm)), None) };
    let answer = || send(socket, &[1], SendFlags::NOSIGNAL).unwrap();
    answer();
    let mut bytes = [0; 32];
    while recv(socket, &mut bytes, RecvFlags::empty()).unwrap().0 == 32 {
        let word = |at: usize| u64::from_le_bytes(*bytes[8 * at..].first_chunk().unwrap());
        let (first, pages, seed) = (word(1), word(2), word(3));
        match (word(0), &bare, &disk) {
            (EXPECT, Some(guest), _) => {
                guest.expect(first, pages, (seed != 0).then_some(seed), &format!("{role:?}, seed {seed}"));
            }
            (WRITE, Some(guest), _) => guest.fill(Writer::Guest, first, pages, seed),
            (VERIFY_DISK, _, Some(guest)) => {
                let run = DiskRun { sector: first, ..DiskGuest::whole(What::Verify, pages, seed) };
                guest.expect(run, "the disk it has");
            }
            (WRITE_DISK, _, Some(guest)) => {
                guest.expect(DiskRun { sector: first, ..DiskGuest::whole(What::Write, pages, seed) }, "it writes");
            }
            (FORK, ..) => {
                let guest = bare.as_ref().or(disk.as_ref().map(|disk| &disk.guest)).unwrap();
                guest.fork().0.export(&leases).unwrap().seal().unwrap().send(socket).unwrap();
                continue;
            }
            (kind, ..) => panic!("order {kind}"),
        }
        answer();
    }
}

/// Waits until no other process uses a shared layer.
fn expect_unused(leases: &Leases) {
    wait_eq("images that are still held", &0, || leases.count());
}

fn exported(image: &Arc<ForkImage>, leases: &Leases) -> SealedParts {
    image.export(leases).unwrap().seal().unwrap()
}

#[test]
fn i4_a_child_in_another_process_shows_the_instant_of_the_fork() {
    let Some(turn) = Turn::take() else { return };
    for (backing, role) in [(Backing::Huge, "huge"), (Backing::Small, "small")] {
        let context = turn.context(backing);
        let leases = Leases::default();
        let parent = Guest::boot(&context, MIB, 2);
        parent.fill(Writer::Guest, 0, PAGES, 1);
        let (first, _) = parent.fork();
        // In the background: few pages are in the layer when it is made.
        parent.fill(Writer::Host, 0, PAGES, 2);
        let (second, _) = parent.fork();
        let one = Other::start(&exported(&first, &leases), role);
        let two = Other::start(&exported(&second, &leases), role);
        assert_eq!(leases.count(), 2);
        drop((first, second));
        // The parent's later writes, discards and frozen pages do not affect them.
        for seed in 3..6 {
            parent.fill(Writer::Guest, seed * 10, PAGES - 100, seed);
            drop(parent.fork());
            let unused = PageRange::with_len(WORK_BASE / PAGE_SIZE + 5000, 1000);
            parent.vm().ram().regions()[0].discard(unused).unwrap();
            context.store().sweep();
        }
        one.ask(EXPECT, 0, PAGES, 1);
        two.ask(EXPECT, 0, PAGES, 2);
        one.ask(WRITE, 5, 700, 9);
        two.ask(EXPECT, 0, PAGES, 2);
        one.ask(EXPECT, 5, 700, 9);
        parent.expect(2960, 40, Some(2), "the parent has its own");
        drop(parent);
        context.store().sweep();
        two.ask(EXPECT, 0, PAGES, 2);
        one.ask(EXPECT, 705, PAGES - 705, 1);
        one.end();
        two.kill();
        expect_unused(&leases);
        wait_eq("layers that are left", &0, || context.store().live_layers());
    }
}

/// Pages that the parent has written again are given back only once no other process shows them.
#[test]
fn i8_what_is_given_away_is_swept_when_its_last_user_has_gone_and_not_before() {
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Small);
    let leases = Leases::default();
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, PAGES, 1);
    let (image, _) = parent.fork();
    let other = Other::start(&exported(&image, &leases), "small");
    drop(image);
    // Half of the layer: the other half keeps it.
    parent.fill(Writer::Guest, 0, PAGES / 2, 2);
    drop(parent.fork());
    parent.fill(Writer::Guest, 0, PAGES / 2, 3);
    drop(parent.fork());
    context.store().sweep();
    let before = context.store().given_back();
    other.ask(EXPECT, 0, PAGES, 1);
    other.end();
    expect_unused(&leases);
    // A sweep of the store's own may have punched them, and count them a moment later.
    wait_until("the pages to come back", || {
        context.store().sweep();
        context.store().given_back() - before >= PAGES / 2 - 100
    });
    parent.expect(PAGES / 2, PAGES / 2, Some(1), "what is still shown stays");
    parent.expect(0, PAGES / 2, Some(3), "and what is the parent's");
}

/// A grandchild in a third process shows the first's pages after both of its ancestors have gone.
#[test]
fn a_family_over_three_processes_outlives_its_ancestors() {
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Huge);
    let leases = Leases::default();
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, PAGES, 1);
    let (image, _) = parent.fork();
    let child = Other::start(&exported(&image, &leases), "child");
    drop(image);
    child.ask(WRITE, 0, 1000, 2);
    let grandchild = Other::start(&child.fork(), "grandchild");
    grandchild.ask(WRITE, 100, 50, 3);
    child.ask(WRITE, 0, 1000, 4);
    child.end();
    // The grandchild has layers of both.
    parent.fill(Writer::Guest, 0, PAGES, 5);
    drop(parent.fork());
    context.store().sweep();
    assert_eq!(leases.count(), 1, "the grandchild holds what its parent held");
    grandchild.ask(EXPECT, 0, 100, 2);
    grandchild.ask(EXPECT, 100, 50, 3);
    grandchild.ask(EXPECT, 150, 850, 2);
    grandchild.ask(EXPECT, 1000, PAGES - 1000, 1);
    let great = Other::start(&grandchild.fork(), "great-grandchild");
    grandchild.kill();
    drop((parent, context));
    great.ask(EXPECT, 100, 50, 3);
    great.ask(EXPECT, 1000, PAGES - 1000, 1);
    assert_eq!(leases.count(), 1);
    great.end();
    expect_unused(&leases);
}

/// A fork in the background publishes its layer before it is filled. Another process would read a
/// hole as zeros.
#[test]
fn pages_that_are_still_being_copied_are_there_in_another_process() {
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Small);
    let parent = Guest::boot(&context, MIB, 1);
    parent.fill(Writer::Guest, 0, PAGES, 1);
    drop(parent.fork());
    parent.fill(Writer::Guest, 0, PAGES, 2);
    let (image, _) = parent.fork();
    // A shared layer is held, even without a user in this process.
    let other = Other::start(&exported(&image, &Leases::default()), "small");
    drop(image);
    parent.fill(Writer::Guest, 0, PAGES, 3);
    drop(parent.fork());
    context.store().sweep();
    other.ask(EXPECT, 0, PAGES, 2);
    other.end();
}

#[test]
fn a_child_in_another_process_has_a_disk_of_its_own() {
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Huge);
    let leases = Leases::default();
    let file = DiskFile::new(SECTORS * 512, 1);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    // All of it, after a fork: the image file shows no pages, and a journal has the overlays.
    drop(parent.guest.fork());
    parent.expect(DiskGuest::whole(What::Write, SECTORS, 2), "the parent writes");
    let image = parent.guest.fork().0;
    let other = Other::start(&exported(&image, &leases), "disk");
    drop(image);
    parent.expect(DiskGuest::whole(What::Write, SECTORS / 2, 3), "and again");
    other.ask(VERIFY_DISK, 0, SECTORS / 2, 2);
    other.ask(WRITE_DISK, 0, SECTORS / 2, 4);
    parent.expect(DiskGuest::whole(What::Verify, SECTORS / 2, 3), "its own");
    // Writes in overlays stay there: the other process reads the image.
    parent.vm().stop();
    for disk in parent.vm().take_disks().disks {
        let (_, refused) = *disk.commit().unwrap_err();
        assert!(matches!(refused, CommitError::Shared { others: 1, .. }), "{refused}");
    }
    // The image stays locked, with its first process gone.
    drop(parent);
    drop(context);
    let refused = Disk::open(&file.spec().disk).unwrap_err();
    assert!(refused.to_string().contains("in use") || refused.to_string().contains("lock"), "{refused}");
    other.ask(VERIFY_DISK, 0, SECTORS / 2, 4);
    other.end();
    expect_unused(&leases);
    // Another test's process has all descriptors of this one until it executes its program.
    wait_until("the disk's lock to go", || Disk::open(&file.spec().disk).is_ok());
}

/// Writes are merged into the disk as soon as it has no other user: an image still being dropped
/// would have that refused, and the writes would be lost.
#[test]
fn a_disk_that_others_have_used_is_committed_as_soon_as_none_is_counted() {
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Small);
    for round in 0..6 {
        let leases = Leases::default();
        let file = DiskFile::new(SECTORS * 512, 1);
        let parent = DiskGuest::boot(&context, file.spec(), 1);
        let parts: Vec<SealedParts> = (0..8)
            .map(|seed| {
                parent.expect(DiskGuest::whole(What::Write, SECTORS, 10 * round + seed), "the parent writes");
                exported(&parent.guest.fork().0, &leases)
            })
            .collect();
        parent.vm().stop();
        let disks = parent.vm().take_disks().disks;
        drop(parent);
        drop(parts);
        while leases.count() > 0 {
            std::hint::spin_loop();
        }
        for disk in disks {
            let report = disk.commit().map_err(|refused| refused.1).unwrap();
            assert_eq!(report.copied + report.zeroed, SECTORS * 512, "round {round}");
        }
    }
}

/// Each generation continues from the previous one, which has gone. The layers held for its
/// ancestors do not add up.
#[test]
fn generations_in_processes_of_their_own_hold_as_much_as_the_second() {
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Huge);
    let leases = Leases::default();
    let file = DiskFile::new(SECTORS * 512, 1);
    let parent = DiskGuest::boot(&context, file.spec(), 1);
    parent.expect(DiskGuest::whole(What::Write, SECTORS, 2), "the parent writes");
    let image = parent.guest.fork().0;
    let mut last = Other::start(&exported(&image, &leases), "disk");
    drop((image, parent));
    let held = |other: &Other| std::fs::read_dir(format!("/proc/{}/fd", other.process.id())).unwrap().count();
    // Of its file, of its lease, and of the ring by which it is read.
    const OVERLAY: usize = 4;
    let most = held(&last) + OVERLAY;
    for generation in 3..9 {
        // Half of it: the first layer is shown for ever, of the others only the last.
        last.ask(WRITE_DISK, 0, SECTORS / 2, generation);
        let next = Other::start(&last.fork(), "disk");
        last.end();
        next.ask(VERIFY_DISK, 0, SECTORS / 2, generation);
        next.ask(VERIFY_DISK, SECTORS / 2, SECTORS / 2, 2);
        // Layers that it does not show any more are closed by a thread of its own. The first one's disk has no
        // overlay: its parent wrote into the disk itself.
        wait_until(&format!("more than {most} descriptors to be closed"), || held(&next) <= most);
        last = next;
    }
    last.end();
    expect_unused(&leases);
}

#[test]
fn a_socket_that_says_something_else_is_refused_by_what_it_says() {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let refused = |bytes: &[u8]| {
        send(&theirs, bytes, SendFlags::NOSIGNAL).unwrap();
        SealedParts::receive(ours.as_fd()).unwrap_err().to_string()
    };
    assert!(refused(b"GET / HTTP/1.1\r\n").contains("no image"));
    let hello =
        |version: u32, count: u32| [b"CLADEIMG".as_slice(), &version.to_le_bytes(), &count.to_le_bytes()].concat();
    assert!(refused(&hello(7, 1)).contains("version 7"));
    assert!(refused(&hello(1, 1 << 20)).contains("1048576 descriptors"));
    assert!(refused(&hello(1, 1)).contains("without its bytes"));
    assert!(refused(&[0; 64]).contains("longer"));
    drop(theirs);
    let gone = SealedParts::receive(ours.as_fd()).unwrap_err();
    assert!(
        matches!(&gone, TransferError::System { source, .. } if source.kind() == ErrorKind::UnexpectedEof),
        "{gone}"
    );
}
