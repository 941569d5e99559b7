/*
 * What XCR0 a guest's program reads, straight on /dev/kvm: gcc -o xcr0 xcr0.c && ./xcr0
 *
 * The guest has CR4.OSXSAVE set and its XCR0 is 3: x87 and SSE, no AVX. Its program executes XGETBV in ring 3, and then an
 * invalid opcode. The handler writes EAX to port 0x3f8. With hardware virtualization the program reads 3. kvm-pvm does not
 * load the guest's XCR0: it reads the host's.
 */
#include "tworings.h"

int main(void)
{
	/* xor ecx, ecx; xgetbv; ud2 */
	static const uint8_t program[] = { 0x31, 0xc9, 0x0f, 0x01, 0xd0, 0x0f, 0x0b };
	const struct guest guest = make_guest(program, sizeof(program), 3);
	struct kvm_xcrs xcrs;

	must("KVM_RUN", ioctl(guest.vcpu, KVM_RUN, 0));
	if (guest.run->exit_reason != KVM_EXIT_IO) {
		fprintf(stderr, "exit %u\n", guest.run->exit_reason);
		return 2;
	}
	const uint32_t seen = *(uint32_t *)((uint8_t *)guest.run + guest.run->io.data_offset);
	must("KVM_GET_XCRS", ioctl(guest.vcpu, KVM_GET_XCRS, &xcrs));
	printf("XCR0: KVM has %#llx for the guest, its program reads %#x\n", xcrs.xcrs[0].value, seen);
	return seen != xcrs.xcrs[0].value;
}
