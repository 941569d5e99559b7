//! `clade-lab bench suspend`: VMs that give their memory back, and the first answer after a wake.
//!
//! The guest is bare, and has written all its RAM (`--mem`, 64M unless given). Its file is in
//! `/var/tmp`, and in the page cache at the wake. The first part is by the library, in this
//! process. The second is by the API: ten VMs in processes of their own, nine of them suspended,
//! and the host's available memory before and after.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clade_api::{SuspendAnswer, SuspendRequest, VmInfo, WakeAnswer};
use clade_guests::abi::{Command, Event, WORK_BASE};
use clade_harness::{BareMailbox, BareVcpu};
use clade_memory::SuspendFile;
use clade_vmm::vm::{Context, Vm, VmConfig};
use hyper::Method;

use crate::args::BenchArgs;
use crate::bench::supervisor::{BenchSupervisor, boot_request, settled_kib};
use crate::bench::{BenchRow, Sample, low_pages, written};
use crate::limit::Limits;
use clade::{Failure, MEASURE};

/// Directory of the files.
const DIR: &str = "/var/tmp";
/// VMs at once.
const VMS: usize = 10;
/// Pages that a guest writes for the larger answer.
const PAGES: u64 = 1_000;
/// Measurements of the memory of ten VMs.
const RUNS: usize = 3;
/// Bytes read at once.
const BUFFER: usize = 1 << 20;

const AWAKE: &str = "the same of a VM that is awake";
const READ_ALL: &str = "reading all of it from the page cache";

/// Runs `clade-lab bench suspend`.
pub(crate) fn run(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let config = Arc::new(VmConfig::bare(args.mem[0], 1).map_err(Failure::input)?);
    config.check_host_memory().map_err(Failure::input)?;
    let mut rows = library(context, &config, args.samples)?;
    rows.extend(processes(&config)?);
    Ok(rows)
}

/// Measures one VM in this process.
fn library(context: &Context, config: &Arc<VmConfig>, samples: usize) -> Result<Vec<BenchRow>, Failure> {
    let vm = written(context, config)?;
    let (mut write, mut again, mut private) = (Sample::default(), Sample::default(), Sample::default());
    let (mut answer, mut whole) = (Sample::default(), Sample::default());
    let (mut pages, mut awake, mut limit) = <(Sample, Sample, Sample)>::default();
    let limits = tempfile::tempfile_in(DIR).map_err(Failure::run)?;
    let limits = Limits::of(config.layout().bytes(), limits).map_err(Failure::Run)?;
    let file = || SuspendFile::create(Path::new(DIR)).map_err(Failure::run);
    let vcpu = BareVcpu::new(&vm, 0);
    let fill = Command::Fill { start: WORK_BASE, pages: PAGES.min(low_pages(config.layout().bytes())), seed: 2 };
    for sample in 0..samples {
        let begun = Instant::now();
        vm.suspend(file()?).map_err(Failure::run)?;
        // Only the first suspension writes all of it.
        let time = if sample == 0 { &mut write } else { &mut again };
        time.push_us(begun.elapsed());
        private.push(own_kib(&vm)?);
        // Without a ring, which would wake the VM.
        BareMailbox::new(vm.ram(), 0).order(Command::Announce).map_err(Failure::run)?;
        let begun = Instant::now();
        vm.wake().map_err(Failure::run)?;
        vm.ring_doorbell(0).map_err(Failure::run)?;
        answer.push_us(vcpu.await_event(Event::Announce).map_err(Failure::run)? - begun);
        vcpu.run(fill).map_err(Failure::run)?;
        let begun = Instant::now();
        vcpu.run(fill).map_err(Failure::run)?;
        awake.push_us(begun.elapsed());
        vm.suspend(file()?).map_err(Failure::run)?;
        let begun = Instant::now();
        vm.wake().map_err(Failure::run)?;
        vcpu.run(fill).map_err(Failure::run)?;
        pages.push_us(begun.elapsed());
        let mapped = limits.prepare().and_then(|mut vm| limits.first_instruction(&mut vm));
        limit.push_us(mapped.map_err(Failure::Run)?);
        whole.push_us(read_all(config.layout().bytes())?);
    }
    Ok(vec![
        BenchRow::new("suspend_private_kib", "KiB", &private).target("<= 64", |row| row.p99() <= 64.0),
        BenchRow::new("suspend_first", "us", &write),
        BenchRow::new(format!("suspend_{PAGES}_pages"), "us", &again),
        BenchRow::new("wake_first_answer", "us", &answer)
            .limit("map a file, run", &limit)
            .against(READ_ALL, &whole)
            .target("p99 <= 5000", |row| row.p99() <= 5_000.0),
        BenchRow::new(format!("wake_answer_of_{PAGES}_pages"), "us", &pages).against_limit(AWAKE, &awake),
    ])
}

/// Returns a VM's own memory, by the kernel's accounts, in KiB: private anonymous pages, and pages
/// of its memory file.
fn own_kib(vm: &Vm) -> Result<f64, Failure> {
    let starts = vm.ram().regions().iter().map(|region| (region.host_address(), region.pages() * 4096));
    let mut kib = 0;
    for (start, bytes) in starts {
        kib += smaps_own_kib("self", start, bytes).map_err(Failure::run)?;
    }
    Ok(kib as f64)
}

/// Returns the private part of the mappings in a range of a process's addresses, in KiB: anonymous
/// pages, and dirty ones.
fn smaps_own_kib(process: &str, start: u64, bytes: u64) -> std::io::Result<u64> {
    let mut text = String::new();
    File::open(format!("/proc/{process}/smaps"))?.read_to_string(&mut text)?;
    let (mut is_in, mut kib) = (false, 0);
    for line in text.lines() {
        let first = line.split([' ', ':']).next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        {
            is_in = from < start + bytes && start < to;
        } else if is_in && (first == "Private_Dirty" || first == "Swap") {
            kib += line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(kib)
}

/// Reads a file of this size that is in the page cache.
fn read_all(bytes: u64) -> Result<Duration, Failure> {
    let (file, mut buffer) = (tempfile::tempfile_in(DIR).map_err(Failure::run)?, vec![1; BUFFER]);
    let offsets = || (0..bytes).step_by(BUFFER);
    for offset in offsets() {
        file.write_all_at(&buffer, offset).map_err(Failure::run)?;
    }
    let begun = Instant::now();
    for offset in offsets() {
        file.read_exact_at(&mut buffer, offset).map_err(Failure::run)?;
    }
    Ok(begun.elapsed())
}

/// Measures ten VMs in processes of their own, and the host's memory.
fn processes(config: &Arc<VmConfig>) -> Result<Vec<BenchRow>, Failure> {
    // Workers pause their VMs once all memory is written.
    let supervisor = BenchSupervisor::start(&["--pool", "0"], &[(MEASURE, "1")])?;
    let (mut all, mut one, mut wake) = (Sample::default(), Sample::default(), Sample::default());
    for _ in 0..RUNS {
        let before = settled_kib();
        let names: Vec<String> = (0..VMS).map(|number| format!("vm-{number}")).collect();
        for name in &names {
            let boot = boot_request(name, config);
            let _: VmInfo = supervisor.ask(Method::POST, "/v1/vms", Some(&boot))?;
        }
        all.push(before.saturating_sub(settled_kib()) as f64 / 1024.0);
        for name in &names[1..] {
            let path = format!("/v1/vms/{name}/suspend");
            let request = SuspendRequest { dir: Some(DIR.into()) };
            let _: SuspendAnswer = supervisor.ask(Method::POST, &path, Some(&request))?;
        }
        one.push(before.saturating_sub(settled_kib()) as f64 / 1024.0);
        for name in &names[1..] {
            let begun = Instant::now();
            let path = format!("/v1/vms/{name}/wake");
            let _: WakeAnswer = supervisor.ask(Method::POST, &path, None::<&()>)?;
            wake.push_us(begun.elapsed());
        }
        supervisor.stop(&names, 0)?;
    }
    Ok(vec![
        BenchRow::new("wake_api", "us", &wake),
        BenchRow::new("ten_vms_nine_suspended", "MiB", &one)
            .against("all ten in memory", &all)
            .target_ratio("ratio <= 0.2", |ratio| ratio <= 0.2),
    ])
}
