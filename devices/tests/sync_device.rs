//! The synchronous devices, driven through registers and rings: their operation, their refusals, and
//! forks that lose and repeat no request.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod driver;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clade_devices::Console;
use clade_devices::virtio::balloon::{Balloon, BalloonStat, BalloonState};
use clade_devices::virtio::console::{ConsoleDevice, Typist};
use clade_devices::virtio::limiter::{Limits, Rate};
use clade_devices::virtio::rng::Rng;
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::{
    ActivateError, Activation, Backend, DeviceState, SaveError, SavedDevice, VirtioDevice, regs,
};
use clade_memory::{Access, PageRange, PinLifetime};

use driver::{Driver, ram, store};

const BUFFER: u64 = 0x20_0000;

fn rng() -> Box<dyn VirtioDevice> {
    Box::new(SyncDevice::new(Rng::new(&Limits::default())))
}

#[test]
fn random_bytes_differ_in_parent_and_child() {
    let store = store();
    let mut parent = Driver::take(rng(), &ram(&store));
    parent.post(0, &[(BUFFER, 64, true), (BUFFER + 0x1000, 64, true)]);
    assert_eq!(parent.wait(0).1, 128);
    let first = parent.look(BUFFER, 64);
    assert_ne!(first, vec![0; 64]);
    assert_ne!(first, parent.look(BUFFER + 0x1000, 64));
    let mut child = parent.fork(&store, |_, _| rng());
    assert_eq!(child.look(BUFFER, 64), first, "what was drawn is inherited");
    for vm in [&mut parent, &mut child] {
        vm.post(0, &[(BUFFER, 64, true)]);
        assert_eq!(vm.wait(0).1, 64);
    }
    assert_ne!(parent.look(BUFFER, 64), child.look(BUFFER, 64));
}

#[test]
fn a_limited_source_of_entropy_waits_and_goes_on() {
    let rate = Rate { per_second: 2_000, burst: Some(200), once: 0 };
    let limits = Limits { bytes: Some(rate), operations: None };
    let mut vm = Driver::take(Box::new(SyncDevice::new(Rng::new(&limits))), &ram(&store()));
    let begun = std::time::Instant::now();
    for _ in 0..6 {
        vm.post(0, &[(BUFFER, 200, true)]);
    }
    (0..6).for_each(|_| assert_eq!(vm.wait(0).1, 200));
    assert!(begun.elapsed() > Duration::from_millis(300), "1,200 bytes at 2,000 a second, 200 at once");
}

/// A source of entropy whose reset waits while `is_busy`.
#[derive(Debug)]
struct Busy {
    device: Box<dyn VirtioDevice>,
    is_busy: Arc<AtomicBool>,
}

impl VirtioDevice for Busy {
    fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.device.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn activate(&mut self, with: Activation) -> Result<(), ActivateError> {
        self.device.activate(with)
    }

    fn deactivate(&mut self) -> bool {
        !self.is_busy.load(Ordering::Relaxed) && self.device.deactivate()
    }

    fn quiesce(&mut self) {
        self.device.quiesce();
    }

    fn resume(&mut self) {
        self.device.resume();
    }

    fn rewind(
        &mut self,
        state: &DeviceState,
        backend: &Backend,
        with: Option<Activation>,
    ) -> Result<(), ActivateError> {
        self.device.rewind(state, backend, with)
    }

    fn save(&mut self) -> Result<SavedDevice, SaveError> {
        self.device.save()
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

#[test]
fn a_reset_that_waits_for_transfers_is_over_in_a_child() {
    let (store, is_busy) = (store(), Arc::<AtomicBool>::default());
    let busy = Busy { device: rng(), is_busy: Arc::clone(&is_busy) };
    let mut parent = Driver::take(Box::new(busy), &ram(&store));
    is_busy.store(true, Ordering::Relaxed);
    parent.put(regs::STATUS, 0);
    assert!(parent.needs_reset() && parent.get(regs::STATUS) != 0, "a transfer is in the kernel");
    let mut child = parent.fork(&store, |_, _| rng());
    assert_ne!(parent.get(regs::STATUS), 0);
    is_busy.store(false, Ordering::Relaxed);
    for vm in [&mut child, &mut parent] {
        assert_eq!(vm.get(regs::STATUS), 0);
        vm.set_up();
        vm.post(0, &[(BUFFER, 64, true)]);
        assert_eq!(vm.wait(0).1, 64);
    }
}

fn console() -> (Box<dyn VirtioDevice>, Console, Typist) {
    let output = Console::default();
    let device = ConsoleDevice::new(output.clone()).unwrap();
    let typist = device.typist();
    (Box::new(SyncDevice::new(device)), output, typist)
}

#[test]
fn a_console_is_heard_and_typed_at_and_a_child_has_its_own() {
    let store = store();
    let (device, output, typist) = console();
    let mut parent = Driver::take(device, &ram(&store));
    parent.fill(BUFFER, b"hello ");
    parent.fill(BUFFER + 0x1000, b"world");
    parent.post(1, &[(BUFFER, 6, false), (BUFFER + 0x1000, 5, false)]);
    parent.wait(1);
    assert_eq!(output.since(0), b"hello world");
    // Typed before the driver is ready, and more than its buffer holds.
    assert_eq!(typist.type_in(b"abcdefgh"), 8);
    parent.post(0, &[(BUFFER + 0x2000, 5, true)]);
    assert_eq!(parent.wait(0).1, 5);
    assert_eq!(parent.look(BUFFER + 0x2000, 5), b"abcde");
    parent.post(0, &[(BUFFER + 0x3000, 5, true)]);
    assert_eq!(parent.wait(0).1, 3);
    // A buffer posted before the fork stays posted in both VMs.
    parent.post(0, &[(BUFFER + 0x4000, 16, true)]);
    let (device, childs, childs_typist) = console();
    let mut child = parent.fork(&store, |_, _| device);
    childs_typist.type_in(b"child");
    typist.type_in(b"parent");
    assert_eq!((child.wait(0).1, parent.wait(0).1), (5, 6));
    assert_eq!(child.look(BUFFER + 0x4000, 5), b"child");
    assert_eq!(parent.look(BUFFER + 0x4000, 6), b"parent");
    child.fill(BUFFER, b"mine");
    child.post(1, &[(BUFFER, 4, false)]);
    child.wait(1);
    assert_eq!((childs.since(0), output.since(0)), (b"mine".to_vec(), b"hello world".to_vec()));
}

#[test]
fn a_console_that_is_put_back_has_its_buffers_and_not_what_was_typed_since() {
    let (device, output, typist) = console();
    let mut vm = Driver::take(device, &ram(&store()));
    vm.post(0, &[(BUFFER + 0x4000, 16, true)]);
    vm.fill(BUFFER, b"then");
    let moment = vm.moment();
    vm.post(1, &[(BUFFER, 4, false)]);
    vm.wait(1);
    typist.type_in(b"read, and more than that");
    assert_eq!(vm.wait(0).1, 16);
    for typed in [&b"again"[..], b"and again"] {
        vm.rewind(&moment);
        assert_eq!(vm.look(BUFFER + 0x4000, 4), [0; 4]);
        assert!(vm.used(0).is_none(), "what was typed before is forgotten");
        typist.type_in(typed);
        assert_eq!(vm.wait(0).1 as usize, typed.len());
        assert_eq!(vm.look(BUFFER + 0x4000, typed.len()), typed);
    }
    vm.post(1, &[(BUFFER, 4, false)]);
    vm.wait(1);
    assert_eq!(output.since(0), b"thenthen", "what it wrote stays written");
}

#[test]
fn a_device_that_was_taken_or_broken_since_is_put_back() {
    let store = store();
    let (device, _, typist) = console();
    let mut vm = Driver::take(device, &ram(&store));
    vm.post(0, &[(BUFFER, 16, true)]);
    let taken = vm.moment();
    vm.put(regs::STATUS, 0);
    let fresh = vm.moment();
    vm.set_up();
    // An invalid descriptor chain: a loop of one.
    vm.post(1, &[(BUFFER, 0, false)]);
    clade_test_support::wait_until("an empty buffer is against the rules", || vm.needs_reset());
    let broken = vm.moment();
    vm.rewind(&taken);
    assert!(!vm.needs_reset());
    typist.type_in(b"works");
    assert_eq!(vm.wait(0).1, 5);
    vm.rewind(&fresh);
    assert_eq!(vm.get(regs::STATUS), 0);
    vm.rewind(&broken);
    assert!(vm.needs_reset());
    vm.rewind(&taken);
    typist.type_in(b"works again");
    assert_eq!(vm.wait(0).1, 11);
}

#[test]
fn a_balloon_that_is_put_back_has_the_target_it_had() {
    let mut vm = Driver::take(balloon(&BalloonState::default()), &ram(&store()));
    let target = |vm: &Driver, pages| {
        vm.device.with_device(|device| {
            let balloon = device.as_any().downcast_mut::<SyncDevice<Balloon>>().unwrap();
            balloon.with(|balloon| balloon.set_target(pages)).unwrap();
            balloon.config_changed();
        });
    };
    target(&vm, 100);
    vm.fill(0x1000 << 12, &[7; 4096]);
    let moment = vm.moment();
    let generation = vm.get(regs::CONFIG_GENERATION);
    target(&vm, 999);
    vm.fill(BUFFER, &numbers([0x1000].into_iter()));
    vm.post(0, &[(BUFFER, 4, false)]);
    vm.wait(0);
    assert_eq!(vm.look(0x1000 << 12, 1), [0]);
    vm.rewind(&moment);
    assert_eq!((of(&vm).target, vm.get(regs::CONFIG_GENERATION)), (100, generation));
    assert_eq!(vm.look(0x1000 << 12, 4096), [7; 4096], "a page that was given up since is there");
}

fn balloon(state: &BalloonState) -> Box<SyncDevice<Balloon>> {
    Box::new(SyncDevice::new(Balloon::new(state).unwrap()))
}

fn numbers(pages: impl Iterator<Item = u32>) -> Vec<u8> {
    pages.flat_map(u32::to_le_bytes).collect()
}

fn of(vm: &Driver) -> clade_devices::virtio::balloon::BalloonStats {
    vm.device.with_device(|device| {
        let balloon = device.as_any().downcast_mut::<SyncDevice<Balloon>>().unwrap();
        balloon.with(|balloon| balloon.stats()).unwrap()
    })
}

#[test]
fn an_inflated_balloon_gives_memory_back_and_never_a_pinned_page() {
    let store = store();
    let mut vm = Driver::take(balloon(&BalloonState::default()), &ram(&store));
    (0x1000..0x1100).for_each(|page| vm.fill(page << 12, &[7; 4096]));
    let region = vm.ram.regions()[0].clone();
    let pin = region.pin(PageRange::new(0x1010, 0x1012), Access::Write, PinLifetime::LongTerm).unwrap();
    // Descending, as Linux sends them, with some numbers outside RAM.
    vm.fill(BUFFER, &numbers((0x1000..0x1100).rev().chain([0xc_0000, u32::MAX])));
    vm.post(0, &[(BUFFER, 258 * 4, false)]);
    vm.wait(0);
    assert_eq!((of(&vm).discarded, of(&vm).pinned), (254, 2));
    for page in 0x1000..0x1100u64 {
        let kept = (0x1010..0x1012).contains(&page);
        assert_eq!(vm.look(page << 12, 4096), vec![if kept { 7 } else { 0 }; 4096], "page {page:#x}");
    }
    drop(pin);
    // Free pages are reported as buffers; a part of a page is ignored.
    vm.fill(0x120_0800, &[9; 0x4000]);
    vm.post(3, &[(0x120_0800, 0x3000, true), (0x130_0000, 0x20_0000 - 1, true)]);
    vm.wait(3);
    assert_eq!(vm.look(0x120_0800, 0x800), vec![9; 0x800], "a part of a page stays");
    assert_eq!(vm.look(0x120_1000, 0x2000), vec![0; 0x2000]);
    // Pages taken back are zeros until they are written.
    vm.post(1, &[(BUFFER, 256 * 4, false)]);
    vm.wait(1);
    vm.fill(0x1000 << 12, b"again");
    assert_eq!(vm.look(0x1000 << 12, 5), b"again");
}

#[test]
fn a_guest_is_asked_for_its_statistics_and_a_child_answers_too() {
    let store = store();
    let mut parent = Driver::take(balloon(&BalloonState::default()), &ram(&store));
    let stat = |tag: u16, value: u64| [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat();
    parent.fill(BUFFER, &[stat(4, 1000), stat(5, 5000), stat(99, 1)].concat());
    parent.post(2, &[(BUFFER, 30, false)]);
    parent.wait_until("told", |vm| of(vm).guest.len() == 2);
    assert_eq!(of(&parent).guest, [(BalloonStat::Free, 1000), (BalloonStat::Total, 5000)]);
    assert!(parent.used(2).is_none(), "the chain is kept until the guest is asked again");
    parent.device.with_device(|device| {
        let balloon = device.as_any().downcast_mut::<SyncDevice<Balloon>>().unwrap();
        balloon.with(|balloon| balloon.set_target(300));
        balloon.config_changed();
    });
    assert_eq!(parent.get(clade_devices::virtio::regs::INTERRUPT_STATUS) & 2, 2);
    parent.put(clade_devices::virtio::regs::CONFIG + 4, 250);
    let mut child = parent.fork(&store, |state, _| {
        let DeviceState::Balloon(state) = &state.device else { panic!("{state:?}") };
        balloon(state)
    });
    for vm in [&mut parent, &mut child] {
        assert_eq!((of(vm).target, of(vm).actual), (300, 250));
        vm.device.with_device(|device| {
            device.as_any().downcast_mut::<SyncDevice<Balloon>>().unwrap().with(Balloon::ask);
        });
        vm.wait(2);
        assert!(vm.used(2).is_none(), "once");
    }
}

#[test]
fn what_is_no_request_ends_in_a_reset_and_not_in_a_panic() {
    let store = store();
    for buffers in [[(BUFFER, 3, false)], [(BUFFER, 0, false)], [(0xc000_0000, 4, false)], [(BUFFER, 20_000, false)]] {
        let mut vm = Driver::take(balloon(&BalloonState::default()), &ram(&store));
        vm.post(0, &buffers);
        vm.wait_until("given up", Driver::needs_reset);
        vm.set_up();
    }
    let mut vm = Driver::take(rng(), &ram(&store));
    vm.post(0, &[(u64::MAX - 1, 16, true)]);
    vm.wait_until("given up", Driver::needs_reset);
}
