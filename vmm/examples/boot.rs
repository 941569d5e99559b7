//! Boots a kernel with an initramfs, and shows its console: `boot KERNEL INITRAMFS [SECONDS]`.

use std::env;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clade_vmm::boot::{BootImage, BootSource};
use clade_vmm::vm::{Context, Vm, VmConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = env::args().skip(1);
    let (Some(kernel), Some(initrd)) = (args.next().map(PathBuf::from), args.next().map(PathBuf::from)) else {
        return Err("usage: boot KERNEL INITRAMFS [SECONDS]".into());
    };
    let seconds = args.next().map_or(Ok(60), |text| text.parse())?;
    let source = BootSource {
        kernel: BootImage::File(kernel),
        initrd: Some(BootImage::File(initrd)),
        cmdline: "console=ttyS0 reboot=k panic=-1".to_owned(),
    };
    let context = Context::open()?;
    let vm = Vm::boot(&context, "linux", &Arc::new(VmConfig::new(256 << 20, 1)?), &source)?;
    vm.console().listen(Box::new(std::io::stdout()));
    let stopped = vm.wait(Duration::from_secs(seconds));
    println!("\n{}", stopped.map_or_else(|| "still running".to_owned(), |reason| reason.to_string()));
    Ok(())
}
