//! The bare guest's part: it writes words that the host can predict. Every child is compared, byte
//! for byte, with the prediction for the instant of its fork. Every VM is also compared with the
//! prediction for what it did later.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use clade_guests::abi::{Command, Event, PAGE_SIZE, POLL_OPS, WORK_BASE};
use clade_memory::{GAP_START, GuestRam};

use crate::bench::Sample;
use crate::commands::{DemoArgs, Failure};
use crate::demo::progress;
use clade_harness::{BareError, BareMailbox, BareVcpu, Slice, boot_bare, stop_writing};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, Vm, VmConfig};

/// Pages that a vCPU keeps writing; it writes the rest of its share once. At native speed it writes
/// all of them between two forks.
const HOT_PAGES: u64 = 512;
/// The window of pages that its writes cover at any moment.
const WINDOW: u64 = 64;
/// Pages a child overwrites to get private pages.
const OWN_PAGES: u64 = 32;
/// The interval between forks.
const PACE: Duration = Duration::from_millis(10);
/// How long a generation writes before it is forked.
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
}

/// A child that is paused except while it executes a command. The guest polls for commands, and a
/// hundred polling children would leave the parent no processor.
struct Child {
    vm: Vm,
    /// Operations that each vCPU had completed when it stopped.
    progress: Vec<u64>,
}

pub(crate) fn run(context: &Context, args: &DemoArgs) -> Result<BareReport, Failure> {
    let config = Arc::new(VmConfig::bare(args.mem, args.cpus).map_err(Failure::input)?);
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
        context,
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
        },
    };
    demo.run(&config)?;
    Ok(demo.report)
}

struct Demo<'a> {
    context: &'a Context,
    args: &'a DemoArgs,
    slices: Vec<Slice>,
    report: BareReport,
}

impl Demo<'_> {
    fn run(&mut self, config: &Arc<VmConfig>) -> Result<(), Failure> {
        let parent = self.boot(config)?;
        let (children, last) = self.fork_while_it_runs(&parent, config)?;
        // Stop the parent now, but check it after its children: its operation count is the highest,
        // and predictions only advance.
        let ended = stop_writing(&parent, self.args.cpus).map_err(Failure::run)?;
        self.check_children(&children)?;
        if let Some(image) = last {
            self.nest(&image)?;
        }
        self.check(parent.ram(), &ended, 0)?;
        self.check_work(&children)?;
        self.context.drain();
        Ok(())
    }

    fn boot(&self, config: &Arc<VmConfig>) -> Result<Vm, Failure> {
        let spin = progress::spinner(self.args, "booting, filling memory");
        let vm = boot_bare(self.context, "demo", config).map_err(Failure::run)?;
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

    fn fork_while_it_runs(
        &mut self,
        parent: &Vm,
        config: &Arc<VmConfig>,
    ) -> Result<(Vec<Child>, Option<Arc<ForkImage>>), Failure> {
        let bar = progress::bar(self.args, "forking while it runs", self.args.forks);
        let mut children = Vec::with_capacity(self.args.forks);
        let mut last = None;
        for n in 0..self.args.forks {
            self.context.prefill(config, 1).map_err(Failure::run)?;
            thread::sleep(PACE);
            let begun = Instant::now();
            let (image, times) = parent.fork().map_err(Failure::run)?;
            let (child, first) = self.start_child(&format!("child-{n}"), &image)?;
            let pause_us = times.times.pause.as_secs_f64() * 1e6;
            if n == 0 {
                // Reported separately: it happens once in a VM's life, and takes longer.
                self.report.first_pause_us = pause_us;
            }
            self.report.pause.push(pause_us);
            self.report.first_instruction.push_us(first - begun);
            children.push(child);
            last = Some(image);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok((children, last))
    }

    /// Starts a child whose vCPUs stop writing at once. Also returns the time of its first
    /// instruction.
    fn start_child(&self, name: &str, image: &Arc<ForkImage>) -> Result<(Child, Instant), Failure> {
        let at_fork = std::cell::RefCell::new(Ok(Vec::new()));
        let prepare = |ram: &GuestRam| {
            let prepared: Result<Vec<u64>, BareError> = self
                .slices
                .iter()
                .map(|slice| {
                    let mailbox = BareMailbox::new(ram, slice.vcpu());
                    let progress = mailbox.progress()?;
                    mailbox.order(if slice.vcpu() == 0 { Command::Announce } else { Command::Idle })?;
                    Ok(progress)
                })
                .collect();
            *at_fork.borrow_mut() = prepared;
        };
        let options = ChildOptions { paused: false, before_start: Some(&prepare) };
        let vm = Vm::from_image(self.context, name, image, options).map_err(Failure::run)?;
        let first = BareVcpu::new(&vm, 0).await_event(Event::Announce).map_err(Failure::run)?;
        let progress = stop_writing(&vm, self.args.cpus).map_err(Failure::run)?;
        vm.pause().map_err(Failure::run)?;
        // A child stops at most one poll's operations after its fork.
        for (now, then) in progress.iter().zip(at_fork.into_inner().map_err(Failure::run)?) {
            if *now < then || *now > then + POLL_OPS {
                return Err(Failure::Run(anyhow::anyhow!("{name} is at operation {now}, its parent was at {then}")));
            }
        }
        Ok((Child { vm, progress }, first))
    }

    /// Compares memory with the prediction for `progress`, without each slice's first `except`
    /// pages. Uses one thread per slice.
    fn check(&mut self, ram: &GuestRam, progress: &[u64], except: u64) -> Result<(), Failure> {
        let wrong = thread::scope(|scope| {
            let compare = |(slice, progress): (&mut Slice, u64)| {
                slice.advance(progress);
                slice.wrong_bytes(ram, except)
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
            threads.into_iter().map(|t| Ok(join(t)??)).sum::<Result<u64, anyhow::Error>>()
        });
        self.report.wrong_bytes += wrong.map_err(Failure::Run)?;
        self.report.bytes_checked += self.slices.iter().map(|s| (s.pages() - except) * PAGE_SIZE).sum::<u64>();
        Ok(())
    }

    fn check_children(&mut self, children: &[Child]) -> Result<(), Failure> {
        let bar = progress::bar(self.args, "checking every byte of every child", children.len());
        let mut private = 0;
        for (n, child) in (0..).zip(children) {
            private += child.vm.memory_stats().map_err(Failure::run)?.private_kib;
            self.check(child.vm.ram(), &child.progress, 0)?;
            // From here on the child differs from all others.
            child.vm.resume().map_err(Failure::run)?;
            for slice in &self.slices {
                let own = Command::Fill { start: slice.start(), pages: OWN_PAGES, seed: own_seed(n, slice.vcpu()) };
                BareVcpu::new(&child.vm, slice.vcpu()).run(own).map_err(Failure::run)?;
            }
            child.vm.pause().map_err(Failure::run)?;
            bar.inc(1);
        }
        self.report.private_kib = private as f64 / children.len().max(1) as f64;
        bar.finish_and_clear();
        Ok(())
    }

    /// Children of children: each generation continues the writing, and is forked while it writes.
    fn nest(&mut self, image: &Arc<ForkImage>) -> Result<(), Failure> {
        let bar = progress::bar(self.args, "nesting generations", self.args.generations);
        let mut image = Arc::clone(image);
        for n in 0..self.args.generations {
            let (child, _) = self.start_child(&format!("generation-{n}"), &image)?;
            for (slice, first) in self.slices.iter().zip(child.progress.iter().copied()) {
                BareMailbox::new(child.vm.ram(), slice.vcpu())
                    .order(slice.write_command(first))
                    .map_err(Failure::run)?;
            }
            child.vm.resume().map_err(Failure::run)?;
            thread::sleep(GENERATION);
            image = child.vm.fork().map_err(Failure::run)?.0;
            // The next generation is checked without this one: a child outlives its parent.
            drop(child);
            let (next, _) = self.start_child(&format!("generation-{n}-check"), &image)?;
            self.check_ahead(&next)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// The generations diverge from the parent, so they are compared with their own prediction.
    fn check_ahead(&mut self, child: &Child) -> Result<(), Failure> {
        let parents = self.slices.clone();
        let checked = self.check(child.vm.ram(), &child.progress, 0);
        self.slices = parents;
        checked
    }

    /// Each child verifies, in the guest, what it has written since. No other VM shares that.
    fn check_work(&mut self, children: &[Child]) -> Result<(), Failure> {
        let mut private = 0;
        for (n, child) in (0..).zip(children) {
            child.vm.resume().map_err(Failure::run)?;
            for slice in &self.slices {
                let own = Command::Verify { start: slice.start(), pages: OWN_PAGES, seed: own_seed(n, slice.vcpu()) };
                let [wrong_words, ..] = BareVcpu::new(&child.vm, slice.vcpu()).run(own).map_err(Failure::run)?;
                self.report.wrong_bytes += wrong_words * 8;
                self.report.bytes_checked += OWN_PAGES * PAGE_SIZE;
            }
            child.vm.pause().map_err(Failure::run)?;
            private += child.vm.memory_stats().map_err(Failure::run)?.private_kib;
        }
        self.report.private_kib_after = private as f64 / children.len().max(1) as f64;
        Ok(())
    }
}

fn own_seed(child: u64, vcpu: u64) -> u64 {
    (child + 1) << 16 | vcpu
}
