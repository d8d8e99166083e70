# Entry, descriptor tables, page tables and the ring-0 stubs of the guest.
#
# The section stands at 1 MiB (link.ld) and every table in it at a fixed offset, so that the tables are complete when
# the image is loaded: entering ring 3 takes some 40 instructions. That matters where a software KVM emulates ring 0.
# Ring 0 is integer-only; port I/O is open to ring 3 by an all-zero I/O bitmap.

.set BASE, 0x100000
.set STUBS, BASE + 0x1000
.set IDT, BASE + 0x2000
.set PML4, BASE + 0x3000
.set PDPT, BASE + 0x4000
.set PD, BASE + 0x5000
.set GDT, BASE + 0x9000
.set TSS, BASE + 0xb000
.set STACK0_TOP, BASE + 0xf000

.set USER_DATA, 0x1b
.set USER_CODE, 0x23
.set TSS_SELECTOR, 0x28
.set TSS_LIMIT, 104 + 8192

.section .note.Xen, "a", @note
    .align 4
    .long 4, 8, 18              # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "awx", @progbits

# PVH entry: 32-bit protected mode without paging, EBX = hvm_start_info. A command line that starts with "bench" asks
# for one byte on COM1 before anything else.
.code32
.globl pvh_entry
pvh_entry:
    movl 24(%ebx), %ecx
    cmpl $0x636e6562, (%ecx)
    jne 1f
    movl $0x3f8, %edx
    movb $'T', %al
    outb %al, %dx
1:  movb $0xff, %al             # the legacy interrupt controllers stay silent
    outb %al, $0x21
    outb %al, $0xa1
    lgdtl gdt_pointer
    movl $PML4, %eax
    movl %eax, %cr3
    movl $0x620, %eax           # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx      # EFER.LME
    xorl %edx, %edx
    movl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax      # PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $8, $pvh_long

.code64
pvh_long:
    movl $STACK0_TOP, %esp
    movl $TSS_SELECTOR, %eax
    movl $ring3_stack_top, %esi
    movl $payload_main, %ecx
    movl %ebx, %edi

# EAX = TSS selector, RSI = ring-3 stack, RCX = ring-3 entry, RDI = its argument. A System V function entry expects
# a return address on the stack, hence the 8.
enter_ring3:
    lidtq idt_pointer
    ltr %ax
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    subq $8, %rsi
    pushq $USER_DATA
    pushq %rsi
    pushq $0x202
    pushq $USER_CODE
    pushq %rcx
    iretq

# Application processors: copied to a page below 1 MiB, entered in real mode, straight to long mode.
.code16
.globl ap_trampoline
ap_trampoline:
    cli
    lgdtl %cs:(ap_gdt_pointer - ap_trampoline)
    movl $PML4, %eax
    movl %eax, %cr3
    movl $0x620, %eax
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    xorl %edx, %edx
    movl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax
    movl %eax, %cr0
    ljmpl $8, $ap_long
ap_gdt_pointer:
    .short 0x1fff
    .long GDT
.globl ap_trampoline_end
ap_trampoline_end:

.code64
ap_long:
    movl ap_args, %eax
    movq ap_args + 8, %rsp
    movq ap_args + 16, %rsi
    movq ap_args + 24, %rdi
    movl $processor_main, %ecx
    jmp enter_ring3

# What the next application processor is to use: TSS selector, ring-0 stack, ring-3 stack, argument.
.align 8
.globl ap_args
ap_args:
    .quad 0, 0, 0, 0

# Interrupt vectors 32 to 255: count, end of interrupt (x2APIC), back.
irq_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movl 24(%rsp), %eax
    lock incq vector_counts(,%rax,8)
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
    addq $8, %rsp
    iretq

nmi:
    lock incq vector_counts + 16
    iretq

# Ring 3's one way into ring 0: the ud2 at `ring0_call`, RAX = service (src/ring0.rs).
invalid_opcode:
    cmpq $ring0_call, (%rsp)
    jne invalid_opcode_fault
    addq $2, (%rsp)
    cmpl $1, %eax
    jb service_idle
    je service_wrmsr
    cmpl $3, %eax
    jb service_rdmsr
    je service_triple_fault
service_park:
    cli
    hlt
    jmp service_park

# Sleep until an interrupt unless the word at RDI is no longer RSI; RDX: nanoseconds until the APIC timer wakes us.
service_idle:
    cmpq %rsi, (%rdi)
    jne 1f
    testl %edx, %edx
    jz 2f
    movl %edx, %eax
    xorl %edx, %edx
    movl $0x838, %ecx
    wrmsr
2:  sti
    hlt
    cli
1:  iretq

service_wrmsr:
    movl %edi, %ecx
    movl %esi, %eax
    movq %rsi, %rdx
    shrq $32, %rdx
    wrmsr
    iretq

service_rdmsr:
    movl %edi, %ecx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    iretq

service_triple_fault:
    lidtq empty_idt
    ud2

.globl ring0_call
ring0_call:
    ud2
    ret

# Exceptions: keep what is known and report from ring 3 on a stack of its own.
invalid_opcode_fault:
    pushq $0
    pushq $6
fault_common:
    cld
    popq fault_record
    popq fault_record + 8
    movq (%rsp), %rax
    movq %rax, fault_record + 16
    movq 24(%rsp), %rax
    movq %rax, fault_record + 24
    movq %cr2, %rax
    movq %rax, fault_record + 32
    movq $fault_main, (%rsp)
    movq $USER_CODE, 8(%rsp)
    movq $0x202, 16(%rsp)
    movq $(fault_stack_top - 8), 24(%rsp)
    movq $USER_DATA, 32(%rsp)
    iretq

# Vector, error code, RIP, RSP, CR2.
.align 8
.globl fault_record
fault_record:
    .quad 0, 0, 0, 0, 0

.align 8
    .short 0
gdt_pointer:
    .short 0x1fff
    .long GDT
    .long 0
idt_pointer:
    .short 0xfff
    .quad IDT
empty_idt:
    .short 0
    .quad 0

# 256 stubs of 16 bytes.
.org 0x1000
.set vector, 0
.rept 256
    .balign 16, 0x90
    .if vector == 2
    jmp nmi
    .elseif vector == 6
    jmp invalid_opcode
    .elseif vector == 8 || vector == 17 || vector == 21
    pushq $vector
    jmp fault_common
    .elseif vector >= 10 && vector <= 14
    pushq $vector
    jmp fault_common
    .elseif vector < 32
    pushq $0
    pushq $vector
    jmp fault_common
    .else
    pushq $vector
    jmp irq_common
    .endif
    .set vector, vector + 1
.endr

# IDT: 64-bit interrupt gates.
.org 0x2000
.set vector, 0
.rept 256
    .short (STUBS + 16 * vector) & 0xffff
    .short 8
    .short 0x8e00
    .short (STUBS + 16 * vector) >> 16
    .quad 0
    .set vector, vector + 1
.endr

# Page tables: the first 4 GiB in pages of 2 MiB, open to ring 3, uncached from 3 GiB on. What lies higher is mapped
# by ring 3 itself (src/paging.rs): these tables are ordinary memory to it.
.org 0x3000
    .quad PDPT + 0x27
.org 0x4000
.globl page_directory_pointers
page_directory_pointers:
    .quad PD + 0x27, PD + 0x1027, PD + 0x2027, PD + 0x3027
.org 0x5000
.set page, 0
.rept 2048
    .if page < 1536
    .quad page * 0x200000 + 0xe7
    .else
    .quad page * 0x200000 + 0xff
    .endif
    .set page, page + 1
.endr

# GDT: null, ring-0 code and data, ring-3 data and code, one TSS for each of up to 256 processors.
.org 0x9000
.globl descriptor_table
descriptor_table:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .short TSS_LIMIT
    .short TSS & 0xffff
    .byte (TSS >> 16) & 0xff, 0x89, 0, TSS >> 24
    .quad 0

.org 0xb000
    .long 0
    .quad STACK0_TOP            # RSP0
    .org 0xb066
    .short 104                  # the I/O bitmap follows: 65,536 zero bits and a byte of ones
    .org 0xb000 + 104 + 8192
    .byte 0xff

# Ring-0 stack of the boot processor: up to STACK0_TOP.
.org 0xf000
