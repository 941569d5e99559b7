//! Devices. They hold frames: later mappings at a pin's address do not affect them.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use clade_memory::{Access, PAGE_SIZE, PageRange, PinLifetime};
use clade_test_support::Random;
use vm_memory::Bytes;

use crate::dma;
use crate::dma::splice::Splice;
use crate::fleet::{Fleet, Tally};
use crate::stamp::{LANE, LANES, Lane, Model};
use crate::vm::{Chunks, Vm, address, pages_of};

/// Frames held by one reader, each with a pipe.
const MAX_READS: usize = 96;
const MAX_WRITES: usize = 24;
/// Most pages of a request.
const MAX_PAGES: u64 = 24;
/// Maximum lifetime of a request, long enough for many freezes.
const MAX_LIFE_MICROS: u64 = 600_000;

fn term(random: &mut Random) -> PinLifetime {
    if random.one_in(3) { PinLifetime::LongTerm } else { PinLifetime::Transient }
}

fn life(random: &mut Random) -> Duration {
    let most = MAX_LIFE_MICROS >> random.below(8);
    Duration::from_micros(random.below(most))
}

/// A reading request, by page references like a splice.
struct Read {
    splice: Splice,
    pin: clade_memory::DmaPin,
    first: u64,
    term: PinLifetime,
    until: Instant,
    /// Continues when devices are asked to finish, if it can.
    stubborn: bool,
    /// Number of freezes when the pin was requested.
    freezes: u64,
    lows: Vec<[u64; 2]>,
    model: Arc<Model>,
    chunks: Arc<Chunks>,
    vm: Weak<Vm>,
}

impl Read {
    fn pages(&self) -> PageRange {
        pages_of(&self.pin, self.first)
    }

    fn is_over(&self, now: Instant) -> bool {
        self.until <= now || self.chunks.is_quiet() && !self.stubborn
    }

    fn begin(fleet: &Fleet, random: &mut Random) -> Option<Self> {
        let vm = fleet.pick(random).filter(|vm| !vm.chunks.is_quiet())?;
        let pages = fleet.run_of_pages(random, MAX_PAGES);
        let term = if fleet.has("short") { term(random) } else { PinLifetime::LongTerm };
        let _devices = vm.devices_run();
        let model = vm.model();
        let freezes = fleet.tally.freezes();
        let lows = (pages.start()..pages.end()).map(|page| LANES.map(|lane| model.low(page, lane))).collect();
        let (region, range) = vm.region(pages);
        let pin = region.pin(range, Access::Read, term).unwrap();
        if term == PinLifetime::LongTerm {
            vm.chunks.hold(pages);
        }
        // Its frames, regardless of later mappings.
        let splice = Splice::of(&pin);
        Some(Self {
            splice,
            pin,
            first: pages.start(),
            term,
            until: Instant::now() + life(random),
            stubborn: term == PinLifetime::Transient && random.one_in(8),
            freezes,
            lows,
            model,
            chunks: Arc::clone(&vm.chunks),
            vm: Arc::downgrade(&vm),
        })
    }

    fn finish(mut self, tally: &Tally) -> Result<(), String> {
        let pages = self.pages();
        if self.term == PinLifetime::LongTerm {
            // I9: the request sees the guest's later writes.
            let now = |page| LANES.map(|lane| self.model.low(page, lane));
            self.lows = (pages.start()..pages.end()).map(now).collect();
            if let Some(vm) = self.vm.upgrade()
                && !Arc::ptr_eq(&vm.model(), &self.model)
            {
                return Err(format!("I7: a VM was reset under a long pin of {pages}"));
            }
        }
        let got = self.splice.read();
        let crossed = tally.freezes() - self.freezes;
        for ((page, got), lows) in (pages.start()..).zip(got.as_chunks::<{ PAGE_SIZE as usize }>().0).zip(&self.lows) {
            for (lane, low) in LANES.into_iter().zip(lows) {
                let span = self.model.span(page, lane, *low);
                if let Some(wrong) = self.model.wrong(page, lane, span, &got[lane.offset()..][..LANE]) {
                    let gone = if self.vm.strong_count() == 0 { ", its VM is gone" } else { "" };
                    let what = format!("a {:?} read of {pages}, {crossed} freezes old{gone}", self.term);
                    return Err(format!("{what}: {wrong}"));
                }
            }
        }
        tally.read(self.term, crossed);
        if self.term == PinLifetime::LongTerm {
            self.chunks.let_go(pages);
        }
        drop(self.pin);
        Ok(())
    }
}

/// Reading requests, many at a time.
pub(crate) fn reader(fleet: &Fleet, mut random: Random) -> Result<(), String> {
    let mut reads: Vec<Read> = Vec::new();
    while fleet.goes_on() {
        let now = Instant::now();
        while let Some(at) = reads.iter().position(|read| read.is_over(now)) {
            reads.swap_remove(at).finish(&fleet.tally)?;
        }
        if reads.len() < MAX_READS {
            reads.extend(Read::begin(fleet, &mut random));
        }
        std::thread::sleep(Duration::from_micros(random.below(3_000)));
    }
    reads.into_iter().try_for_each(|read| read.finish(&fleet.tally))
}

/// A device that writes into frames it has registered.
struct Write {
    device: dma::Device,
    first: u64,
    until: Instant,
    model: Arc<Model>,
    chunks: Arc<Chunks>,
    vm: Weak<Vm>,
}

impl Write {
    fn pages(&self) -> PageRange {
        pages_of(self.device.pin(), self.first)
    }

    fn begin(fleet: &Fleet, random: &mut Random) -> Option<Self> {
        let vm = fleet.pick(random).filter(|vm| !vm.chunks.is_quiet())?;
        let pages = fleet.run_of_pages(random, MAX_PAGES);
        let _devices = vm.devices_run();
        let model = vm.model();
        let (region, range) = vm.region(pages);
        let pin = region.pin(range, Access::Write, term(random)).unwrap();
        vm.chunks.hold(pages);
        let (chunks, of) = (Arc::clone(&vm.chunks), Arc::downgrade(&vm));
        let until = Instant::now() + life(random);
        Some(Self { device: dma::Device::attach(pin), first: pages.start(), until, model, chunks, vm: of })
    }

    fn is_over(&self, now: Instant) -> bool {
        self.until <= now || self.chunks.is_quiet()
    }

    /// Writes one page by DMA. The guest, if any, must see it at once.
    fn put(&mut self, page: u64) -> Result<(), String> {
        let vm = self.vm.upgrade();
        let _devices = vm.as_ref().map(|vm| vm.devices_run());
        if let Some(vm) = &vm
            && !Arc::ptr_eq(&vm.model(), &self.model)
        {
            return Err(format!("I7: a VM was reset under a write pin of {}", self.pages()));
        }
        let _writing = self.chunks.writing(page);
        let begun = self.model.write(page, Lane::Device);
        let bytes = begun.bytes();
        self.device.put(((page - self.first) * PAGE_SIZE) as usize + Lane::Device.offset(), &bytes);
        begun.done();
        let Some(vm) = &vm else { return Ok(()) };
        let mut got = [0; LANE];
        let at = address(page).0 + Lane::Device.offset() as u64;
        vm.ram.memory().read_slice(&mut got, vm_memory::GuestAddress(at)).unwrap();
        let now = self.model.low(page, Lane::Device);
        let wrong = self.model.wrong(page, Lane::Device, self.model.span(page, Lane::Device, now), &got);
        wrong.map_or(Ok(()), |wrong| Err(format!("I3: the guest does not see its device's write: {wrong}")))
    }

    /// Reads the guest's writes through the same frames.
    fn look(&mut self, page: u64) -> Result<(), String> {
        let lows = LANES.map(|lane| self.model.low(page, lane));
        let got = self.device.get(((page - self.first) * PAGE_SIZE) as usize, PAGE_SIZE as usize);
        for (lane, low) in LANES.into_iter().zip(lows) {
            let span = self.model.span(page, lane, low);
            if let Some(wrong) = self.model.wrong(page, lane, span, &got[lane.offset()..][..LANE]) {
                return Err(format!("I3: a device that may write {} reads: {wrong}", self.pages()));
            }
        }
        Ok(())
    }

    fn finish(self) {
        self.chunks.let_go(self.pages());
    }
}

/// Writing devices. One thread writes the device lanes of all VMs.
pub(crate) fn writer(fleet: &Fleet, mut random: Random) -> Result<(), String> {
    let mut writes: Vec<Write> = Vec::new();
    while fleet.goes_on() {
        let now = Instant::now();
        while let Some(at) = writes.iter().position(|write| write.is_over(now)) {
            writes.swap_remove(at).finish();
        }
        if writes.len() < MAX_WRITES && random.one_in(3) {
            writes.extend(Write::begin(fleet, &mut random));
        }
        for _ in 0..writes.len().min(4) {
            let at = random.below(writes.len() as u64) as usize;
            let write = &mut writes[at];
            let pages = write.pages();
            let page = pages.start() + random.below(pages.len());
            if random.one_in(4) {
                write.look(page)?;
            } else {
                write.put(page)?;
            }
            fleet.tally.dma();
        }
        std::thread::sleep(Duration::from_micros(random.below(1_500)));
    }
    writes.into_iter().for_each(Write::finish);
    Ok(())
}
