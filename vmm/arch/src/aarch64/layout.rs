//! The guest's physical address map. RAM, device tree, root pointer, serial port and clock are where Cloud Hypervisor has them, so
//! that its firmware builds fit.
//!
//! ```text
//! 0x0000_0000  firmware
//! 0x0600_0000  GIC: ITS
//! 0x0700_0000  GIC: redistributors, 128 KiB a vCPU
//! 0x08ff_0000  GIC: distributor
//! 0x0900_0000  PL011, then PL031, event register, keys, registers of processors and of memory that come and go, 64 KiB apart
//! 0x0907_0000  registers of PCI devices that come and go
//! 0x1000_0000  32-bit BARs
//! 0x3000_0000  PCI configuration space (ECAM), 1 MiB a bus, 32 for each root bus
//! 0x4000_0000  RAM: device tree, 2 MiB; ACPI, EFI and SMBIOS tables, 2 MiB; kernel
//! ...          room for memory that comes later, from a multiple of 2 GiB on
//! ...          64-bit BARs, from a multiple of 1 GiB to the end of what a guest can address
//! ```

use std::ops::{Range, RangeInclusive};

use triarch_boot::MemRange;
use triarch_tables::efi::RUNTIME_ALIGN;
use vm_memory::GuestAddress;

use crate::AddressLimit;
use crate::common::hotplug_room;

/// First address of RAM.
pub const RAM: u64 = 0x4000_0000;
/// 32-bit BARs.
pub const MMIO32: Range<u64> = 0x1000_0000..ECAM;
/// PCI configuration space of segment 0.
pub const ECAM: u64 = 0x3000_0000;
/// Bytes of configuration space a bus has.
pub const ECAM_BUS_SIZE: u64 = 1 << 20;
/// Buses of a root bus: one for the root port that can be in each slot, and its own. There is room for those of 8 root buses.
pub const PCI_BUSES: u64 = 32;
/// There are no I/O ports.
pub const PCI_IO: Range<u16> = 0..0;

/// GIC: interrupt translation service.
pub const GIC_ITS: u64 = 0x0600_0000;
/// Its bytes.
pub const GIC_ITS_SIZE: u64 = 0x2_0000;
/// Where devices write their messages.
pub const MESSAGES: RangeInclusive<u64> = GIC_ITS..=GIC_ITS + GIC_ITS_SIZE - 1;
/// GIC: redistributor of the first vCPU; the others follow.
pub const GIC_REDISTRIBUTORS: u64 = 0x0700_0000;
/// Bytes of one.
pub const GIC_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// GIC: distributor.
pub const GIC_DISTRIBUTOR: u64 = 0x08ff_0000;
/// Its bytes.
pub const GIC_DISTRIBUTOR_SIZE: u64 = 0x1_0000;
/// vCPUs there is room for redistributors for.
pub const MAX_VCPUS: u32 = ((GIC_DISTRIBUTOR - GIC_REDISTRIBUTORS) / GIC_REDISTRIBUTOR_SIZE) as u32;

/// Serial port.
pub const UART: u64 = 0x0900_0000;
/// Real-time clock.
pub const RTC: u64 = 0x0901_0000;
/// Register of the generic event device.
pub const GED: u64 = 0x0903_0000;
/// Keys, for guests that boot by a device tree.
pub const KEYS: u64 = 0x0904_0000;
/// Registers of processors that come and go.
pub const CPU_HOTPLUG: u64 = 0x0905_0000;
/// Registers of memory that comes and goes.
pub const MEMORY_HOTPLUG: u64 = 0x0906_0000;
/// Registers of PCI devices that come and go.
pub const PCI_HOTPLUG: u64 = 0x0907_0000;

/// Interrupt numbers of the PCI bus' wires: pin A of device 0 is the first.
pub const PCI_WIRES: [u32; 4] = [48, 49, 50, 51];
/// The interrupt that KVM counts as GSI 0.
pub const FIRST_WIRE: u32 = interrupt::FIRST_SHARED;

/// Interrupt numbers of the GIC.
pub mod interrupt {
    /// The first that is shared by all vCPUs.
    pub const FIRST_SHARED: u32 = 32;
    /// Serial port.
    pub const UART: u32 = 33;
    /// Generic event device.
    pub const GED: u32 = 36;
    /// Keys.
    pub const KEYS: u32 = 39;
    /// Performance monitors of each vCPU.
    pub const PMU: u32 = 23;
    /// Generic timer of each vCPU, non-secure EL2.
    pub const TIMER_HYPERVISOR: u32 = 26;
    /// Virtual timer.
    pub const TIMER_VIRTUAL: u32 = 27;
    /// Secure EL1.
    pub const TIMER_SECURE: u32 = 29;
    /// Non-secure EL1.
    pub const TIMER_PHYSICAL: u32 = 30;
}

/// Device tree.
pub const DEVICE_TREE: MemRange = MemRange::from_bounds(RAM, RAM + (2 << 20));
/// ACPI, EFI and SMBIOS tables.
pub const TABLES: MemRange = MemRange::from_bounds(RAM + (2 << 20), RAM + (4 << 20));
/// ACPI's root pointer; firmware looks for it here.
pub const RSDP: u64 = TABLES.start;
/// ACPI tables.
pub const ACPI_TABLES: MemRange = MemRange::from_bounds(RSDP + 0x1000, EFI_TABLES);
/// EFI tables.
pub const EFI_TABLES: u64 = TABLES.start + 0x10_0000;
/// SMBIOS entry point and tables.
pub const SMBIOS: MemRange = MemRange::from_bounds(TABLES.start + 0x18_0000, EFI_RUNTIME.start);
/// EFI runtime services.
pub const EFI_RUNTIME: MemRange = MemRange::from_bounds(TABLES.end() - RUNTIME_ALIGN, TABLES.end());
/// Lowest address for kernels.
pub const KERNEL: u64 = TABLES.end();

/// A 64-bit window is this large at least.
const MMIO64_ALIGN: u64 = 1 << 30;
/// Kernels with 4 KiB pages see no more.
const USUAL_ADDRESS_BITS: u8 = 48;

/// Where `size` bytes of RAM lie.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    vec![(GuestAddress(RAM), size)]
}

/// Where `hotplug_size` bytes of memory may come that a guest with `ram_size` bytes of RAM does not start with; `None` beyond 64 bits.
/// How they are divided: `hotplug_room` in `common/mod.rs`.
pub fn hotplug(ram_size: u64, hotplug_size: u64) -> Option<Range<u64>> {
    hotplug_room(RAM.checked_add(ram_size), hotplug_size)
}

/// Checks that a guest with addresses of `address_bits` reaches all of `size` bytes of RAM, and of `hotplug_size` that may come.
pub fn check_ram(size: u64, hotplug_size: u64, address_bits: u8) -> Result<(), AddressLimit> {
    let end = hotplug(size, hotplug_size).map(|room| room.end);
    AddressLimit::check(size, hotplug_size, end, address_bits)
}

/// 64-bit BARs: from the end of RAM, and of the room for more, to the end of the address space.
pub fn mmio64(ram_size: u64, hotplug_size: u64, address_bits: u8) -> Range<u64> {
    let start = hotplug(ram_size, hotplug_size).and_then(|room| room.end.checked_next_multiple_of(MMIO64_ALIGN));
    let start = start.unwrap_or(u64::MAX);
    // BARs of 64 bits lie above those of 32.
    let start = start.max(1 << 32);
    let end = 1u64 << address_bits.clamp(32, USUAL_ADDRESS_BITS);
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_ends_where_addresses_do() {
        assert_eq!(ram_ranges(GIB), [(GuestAddress(RAM), GIB)]);
        assert_eq!(check_ram(1023 * GIB, 0, 40), Ok(()));
        let error = check_ram(1024 * GIB, 0, 40).unwrap_err().to_string();
        assert!(error.contains("1048576 MiB") && error.contains("40 bits"), "{error}");
        assert!(check_ram(u64::MAX, 0, 48).is_err());
        assert_eq!(check_ram(GIB, 1022 * GIB, 40), Ok(()));
        let error = check_ram(GIB, 1023 * GIB, 40).unwrap_err().to_string();
        assert!(error.contains("room for 1047552 MiB more"), "{error}");
    }

    #[test]
    fn more_memory_comes_between_ram_and_the_64_bit_window() {
        assert_eq!(hotplug(GIB, GIB), Some(2 * GIB..3 * GIB));
        assert_eq!(mmio64(GIB, GIB, 40).start, 4 * GIB);
        assert_eq!(hotplug(2 * GIB, 3 * GIB / 2), Some(4 * GIB..11 * GIB / 2));
        assert_eq!(mmio64(2 * GIB, 3 * GIB / 2, 40).start, 6 * GIB);
        assert_eq!(hotplug(GIB, u64::MAX), None);
        assert!(mmio64(GIB, u64::MAX, 40).is_empty());
    }

    #[test]
    fn the_64_bit_window_follows_ram() {
        assert_eq!(mmio64(GIB, 0, 40), 4 * GIB..1 << 40);
        assert_eq!(mmio64(6 * GIB + 4096, 0, 40).start, 8 * GIB);
        assert!(mmio64(1 << 52, 0, 40).is_empty());
    }

    #[test]
    fn everything_a_configuration_allows_has_a_redistributor() {
        const { assert!(MAX_VCPUS >= 254) };
        const { assert!(GIC_ITS + GIC_ITS_SIZE <= GIC_REDISTRIBUTORS) };
        const { assert!(ECAM + 8 * PCI_BUSES * ECAM_BUS_SIZE <= RAM) };
    }
}
