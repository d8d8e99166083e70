//! What an operating system that was started by UEFI finds in memory, without any UEFI (UEFI 2.7, 4.3 to 4.6).
//!
//! ARM kernels take ACPI tables only from an EFI system table. This makes one for a kernel that is told about it by the `linux,uefi-*`
//! properties of its device tree (Linux, Documentation/arch/arm/uefi.rst). It finds ACPI and SMBIOS there, and the runtime services
//! that tell and set the time, in physical addresses and to be called at those.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// Bytes of a memory descriptor, which a device tree has to tell.
pub const DESCRIPTOR_SIZE: u32 = size_of::<Descriptor>() as u32;
/// Version of the memory descriptor.
pub const DESCRIPTOR_VERSION: u32 = 1;

const SIGNATURE: u64 = u64::from_le_bytes(*b"IBI SYST");
/// 2.70.
const REVISION: u32 = 2 << 16 | 70;
const VENDOR: &str = "Triarch";
const PAGE: u64 = 4096;
/// Parts begin on this boundary, in bytes.
const ALIGN: usize = 64;

/// EfiRuntimeServicesCode.
const RUNTIME_CODE: u32 = 5;
/// EfiConventionalMemory.
const CONVENTIONAL: u32 = 7;
/// EfiACPIReclaimMemory: kept as it is until the system has read it, and by Linux beyond that.
const ACPI_RECLAIM: u32 = 9;
/// EfiMemoryMappedIO.
const MMIO: u32 = 11;
/// Uncached, write-combining, write-through and write-back are all possible.
const CACHEABILITY: u64 = 0xf;
const UNCACHEABLE: u64 = 1;
const WRITE_BACK: u64 = 8;
/// EFI_MEMORY_RO.
const READ_ONLY: u64 = 1 << 17;
/// EFI_MEMORY_RUNTIME: runtime services need it mapped.
const RUNTIME: u64 = 1 << 63;

type Guid = [u8; 16];
const ACPI_20: Guid = guid(
    0x8868_e871,
    0xe4f1,
    0x11d3,
    [0xbc, 0x22, 0x00, 0x80, 0xc7, 0x3c, 0x88, 0x81],
);
const SMBIOS_3: Guid = guid(
    0xf2fd_1544,
    0x9794,
    0x4a2c,
    [0x99, 0x2e, 0xe5, 0xbb, 0xcf, 0x20, 0xe3, 0x94],
);
/// EFI_RT_PROPERTIES: which runtime services there are.
const RT_PROPERTIES: Guid = guid(
    0xeb66_918a,
    0x7eef,
    0x402a,
    [0x84, 0x2e, 0x93, 0x1d, 0x21, 0xc3, 0x8a, 0xe9],
);
/// Linux's own list of ranges to reserve; it wants to find one to add to.
const LINUX_MEMRESERVE: Guid = guid(
    0x888e_b0c6,
    0x8ede,
    0x4ff5,
    [0xa8, 0xf0, 0x9a, 0xee, 0x5c, 0xb9, 0x77, 0xc2],
);

const fn guid(a: u32, b: u16, c: u16, rest: [u8; 8]) -> Guid {
    let (a, b, c) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    let r = rest;
    [
        a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7],
    ]
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct SystemTable {
    signature: U64,
    revision: U32,
    size: U32,
    crc: U32,
    reserved: U32,
    vendor: U64,
    firmware_revision: U32,
    padding: U32,
    /// Console handles and protocols, runtime and boot services: none.
    services: [U64; 8],
    tables: U64,
    table_pointer: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ConfigurationTable {
    guid: Guid,
    at: U64,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    kind: U32,
    padding: U32,
    physical: U64,
    virt: U64,
    pages: U64,
    attributes: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<SystemTable>() == 120);
const _: () = assert!(DESCRIPTOR_SIZE == 48);

/// Head of the runtime services table; the functions follow.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RuntimeServices {
    signature: U64,
    revision: U32,
    size: U32,
    crc: U32,
    reserved: U32,
    functions: [U64; RUNTIME_FUNCTIONS],
}

const RUNTIME_SIGNATURE: u64 = u64::from_le_bytes(*b"RUNTSERV");
/// Functions of the table: GetTime, SetTime, GetWakeupTime, SetWakeupTime and ten that have nothing to do with time.
const RUNTIME_FUNCTIONS: usize = 14;
const _: () = assert!(size_of::<RuntimeServices>() == 136);
/// What EFI_RT_PROPERTIES says is there: GetTime and SetTime.
const TIME_SERVICES: u8 = 3;
/// Kernels map memory of runtime services in their own pages, of 64 KiB at most: where it begins and ends.
pub const RUNTIME_ALIGN: u64 = 64 << 10;

/// Functions of the runtime services: machine code that runs at any address, and where in it they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuntimeCode<'a> {
    /// The code.
    pub bytes: &'a [u8],
    /// Offset of GetTime.
    pub get_time: usize,
    /// Offset of SetTime.
    pub set_time: usize,
    /// Offset of what answers EFI_UNSUPPORTED.
    pub unsupported: usize,
}

/// The runtime services and what they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runtime<'a> {
    /// The functions.
    pub code: RuntimeCode<'a>,
    /// Where they go, inside of [`EfiConfig::tables`]: first address and length in bytes, multiples of
    /// [`RUNTIME_ALIGN`].
    pub place: (u64, u64),
    /// Registers they use: first address and length in bytes, whole pages.
    pub registers: (u64, u64),
}

/// What the tables point to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EfiConfig<'a> {
    /// Guest physical address the tables are for, a multiple of 4 KiB, inside of [`Self::tables`].
    pub at: u64,
    /// ACPI's root pointer.
    pub rsdp: u64,
    /// SMBIOS's entry point.
    pub smbios: Option<u64>,
    /// RAM: first address and length in bytes, whole pages of 4 KiB, ascending.
    pub ram: Vec<(u64, u64)>,
    /// The part of RAM with ACPI, SMBIOS and these tables: first address and length in bytes, whole pages.
    pub tables: (u64, u64),
    /// The runtime services.
    pub runtime: Runtime<'a>,
}

/// The tables, one block of bytes for [`EfiConfig::at`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EfiTables {
    /// The block.
    pub bytes: Vec<u8>,
    /// The runtime services, for [`Runtime::place`].
    pub runtime: Vec<u8>,
    /// Address of the system table.
    pub system_table: u64,
    /// Address of the memory map.
    pub memory_map: u64,
    /// Bytes of the memory map.
    pub memory_map_size: u32,
}

/// Makes the tables.
pub fn build(config: &EfiConfig<'_>) -> EfiTables {
    let mut block = Block {
        at: config.at,
        bytes: Vec::new(),
    };
    let map: Vec<u8> = memory_map(config).iter().flat_map(|d| d.as_bytes().to_vec()).collect();
    let memory_map = block.add(&map);

    let name: Vec<u8> = VENDOR.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
    let vendor = block.add(&name);
    // Version 1, 8 bytes, a bit for each service.
    let properties = block.add(&[1, 0, 8, 0, TIME_SERVICES, 0, 0, 0]);
    let reserve = block.add(&[0; 16]);
    let mut tables = vec![
        (ACPI_20, config.rsdp),
        (RT_PROPERTIES, properties),
        (LINUX_MEMRESERVE, reserve),
    ];
    tables.extend(config.smbios.map(|at| (SMBIOS_3, at)));
    let count = tables.len() as u64;
    let tables: Vec<u8> = tables
        .into_iter()
        .flat_map(|(guid, at)| ConfigurationTable { guid, at: at.into() }.as_bytes().to_vec())
        .collect();
    let table_pointer = block.add(&tables);
    let (runtime, services) = runtime(&config.runtime);
    let mut system = SystemTable {
        signature: SIGNATURE.into(),
        revision: REVISION.into(),
        size: (size_of::<SystemTable>() as u32).into(),
        crc: 0.into(),
        reserved: 0.into(),
        vendor: vendor.into(),
        firmware_revision: 1.into(),
        padding: 0.into(),
        services: [0, 0, 0, 0, 0, 0, services, 0].map(U64::new),
        tables: count.into(),
        table_pointer: table_pointer.into(),
    };
    system.crc = crc32(system.as_bytes()).into();
    let system_table = block.add(system.as_bytes());
    EfiTables {
        bytes: block.bytes,
        runtime,
        system_table,
        memory_map,
        memory_map_size: map.len() as u32,
    }
}

/// The code with the table of its functions behind it, and the table's address.
fn runtime(runtime: &Runtime<'_>) -> (Vec<u8>, u64) {
    let (at, code) = (runtime.place.0, runtime.code);
    let mut block = Block { at, bytes: Vec::new() };
    let function = |offset: usize| U64::new(at + offset as u64);
    block.add(code.bytes);
    let mut functions = [function(code.unsupported); RUNTIME_FUNCTIONS];
    (functions[0], functions[1]) = (function(code.get_time), function(code.set_time));
    let mut table = RuntimeServices {
        signature: RUNTIME_SIGNATURE.into(),
        revision: REVISION.into(),
        size: (size_of::<RuntimeServices>() as u32).into(),
        crc: 0.into(),
        reserved: 0.into(),
        functions,
    };
    table.crc = crc32(table.as_bytes()).into();
    let services = block.add(table.as_bytes());
    (block.bytes, services)
}

fn memory_map(config: &EfiConfig<'_>) -> Vec<Descriptor> {
    let descriptor = |kind: u32, (start, end): (u64, u64), attributes: u64| {
        (end > start).then(|| Descriptor {
            kind: kind.into(),
            padding: 0.into(),
            physical: start.into(),
            // What runtime services need is called and accessed at its physical address.
            virt: start.into(),
            pages: ((end - start) / PAGE).into(),
            attributes: attributes.into(),
            reserved: 0.into(),
        })
    };
    let bounds = |(start, size): (u64, u64)| (start, start.saturating_add(size));
    let (tables, code, registers) = (
        bounds(config.tables),
        bounds(config.runtime.place),
        bounds(config.runtime.registers),
    );
    let mut map: Vec<_> = descriptor(MMIO, registers, UNCACHEABLE | RUNTIME).into_iter().collect();
    for ram in config.ram.iter().copied().map(bounds) {
        let within = |(start, end): (u64, u64)| (ram.0.max(start), ram.1.min(end));
        map.extend(descriptor(CONVENTIONAL, within((ram.0, tables.0)), CACHEABILITY));
        map.extend(descriptor(ACPI_RECLAIM, within((tables.0, code.0)), CACHEABILITY));
        map.extend(descriptor(RUNTIME_CODE, within(code), WRITE_BACK | READ_ONLY | RUNTIME));
        map.extend(descriptor(ACPI_RECLAIM, within((code.1, tables.1)), CACHEABILITY));
        map.extend(descriptor(CONVENTIONAL, within((tables.1, ram.1)), CACHEABILITY));
    }
    map
}

/// Parts one behind the other.
struct Block {
    at: u64,
    bytes: Vec<u8>,
}

impl Block {
    /// Appends `part` and returns its address.
    fn add(&mut self, part: &[u8]) -> u64 {
        let offset = self.bytes.len().next_multiple_of(ALIGN);
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(part);
        self.at + offset as u64
    }
}

/// The checksum of UEFI table headers: CRC-32 with the polynomial of Ethernet.
fn crc32(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    let step = |crc: u32, _| crc >> 1 ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
    !bytes
        .iter()
        .fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn config() -> EfiConfig<'static> {
        EfiConfig {
            at: 0x4030_0000,
            rsdp: 0x4020_0000,
            smbios: Some(0x4038_0000),
            ram: vec![(0x4000_0000, 512 * MIB)],
            tables: (0x4020_0000, 2 * MIB),
            runtime: Runtime {
                code: RuntimeCode {
                    bytes: &[7; 100],
                    get_time: 4,
                    set_time: 8,
                    unsupported: 96,
                },
                place: (0x403f_0000, RUNTIME_ALIGN),
                registers: (0x0901_0000, PAGE),
            },
        }
    }

    fn word(tables: &EfiTables, address: u64) -> u64 {
        let at = (address - 0x4030_0000) as usize;
        u64::from_le_bytes(tables.bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_kernel_finds_acpi_and_smbios() {
        let tables = build(&config());
        let system = tables.system_table;
        assert_eq!(&word(&tables, system).to_le_bytes(), b"IBI SYST");
        let (count, pointer) = (word(&tables, system + 104), word(&tables, system + 112));
        assert_eq!(count, 4);
        let found: Vec<(u64, u64)> = (0..count)
            .map(|n| (word(&tables, pointer + 24 * n), word(&tables, pointer + 24 * n + 16)))
            .collect();
        assert_eq!(found[0], (0x11d3_e4f1_8868_e871, 0x4020_0000));
        assert_eq!(found[3], (0x4a2c_9794_f2fd_1544, 0x4038_0000));
        assert_eq!(word(&tables, found[1].1), 0x3_0008_0001, "GetTime and SetTime");
        let mut header = tables.bytes[(system - 0x4030_0000) as usize..][..120].to_vec();
        let crc = u32::from_le_bytes(header[16..20].try_into().unwrap());
        header[16..20].fill(0);
        assert_eq!(crc, crc32(&header));
    }

    #[test]
    fn the_memory_map_is_all_ram_without_overlap() {
        let map = memory_map(&config());
        let plain: Vec<_> = map
            .iter()
            .map(|d| (d.kind.get(), d.physical.get(), d.pages.get() * PAGE))
            .collect();
        assert_eq!(
            plain,
            [
                (11, 0x0901_0000, PAGE),
                (7, 0x4000_0000, 2 * MIB),
                (9, 0x4020_0000, 2 * MIB - RUNTIME_ALIGN),
                (5, 0x403f_0000, RUNTIME_ALIGN),
                (7, 0x4040_0000, 508 * MIB),
            ]
        );
    }

    #[test]
    fn what_runtime_services_need_is_mapped_where_it_is() {
        let map = memory_map(&config());
        let runtime: Vec<_> = map
            .iter()
            .filter(|d| d.attributes.get() & RUNTIME != 0)
            .map(|d| (d.physical.get(), d.virt.get(), d.attributes.get() & !RUNTIME))
            .collect();
        assert_eq!(
            runtime,
            [(0x0901_0000, 0x0901_0000, 1), (0x403f_0000, 0x403f_0000, 0x2_0008)]
        );
        let tables = build(&config());
        let services = word(&tables, tables.system_table + 88);
        let table = &tables.runtime[(services - 0x403f_0000) as usize..];
        assert_eq!(&table[..8], b"RUNTSERV");
        let functions: Vec<u64> = table[24..]
            .chunks(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(functions[..3], [0x403f_0004, 0x403f_0008, 0x403f_0060]);
        assert_eq!(functions.len(), 14);
        assert_eq!(tables.runtime[..100], [7; 100]);
        let mut header = table[..136].to_vec();
        header[16..20].fill(0);
        assert_eq!(table[16..20], crc32(&header).to_le_bytes());
    }
}
