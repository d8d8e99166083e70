//! Port and memory-mapped I/O, one plain `mov`, `in` or `out` each: KVM has to decode the instruction.

use core::arch::asm;

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: port I/O does not touch the program's memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads 16 bits from an I/O port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads 32 bits from an I/O port.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: port I/O does not touch the program's memory; devices only reach memory they were given.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes 16 bits to an I/O port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as for `outb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

/// Writes 32 bits to an I/O port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as for `outb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// Writes all of `bytes` to an I/O port by one `rep outsb`.
pub fn outsb(port: u16, bytes: &[u8]) {
    // SAFETY: the instruction reads exactly `bytes`.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
            options(nostack, preserves_flags)
        );
    }
}

/// A range of memory-mapped registers.
#[derive(Clone, Copy)]
pub struct Mmio(u64);

impl Mmio {
    /// Registers from the virtual address `base` on.
    ///
    /// # Safety
    /// `base` is the address of device registers, mapped, and stays so while the value is used.
    pub const unsafe fn new(base: u64) -> Self {
        Self(base)
    }

    /// Reads 8 bits at `offset`.
    pub fn read8(self, offset: u64) -> u8 {
        let value;
        // SAFETY: `new` promises device registers here.
        unsafe {
            asm!(
                "mov {v}, byte ptr [{a}]",
                a = in(reg) self.0 + offset, v = out(reg_byte) value,
                options(nostack, preserves_flags)
            );
        };
        value
    }

    /// Reads 16 bits at `offset`.
    pub fn read16(self, offset: u64) -> u16 {
        let value;
        // SAFETY: `new` promises device registers here.
        unsafe {
            asm!(
                "mov {v:x}, word ptr [{a}]",
                a = in(reg) self.0 + offset, v = out(reg) value,
                options(nostack, preserves_flags)
            );
        };
        value
    }

    /// Reads 32 bits at `offset`.
    pub fn read32(self, offset: u64) -> u32 {
        let value;
        // SAFETY: `new` promises device registers here.
        unsafe {
            asm!(
                "mov {v:e}, dword ptr [{a}]",
                a = in(reg) self.0 + offset, v = out(reg) value,
                options(nostack, preserves_flags)
            );
        };
        value
    }

    /// Writes 8 bits at `offset`.
    pub fn write8(self, offset: u64, value: u8) {
        // SAFETY: `new` promises device registers here.
        unsafe {
            asm!(
                "mov byte ptr [{a}], {v}",
                a = in(reg) self.0 + offset, v = in(reg_byte) value,
                options(nostack, preserves_flags)
            );
        };
    }

    /// Writes 16 bits at `offset`.
    pub fn write16(self, offset: u64, value: u16) {
        // SAFETY: `new` promises device registers here.
        unsafe {
            asm!(
                "mov word ptr [{a}], {v:x}",
                a = in(reg) self.0 + offset, v = in(reg) value,
                options(nostack, preserves_flags)
            );
        };
    }

    /// Writes 32 bits at `offset`.
    pub fn write32(self, offset: u64, value: u32) {
        // SAFETY: `new` promises device registers here.
        unsafe {
            asm!(
                "mov dword ptr [{a}], {v:e}",
                a = in(reg) self.0 + offset, v = in(reg) value,
                options(nostack, preserves_flags)
            );
        };
    }

    /// Writes 64 bits at `offset` as two halves, as virtio 1.2 §4.1.3.1 wants it.
    pub fn write64(self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}
