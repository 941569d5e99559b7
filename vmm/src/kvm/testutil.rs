//! Helpers for the tests of this module: the host, or a reason to skip, and a small VM.

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::features::CpuHide;
use super::host::Host;
use super::vcpu_state::{StateLayout, VcpuState};
use crate::boot::{BootEntry, BootSource, Firmware, GuestRamRanges, load};

const RAM: usize = 4 << 20;
/// Load and entry address of a test's code.
pub(crate) const CODE: u64 = 0x10_0000;

/// `mov rbx, 0x12345678; mov dx, 0x3f8; mov al, 'A'; out dx, al; mov al, bl; out dx, al; hlt`
pub(super) const TWO_OUTS: [u8; 18] =
    [0x48, 0xc7, 0xc3, 0x78, 0x56, 0x34, 0x12, 0x66, 0xba, 0xf8, 0x03, 0xb0, 0x41, 0xee, 0x88, 0xd8, 0xee, 0xf4];

/// The host, or `None` after printing why the test is skipped.
pub(crate) fn host() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) => {
            clade_test_support::skip("kvm", &error.to_string());
            None
        }
    }
}

/// A VM with 4 MiB of RAM, `code` at [`CODE`] and a boot vCPU about to run it in long mode.
pub(super) struct TestVm {
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) vm: VmFd,
    entry: BootEntry,
    // Last, so that it is dropped after the VM and its vCPUs, which use it.
    mem: GuestMemoryMmap<()>,
}

impl TestVm {
    pub(super) fn new(host: &Host, vcpus: u8, code: &[u8]) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let ram = GuestRamRanges::of_memory(&mem).unwrap();
        let firmware = Firmware { cpus: vcpus, rsdp: None };
        let entry = load(&mem, &ram, &BootSource::new(elf(code).into()), &firmware).unwrap().entry;
        let mut vm = Self::empty(host, vcpus, mem);
        vm.entry = entry;
        let mut sregs = vm.vcpus[0].get_sregs().unwrap();
        entry.apply_to(&mut sregs);
        vm.vcpus[0].set_sregs(&sregs).unwrap();
        vm.vcpus[0].set_regs(&entry.regs()).unwrap();
        vm
    }

    /// Another VM with a copy of the memory and with new vCPUs.
    pub(super) fn sibling(&self, host: &Host) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let mut bytes = vec![0; RAM];
        vm_memory::Bytes::read_slice(&self.mem, &mut bytes, GuestAddress(0)).unwrap();
        vm_memory::Bytes::write_slice(&mem, &bytes, GuestAddress(0)).unwrap();
        Self::empty(host, self.vcpus.len() as u8, mem)
    }

    fn empty(host: &Host, vcpus: u8, mem: GuestMemoryMmap<()>) -> Self {
        let vm = host.create_vm().unwrap();
        let region = mem.iter().next().unwrap();
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // Before the irqchip: the other order takes a hundred times as long.
        // SAFETY: the mapping is `mem`'s. The returned value owns it, and drops it after the VM and
        // its vCPUs.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [24, 0, 0, 0], ..Default::default() })
            .unwrap();
        let vcpus = (0..vcpus)
            .map(|i| {
                let vcpu = vm.create_vcpu(i.into()).unwrap();
                vcpu.set_cpuid2(&host.cpuid(i, vcpus, &CpuHide::none()).unwrap()).unwrap();
                vcpu
            })
            .collect();
        let entry = BootEntry::Pvh { rip: GuestAddress(0), start_info: GuestAddress(0) };
        Self { vcpus, vm, entry, mem }
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.mem
    }

    /// Runs the boot vCPU to its next port write, completes the write and returns the byte.
    pub(super) fn run_to_out(&mut self, host: &Host) -> u8 {
        let vcpu = &mut self.vcpus[0];
        let byte = loop {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(_, data) => break data[0],
                VcpuExit::InternalError => {
                    host.quirks().emulate_insn(vcpu).unwrap();
                }
                exit => panic!("unexpected exit {exit:?}"),
            }
        };
        complete_io(vcpu);
        byte
    }
}

/// Completes the I/O instruction that ended the last `KVM_RUN`.
fn complete_io(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
    vcpu.set_kvm_immediate_exit(0);
}

/// An ELF file with `code` at [`CODE`], entered at its first byte.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 120];
    out[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    out[16..20].copy_from_slice(&[2, 0, 62, 0]);
    out[24..32].copy_from_slice(&CODE.to_le_bytes());
    (out[32], out[54], out[56], out[64]) = (64, 56, 1, 1);
    let fields = [120, CODE, CODE, code.len() as u64, code.len() as u64, 16];
    for (slot, field) in out[72..].chunks_exact_mut(8).zip(fields) {
        slot.copy_from_slice(&field.to_le_bytes());
    }
    out.extend(code);
    out
}

/// The state of every vCPU.
pub(super) fn save_all(vm: &TestVm, host: &Host, layout: &StateLayout) -> Vec<VcpuState> {
    let cpus = vm.vcpus.len() as u8;
    let cpuid = |i: usize| host.cpuid(i as u8, cpus, &CpuHide::none()).unwrap();
    vm.vcpus.iter().enumerate().map(|(i, v)| VcpuState::save(v, layout, &cpuid(i)).unwrap()).collect()
}
