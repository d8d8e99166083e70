//! SMBIOS 3 tables (DMTF DSP0134, version 3.7): what `dmidecode` and cloud-init read.
//!
//! Structures: BIOS information (0), system information (1), chassis (3), OEM strings (11), system boot (32), end (127). The entry
//! point comes first, on the 16-byte boundary at 0xF0000 where a kernel without EFI searches for it.

use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::acpi::checksum;

/// Where the tables go on a PC.
pub const PC_ADDRESS: u64 = 0xF_0000;
/// Bytes that there are for them: up to 1 MiB.
pub const PC_SIZE: usize = 0x1_0000;

const ANCHOR: [u8; 5] = *b"_SM3_";
const MANUFACTURER: &str = "Triarch";
const DEFAULT_PRODUCT: &str = "Triarch virtual machine";
/// Structures begin on this boundary behind the entry point.
const ALIGN: usize = 16;
/// Strings of a structure are counted in a byte.
const MAX_STRINGS: usize = 255;

/// What the tables say. Strings may not contain NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SmbiosConfig {
    /// Version of the VMM, as the BIOS version.
    pub version: String,
    /// System serial number.
    pub serial_number: Option<String>,
    /// System UUID in the order of its text form.
    pub uuid: Option<[u8; 16]>,
    /// OEM strings, in order.
    pub oem_strings: Vec<String>,
}

/// Why a configuration makes no tables.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SmbiosError {
    /// A string is empty or has a NUL, which ends SMBIOS strings.
    #[error("the SMBIOS {what} is empty or has a NUL character")]
    BadString {
        /// The string's use.
        what: &'static str,
    },
    /// More OEM strings than a structure holds.
    #[error("{count} OEM strings are more than the {max} that SMBIOS holds")]
    TooManyStrings {
        /// Strings in the configuration.
        count: usize,
        /// The most.
        max: usize,
    },
    /// The tables exceed their place.
    #[error("the SMBIOS tables take {size} bytes and their place has {room}; shorten the OEM strings")]
    TooLarge {
        /// Bytes of the tables.
        size: usize,
        /// Bytes of the place.
        room: usize,
    },
}

/// A text that is no UUID.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not a UUID; write it as 8-4-4-4-12 hexadecimal digits")]
pub struct UuidError(
    /// The text.
    pub String,
);

/// Parses a UUID of the form 8-4-4-4-12 hexadecimal digits into bytes of that order.
pub fn parse_uuid(text: &str) -> Result<[u8; 16], UuidError> {
    const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];
    let error = || UuidError(text.to_owned());
    let groups: Vec<&str> = text.split('-').collect();
    if groups.iter().map(|group| group.len()).ne(GROUPS) {
        return Err(error());
    }
    let digits: Option<Vec<u8>> = groups
        .concat()
        .chars()
        .map(|digit| digit.to_digit(16).map(|value| value as u8))
        .collect();
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.ok_or_else(error)?.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Ok(uuid)
}

/// The 64-bit entry point (5.2.2).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct EntryPoint {
    anchor: [u8; 5],
    checksum: u8,
    length: u8,
    major: u8,
    minor: u8,
    docrev: u8,
    revision: u8,
    reserved: u8,
    max_size: U32,
    table: U64,
}

const _: () = assert!(size_of::<EntryPoint>() == 24);

/// Structures in the making.
struct Structures {
    bytes: Vec<u8>,
    next_handle: u16,
}

impl Structures {
    /// Appends a structure: its formatted area behind the header, then its strings, then the end mark (6.1.3).
    fn add(&mut self, kind: u8, formatted: &[u8], strings: &[&str]) {
        self.bytes.extend([kind, 4 + formatted.len() as u8]);
        self.bytes.extend(self.next_handle.to_le_bytes());
        self.next_handle += 1;
        self.bytes.extend_from_slice(formatted);
        for string in strings {
            self.bytes.extend_from_slice(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
    }
}

/// Makes entry point and structures for the guest physical address `at`, a multiple of 16; they are contiguous and take at most
/// `room` bytes.
pub fn build(config: &SmbiosConfig, at: u64, room: usize) -> Result<Vec<u8>, SmbiosError> {
    check(config)?;
    let mut structures = Structures {
        bytes: Vec::new(),
        next_handle: 0,
    };
    structures.add(0, &bios_information(), &[MANUFACTURER, &config.version]);
    add_system(&mut structures, config);
    // Type: other; boot-up, power supply and thermal state: safe; security: none.
    structures.add(
        3,
        &[1, 1, 0, 0, 0, 3, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[MANUFACTURER],
    );
    if !config.oem_strings.is_empty() {
        let strings: Vec<&str> = config.oem_strings.iter().map(String::as_str).collect();
        structures.add(11, &[strings.len() as u8], &strings);
    }
    // Boot status: no errors detected.
    structures.add(32, &[0, 0, 0, 0, 0, 0, 0], &[]);
    structures.add(127, &[], &[]);

    let table_at = size_of::<EntryPoint>().next_multiple_of(ALIGN);
    let size = table_at + structures.bytes.len();
    if size > room {
        return Err(SmbiosError::TooLarge { size, room });
    }
    let mut entry = EntryPoint {
        anchor: ANCHOR,
        checksum: 0,
        length: size_of::<EntryPoint>() as u8,
        major: 3,
        minor: 7,
        docrev: 0,
        revision: 1,
        reserved: 0,
        max_size: (structures.bytes.len() as u32).into(),
        table: (at + table_at as u64).into(),
    };
    entry.checksum = checksum(entry.as_bytes());
    let mut bytes = entry.as_bytes().to_vec();
    bytes.resize(table_at, 0);
    bytes.extend(structures.bytes);
    Ok(bytes)
}

fn check(config: &SmbiosConfig) -> Result<(), SmbiosError> {
    let named = [
        ("version", Some(&config.version)),
        ("serial number", config.serial_number.as_ref()),
    ];
    let oem = config.oem_strings.iter().map(|s| ("OEM string", Some(s)));
    for (what, string) in named.into_iter().chain(oem) {
        if string.is_some_and(|s| s.is_empty() || s.contains('\0')) {
            return Err(SmbiosError::BadString { what });
        }
    }
    if config.oem_strings.len() > MAX_STRINGS {
        return Err(SmbiosError::TooManyStrings {
            count: config.oem_strings.len(),
            max: MAX_STRINGS,
        });
    }
    Ok(())
}

/// BIOS information (7.1): vendor and version, no date, no size, "virtual machine" in the second extension byte.
fn bios_information() -> [u8; 22] {
    const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
    const IS_VIRTUAL_MACHINE: u8 = 1 << 4;
    let mut formatted = [0; 22];
    formatted[0] = 1;
    formatted[1] = 2;
    formatted[6..14].copy_from_slice(&CHARACTERISTICS_NOT_SUPPORTED.to_le_bytes());
    formatted[15] = IS_VIRTUAL_MACHINE;
    // No release numbers: 0xff. The last two bytes are the extended ROM size.
    formatted[16..20].fill(0xff);
    formatted
}

/// System information (7.2).
fn add_system(structures: &mut Structures, config: &SmbiosConfig) {
    const WAKE_UP_POWER_SWITCH: u8 = 6;
    let mut strings = vec![MANUFACTURER, DEFAULT_PRODUCT, &config.version];
    let mut formatted = [0; 23];
    formatted[..3].copy_from_slice(&[1, 2, 3]);
    if let Some(serial) = &config.serial_number {
        strings.push(serial);
        formatted[3] = strings.len() as u8;
    }
    if let Some(mut uuid) = config.uuid {
        // The first three fields are little-endian numbers (7.2.1).
        uuid[..4].reverse();
        uuid[4..6].reverse();
        uuid[6..8].reverse();
        formatted[4..20].copy_from_slice(&uuid);
    }
    formatted[20] = WAKE_UP_POWER_SWITCH;
    structures.add(1, &formatted, &strings);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config() -> SmbiosConfig {
        SmbiosConfig {
            version: "0.1.0".into(),
            serial_number: Some("S-1".into()),
            uuid: Some(parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap()),
            oem_strings: vec!["one".into(), "two".into()],
        }
    }

    /// A structure as a reader sees it: type, formatted area with header, strings.
    type Parsed = (u8, Vec<u8>, Vec<String>);

    fn parse(bytes: &[u8]) -> Vec<Parsed> {
        assert_eq!(bytes[..5], ANCHOR);
        assert_eq!(bytes[..24].iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
        let at = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) - PC_ADDRESS;
        let size = u32::from_le_bytes(bytes[12..16].try_into().unwrap());
        let mut rest = &bytes[at as usize..at as usize + size as usize];
        assert_eq!(at + u64::from(size), bytes.len() as u64);
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (formatted, tail) = rest.split_at(rest[1].into());
            let end = tail.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = tail[..end]
                .split(|&byte| byte == 0)
                .filter(|s| !s.is_empty())
                .map(|s| String::from_utf8(s.to_vec()).unwrap())
                .collect();
            found.push((formatted[0], formatted.to_vec(), strings));
            rest = &tail[end + 2..];
        }
        found
    }

    fn by_type(parsed: &[Parsed], kind: u8) -> &Parsed {
        parsed.iter().find(|s| s.0 == kind).unwrap()
    }

    #[test]
    fn system_information() {
        let parsed = parse(&build(&config(), PC_ADDRESS, PC_SIZE).unwrap());
        let kinds: Vec<u8> = parsed.iter().map(|s| s.0).collect();
        assert_eq!(kinds, [0, 1, 3, 11, 32, 127]);
        let (_, system, strings) = by_type(&parsed, 1);
        assert_eq!(strings, &[MANUFACTURER, DEFAULT_PRODUCT, "0.1.0", "S-1"]);
        assert_eq!(system.len(), 0x1b);
        assert_eq!(system[7], 4, "serial number");
        assert_eq!(
            system[8..24],
            [
                0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff
            ]
        );
        let (_, oem, strings) = by_type(&parsed, 11);
        assert_eq!((oem[4], strings.len()), (2, 2));
    }

    #[test]
    fn optional_parts_may_be_missing() {
        let config = SmbiosConfig {
            version: "1".into(),
            ..SmbiosConfig::default()
        };
        let parsed = parse(&build(&config, PC_ADDRESS, PC_SIZE).unwrap());
        assert!(parsed.iter().all(|s| s.0 != 11));
        let (_, system, strings) = by_type(&parsed, 1);
        assert_eq!((system[7], strings.len()), (0, 3));
        assert_eq!(system[8..24], [0; 16]);
    }

    #[test]
    fn bad_strings_are_errors() {
        let with = |change: fn(&mut SmbiosConfig)| {
            let mut config = config();
            change(&mut config);
            build(&config, PC_ADDRESS, PC_SIZE).unwrap_err().to_string()
        };
        assert!(with(|c| c.oem_strings[0].clear()).contains("OEM string is empty"));
        assert!(with(|c| c.serial_number = Some("a\0b".into())).contains("serial number"));
        assert!(with(|c| c.oem_strings = vec!["x".into(); 256]).contains("256 OEM strings"));
        assert!(with(|c| c.oem_strings = vec!["x".repeat(0x1_0000)]).contains("shorten"));
    }

    #[test]
    fn uuid_text() {
        assert_eq!(
            parse_uuid("12345678-9abc-DEF0-1234-56789abcdef0").unwrap()[..8],
            [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0]
        );
        for bad in [
            "",
            "x",
            "12345678-9abc-def0-1234-56789abcdef",
            "12345678-9abc-def0-1234-56789abcdeg0",
            "123456789abcdef0123456789abcdef0",
            "ä2345678-9abc-def0-1234-56789abcdef0",
        ] {
            assert_eq!(parse_uuid(bad), Err(UuidError(bad.into())));
        }
    }

    proptest! {
        #[test]
        fn strings_come_back(
            serial in proptest::option::of("[ -~]{1,40}"),
            oem in proptest::collection::vec("[ -~]{1,60}", 0..40),
        ) {
            let config = SmbiosConfig { serial_number: serial.clone(), oem_strings: oem.clone(), ..config() };
            let parsed = parse(&build(&config, PC_ADDRESS, PC_SIZE).unwrap());
            if oem.is_empty() {
                prop_assert!(parsed.iter().all(|s| s.0 != 11));
            } else {
                prop_assert_eq!(&by_type(&parsed, 11).2, &oem);
            }
            prop_assert_eq!(by_type(&parsed, 1).2.get(3).cloned(), serial);
        }

        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,40}") {
            let _ = parse_uuid(&text);
        }
    }
}
