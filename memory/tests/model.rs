//! Random schedules of everything a VM's memory can go through, against a byte-level model of every VM. Devices are
//! real: io_uring with registered buffers, which hold frames, not addresses.

#![allow(
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    reason = "a test, although not every function of it is one"
)]

mod dma;

use std::collections::BTreeSet;
use std::time::Duration;

use clade_memory::{
    Access, FreezeMode, GuestRam, PAGE_SIZE, PageRange, Quiesced, RamError, RamImage, RamLayout, Store, Term,
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

/// One whole block and a part of one, so that both shapes of ownership record are met.
const PAGES: u64 = 512 + 90;
const BYTES: u64 = PAGES * PAGE_SIZE;
const MOST_VMS: usize = 6;

#[derive(Clone, Debug)]
enum Op {
    /// A vCPU or the VMM writes.
    Write {
        vm: usize,
        at: u64,
        len: u64,
        byte: u8,
    },
    Read {
        vm: usize,
        at: u64,
        len: u64,
    },
    /// In the background, everything goes on while pages are still being copied.
    Freeze {
        vm: usize,
        background: bool,
    },
    Clone {
        image: usize,
    },
    DropVm {
        vm: usize,
    },
    DropImage {
        image: usize,
    },
    Pin {
        vm: usize,
        page: u64,
        pages: u64,
    },
    /// A device writes through a pin, whatever happened since it was taken.
    DmaWrite {
        pin: usize,
        byte: u8,
    },
    /// A device reads through a pin.
    DmaRead {
        pin: usize,
    },
    Unpin {
        pin: usize,
    },
    /// Back to any image of this size.
    Reset {
        vm: usize,
        image: usize,
    },
    Discard {
        vm: usize,
        page: u64,
        pages: u64,
    },
    ShowReference {
        vm: usize,
        page: u64,
        pages: u64,
        byte: u8,
    },
    Evict {
        vm: usize,
        page: u64,
        pages: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let any_index = any::<usize>();
    let near_an_edge =
        prop_oneof![0..BYTES, (0..PAGES, 0..32u64).prop_map(|(p, d)| (p * PAGE_SIZE + d).saturating_sub(16))];
    // Now and then so much that a freeze remaps instead of keeping what it copied.
    let len = prop_oneof![4 => 1..64u64, 4 => 1..9000u64, 1 => 300 * PAGE_SIZE..BYTES];
    prop_oneof![
        8 => (any_index, near_an_edge.clone(), len.clone(), any::<u8>()).prop_map(|(vm, at, len, byte)| Op::Write { vm, at, len, byte }),
        3 => (any_index, near_an_edge, len).prop_map(|(vm, at, len)| Op::Read { vm, at, len }),
        4 => (any_index, any::<bool>()).prop_map(|(vm, background)| Op::Freeze { vm, background }),
        3 => any_index.prop_map(|image| Op::Clone { image }),
        1 => any_index.prop_map(|vm| Op::DropVm { vm }),
        1 => any_index.prop_map(|image| Op::DropImage { image }),
        3 => (any_index, 0..PAGES, prop_oneof![4 => 1..8u64, 1 => Just(512u64)])
            .prop_map(|(vm, page, pages)| Op::Pin { vm, page: if pages == 512 { 0 } else { page }, pages }),
        4 => (any_index, any::<u8>()).prop_map(|(pin, byte)| Op::DmaWrite { pin, byte }),
        2 => any_index.prop_map(|pin| Op::DmaRead { pin }),
        2 => any_index.prop_map(|pin| Op::Unpin { pin }),
        2 => (any_index, any_index).prop_map(|(vm, image)| Op::Reset { vm, image }),
        2 => (any_index, 0..PAGES, 1..300u64).prop_map(|(vm, page, pages)| Op::Discard { vm, page, pages }),
        1 => (any_index, 0..PAGES, 1..300u64, 0..3u8)
            .prop_map(|(vm, page, pages, byte)| Op::ShowReference { vm, page, pages, byte }),
        1 => (any_index, 0..PAGES, 1..300u64).prop_map(|(vm, page, pages)| Op::Evict { vm, page, pages }),
    ]
}

struct Vm {
    ram: GuestRam,
    model: Vec<u8>,
    id: u64,
}

struct Pin {
    device: dma::Device,
    vm: u64,
}

impl Pin {
    fn range(&self) -> PageRange {
        self.device.pin().range()
    }
    fn bytes(&self) -> std::ops::Range<usize> {
        let at = self.range().offset() as usize;
        at..at + self.range().bytes()
    }
}

#[derive(Default)]
struct World {
    vms: Vec<Vm>,
    images: Vec<(RamImage, Vec<u8>)>,
    pins: Vec<Pin>,
    /// Whether any VM has had pages on a disk.
    evicted: bool,
    next: u64,
}

impl World {
    fn pick(&self, n: usize) -> Option<usize> {
        (!self.vms.is_empty()).then(|| n % self.vms.len())
    }

    fn run(&mut self, store: &Store, op: Op) {
        match op {
            Op::Write { vm, at, len, byte } => {
                let Some(vm) = self.pick(vm) else { return };
                let len = len.min(BYTES - at) as usize;
                let vm = &mut self.vms[vm];
                vm.ram.memory().write_slice(&vec![byte; len], GuestAddress(at)).unwrap();
                vm.model[at as usize..at as usize + len].fill(byte);
            }
            Op::Read { vm, at, len } => {
                let Some(vm) = self.pick(vm) else { return };
                let mut got = vec![0; len.min(BYTES - at) as usize];
                self.vms[vm].ram.memory().read_slice(&mut got, GuestAddress(at)).unwrap();
                assert!(got == self.vms[vm].model[at as usize..at as usize + got.len()], "vm {vm} at {at:#x}");
            }
            Op::Freeze { vm, background } => {
                let Some(vm) = self.pick(vm) else { return };
                let mode = if background { FreezeMode::Background } else { FreezeMode::Eager };
                let ram = &self.vms[vm].ram;
                let frozen = match ram.freeze_in(mode, &Quiesced::assume()) {
                    // Private pages over a file on a disk cannot be write-protected; left to choose, the freeze is eager then.
                    Err(RamError::Background(_)) if self.evicted => ram.freeze(&Quiesced::assume()),
                    other => other,
                };
                let (image, _) = frozen.unwrap();
                self.images.push((image, self.vms[vm].model.clone()));
                if self.images.len() > MOST_VMS {
                    self.images.remove(0);
                }
            }
            Op::Clone { image } => {
                if self.images.is_empty() || self.vms.len() >= MOST_VMS {
                    return;
                }
                let (image, model) = &self.images[image % self.images.len()];
                let ram = GuestRam::reserve(image.layout(), store).unwrap();
                ram.adopt(image).unwrap();
                self.vms.push(Vm { ram, model: model.clone(), id: self.next });
                self.next += 1;
            }
            Op::DropVm { vm } if self.vms.len() > 1 => {
                let vm = self.vms.swap_remove(vm % self.vms.len());
                self.pins.retain(|p| p.vm != vm.id);
            }
            Op::DropImage { image } if !self.images.is_empty() => {
                self.images.swap_remove(image % self.images.len());
            }
            Op::Pin { vm, page, pages } => {
                let Some(vm) = self.pick(vm) else { return };
                let vm = &self.vms[vm];
                let range = PageRange::new(page, (page + pages).min(PAGES));
                let pin = vm.ram.regions()[0].pin(range, Access::Write, Term::Long).unwrap();
                for page in range.start..range.end {
                    assert!(vm.ram.regions()[0].ownership().get(page).0, "I3: pinned {page:#x} is exclusive");
                }
                // The kernel agrees, before any device has made it look twice.
                let pinned = vm.ram.regions()[0].ownership().counts(PageRange::new(0, PAGES)).pinned;
                assert!(vm.ram.stats().unwrap().exclusive >= pinned, "I3: pinned before it was unshared");
                self.pins.push(Pin { device: dma::Device::attach(pin), vm: vm.id });
            }
            Op::DmaWrite { pin, byte } if !self.pins.is_empty() => {
                let n = pin % self.pins.len();
                self.pins[n].device.write(byte);
                let (id, bytes) = (self.pins[n].vm, self.pins[n].bytes());
                self.vms.iter_mut().find(|v| v.id == id).unwrap().model[bytes].fill(byte);
            }
            Op::DmaRead { pin } if !self.pins.is_empty() => {
                let n = pin % self.pins.len();
                let got = self.pins[n].device.read();
                let vm = self.vms.iter().find(|v| v.id == self.pins[n].vm).unwrap();
                assert!(got == vm.model[self.pins[n].bytes()], "R26: the device sees what the guest wrote");
            }
            Op::Unpin { pin } if !self.pins.is_empty() => {
                self.pins.swap_remove(pin % self.pins.len());
            }
            Op::Reset { vm, image } if !self.images.is_empty() => {
                let Some(vm) = self.pick(vm) else { return };
                let (image, model) = &self.images[image % self.images.len()];
                let pinned = self.pins.iter().any(|p| p.vm == self.vms[vm].id);
                let vm = &mut self.vms[vm];
                match vm.ram.reset(image, &Quiesced::assume(), Duration::ZERO) {
                    Ok(_) => {
                        assert!(!pinned, "I7: a pinned page was reset away");
                        vm.model.clone_from(model);
                    }
                    Err(RamError::Pinned { .. }) => assert!(pinned, "refused for pins that are not there"),
                    Err(other) => panic!("{other}"),
                }
            }
            Op::Discard { vm, page, pages } => {
                let Some(vm) = self.pick(vm) else { return };
                let range = PageRange::new(page, (page + pages).min(PAGES));
                let pinned = self.pinned_pages(self.vms[vm].id);
                let done = self.vms[vm].ram.regions()[0].discard(range).unwrap();
                for page in range.start..range.end {
                    if !pinned.contains(&page) {
                        let at = (page * PAGE_SIZE) as usize;
                        self.vms[vm].model[at..at + PAGE_SIZE as usize].fill(0);
                    }
                }
                let kept = pinned.iter().filter(|p| range.contains(**p)).count() as u64;
                assert_eq!((done.pinned, done.discarded), (kept, range.len() - kept), "I7");
            }
            Op::ShowReference { vm, page, pages, byte } => {
                let Some(vm) = self.pick(vm) else { return };
                let range = PageRange::new(page, (page + pages).min(PAGES));
                let pinned = self.pinned_pages(self.vms[vm].id).iter().any(|p| range.contains(*p));
                let page = store.reference_page(&[byte; PAGE_SIZE as usize]).unwrap();
                match self.vms[vm].ram.regions()[0].map_reference(range, &page) {
                    Ok(()) => {
                        assert!(!pinned, "I10: a pinned page became a reference");
                        let at = range.offset() as usize;
                        self.vms[vm].model[at..at + range.bytes()].fill(byte);
                    }
                    Err(RamError::Pinned { .. }) => assert!(pinned),
                    Err(other) => panic!("{other}"),
                }
            }
            Op::Evict { vm, page, pages } => {
                let Some(vm) = self.pick(vm) else { return };
                let range = PageRange::new(page, (page + pages).min(PAGES));
                let dir = std::env::temp_dir();
                self.evicted = true;
                self.vms[vm].ram.regions()[0].evict(range, &dir, &Quiesced::assume()).unwrap();
            }
            _ => {}
        }
    }

    fn pinned_pages(&self, vm: u64) -> BTreeSet<u64> {
        self.pins.iter().filter(|p| p.vm == vm).flat_map(|p| p.range().start..p.range().end).collect()
    }

    fn check(&self) {
        let mut got = vec![0; BYTES as usize];
        for vm in &self.vms {
            vm.ram.memory().read_slice(&mut got, GuestAddress(0)).unwrap();
            if let Some(at) = got.iter().zip(&vm.model).position(|(a, b)| a != b) {
                panic!("vm {}: byte {at:#x} is {:#x}, must be {:#x}", vm.id, got[at], vm.model[at]);
            }
            let stats = vm.ram.stats().unwrap();
            assert_eq!(stats.reference + stats.shared + stats.exclusive, PAGES);
            let pinned = self.pinned_pages(vm.id);
            let pins = self.pins.iter().filter(|p| p.vm == vm.id).map(|p| p.range().len()).sum::<u64>();
            assert_eq!(stats.pinned, pinned.len() as u64, "I6: pins are exact");
            let region = &vm.ram.regions()[0];
            assert_eq!(region.ownership().counts(region.range()).pins, pins, "I6: pins are exact");
            assert_eq!(region.len(), BYTES);
        }
        for (image, model) in &self.images {
            assert_eq!(image.layout().bytes(), model.len() as u64);
        }
    }
}

fn schedule(store: &Store, ops: Vec<Op>) {
    let mut world = World::default();
    let ram = GuestRam::reserve(&RamLayout::new(BYTES).unwrap(), store).unwrap();
    ram.birth().unwrap();
    world.vms.push(Vm { ram, model: vec![0; BYTES as usize], id: 0 });
    world.next = 1;
    for op in ops {
        world.run(store, op);
    }
    world.check();
    // I4: every image still gives the bytes of its instant, whatever its source did since.
    for (image, model) in &world.images {
        let ram = GuestRam::reserve(image.layout(), store).unwrap();
        ram.adopt(image).unwrap();
        let mut got = vec![0; BYTES as usize];
        ram.memory().read_slice(&mut got, GuestAddress(0)).unwrap();
        assert!(got == *model, "I4: an image changed");
    }
    drop(world);
    // The background thread may just be putting away what it finished.
    let begun = std::time::Instant::now();
    while store.live_layers() + store.budget().used() as usize > 0 && begun.elapsed().as_secs() < 2 {
        std::thread::yield_now();
    }
    assert_eq!(store.live_layers(), 0, "a layer outlived its last user");
    assert_eq!(store.budget().used(), 0, "mappings promised to nobody");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 4096, ..ProptestConfig::default() })]

    #[test]
    fn memory_agrees_with_a_byte_model_in_huge_pages(ops in proptest::collection::vec(op(), 1..80)) {
        schedule(&Store::open().unwrap(), ops);
    }

    #[test]
    fn memory_agrees_with_a_byte_model_in_small_pages(ops in proptest::collection::vec(op(), 1..80)) {
        schedule(&Store::open_small().unwrap(), ops);
    }
}
