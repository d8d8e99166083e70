//! Memory-mapped registers, one plain load or store each: with other instructions KVM does not know what was meant. The
//! barriers order them with what devices read and write in memory.

use core::arch::asm;

/// A range of memory-mapped registers.
#[derive(Clone, Copy)]
pub struct Mmio(u64);

macro_rules! access {
    ($read:ident, $write:ident, $type:ty, $load:literal, $store:literal, $bits:literal) => {
        #[doc = concat!("Reads ", $bits, " bits at `offset`.")]
        pub fn $read(self, offset: u64) -> $type {
            let value: $type;
            // SAFETY: `new` promises device registers here.
            unsafe {
                asm!(
                    $load, "dmb oshld",
                    a = in(reg) self.0 + offset, v = out(reg) value,
                    options(nostack, preserves_flags)
                );
            };
            value
        }

        #[doc = concat!("Writes ", $bits, " bits at `offset`.")]
        pub fn $write(self, offset: u64, value: $type) {
            // SAFETY: `new` promises device registers here.
            unsafe {
                asm!(
                    "dmb oshst", $store,
                    a = in(reg) self.0 + offset, v = in(reg) value,
                    options(nostack, preserves_flags)
                );
            };
        }
    };
}

impl Mmio {
    /// Registers from the virtual address `base` on.
    ///
    /// # Safety
    /// `base` is the address of device registers, mapped, and stays so while the value is used.
    pub const unsafe fn new(base: u64) -> Self {
        Self(base)
    }

    access!(read8, write8, u8, "ldrb {v:w}, [{a}]", "strb {v:w}, [{a}]", "8");
    access!(read16, write16, u16, "ldrh {v:w}, [{a}]", "strh {v:w}, [{a}]", "16");
    access!(read32, write32, u32, "ldr {v:w}, [{a}]", "str {v:w}, [{a}]", "32");
    access!(
        read64_whole,
        write64_whole,
        u64,
        "ldr {v}, [{a}]",
        "str {v}, [{a}]",
        "64"
    );

    /// The registers from `offset` on.
    pub fn at(self, offset: u64) -> Self {
        Self(self.0 + offset)
    }

    /// Their address.
    pub fn address(self) -> u64 {
        self.0
    }

    /// Writes 64 bits at `offset` as two halves, as virtio 1.2 §4.1.3.1 wants it.
    pub fn write64(self, offset: u64, value: u64) {
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }
}
