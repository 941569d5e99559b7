//! A VM saved once, and restored many times, each time as another VM.

use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clade_memory::Backing;
use clade_tests::Turn;
use clade_vmm::vm::{Context, ForkImage, GenerationId, RestoreOptions, SnapshotOptions, Vm};

use crate::{PAUSED, ask, ask_all, booted};
use clade_snapshot::ParentDirs;

/// Clones of the ordinary suite, and of the long tier.
const CLONES: usize = 8;
const MANY_CLONES: usize = 50;
/// Largest error of a clock, beside the uncertainty of its reading.
const CLOCK: f64 = 0.05;
/// Age of the snapshot at its restore: a clock that stands still meanwhile is wrong by as much.
const AGE: Duration = Duration::from_secs(3);

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// A clock of a guest.
#[derive(Clone, Copy, Debug)]
enum Clock {
    Boot,
    Day,
}

/// A reading of a guest's clock, and the host's time before and after.
struct Reading {
    guest: f64,
    before: f64,
    after: f64,
}

fn read(vm: &Vm, clock: Clock) -> Reading {
    let before = now();
    let text = match clock {
        Clock::Boot => ask(vm, "read -r up idle </proc/uptime; echo $up"),
        Clock::Day => ask_all(vm, "adjtimex"),
    };
    let after = now();
    let guest = parsed(clock, &text).unwrap_or_else(|| panic!("{clock:?}: {text:?}"));
    Reading { guest, before, after }
}

fn parsed(clock: Clock, text: &str) -> Option<f64> {
    let field = |key: &str| text.lines().find_map(|line| line.trim().strip_prefix(key)?.trim().parse::<f64>().ok());
    match clock {
        Clock::Boot => text.parse().ok(),
        // Seconds and microseconds.
        Clock::Day => Some(field("time.tv_sec:")? + field("time.tv_usec:")? / 1e6),
    }
}

const IDENTITY: &str = "read -r uuid </proc/sys/kernel/random/uuid; read -r file </tmp/d/before; echo $uuid $file";

#[test]
fn linux_is_saved_once_and_restored_as_others() {
    saved_once_and_restored(CLONES);
}

#[test]
#[ignore = "long: minutes where guest kernels are interpreted"]
fn linux_is_saved_once_and_restored_as_fifty_others() {
    saved_once_and_restored(MANY_CLONES);
}

fn saved_once_and_restored(clones: usize) {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let parent = booted.child("saved");
    assert_eq!(ask(&parent, "mkdir -p /tmp/d && mount -t ext4 /dev/vda /tmp/d && echo mounted"), "mounted");
    assert_eq!(ask(&parent, "echo before >/tmp/d/before && sync && echo synced"), "synced");
    let first = [Clock::Boot, Clock::Day].map(|clock| read(&parent, clock));

    parent.resume().unwrap();
    let at = booted.dir.join("snapshot");
    let report = parent.snapshot(&at, SnapshotOptions::default()).unwrap();
    parent.pause().unwrap();
    println!(
        "saved {} pages of data in {:?}, paused for {:?}",
        report.saved.data_pages, report.took, report.times.pause
    );
    // Written after the snapshot: in no clone's past. And the original goes away, with its memory.
    assert_eq!(ask(&parent, "echo after >/tmp/d/after && sync && echo synced"), "synced");
    let of_parent = GenerationId::of(parent.ram().memory()).unwrap();
    drop(parent);
    std::thread::sleep(AGE);

    let context = turn.context(Backing::Huge);
    let (mut uuids, mut ids, mut took) = (HashSet::new(), HashSet::from([of_parent]), Vec::new());
    for number in 0..clones {
        let begun = Instant::now();
        let vm = restored(&context, &at, &format!("clone-{number}"));
        let answer = ask(&vm, IDENTITY);
        took.push(begun.elapsed());
        let (uuid, file) = answer.split_once(' ').unwrap_or_else(|| panic!("{answer:?}"));
        assert_eq!(file, "before", "what was written before is there");
        assert!(uuids.insert(uuid.to_owned()), "clone {number} makes up what another has: {uuid}");
        assert!(ids.insert(GenerationId::of(vm.ram().memory()).unwrap()), "clone {number} is another's twin");
        match number {
            // Two at the same time: neither sees the other's writes.
            0 => two_write_apart(&vm, &restored(&context, &at, "clone-0-twin")),
            1 => clocks_are_right(&vm, &first),
            2 => kernels_reseed(&vm, &restored(&context, &at, "clone-2-other")),
            3 => a_reset_is_another_too(&vm, &mut uuids, &mut ids),
            _ => {}
        }
    }
    took.sort_unstable();
    println!(
        "{clones} clones: from the directory to an answer on the console in {:?} (p50), {:?} (p99)",
        took[clones / 2],
        took[clones - 1]
    );
    clade_snapshot::verify(&at, &ParentDirs::siblings()).unwrap();
}

fn restored(context: &Context, at: &std::path::Path, name: &str) -> Vm {
    let options = RestoreOptions { sockets: at.parent().map(Into::into), ..RestoreOptions::default() };
    let image = ForkImage::restore(context, at, &options).unwrap();
    Vm::from_image(context, name, &image, PAUSED).unwrap()
}

fn two_write_apart(one: &Vm, other: &Vm) {
    for (vm, mark) in [(one, "one"), (other, "other")] {
        assert_eq!(ask(vm, "[ -e /tmp/d/after ] && echo there || echo not-there"), "not-there");
        assert_eq!(ask(vm, &format!("echo {mark} >/tmp/d/who && sync && echo ok")), "ok");
    }
    for (vm, mark) in [(one, "one"), (other, "other")] {
        assert_eq!(ask(vm, "read -r who </tmp/d/who; echo $who"), mark);
    }
}

/// The time since boot, and the time of day, have advanced while the VM was a file. (A guest whose
/// kernel is interpreted loses seconds while it boots, so its time of day is compared with its
/// earlier value, and not with the host's.)
fn clocks_are_right(vm: &Vm, first: &[Reading; 2]) {
    for (first, clock) in first.iter().zip([Clock::Boot, Clock::Day]) {
        let second = read(vm, clock);
        let passed = second.guest - first.guest;
        let (least, most) = (second.before - first.after, second.after - first.before);
        println!("{clock:?}: {passed:.2} s have passed for the guest, {least:.2} to {most:.2} s for the host");
        assert!((least - CLOCK..=most + CLOCK).contains(&passed), "{clock:?}: {passed} s, not {least} to {most}");
        assert!(passed > AGE.as_secs_f64());
    }
}

/// The kernels log their new generation, and their random numbers differ.
fn kernels_reseed(one: &Vm, other: &Vm) {
    let random = |vm: &Vm| ask_all(vm, "od -An -tx1 -N16 /dev/urandom").split_whitespace().collect::<String>();
    let (a, b) = (random(one), random(other));
    assert_eq!((a.len(), b.len()), (32, 32), "{a} {b}");
    assert_ne!(a, b, "two clones draw the same");
    let said = ask_all(one, "dmesg");
    assert!(said.contains("crng reseeded due to virtual machine fork"), "{said:?}");
}

fn a_reset_is_another_too(vm: &Vm, uuids: &mut HashSet<String>, ids: &mut HashSet<GenerationId>) {
    assert_eq!(ask(vm, "echo mine >/tmp/d/mine && sync && echo ok"), "ok");
    vm.reset_to_origin().unwrap();
    let answer = ask(vm, IDENTITY);
    let (uuid, file) = answer.split_once(' ').unwrap_or_else(|| panic!("{answer:?}"));
    assert_eq!(file, "before");
    assert!(uuids.insert(uuid.to_owned()), "{uuid} again");
    assert!(ids.insert(GenerationId::of(vm.ram().memory()).unwrap()));
    assert_eq!(ask(vm, "[ -e /tmp/d/mine ] && echo there || echo not-there"), "not-there");
}
