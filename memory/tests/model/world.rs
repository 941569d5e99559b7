//! All VMs, images and devices of one schedule, and their models.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use clade_memory::{
    Access, DmaPin, FreezeMode, GuestRam, NoFork, PAGE_SIZE, PageRange, PinError, Quiesced, RamError, RamImage,
    RamLayout, RefPage, Store, Term,
};
use vm_memory::{Bytes, GuestAddress};

use crate::dma;
use crate::ops::Op;
use crate::pages::{Inherits, Pages};

const MOST_VMS: usize = 6;
const MOST_PINS: usize = 40;
/// Operations between two looks at everything of one VM.
const LOOK: u64 = 24;

struct Vm {
    ram: GuestRam,
    model: Pages,
    id: u64,
}

impl Vm {
    fn region(&self) -> &std::sync::Arc<clade_memory::GuestRegion> {
        &self.ram.regions()[0]
    }

    /// The bytes of `range` and of a page on either side.
    fn look_at(&self, range: PageRange) {
        let around = PageRange::new(range.start.saturating_sub(1), (range.end + 1).min(self.model.len()));
        for run in self.model.there(around) {
            let mut got = vec![0; run.bytes()];
            self.ram.memory().read_slice(&mut got, GuestAddress(run.offset())).unwrap();
            if let Some((at, is, must)) = self.model.first_wrong(run, &got) {
                panic!("vm {}: byte {at:#x} is {is:#x}, must be {must:#x}", self.id);
            }
        }
    }
}

/// How a device reaches memory.
enum Reach {
    /// By frames, looked up once.
    Frames(dma::Device),
    /// By address at the time of each request, as a short read may.
    Address(DmaPin),
}

struct Pin {
    reach: Reach,
    access: Access,
    vm: u64,
    /// Pages on which it is counted.
    counted: Vec<u64>,
}

impl Pin {
    fn range(&self) -> PageRange {
        match &self.reach {
            Reach::Frames(device) => device.pin().range(),
            Reach::Address(pin) => pin.range(),
        }
    }

    fn read(&mut self) -> Vec<u8> {
        match &mut self.reach {
            Reach::Frames(device) => device.read(),
            Reach::Address(pin) => read_by_address(pin),
        }
    }
}

/// What the kernel reads at a pin's address.
fn read_by_address(pin: &DmaPin) -> Vec<u8> {
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"read".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: fd was just made and belongs to nobody else.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: the pinned bytes are mapped; the kernel reads them.
    let wrote = unsafe { libc::pwrite(file.as_raw_fd(), pin.host_address().cast(), pin.len(), 0) };
    assert_eq!(wrote, pin.len() as isize);
    let mut got = vec![0; pin.len()];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, 0).unwrap();
    got
}

pub(crate) struct World<'s> {
    store: &'s Store,
    pages: u64,
    vms: Vec<Vm>,
    images: Vec<(RamImage, Pages)>,
    pins: Vec<Pin>,
    /// What is left of VMs that died before their devices.
    dead: BTreeMap<u64, Pages>,
    references: BTreeMap<u8, RefPage>,
    /// Whether any VM has had pages on a disk.
    evicted: bool,
    next: u64,
    done: u64,
}

impl<'s> World<'s> {
    pub(crate) fn new(store: &'s Store, pages: u64) -> Self {
        let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), store).unwrap();
        ram.birth().unwrap();
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

    /// Operations that were carried out.
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

    /// Does it, if there is something to do it with.
    pub(crate) fn run(&mut self, op: Op) {
        if self.carry_out(op) {
            self.done += 1;
            if self.done.is_multiple_of(LOOK) {
                self.check(self.pick((self.done / LOOK) as usize));
            }
        }
    }

    fn carry_out(&mut self, op: Op) -> bool {
        match op {
            Op::Write { vm, at, byte } => {
                let vm = self.pick(vm);
                let vm = &mut self.vms[vm];
                let bytes = at.bytes(self.pages);
                let range = PageRange::covering(bytes.start, bytes.end - bytes.start).unwrap();
                let data = vec![byte; (bytes.end - bytes.start) as usize];
                let wrote = vm.ram.memory().write_slice(&data, GuestAddress(bytes.start));
                assert_eq!(wrote.is_ok(), vm.model.is_there(range), "R19: {wrote:?}");
                if wrote.is_ok() {
                    vm.model.fill(bytes, byte);
                }
                vm.look_at(range);
            }
            Op::Read { vm, at } => {
                let bytes = at.bytes(self.pages);
                let range = PageRange::covering(bytes.start, bytes.end - bytes.start).unwrap();
                self.vms[self.pick(vm)].look_at(range);
            }
            Op::Freeze { vm, background } => self.freeze(vm, background),
            Op::Clone { image } => {
                if self.images.is_empty() || self.vms.len() >= MOST_VMS {
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
                if self.pins.len() >= MOST_PINS {
                    return false;
                }
                self.pin(vm, at.pages(self.pages), access, term);
            }
            Op::DmaWrite { pin, byte } => {
                let able: Vec<usize> = (0..self.pins.len()).filter(|n| self.pins[*n].access == Access::Write).collect();
                let Some(n) = able.get(pin.checked_rem(able.len()).unwrap_or(0)) else { return false };
                let pin = &mut self.pins[*n];
                let (id, range) = (pin.vm, pin.range());
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
                let (got, id, range) = (self.pins[n].read(), self.pins[n].vm, self.pins[n].range());
                let alive = self.vms.iter().find(|vm| vm.id == id).map(|vm| &vm.model);
                let model = alive.unwrap_or_else(|| &self.dead[&id]);
                assert_eq!(model.first_wrong(range, &got), None, "R26: the device sees what the guest wrote");
            }
            Op::Unpin { pin } => {
                if self.pins.is_empty() {
                    return false;
                }
                self.pins.swap_remove(pin % self.pins.len());
                self.forget_the_dead();
            }
            Op::Reset { vm, image } => {
                if self.images.is_empty() {
                    return false;
                }
                self.reset(vm, image);
            }
            Op::Discard { vm, at } => {
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                let pinned = self.pinned_pages(self.vms[vm].id);
                let vm = &mut self.vms[vm];
                let done = vm.region().discard(range).unwrap();
                vm.model.show((range.start..range.end).filter(|page| !pinned.contains(page)), 0);
                let kept = pinned.iter().filter(|page| range.contains(**page)).count() as u64;
                assert_eq!((done.pinned, done.discarded), (kept, range.len() - kept), "I7");
                vm.look_at(range);
            }
            Op::ShowReference { vm, at, byte } => {
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                let pinned = self.pinned_pages(self.vms[vm].id).iter().any(|page| range.contains(*page));
                let page = self.reference(byte);
                let vm = &mut self.vms[vm];
                match vm.region().map_reference(range, &page) {
                    Ok(()) => {
                        assert!(!pinned, "I10: a pinned page became a reference");
                        vm.model.show(range.start..range.end, byte);
                    }
                    Err(RamError::Pinned { .. }) => assert!(pinned, "refused for pins that are not there"),
                    Err(other) => panic!("{other}"),
                }
                vm.look_at(range);
            }
            Op::Evict { vm, at, disk } => {
                // A disk makes a test wait; what it does differently is rare in the code too.
                let dir = Path::new(if disk { env!("CARGO_TARGET_TMPDIR") } else { "/dev/shm" });
                self.evicted |= disk;
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                self.vms[vm].region().evict(range, dir, &Quiesced::assume()).unwrap();
                self.vms[vm].look_at(range);
            }
            Op::NoFork { vm, at, what } => {
                let (vm, range) = (self.pick(vm), at.pages(self.pages));
                let declared = what.map(|what| match what {
                    Inherits::Absent => NoFork::Absent,
                    Inherits::Zeroed => NoFork::Zeroed,
                    Inherits::Fresh(byte) => NoFork::Fresh(self.reference(byte)),
                });
                self.vms[vm].region().set_no_fork(range, declared).unwrap();
                self.vms[vm].model.declare(range, what);
            }
            Op::Settle { vm } => self.vms[self.pick(vm)].ram.settle().unwrap(),
            // Contents do not change, so the model need not know.
            Op::Compact { vm } => {
                let vm = &self.vms[self.pick(vm)];
                vm.ram.compact(&Quiesced::assume()).unwrap();
                vm.ram.check(&Quiesced::assume()).unwrap();
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
        }
        true
    }

    fn freeze(&mut self, vm: usize, background: bool) {
        let vm = &self.vms[self.pick(vm)];
        let mode = if background { FreezeMode::Background } else { FreezeMode::Eager };
        let frozen = match vm.ram.freeze_in(mode, &Quiesced::assume()) {
            // Private pages over a file on a disk cannot be write-protected; left to choose, the freeze is eager then.
            Err(RamError::Background(_)) if self.evicted => vm.ram.freeze_in(FreezeMode::Eager, &Quiesced::assume()),
            other => other,
        };
        let (image, _) = frozen.unwrap();
        self.images.push((image, vm.model.image()));
        if self.images.len() > MOST_VMS {
            self.images.remove(0);
        }
    }

    fn pin(&mut self, vm: usize, range: PageRange, access: Access, term: Term) {
        let vm = self.pick(vm);
        let vm = &self.vms[vm];
        let region = vm.region();
        let table = region.ownership();
        let own: Vec<u64> = (range.start..range.end).filter(|page| table.get(*page).0).collect();
        let pin = match region.pin(range, access, term) {
            Ok(pin) => pin,
            Err(PinError::Unshare { .. }) => {
                assert!(!vm.model.is_there(range), "a pin of memory that is there is refused");
                return;
            }
            Err(other) => panic!("{other}"),
        };
        // The one case in which what is not the VM's own is neither copied nor counted.
        let short_read = access == Access::Read && term == Term::Short;
        let counted = if short_read { own } else { (range.start..range.end).collect() };
        assert!(short_read || vm.model.is_there(range), "R19: a device was given what is absent");
        for page in &counted {
            assert!(table.get(*page).0, "I3: pinned {page:#x} is exclusive");
        }
        // The kernel agrees, before any device has made it look twice.
        let pinned = table.counts(region.range()).pinned;
        assert!(vm.ram.stats().unwrap().exclusive >= pinned, "I3: pinned before it was unshared");
        let id = vm.id;
        let reach = if short_read { Reach::Address(pin) } else { Reach::Frames(dma::Device::attach(pin)) };
        // What is absent cannot be read either.
        if short_read && !vm.model.is_there(range) {
            return;
        }
        self.pins.push(Pin { reach, access, vm: id, counted });
    }

    fn reset(&mut self, vm: usize, image: usize) {
        let (image, model) = &self.images[image % self.images.len()];
        let vm = self.pick(vm);
        let pinned = !self.pinned_pages(self.vms[vm].id).is_empty();
        let vm = &mut self.vms[vm];
        match vm.ram.reset(image, &Quiesced::assume(), Duration::ZERO) {
            Ok(_) => {
                assert!(!pinned, "I7: a pinned page was reset away");
                vm.model.reset(model);
            }
            Err(RamError::Pinned { .. }) => assert!(pinned, "refused for pins that are not there"),
            Err(other) => panic!("{other}"),
        }
        vm.look_at(vm.model.all());
    }

    fn forget_the_dead(&mut self) {
        let (pins, dead) = (&self.pins, &mut self.dead);
        dead.retain(|id, _| pins.iter().any(|pin| pin.vm == *id));
    }

    fn pinned_pages(&self, vm: u64) -> BTreeSet<u64> {
        self.pins.iter().filter(|pin| pin.vm == vm).flat_map(|pin| pin.counted.iter().copied()).collect()
    }

    /// Every byte and every count of a VM.
    fn check(&self, vm: usize) {
        let vm = &self.vms[vm];
        vm.look_at(vm.model.all());
        let stats = vm.ram.stats().unwrap();
        assert_eq!(stats.reference + stats.shared + stats.exclusive, self.pages);
        let pins = self.pins.iter().filter(|pin| pin.vm == vm.id).map(|pin| pin.counted.len() as u64).sum::<u64>();
        assert_eq!(stats.pinned, self.pinned_pages(vm.id).len() as u64, "I6: pins are exact");
        assert_eq!(vm.region().ownership().counts(vm.region().range()).pins, pins, "I6: pins are exact");
    }

    /// Everything, at the end.
    pub(crate) fn check_all(&mut self) {
        (0..self.vms.len()).for_each(|vm| self.check(vm));
        self.store.sweep();
        for vm in &self.vms {
            vm.ram.check(&Quiesced::assume()).unwrap();
            vm.look_at(vm.model.all());
        }
        for pin in &mut self.pins {
            let (got, range) = (pin.read(), pin.range());
            let alive = self.vms.iter().find(|vm| vm.id == pin.vm).map(|vm| &vm.model);
            let model = alive.unwrap_or_else(|| &self.dead[&pin.vm]);
            assert_eq!(model.first_wrong(range, &got), None, "I3: the device sees what the guest wrote");
        }
        // I4: every image still gives the bytes of its instant, whatever its source did since.
        for (image, model) in &self.images {
            let ram = GuestRam::reserve(image.layout(), self.store).unwrap();
            ram.adopt(image).unwrap();
            let vm = Vm { ram, model: model.clone(), id: u64::MAX };
            vm.look_at(vm.model.all());
        }
    }
}
