/*
 * A guest program that checks the machine it runs on: registers, FS and GS base, x87 and SSE state, its stack, its heap,
 * results of system calls, signals, and that programs it starts end as they should.
 *
 *   selfcheck SECONDS [WORKERS [--wide]]
 *
 * WORKERS is a letter for each process: r for registers, t for two threads, c for system calls and signals, m for memory,
 * z for pages that are given back and had again, l for the C library's copies, p for programs. Without, it is rtcmzlp.
 *
 * Prints a line every two seconds, and one at the end, with counts since the start:
 *
 *   selfcheck: 12 s regs 51200000 fpu 800000 sys 1200 memory 512000 pages 340 libc 9900 sigs 80 execs 9 wide 0 errors 0 deaths 0
 *
 * What is wrong is printed when it is seen, in a line that begins with `selfcheck: wrong` or `selfcheck: died`. The exit
 * status is 1 if anything was.
 *
 * With --wide the workers `r` also keep values in the upper halves of YMM registers, if XCR0 says that programs may. They
 * are counted apart (`wide-errors`), because a guest's kernel that knows no AVX does not save them.
 *
 * Its own code uses no SSE but in the checks themselves, and no TLS but for them: what it says of a thread that has
 * lost its FS base has to be right.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { GPRS = 15, SPINS = 64, PAGE = 4096, PAGES = 24 };

/* Shared by all processes of a run. */
struct counts {
	volatile uint64_t regs, fpu, sys, memory, pages, libc, sigs, execs, wide, errors, wide_errors, deaths;
	volatile int stop;
};
static struct counts *counts;

static void add(volatile uint64_t *count, uint64_t n)
{
	__atomic_fetch_add(count, n, __ATOMIC_RELAXED);
}

/* --- words to the console, also from a handler in a thread whose FS base is gone --- */

static long raw(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
	long result;

	asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
		     : "rcx", "r11", "memory");
	return result;
}

struct text {
	int length;
	char bytes[400];
};

static void put(struct text *text, const char *word)
{
	while (*word && text->length < (int)sizeof(text->bytes) - 1)
		text->bytes[text->length++] = *word++;
}

static void put_hex(struct text *text, const char *name, uint64_t value)
{
	char digits[19] = "0x0", *end = digits + 2;

	put(text, " ");
	put(text, name);
	put(text, " ");
	for (int shift = 60; shift >= 0; shift -= 4)
		if (value >> shift || !shift)
			*end++ = "0123456789abcdef"[value >> shift & 15];
	*end = 0;
	put(text, digits);
}

static void say(struct text *text)
{
	text->bytes[text->length++] = '\n';
	raw(SYS_write, 1, (long)text->bytes, text->length, 0, 0, 0);
}

static void wrong(const char *what, uint64_t expected, uint64_t found)
{
	struct text text = { 0 };
	const int is_wide = !strncmp(what, "ymm", 3);

	add(is_wide ? &counts->wide_errors : &counts->errors, 1);
	/* Of the others a few are enough. */
	if (is_wide && counts->wide_errors > 8)
		return;
	put(&text, "selfcheck: wrong ");
	put(&text, what);
	put_hex(&text, "expected", expected);
	put_hex(&text, "found", found);
	put_hex(&text, "pid", raw(SYS_getpid, 0, 0, 0, 0, 0, 0));
	say(&text);
}

/* --- the registers --- */

struct fpu {
	uint16_t fcw, fsw;
	uint8_t ftw, reserved;
	uint16_t fop;
	uint64_t fip, fdp;
	uint32_t mxcsr, mxcsr_mask;
	uint64_t st[8][2], xmm[16][2], rest[12];
} __attribute__((aligned(16)));

/* What is in the registers, by numbers that the asm below knows. In TLS, so that each comparison needs the FS base too. */
struct own {
	uint64_t self;		/* 0 */
	uint64_t gpr[GPRS];	/* 8: rax rbx rcx rdx rsi rdi rbp r8-r15 */
	uint64_t found[GPRS];	/* 128 */
	uint64_t rsp;		/* 248 */
	uint64_t spins;		/* 256 */
	uint64_t saved_rsp;	/* 264 */
	struct fpu want;	/* 272 */
	struct fpu have;	/* 784 */
	uint64_t gs;		/* 1296: the value at GS:0 */
	uint64_t bad;		/* 1304 */
	uint64_t flags;		/* 1312: DF, AC and ID as they are to be */
	uint64_t flags_found;	/* 1320 */
	uint64_t ymm[4], ymm_have[16][2];
};
static __thread struct own own __attribute__((aligned(16)));
static __thread uint64_t gs_page[8];

/*
 * Fills all registers, compares them SPINS times, and leaves what they are in `own`. own.bad is the number of the first
 * register that differed (from 1 on), 100 for RSP, 101 for GS.
 */
void check_registers(struct own *self);
asm(".text\n"
    ".globl check_registers\n"
    "check_registers:\n"
    "	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15; pushfq\n"
    "	mov %rsp, 264(%rdi)\n"
    "	movq $0, 1304(%rdi)\n"
    "	movq $" "64" ", 256(%rdi)\n"
    "	fxrstor64 272(%rdi)\n"
    "	mov 8(%rdi), %rax; mov 16(%rdi), %rbx; mov 24(%rdi), %rcx; mov 32(%rdi), %rdx; mov 40(%rdi), %rsi\n"
    "	mov 56(%rdi), %rbp; mov 64(%rdi), %r8; mov 72(%rdi), %r9; mov 80(%rdi), %r10; mov 88(%rdi), %r11\n"
    "	mov 96(%rdi), %r12; mov 104(%rdi), %r13; mov 112(%rdi), %r14; mov 120(%rdi), %r15\n"
    "	push 1312(%rdi); popfq\n"
    "	mov %rsi, -8(%rsp); mov %rsi, -64(%rsp); mov %rsi, -128(%rsp)\n"
    "	mov 48(%rdi), %rdi\n"
    "1:\n"
    ".macro same register, offset\n"
    "	cmp %\\register, %fs:own@tpoff+\\offset\n"
    "	jne 2f\n"
    ".endm\n"
    "	same rax, 8; same rbx, 16; same rcx, 24; same rdx, 32; same rsi, 40; same rdi, 48; same rbp, 56; same r8, 64\n"
    "	same r9, 72; same r10, 80; same r11, 88; same r12, 96; same r13, 104; same r14, 112; same r15, 120\n"
    "	cmp %rsp, %fs:own@tpoff+264\n"
    "	jne 2f\n"
    /* The red zone, which belongs to the program. */
    "	cmp %rsi, -8(%rsp)\n"
    "	jne 2f\n"
    "	cmp %rsi, -64(%rsp)\n"
    "	jne 2f\n"
    "	cmp %rsi, -128(%rsp)\n"
    "	jne 2f\n"
    /* GS:0 holds what own.gs holds; RAX is put back. */
    "	mov %gs:0, %rax\n"
    "	cmp %rax, %fs:own@tpoff+1296\n"
    "	jne 2f\n"
    "	mov %fs:own@tpoff+8, %rax\n"
    "	decq %fs:own@tpoff+256\n"
    "	jnz 1b\n"
    "	jmp 3f\n"
    "2:	movq $1, %fs:own@tpoff+1304\n"
    "3:	mov %rax, %fs:own@tpoff+128; mov %rbx, %fs:own@tpoff+136; mov %rcx, %fs:own@tpoff+144\n"
    "	mov %rdx, %fs:own@tpoff+152; mov %rsi, %fs:own@tpoff+160; mov %rdi, %fs:own@tpoff+168\n"
    "	mov %rbp, %fs:own@tpoff+176; mov %r8, %fs:own@tpoff+184; mov %r9, %fs:own@tpoff+192\n"
    "	mov %r10, %fs:own@tpoff+200; mov %r11, %fs:own@tpoff+208; mov %r12, %fs:own@tpoff+216\n"
    "	mov %r13, %fs:own@tpoff+224; mov %r14, %fs:own@tpoff+232; mov %r15, %fs:own@tpoff+240\n"
    "	mov %rsp, %fs:own@tpoff+248\n"
    "	pushfq; pop %rdi; mov %rdi, %fs:own@tpoff+1320\n"
    "	mov %fs:own@tpoff, %rdi\n"
    "	fxsave64 784(%rdi)\n"
    "	mov 264(%rdi), %rsp\n"
    "	popfq; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
    "	cld\n"
    "	emms\n"
    "	ret\n");

/* As above, of the upper halves of YMM0-YMM15. They are what own.ymm says for `rounds` rounds. */
static void __attribute__((target("avx"), noinline)) check_wide(struct own *self, uint64_t rounds)
{
	asm volatile(
		"vmovdqu %1, %%ymm0; vmovdqa %%ymm0, %%ymm1; vmovdqa %%ymm0, %%ymm7; vmovdqa %%ymm0, %%ymm15\n"
		"1: dec %0; jnz 1b\n"
		"vextractf128 $1, %%ymm0, 0(%2); vextractf128 $1, %%ymm1, 16(%2)\n"
		"vextractf128 $1, %%ymm7, 32(%2); vextractf128 $1, %%ymm15, 48(%2)\n"
		"vzeroupper\n"
		: "+r"(rounds) : "m"(self->ymm), "r"(self->ymm_have)
		: "memory", "cc", "xmm0", "xmm1", "xmm7", "xmm15");
}

static uint64_t next(uint64_t *state)
{
	*state = *state * 6364136223846793005u + 1442695040888963407u;
	return *state ^ *state >> 29;
}

static void prepare(uint64_t seed)
{
	static const uint32_t rounding = 0x6000;

	own.self = (uint64_t)&own;
	for (int n = 0; n < GPRS; n++)
		own.gpr[n] = next(&seed);
	memset(&own.want, 0, sizeof(own.want));
	/* Other rounding than anybody's default, and two numbers on the x87 stack. */
	own.want.fcw = 0x0f7f;
	own.want.mxcsr = 0x1f80 | rounding;
	own.want.ftw = 0xc0;
	own.want.fsw = 6 << 11;
	for (int n = 0; n < 2; n++) {
		own.want.st[n][0] = next(&seed) | 1ull << 63;
		own.want.st[n][1] = 0x3fff + n;
	}
	for (int n = 0; n < 16; n++)
		for (int half = 0; half < 2; half++)
			own.want.xmm[n][half] = next(&seed);
	for (int n = 0; n < 4; n++)
		own.ymm[n] = next(&seed);
	/* The direction flag, and the one that says that there is CPUID. */
	own.flags = 0x202 | (seed & 1) << 10 | (seed >> 1 & 1) << 21;
	own.gs = next(&seed);
	gs_page[0] = own.gs;
	raw(SYS_arch_prctl, ARCH_SET_GS, (long)gs_page, 0, 0, 0, 0);
}

static void compare(void)
{
	static const char *const names[GPRS] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
						 "r9", "r10", "r11", "r12", "r13", "r14", "r15" };
	const struct fpu *want = &own.want, *have = &own.have;

	if (own.bad) {
		struct text text = { 0 };

		put(&text, "selfcheck: registers differed");
		put_hex(&text, "spins-left", own.spins);
		say(&text);
		for (int n = 0; n < GPRS; n++)
			if (own.found[n] != own.gpr[n] && (n || own.found[n] != own.gs))
				wrong(names[n], own.gpr[n], own.found[n]);
		if (own.rsp != own.saved_rsp)
			wrong("rsp", own.saved_rsp, own.rsp);
		if (own.found[0] != own.gpr[0])
			wrong("rax-or-gs", own.gs, own.found[0]);
	}
	if ((own.flags_found ^ own.flags) & (1 << 10 | 1 << 21 | 1 << 18 | 1 << 14 | 1 << 8))
		wrong("flags", own.flags, own.flags_found);
	if (have->fcw != want->fcw)
		wrong("fcw", want->fcw, have->fcw);
	if (have->fsw != want->fsw)
		wrong("fsw", want->fsw, have->fsw);
	if (have->ftw != want->ftw)
		wrong("ftw", want->ftw, have->ftw);
	if (have->mxcsr != want->mxcsr)
		wrong("mxcsr", want->mxcsr, have->mxcsr);
	for (int n = 0; n < 2; n++)
		if (have->st[n][0] != want->st[n][0] || (uint16_t)have->st[n][1] != want->st[n][1])
			wrong("st", want->st[n][0], have->st[n][0]);
	for (int n = 0; n < 16; n++)
		for (int half = 0; half < 2; half++)
			if (have->xmm[n][half] != want->xmm[n][half])
				wrong("xmm", want->xmm[n][half], have->xmm[n][half]);
}

static void registers_once(void)
{
	check_registers(&own);
	compare();
	add(&counts->regs, SPINS);
	add(&counts->fpu, 1);
}

static void wide_once(void)
{
	check_wide(&own, 20000);
	for (int n = 0; n < 4; n++)
		for (int half = 0; half < 2; half++)
			if (own.ymm_have[n][half] != own.ymm[2 + half])
				wrong("ymm", own.ymm[2 + half], own.ymm_have[n][half]);
	add(&counts->wide, 1);
}

/* --- a signal that nobody sent --- */

static void died(int number, siginfo_t *info, void *context)
{
	const ucontext_t *ucontext = context;
	const greg_t *gregs = ucontext->uc_mcontext.gregs;
	uint64_t fs = 0, gs = 0;
	struct text text = { 0 };

	raw(SYS_arch_prctl, ARCH_GET_FS, (long)&fs, 0, 0, 0, 0);
	raw(SYS_arch_prctl, ARCH_GET_GS, (long)&gs, 0, 0, 0, 0);
	put(&text, "selfcheck: died");
	put_hex(&text, "signal", number);
	put_hex(&text, "code", (uint32_t)info->si_code);
	put_hex(&text, "at", (uint64_t)info->si_addr);
	put_hex(&text, "rip", gregs[REG_RIP]);
	put_hex(&text, "rsp", gregs[REG_RSP]);
	put_hex(&text, "err", gregs[REG_ERR]);
	put_hex(&text, "trap", gregs[REG_TRAPNO]);
	put_hex(&text, "cr2", gregs[REG_CR2]);
	put_hex(&text, "rax", gregs[REG_RAX]);
	put_hex(&text, "rcx", gregs[REG_RCX]);
	put_hex(&text, "r11", gregs[REG_R11]);
	put_hex(&text, "fs", fs);
	put_hex(&text, "gs", gs);
	say(&text);
	raw(SYS_exit_group, 77, 0, 0, 0, 0, 0);
}

static void on_alternate_stack(void)
{
	stack_t stack = { .ss_size = 65536, .ss_sp = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) };
	struct sigaction action = { .sa_sigaction = died, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	sigaltstack(&stack, NULL);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGILL, &action, NULL);
	sigaction(SIGFPE, &action, NULL);
	sigaction(SIGTRAP, &action, NULL);
	sigaction(SIGSYS, &action, NULL);
}

/* --- workers --- */

static int wide;

static void work_registers(uint64_t seed)
{
	prepare(seed);
	while (!counts->stop) {
		for (int n = 0; n < 256; n++)
			registers_once();
		if (wide)
			for (int n = 0; n < 4; n++)
				wide_once();
	}
}

/* Two threads, each with its own TLS and GS, that also give up the processor. */
static void *thread_main(void *seed)
{
	on_alternate_stack();
	prepare((uint64_t)seed);
	while (!counts->stop) {
		for (int n = 0; n < 64; n++)
			registers_once();
		if (own.self != (uint64_t)&own)
			wrong("tls", (uint64_t)&own, own.self);
		raw(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
		add(&counts->sys, 1);
	}
	return NULL;
}

static void work_threads(uint64_t seed)
{
	pthread_t threads[2];

	for (int n = 0; n < 2; n++)
		if (pthread_create(&threads[n], NULL, thread_main, (void *)(seed + n)))
			wrong("pthread_create", 0, errno);
	for (int n = 0; n < 2; n++)
		pthread_join(threads[n], NULL);
}

/* System calls: that they do what they are asked, and leave all registers but RAX, RCX and R11. */
static long checked_call(long number, long a, long b, long c)
{
	uint64_t kept[9], seed = number * 77 + a;
	long result;

	for (int n = 0; n < 9; n++)
		kept[n] = next(&seed);
	asm volatile(
		"push %%rbp; push %%rbx; push %%r12; push %%r13; push %%r14; push %%r15\n"
		"push %[kept]; \n"
		"mov %[kept], %%r15\n"
		"mov 0(%%r15), %%rbx; mov 8(%%r15), %%rbp; mov 16(%%r15), %%r8; mov 24(%%r15), %%r9; mov 32(%%r15), %%r10\n"
		"mov 40(%%r15), %%r12; mov 48(%%r15), %%r13; mov 56(%%r15), %%r14; mov 64(%%r15), %%r15\n"
		"syscall\n"
		"push %%r15; mov 8(%%rsp), %%r15\n"
		"mov %%rbx, 0(%%r15); mov %%rbp, 8(%%r15); mov %%r8, 16(%%r15); mov %%r9, 24(%%r15); mov %%r10, 32(%%r15)\n"
		"mov %%r12, 40(%%r15); mov %%r13, 48(%%r15); mov %%r14, 56(%%r15); pop %%rbx; mov %%rbx, 64(%%r15)\n"
		"pop %%r15; pop %%r15; pop %%r14; pop %%r13; pop %%r12; pop %%rbx; pop %%rbp\n"
		: "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), [kept] "c"(kept)
		: "r8", "r9", "r10", "r11", "memory", "cc");
	seed = number * 77 + a;
	for (int n = 0; n < 9; n++) {
		const uint64_t want = next(&seed);

		if (kept[n] != want)
			wrong("register after a system call", want, kept[n]);
	}
	add(&counts->sys, 1);
	return result;
}

static volatile uint64_t alarms;

static void on_alarm(int number)
{
	(void)number;
	alarms++;
	add(&counts->sigs, 1);
}

static void work_calls(uint64_t seed)
{
	const struct itimerval often = { { 0, 30000 }, { 0, 30000 } };
	const long pid = raw(SYS_getpid, 0, 0, 0, 0, 0, 0);
	unsigned char out[300], in[300];
	int ends[2];

	prepare(seed);
	signal(SIGALRM, on_alarm);
	setitimer(ITIMER_REAL, &often, NULL);
	if (pipe(ends))
		wrong("pipe", 0, errno);
	while (!counts->stop) {
		/* Interrupted by alarms. */
		for (int n = 0; n < 64; n++)
			registers_once();
		if (checked_call(SYS_getpid, 1, 2, 3) != pid)
			wrong("getpid", pid, 0);
		if (checked_call(SYS_close, 999, 0, 0) != -EBADF)
			wrong("close", -EBADF, 0);
		const size_t length = 1 + next(&seed) % sizeof(out);
		for (size_t n = 0; n < length; n++)
			out[n] = next(&seed);
		memset(in, 0, sizeof(in));
		long wrote = checked_call(SYS_write, ends[1], (long)out, length);
		long got = wrote < 0 ? wrote : checked_call(SYS_read, ends[0], (long)in, sizeof(in));
		if (wrote != (long)length || got != (long)length)
			wrong("length in a pipe", length, got);
		else if (memcmp(out, in, length))
			wrong("bytes in a pipe", 0, 1);
		raw(SYS_kill, pid, SIGALRM, 0, 0, 0, 0);
	}
}

/*
 * Memory that is written all the time, without a system call: each page holds the round in which it was written last. A
 * translation that is older than a copy of the page would bring back an earlier round, or another VM's.
 */
static void work_memory(uint64_t seed)
{
	enum { AREA = 64 };
	uint64_t (*area)[PAGE / 8] = mmap(NULL, AREA * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	static uint64_t copy[8 * PAGE / 8];

	prepare(seed);
	for (uint64_t round = 1; !counts->stop; round++) {
		/* One instruction that is interrupted in its middle. */
		void *to = copy, *from = area;
		size_t left = sizeof(copy);

		asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(left) : : "memory");
		for (int n = 0; n < 8 * PAGE / 8; n++)
			if (copy[n] != ((volatile uint64_t *)area)[n])
				wrong("copy", area[0][n], copy[n]);
		/* A part of the pages is only read, for many rounds. */
		const int written = round % 16 ? AREA / 4 : AREA;

		for (int n = 0; n < AREA; n++) {
			volatile uint64_t *const page = area[n];
			const uint64_t before = n < AREA / 4 ? round - 1 : (round - 1) / 16 * 16;
			const uint64_t want = before ? before * 0x9e3779b97f4a7c15 + seed + n : 0;

			for (int m = n % 8; m < PAGE / 8; m += 128)
				if (page[m] != want)
					wrong("memory", want, page[m]);
			if (n < written)
				for (int m = n % 8; m < PAGE / 8; m += 128)
					page[m] = round * 0x9e3779b97f4a7c15 + seed + n;
		}
		add(&counts->memory, AREA);
	}
}

/* Memory that is given back and had again: read, when it is the page of zeros, and written, when it gets a page of its own. */
static void work_zeros(uint64_t seed)
{
	enum { AREA = 16 };
	const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	volatile uint64_t (*area)[PAGE / 8] = mmap(NULL, AREA * PAGE, protection, flags, -1, 0);

	prepare(seed);
	for (uint64_t round = 1; !counts->stop; round++) {
		/* Not madvise, which small kernels do not have. */
		if (mmap((void *)area, AREA * PAGE, protection, flags | MAP_FIXED, -1, 0) != area)
			wrong("mmap", (uint64_t)area, 0);
		for (int n = 0; n < AREA; n++) {
			const uint64_t value = round * 0x9e3779b97f4a7c15 + seed + n;

			for (int m = n; m < PAGE / 8; m += 64)
				if (area[n][m])
					wrong("page of zeros", 0, area[n][m]);
			area[n][n] = value;
			for (int m = n; m < PAGE / 8; m += 64)
				if (area[n][m] != (m == n ? value : 0))
					wrong("page just written", m == n ? value : 0, area[n][m]);
		}
		for (int n = 0; n < AREA; n++)
			if (area[n][n] != round * 0x9e3779b97f4a7c15 + seed + n)
				wrong("page written before", round * 0x9e3779b97f4a7c15 + seed + n, area[n][n]);
		add(&counts->pages, AREA);
		registers_once();
	}
}

/* Memory: pages that are new, filled, copied after a fork, and given back. And programs: fork, exec, exit status. */
static void work_programs(uint64_t seed, char *const self)
{
	char *const arguments[] = { self, "--program", NULL };
	static uint64_t kept[PAGES][PAGE / 8];
	uint64_t (*pages)[PAGE / 8];

	prepare(seed);
	for (int n = 0; n < PAGES; n++)
		for (int m = 0; m < PAGE / 8; m++)
			kept[n][m] = seed * n + m;
	for (uint64_t round = 0; !counts->stop; round++) {
		pages = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		for (int n = 0; n < PAGES; n++) {
			for (int m = 0; m < PAGE / 8; m++)
				if (pages[n][m])
					wrong("new page", 0, pages[n][m]);
			for (int m = 0; m < PAGE / 8; m++)
				pages[n][m] = round * n + m;
		}
		pid_t child = fork();
		if (!child) {
			for (int n = 0; n < PAGES; n++)
				for (int m = 0; m < PAGE / 8; m++) {
					if (pages[n][m] != round * n + m)
						wrong("page in a child", round * n + m, pages[n][m]);
					pages[n][m] = ~0ull;
				}
			for (int n = 0; n < 64; n++)
				registers_once();
			if (round % 2)
				raw(SYS_exit_group, 42, 0, 0, 0, 0, 0);
			execv(self, arguments);
			raw(SYS_exit_group, 43, 0, 0, 0, 0, 0);
		}
		for (int n = 0; n < PAGES; n++)
			for (int m = 0; m < PAGE / 8; m++) {
				if (pages[n][m] != round * n + m)
					wrong("page of a parent", round * n + m, pages[n][m]);
				if (kept[n][m] != seed * n + m)
					wrong("page kept", seed * n + m, kept[n][m]);
			}
		add(&counts->pages, 3 * PAGES);
		int status = -1;
		if (child < 0)
			wrong("fork", 0, errno);
		else if (waitpid(child, &status, 0) != child || status != 42 << 8) {
			wrong("status of a program", 42 << 8, status);
			add(&counts->deaths, 1);
		}
		add(&counts->execs, 1);
		munmap(pages, PAGES * PAGE);
	}
}

/* The C library's copies, which use the widest registers that it takes the CPU to have. */
static void work_library(uint64_t seed)
{
	static unsigned char from[512], to[512];
	static void *(*volatile copy)(void *, const void *, size_t) = memcpy;
	static size_t (*volatile length_of)(const char *) = strlen;

	prepare(seed);
	for (size_t n = 0; n < sizeof(from); n++)
		from[n] = next(&seed) | 1;
	from[sizeof(from) - 1] = 0;
	for (uint64_t round = 0; !counts->stop; round++) {
		for (size_t length = 32; length < 256; length += 7) {
			copy(to, from + round % 64, length);
			for (size_t n = 0; n < length; n++)
				if (((volatile unsigned char *)to)[n] != from[round % 64 + n])
					wrong("memcpy", from[round % 64 + n], to[n]);
		}
		if (length_of((char *)from + round % 64) != sizeof(from) - 1 - round % 64)
			wrong("strlen", sizeof(from) - 1, 0);
		add(&counts->libc, 33);
	}
}

/* What is executed: start-up code has run, its TLS holds its first values, and memory its data. */
static __thread uint64_t first_value = 0x1122334455667788;
static uint64_t data[64] = { [63] = 0x8877665544332211 };

static int program(void)
{
	char text[64];

	if (first_value != 0x1122334455667788 || data[63] != 0x8877665544332211 || data[0])
		return 44;
	snprintf(text, sizeof(text), "%d %s %.3f", 1234567, "words", 2.5);
	return strcmp(text, "1234567 words 2.500") ? 45 : 42;
}

/* --- all of it --- */

enum { MAX_WORKERS = 16 };
static const char *kinds = "rtcmzlp";

static pid_t start(int which, char *self)
{
	const pid_t pid = fork();

	if (pid)
		return pid;
	on_alternate_stack();
	const uint64_t seed = 1000 * (which + 1);
	switch (kinds[which]) {
	case 'r': work_registers(seed); break;
	case 't': work_threads(seed); break;
	case 'c': work_calls(seed); break;
	case 'm': work_memory(seed); break;
	case 'z': work_zeros(seed); break;
	case 'l': work_library(seed); break;
	default: work_programs(seed, self); break;
	}
	raw(SYS_exit_group, 0, 0, 0, 0, 0, 0);
	return 0;
}

static void report(time_t seconds)
{
	printf("selfcheck: %ld s regs %lu fpu %lu sys %lu memory %lu pages %lu libc %lu sigs %lu execs %lu wide %lu errors %lu wide-errors %lu deaths %lu\n",
	       (long)seconds, counts->regs, counts->fpu, counts->sys, counts->memory, counts->pages, counts->libc, counts->sigs, counts->execs, counts->wide,
	       counts->errors, counts->wide_errors, counts->deaths);
	fflush(stdout);
}

static time_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec;
}

/* What the CPU shows to programs: XCR0, or 0 where the kernel has not enabled XSAVE. */
static uint64_t xcr0(void)
{
	uint32_t eax = 1, ebx, ecx = 0, edx;

	asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
	if (!(ecx >> 27 & 1))
		return 0;
	asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
	return (uint64_t)edx << 32 | eax;
}

int main(int count, char **words)
{
	pid_t workers[MAX_WORKERS];
	time_t begun, last, seconds;

	if (count == 2 && !strcmp(words[1], "--program"))
		return program();
	if (count < 2 || (seconds = atol(words[1])) <= 0) {
		fprintf(stderr, "usage: selfcheck SECONDS [WORKERS [--wide]]\n");
		return 2;
	}
	if (count > 2)
		kinds = words[2];
	/* Bits 1 and 2: SSE and AVX. */
	wide = count > 3 && !strcmp(words[3], "--wide") && (xcr0() & 6) == 6;
	const int number = strlen(kinds) < MAX_WORKERS ? strlen(kinds) : MAX_WORKERS;
	counts = mmap(NULL, sizeof(*counts), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (counts == MAP_FAILED)
		return 2;
	printf("selfcheck: XCR0 %#lx\n", xcr0());
	fflush(stdout);
	for (int n = 0; n < number; n++)
		workers[n] = start(n, "/proc/self/exe");
	begun = last = now();
	while (now() < begun + seconds) {
		int status;
		const pid_t pid = waitpid(-1, &status, WNOHANG);

		for (int n = 0; pid > 0 && n < number; n++)
			if (workers[n] == pid) {
				printf("selfcheck: died worker %d status %#x\n", n, status);
				add(&counts->deaths, 1);
				workers[n] = start(n, "/proc/self/exe");
			}
		usleep(200000);
		if (now() >= last + 2) {
			last = now();
			report(last - begun);
		}
	}
	counts->stop = 1;
	for (int n = 0; n < number; n++) {
		int status = 0;

		if (waitpid(workers[n], &status, 0) == workers[n] && status) {
			printf("selfcheck: died worker %d status %#x\n", n, status);
			add(&counts->deaths, 1);
		}
	}
	report(now() - begun);
	printf("selfcheck: done\n");
	return counts->errors || counts->deaths || counts->wide_errors;
}
