/*
 * Whether a vCPU keeps a program's registers when signals end KVM_RUN: gcc -O2 -pthread -o kicks kicks.c && ./kicks SECONDS
 *
 * The guest's program compares its FS and GS base, by a load through each, and six registers, all the time in ring 3. A
 * second thread sends signals. After each the registers are read, looked at and set again, as a fork does.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#include "tworings.h"

enum { FS = 0x180000, GS = 0x181000, COUNT = 0x182000 };

/* Made by the assembler: what stands here is executed in the guest, at another address. */
extern const uint8_t program[], program_end[];
asm(".text\n"
    "program:\n"
    "	mov $0x1111111111111111, %rbx; mov $0x2222222222222222, %rbp; mov $0x3333333333333333, %rsi\n"
    "	mov $0x4444444444444444, %rdi; mov $0x5555555555555555, %r8; mov $0x6666666666666666, %r15\n"
    "	mov $0x182000, %r9\n"
    "	movq %rbx, %xmm5\n"
    "1:	mov $0xf5, %eax; cmpq $0x7777, %fs:0; jne 2f\n"
    "	mov $0x65, %eax; cmpq $0x7878, %gs:0; jne 2f\n"
    "	mov $0xb, %eax; mov $0x1111111111111111, %rdx; cmp %rdx, %rbx; jne 2f\n"
    "	mov $0xc, %eax; mov $0x2222222222222222, %rdx; cmp %rdx, %rbp; jne 2f\n"
    "	mov $0xd, %eax; mov $0x3333333333333333, %rdx; cmp %rdx, %rsi; jne 2f\n"
    "	mov $0xe, %eax; mov $0x4444444444444444, %rdx; cmp %rdx, %rdi; jne 2f\n"
    "	mov $0x8, %eax; mov $0x5555555555555555, %rdx; cmp %rdx, %r8; jne 2f\n"
    "	mov $0x15, %eax; mov $0x6666666666666666, %rdx; cmp %rdx, %r15; jne 2f\n"
    "	mov $0x5, %eax; movq %xmm5, %rdx; cmp %rdx, %rbx; jne 2f\n"
    "	mov $0x1ff000, %edx; mov $0x10, %eax; cmp %rdx, %rsp; jne 2f\n"
    "	incq (%r9)\n"
    "	jmp 1b\n"
    "2:	ud2\n"
    "program_end:\n");

static volatile int ended;
static pthread_t runner;
static struct guest guest;

static void on_kick(int number)
{
	(void)number;
}

static void *kick(void *unused)
{
	while (!ended) {
		const struct timespec pause = { 0, 20000 + rand() % 80000 };

		nanosleep(&pause, NULL);
		guest.run->immediate_exit = 1;
		pthread_kill(runner, SIGUSR1);
	}
	return unused;
}

int main(int count, char **words)
{
	const time_t end = time(NULL) + (count > 1 ? atol(words[1]) : 5);
	struct sigaction action = { .sa_handler = on_kick };
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	unsigned long kicks = 0, wrong = 0;
	pthread_t thread;

	guest = make_guest(program, program_end - program, 3);
	must("KVM_GET_SREGS", ioctl(guest.vcpu, KVM_GET_SREGS, &sregs));
	/* The bases that iret to ring 3 keeps. */
	sregs.fs = sregs.gs = sregs.ds;
	sregs.fs.selector = sregs.gs.selector = 0x23;
	sregs.fs.dpl = sregs.gs.dpl = 3;
	sregs.fs.base = FS;
	sregs.gs.base = GS;
	must("KVM_SET_SREGS", ioctl(guest.vcpu, KVM_SET_SREGS, &sregs));
	*(uint64_t *)(guest.ram + FS) = 0x7777;
	*(uint64_t *)(guest.ram + GS) = 0x7878;
	sigaction(SIGUSR1, &action, NULL);
	runner = pthread_self();
	must("pthread_create", -pthread_create(&thread, NULL, kick, NULL));
	while (time(NULL) < end) {
		if (ioctl(guest.vcpu, KVM_RUN, 0) == 0) {
			const uint32_t seen = *(uint32_t *)((uint8_t *)guest.run + guest.run->io.data_offset);

			printf("exit %u: the program found %#x wrong\n", guest.run->exit_reason, seen);
			wrong++;
			break;
		}
		if (errno != EINTR)
			must("KVM_RUN", -1);
		guest.run->immediate_exit = 0;
		kicks++;
		must("KVM_GET_REGS", ioctl(guest.vcpu, KVM_GET_REGS, &regs));
		must("KVM_GET_SREGS", ioctl(guest.vcpu, KVM_GET_SREGS, &sregs));
		if (sregs.fs.base != FS || sregs.gs.base != GS) {
			printf("KVM says FS base %#llx, GS base %#llx\n", sregs.fs.base, sregs.gs.base);
			wrong++;
		}
		if (kicks % 2) {
			must("KVM_SET_REGS", ioctl(guest.vcpu, KVM_SET_REGS, &regs));
			must("KVM_SET_SREGS", ioctl(guest.vcpu, KVM_SET_SREGS, &sregs));
		}
	}
	ended = 1;
	pthread_join(thread, NULL);
	printf("%lu kicks, %lu checks, %lu wrong\n", kicks, *(uint64_t *)(guest.ram + COUNT), wrong);
	return wrong != 0;
}
