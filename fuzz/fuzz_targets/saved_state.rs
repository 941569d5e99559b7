//! Any bytes in place of one section of a saved VM: they are refused, or become an image that can
//! be written and read again.
#![no_main]

use std::sync::OnceLock;

use ciborium::{Value, cbor};
use clade_devices::virtio::Backend;
use clade_memory::{GuestRam, Quiesced, RamImage, RamLayout, Store};
use clade_vmm::kvm::VcpuState;
use clade_vmm::vm::sections::{SECTIONS, host_requirements};
use clade_vmm::vm::{ForkImage, VmConfig};
use libfuzzer_sys::fuzz_target;

const MEMORY: u64 = 1 << 20;

fn ram() -> &'static RamImage {
    static RAM: OnceLock<RamImage> = OnceLock::new();
    RAM.get_or_init(|| {
        let store = Store::open_small().expect("a store");
        let ram = GuestRam::reserve(&RamLayout::new(MEMORY).expect("a layout"), &store).expect("memory");
        ram.populate().expect("memory");
        ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).expect("an image").0
    })
}

fn bytes(value: &impl serde::Serialize) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("bytes");
    bytes
}

/// Returns valid sections, of a VM with a balloon.
fn right() -> &'static [Vec<u8>; 6] {
    static RIGHT: OnceLock<[Vec<u8>; 6]> = OnceLock::new();
    RIGHT.get_or_init(|| {
        let mut config = VmConfig::bare(MEMORY, 1).expect("a configuration");
        config.balloon = true;
        let vcpu = VcpuState {
            cpuid: kvm_bindings::CpuId::new(0).expect("a list"),
            tsc_khz: None,
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xsave: kvm_bindings::Xsave::new(0).expect("an area"),
            xcrs: Default::default(),
            debug_regs: Default::default(),
            msrs: kvm_bindings::Msrs::new(0).expect("a list"),
            lapic: Default::default(),
            events: Default::default(),
            taken: Default::default(),
            taken_in_boot: None,
            page_fault_entry: None,
        };
        let queue = cbor!({ "max_size" => 128, "size" => 128, "ready" => false, "descriptors" => 0, "available" => 0,
            "used" => 0, "next_available" => 0, "next_used" => 0, "event_idx" => false });
        let balloon = cbor!({ "status" => 0, "device_features_sel" => 0, "driver_features_sel" => 0,
            "driver_features" => 0, "queue_sel" => 0, "queues" => vec![queue.expect("a queue"); 4],
            "interrupt" => { "pending" => 0, "generation" => 0, "needs_reset" => false },
            "device" => { "kind" => "balloon", "target" => 0, "actual" => 0, "stats_chain" => null } });
        let serial = cbor!({ "baud_divisor_low" => 12, "baud_divisor_high" => 0, "interrupt_enable" => 0,
            "interrupt_identification" => 1, "line_control" => 3, "line_status" => 96, "modem_control" => 8,
            "modem_status" => 176, "scratch" => 0, "in_buffer" => [] });
        let devices = cbor!({ "serial" => serial.expect("a port"), "virtio" => [balloon.expect("a device")] });
        let vm = cbor!({ "irqchips" => null, "pit" => null, "clock" => Value::Bytes(vec![0; 48]) });
        let facts = cbor!({ "clade" => "0", "vendor" => "", "features" => [], "tsc_khz" => null, "kernel" => "" });
        let identity = cbor!({ "identity" => { "nets" => [], "vsock" => null }, "generation" => 1 });
        let value = |value: Result<Value, ciborium::value::Error>| bytes(&value.expect("a value"));
        [value(facts), bytes(&config), bytes(&[vcpu]), value(vm), value(devices), value(identity)]
    })
}

fn read(sections: &[Vec<u8>]) -> Result<ForkImage, clade_vmm::vm::SavedError> {
    let named = SECTIONS.into_iter().zip(sections.iter().map(Vec::as_slice));
    ForkImage::from_sections(named, ram().clone(), vec![Backend::None])
}

fuzz_target!(
    init: assert!(read(right()).is_ok(), "what the target begins with is right"),
    |input: (u8, u16, &[u8])| {
        let (section, keep, bytes) = input;
        let mut sections = right().clone();
        let section = &mut sections[usize::from(section) % SECTIONS.len()];
        // The beginning of a valid section, so that the random bytes also appear in the middle.
        section.truncate(usize::from(keep) % (section.len() + 1));
        section.extend_from_slice(bytes);
        let named = SECTIONS.into_iter().zip(sections.iter().map(Vec::as_slice));
        let _either = host_requirements(named);
        let Ok(image) = read(&sections) else { return };
        let again: Vec<Vec<u8>> = image.sections().expect("it can be written").into_iter().map(|(_, b)| b).collect();
        assert!(read(&again).is_ok(), "what was read can be read again");
    }
);
