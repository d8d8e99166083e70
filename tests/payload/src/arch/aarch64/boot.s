// Image header, entry, exception vectors and the first page tables of the guest.
//
// The VMM loads the image 4 MiB above the start of RAM and enters it at EL1 with the MMU off and interrupts masked, the
// device tree's address in x0 (Linux, Documentation/arch/arm64/booting.rst). The page tables are complete when the image
// is loaded, so nothing is written before the MMU is on: what a cache holds and what memory holds cannot differ.

.set IMAGE, 0x40400000
.set IMAGE_BYTES, 0xc00000          // up to the heap's end (boot.rs): the VMM puts nothing else there
.set UART, 0x09000000

.set DEVICE, 0x0060000000000401     // never executed, accessed, attributes 0, block
.set NORMAL, 0x0000000000000705     // accessed, inner shareable, attributes 1, block
.set MAIR, 0xff04                   // 0: device nGnRE, 1: normal write-back
.set TCR, 0x80903510                // 48 bits, 4 KiB pages, walks write-back and inner shareable, no upper half
.set SCTLR, 0x30d01805              // MMU and caches on, and the bits that are always one

.section .boot, "awx", %progbits
.globl image_start
image_start:
    b entry
    .long 0
    .quad 0                         // offset from a multiple of 2 MiB
    .quad IMAGE_BYTES
    .quad 2                         // little-endian, 4 KiB pages
    .quad 0, 0, 0
    .ascii "ARM\x64"
    .long 0

entry:
    mov x19, x0
    adr x1, image_start
    ldr x2, =IMAGE
    cmp x1, x2
    b.ne misplaced
    bl mmu_on
    ldr x1, =bss_start
    ldr x2, =bss_end
1:  stp xzr, xzr, [x1], #16
    cmp x1, x2
    b.lo 1b
    ldr x1, =boot_stack_top
    mov sp, x1
    mov x0, x19
    b payload_main

// The image is not where it was linked for. All that can be said is one character.
misplaced:
    ldr x1, =UART
    mov w0, #'!'
    str w0, [x1]
1:  wfi
    b 1b

// Other processors, started by PSCI with the address of their stack's top and their mailbox in x0. It is read with the
// MMU on, as it was written.
.globl processor_entry
processor_entry:
    mov x19, x0
    bl mmu_on
    ldp x1, x0, [x19]
    mov sp, x1
    b processor_main

mmu_on:
    ldr x1, =MAIR
    msr mair_el1, x1
    mrs x2, id_aa64mmfr0_el1        // PARange, as far as 48 bits, is the size of physical addresses
    and x2, x2, #0xf
    mov x3, #5
    cmp x2, x3
    csel x2, x3, x2, hi
    ldr x1, =TCR
    orr x1, x1, x2, lsl #32
    msr tcr_el1, x1
    ldr x1, =page_tables
    msr ttbr0_el1, x1
    ldr x1, =vectors
    msr vbar_el1, x1
    mov x1, #0x300000               // floating point does not trap
    msr cpacr_el1, x1
    isb
    tlbi vmalle1
    ic iallu
    dsb nsh
    isb
    ldr x1, =SCTLR
    msr sctlr_el1, x1
    isb
    ret

// Counts an interrupt by its vector: LPIs from 8192 on and shared ones have their number's low part, SGI 0 has 0xe0. The
// virtual timer's, 27, is a level: the timer goes off.
irq:
    stp x0, x1, [sp, #-48]!
    stp x2, x3, [sp, #16]
    str x4, [sp, #32]
    mrs x0, icc_iar1_el1
    dsb sy
    mov x1, x0
    cbz x0, 1f
    cmp x0, #27
    b.eq 2f
    cmp x0, #0x2000
    b.lo 3f
    sub x1, x0, #0x2000
    b 3f
1:  mov x1, #0xe0
    b 3f
2:  msr cntv_ctl_el0, xzr
    isb
3:  cmp x1, #255
    b.hi 5f
    ldr x2, =vector_counts
    add x2, x2, x1, lsl #3
4:  ldaxr x3, [x2]
    add x3, x3, #1
    stlxr w4, x3, [x2]
    cbnz w4, 4b
5:  and x1, x0, #0xfffffffffffffffc
    cmp x1, #1020                   // 1020 to 1023: there was none
    b.eq 6f
    msr icc_eoir1_el1, x0
6:  ldr x4, [sp, #32]
    ldp x2, x3, [sp, #16]
    ldp x0, x1, [sp], #48
    eret

// x0 = number of the exception vector: report, and stop.
fault:
    mrs x1, esr_el1
    mrs x2, elr_el1
    mrs x3, far_el1
    mov x4, sp
    ldr x5, =fault_stack_top
    mov sp, x5
    b fault_main

.ltorg

.balign 2048
vectors:
.set vector, 0
.rept 16
    .balign 128
    .if vector == 5
    b irq
    .else
    mov x0, #vector
    b fault
    .endif
    .set vector, vector + 1
.endr

// The first GiB is devices, the second RAM; what lies higher is mapped when needed (paging.rs).
.balign 4096
.globl page_tables
page_tables:
    .quad first_table + 3
    .fill 511, 8, 0
first_table:
    .quad DEVICE
    .quad 0x40000000 + NORMAL
    .fill 510, 8, 0
