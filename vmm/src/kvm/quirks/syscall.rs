//! System calls to stock kernels on kvm-pvm.
//!
//! SYSCALL at ring 3 reaches the kernel's entry point still at ring 3, and faults there. The kernel
//! would handle the page fault as one of its program. A breakpoint at the first instruction of the
//! guest's page-fault handler ends `KVM_RUN` at every page fault. A fault from SYSCALL is turned
//! into the system call. For any other fault that first instruction, a no-op, is skipped.
//!
//! The breakpoint is set only for kernels that execute INT3 at boot. Stock kernels do so in a self
//! test. The kernel of `resources/linux` does not, and does not need any of this.

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, Msrs, kvm_guest_debug, kvm_msr_entry, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{EmulateError, Quirks};

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const PAGE_FAULT_VECTOR: u64 = 14;
/// Size of a 64-bit IDT gate in bytes.
const GATE: u64 = 16;
/// DR7: local breakpoint 0, on execution. Bit 10 is always set.
const DR7_EXECUTE_0: u64 = 1 | 1 << 10;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_DF: u64 = 1 << 10;
/// Length in bytes of the longest instruction that is skipped.
const MAX_NOTHING: usize = 4;

/// Reads guest memory at a guest-physical address; `false` if there is no memory.
type ReadMemory<'a> = &'a dyn Fn(u64, &mut [u8]) -> bool;

/// The part of a page fault's stack frame that is used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FaultFrame {
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
}

impl FaultFrame {
    const BYTES: usize = 40;

    /// Parses the stack at the handler's entry: error code, RIP, CS, RFLAGS, RSP.
    fn read(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| bytes[8 * at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        Self { rip: word(1), cs: word(2), rflags: word(3), rsp: word(4) }
    }

    /// Whether ring 3 failed to fetch the instruction at `entry`.
    fn is_syscall(&self, cr2: u64, entry: u64) -> bool {
        self.cs & 3 == 3 && self.rip == entry && cr2 == entry
    }
}

/// The handler's address in an IDT gate.
fn handler(gate: [u8; GATE as usize]) -> u64 {
    let gate = u128::from_le_bytes(gate);
    (gate & 0xffff | (gate >> 48 & 0xffff) << 16 | (gate >> 64 & 0xffff_ffff) << 32) as u64
}

/// Length in bytes of an instruction that may be skipped, and whether it clears DF. `None` for any
/// other instruction.
fn nothing(insn: &[u8; MAX_NOTHING]) -> Option<(u64, bool)> {
    match insn {
        // NOP, and CLAC without SMAP.
        [0x90, ..] => Some((1, false)),
        [0x66, 0x90, ..] => Some((2, false)),
        [0x0f, 0x1f, 0x00, _] | [0x0f, 0x01, 0xca, _] => Some((3, false)),
        // ENDBR64.
        [0xf3, 0x0f, 0x1e, 0xfa] => Some((4, false)),
        [0xfc, ..] => Some((1, true)),
        _ => None,
    }
}

fn segment(selector: u16, is_code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: if is_code { 0xb } else { 3 },
        present: 1,
        dpl: 0,
        db: u8::from(!is_code),
        s: 1,
        l: u8::from(is_code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> EmulateError {
    move |source| EmulateError::Ioctl { what, source }
}

fn read_linear<const N: usize>(vcpu: &VcpuFd, linear: u64, read: ReadMemory<'_>) -> Result<[u8; N], EmulateError> {
    let mut bytes = [0; N];
    // One read per page. `N` is at most 40 bytes, so there are at most two pages.
    let first = N.min((0x1000 - linear % 0x1000) as usize);
    for (at, len) in [(0, first), (first, N - first)].into_iter().filter(|(_, len)| *len > 0) {
        let translation = vcpu.translate_gva(linear + at as u64).map_err(call("KVM_TRANSLATE"))?;
        if translation.valid == 0 || !read(translation.physical_address, &mut bytes[at..at + len]) {
            return Err(EmulateError::Unmapped { linear: linear + at as u64 });
        }
    }
    Ok(bytes)
}

impl Quirks {
    /// The linear address of the guest's page-fault handler, if it needs a breakpoint: on kvm-pvm,
    /// once the guest has an IDT and a SYSCALL entry point. `None` if the handler's first
    /// instruction cannot be skipped.
    pub(crate) fn find_page_faults(self, vcpu: &VcpuFd, read: ReadMemory<'_>) -> Result<Option<u64>, EmulateError> {
        if self == Self::None {
            return Ok(None);
        }
        let idt = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?.idt;
        if u64::from(idt.limit) < GATE * (PAGE_FAULT_VECTOR + 1) - 1 || system_call_entry(vcpu)?.0 == 0 {
            return Ok(None);
        }
        let entry = handler(read_linear(vcpu, idt.base + GATE * PAGE_FAULT_VECTOR, read)?);
        Ok(nothing(&read_linear(vcpu, entry, read)?).map(|_| entry))
    }

    /// Sets a breakpoint at the page-fault handler `entry` (`KVM_SET_GUEST_DEBUG`). `None` removes
    /// it.
    pub(crate) fn watch_page_faults(vcpu: &VcpuFd, entry: Option<u64>) -> Result<(), EmulateError> {
        let mut debug = kvm_guest_debug::default();
        if let Some(entry) = entry {
            debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[0] = entry;
            debug.arch.debugreg[7] = DR7_EXECUTE_0;
        }
        vcpu.set_guest_debug(&debug).map_err(call("KVM_SET_GUEST_DEBUG"))
    }

    /// Handles the breakpoint at the page-fault handler, after `KVM_RUN` returned `KVM_EXIT_DEBUG`.
    pub(crate) fn at_page_fault(vcpu: &VcpuFd, read: ReadMemory<'_>) -> Result<(), EmulateError> {
        let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
        let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        let frame = FaultFrame::read(&read_linear(vcpu, regs.rsp, read)?);
        // Ring 3 at a kernel address: only these few faults need KVM_GET_MSRS.
        if frame.rip >> 63 == 1 && frame.cs & 3 == 3 {
            let (entry, star) = system_call_entry(vcpu)?;
            if frame.is_syscall(sregs.cr2, entry) {
                // The state that SYSCALL leaves. RCX, R11 and the flags are already correct.
                let code = (star >> 32 & 0xfffc) as u16;
                (sregs.cs, sregs.ss) = (segment(code, true), segment(code.wrapping_add(8), false));
                (regs.rip, regs.rsp, regs.rflags) = (entry, frame.rsp, frame.rflags & !RFLAGS_RF);
                vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
                return vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"));
            }
        }
        let insn = read_linear(vcpu, regs.rip, read)?;
        let (len, clears_df) = nothing(&insn).ok_or(EmulateError::DeviceOps { rip: regs.rip, insn })?;
        regs.rip += len;
        if clears_df {
            regs.rflags &= !RFLAGS_DF;
        }
        vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))
    }
}

/// LSTAR and STAR: the entry point of SYSCALL, and its segment selectors.
fn system_call_entry(vcpu: &VcpuFd) -> Result<(u64, u64), EmulateError> {
    let entry = |index| kvm_msr_entry { index, ..kvm_msr_entry::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[entry(LSTAR), entry(STAR)]) else { return Ok((0, 0)) };
    vcpu.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
    Ok((msrs.as_slice()[0].data, msrs.as_slice()[1].data))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_dtable;
    use kvm_ioctls::VcpuExit;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::super::testutil::{TestVm, host};
    use super::*;
    use crate::kvm::Emulated;

    #[test]
    fn a_fetch_at_the_entry_from_ring_3_is_a_system_call() {
        let entry = 0xffff_ffff_81c0_0080;
        let frame = FaultFrame { rip: entry, cs: 0x33, rflags: 0x1_0002, rsp: 0x7fff_0000 };
        assert!(frame.is_syscall(entry, entry));
        assert!(!frame.is_syscall(entry, entry + 1), "elsewhere in the kernel");
        assert!(!frame.is_syscall(0x1000, entry), "a fault at other memory");
        assert!(!FaultFrame { cs: 0x10, ..frame }.is_syscall(entry, entry), "the kernel's own");
        let mut bytes = [0; FaultFrame::BYTES];
        for (at, word) in [(8, entry), (16, 0x33), (24, 0x1_0002), (32, 0x7fff_0000)] {
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(word));
        }
        assert_eq!(FaultFrame::read(&bytes), frame);
    }

    #[test]
    fn gates_and_instructions_are_read() {
        let gate = [0x20, 0x0c, 0x10, 0, 0, 0x8e, 0xc0, 0x81, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
        assert_eq!(handler(gate), 0xffff_ffff_81c0_0c20);
        assert_eq!(nothing(&[0x90, 0x90, 0x90, 0xfc]), Some((1, false)));
        assert_eq!(nothing(&[0x0f, 0x1f, 0x00, 0xfc]), Some((3, false)));
        assert_eq!(nothing(&[0xfc, 0xe8, 0, 0]), Some((1, true)));
        assert_eq!(nothing(&[0xe8, 0, 0, 0]), None);
    }

    /// Start of the upper half's mapping of guest-physical memory.
    const KERNEL: u64 = 0xffff_8000_0000_0000;
    const CODE: u64 = 0x10_0000;
    const PML4: u64 = 0x20_0000;
    const TABLES: u64 = 0x20_8000;

    /// INT3, then IRETQ to ring 3 at `CODE` + 0x80.
    const START: &[u8] = &[
        0xcc, 0x6a, 0x23, 0x68, 0x00, 0xf0, 0x1f, 0x00, 0x6a, 0x02, 0x6a, 0x2b, 0x68, 0x80, 0x00, 0x10, 0x00, 0x48,
        0xcf,
    ];
    /// `mov eax, [0x300000]`, which faults, then SYSCALL.
    const USER: &[u8] = &[0x8b, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00, 0x0f, 0x05, 0xf4];
    /// The system call's entry: `mov rbx, rsp; mov dx, 0x3f8; mov al, 'S'; out dx, al`.
    const SYSTEM_CALL: &[u8] = &[0x48, 0x89, 0xe3, 0x66, 0xba, 0xf8, 0x03, 0xb0, b'S', 0xee];
    /// NOP; `mov dx, 0x3f8; mov al, 'F'; out dx, al; add rsp, 8; add qword [rsp], 7; iretq`.
    const PAGE_FAULT: &[u8] = &[
        0x0f, 0x1f, 0x00, 0x66, 0xba, 0xf8, 0x03, 0xb0, b'F', 0xee, 0x48, 0x83, 0xc4, 0x08, 0x48, 0x83, 0x04, 0x24,
        0x07, 0x48, 0xcf,
    ];
    /// `add qword [rsp], 0; iretq`.
    const BREAKPOINT: &[u8] = &[0x48, 0x83, 0x04, 0x24, 0x00, 0x48, 0xcf];

    fn gate(entry: u64) -> [u64; 2] {
        [entry & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (entry >> 16 & 0xffff) << 48, entry >> 32]
    }

    /// Sets up a long-mode guest with two rings: the kernel in the upper half, the program in the
    /// lower.
    fn two_rings(vm: &TestVm) {
        let words = |at: u64, words: &[u64]| {
            for (n, word) in words.iter().enumerate() {
                vm.memory().write_obj(*word, GuestAddress(at + 8 * n as u64)).unwrap();
            }
        };
        let bytes = |at: u64, bytes: &[u8]| vm.memory().write_slice(bytes, GuestAddress(at)).unwrap();
        // Lower half: 2 MiB for ring 3. Upper half: 4 MiB for ring 0.
        words(PML4, &[(PML4 + 0x1000) | 7]);
        words(PML4 + 8 * 256, &[(PML4 + 0x3000) | 3]);
        words(PML4 + 0x1000, &[(PML4 + 0x2000) | 7]);
        words(PML4 + 0x2000, &[0x87]);
        words(PML4 + 0x3000, &[(PML4 + 0x4000) | 3]);
        words(PML4 + 0x4000, &[0x83, 0x20_0083]);
        // Data and code segments of both rings in the order of SYSCALL and SYSRET, and a TSS.
        let tss = KERNEL + TABLES + 0x2000;
        let low = 0x67 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
        let segments =
            [0, 0, 0xaf_9b00_0000_ffff, 0xcf_9300_0000_ffff, 0xcf_f300_0000_ffff, 0xaf_fb00_0000_ffff, low, tss >> 32];
        words(TABLES, &segments);
        words(TABLES + 0x1000 + 16 * 3, &gate(KERNEL + CODE + 0x300));
        words(TABLES + 0x1000 + 16 * 14, &gate(KERNEL + CODE + 0x200));
        let stack = KERNEL + TABLES + 0x5000;
        vm.memory().write_obj(stack, GuestAddress(TABLES + 0x2004)).unwrap();
        for (at, code) in [(0, START), (0x80, USER), (0x100, SYSTEM_CALL), (0x200, PAGE_FAULT), (0x300, BREAKPOINT)] {
            bytes(CODE + at, code);
        }
        let vcpu = &vm.vcpus[0];
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0011, PML4, 0x20, 0x501);
        (sregs.cs, sregs.ss) = (segment(0x10, true), segment(0x18, false));
        (sregs.ds, sregs.es) = (sregs.ss, sregs.ss);
        sregs.gdt = kvm_dtable { base: KERNEL + TABLES, limit: 0x3f, padding: [0; 3] };
        sregs.idt = kvm_dtable { base: KERNEL + TABLES + 0x1000, limit: 0xfff, padding: [0; 3] };
        (sregs.tr.base, sregs.tr.selector, sregs.tr.limit) = (tss, 0x30, 0x67);
        (sregs.tr.type_, sregs.tr.present, sregs.tr.s, sregs.tr.unusable) = (0xb, 1, 0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (KERNEL + CODE, stack, 2);
        vcpu.set_regs(&regs).unwrap();
        let entry = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
        let star = 0x1b << 48 | 0x10 << 32;
        let msrs = [entry(STAR, star), entry(LSTAR, KERNEL + CODE + 0x100), entry(0xc000_0084, 0)];
        assert_eq!(vcpu.set_msrs(&Msrs::from_entries(&msrs).unwrap()).unwrap(), 3);
    }

    /// Runs the guest to its system call. Returns its output and the number of exits at its
    /// page-fault handler.
    fn run_to_system_call(vm: &mut TestVm, quirks: Quirks) -> (String, usize) {
        let memory = vm.memory().clone();
        let read = move |at: u64, bytes: &mut [u8]| memory.read_slice(bytes, GuestAddress(at)).is_ok();
        let vcpu = &mut vm.vcpus[0];
        let (mut written, mut looks) = (String::new(), 0);
        loop {
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(_, data) => {
                    written.push(char::from(data[0]));
                    if written.ends_with('S') {
                        return (written, looks);
                    }
                }
                VcpuExit::InternalError => {
                    if quirks.emulate_insn(vcpu).unwrap().0 == Emulated::Breakpoint {
                        let entry = quirks.find_page_faults(vcpu, &read).unwrap();
                        assert_eq!(entry, Some(KERNEL + CODE + 0x200));
                        Quirks::watch_page_faults(vcpu, entry).unwrap();
                    }
                }
                VcpuExit::Debug(_) => {
                    looks += 1;
                    Quirks::at_page_fault(vcpu, &read).unwrap();
                }
                exit => panic!("unexpected exit {exit:?} after {written}"),
            }
        }
    }

    #[test]
    fn a_guests_system_call_and_its_page_faults_are_told_apart() {
        let Some(host) = host() else { return };
        let mut vm = TestVm::new(&host, 1, &[0xf4]);
        two_rings(&vm);
        let (written, looks) = run_to_system_call(&mut vm, host.quirks());
        assert_eq!(written, "FS");
        assert_eq!(looks, if host.quirks() == Quirks::None { 0 } else { 2 });
        let (regs, sregs) = (vm.vcpus[0].get_regs().unwrap(), vm.vcpus[0].get_sregs().unwrap());
        assert_eq!((sregs.cs.selector, sregs.ss.selector), (0x10, 0x18));
        // After SYSCALL, RSP is still the program's, and RCX is the return address.
        assert_eq!((regs.rbx, regs.rcx), (0x1f_f000, CODE + 0x80 + 9));
    }
}
