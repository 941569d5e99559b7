//! Any text as a list of CPU features: refused by name, or what it prints parses to the same.
#![no_main]

use clade_vmm::kvm::CpuHide;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(hide) = text.parse::<CpuHide>() {
        assert_eq!(hide.to_string().parse::<CpuHide>().ok(), Some(hide));
    }
});
