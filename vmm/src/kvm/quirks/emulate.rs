//! Emulates in userspace the instructions unknown to KVM's emulator.

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    kvm_regs,
};
use kvm_ioctls::VcpuFd;

use super::Quirks;

const BREAKPOINT_VECTOR: u8 = 3;
/// #NM.
const DEVICE_NOT_AVAILABLE_VECTOR: u8 = 7;
/// #MF.
const FLOATING_POINT_VECTOR: u8 = 16;
/// CR0.MP and CR0.TS: FWAIT raises #NM when both are set.
const CR0_MP_TS: u64 = 1 << 1 | 1 << 3;
/// The six x87 exceptions: flags in the status word, masks in the control word.
const X87_EXCEPTIONS: u16 = 0x3f;
const MAX_INSN: usize = 15;

/// Arithmetic flags: CF, PF, AF, ZF, SF, OF.
const ARITHMETIC_FLAGS: u64 = 0x8d5;
const ZF: u64 = 1 << 6;

/// Kinds of instructions emulated in place of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emulated {
    /// An instruction other than INT3.
    Instruction,
    /// INT3, which stock kernels execute in a self test at boot.
    Breakpoint,
}

/// An instruction that can be emulated here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EmulatedInsn {
    /// INT3, which Linux executes in its alternatives' self test, and for tracing and live
    /// patching.
    Int3,
    /// FWAIT, which Debian's kernels execute when they set up the FPU.
    Fwait,
    /// POPCNT between registers, from Linux's hweight.
    Popcnt { wide: bool, to: u8, from: u8, len: u8 },
    /// RDRAND or RDSEED, emulated as "no number is ready" (CF clear). Linux then stops using the
    /// instruction at boot.
    Random { to: u8, len: u8 },
}

impl EmulatedInsn {
    /// Decodes the instruction at the start of `insn`.
    fn decode(insn: &[u8]) -> Option<Self> {
        if insn.first() == Some(&0xcc) {
            return Some(Self::Int3);
        }
        if insn.first() == Some(&0x9b) {
            return Some(Self::Fwait);
        }
        let (repeat, rest) = match insn {
            [0xf3, rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let (rex, rest) = match rest {
            [rex @ 0x40..=0x4f, rest @ ..] => (*rex, rest),
            rest => (0, rest),
        };
        let &[0x0f, opcode, modrm, ..] = rest else { return None };
        if modrm >> 6 != 3 {
            return None;
        }
        let len = (insn.len() - rest.len() + 3) as u8;
        let reg = modrm >> 3 & 7;
        let (reg_extended, rm) = (reg | (rex & 4) << 1, modrm & 7 | (rex & 1) << 3);
        match (repeat, opcode) {
            (true, 0xb8) => Some(Self::Popcnt { wide: rex & 8 != 0, to: reg_extended, from: rm, len }),
            (false, 0xc7) if reg >= 6 => Some(Self::Random { to: rm, len }),
            _ => None,
        }
    }
}

/// The general register with the encoding `number`.
fn register(regs: &mut kvm_regs, number: u8) -> &mut u64 {
    match number & 15 {
        0 => &mut regs.rax,
        1 => &mut regs.rcx,
        2 => &mut regs.rdx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsp,
        5 => &mut regs.rbp,
        6 => &mut regs.rsi,
        7 => &mut regs.rdi,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

/// Applies the instruction to `regs`, and advances RIP.
fn apply(remedy: EmulatedInsn, regs: &mut kvm_regs) {
    let len = match remedy {
        // A trap: the handler's return address is after the instruction.
        EmulatedInsn::Int3 | EmulatedInsn::Fwait => 1,
        EmulatedInsn::Popcnt { wide, to, from, len } => {
            let value = *register(regs, from);
            let value = if wide { value } else { value & u64::from(u32::MAX) };
            *register(regs, to) = value.count_ones().into();
            regs.rflags = regs.rflags & !ARITHMETIC_FLAGS | if value == 0 { ZF } else { 0 };
            len
        }
        EmulatedInsn::Random { to, len } => {
            *register(regs, to) = 0;
            regs.rflags &= !ARITHMETIC_FLAGS;
            len
        }
    };
    regs.rip = regs.rip.wrapping_add(len.into());
}

/// The vector that FWAIT raises with this CR0, x87 status word and control word.
fn fwait_fault(cr0: u64, status: u16, control: u16) -> Option<u8> {
    if cr0 & CR0_MP_TS == CR0_MP_TS {
        Some(DEVICE_NOT_AVAILABLE_VECTOR)
    } else if status & !control & X87_EXCEPTIONS != 0 {
        Some(FLOATING_POINT_VECTOR)
    } else {
        None
    }
}

impl Quirks {
    /// Emulates an instruction that KVM could not, after `KVM_RUN` returned
    /// `KVM_EXIT_INTERNAL_ERROR`. Returns the instruction's kind and address. After `Ok` the caller
    /// runs the vCPU again.
    pub(crate) fn emulate_insn(self, vcpu: &mut VcpuFd) -> Result<(Emulated, u64), EmulateError> {
        let failure = EmulationFailure::of(vcpu).ok_or(EmulateError::NotEmulation)?;
        let call = |what| move |source| EmulateError::Ioctl { what, source };
        let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
        let remedy = if self == Self::None { None } else { EmulatedInsn::decode(failure.insn()) };
        let Some(remedy) = remedy else { return Err(EmulateError::NoRemedy { failure, rip: regs.rip }) };
        let rip = regs.rip;
        let fault = match remedy {
            EmulatedInsn::Fwait => {
                let (cr0, fpu) = (vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?.cr0, vcpu.get_fpu());
                let fpu = fpu.map_err(call("KVM_GET_FPU"))?;
                fwait_fault(cr0, fpu.fsw, fpu.fcw)
            }
            _ => None,
        };
        // A fault leaves RIP at the instruction.
        if fault.is_none() {
            apply(remedy, &mut regs);
        }
        // KVM_SET_REGS also drops the #UD that KVM queued when it gave up.
        vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
        let exception = if remedy == EmulatedInsn::Int3 { Some(BREAKPOINT_VECTOR) } else { fault };
        if let Some(vector) = exception {
            // After the registers: KVM_SET_REGS drops pending exceptions.
            let mut events = vcpu.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
            events.exception.injected = 1;
            events.exception.pending = 0;
            events.exception.nr = vector;
            events.exception.has_error_code = 0;
            vcpu.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))?;
        }
        Ok((if remedy == EmulatedInsn::Int3 { Emulated::Breakpoint } else { Emulated::Instruction }, rip))
    }
}

/// Why a vCPU cannot continue after an exit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulateError {
    /// The exit was not an emulation failure.
    #[error("KVM gave up for another reason than an instruction it cannot emulate")]
    NotEmulation,
    /// The instruction cannot be emulated here either.
    #[error("KVM cannot emulate the guest's instruction at {rip:#x}: {failure}")]
    NoRemedy {
        /// The instruction's bytes.
        failure: EmulationFailure,
        /// The instruction's address.
        rip: u64,
    },
    /// The guest has no mapping at an address that must be read.
    #[error("the guest has nothing at {linear:#x}, where a page fault is looked at")]
    Unmapped {
        /// The guest's linear address.
        linear: u64,
    },
    /// The guest's page-fault handler no longer begins with an instruction that can be skipped.
    #[error("the guest's handler of page faults at {rip:#x} begins with {insn:02x?}")]
    DeviceOps {
        /// The handler's address.
        rip: u64,
        /// Its first bytes.
        insn: [u8; 4],
    },
    /// A KVM ioctl failed.
    #[error("{what} failed")]
    Ioctl {
        /// The ioctl.
        what: &'static str,
        /// The ioctl's error.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// The instruction that KVM could not emulate, and the bytes after it, as far as KVM fetched them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EmulationFailure {
    bytes: [u8; MAX_INSN],
    len: u8,
}

impl EmulationFailure {
    /// The instruction of the vCPU's last exit, if that was an emulation failure.
    pub fn of(vcpu: &mut VcpuFd) -> Option<Self> {
        let run = vcpu.get_kvm_run();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return None;
        }
        // SAFETY: KVM fills `internal` for this exit reason, which was just checked.
        // `emulation_failure` starts with the same `suberror` and `ndata`. All fields are plain
        // integers, and the union is 256 bytes of initialised shared memory: any bit pattern is a
        // valid value.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return None;
        }
        let has_bytes =
            failure.ndata >= 1 && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        // SAFETY: the only member of this union is the struct of the instruction's size and bytes:
        // plain integers, for which any bit pattern is valid.
        let insn = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = if has_bytes { insn.insn_size.min(MAX_INSN as u8) } else { 0 };
        Some(Self { bytes: insn.insn_bytes, len })
    }

    /// The bytes; empty if KVM did not report them.
    #[must_use]
    pub(crate) fn insn(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.len)).unwrap_or(&[])
    }
}

impl std::fmt::Display for EmulationFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.len == 0 {
            return f.write_str("its bytes are not known");
        }
        for (i, byte) in self.insn().iter().enumerate() {
            write!(f, "{}{byte:02x}", if i > 0 { " " } else { "" })?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for EmulationFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EmulationFailure({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testutil::{CODE, TestVm, host};
    use super::*;

    #[test]
    fn decodes_what_linux_executes_and_no_more() {
        let popcnt = |wide, to, from, len| Some(EmulatedInsn::Popcnt { wide, to, from, len });
        let decode = EmulatedInsn::decode;
        assert_eq!(decode(&[0xcc]), Some(EmulatedInsn::Int3));
        assert_eq!(decode(&[0xf3, 0x48, 0x0f, 0xb8, 0xc7, 0x41]), popcnt(true, 0, 7, 5), "popcnt rax, rdi");
        assert_eq!(decode(&[0xf3, 0x0f, 0xb8, 0xc7]), popcnt(false, 0, 7, 4), "popcnt eax, edi");
        assert_eq!(decode(&[0xf3, 0x4d, 0x0f, 0xb8, 0xc1]), popcnt(true, 8, 9, 5), "popcnt r8, r9");
        assert_eq!(decode(&[0x48, 0x0f, 0xc7, 0xf0]), Some(EmulatedInsn::Random { to: 0, len: 4 }), "rdrand rax");
        assert_eq!(decode(&[0x41, 0x0f, 0xc7, 0xff]), Some(EmulatedInsn::Random { to: 15, len: 4 }), "rdseed r15d");
        assert_eq!(decode(&[0xf3, 0x48, 0x0f, 0xb8, 0x07]), None, "popcnt rax, [rdi]");
        assert_eq!(decode(&[0x0f, 0xc7, 0x0f]), None, "cmpxchg8b [rdi]");
        assert_eq!(decode(&[0x0f, 0x0b]), None, "ud2");
        assert_eq!(decode(&[0xf3, 0x48, 0x0f]), None);
        assert_eq!(decode(&[]), None);
    }

    #[test]
    fn popcnt_counts_and_sets_flags() {
        let mut regs =
            kvm_regs { rdi: 0xf_0000_000f, rip: 0x1000, rflags: 0x202 | ARITHMETIC_FLAGS, ..Default::default() };
        apply(EmulatedInsn::Popcnt { wide: true, to: 0, from: 7, len: 5 }, &mut regs);
        assert_eq!((regs.rax, regs.rip, regs.rflags), (8, 0x1005, 0x202));
        apply(EmulatedInsn::Popcnt { wide: false, to: 9, from: 7, len: 4 }, &mut regs);
        assert_eq!((regs.r9, regs.rip), (4, 0x1009));
        apply(EmulatedInsn::Popcnt { wide: true, to: 0, from: 1, len: 5 }, &mut regs);
        assert_eq!((regs.rax, regs.rflags), (0, 0x202 | ZF));
    }

    #[test]
    fn random_numbers_are_not_ready() {
        let mut regs = kvm_regs { rax: 5, rflags: 0x203, ..Default::default() };
        apply(EmulatedInsn::Random { to: 0, len: 3 }, &mut regs);
        assert_eq!((regs.rax, regs.rip, regs.rflags), (0, 3, 0x202));
    }

    #[test]
    fn fwait_raises_what_waits() {
        assert_eq!(EmulatedInsn::decode(&[0x9b, 0xdd]), Some(EmulatedInsn::Fwait));
        assert_eq!(fwait_fault(0x8005_0033, 0, 0x37f), None);
        assert_eq!(fwait_fault(0x8005_0033, 0x3f, 0x37f), None, "all masked");
        assert_eq!(fwait_fault(0x8005_0033, 4, 0x37b), Some(FLOATING_POINT_VECTOR), "a division by zero");
        assert_eq!(fwait_fault(0x8005_003b, 0, 0x37f), Some(DEVICE_NOT_AVAILABLE_VECTOR));
        assert_eq!(fwait_fault(0x8005_0039, 0, 0x37f), None, "without MP it does not look at TS");
    }

    /// FWAIT works in the guest, executed by the CPU or emulated here.
    #[test]
    fn fwait_runs() {
        let Some(host) = host() else { return };
        // fwait; mov al, 7; mov dx, 0x3f8; out dx, al; hlt
        let code = [0x9b, 0xb0, 7, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xf4];
        assert_eq!(TestVm::new(&host, 1, &code).run_to_out(&host), 7);
    }

    /// POPCNT works in the guest, executed by the CPU or emulated here.
    #[test]
    fn popcnt_runs() {
        let Some(host) = host() else { return };
        // mov edi, 0xff0; popcnt rax, rdi; mov dx, 0x3f8; out dx, al; hlt
        let code = [0xbf, 0xf0, 0x0f, 0, 0, 0xf3, 0x48, 0x0f, 0xb8, 0xc7, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xf4];
        assert_eq!(TestVm::new(&host, 1, &code).run_to_out(&host), 8);
    }

    #[test]
    fn bytes_are_printed_as_they_are_read() {
        let failure = EmulationFailure { bytes: [0xf3, 0x0f, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], len: 3 };
        let error = EmulateError::NoRemedy { failure, rip: 0xffff_ffff_8100_0000 };
        assert_eq!(error.to_string(), "KVM cannot emulate the guest's instruction at 0xffffffff81000000: f3 0f b8");
        assert_eq!(EmulationFailure { len: 0, ..failure }.to_string(), "its bytes are not known");
    }

    /// INT3, executed by the CPU or emulated here, reaches the guest's handler. The return address
    /// is the one after it.
    #[test]
    fn int3_raises_a_breakpoint() {
        let Some(host) = host() else { return };
        let mut code = vec![0xf4; 0x90];
        // lidt [0x100040]; mov dx, 0x3f8; int3
        code[..13].copy_from_slice(&[0x0f, 0x01, 0x1c, 0x25, 0x40, 0, 0x10, 0, 0x66, 0xba, 0xf8, 0x03, 0xcc]);
        // The handler: pop rbx; mov al, bl; out dx, al
        code[0x20..0x24].copy_from_slice(&[0x5b, 0x88, 0xd8, 0xee]);
        // IDTR: limit, base; and gate 3: a 64-bit interrupt gate to the handler.
        code[0x40..0x4a].copy_from_slice(&[0x3f, 0, 0x50, 0, 0x10, 0, 0, 0, 0, 0]);
        code[0x80..0x90].copy_from_slice(&[0x20, 0, 8, 0, 0, 0x8e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let after_int3 = ((CODE + 13) & 0xff) as u8;
        assert_eq!(TestVm::new(&host, 1, &code).run_to_out(&host), after_int3);
    }
}
