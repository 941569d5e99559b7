//! Storms of interrupts between vCPUs while the VM is forked: none may be lost.
//!
//! Pairs of vCPUs wake each other by IPIs and halt in between ([`Command::Relay`]), or one restarts
//! the other by INIT and SIPI ([`Command::Restart`]). A single interrupt that is in no saved state
//! stops its pair for good, in the child or after a reset. Kicks are delayed at random, so that
//! some vCPUs park long before others.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clade_guests::BARE_ELF;
use clade_guests::abi::Command;

use crate::boot::{BootImage, BootSource};
use crate::kvm::testutil::host;
use crate::vm::{ChildOptions, Context, Vm, VmConfig};
use clade_harness::BareMailbox;
use clade_memory::Store;
use clade_test_support::{Patience, wait_until};

/// A pair that stands still while another one makes this many steps has lost its interrupt. Used where
/// a pair must get stuck; elsewhere only [`Patience`] bounds the wait.
const OVERTAKEN: u64 = 5_000;
/// Steps that a child must make.
const STEPS: u64 = 3;
/// After this many children, the child becomes the parent: a restored VM is forked again.
const SUCCESSION: usize = 8;

/// The interaction of two vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pair {
    /// Each wakes the other.
    Relay,
    /// The first restarts the second.
    Restart,
}

#[derive(Clone, Copy)]
struct Storm {
    pairs: &'static [Pair],
    forks: usize,
    /// The longest delay before a kick.
    delay: Duration,
    saves_early: bool,
    seed: u64,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    children: usize,
    /// Children and resets after which a pair made no progress.
    stuck: Vec<String>,
}

/// A bare guest whose vCPUs wait for commands.
pub(super) fn boot_idle(context: &Context, cpus: u64) -> Vm {
    let config = Arc::new(VmConfig::bare(32 << 20, cpus).unwrap());
    let kernel = BootImage::Bytes(BARE_ELF.into());
    let source = BootSource::new(kernel);
    let vm = Vm::boot(context, "storm", &config, &source).unwrap();
    for vcpu in 0..cpus {
        wait_until("a vCPU boots", || BareMailbox::new(vm.ram(), vcpu).is_ready().unwrap());
    }
    vm
}

pub(super) fn boot(context: &Context, pairs: &[Pair]) -> Vm {
    let vm = boot_idle(context, 2 * pairs.len() as u64);
    for (first, pair) in (0..).step_by(2).zip(pairs) {
        let second = first + 1;
        let begin = |vcpu, command| {
            BareMailbox::new(vm.ram(), vcpu).order(command).unwrap();
            vm.ring_doorbell(vcpu).unwrap();
            wait_until("a vCPU takes its command", || progress(&vm, vcpu) > 0);
        };
        match pair {
            Pair::Relay => {
                // The second vCPU must accept interrupts before the first sends one.
                begin(second, Command::Relay { peer: first, first: false });
                begin(first, Command::Relay { peer: second, first: true });
            }
            Pair::Restart => begin(first, Command::Restart { peer: second }),
        }
    }
    vm
}

fn progress(vm: &Vm, vcpu: u64) -> u64 {
    BareMailbox::new(vm.ram(), vcpu).progress().unwrap()
}

/// Checks that every pair makes progress. The error names the pair that does not, and its count.
pub(super) fn goes_on(vm: &Vm, pairs: &[Pair]) -> Result<(), String> {
    goes_on_unless(u64::MAX, vm, pairs)
}

/// The same, and a pair is stuck as soon as another one makes `overtaken` steps meanwhile.
fn goes_on_unless(overtaken: u64, vm: &Vm, pairs: &[Pair]) -> Result<(), String> {
    let mut patience = Patience::default();
    let firsts: Vec<u64> = (0..).step_by(2).take(pairs.len()).collect();
    let from: Vec<u64> = firsts.iter().map(|vcpu| progress(vm, *vcpu)).collect();
    for ((&vcpu, &before), pair) in firsts.iter().zip(&from).zip(pairs) {
        while progress(vm, vcpu) < before + STEPS {
            if let Some(reason) = vm.stopped() {
                return Err(format!("stopped: {reason}"));
            }
            let is_overtaken = firsts.iter().zip(&from).any(|(other, from)| progress(vm, *other) - from >= overtaken);
            if is_overtaken || !patience.tick() {
                return Err(format!("the {pair:?} of vCPU {vcpu} stays at {}", progress(vm, vcpu)));
            }
            thread::sleep(Duration::from_micros(50));
        }
    }
    Ok(())
}

/// Forks repeatedly, starts a child each time, and checks that it makes progress, also after a
/// reset in the middle of its own storm. Ends at the first child that is stuck. Returns None on a
/// host that cannot run VMs.
fn run(storm: Storm) -> Option<Found> {
    let context = Context::new(Arc::new(host()?), Store::open_small().unwrap()).unwrap();
    let mut parent = boot(&context, storm.pairs);
    let mut found = Found::default();
    for n in 0..storm.forks {
        let schedule = &parent.prepared.control.schedule;
        schedule.delay_kicks(storm.delay, storm.seed.wrapping_add(n as u64));
        if storm.saves_early {
            schedule.save_early();
        }
        let (image, _) = parent.fork().unwrap();
        let child = Vm::from_image(&context, "child", &image, ChildOptions::default()).unwrap();
        found.children += 1;
        let goes_on = |vm: &Vm| goes_on_unless(if storm.saves_early { OVERTAKEN } else { u64::MAX }, vm, storm.pairs);
        if let Err(stuck) = goes_on(&child) {
            found.stuck.push(format!("child {n}: {stuck}"));
            break;
        }
        if n % 2 == 0 {
            child.prepared.control.schedule.delay_kicks(storm.delay, !storm.seed);
            child.reset_to_origin().unwrap();
            if let Err(stuck) = goes_on(&child) {
                found.stuck.push(format!("child {n} after a reset: {stuck}"));
                break;
            }
        }
        if n % SUCCESSION == SUCCESSION - 1 {
            child.forget_origin();
            parent = child;
        }
    }
    goes_on(&parent, storm.pairs).expect("the parent itself");
    Some(found)
}

use Pair::{Relay, Restart};

const QUICK: Storm = Storm {
    pairs: &[Relay, Relay, Relay, Restart],
    forks: 24,
    delay: Duration::from_micros(500),
    saves_early: false,
    seed: 1,
};

#[test]
fn no_interrupt_between_vcpus_is_lost_by_a_fork() {
    for storm in [QUICK, Storm { pairs: &[Relay], delay: Duration::from_micros(40), ..QUICK }] {
        let Some(found) = run(storm) else { return };
        assert_eq!(found, Found { children: storm.forks, stuck: Vec::new() });
    }
}

/// The same storm must find a stuck child when vCPUs save while siblings run: a check that cannot
/// fail proves nothing.
#[test]
fn a_save_that_does_not_wait_for_all_vcpus_is_noticed() {
    let Some(found) = run(Storm { saves_early: true, forks: 4000, ..QUICK }) else { return };
    println!("{found:?}");
    assert_eq!(found.stuck.len(), 1, "of {} children", found.children);
}

#[test]
#[ignore = "long: some minutes"]
fn no_interrupt_is_lost_by_many_forks() {
    let all: [(&'static [Pair], u64); 5] = [
        (&[Relay], 20),
        (&[Relay], 500),
        (&[Relay, Relay, Relay, Relay], 20),
        (&[Relay, Relay, Relay, Relay], 500),
        (&[Restart, Relay, Restart, Relay], 500),
    ];
    for (seed, (pairs, delay)) in (0..).zip(all) {
        let storm = Storm { pairs, forks: 150, delay: Duration::from_micros(delay), seed, ..QUICK };
        let Some(found) = run(storm) else { return };
        assert_eq!(found, Found { children: storm.forks, stuck: Vec::new() }, "{pairs:?}, {delay} us");
        println!("{pairs:?}, {delay} us: {} children", found.children);
    }
}
