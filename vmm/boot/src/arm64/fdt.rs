//! Device trees (Devicetree Specification 0.4, and the bindings of the Linux kernel).

use thiserror::Error;
use vm_fdt::{Error, FdtWriter};

use crate::cmdline::{CmdlineError, DEFAULT_CMDLINE_MAX, check_cmdline};
use crate::initramfs::LoadedInitramfs;

/// Phandles of the nodes that others refer to.
const GIC_HANDLE: u32 = 1;
const ITS_HANDLE: u32 = 2;
const CLOCK_HANDLE: u32 = 3;
const GPIO_HANDLE: u32 = 4;
const IOMMU_HANDLE: u32 = 5;
/// Cells of an interrupt: kind, number, trigger.
const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;
const FIRST_SPI: u32 = 32;
const FIRST_PPI: u32 = 16;
/// Linux's number of the power key (KEY_POWER).
const POWER_KEY: u32 = 116;
/// Frequency told of the serial port's clock in Hz. Nothing depends on it.
const UART_CLOCK: u32 = 24_000_000;
/// The memory windows' kinds in `ranges`: 32-bit memory; 64-bit, prefetchable memory.
const MEMORY_32: u32 = 0x0200_0000;
const MEMORY_64: u32 = 0x4300_0000;

/// Why a device tree could not be made.
#[derive(Debug, Error)]
pub enum FdtError {
    /// The command line does not do.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// It cannot be written.
    #[error("cannot write the device tree: {0}")]
    Write(Error),
    /// It is larger than its place.
    #[error("the device tree takes {size} bytes and its place has {room}")]
    TooLarge {
        /// Its bytes.
        size: usize,
        /// The most.
        room: usize,
    },
}

impl From<Error> for FdtError {
    fn from(error: Error) -> Self {
        Self::Write(error)
    }
}

/// What every kernel is told.
#[derive(Clone, Copy, Debug)]
pub struct Chosen<'a> {
    /// The command line, without NUL.
    pub cmdline: &'a str,
    /// The loaded initramfs, if there is one.
    pub initramfs: Option<LoadedInitramfs>,
    /// Largest size of the tree in bytes.
    pub room: usize,
}

/// Where the EFI tables are.
#[derive(Clone, Copy, Debug)]
pub struct EfiPointers {
    /// Address of the system table.
    pub system_table: u64,
    /// Address of the memory map.
    pub memory_map: u64,
    /// Bytes of the memory map.
    pub memory_map_size: u32,
    /// Bytes of one of its descriptors.
    pub descriptor_size: u32,
    /// Version of the descriptors.
    pub descriptor_version: u32,
}

/// The machine.
#[derive(Clone, Debug)]
pub struct DeviceTree {
    /// RAM: first address and length in bytes.
    pub ram: Vec<(u64, u64)>,
    /// Affinity fields of each processor, as MPIDR_EL1 has them.
    pub cpus: Vec<u64>,
    /// The interrupt controller.
    pub gic: Gic,
    /// Interrupts of the generic timer.
    pub timer: Timer,
    /// Interrupt number of the performance monitors, if there are any.
    pub pmu: Option<u32>,
    /// The PL011: address, bytes, interrupt number (an edge).
    pub uart: Option<(u64, u64, u32)>,
    /// The PL031: address, bytes.
    pub rtc: (u64, u64),
    /// The PL061 and its pin with the power key: address, bytes, interrupt number (an edge), pin.
    pub keys: (u64, u64, u32, u32),
    /// The PCI root.
    pub pci: Pci,
}

/// A GICv3 with an ITS; each part is first address and length in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Gic {
    /// Distributor.
    pub distributor: (u64, u64),
    /// All redistributors.
    pub redistributors: (u64, u64),
    /// ITS.
    pub its: (u64, u64),
}

/// Interrupt numbers of the generic timer, all level-triggered and active high.
#[derive(Clone, Copy, Debug)]
pub struct Timer {
    /// Secure EL1.
    pub secure: u32,
    /// Non-secure EL1.
    pub physical: u32,
    /// Virtual.
    pub virt: u32,
    /// Non-secure EL2.
    pub hypervisor: u32,
}

/// A PCI root; each part is first address and length in bytes.
#[derive(Clone, Debug)]
pub struct Pci {
    /// Configuration space.
    pub ecam: (u64, u64),
    /// Last bus; the first is 0.
    pub last_bus: u32,
    /// 32-bit BARs.
    pub mmio32: (u64, u64),
    /// 64-bit BARs; none when empty.
    pub mmio64: (u64, u64),
    /// Interrupt numbers of its wires: pin A of device 0 is the first, and each device's pins begin one further.
    pub wires: [u32; 4],
    /// The virtio-iommu, if it has one: its requester id, and first and last requester id of each range of functions behind it.
    pub iommu: Option<(u16, Vec<(u16, u16)>)>,
}

/// A tree that tells nothing but where the kernel's boot data and the EFI tables are.
pub fn stub_device_tree(chosen: &Chosen<'_>, efi: &EfiPointers) -> Result<Vec<u8>, FdtError> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    write_chosen(&mut fdt, chosen, None, Some(efi))?;
    fdt.end_node(root)?;
    finish(fdt, chosen.room)
}

/// A tree that describes the whole machine.
pub fn device_tree(chosen: &Chosen<'_>, machine: &DeviceTree) -> Result<Vec<u8>, FdtError> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "Triarch")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC_HANDLE)?;
    let console = machine.uart.map(|(at, ..)| format!("/pl011@{at:x}"));
    write_chosen(&mut fdt, chosen, console.as_deref(), None)?;
    for &(start, size) in &machine.ram {
        let node = fdt.begin_node(&format!("memory@{start:x}"))?;
        fdt.property_string("device_type", "memory")?;
        fdt.property_array_u64("reg", &[start, size])?;
        fdt.end_node(node)?;
    }
    write_cpus(&mut fdt, &machine.cpus)?;
    write_gic(&mut fdt, &machine.gic)?;
    write_timer(&mut fdt, machine)?;
    write_primecells(&mut fdt, machine)?;
    write_keys(&mut fdt, machine.keys)?;
    write_pci(&mut fdt, &machine.pci)?;
    fdt.end_node(root)?;
    finish(fdt, chosen.room)
}

fn finish(fdt: FdtWriter, room: usize) -> Result<Vec<u8>, FdtError> {
    let bytes = fdt.finish()?;
    let size = bytes.len();
    if size > room {
        return Err(FdtError::TooLarge { size, room });
    }
    Ok(bytes)
}

fn write_chosen(
    fdt: &mut FdtWriter,
    chosen: &Chosen<'_>,
    console: Option<&str>,
    efi: Option<&EfiPointers>,
) -> Result<(), FdtError> {
    check_cmdline(chosen.cmdline, DEFAULT_CMDLINE_MAX)?;
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", chosen.cmdline)?;
    if let Some(console) = console {
        fdt.property_string("stdout-path", console)?;
    }
    if let Some(initramfs) = chosen.initramfs {
        fdt.property_u64("linux,initrd-start", initramfs.start.0)?;
        fdt.property_u64("linux,initrd-end", initramfs.start.0 + initramfs.size)?;
    }
    if let Some(efi) = efi {
        fdt.property_u64("linux,uefi-system-table", efi.system_table)?;
        fdt.property_u64("linux,uefi-mmap-start", efi.memory_map)?;
        fdt.property_u32("linux,uefi-mmap-size", efi.memory_map_size)?;
        fdt.property_u32("linux,uefi-mmap-desc-size", efi.descriptor_size)?;
        fdt.property_u32("linux,uefi-mmap-desc-ver", efi.descriptor_version)?;
        // Disabled. Linux 6.1 would ask the services, which are not there, when nothing is said.
        fdt.property_u32("linux,uefi-secure-boot", 2)?;
    }
    Ok(fdt.end_node(node)?)
}

fn write_cpus(fdt: &mut FdtWriter, cpus: &[u64]) -> Result<(), FdtError> {
    let node = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for &mpidr in cpus {
        let cpu = fdt.begin_node(&format!("cpu@{mpidr:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", mpidr)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(node)?;
    let psci = fdt.begin_node("psci")?;
    let versions = ["arm,psci-1.0", "arm,psci-0.2"].map(str::to_owned).to_vec();
    fdt.property_string_list("compatible", versions)?;
    fdt.property_string("method", "hvc")?;
    Ok(fdt.end_node(psci)?)
}

fn write_gic(fdt: &mut FdtWriter, gic: &Gic) -> Result<(), FdtError> {
    let ((distributor, size), (redistributors, all)) = (gic.distributor, gic.redistributors);
    let node = fdt.begin_node(&format!("intc@{distributor:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    fdt.property_array_u64("reg", &[distributor, size, redistributors, all])?;
    fdt.property_phandle(GIC_HANDLE)?;
    let (at, size) = gic.its;
    let its = fdt.begin_node(&format!("msic@{at:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3-its")?;
    fdt.property_null("msi-controller")?;
    fdt.property_u32("#msi-cells", 1)?;
    fdt.property_array_u64("reg", &[at, size])?;
    fdt.property_phandle(ITS_HANDLE)?;
    fdt.end_node(its)?;
    Ok(fdt.end_node(node)?)
}

/// The cells of an interrupt that is private to a processor.
fn private(interrupt: u32) -> [u32; 3] {
    [PPI, interrupt.saturating_sub(FIRST_PPI), LEVEL_HIGH]
}

fn write_timer(fdt: &mut FdtWriter, machine: &DeviceTree) -> Result<(), FdtError> {
    let Timer {
        secure,
        physical,
        virt,
        hypervisor,
    } = machine.timer;
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    let interrupts = [secure, physical, virt, hypervisor].map(private).concat();
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.property_null("always-on")?;
    fdt.end_node(node)?;
    if let Some(interrupt) = machine.pmu {
        let node = fdt.begin_node("pmu")?;
        fdt.property_string("compatible", "arm,armv8-pmuv3")?;
        fdt.property_array_u32("interrupts", &private(interrupt))?;
        fdt.end_node(node)?;
    }
    Ok(())
}

fn write_primecells(fdt: &mut FdtWriter, machine: &DeviceTree) -> Result<(), FdtError> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", UART_CLOCK)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK_HANDLE)?;
    fdt.end_node(node)?;
    if let Some((at, size, interrupt)) = machine.uart {
        let node = fdt.begin_node(&format!("pl011@{at:x}"))?;
        let compatible = ["arm,pl011", "arm,primecell"].map(str::to_owned).to_vec();
        fdt.property_string_list("compatible", compatible)?;
        fdt.property_array_u64("reg", &[at, size])?;
        let cells = [SPI, interrupt.saturating_sub(FIRST_SPI), EDGE_RISING];
        fdt.property_array_u32("interrupts", &cells)?;
        fdt.property_array_u32("clocks", &[CLOCK_HANDLE, CLOCK_HANDLE])?;
        let names = ["uartclk", "apb_pclk"].map(str::to_owned).to_vec();
        fdt.property_string_list("clock-names", names)?;
        fdt.end_node(node)?;
    }
    let (at, size) = machine.rtc;
    let node = fdt.begin_node(&format!("rtc@{at:x}"))?;
    let compatible = ["arm,pl031", "arm,primecell"].map(str::to_owned).to_vec();
    fdt.property_string_list("compatible", compatible)?;
    fdt.property_array_u64("reg", &[at, size])?;
    fdt.property_u32("clocks", CLOCK_HANDLE)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    Ok(fdt.end_node(node)?)
}

fn write_keys(fdt: &mut FdtWriter, (at, size, interrupt, pin): (u64, u64, u32, u32)) -> Result<(), FdtError> {
    let node = fdt.begin_node(&format!("pl061@{at:x}"))?;
    let compatible = ["arm,pl061", "arm,primecell"].map(str::to_owned).to_vec();
    fdt.property_string_list("compatible", compatible)?;
    fdt.property_array_u64("reg", &[at, size])?;
    let cells = [SPI, interrupt.saturating_sub(FIRST_SPI), EDGE_RISING];
    fdt.property_array_u32("interrupts", &cells)?;
    fdt.property_null("gpio-controller")?;
    fdt.property_u32("#gpio-cells", 2)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 2)?;
    fdt.property_u32("clocks", CLOCK_HANDLE)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    fdt.property_phandle(GPIO_HANDLE)?;
    fdt.end_node(node)?;
    let keys = fdt.begin_node("gpio-keys")?;
    fdt.property_string("compatible", "gpio-keys")?;
    let key = fdt.begin_node("power")?;
    fdt.property_string("label", "Power Button")?;
    fdt.property_u32("linux,code", POWER_KEY)?;
    // Active high.
    fdt.property_array_u32("gpios", &[GPIO_HANDLE, pin, 0])?;
    fdt.end_node(key)?;
    Ok(fdt.end_node(keys)?)
}

fn write_pci(fdt: &mut FdtWriter, pci: &Pci) -> Result<(), FdtError> {
    let (at, size) = pci.ecam;
    let node = fdt.begin_node(&format!("pcie@{at:x}"))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_array_u64("reg", &[at, size])?;
    fdt.property_array_u32("bus-range", &[0, pci.last_bus])?;
    fdt.property_u32("linux,pci-domain", 0)?;
    fdt.property_null("dma-coherent")?;
    let mut ranges = Vec::new();
    for (kind, (start, size)) in [(MEMORY_32, pci.mmio32), (MEMORY_64, pci.mmio64)] {
        if size > 0 {
            let cells = [start, start, size].map(|n| [(n >> 32) as u32, n as u32]);
            ranges.push(kind);
            ranges.extend(cells.as_flattened());
        }
    }
    fdt.property_array_u32("ranges", &ranges)?;
    // Of a device and a pin to the GIC: what rotates over four wires is the same for every fourth device.
    let mut wires = Vec::new();
    for (device, pin) in (0..4).flat_map(|device| (0..4).map(move |pin| (device, pin))) {
        let wire = pci.wires[(device + pin) % pci.wires.len()].saturating_sub(FIRST_SPI);
        let (device, pin) = (device as u32, pin as u32);
        wires.extend([device << 11, 0, 0, pin + 1, GIC_HANDLE, 0, 0, SPI, wire, LEVEL_HIGH]);
    }
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_array_u32("interrupt-map-mask", &[0x1800, 0, 0, 7])?;
    fdt.property_array_u32("interrupt-map", &wires)?;
    // Requester id and device id are the same.
    fdt.property_array_u32("msi-map", &[0, ITS_HANDLE, 0, 0x1_0000])?;
    if let Some((requester, behind)) = &pci.iommu {
        // Requester id and endpoint are the same.
        let range = |(first, last): &(u16, u16)| {
            let (first, last) = (u32::from(*first), u32::from(*last));
            [first, IOMMU_HANDLE, first, (last + 1).saturating_sub(first)]
        };
        let map: Vec<u32> = behind.iter().flat_map(range).collect();
        fdt.property_array_u32("iommu-map", &map)?;
        let (slot, function) = (requester >> 3 & 0x1f, requester & 7);
        let iommu = fdt.begin_node(&format!("iommu@{slot:x},{function:x}"))?;
        let compatible = ["virtio,pci-iommu", "pci1af4,1057"].map(str::to_owned).to_vec();
        fdt.property_string_list("compatible", compatible)?;
        fdt.property_array_u32("reg", &[u32::from(*requester) << 8, 0, 0, 0, 0])?;
        fdt.property_u32("#iommu-cells", 1)?;
        fdt.property_phandle(IOMMU_HANDLE)?;
        fdt.end_node(iommu)?;
    }
    Ok(fdt.end_node(node)?)
}
