//! The guest's physical address map, the same as Cloud Hypervisor's, so that its firmware builds fit.
//!
//! ```text
//! 0x0000_0000  RAM; GDT, start info, zero page, page tables and command line below 640 KiB during boot
//! 0x000a_0000  ACPI tables (reserved to the guest)
//! 0x000f_0000  SMBIOS; in its last 16 bytes what a jump to the BIOS's reset vector finds
//! 0x0010_0000  kernel
//! 0xc000_0000  end of low RAM; 32-bit BARs
//! 0xe800_0000  PCI configuration space (ECAM), 1 MiB a bus, 32 for each root bus
//! 0xfe00_0000  registers of processors that come and go
//! 0xfe01_0000  registers of memory that comes and goes
//! 0xfe02_0000  registers of PCI devices that come and go
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0x1_0000_0000  RAM above the hole, then room for memory that comes later, from a multiple of 2 GiB on, then 64-bit BARs, from a
//!                multiple of 1 GiB up to the CPU's last address
//! ```

use std::ops::{Range, RangeInclusive};

use triarch_boot::MemRange;
use vm_memory::GuestAddress;

use crate::AddressLimit;
use crate::common::hotplug_room;

/// Where the hole for devices below 4 GiB starts.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM: u64 = 1 << 32;
/// 32-bit BARs.
pub const MMIO32: Range<u64> = LOW_RAM_END..ECAM;
/// PCI configuration space of segment 0.
pub const ECAM: u64 = 0xe800_0000;
/// Bytes of configuration space a bus has.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;
/// Buses of a root bus: one for the root port that can be in each slot, and its own. There is room for those of 8 root buses.
pub const PCI_BUSES: u64 = 32;
/// I/O ports for BARs.
pub const PCI_IO: Range<u16> = 0x1000..0xf000;
/// Registers of processors that come and go.
pub const CPU_HOTPLUG: u64 = 0xfe00_0000;
/// Registers of memory that comes and goes.
pub const MEMORY_HOTPLUG: u64 = 0xfe01_0000;
/// Registers of PCI devices that come and go.
pub const PCI_HOTPLUG: u64 = 0xfe02_0000;
/// GSIs of the PCI bus' wires: pin A of device 0 is the first.
pub const PCI_WIRES: [u32; 4] = [20, 21, 22, 23];
/// GSI 0, as KVM counts them: the first pin of the I/O APIC.
pub const FIRST_WIRE: u32 = 0;
/// I/O APIC.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Where devices write their messages.
pub const MESSAGES: RangeInclusive<u64> = LOCAL_APIC..=0xfeef_ffff;
/// Three pages KVM needs on Intel CPUs to run real mode code.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page KVM needs on Intel CPUs that cannot run without paging.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// ACPI tables.
pub const ACPI_TABLES: MemRange = MemRange::from_bounds(0xa_0000, 0xf_0000);
/// SMBIOS entry point and tables.
pub const SMBIOS: MemRange = MemRange::from_bounds(0xf_0000, 0x10_0000);
/// Where software that restarts the machine "by the BIOS" jumps to, in real mode (F000:FFF0).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// A 64-bit window is this large at least, whatever the CPU's address width.
const MMIO64_ALIGN: u64 = 1 << 30;

/// Where `size` bytes of RAM lie: below the hole, and the rest above it.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(LOW_RAM_END);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(HIGH_RAM), size - low));
    }
    ranges
}

/// Where memory above the hole ends, also that of a guest without any; `None` beyond 64 bits.
fn high_ram_end(size: u64) -> Option<u64> {
    HIGH_RAM.checked_add(size.saturating_sub(LOW_RAM_END))
}

/// Where `hotplug_size` bytes of memory may come that a guest with `ram_size` bytes of RAM does not start with; `None` beyond 64 bits.
/// How they are divided: `hotplug_room` in `common/mod.rs`.
pub fn hotplug(ram_size: u64, hotplug_size: u64) -> Option<Range<u64>> {
    hotplug_room(high_ram_end(ram_size), hotplug_size)
}

/// Checks that a guest with addresses of `address_bits` reaches all of `size` bytes of RAM, and of `hotplug_size` that may come.
pub fn check_ram(size: u64, hotplug_size: u64, address_bits: u8) -> Result<(), AddressLimit> {
    let end = match (size, hotplug_size) {
        (..=LOW_RAM_END, 0) => Some(size),
        _ => hotplug(size, hotplug_size).map(|room| room.end),
    };
    AddressLimit::check(size, hotplug_size, end, address_bits)
}

/// 64-bit BARs: from the end of RAM, and of the room for more, to the end of what a CPU with `address_bits` can reach.
pub fn mmio64(ram_size: u64, hotplug_size: u64, address_bits: u8) -> Range<u64> {
    let start = hotplug(ram_size, hotplug_size).and_then(|room| room.end.checked_next_multiple_of(MMIO64_ALIGN));
    let start = start.unwrap_or(u64::MAX);
    // The last 64 KiB stay free: some operating systems reserve them.
    let end = (1u64 << address_bits.clamp(36, 52)) - (64 << 10);
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_goes_around_the_hole() {
        const { assert!(ECAM + 8 * PCI_BUSES * ECAM_BUS_SIZE <= CPU_HOTPLUG) };
        assert_eq!(ram_ranges(GIB), [(GuestAddress(0), GIB)]);
        assert_eq!(ram_ranges(3 * GIB), [(GuestAddress(0), 3 * GIB)]);
        assert_eq!(
            ram_ranges(5 * GIB),
            [(GuestAddress(0), 3 * GIB), (GuestAddress(4 * GIB), 2 * GIB)]
        );
    }

    #[test]
    fn memory_ends_where_addresses_do() {
        assert_eq!(check_ram(1023 * GIB, 0, 40), Ok(()));
        assert_eq!(check_ram(3 * GIB, 0, 32), Ok(()));
        assert!(check_ram(u64::MAX, 0, 52).is_err());
        let error = check_ram(1024 * GIB, 0, 40).unwrap_err().to_string();
        assert!(
            error.starts_with("1048576 MiB of memory do not") && error.contains("40 bits"),
            "{error}"
        );
    }

    #[test]
    fn room_for_more_memory_ends_where_addresses_do() {
        assert_eq!(check_ram(GIB, 1020 * GIB, 40), Ok(()));
        let error = check_ram(GIB, 1021 * GIB, 40).unwrap_err().to_string();
        assert!(
            error.contains("1024 MiB of memory and room for 1045504 MiB more")
                && error.ends_with("size or hotplug_size"),
            "{error}"
        );
        assert!(check_ram(GIB, GIB, 32).is_err());
        assert!(check_ram(GIB, u64::MAX, 52).is_err());
    }

    #[test]
    fn more_memory_comes_between_ram_and_the_64_bit_window() {
        assert_eq!(hotplug(GIB, 3 * GIB / 2), Some(4 * GIB..11 * GIB / 2));
        assert_eq!(mmio64(GIB, 3 * GIB / 2, 40).start, 6 * GIB);
        assert_eq!(hotplug(4 * GIB, GIB), Some(6 * GIB..7 * GIB));
        assert_eq!(mmio64(4 * GIB, GIB, 40).start, 7 * GIB);
        let none = hotplug(4 * GIB, 0).expect("no room is room enough");
        assert!(none.is_empty() && mmio64(4 * GIB, 0, 40).start == 5 * GIB);
        assert_eq!(hotplug(GIB, u64::MAX), None);
        assert!(mmio64(GIB, u64::MAX, 40).is_empty());
    }

    #[test]
    fn the_64_bit_window_follows_ram() {
        assert_eq!(mmio64(GIB, 0, 40).start, 4 * GIB);
        assert_eq!(mmio64(5 * GIB + 4096, 0, 40), 7 * GIB..(1 << 40) - 65536);
        assert!(
            mmio64(1 << 52, 0, 36).is_empty(),
            "no room is an empty window, not a wrapped one"
        );
    }
}
