//! The bare guest's part: the guest writes words that the host can predict. Every child is
//! compared, byte for byte, with the prediction for the instant of its fork. Every VM is also
//! compared with the prediction for its later writes.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use clade_guests::abi::{Command, PAGE_SIZE, POLL_OPS, WORK_BASE};
use clade_memory::GAP_START;

use super::progress;
use crate::commands::{BARE, DemoArgs, DevSupervisor, Failure, KernelSource, RemoteVm};
use clade_harness::{BareMailbox, BareVcpu, Sample, Slice, stop_writing};
use clade_vmm::vm::VmConfig;

/// Pages that a vCPU keeps writing; it writes the rest of its share once. At native speed it writes
/// all of them between two forks.
const HOT_PAGES: u64 = 512;
/// The window of pages that its writes cover at any moment.
const WINDOW: u64 = 64;
/// Pages a child overwrites to get private pages.
const OWN_PAGES: u64 = 32;
/// The interval between forks.
const PACE: Duration = Duration::from_millis(10);
/// Time that a generation writes before it is forked.
const GENERATION: Duration = Duration::from_millis(20);
/// The seed of vCPU 0's words; the next ones follow.
const SEED: u64 = 0xc1ade;

pub(crate) struct BareReport {
    pub(crate) forks: usize,
    pub(crate) generations: usize,
    pub(crate) wrong_bytes: u64,
    pub(crate) bytes_checked: u64,
    pub(crate) pause: Sample,
    pub(crate) first_pause_us: f64,
    pub(crate) first_instruction: Sample,
    pub(crate) private_kib: f64,
    pub(crate) private_kib_after: f64,
    /// Page size of memory files.
    pub(crate) backing: String,
}

/// A child that is paused except while it executes a command: it inherits its parent's command, and
/// a hundred writing children would leave the parent no processor.
struct Child {
    vm: RemoteVm,
    /// Operations that each vCPU had completed when it stopped.
    progress: Vec<u64>,
}

pub(crate) fn run(vms: &DevSupervisor, args: &DemoArgs) -> Result<BareReport, Failure> {
    let config = VmConfig::bare(args.mem, args.cpus).map_err(Failure::input)?;
    config.check_host_memory().map_err(Failure::input)?;
    let share = args.mem.min(GAP_START).saturating_sub(WORK_BASE) / PAGE_SIZE / args.cpus;
    if share < 2 * WINDOW {
        return Err(Failure::Input(anyhow::anyhow!(
            "{} bytes of memory are too few for {} vCPUs to work on",
            args.mem,
            args.cpus
        )));
    }
    let mut demo = Demo {
        vms,
        args,
        slices: (0..args.cpus)
            .map(|n| Slice::filled(n, WORK_BASE + n * share * PAGE_SIZE, share, HOT_PAGES, WINDOW, SEED + n))
            .collect(),
        report: BareReport {
            forks: args.forks,
            generations: args.generations,
            wrong_bytes: 0,
            bytes_checked: 0,
            pause: Sample::default(),
            first_pause_us: 0.0,
            first_instruction: Sample::default(),
            private_kib: 0.0,
            private_kib_after: 0.0,
            backing: String::new(),
        },
    };
    demo.run(&config)?;
    Ok(demo.report)
}

struct Demo<'a> {
    vms: &'a DevSupervisor,
    args: &'a DemoArgs,
    slices: Vec<Slice>,
    report: BareReport,
}

impl Demo<'_> {
    fn run(&mut self, config: &VmConfig) -> Result<(), Failure> {
        let parent = self.boot(config)?;
        self.report.backing = parent.stats()?.memory.backing;
        let children = self.fork_while_it_runs(&parent)?;
        // The origin of the generations, at an instant after the last fork.
        self.vms.checkpoint(parent.name(), "generation")?;
        // Stop the parent now, but check it after its children: its operation count is the highest,
        // and predictions only advance.
        let ended = stop_writing(&parent, self.args.cpus).map_err(Failure::run)?;
        self.check_children(&children)?;
        self.nest()?;
        self.check(&parent, &ended, 0)?;
        self.check_work(&children)
    }

    fn boot(&self, config: &VmConfig) -> Result<RemoteVm, Failure> {
        let spin = progress::spinner(self.args, "booting, filling memory");
        let vm = self.vms.boot("demo", config, KernelSource { kernel: Path::new(BARE), initrd: None, cmdline: "" })?;
        (0..self.args.cpus).try_for_each(|vcpu| BareVcpu::new(&vm, vcpu).await_ready()).map_err(Failure::run)?;
        let vcpus = || self.slices.iter().map(|slice| (slice, BareVcpu::new(&vm, slice.vcpu())));
        let mut filling = Vec::new();
        for (slice, vcpu) in vcpus() {
            filling.push((vcpu, vcpu.mailbox().order(slice.fill_command()).map_err(Failure::run)?));
        }
        filling.iter().try_for_each(|(vcpu, seq)| vcpu.await_done(*seq)).map_err(Failure::run)?;
        for (slice, vcpu) in vcpus() {
            vcpu.mailbox().order(slice.write_command(0)).map_err(Failure::run)?;
        }
        spin.finish_and_clear();
        Ok(vm)
    }

    fn fork_while_it_runs(&mut self, parent: &RemoteVm) -> Result<Vec<Child>, Failure> {
        let of = format!("vms/{}", parent.name());
        let bar = progress::bar(self.args, "forking while it runs", self.args.forks);
        let mut children = Vec::with_capacity(self.args.forks);
        for n in 0..self.args.forks {
            thread::sleep(PACE);
            let begun = Instant::now();
            let (child, first, pause_us) = self.start_child(&of, &format!("child-{n}"))?;
            if n == 0 {
                // Reported separately: it happens once in a VM's life, and takes longer.
                self.report.first_pause_us = pause_us;
            }
            self.report.pause.push(pause_us);
            self.report.first_instruction.push_us(first - begun);
            children.push(child);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(children)
    }

    /// Forks `of` into a child whose vCPUs stop writing at once. Also returns the time at which its first
    /// instruction was known here, and the parent's pause in microseconds.
    ///
    /// The child's worker gives its vCPUs these orders before they run, and answers once the first of them
    /// has announced itself.
    fn start_child(&self, of: &str, name: &str) -> Result<(Child, Instant, f64), Failure> {
        let (vm, forked) = self.vms.fork_one_running(of, name)?;
        let first = Instant::now();
        let mut at_fork = Vec::new();
        for slice in &self.slices {
            let vcpu = BareVcpu::new(&vm, slice.vcpu());
            let (order, progress) = vcpu.mailbox().kept_progress().map_err(Failure::run)?;
            vcpu.await_done(order).map_err(Failure::run)?;
            at_fork.push(progress);
        }
        let progress = stop_writing(&vm, self.args.cpus).map_err(Failure::run)?;
        vm.pause()?;
        // A child stops at most one poll's operations after its fork.
        for (now, then) in progress.iter().zip(at_fork) {
            if *now < then || *now > then + POLL_OPS {
                return Err(Failure::Run(anyhow::anyhow!("{name} is at operation {now}, its parent was at {then}")));
            }
        }
        Ok((Child { vm, progress }, first, forked.pause_us))
    }

    /// Compares memory with the prediction for `progress`, without each slice's first `except`
    /// pages. Uses one thread per slice.
    fn check(&mut self, vm: &RemoteVm, progress: &[u64], except: u64) -> Result<(), Failure> {
        let wrong = thread::scope(|scope| {
            let compare = |(slice, progress): (&mut Slice, u64)| {
                slice.advance(progress);
                slice.wrong_bytes(vm, except).map_err(|error| anyhow::anyhow!(error))
            };
            let threads: Vec<_> = self
                .slices
                .iter_mut()
                .zip(progress.iter().copied())
                .map(|work| scope.spawn(move || compare(work)))
                .collect();
            let join = |t: thread::ScopedJoinHandle<'_, Result<u64, _>>| {
                t.join().map_err(|_| anyhow::anyhow!("a checker panicked"))
            };
            threads.into_iter().map(|t| join(t)?).sum::<Result<u64, anyhow::Error>>()
        });
        self.report.wrong_bytes += wrong.map_err(Failure::Run)?;
        self.report.bytes_checked += self.slices.iter().map(|s| (s.pages() - except) * PAGE_SIZE).sum::<u64>();
        Ok(())
    }

    fn check_children(&mut self, children: &[Child]) -> Result<(), Failure> {
        let bar = progress::bar(self.args, "checking every byte of every child", children.len());
        let mut private = 0;
        for (n, child) in (0..).zip(children) {
            private += child.vm.stats()?.memory.private_kib;
            self.check(&child.vm, &child.progress, 0)?;
            // From here on the child differs from all others.
            child.vm.resume()?;
            for slice in &self.slices {
                let own = Command::Fill { start: slice.start(), pages: OWN_PAGES, seed: own_seed(n, slice.vcpu()) };
                BareVcpu::new(&child.vm, slice.vcpu()).run(own).map_err(Failure::run)?;
            }
            child.vm.pause()?;
            bar.inc(1);
        }
        self.report.private_kib = private as f64 / children.len().max(1) as f64;
        bar.finish_and_clear();
        Ok(())
    }

    /// Children of children: each generation continues the writing, and is forked while it writes.
    fn nest(&mut self) -> Result<(), Failure> {
        let bar = progress::bar(self.args, "nesting generations", self.args.generations);
        let mut of = "generation".to_owned();
        for n in 0..self.args.generations {
            let (child, ..) = self.start_child(&format!("checkpoints/{of}"), &format!("generation-{n}"))?;
            for (slice, first) in self.slices.iter().zip(child.progress.iter().copied()) {
                BareMailbox::new(&child.vm, slice.vcpu()).order(slice.write_command(first)).map_err(Failure::run)?;
            }
            child.vm.resume()?;
            thread::sleep(GENERATION);
            let next = format!("generation-{n}");
            self.vms.checkpoint(child.vm.name(), &next)?;
            self.vms.remove(&std::mem::replace(&mut of, next))?;
            // The next generation is checked without this one: a child outlives its parent.
            child.vm.stop()?;
            let (next, ..) = self.start_child(&format!("checkpoints/{of}"), &format!("generation-{n}-check"))?;
            self.check_ahead(&next)?;
            next.vm.stop()?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        self.vms.remove(&of)
    }

    /// The generations diverge from the parent, so they are compared with their own prediction.
    fn check_ahead(&mut self, child: &Child) -> Result<(), Failure> {
        let parents = self.slices.clone();
        let checked = self.check(&child.vm, &child.progress, 0);
        self.slices = parents;
        checked
    }

    /// Has each child verify, in the guest, its own later writes. No other VM shares those.
    fn check_work(&mut self, children: &[Child]) -> Result<(), Failure> {
        let mut private = 0;
        for (n, child) in (0..).zip(children) {
            child.vm.resume()?;
            for slice in &self.slices {
                let own = Command::Verify { start: slice.start(), pages: OWN_PAGES, seed: own_seed(n, slice.vcpu()) };
                let [wrong_words, ..] = BareVcpu::new(&child.vm, slice.vcpu()).run(own).map_err(Failure::run)?;
                self.report.wrong_bytes += wrong_words * 8;
                self.report.bytes_checked += OWN_PAGES * PAGE_SIZE;
            }
            child.vm.pause()?;
            private += child.vm.stats()?.memory.private_kib;
        }
        self.report.private_kib_after = private as f64 / children.len().max(1) as f64;
        Ok(())
    }
}

fn own_seed(child: u64, vcpu: u64) -> u64 {
    (child + 1) << 16 | vcpu
}
