/* The guest that is compared: it writes MIB mebibytes, and then a byte to COM1, over and over. Entered by
   PVH, so that each VMM can load it: 32-bit protected mode, no paging, flat segments.

   gcc -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-T,guest.ld -DMIB=64 -o guest guest.S */

    .section .note.Xen, "a", @note
    .align 4
    .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long _start

    .text
    .code32
    .globl _start
_start:
    mov $0x1000000, %edi            /* From 16 MiB on. */
    mov $(MIB * 256), %ecx
1:  mov %edi, (%edi)
    add $4096, %edi
    dec %ecx
    jnz 1b
    mov $0x3f8, %dx
    mov $'!', %al
2:  out %al, %dx
    jmp 2b
