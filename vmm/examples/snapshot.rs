//! Saves a running VM to a directory, and starts another from it.

use std::sync::Arc;

use clade_guests::BARE_ELF;
use clade_harness::BareVcpu;
use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::vm::{ChildOptions, Context, ForkImage, RestoreOptions, SnapshotOptions, Vm, VmConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let at = dir.path().join("snapshot");
    let context = Context::open()?;
    let config = Arc::new(VmConfig::bare(64 << 20, 1)?);
    let vm = Vm::boot(&context, "original", &config, &BootSource::new(BootImage::Bytes(BARE_ELF.into())))?;
    BareVcpu::new(&vm, 0).await_ready()?;

    let report = vm.snapshot(&at, SnapshotOptions::default())?;
    println!("{} pages saved in {:?}, paused for {:?}", report.saved.data_pages, report.took, report.times.pause);
    drop(vm);

    let image = ForkImage::restore(&context, &at, &RestoreOptions::default())?;
    let restored = Vm::from_image(&context, "restored", &image, ChildOptions::default())?;
    println!("{} runs: {}", restored.name(), restored.stopped().is_none());
    Ok(())
}
