//! `clade-lab bench disk`: a guest's disk I/O against the host's own I/O on the same file.
//!
//! The guest runs the bare guest's driver with 32 requests in flight. The baseline is this process,
//! which submits the same operations to an io_uring. Both bypass the page cache and alternate in
//! rounds. The guest's path adds an exit and an eventfd for each notification, the device's worker,
//! the pins, and the guest's driver, which polls.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clade_block::DiskConfig;
use clade_devices::virtio::block::BlockOptions;
use clade_guests::abi::disk::{self, AREA_PAGES, DiskRun, Order, What};
use clade_guests::abi::{Command, PAGE_SIZE, WORK_BASE};
use clade_host_io::{CachePolicy, Engine, Fragment, IoFile, Request};

use clade_memory::{Access, GuestRam, PinLifetime, RamLayout, Store};

use crate::args::BenchArgs;
use crate::bench::{BenchRow, Sample};
use clade::Failure;
use clade_harness::{BareVcpu, boot_bare};
use clade_vmm::vm::{Context, DiskSpec, Vm, VmConfig};

/// Size of the disk's file in bytes.
const FILE: u64 = 256 << 20;
/// Requests in flight.
const DEPTH: u64 = 32;
/// Guest memory: 1 MiB for each request, and the guest itself.
const MEMORY: u64 = 128 << 20;
const BUFFER: u64 = WORK_BASE + AREA_PAGES * PAGE_SIZE;
/// Number of samples that one round replaces: a round takes about a second.
const SAMPLES_A_ROUND: usize = 5;

/// One row: an operation, its order, its block size in sectors and how often it runs.
struct DiskWorkload {
    name: &'static str,
    what: What,
    order: Order,
    block: u64,
    count: u64,
}

const KINDS: [DiskWorkload; 4] = [
    DiskWorkload { name: "rand_read_4k", what: What::Read, order: Order::Random, block: 8, count: 8192 },
    DiskWorkload { name: "rand_write_4k", what: What::WriteRaw, order: Order::Random, block: 8, count: 8192 },
    DiskWorkload { name: "seq_read_1m", what: What::Read, order: Order::Sequential, block: 2048, count: 128 },
    DiskWorkload { name: "seq_write_1m", what: What::WriteRaw, order: Order::Sequential, block: 2048, count: 128 },
];

/// The operation measured while the VM is forked 100 times a second.
const READ: DiskWorkload =
    DiskWorkload { name: "disk_under_forks", what: What::Read, order: Order::Random, block: 128, count: 16_384 };
const FORK_PACE: Duration = Duration::from_millis(10);

impl DiskWorkload {
    fn run(&self, seed: u64) -> DiskRun {
        DiskRun {
            area: WORK_BASE,
            buffer: BUFFER,
            stride: 0,
            what: self.what,
            order: self.order,
            depth: DEPTH,
            sector: 0,
            sectors: FILE / disk::SECTOR,
            block: self.block,
            count: self.count,
            seed,
        }
    }

    fn mib(&self) -> f64 {
        (self.count * self.block * disk::SECTOR) as f64 / f64::from(1 << 20)
    }
}

pub(crate) fn run(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let files = tempfile::tempdir().map_err(Failure::run)?;
    let path = files.path().join("disk");
    let mut bytes = vec![0; FILE as usize];
    disk::pattern(&mut bytes, 1, 0);
    std::fs::write(&path, bytes).map_err(Failure::run)?;
    let mut samples: Vec<(Sample, Sample)> = KINDS.iter().map(|_| Default::default()).collect();
    for round in 0..args.samples.div_ceil(SAMPLES_A_ROUND) as u64 {
        // One after the other: a VM locks the file of its disk.
        let mut host = Host::open(context.store(), &path)?;
        for (kind, (_, baseline)) in KINDS.iter().zip(&mut samples) {
            baseline.push(host.run(&kind.run(round), kind)?);
        }
        drop(host);
        let guest = Guest::boot(context, &path)?;
        for (kind, (ours, _)) in KINDS.iter().zip(&mut samples) {
            ours.push(guest.run(kind.run(round), kind)?);
        }
    }
    let row = |(kind, (ours, baseline)): (&DiskWorkload, &(Sample, Sample))| {
        BenchRow::new(kind.name, "MiB/s", ours)
            .against_limit("io_uring on the host", baseline)
            .target_ratio("at least 80 % of the host's", |ratio| ratio >= 0.8)
    };
    let mut rows: Vec<_> = KINDS.iter().zip(&samples).map(row).collect();
    rows.push(under_forks(context, &path, args.samples)?);
    Ok(rows)
}

/// Compares a guest that reads its disk while it is forked with the same guest without forks. The
/// children do not run: the figure is the cost of the forks to the guest and its device.
fn under_forks(context: &Context, path: &Path, samples: usize) -> Result<BenchRow, Failure> {
    let guest = Guest::boot(context, path)?;
    let (mut ours, mut baseline) = (Sample::default(), Sample::default());
    for round in 0..samples.div_ceil(SAMPLES_A_ROUND) as u64 {
        baseline.push(guest.run(READ.run(round), &READ)?);
        let (stop, guest) = (AtomicBool::new(false), &guest);
        let rate = std::thread::scope(|scope| -> Result<f64, Failure> {
            let forks = scope.spawn(|| {
                let begun = Instant::now();
                for fork in 1.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    guest.0.fork().map_err(Failure::run)?;
                    std::thread::sleep((begun + FORK_PACE * fork).saturating_duration_since(Instant::now()));
                }
                Ok::<_, Failure>(())
            });
            let rate = guest.run(READ.run(round), &READ);
            stop.store(true, Ordering::Relaxed);
            let panicked = || Failure::Run(anyhow::anyhow!("the thread that forks has panicked"));
            forks.join().map_err(|_| panicked())??;
            rate
        });
        ours.push(rate?);
    }
    Ok(BenchRow::new("disk_under_forks", "MiB/s", &ours)
        .against_limit("not forked", &baseline)
        .target_ratio("at least 95 % of it", |ratio| ratio >= 0.95))
}

/// The baseline: this process runs the same operations on the same file.
struct Host {
    engine: Engine<usize>,
    file: Arc<IoFile>,
    buffers: Vec<Fragment>,
}

impl Host {
    /// The buffers are like the guest's: a store's memory, in huge pages if there are any. (In 4
    /// KiB pages large transfers take three times as long, which would flatter the guest.)
    fn open(store: &Store, path: &Path) -> Result<Self, Failure> {
        let file = Arc::new(IoFile::open(path, true, CachePolicy::Direct).map_err(Failure::run)?);
        if file.policy() != CachePolicy::Direct {
            tracing::warn!("the file system lacks O_DIRECT: both sides measure the page cache");
        }
        let event = clade_host_io::eventfd().map_err(Failure::run)?;
        let engine = Engine::new(DEPTH as u32, event).map_err(Failure::run)?;
        let most = KINDS.iter().map(|kind| kind.block * disk::SECTOR).max().unwrap_or(0) as usize;
        let memory = GuestRam::reserve(&RamLayout::new(DEPTH * most as u64).map_err(Failure::run)?, store);
        let memory = memory.map_err(Failure::run)?;
        memory.populate().map_err(Failure::run)?;
        let whole = &memory.regions()[0];
        let pin = whole.pin(whole.range(), Access::Write, PinLifetime::LongTerm).map_err(Failure::run)?;
        pin.slice().copy_from(&vec![1u8; pin.len()]);
        let pin = Arc::new(pin);
        let buffer = |slot| Fragment::pinned(&pin, slot * most, most).map_err(Failure::run);
        let buffers = (0..DEPTH as usize).map(buffer).collect::<Result<_, _>>()?;
        Ok(Self { engine, file, buffers })
    }

    fn request(&self, run: &DiskRun, i: u64, slot: usize) -> Request {
        let (file, offset) = (Arc::clone(&self.file), run.sector_of(i) * disk::SECTOR);
        let buffers = vec![self.buffers[slot].part(0, run.block_bytes() as usize)];
        match run.what {
            What::WriteRaw => Request::Write { file, offset, buffers },
            _ => Request::Read { file, offset, buffers },
        }
    }

    /// Returns the throughput in MiB/s.
    fn run(&mut self, run: &DiskRun, kind: &DiskWorkload) -> Result<f64, Failure> {
        let begun = Instant::now();
        let mut next = 0;
        for slot in 0..DEPTH as usize {
            self.engine.submit(self.request(run, next, slot), slot);
            next += 1;
        }
        let mut left = run.count;
        while left > 0 {
            self.engine.flush().map_err(Failure::run)?;
            self.engine.wait(Duration::from_secs(10)).map_err(Failure::run)?;
            let mut done = Vec::new();
            self.engine.reap(|completion| done.push(completion)).map_err(Failure::run)?;
            for completion in done {
                completion.result.map_err(Failure::run)?;
                left -= 1;
                if next < run.count {
                    self.engine.submit(self.request(run, next, completion.token), completion.token);
                    next += 1;
                }
            }
        }
        Ok(kind.mib() / begun.elapsed().as_secs_f64())
    }
}

/// A bare guest with the file as its disk.
struct Guest(Vm);

impl Guest {
    fn boot(context: &Context, path: &Path) -> Result<Self, Failure> {
        let mut config = VmConfig::bare(MEMORY, 1).map_err(Failure::run)?;
        let disk = DiskConfig { cache: CachePolicy::Direct, ..DiskConfig::new(path) };
        config.disks = vec![DiskSpec { disk, device: BlockOptions::default() }];
        let vm = boot_bare(context, "bench", &Arc::new(config)).map_err(Failure::run)?;
        let [sectors, ..] = BareVcpu::new(&vm, 0)
            .run(Command::DiskOpen { slot: 0, area: WORK_BASE, size: 256 })
            .map_err(Failure::run)?;
        if sectors != FILE / disk::SECTOR {
            return Err(Failure::Run(anyhow::anyhow!("the guest sees a disk of {sectors} sectors")));
        }
        Ok(Self(vm))
    }

    /// Returns the throughput in MiB/s.
    fn run(&self, run: DiskRun, kind: &DiskWorkload) -> Result<f64, Failure> {
        let begun = Instant::now();
        let [done, errors, ..] = BareVcpu::new(&self.0, 0).run(Command::DiskRun(run)).map_err(Failure::run)?;
        let time = begun.elapsed();
        if (done, errors) != (run.count, 0) {
            return Err(Failure::Run(anyhow::anyhow!("{}: {done} operations, {errors} of them failed", kind.name)));
        }
        Ok(kind.mib() / time.as_secs_f64())
    }
}
