//! `clade-lab bench restore` and `clade-lab bench save`: snapshots on disk.
//!
//! The guest's RAM is all written, so no page is left out as zeros. A restore is measured from
//! opening the directory to the first instruction, and to the answer to a first command, which
//! reads a word of 256 pages. The baseline reads all of the memory first, in the same run and
//! alternating.
//!
//! Two more figures are a user's view: a request to a supervisor, and a process that starts,
//! restores the VM and ends.
//!
//! The baseline of a save is this process writing as many bytes past the page cache, as `dd
//! oflag=direct conv=fsync` does, which is its limit too. The limit of a restore is a VM made of a mapping
//! of a file on the same disk, in the page cache. The VM's pause is compared with that of a fork.
//!
//! The unfavourable case is a snapshot that is not in the page cache: every touched page is then
//! read separately.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_api::{ForkAnswer, ForkRequest, RestoreRequest, SavedSource};
use clade_guests::abi::{Command as GuestCommand, PAGE_SIZE, WORK_BASE};
use clade_snapshot::Compression;
use hyper::Method;
use rustix::fs::{Advice, fadvise};

use crate::args::BenchArgs;
use crate::bench::supervisor::BenchSupervisor;
use crate::bench::{BenchRow, Sample, announced, announced_clone, label, written};
use crate::limit::{self, Limits, Touch};
use clade::{Failure, MEASURE};
use clade_harness::BareVcpu;
use clade_vmm::vm::{
    ChildOptions, Context, ForkImage, RestoreLoad, RestoreOptions, SnapshotOptions, SnapshotReport, Vm, VmConfig,
};

/// Pages that the first command reads.
const ANSWER_PAGES: u64 = 256;
/// Pages written between two incremental snapshots.
const CHANGED: u64 = 1_000;
/// Bytes per write.
const BLOCK: usize = 1 << 20;
const ALIGN: usize = 4096;
const READ_ALL: &str = "read all of it first";
const MAKE: &str = "make a VM of a mapped file, run";
const FULL: SnapshotOptions =
    SnapshotOptions { incremental: false, compression: Compression::None, replace: true, is_fixed: false };

/// A guest that has written all its RAM, and a directory on the disk.
struct Bench {
    vm: Vm,
    dir: tempfile::TempDir,
    config: Arc<VmConfig>,
    samples: usize,
    label: String,
}

impl Bench {
    fn new(context: &Context, mem: u64, args: &BenchArgs) -> Result<Self, Failure> {
        let config = Arc::new(VmConfig::bare(mem, 1).map_err(Failure::input)?);
        config.check_host_memory().map_err(Failure::input)?;
        if mem < 2 * WORK_BASE {
            return Err(Failure::Input(anyhow::anyhow!("{mem} bytes are too few for this benchmark: at least 32M")));
        }
        let vm = written(context, &config)?;
        // Not the temporary directory, which may be tmpfs.
        let dir = tempfile::tempdir_in("/var/tmp").or_else(|_| tempfile::tempdir()).map_err(Failure::run)?;
        // The label has the size only if there are several.
        let label = if args.mem.len() == 1 { String::new() } else { format!("_{}", label(mem)) };
        // A sample takes about a second of disk time.
        Ok(Self { vm, dir, config, samples: args.samples.clamp(1, 20), label })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn save(&self, name: &str, incremental: bool) -> Result<SnapshotReport, Failure> {
        let options = SnapshotOptions { incremental, ..FULL };
        self.vm.snapshot(&self.at(name), options).map_err(Failure::run)
    }
}

/// Runs `clade-lab bench restore`.
pub(crate) fn restore(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let mut rows = Vec::new();
    for &mem in &args.mem {
        let bench = Bench::new(context, mem, args)?;
        bench.save("vm", false)?;
        bench.vm.stop();
        rows.extend(bench.restore_rows(context)?);
    }
    Ok(rows)
}

#[derive(Default)]
struct Restored {
    first: Sample,
    answer: Sample,
    private: Sample,
}

/// The limits of a restore.
#[derive(Default)]
struct Limit {
    first: Sample,
    answer: Sample,
    prepared: Sample,
}

impl Limit {
    fn add(&mut self, limits: &Limits) -> anyhow::Result<()> {
        self.first.push_us(limits.cold(Touch::Write, 1)?);
        self.answer.push_us(limits.cold(Touch::Read, ANSWER_PAGES)?);
        self.prepared.push_us(limits.first_instruction(&mut limits.prepare()?)?);
        Ok(())
    }
}

impl Bench {
    fn restore_rows(&self, context: &Context) -> Result<Vec<BenchRow>, Failure> {
        let at = self.at("vm");
        let (mut lazy, mut preload, mut cold, mut clone) =
            (Restored::default(), Restored::default(), Restored::default(), Sample::default());
        let mut limit = Limit::default();
        let file = tempfile::tempfile_in(self.dir.path()).map_err(Failure::run)?;
        let limits = Limits::of(self.config.layout().bytes(), file).map_err(Failure::Run)?;
        for _ in 0..self.samples {
            limit.add(&limits).map_err(Failure::Run)?;
            self.one(context, RestoreLoad::Lazy, &mut lazy)?;
            self.one(context, RestoreLoad::Preload, &mut preload)?;
            forget(&at)?;
            self.one(context, RestoreLoad::Lazy, &mut cold)?;
            // With the snapshot open, the next VM starts from it.
            let image = ForkImage::restore(context, &at, &RestoreOptions::default()).map_err(Failure::run)?;
            context.prefill(&self.config, 1).map_err(Failure::run)?;
            clone.push_us(announced(context, &image, Instant::now())?);
        }
        context.drain();
        let (by_api, of_process, of_process_whole) =
            (self.by_api(&at)?, self.process(&at, false)?, self.process(&at, true)?);
        let (mut process_cold, mut process_prepared) = (Sample::default(), Sample::default());
        for times in limit::measure_processes(1, self.samples, self.config.layout().bytes(), 1)? {
            process_cold.push_us(times.cold);
            process_prepared.push_us(times.prepared);
        }
        let read = READ_ALL;
        let l = &self.label;
        Ok(vec![
            BenchRow::new(format!("restore_first_instruction{l}"), "us", &lazy.first)
                .limit(MAKE, &limit.first)
                .against(read, &preload.first),
            BenchRow::new(format!("restore_first_answer{l}"), "us", &lazy.answer)
                .limit(MAKE, &limit.answer)
                .against(read, &preload.answer),
            BenchRow::new(format!("restore_private_after_answer{l}"), "KiB", &lazy.private)
                .against(read, &preload.private),
            BenchRow::new(format!("restore_first_answer_cold{l}"), "us", &cold.answer)
                .against("in the page cache", &lazy.answer),
            BenchRow::new(format!("restore_next_first_instruction{l}"), "us", &clone)
                .limit("map, run", &limit.prepared)
                .against("from opening", &lazy.first),
            BenchRow::new(format!("restore_api_first_byte{l}"), "us", &by_api)
                .limit("a prepared process: map, run", &process_prepared)
                .against("the library, in one process", &lazy.first)
                .target("p50 <= 2000", |row| row.p50() <= 2_000.0),
            BenchRow::new(format!("restore_process_first_byte{l}"), "us", &of_process)
                .limit("a process by fork: make a VM, run", &process_cold)
                .against(read, &of_process_whole)
                .target("p50 <= 4000", |row| row.p50() <= 4_000.0),
        ])
    }

    /// Samples the time from the directory to the first instruction and, with another VM, to the
    /// first answer.
    fn one(&self, context: &Context, load: RestoreLoad, into: &mut Restored) -> Result<(), Failure> {
        let options = RestoreOptions { load, ..RestoreOptions::default() };
        let open = || ForkImage::restore(context, &self.at("vm"), &options).map_err(Failure::run);
        let begun = Instant::now();
        into.first.push_us(announced(context, &open()?, begun)?);
        let begun = Instant::now();
        let vm = Vm::from_image(context, "restored", &open()?, ChildOptions::default()).map_err(Failure::run)?;
        let vcpu = BareVcpu::new(&vm, 0);
        let read = GuestCommand::Read { start: WORK_BASE, pages: ANSWER_PAGES, passes: 1, words: 1 };
        let [sum, ..] = vcpu.run(read).map_err(Failure::run)?;
        into.answer.push_us(begun.elapsed());
        if sum == 0 {
            return Err(Failure::Run(anyhow::anyhow!("the restored guest reads zeros")));
        }
        into.private.push(vm.memory_stats().map_err(Failure::run)?.private_kib as f64);
        Ok(())
    }
}

/// Measurements with a running supervisor, and from nothing.
impl Bench {
    /// Measures from a request to a supervisor until the guest's first report, in a process of its
    /// own.
    fn by_api(&self, at: &Path) -> Result<Sample, Failure> {
        let supervisor = BenchSupervisor::start(&["--pool", "1"], &[(MEASURE, "1")])?;
        let saved = SavedSource { dir: at.to_owned(), load: RestoreLoad::Lazy, overlays: None, parents: Vec::new() };
        let request = RestoreRequest { saved, vms: ForkRequest { count: 1, ..ForkRequest::default() }, session: None };
        let mut sample = Sample::default();
        for round in 0..=self.samples {
            if round > 0 {
                supervisor.await_prepared(1)?;
            }
            let begun = Instant::now();
            let answer: ForkAnswer = supervisor.ask(Method::POST, "/v1/restore", Some(&request))?;
            // No worker is prepared for the first.
            if round > 0 {
                sample.push_us(begun.elapsed());
            }
            supervisor.stop(&answer.children, 0)?;
        }
        Ok(sample)
    }

    /// Measures a process from its start until its guest's first report.
    fn process(&self, at: &Path, preload: bool) -> Result<Sample, Failure> {
        let mut sample = Sample::default();
        for _ in 0..self.samples {
            let begun = Instant::now();
            let mut process = Command::new("/proc/self/exe");
            process.args(["bench", "restored", "--snapshot"]).arg(at).stdin(Stdio::null()).stdout(Stdio::piped());
            process.args(preload.then_some("--preload"));
            let mut process = process.spawn().map_err(Failure::run)?;
            let said = process.stdout.take().map(|mut out| out.read_exact(&mut [0]));
            sample.push_us(begun.elapsed());
            let ended = process.wait().map_err(Failure::run)?;
            if !ended.success() || !matches!(said, Some(Ok(()))) {
                return Err(Failure::Run(anyhow::anyhow!("a process that restores a snapshot has ended with {ended}")));
            }
        }
        Ok(sample)
    }
}

/// Runs `clade-lab bench restored`: the process that `Bench::process` starts. Prints a line when its
/// guest runs.
pub(crate) fn restored(context: &Context, args: &BenchArgs) -> Result<(), Failure> {
    let at = args.snapshot.as_deref().ok_or_else(|| Failure::Input(anyhow::anyhow!("--snapshot is missing")))?;
    let load = if args.preload { RestoreLoad::Preload } else { RestoreLoad::Lazy };
    let options = RestoreOptions { load, ..RestoreOptions::default() };
    let image = ForkImage::restore(context, at, &options).map_err(Failure::run)?;
    let (_vm, _) = announced_clone(context, &image)?;
    std::io::stdout().write_all(b"!").and_then(|()| std::io::stdout().flush()).map_err(Failure::run)
}

/// Drops a snapshot's files from the page cache.
fn forget(dir: &Path) -> Result<(), Failure> {
    for entry in std::fs::read_dir(dir).map_err(Failure::run)? {
        let file = File::open(entry.map_err(Failure::run)?.path()).map_err(Failure::run)?;
        fadvise(&file, 0, None, Advice::DontNeed).map_err(Failure::run)?;
    }
    Ok(())
}

/// Runs `clade-lab bench save`.
pub(crate) fn save(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let mut rows = Vec::new();
    for &mem in &args.mem {
        rows.extend(Bench::new(context, mem, args)?.save_rows()?);
    }
    Ok(rows)
}

impl Bench {
    fn save_rows(&self) -> Result<Vec<BenchRow>, Failure> {
        let (mut full, mut plain, mut rate, mut plain_rate) =
            (Sample::default(), Sample::default(), Sample::default(), Sample::default());
        let (mut more, mut save_pause, mut fork_pause) = (Sample::default(), Sample::default(), Sample::default());
        let vcpu = BareVcpu::new(&self.vm, 0);
        for round in 0..self.samples as u64 {
            let report = self.save("full", false)?;
            let mib = report.saved.data_pages as f64 / 256.0;
            full.push_us(report.took);
            rate.push(mib / report.took.as_secs_f64());
            let took = write_direct(&self.at("plain"), report.saved.data_pages * PAGE_SIZE)?;
            plain.push_us(took);
            plain_rate.push(mib / took.as_secs_f64());

            let fill = GuestCommand::Fill { start: WORK_BASE, pages: CHANGED, seed: 2 + round };
            vcpu.run(fill).map_err(Failure::run)?;
            // Prefill for both, so that their order makes no difference.
            self.vm.context().prefill(&self.config, 1).map_err(Failure::run)?;
            fork_pause.push_us(self.vm.fork().map_err(Failure::run)?.1.times.pause);
            vcpu.run(GuestCommand::Fill { start: WORK_BASE, pages: CHANGED, seed: 3 + round }).map_err(Failure::run)?;
            self.vm.context().prefill(&self.config, 1).map_err(Failure::run)?;
            let report = self.save("more", true)?;
            more.push_us(report.took);
            save_pause.push_us(report.times.pause);
        }
        let l = &self.label;
        let direct = "write past the page cache";
        Ok(vec![
            // Higher is better here.
            BenchRow::new(format!("save_full{l}"), "MiB/s", &rate).against_limit(direct, &plain_rate),
            BenchRow::new(format!("save_full_time{l}"), "us", &full).against_limit(direct, &plain),
            BenchRow::new(format!("save_incremental{l}"), "us", &more).against("save_full", &full),
            BenchRow::new(format!("save_pause{l}"), "us", &save_pause)
                .against("a fork's", &fork_pause)
                .target_ratio("ratio <= 1.25", |ratio| ratio <= 1.25),
        ])
    }
}

/// Writes `bytes` bytes as dd would, and makes them durable. Returns the time taken.
fn write_direct(path: &Path, bytes: u64) -> Result<Duration, Failure> {
    let mut room = vec![0xa5; BLOCK + ALIGN];
    let skip = room.as_ptr().align_offset(ALIGN);
    let block = &mut room[skip..skip + BLOCK];
    let begun = Instant::now();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    // Without O_DIRECT the data goes through the page cache, and the sync writes it out.
    let direct = options.clone().custom_flags(libc::O_DIRECT).open(path);
    let mut file = direct.or_else(|_| options.open(path)).map_err(Failure::run)?;
    let mut left = bytes;
    while left > 0 {
        let part = left.min(BLOCK as u64) as usize;
        file.write_all(&block[..part]).map_err(Failure::run)?;
        left -= part as u64;
    }
    file.sync_all().map_err(Failure::run)?;
    Ok(begun.elapsed())
}
