/* The smallest guest with two rings, straight on /dev/kvm: a program in ring 3, and a handler of exceptions that exits. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

enum { RAM = 4 << 20, PML4 = 0x1000, GDT = 0x4000, TSS = 0x5000, IDT = 0x6000, HANDLER = 0x8000, STACK = 0x9000, CODE = 0x100000 };

static long must(const char *what, long result)
{
	if (result < 0) {
		perror(what);
		exit(2);
	}
	return result;
}

struct guest {
	int kvm, vm, vcpu;
	uint8_t *ram;
	struct kvm_run *run;
};

/* A guest that will run `program` in ring 3, at CODE + 0x80. Any exception of it ends KVM_RUN with EAX at port 0x3f8. */
static struct guest make_guest(const uint8_t *program, size_t length, uint64_t xcr0)
{
	/* mov dx, 0x3f8; out dx, eax */
	static const uint8_t handler[] = { 0x66, 0xba, 0xf8, 0x03, 0xef };
	/* IRETQ to ring 3 at CODE + 0x80, with a stack at 0x1ff000. */
	static const uint8_t kernel[] = { 0x6a, 0x23, 0x68, 0x00, 0xf0, 0x1f, 0x00, 0x6a, 0x02, 0x6a, 0x2b,
					  0x68, 0x80, 0x00, 0x10, 0x00, 0x48, 0xcf };
	static const uint64_t segments[] = { 0, 0, 0xaf9b000000ffff, 0xcf93000000ffff, 0xcff3000000ffff, 0xaffb000000ffff,
					     0x67 | (uint64_t)TSS << 16 | 0x89ull << 40, 0 };
	const int kvm = must("/dev/kvm", open("/dev/kvm", O_RDWR));
	const int vm = must("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
	uint8_t *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = { .memory_size = RAM, .userspace_addr = (uintptr_t)ram };
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof(*cpuid) + 256 * sizeof(struct kvm_cpuid_entry2));
	struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs = { { .value = xcr0 } } };
	struct kvm_regs regs = { .rip = CODE, .rsp = STACK, .rflags = 2 };
	struct kvm_sregs sregs;

	must("KVM_CREATE_IRQCHIP", ioctl(vm, KVM_CREATE_IRQCHIP, 0));
	must("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	const int vcpu = must("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
	cpuid->nent = 256;
	must("KVM_GET_SUPPORTED_CPUID", ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid));
	must("KVM_SET_CPUID2", ioctl(vcpu, KVM_SET_CPUID2, cpuid));

	/* The first 4 MiB, for both rings. */
	*(uint64_t *)(ram + PML4) = 0x2007;
	*(uint64_t *)(ram + 0x2000) = 0x3007;
	*(uint64_t *)(ram + 0x3000) = 0x87;
	*(uint64_t *)(ram + 0x3008) = 0x200087;
	memcpy(ram + GDT, segments, sizeof(segments));
	*(uint64_t *)(ram + TSS + 4) = STACK;
	for (int vector = 0; vector < 32; vector++)
		*(uint64_t *)(ram + IDT + 16 * vector) = HANDLER | 0x10ull << 16 | 0x8e00ull << 32;
	memcpy(ram + HANDLER, handler, sizeof(handler));
	memcpy(ram + CODE, kernel, sizeof(kernel));
	memcpy(ram + CODE + 0x80, program, length);

	must("KVM_GET_SREGS", ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs = (struct kvm_segment){ .limit = ~0u, .selector = 0x10, .type = 0xb, .present = 1, .s = 1, .l = 1, .g = 1 };
	sregs.ss = (struct kvm_segment){ .limit = ~0u, .selector = 0x18, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
	sregs.ds = sregs.es = sregs.ss;
	sregs.tr = (struct kvm_segment){ .base = TSS, .limit = 0x67, .selector = 0x30, .type = 0xb, .present = 1 };
	sregs.gdt = (struct kvm_dtable){ .base = GDT, .limit = sizeof(segments) - 1 };
	sregs.idt = (struct kvm_dtable){ .base = IDT, .limit = 32 * 16 - 1 };
	sregs.cr0 = 0x80010011;
	sregs.cr3 = PML4;
	/* PAE, OSFXSR, OSXSAVE. */
	sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 18;
	sregs.efer = 0x500;
	must("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &sregs));
	must("KVM_SET_XCRS", ioctl(vcpu, KVM_SET_XCRS, &xcrs));
	must("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &regs));

	struct kvm_run *run = mmap(NULL, must("size", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE,
				   MAP_SHARED, vcpu, 0);
	return (struct guest){ kvm, vm, vcpu, ram, run };
}
