//! The shell's output, and the separation of relatives' shells.

use std::time::{Duration, Instant};

use clade_test_support::wait_for;
use clade_tests::{Linux, Turn};
use clade_vmm::vm::{StopReason, Vm, VmError};

use crate::{PAUSED, ask, booted};

#[test]
fn linux_boots_to_a_shell_that_answers() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    assert!(booted.console.contains("Linux version 6.1"), "{}", booted.console);
    assert!(booted.console.contains("clade-guest ready"), "{}", booted.console);
    assert!(booted.console.contains("console=ttyS0 reboot=k panic=-1 tsc=reliable"), "the command line arrived");
    let child = booted.child("asked");
    assert_eq!(ask(&child, "echo $((6 * 7))"), "42");
    let memory = ask(&child, "read -r x kib y </proc/meminfo; echo $kib").parse::<u64>().unwrap();
    assert!((40 << 10..=64 << 10).contains(&memory), "{memory} KiB of 64 MiB");
}

#[test]
fn linux_children_are_told_apart() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let (one, two) = (booted.child("apart-one"), booted.child("apart-two"));
    assert_eq!(ask(&one, "who=the-first; echo $who"), "the-first");
    assert_eq!(ask(&two, "who=${who:-nobody}; echo $who"), "nobody");
    // A file written in one is absent from the other.
    ask(&one, "echo written-by-one >/tmp/file");
    assert_eq!(ask(&two, "[ -e /tmp/file ] && echo there || echo not-there"), "not-there");
    // A grandchild continues from this one.
    let (image, _) = one.fork().unwrap();
    let grandchild = Vm::from_image(&booted.context, "grandchild", &image, PAUSED).unwrap();
    drop(one);
    assert_eq!(ask(&grandchild, "read -r text </tmp/file; echo $who $text"), "the-first written-by-one");
    // Consoles are separate: a child's begins empty, and no VM's text is on another's.
    let text = |vm: &Vm| String::from_utf8_lossy(&vm.console().since(0)).into_owned();
    assert!(!text(&two).contains("the-first") && !text(&two).contains("Linux version"), "{}", text(&two));
    assert!(!text(&grandchild).contains("nobody"), "{}", text(&grandchild));
}

#[test]
fn linux_is_forked_in_the_middle_of_a_line() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let parent = booted.child("typing");
    parent.resume().unwrap();
    let from = parent.console().position();
    parent.type_in(b"echo half-");
    let _ = Linux::expect(&parent, from, "half-");
    let (image, _) = parent.fork().unwrap();
    parent.pause().unwrap();
    let child = Vm::from_image(&booted.context, "finishing", &image, PAUSED).unwrap();
    for (vm, rest, whole) in [(&parent, "one\n", "half-one"), (&child, "two\n", "half-two")] {
        vm.resume().unwrap();
        let from = vm.console().position();
        vm.type_in(rest.as_bytes());
        let text = Linux::expect(vm, from, "[done 0]");
        vm.pause().unwrap();
        assert!(text.contains(whole), "{text}");
    }
}

#[test]
fn linux_time_goes_on_in_a_child() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let child = booted.child("clock");
    let uptime = |vm: &Vm| ask(vm, "read -r up idle </proc/uptime; echo $up").parse::<f64>().unwrap();
    let begun = Instant::now();
    let first = uptime(&child);
    assert!(first > 0.0);
    assert_eq!(ask(&child, "sleep 1; echo slept"), "slept");
    let second = uptime(&child);
    // No further than the host's clock, which is read later and was read earlier.
    let most = begun.elapsed().as_secs_f64() + 0.05;
    // Both have two decimals, which are no exact fractions of two.
    assert!((0.99..most).contains(&(second - first)), "{first} then {second}, {most} for the host");
}

#[test]
fn linux_reboots_through_the_keyboard_controller() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let child = booted.child("rebooting");
    child.resume().unwrap();
    child.type_in(b"reboot -f\n");
    assert_eq!(
        wait_for("the end of its threads", || child.wait(Duration::ZERO)),
        StopReason::Reset,
        "{}",
        String::from_utf8_lossy(&child.console().since(0))
    );
    let other = booted.child("other");
    assert_eq!(ask(&other, "echo alive"), "alive", "it was the other's reset");
}

#[test]
fn linux_powers_itself_off_by_acpi() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let child = booted.child("off");
    child.resume().unwrap();
    child.type_in(b"poweroff -f\n");
    assert_eq!(
        wait_for("the end of its threads", || child.wait(Duration::ZERO)),
        StopReason::PowerOff,
        "{}",
        String::from_utf8_lossy(&child.console().since(0))
    );
    let other = booted.child("on");
    assert_eq!(ask(&other, "echo alive"), "alive", "it was the other's power");
}

/// Returns how often ACPI events have interrupted a VM's kernel.
fn events(vm: &Vm) -> u64 {
    let line =
        "while read -r number count rest; do case $rest in *ACPI:Ged*) echo $count;; esac; done </proc/interrupts";
    ask(vm, line).parse().unwrap()
}

#[test]
fn linux_notices_its_power_button_and_no_relative_does() {
    let Some(turn) = Turn::take() else { return };
    let Some(booted) = booted(&turn) else { return };
    let vm = booted.child("pressed");
    assert_eq!(ask(&vm, "[ -e /sys/bus/acpi/devices/PNP0C0C:00 ] && echo there"), "there");
    assert!(matches!(vm.press_power_button(), Err(VmError::Paused)));
    let before = events(&vm);
    // Pressed while it stands still, so that the press is pending at the fork.
    vm.resume().unwrap();
    let still = vm.pause_guard().unwrap();
    vm.press_power_button().unwrap();
    let (image, _) = vm.fork().unwrap();
    let child = Vm::from_image(&booted.context, "not-pressed", &image, PAUSED).unwrap();
    assert!(!vm.power_button_noticed());
    drop(still);
    vm.pause().unwrap();
    assert!(events(&vm) > before);
    assert!(vm.power_button_noticed(), "its kernel has run the event's method");
    // The child's kernel is interrupted too, by its new generation, and finds the button not
    // pressed.
    assert!(events(&child) > before);
    assert!(!child.power_button_noticed());
    child.resume().unwrap();
    child.press_power_button().unwrap();
    child.pause().unwrap();
    assert_eq!((ask(&child, "echo alive").as_str(), child.power_button_noticed()), ("alive", true));
    // A reset forgets a press.
    child.resume().unwrap();
    let still = child.pause_guard().unwrap();
    child.press_power_button().unwrap();
    drop(child.pause());
    drop(still);
    child.reset_to_origin().unwrap();
    assert_eq!((ask(&child, "echo alive").as_str(), child.power_button_noticed()), ("alive", false));
}
