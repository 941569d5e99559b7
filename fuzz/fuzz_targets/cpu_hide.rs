//! Any text as a list of CPU features: it is refused with the name, or its printed form parses to
//! the same list.
#![no_main]

use clade_vmm::kvm::CpuHide;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(hide) = text.parse::<CpuHide>() {
        assert_eq!(hide.to_string().parse::<CpuHide>().ok(), Some(hide));
    }
});
