//! Linux: booted once for all tests of this file, which go on in forks of it. Where guest kernels are interpreted a boot
//! takes half a minute, and a kernel with less than a processor to itself does little but serve its timer. So one runs at a
//! time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clade_memory::Backing;
use clade_tests::{Linux, PROMPT, Turn};
use clade_vmm::kvm::Quirks;
use clade_vmm::vm::{ChildOptions, Context, ForkImage, StopReason, Vm};

const BOOT: Duration = Duration::from_secs(300);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
const TIMEOUT: Duration = Duration::from_secs(1800);
const PAUSED: ChildOptions<'static> = ChildOptions { paused: true, before_start: None };

/// A shell at its prompt.
#[derive(Clone)]
struct Booted {
    context: Context,
    image: Arc<ForkImage>,
    /// What was on the console until then.
    console: Arc<str>,
}

impl Booted {
    /// Boots one VM with one vCPU, the first time.
    fn get(turn: &Turn) -> Option<Self> {
        static BOOTED: Mutex<Option<Booted>> = Mutex::new(None);
        let mut booted = BOOTED.lock().unwrap_or_else(PoisonError::into_inner);
        if booted.is_none() {
            *booted = Some(Self::boot(turn, 1)?);
        }
        booted.clone()
    }

    fn boot(turn: &Turn, cpus: u64) -> Option<Self> {
        let linux = Linux::find()?;
        let context = turn.context(Backing::Huge);
        // On kvm-pvm with two vCPUs and busy processors, user space sometimes loses its FS base when it moves between the vCPUs, and the
        // guest dies before anything was forked. That is the host's; elsewhere a boot that fails is a failure.
        let attempts = if context.host().quirks() == Quirks::Pvm && cpus > 1 { 4 } else { 1 };
        for attempt in 1..=attempts {
            let vm = linux.boot(&context, "vmlinux", cpus, "");
            let console = until_prompt_or_panic(&vm);
            if console.contains("Attempted to kill init") && attempt < attempts {
                println!("boot {attempt} of {attempts}: this host's KVM broke the guest's user space; again");
                continue;
            }
            assert!(console.contains(PROMPT), "no prompt ({:?}):\n{console}", vm.stopped());
            let (image, _) = vm.fork().unwrap();
            return Some(Self { context, image, console: console.into() });
        }
        unreachable!("the last attempt returns or fails")
    }

    fn child(&self, name: &str) -> Vm {
        Vm::from_image(&self.context, name, &self.image, PAUSED).unwrap()
    }
}

/// What is on the console once the guest is at its prompt, has died, or has taken too long.
fn until_prompt_or_panic(vm: &Vm) -> String {
    let deadline = Instant::now() + BOOT;
    loop {
        let (seen, prompt) = vm.console().wait_for(0, PROMPT, Duration::from_secs(1));
        if prompt || seen.contains("Kernel panic") || Instant::now() > deadline {
            return seen;
        }
    }
}

/// Asks a paused VM's shell, and pauses it again.
fn ask(vm: &Vm, line: &str) -> String {
    vm.resume().unwrap();
    let answer = Linux::ask(vm, line, ANSWER_TIMEOUT);
    vm.pause().unwrap();
    answer
}

#[test]
fn linux_boots_to_a_shell_that_answers() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(booted) = Booted::get(&turn) else { return };
    assert!(booted.console.contains("Linux version 6.1"), "{}", booted.console);
    assert!(booted.console.contains("clade-guest ready"), "{}", booted.console);
    assert!(booted.console.contains("console=ttyS0 reboot=k panic=-1 tsc=reliable"), "the command line arrived");
    let child = booted.child("asked");
    assert_eq!(ask(&child, "echo $((6 * 7))"), "42");
    let memory = ask(&child, "read -r x kib y </proc/meminfo; echo $kib").parse::<u64>().unwrap();
    assert!((64 << 10..=128 << 10).contains(&memory), "{memory} KiB of 128 MiB");
}

#[test]
fn linux_children_are_told_apart() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(booted) = Booted::get(&turn) else { return };
    let (one, two) = (booted.child("one"), booted.child("two"));
    assert_eq!(ask(&one, "who=the-first; echo $who"), "the-first");
    assert_eq!(ask(&two, "who=${who:-nobody}; echo $who"), "nobody");
    // A file of the one is not the other's.
    ask(&one, "echo written-by-one >/tmp/file");
    assert_eq!(ask(&two, "[ -e /tmp/file ] && echo there || echo not-there"), "not-there");
    // A grandchild goes on from the one.
    let (image, _) = one.fork().unwrap();
    let grandchild = Vm::from_image(&booted.context, "grandchild", &image, PAUSED).unwrap();
    drop(one);
    assert_eq!(ask(&grandchild, "read -r text </tmp/file; echo $who $text"), "the-first written-by-one");
    // Consoles are apart: a child's begins empty, and nobody's text is on another's.
    let text = |vm: &Vm| String::from_utf8_lossy(&vm.console().since(0)).into_owned();
    assert!(!text(&two).contains("the-first") && !text(&two).contains("Linux version"), "{}", text(&two));
    assert!(!text(&grandchild).contains("nobody"), "{}", text(&grandchild));
}

#[test]
fn linux_is_forked_in_the_middle_of_a_line() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(booted) = Booted::get(&turn) else { return };
    let parent = booted.child("typing");
    parent.resume().unwrap();
    let from = parent.console().position();
    parent.type_in(b"echo half-");
    let _ = Linux::expect(&parent, from, "half-", ANSWER_TIMEOUT);
    let (image, _) = parent.fork().unwrap();
    parent.pause().unwrap();
    let child = Vm::from_image(&booted.context, "finishing", &image, PAUSED).unwrap();
    for (vm, rest, whole) in [(&parent, "one\n", "half-one"), (&child, "two\n", "half-two")] {
        vm.resume().unwrap();
        let from = vm.console().position();
        vm.type_in(rest.as_bytes());
        let text = Linux::expect(vm, from, "[done 0]", ANSWER_TIMEOUT);
        vm.pause().unwrap();
        assert!(text.contains(whole), "{text}");
    }
}

#[test]
fn linux_time_goes_on_in_a_child() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(booted) = Booted::get(&turn) else { return };
    let child = booted.child("clock");
    let uptime = |vm: &Vm| ask(vm, "read -r up idle </proc/uptime; echo $up").parse::<f64>().unwrap();
    let first = uptime(&child);
    assert!(first > 0.0);
    assert_eq!(ask(&child, "sleep 1; echo slept"), "slept");
    let second = uptime(&child);
    assert!((1.0..200.0).contains(&(second - first)), "{first} then {second}");
}

#[test]
fn linux_reboots_through_the_keyboard_controller() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(booted) = Booted::get(&turn) else { return };
    let child = booted.child("rebooting");
    child.resume().unwrap();
    child.type_in(b"reboot -f\n");
    assert_eq!(
        child.wait(ANSWER_TIMEOUT),
        Some(StopReason::Reset),
        "{}",
        String::from_utf8_lossy(&child.console().since(0))
    );
    let other = booted.child("other");
    assert_eq!(ask(&other, "echo alive"), "alive", "it was the other's reset");
}

#[test]
fn linux_with_two_vcpus_is_forked() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(booted) = Booted::boot(&turn, 2) else { return };
    let child = booted.child("two-vcpus");
    assert_eq!(ask(&child, "nproc"), "2");
    // The timers of both go on.
    let ticks = |vm: &Vm| -> Vec<u64> {
        let line = "while read -r kind rest; do [ $kind = LOC: ] && echo $rest; done </proc/interrupts";
        let text = ask(vm, line);
        text.split_whitespace().take(2).map(|word| word.parse().unwrap_or_else(|_| panic!("{text:?}"))).collect()
    };
    let before = ticks(&child);
    let after = ticks(&child);
    assert!(before.iter().zip(&after).all(|(before, after)| before < after), "{before:?} then {after:?}");
}

#[test]
fn a_bzimage_is_unpacked_and_started() {
    let Some(turn) = Turn::take(TIMEOUT) else { return };
    let Some(linux) = Linux::find() else { return };
    let context = turn.context(Backing::Huge);
    let vm = linux.boot(&context, "bzImage", 1, "earlyprintk=serial");
    let text = Linux::expect(&vm, 0, "Command line:", BOOT);
    assert!(text.contains("Linux version 6.1"), "{text}");
}
