//! Forks a running VM: the child continues from the same instant, in memory of its own.

use std::sync::Arc;

use clade_guests::{BARE_ELF, abi::WORK_BASE};
use clade_harness::BareVcpu;
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::vm::{ChildOptions, Context, Vm, VmConfig};
use vm_memory::{Bytes, GuestAddress};

const WORD: GuestAddress = GuestAddress(WORK_BASE);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let context = Context::open()?;
    let config = Arc::new(VmConfig::bare(512 << 20, 1)?);
    let kernel = BootSource::new(BootImage::Bytes(BARE_ELF.into()));
    let parent = Vm::boot(&context, "parent", &config, &kernel)?;
    BareVcpu::new(&parent, 0).await_ready()?;
    parent.ram().memory().write_obj(1u64, WORD)?;

    let (image, report) = parent.fork()?;
    let child = Vm::from_image(&context, "child", &image, ChildOptions::default())?;
    parent.ram().memory().write_obj(2u64, WORD)?;

    println!("the parent stood still for {:?}", report.times.pause);
    let read = |vm: &Vm| vm.ram().memory().read_obj::<u64>(WORD);
    assert_eq!((read(&parent)?, read(&child)?), (2, 1));
    println!("{} KiB are the child's alone", child.memory_stats()?.private_kib);
    Ok(())
}
