//! All VMs, images and devices of one schedule, and their models.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use clade_memory::{
    Access, DontFork, FreezeMode, GuestRam, PAGE_SIZE, PageRange, PageSet, PinLifetime, Quiesced, RamError, RamImage,
    RefPage, Store, SuspendFile,
};
use vm_memory::{Bytes, GuestAddress};

use crate::dma;
use crate::ops::{At, Op};
use crate::pages::{Inherits, Pages};
use crate::reach::{Held, Pin, Reach};
use crate::regions::{address, layout, parts};

const MAX_VMS: usize = 6;
const MAX_PINS: usize = 40;
/// Maximum number of pages that a splice holds: more need a pipe that only a privileged process may
/// have.
const MAX_HELD: u64 = 128;
/// Number of operations between two complete checks of one VM.
const LOOK: u64 = 24;

struct Vm {
    ram: GuestRam,
    model: Pages,
    id: u64,
}

impl Vm {
    /// Checks the bytes of `range` and of a page on either side.
    fn look_at(&self, range: PageRange) {
        let around = PageRange::new(range.start().saturating_sub(1), (range.end() + 1).min(self.model.len()));
        let parts = parts(&self.ram, around).into_iter();
        for run in parts.flat_map(|part| self.model.there(part.pages)) {
            let mut got = vec![0; run.bytes()];
            self.ram.memory().read_slice(&mut got, address(run.start(), self.model.len())).unwrap();
            if let Some((at, is, must)) = self.model.first_wrong(run, &got) {
                panic!("vm {}: byte {at:#x} is {is:#x}, must be {must:#x}", self.id);
            }
        }
    }
}

pub(crate) struct World<'s> {
    store: &'s Store,
    pages: u64,
    vms: Vec<Vm>,
    images: Vec<(RamImage, Pages)>,
    pins: Vec<Pin>,
    /// The remaining contents of VMs that died before their devices.
    dead: BTreeMap<u64, Pages>,
    references: BTreeMap<u8, RefPage>,
    /// Whether any VM has had pages on a disk.
    evicted: bool,
    next: u64,
    done: u64,
}

impl<'s> World<'s> {
    pub(crate) fn new(store: &'s Store, pages: u64) -> Self {
        let ram = GuestRam::reserve(&layout(pages), store).unwrap();
        ram.populate().unwrap();
        Self {
            store,
            pages,
            vms: vec![Vm { ram, model: Pages::new(pages), id: 0 }],
            images: Vec::new(),
            pins: Vec::new(),
            dead: BTreeMap::new(),
            references: BTreeMap::new(),
            evicted: false,
            next: 1,
            done: 0,
        }
    }

    /// Number of operations carried out.
    pub(crate) fn done(&self) -> u64 {
        self.done
    }

    fn pick(&self, n: usize) -> usize {
        n % self.vms.len()
    }

    fn reference(&mut self, byte: u8) -> RefPage {
        let made = || self.store.reference_page(&[byte; PAGE_SIZE as usize]).unwrap();
        self.references.entry(byte).or_insert_with(made).clone()
    }

    /// Carries out `op`, if its operands exist.
    pub(crate) fn run(&mut self, op: Op) {
        if self.carry_out(op) {
            self.done += 1;
            for pin in &mut self.pins {
                let alive = self.vms.iter().find(|vm| vm.id == pin.vm).map(|vm| &vm.model);
                pin.note(alive.unwrap_or_else(|| &self.dead[&pin.vm]));
            }
            if self.done.is_multiple_of(LOOK) {
                self.check(self.pick((self.done / LOOK) as usize));
            }
        }
    }

    fn carry_out(&mut self, op: Op) -> bool {
        match op {
            Op::Write { vm, at, byte } => self.write(vm, at, byte),
            Op::Read { vm, at } => {
                let bytes = at.bytes(self.pages);
                let range = PageRange::covering(bytes.start, bytes.end - bytes.start).unwrap();
                self.vms[self.pick(vm)].look_at(range);
            }
            Op::Freeze { vm, background } => self.freeze(vm, background),
            Op::Clone { image } => {
                if self.images.is_empty() || self.vms.len() >= MAX_VMS {
                    return false;
                }
                let (image, model) = &self.images[image % self.images.len()];
                let ram = GuestRam::reserve(image.layout(), self.store).unwrap();
                ram.adopt(image).unwrap();
                self.vms.push(Vm { ram, model: model.clone(), id: self.next });
                self.next += 1;
            }
            Op::DropVm { vm, devices_go_on } => {
                if self.vms.len() < 2 {
                    return false;
                }
                let vm = self.vms.swap_remove(vm % self.vms.len());
                if !devices_go_on {
                    self.pins.retain(|pin| pin.vm != vm.id);
                }
                self.dead.insert(vm.id, vm.model.clone());
                drop(vm);
                self.forget_the_dead();
            }
            Op::DropImage { image } => {
                if self.images.is_empty() {
                    return false;
                }
                self.images.swap_remove(image % self.images.len());
            }
            Op::Pin { vm, at, access, term } => {
                if self.pins.len() >= MAX_PINS {
                    return false;
                }
                self.pin(vm, at.pages(self.pages), access, term);
            }
            Op::DmaWrite { pin, byte } => {
                let able: Vec<usize> = (0..self.pins.len()).filter(|n| self.pins[*n].access == Access::Write).collect();
                let Some(n) = able.get(pin.checked_rem(able.len()).unwrap_or(0)) else { return false };
                let pin = &mut self.pins[*n];
                let (id, range) = (pin.vm, pin.range);
                let Reach::Frames(device) = &mut pin.reach else { return false };
                device.write(byte);
                let bytes = range.offset()..range.offset() + range.bytes() as u64;
                match self.vms.iter_mut().find(|vm| vm.id == id) {
                    Some(vm) => {
                        vm.model.fill(bytes, byte);
                        vm.look_at(range);
                    }
                    None => self.dead.get_mut(&id).unwrap().fill(bytes, byte),
                }
            }
            Op::DmaRead { pin } => {
                if self.pins.is_empty() {
                    return false;
                }
                let n = pin % self.pins.len();
                let id = self.pins[n].vm;
                let alive = self.vms.iter().find(|vm| vm.id == id).map(|vm| &vm.model);
                let model = alive.unwrap_or_else(|| &self.dead[&id]);
                if self.pins[n].reads_what_it_must(model) {
                    self.pins.swap_remove(n);
                    self.forget_the_dead();
                }
            }
            Op::Unpin { pin } => {
                if self.pins.is_empty() {
                    return false;
                }
                self.pins.swap_remove(pin % self.pins.len());
                self.forget_the_dead();
            }
            Op::Reset { vm, image, again } => {
                if self.images.is_empty() {
                    return false;
                }
                self.reset(vm, image);
                for (at, byte) in again {
                    self.write(vm, at, byte);
                    self.reset(vm, image);
                }
            }
            Op::Discard { vm, at } => {
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                let pinned = self.pinned_pages(self.vms[vm].id);
                let vm = &mut self.vms[vm];
                let mut done = (0, 0);
                for part in parts(&vm.ram, range) {
                    let one = part.region.discard(part.range).unwrap();
                    done = (done.0 + one.pinned, done.1 + one.discarded);
                }
                vm.model.show((range.start()..range.end()).filter(|page| !pinned.contains(page)), 0);
                let kept = pinned.iter().filter(|page| range.contains(**page)).count() as u64;
                assert_eq!(done, (kept, range.len() - kept), "I7");
                vm.look_at(range);
            }
            Op::ShowReference { vm, at, byte } => {
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                let pinned = self.pinned_pages(self.vms[vm].id);
                let page = self.reference(byte);
                let vm = &mut self.vms[vm];
                for part in parts(&vm.ram, range) {
                    let pinned = pinned.iter().any(|page| part.pages.contains(*page));
                    match part.region.map_reference(part.range, &page) {
                        Ok(()) => {
                            assert!(!pinned, "I10: a pinned page became a reference");
                            vm.model.show(part.pages.start()..part.pages.end(), byte);
                        }
                        Err(RamError::Pinned { .. }) => assert!(pinned, "refused for pins that are not there"),
                        Err(other) => panic!("{other}"),
                    }
                }
                vm.look_at(range);
            }
            Op::Evict { vm, at, disk } => {
                // A disk makes a test wait, and its special cases are rare in the code too.
                let dir = Path::new(if disk { env!("CARGO_TARGET_TMPDIR") } else { "/dev/shm" });
                self.evicted |= disk;
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                for part in parts(&self.vms[vm].ram, range) {
                    part.region.evict(part.range, dir, &Quiesced::by(&clade_memory::NoWriters)).unwrap();
                }
                self.vms[vm].look_at(range);
            }
            Op::CopyAhead { vm, at } => {
                let (vm, range) = (&self.vms[self.pick(vm)], at.pages(self.pages));
                let mut runs = vec![Vec::new(); vm.ram.regions().len()];
                for part in parts(&vm.ram, range) {
                    let base = part.region.host_address();
                    let of = vm.ram.regions().iter().position(|region| region.host_address() == base).unwrap();
                    runs[of].push(part.range);
                }
                let set = PageSet::new(vm.ram.layout(), runs).unwrap();
                assert!(vm.ram.copy_ahead(&set, range.len()).unwrap() <= range.len());
                vm.look_at(range);
                // A changed page must not count as unused.
                let (_, came) = vm.ram.written_set(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
                assert!(came.hits + came.waste <= came.copied, "{came:?}");
            }
            Op::Suspend { vm, wake } => self.suspend(vm, wake),
            Op::DontFork { vm, at, what } => {
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                let declared = what.map(|what| match what {
                    Inherits::Absent => DontFork::Absent,
                    Inherits::Zeroed => DontFork::Zeroed,
                    Inherits::Fresh(byte) => DontFork::Fresh(self.reference(byte)),
                });
                for part in parts(&self.vms[vm].ram, range) {
                    part.region.set_dont_fork(part.range, declared.clone()).unwrap();
                }
                self.vms[vm].model.declare(range, what);
            }
            Op::Settle { vm } => self.vms[self.pick(vm)].ram.finish_background().unwrap(),
            // Contents do not change, so the model stays as it is.
            Op::Compact { vm } => {
                let vm = &self.vms[self.pick(vm)];
                vm.ram.compact(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
                vm.ram.check(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
                vm.look_at(vm.model.all());
            }
            Op::CompactImage { image } => {
                if self.images.is_empty() {
                    return false;
                }
                let image = image % self.images.len();
                self.images[image].0 = self.images[image].0.compact(self.store).unwrap().0;
            }
            Op::Sweep => drop(self.store.sweep()),
            Op::Reclaim { vm, at } => {
                let (vm, range) = (&self.vms[self.pick(vm)], at.pages(self.pages));
                for part in parts(&vm.ram, range) {
                    let at = (part.region.host_address() + part.range.offset()) as *mut libc::c_void;
                    // SAFETY: the pages keep their contents, wherever the kernel stores them.
                    // Absent ranges have no memory, and are refused.
                    unsafe { libc::madvise(at, part.range.bytes(), libc::MADV_PAGEOUT) };
                }
                vm.look_at(range);
            }
        }
        true
    }

    fn freeze(&mut self, vm: usize, background: bool) {
        let vm = &self.vms[self.pick(vm)];
        let mode = if background { FreezeMode::Background } else { FreezeMode::Eager };
        let frozen = match vm.ram.freeze_in(mode, &Quiesced::by(&clade_memory::NoWriters)) {
            // Private pages over a file on a disk cannot be write-protected; in mode Auto the
            // freeze is eager then.
            Err(RamError::Background(_)) if self.evicted => {
                vm.ram.freeze_in(FreezeMode::Eager, &Quiesced::by(&clade_memory::NoWriters))
            }
            other => other,
        };
        let (image, _) = frozen.unwrap();
        self.images.push((image, vm.model.image()));
        if self.images.len() > MAX_VMS {
            self.images.remove(0);
        }
    }

    fn pin(&mut self, vm: usize, range: PageRange, access: Access, term: PinLifetime) {
        let vm = self.pick(vm);
        let vm = &self.vms[vm];
        // A pin is of one region.
        let part = parts(&vm.ram, range).swap_remove(0);
        let (region, range) = (part.region, part.pages);
        let table = region.ownership();
        let own: Vec<u64> = part.own().collect();
        let pin = match region.pin(part.range, access, term) {
            Ok(pin) => pin,
            Err(error) => {
                assert!(!vm.model.is_there(range), "a pin of memory that is there is refused: {error}");
                return;
            }
        };
        assert!(vm.model.is_there(range), "R19: a device was given what is absent");
        // The one case in which shared pages are neither copied nor counted.
        let short_read = access == Access::Read && term == PinLifetime::Transient;
        let counted = if short_read { own } else { (range.start()..range.end()).collect() };
        for page in &counted {
            assert!(table.get(page - part.first).0, "I3: pinned {page:#x} is exclusive");
        }
        // The kernel agrees, before a device makes it look up the pages again.
        let pinned = table.counts(region.range()).pinned;
        assert!(vm.ram.stats().unwrap().exclusive >= pinned, "I3: pinned before it was unshared");
        let id = vm.id;
        // Most requests look up their frames at their start.
        let reach = match (short_read, range.len() > MAX_HELD || self.done.is_multiple_of(4)) {
            (true, true) => Reach::Address(pin),
            (true, false) => Reach::Held(Held::of(pin, range, &vm.model)),
            (false, _) => Reach::Frames(dma::Device::attach(pin)),
        };
        self.pins.push(Pin { reach, range, access, vm: id, counted });
    }

    fn write(&mut self, vm: usize, at: At, byte: u8) {
        let vm = self.pick(vm);
        let vm = &mut self.vms[vm];
        let bytes = at.bytes(self.pages);
        let range = PageRange::covering(bytes.start, bytes.end - bytes.start).unwrap();
        for part in parts(&vm.ram, range) {
            let of = part.pages.offset()..part.pages.offset() + part.pages.bytes() as u64;
            let bytes = bytes.start.max(of.start)..bytes.end.min(of.end);
            let data = vec![byte; (bytes.end - bytes.start) as usize];
            let to = address(part.pages.start(), self.pages).0 + bytes.start - of.start;
            let wrote = vm.ram.memory().write_slice(&data, GuestAddress(to));
            assert_eq!(wrote.is_ok(), vm.model.is_there(part.pages), "R19: {wrote:?}");
            if wrote.is_ok() {
                vm.model.fill(bytes, byte);
            }
        }
        vm.look_at(range);
    }

    fn reset(&mut self, vm: usize, image: usize) {
        let (image, model) = &self.images[image % self.images.len()];
        let vm = self.pick(vm);
        let pinned = !self.pinned_pages(self.vms[vm].id).is_empty();
        let vm = &mut self.vms[vm];
        match vm.ram.reset(image, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO) {
            Ok(_) => {
                assert!(!pinned, "I7: a pinned page was reset away");
                vm.model.reset(model);
            }
            Err(RamError::Pinned { .. }) => assert!(pinned, "refused for pins that are not there"),
            Err(other) => panic!("{other}"),
        }
        vm.look_at(vm.model.all());
    }

    fn suspend(&mut self, vm: usize, wake: bool) {
        let vm = &self.vms[self.pick(vm)];
        let pinned = !self.pinned_pages(vm.id).is_empty();
        let file = SuspendFile::create(Path::new("/dev/shm")).unwrap();
        match vm.ram.suspend(file, &Quiesced::by(&clade_memory::NoWriters), Duration::ZERO) {
            Ok((report, working_set)) => {
                assert!(!pinned, "I7: a pinned page was written away");
                let exclusive = vm.ram.stats().unwrap().exclusive;
                assert!(exclusive <= report.kept, "{exclusive} pages are still the VM's own: {report:?}");
                if wake {
                    vm.ram.read_ahead(&working_set);
                }
            }
            Err(RamError::Pinned { .. }) => assert!(pinned, "refused for pins that are not there"),
            Err(other) => panic!("{other}"),
        }
        vm.ram.check(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
        vm.look_at(vm.model.all());
    }

    fn forget_the_dead(&mut self) {
        let (pins, dead) = (&self.pins, &mut self.dead);
        dead.retain(|id, _| pins.iter().any(|pin| pin.vm == *id));
    }

    /// Pages with a pin, counted or not: operations must spare them.
    fn pinned_pages(&self, vm: u64) -> BTreeSet<u64> {
        let pins = self.pins.iter().filter(|pin| pin.vm == vm);
        pins.flat_map(|pin| pin.range.start()..pin.range.end()).collect()
    }

    /// Pages with a counted pin.
    fn counted_pages(&self, vm: u64) -> BTreeSet<u64> {
        self.pins.iter().filter(|pin| pin.vm == vm).flat_map(|pin| pin.counted.iter().copied()).collect()
    }

    /// Checks every byte and every count of a VM.
    fn check(&self, vm: usize) {
        let vm = &self.vms[vm];
        vm.look_at(vm.model.all());
        let stats = vm.ram.stats().unwrap();
        assert_eq!(stats.reference + stats.shared + stats.exclusive, self.pages);
        let pins = self.pins.iter().filter(|pin| pin.vm == vm.id).map(|pin| pin.counted.len() as u64).sum::<u64>();
        assert_eq!(stats.pinned, self.counted_pages(vm.id).len() as u64, "I6: pins are exact");
        let regions = vm.ram.regions().iter();
        let counts = regions.map(|region| region.ownership().counts(region.range()).pins);
        assert_eq!(counts.sum::<u64>(), pins, "I6: pins are exact");
    }

    /// Checks all VMs and images at the end.
    pub(crate) fn check_all(&mut self) {
        (0..self.vms.len()).for_each(|vm| self.check(vm));
        self.store.sweep();
        for vm in &self.vms {
            vm.ram.check(&Quiesced::by(&clade_memory::NoWriters)).unwrap();
            vm.look_at(vm.model.all());
        }
        for pin in &mut self.pins {
            let alive = self.vms.iter().find(|vm| vm.id == pin.vm).map(|vm| &vm.model);
            pin.reads_what_it_must(alive.unwrap_or_else(|| &self.dead[&pin.vm]));
        }
        // I4: every image still has the bytes of its instant, regardless of its source's later
        // writes.
        for (image, model) in &self.images {
            let ram = GuestRam::reserve(image.layout(), self.store).unwrap();
            ram.adopt(image).unwrap();
            let vm = Vm { ram, model: model.clone(), id: u64::MAX };
            vm.look_at(vm.model.all());
        }
    }
}
