# Everything that runs outside ring 3: three ways in, one way down, and the exception handlers.
#
# Some KVM hosts interpret guest ring 0 instruction by instruction, and not all instructions. So this does as little as it
# can, with plain moves and arithmetic, and leaves the rest (building page tables, starting other vCPUs) to ring 3.
#
# AT&T syntax; names in braces are constants from main.rs.

.set CODE0, 0x08
.set DATA0, 0x10
.set CODE3, 0x18 | 3
.set DATA3, 0x20 | 3
.set CODE32, 0x28
.set TSS, 0x30

# What ring 3 is told about the way in: see main.rs.
.set BOOT_AP, 0
.set BOOT_PVH, 1
.set BOOT_LINUX, 2

.set TSS_RSP0, 4
.set TSS_IOMAP, 102
.set TSS_SIZE, 104
.set IOMAP_BYTES, 128                   # ports 0 to 0x3ff
.set STACK0, 4096                       # top of the stack for ring 0, in a per-vCPU area
.set STACK3, {PER_VCPU_SIZE} - 8        # as if called: 8 below a multiple of 16

.section .boot, "ax", @progbits
boot_start:

# PVH: 32-bit protected mode, flat segments, no paging, hvm_start_info in %ebx.
.code32
.globl pvh_entry
pvh_entry:
    cli
    movl %ebx, %esi
    movl $BOOT_PVH, %edi
    movl $boot_pml4, %eax
enter_long_mode:                        # %eax: page tables, %esi and %edi: for ring 3
    lgdtl gdt_pointer
    movl %eax, %cr3
    movl $0x620, %eax                   # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx              # EFER
    xorl %edx, %edx
    movl $0x100, %eax                   # LME
    wrmsr
    movl $0x80000033, %eax              # PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $CODE0, $ring0

# The other vCPUs: real mode at AP_START, where ring 3 copies this.
.code16
.globl ap_start
ap_start:
    cli
    lgdtl %cs:(ap_gdt_pointer - ap_start)
    movl $0x11, %eax                    # ET, PE
    movl %eax, %cr0
    ljmpl $CODE32, $ap_protected
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.globl ap_start_end
ap_start_end:

.code32
ap_protected:
    movl $DATA0, %eax
    movl %eax, %ds
    xorl %esi, %esi
    movl $BOOT_AP, %edi
    movl ${PML4}, %eax                  # the first vCPU has built these before it starts the others
    jmp enter_long_mode

# The 64-bit Linux entry: long mode, memory identity-mapped by the loader, boot_params in %rsi.
.code64
.globl linux_entry
linux_entry:
    cli
    movl $boot_pml4, %eax
    movq %rax, %cr3
    movl $0x620, %eax
    movq %rax, %cr4
    movl $0x80000033, %eax
    movq %rax, %cr0
    lgdt gdt_pointer
    movl $BOOT_LINUX, %edi
    movl ${PER_VCPU} + STACK0, %esp     # of the first vCPU, which this is
    pushq $CODE0
    pushq $ring0
    lretq

# 64-bit, ring 0, on this image's GDT and page tables. From here all vCPUs do the same.
ring0:
    movl $DATA0, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $1, %eax
    cpuid                               # here, because in ring 3 a host may leave CPUID to the hardware
    shrl $24, %ebx                      # the initial APIC ID: this vCPU's index
    cmpl ${MAX_VCPUS}, %ebx
    jae halt

    movl %ebx, %ecx
    shll ${PER_VCPU_SHIFT}, %ecx
    addl ${PER_VCPU}, %ecx              # the per-vCPU area, and the task state segment in it
    leaq STACK0(%rcx), %rsp
    movq %rsp, TSS_RSP0(%rcx)
    movw $TSS_SIZE, TSS_IOMAP(%rcx)     # the bitmap is zero: ring 3 may use all its ports
    movb $0xff, TSS_SIZE + IOMAP_BYTES(%rcx)
    lidt idt_pointer
    movl %ebx, %eax
    shll $4, %eax
    addl $TSS, %eax
    movb $0x89, gdt + 5(%rax)           # not busy, should this vCPU have been started before
    ltr %ax

    pushq $DATA3
    leaq STACK3(%rcx), %rax
    pushq %rax
    pushq $2                            # no interrupts
    pushq $CODE3
    pushq $ring3
    movl %edi, %edx                     # ring3(index, info, boot): %rsi is in place
    movl %ebx, %edi
    iretq

# Ring 3 asks for something only ring 0 can do by HLT, which raises #GP there: the handler knows these addresses.
.globl load_page_tables
load_page_tables:
    hlt
    ret
.globl park
park:
    hlt
.globl wait_for_interrupt
wait_for_interrupt:
    hlt
    ret
.globl wait_for_doorbell
wait_for_doorbell:
    hlt
    ret

# Exceptions. Each gets a handler of 16 bytes that makes all frames alike: vector, error code, RIP, CS, RFLAGS, RSP, SS.
.balign 16
handlers:
.set vector, 0
.rept {DOORBELL}
    .balign 16
    .if vector == 13
    jmp general_protection
    .elseif vector == {WAKE}
    jmp relayed
    .else
    .if !(vector == 8 || vector == 10 || vector == 11 || vector == 12 || vector == 14 || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    pushq $0
    .endif
    pushq $vector
    jmp fault
    .endif
    .set vector, vector + 1
.endr
.balign 16
    jmp doorbell
.balign 16

general_protection:
    cmpq $wait_for_doorbell, 8(%rsp)
    je 4f
    cmpq $wait_for_interrupt, 8(%rsp)
    je 2f
    cmpq $park, 8(%rsp)
    je halt
    cmpq $load_page_tables, 8(%rsp)
    je 1f
    pushq $13
fault:
    movq %rsp, %rdi
    subq ${PER_VCPU}, %rdi
    shrq ${PER_VCPU_SHIFT}, %rdi        # the index, from the stack
    movl %edi, %esi
    shll $12, %esi
    addl ${MAILBOX}, %esi
    movq (%rsp), %rax
    movq %rax, {FAULT_VECTOR}(%rsi)
    movq 8(%rsp), %rax
    movq %rax, {FAULT_ERROR}(%rsi)
    movq 16(%rsp), %rax
    movq %rax, {FAULT_RIP}(%rsi)
    movq 40(%rsp), %rax
    movq %rax, {FAULT_RSP}(%rsi)
    movq %cr2, %rax
    movq %rax, {FAULT_CR2}(%rsi)
    movl ${FAULTED}, %eax
    movq %rax, {STATE}(%rsi)
    movl {ACK_SEQ}(%rsi), %eax
    shll $8, %eax
    orl %edi, %eax
    shll $8, %eax
    orl ${EVENT_FAULT}, %eax
    movl ${REPORT_PORT}, %edx
    outl %eax, %dx
halt:
    cli
    hlt
    jmp halt

1:  movl ${PML4}, %eax
    movq %rax, %cr3
    addq $8, %rsp                       # the error code
    incq (%rsp)                         # past the HLT
    iretq

2:  sti
sleep:
    hlt
    nop                                 # the doorbell alone has ended the HLT
woken:
    cli
    addq $8, %rsp
    incq (%rsp)
    iretq

4:  sti
doze:
    hlt
    cli
    addq $8, %rsp
    incq (%rsp)
    iretq

# Interrupts come in at `sleep`, behind its HLT, and at `doze`. At `doze` the task priority holds back relayed
# interrupts, because the idle loop would lose them.
relayed:
    pushq %rax
    cmpq $sleep, 8(%rsp)                # before the HLT: the vCPU must not halt now
    je 6f
    cmpq $sleep + 1, 8(%rsp)            # after it: a doorbell that comes next must not halt the vCPU again
    jne 5f
6:  movq $woken, 8(%rsp)
    jmp 5f

doorbell:
    pushq %rax
    cmpq $doze, 8(%rsp)                 # before the HLT, as above
    jne 3f
    incq 8(%rsp)
    jmp 5f
3:  cmpq $sleep + 1, 8(%rsp)            # the HLT of a relay: only a relayed interrupt ends it
    jne 5f
    decq 8(%rsp)
5:  movl ${APIC_EOI}, %eax
    movl $0, (%rax)
    popq %rax
    iretq

.section .boot.data, "aw", @progbits
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # code, ring 0, 64-bit
    .quad 0x00cf93000000ffff            # data, ring 0
    .quad 0x00affb000000ffff            # code, ring 3, 64-bit
    .quad 0x00cff3000000ffff            # data, ring 3
    .quad 0x00cf9b000000ffff            # code, ring 0, 32-bit
    .set base, {PER_VCPU}
    .rept {MAX_VCPUS}
    .quad (TSS_SIZE + IOMAP_BYTES) | ((base & 0xffffff) << 16) | (0x89 << 40) | ((base >> 24) << 56)
    .quad 0
    .set base, base + {PER_VCPU_SIZE}
    .endr
gdt_end:

.balign 16
idt:
    .set handler, {IMAGE_BASE} + (handlers - boot_start)
    .rept {DOORBELL} + 1
    .quad (handler & 0xffff) | (CODE0 << 16) | (0x8e00 << 32) | ((handler >> 16) << 48)
    .quad 0
    .set handler, handler + 16
    .endr
idt_end:

.balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 8
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

# The first GiB, one to one, until ring 3 has built the real tables. Accessed and dirty are set: no walk has to write.
.balign 4096
boot_pml4:
    .quad boot_pdpt + 0x27
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x27
    .fill 511, 8, 0
boot_pd:
    .set page, 0xe7
    .rept 512
    .quad page
    .set page, page + 0x200000
    .endr

.section .note.Xen, "a", @note
.balign 4
    .long 4, 4, 18                      # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry
.text
