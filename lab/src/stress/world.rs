//! The place of the stressed VMs: each in a process of its own, or all in this one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clade_harness::{BareVcpu, GuestWords, Machine, WordsError, boot_bare};
use clade_host_io::CachePolicy;
use clade_memory::{GuestRam, PinPolicy};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, StopReason, Vm, VmConfig};

use clade::{BARE, DevSupervisor, Failure, KernelSource, RemoteVm};

/// The place of new VMs.
pub(super) enum World {
    /// In this process. With `ignore`, pinned pages are not spared by freezes.
    InProcess { context: Context, ignore: bool },
    /// In processes of their own. Each child and each checkpoint has a number.
    Remote { vms: DevSupervisor, numbers: AtomicU64 },
}

/// A VM, paused or not.
pub(super) enum StressVm {
    InProcess(Box<Vm>),
    Remote(RemoteVm),
}

/// The state of a VM at one instant.
pub(super) enum StressImage {
    InProcess(Arc<ForkImage>),
    /// A checkpoint of this name.
    Remote(String),
}

/// The cost of a fork to the parent.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ForkCosts {
    /// In microseconds: the whole pause, the part until vCPUs and devices stood still, and the part
    /// for freezing memory.
    pub(super) pause_us: f64,
    pub(super) park_us: f64,
    pub(super) freeze_us: f64,
    pub(super) copied: u64,
    pub(super) remapped: u64,
    pub(super) in_flight: u64,
}

impl World {
    pub(super) fn new(in_process: bool, ignore: bool) -> Result<Self, Failure> {
        if in_process {
            let context = Context::open().map_err(Failure::input)?.with_report_port();
            return Ok(Self::InProcess { context, ignore });
        }
        Ok(Self::Remote { vms: DevSupervisor::begin("stress")?, numbers: AtomicU64::new(0) })
    }

    /// Boots a bare guest, and waits until all its vCPUs take commands.
    pub(super) fn boot(&self, config: VmConfig) -> Result<StressVm, Failure> {
        match self {
            Self::InProcess { context, ignore } => {
                let vm = boot_bare(context, "stress", &Arc::new(config)).map_err(Failure::run)?;
                ignore_pins(&vm, *ignore);
                Ok(StressVm::InProcess(Box::new(vm)))
            }
            Self::Remote { vms, .. } => {
                let vm =
                    vms.boot("stress", &config, KernelSource { kernel: Path::new(BARE), initrd: None, cmdline: "" })?;
                let ready = |vcpu| BareVcpu::new(&vm, vcpu).await_ready();
                (0..u64::from(config.cpus())).try_for_each(ready).map_err(Failure::run)?;
                Ok(StressVm::Remote(vm))
            }
        }
    }

    /// Returns the state of a VM now. The VM runs on, or stays paused.
    pub(super) fn fork(&self, vm: &StressVm) -> Result<(StressImage, ForkCosts), Failure> {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        match (self, vm) {
            (Self::InProcess { .. }, StressVm::InProcess(vm)) => {
                let (image, report) = vm.fork().map_err(Failure::run)?;
                let costs = ForkCosts {
                    pause_us: us(report.times.pause),
                    park_us: us(report.times.park),
                    freeze_us: us(report.times.freeze),
                    copied: report.freeze.copied,
                    remapped: report.freeze.remapped,
                    in_flight: report.in_flight as u64,
                };
                Ok((StressImage::InProcess(image), costs))
            }
            (Self::Remote { vms, numbers }, StressVm::Remote(vm)) => {
                let name = number("fork", numbers);
                let info = vms.checkpoint(vm.name(), &name)?;
                let forked = info.forked.unwrap_or_default();
                let costs = ForkCosts {
                    pause_us: info.pause_us,
                    park_us: forked.park_us,
                    freeze_us: forked.freeze_us,
                    copied: forked.copied_pages,
                    remapped: forked.remapped_pages,
                    in_flight: forked.in_flight,
                };
                Ok((StressImage::Remote(name), costs))
            }
            _ => Err(elsewhere()),
        }
    }

    /// A paused child.
    pub(super) fn child(&self, image: &StressImage) -> Result<StressVm, Failure> {
        match (self, image) {
            (Self::InProcess { context, ignore }, StressImage::InProcess(image)) => {
                let options = ChildOptions { paused: true, ..ChildOptions::default() };
                let vm = Vm::from_image(context, "child", image, options).map_err(Failure::run)?;
                ignore_pins(&vm, *ignore);
                Ok(StressVm::InProcess(Box::new(vm)))
            }
            (Self::Remote { vms, numbers }, StressImage::Remote(image)) => {
                let (child, _) = vms.fork_one(&format!("checkpoints/{image}"), &number("child", numbers))?;
                Ok(StressVm::Remote(child))
            }
            _ => Err(elsewhere()),
        }
    }

    /// Forgets an image. Its children run on.
    pub(super) fn forget(&self, image: StressImage) -> Result<(), Failure> {
        match (self, image) {
            (Self::Remote { vms, .. }, StressImage::Remote(name)) => vms.remove(&name),
            _ => Ok(()),
        }
    }
}

fn number(what: &str, numbers: &AtomicU64) -> String {
    // Relaxed: the numbers only need to differ.
    format!("{what}-{}", numbers.fetch_add(1, Ordering::Relaxed))
}

fn elsewhere() -> Failure {
    Failure::Run(anyhow::anyhow!("a VM of this process and one of another are mixed up"))
}

fn ignore_pins(vm: &Vm, ignore: bool) {
    if ignore {
        vm.ram().set_pin_policy(PinPolicy::Ignore);
    }
}

impl StressVm {
    pub(super) fn pause(&self) -> Result<(), Failure> {
        match self {
            Self::InProcess(vm) => vm.pause().map_err(Failure::run),
            Self::Remote(vm) => vm.pause(),
        }
    }

    pub(super) fn resume(&self) -> Result<(), Failure> {
        match self {
            Self::InProcess(vm) => vm.resume().map_err(Failure::run),
            Self::Remote(vm) => vm.resume(),
        }
    }

    /// Puts it back to the instant of its fork.
    pub(super) fn reset(&self) -> Result<(), Failure> {
        match self {
            Self::InProcess(vm) => vm.reset_to_origin().map(drop).map_err(Failure::run),
            Self::Remote(vm) => vm.reset().map(drop),
        }
    }

    /// Ends the VM, whatever its state.
    pub(super) fn destroy(self) -> Result<(), Failure> {
        match self {
            Self::InProcess(vm) => {
                drop(vm);
                Ok(())
            }
            Self::Remote(vm) => vm.stop(),
        }
    }

    /// Whether its first disk is read and written past the page cache.
    pub(super) fn policy(&self) -> Result<CachePolicy, Failure> {
        match self {
            Self::InProcess(vm) => Ok(vm.with_disk(0, |disk| disk.policy()).unwrap_or_default()),
            Self::Remote(vm) => {
                let info = vm.info()?;
                let direct = info.disks.first().is_some_and(|disk| disk.direct);
                Ok(if direct { CachePolicy::Direct } else { CachePolicy::Host })
            }
        }
    }

    /// Its memory, if it is in this process.
    pub(super) fn ram(&self) -> Option<&GuestRam> {
        match self {
            Self::InProcess(vm) => Some(vm.ram()),
            Self::Remote(_) => None,
        }
    }
}

impl GuestWords for StressVm {
    fn load(&self, address: u64) -> Result<u64, WordsError> {
        match self {
            Self::InProcess(vm) => vm.load(address),
            Self::Remote(vm) => vm.load(address),
        }
    }

    fn store(&self, address: u64, words: &[u64]) -> Result<(), WordsError> {
        match self {
            Self::InProcess(vm) => vm.store(address, words),
            Self::Remote(vm) => vm.store(address, words),
        }
    }

    fn store_and_ring(&self, address: u64, words: &[u64], vcpu: u64) -> Result<(), WordsError> {
        match self {
            Self::InProcess(vm) => vm.store_and_ring(address, words, vcpu),
            Self::Remote(vm) => vm.store_and_ring(address, words, vcpu),
        }
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), WordsError> {
        match self {
            Self::InProcess(vm) => vm.read(address, bytes),
            Self::Remote(vm) => vm.read(address, bytes),
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), WordsError> {
        match self {
            Self::InProcess(vm) => vm.write(address, bytes),
            Self::Remote(vm) => vm.write(address, bytes),
        }
    }
}

impl Machine for StressVm {
    fn name(&self) -> String {
        match self {
            Self::InProcess(vm) => Machine::name(vm.as_ref()),
            Self::Remote(vm) => Machine::name(vm),
        }
    }

    fn stopped(&self) -> Option<StopReason> {
        match self {
            Self::InProcess(vm) => Machine::stopped(vm.as_ref()),
            Self::Remote(vm) => vm.stopped(),
        }
    }

    fn await_report(&self, limit: Duration) {
        match self {
            Self::InProcess(vm) => vm.await_report(limit),
            Self::Remote(vm) => vm.await_report(limit),
        }
    }
}
