//! The access width of a port I/O exit, which `VcpuExit` does not report.

use kvm_ioctls::VcpuFd;

/// Bytes per access of the vCPU's last exit, which was port I/O. A string instruction (`rep insb`)
/// ends `KVM_RUN` once for several accesses: the exit holds the bytes of all of them.
pub(crate) fn pio_width(vcpu: &mut VcpuFd) -> usize {
    let run = vcpu.get_kvm_run();
    // SAFETY: the caller's exit was KVM_EXIT_IO, for which KVM fills `io`. All members of the union
    // are plain integers in 256 bytes of initialised shared memory: any bit pattern is valid.
    let io = unsafe { run.__bindgen_anon_1.io };
    usize::from(io.size)
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::VcpuExit;

    use super::*;
    use crate::kvm::testutil::{TestVm, host};

    /// `mov dx, 0x3f8; mov ecx, 5; mov rdi, 0x180000; cld; rep insb; mov ecx, 2; rep insw; mov rsi,
    /// 0x180000; mov ecx, 5; rep outsb; hlt`
    const STRINGS: [u8; 43] = [
        0x66, 0xba, 0xf8, 0x03, 0xb9, 5, 0, 0, 0, 0x48, 0xc7, 0xc7, 0, 0, 0x18, 0, 0xfc, 0xf3, 0x6c, 0xb9, 2, 0, 0, 0,
        0xf3, 0x66, 0x6d, 0x48, 0xc7, 0xc6, 0, 0, 0x18, 0, 0xb9, 5, 0, 0, 0, 0xf3, 0x6e, 0xf4, 0xf4,
    ];

    #[test]
    fn each_access_of_a_string_instruction_is_known() {
        let Some(host) = host() else { return };
        let mut vm = TestVm::new(&host, 1, &STRINGS);
        let vcpu = &mut vm.vcpus[0];
        let (mut next, mut widths, mut written) = (0, Vec::new(), Vec::new());
        while written.len() < 5 {
            match vcpu.run().unwrap() {
                VcpuExit::IoIn(0x3f8, data) => {
                    let len = data.len();
                    data.iter_mut().for_each(|byte| {
                        *byte = next;
                        next += 1;
                    });
                    let width = pio_width(vcpu);
                    assert_eq!(len % width, 0, "{len} bytes in accesses of {width}");
                    widths.extend(vec![width; len / width]);
                }
                VcpuExit::IoOut(0x3f8, data) => {
                    written.extend_from_slice(data);
                    assert_eq!(pio_width(vcpu), 1);
                }
                VcpuExit::InternalError => {
                    host.quirks().emulate_insn(vcpu).unwrap();
                }
                exit => panic!("unexpected exit {exit:?}"),
            }
        }
        assert_eq!(widths, [1, 1, 1, 1, 1, 2, 2]);
        assert_eq!(written, [0, 1, 2, 3, 4]);
    }
}
