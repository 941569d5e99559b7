//! VMs and images with a model of the contents of each page. Both are checked once more when
//! dropped.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;

use clade_memory::{
    Access, DmaPin, FreezeReport, GuestRam, PAGE_SIZE, PageRange, PinLifetime, RamImage, RamLayout, Store,
};
use vm_memory::{Bytes, GuestAddress};

use crate::dma::Device;

/// One whole block and a part of one.
pub(crate) const PAGES: u64 = 512 + 60;
/// The pages of a row: on both sides of the block's edge.
pub(crate) const ARENA: PageRange = PageRange::new(490, 530);
/// Pages written at birth: more than a freeze copies in place. The rest is untouched.
pub(crate) const WRITTEN: PageRange = PageRange::new(280, 560);
/// Never written by [`crate::case::Case::subject`].
pub(crate) const UNTOUCHED: PageRange = PageRange::new(560, PAGES);
/// Written and untouched pages, on both sides of the block's edge.
pub(crate) const WIDE: PageRange = PageRange::new(440, PAGES);
pub(crate) const ALL: PageRange = PageRange::new(0, PAGES);
const PAGE: usize = PAGE_SIZE as usize;

/// Contents of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Zero,
    /// The same byte everywhere, as in reference pages.
    Byte(u8),
    /// Words that are unique to the page and the seed.
    Seed(u16),
}

impl Content {
    /// Whether a page has these contents.
    fn is(self, page: u64, got: &[u8; PAGE]) -> bool {
        let words = || got.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        match self {
            // The whole page, without early exit: the compiler vectorizes a fold without branches.
            Self::Zero => words().fold(0, |seen, word| seen | word) == 0,
            Self::Byte(byte) => {
                let want = u64::from_le_bytes([byte; 8]);
                words().fold(0, |seen, word| seen | (word ^ want)) == 0
            }
            Self::Seed(seed) => {
                let base = u64::from(seed) << 48 | page << 16;
                (0..).zip(words()).fold(0, |seen, (at, word)| seen | (word ^ (base | at))) == 0
            }
        }
    }

    pub(crate) fn bytes(self, page: u64) -> [u8; PAGE] {
        match self {
            Self::Zero => [0; PAGE],
            Self::Byte(byte) => [byte; PAGE],
            Self::Seed(seed) => {
                let mut bytes = [0; PAGE];
                let base = u64::from(seed) << 48 | page << 16;
                for (at, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    *word = (base | at as u64).to_le_bytes();
                }
                bytes
            }
        }
    }
}

/// Contents of the pages of `range` after a write with `seed`.
pub(crate) fn seeded(range: PageRange, seed: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(range.bytes());
    (range.start()..range.end()).for_each(|page| bytes.extend_from_slice(&Content::Seed(seed).bytes(page)));
    bytes
}

pub(crate) struct Vm {
    pub(crate) ram: GuestRam,
    pub(crate) model: Vec<Content>,
    pub(crate) who: &'static str,
    /// Relatives made along with a state: they must not notice any change.
    pub(crate) kin: Vec<Vm>,
    pub(crate) images: Vec<Image>,
}

impl Vm {
    pub(crate) fn reserve(store: &Store, who: &'static str) -> Self {
        Self::with_pages(store, who, PAGES)
    }

    pub(crate) fn with_pages(store: &Store, who: &'static str, pages: u64) -> Self {
        let ram = GuestRam::reserve(&RamLayout::new(pages * PAGE_SIZE).unwrap(), store).unwrap();
        Self { ram, model: vec![Content::Zero; pages as usize], who, kin: Vec::new(), images: Vec::new() }
    }

    pub(crate) fn born(store: &Store, who: &'static str) -> Self {
        let vm = Self::reserve(store, who);
        vm.ram.populate().unwrap();
        vm
    }

    pub(crate) fn all(&self) -> PageRange {
        PageRange::new(0, self.model.len() as u64)
    }

    pub(crate) fn region(&self) -> &std::sync::Arc<clade_memory::GuestRegion> {
        &self.ram.regions()[0]
    }

    /// The CPU writes.
    pub(crate) fn write(&mut self, range: PageRange, seed: u16) {
        self.ram.memory().write_slice(&seeded(range, seed), GuestAddress(range.offset())).unwrap();
        self.holds(range, Content::Seed(seed));
    }

    /// Records the contents of `range`.
    pub(crate) fn holds(&mut self, range: PageRange, content: Content) {
        self.model[range.start() as usize..range.end() as usize].fill(content);
    }

    pub(crate) fn pin(&self, range: PageRange, access: Access, term: PinLifetime) -> DmaPin {
        self.region().pin(range, access, term).unwrap()
    }

    /// A device that holds a pin of `range`.
    pub(crate) fn device(&self, range: PageRange, access: Access, term: PinLifetime) -> Device {
        Device::attach(self.pin(range, access, term))
    }

    pub(crate) fn bytes(&self, range: PageRange) -> Vec<u8> {
        let mut got = vec![0; range.bytes()];
        self.ram.memory().read_slice(&mut got, GuestAddress(range.offset())).unwrap();
        got
    }

    /// Checks every byte, as the CPU sees it.
    pub(crate) fn check(&self, when: &str) {
        thread_local! {
            /// Reused, because fresh memory for each check would cost more than the check.
            static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        ROOM.with_borrow_mut(|room| {
            room.resize(self.model.len() * PAGE, 0);
            self.ram.memory().read_slice(room, GuestAddress(0)).unwrap();
            compare(room, 0, &self.model, &format!("{} {when}", self.who));
        });
    }

    /// Checks that a device sees the same contents of `range` as the CPU.
    pub(crate) fn check_device(&self, device: &mut Device, when: &str) {
        let range = device.pin().range();
        let model = &self.model[range.start() as usize..range.end() as usize];
        compare(&device.read(), range.start(), model, &format!("a device of the {} {when}", self.who));
    }

    /// Number of its own pages according to the statistics.
    pub(crate) fn exclusive(&self) -> u64 {
        self.ram.stats().unwrap().exclusive
    }

    /// Private copies according to the kernel's page map: not file-backed, which includes zeros
    /// without a file that were only read.
    pub(crate) fn owned(&self) -> Vec<u64> {
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        const FILE_OR_SHARED: u64 = 1 << 61;
        let entries = (0..).zip(self.page_map());
        let owned = entries.filter(|(_, entry)| entry & PRESENT_OR_SWAPPED != 0 && entry & FILE_OR_SHARED == 0);
        owned.map(|(page, _)| page).collect()
    }

    /// The frames behind `range`. Only a privileged process gets their numbers; zeros for others.
    pub(crate) fn frames(&self, range: PageRange) -> Vec<u64> {
        let entries = &self.page_map()[range.start() as usize..range.end() as usize];
        entries.iter().map(|entry| entry & ((1 << 55) - 1)).collect()
    }

    fn page_map(&self) -> Vec<u64> {
        let map = File::open("/proc/self/pagemap").unwrap();
        let mut entries = vec![0; self.model.len() * 8];
        map.read_exact_at(&mut entries, self.region().host_address() / PAGE_SIZE * 8).unwrap();
        entries.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
    }

    /// Drops the VM while its devices are still active, and skips its last check.
    pub(crate) fn kill(mut self) {
        self.model.clear();
    }

    pub(crate) fn adopt(store: &Store, image: &Image, who: &'static str) -> Self {
        let mut vm = Self::with_pages(store, who, image.model.len() as u64);
        vm.ram.adopt(&image.ram).unwrap();
        vm.model.clone_from(&image.model);
        vm
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if thread::panicking() || self.model.is_empty() {
            return;
        }
        self.check("at the end");
        let pins = self.region().ownership().counts(self.all()).pins;
        assert_eq!(pins, 0, "{}: pins are left", self.who);
        assert_eq!(self.region().long_pins(), [], "{}: pins are listed", self.who);
    }
}

/// An image, the model of its instant, and the freeze's report.
pub(crate) struct Image {
    pub(crate) ram: RamImage,
    pub(crate) model: Vec<Content>,
    pub(crate) report: FreezeReport,
    pub(crate) store: Store,
}

impl Image {
    /// Checks every byte of a VM newly made of the image.
    pub(crate) fn check(&self, when: &str) {
        let vm = Vm::adopt(&self.store, self, "image");
        vm.check(when);
        vm.kill();
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.check("at the end (I4)");
        }
    }
}

fn compare(got: &[u8], first: u64, model: &[Content], what: &str) {
    assert_eq!(got.len(), model.len() * PAGE);
    let pages = (first..).zip(got.as_chunks::<PAGE>().0).zip(model);
    let wrong: Vec<_> = pages.filter(|((page, got), want)| !want.is(*page, got)).collect();
    if let Some(((page, got), want)) = wrong.first() {
        let bytes = want.bytes(*page);
        let at = got.iter().zip(bytes).position(|(a, b)| *a != b).unwrap();
        let how = format!("byte {at:#x} is {:#x}, must be {:#x}", got[at], bytes[at]);
        panic!("{what}: {} wrong pages, the first {page:#x}, which must hold {want:?}: {how}", wrong.len());
    }
}
