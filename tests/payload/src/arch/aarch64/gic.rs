//! GICv3: distributor, redistributors and the processor's interface (Arm IHI 0069).

use super::io::Mmio;
use crate::acpi::{self, Acpi};
use crate::memory::block;
use crate::pci::map_registers;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::asm;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};

/// Affinity fields of MPIDR_EL1.
const AFFINITY: u64 = 0xff_00ff_ffff;
/// The virtual timer's private interrupt; boot.s knows it too.
const TIMER: u32 = 27;

const GICD_CTLR: u64 = 0;
/// Affinity routing and all groups on, whichever view of them we have.
const GICD_ON: u32 = 1 << 4 | 3;
const GICD_IGROUPR: u64 = 0x80;
const GICD_ISENABLER: u64 = 0x100;
const GICD_ICFGR: u64 = 0xc00;
const GICD_IROUTER: u64 = 0x6000;

const GICR_CTLR: u64 = 0;
const GICR_TYPER: u64 = 8;
const GICR_WAKER: u64 = 0x14;
const GICR_PROPBASER: u64 = 0x70;
const GICR_PENDBASER: u64 = 0x78;
const GICR_ENABLE_LPIS: u32 = 1;
const GICR_SLEEPING: u32 = 1 << 1 | 1 << 2;
/// The second frame of a redistributor: private interrupts.
const PRIVATE: u64 = 0x1_0000;
/// Bytes of a redistributor, and of one with frames for virtual LPIs.
const FRAMES: u64 = 0x2_0000;
const FRAMES_VIRTUAL: u64 = 0x4_0000;

/// Number of bits of LPI numbers: 8192 LPIs, the fewest that can be.
const ID_BITS: u64 = 14;
/// The first LPI's number.
pub const FIRST_LPI: u32 = 8192;
const LPIS: usize = (1 << ID_BITS) - FIRST_LPI as usize;
/// An LPI's property: priority, and enabled.
const LPI_ENABLED: u8 = 0xa3;
/// Tables are inner shareable and written back.
const SHARED_CACHED: u64 = 1 << 10 | 7 << 7;

struct Gic {
    distributor: Mmio,
    /// Ranges: registers and bytes.
    redistributors: Vec<(Mmio, u64)>,
}

static GIC: AtomicPtr<Gic> = AtomicPtr::new(null_mut());

fn gic() -> Result<&'static Gic, String> {
    // SAFETY: null, or a value that is never freed nor changed.
    unsafe { GIC.load(Ordering::Acquire).as_ref() }.ok_or_else(|| "no GIC".into())
}

/// The affinity fields of this processor.
pub fn processor_id() -> u64 {
    let mpidr: u64;
    // SAFETY: reads a constant.
    unsafe { asm!("mrs {v}, mpidr_el1", v = out(reg) mpidr, options(nomem, nostack, preserves_flags)) };
    mpidr & AFFINITY
}

/// Finds the GIC in the MADT and turns the distributor on.
pub fn init(acpi: &Acpi) -> Result<&acpi::Gic, String> {
    let told = acpi.gic.as_ref().ok_or("the MADT has no GIC")?;
    let mut redistributors = Vec::new();
    for (base, len) in &told.redistributors {
        redistributors.push((map_registers(*base, *len)?, *len));
    }
    let distributor = map_registers(told.distributor, 0x1_0000)?;
    distributor.write32(GICD_CTLR, GICD_ON);
    GIC.store(
        Box::leak(Box::new(Gic {
            distributor,
            redistributors,
        })),
        Ordering::Release,
    );
    Ok(told)
}

/// This processor's redistributor.
fn redistributor() -> Result<Mmio, String> {
    let own = processor_id();
    let wanted = (own & 0xff_ffff | own >> 8 & 0xff00_0000) as u32;
    for (base, len) in &gic()?.redistributors {
        // Usually they stand in the order of the processors: look there first, since each look is an exit to the host.
        let guess = (own & 0xf | (own >> 8 & 0xff) << 4) * FRAMES;
        if guess < *len && base.read32(guess + GICR_TYPER + 4) == wanted {
            return Ok(base.at(guess));
        }
        let mut at = 0;
        while at < *len {
            if base.read32(at + GICR_TYPER + 4) == wanted {
                return Ok(base.at(at));
            }
            let has_virtual = base.read32(at + GICR_TYPER) & 2 != 0;
            at += if has_virtual { FRAMES_VIRTUAL } else { FRAMES };
        }
    }
    Err("a processor has no redistributor".into())
}

/// Wakes this processor's redistributor, enables SGI 0 and the timer, and takes interrupts from now on.
pub fn init_processor() -> Result<(), String> {
    let registers = redistributor()?;
    let waker = registers.read32(GICR_WAKER);
    if waker & GICR_SLEEPING != 0 {
        registers.write32(GICR_WAKER, waker & !GICR_SLEEPING);
        while registers.read32(GICR_WAKER) & GICR_SLEEPING != 0 {
            core::hint::spin_loop();
        }
    }
    let private = registers.at(PRIVATE);
    private.write32(GICD_IGROUPR, !0);
    private.write32(GICD_ISENABLER, 1 | 1 << TIMER);
    // SAFETY: the processor's interface by system registers, all priorities, group 1; then interrupts are let in, whose
    // handler in boot.s only counts.
    unsafe {
        asm!(
            "msr icc_sre_el1, {on}",
            "isb",
            "msr icc_pmr_el1, {all}",
            "msr icc_ctlr_el1, xzr",
            "msr icc_igrpen1_el1, {one}",
            "isb",
            "msr daifclr, #2",
            on = in(reg) 7u64, all = in(reg) 0xffu64, one = in(reg) 1u64,
            options(nostack, preserves_flags)
        );
    }
    Ok(())
}

/// Gives this processor tables for LPIs, all enabled; returns how the ITS is to name it: by address, by number.
pub fn take_lpis() -> Result<(u64, u64), String> {
    let registers = redistributor()?;
    let properties = block(LPIS, 0x1_0000)?;
    // SAFETY: memory of ours, fresh.
    unsafe { core::ptr::write_bytes(properties as *mut u8, LPI_ENABLED, LPIS) };
    let pending = block((1 << ID_BITS) / 8, 0x1_0000)?;
    registers.write64_whole(GICR_PROPBASER, properties | SHARED_CACHED | (ID_BITS - 1));
    registers.write64_whole(GICR_PENDBASER, pending | SHARED_CACHED | 1 << 62);
    registers.write32(GICR_CTLR, GICR_ENABLE_LPIS);
    let number = u64::from(registers.read32(GICR_TYPER) >> 8 & 0xffff);
    Ok((registers.address(), number))
}

/// Routes a shared interrupt, an edge, to this processor. Without a GIC, to nobody.
pub fn route_edge(interrupt: u32) {
    let Ok(gic) = gic() else { return };
    let registers = gic.distributor;
    let at = |per_word: u32| u64::from(interrupt / per_word) * 4;
    let bit = 1 << (interrupt % 32);
    let group = registers.read32(GICD_IGROUPR + at(32));
    registers.write32(GICD_IGROUPR + at(32), group | bit);
    let kinds = registers.read32(GICD_ICFGR + at(16));
    registers.write32(GICD_ICFGR + at(16), kinds | 2 << (interrupt % 16 * 2));
    registers.write64_whole(GICD_IROUTER + u64::from(interrupt) * 8, processor_id());
    registers.write32(GICD_ISENABLER + at(32), bit);
}
