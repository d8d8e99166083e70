//! Configuration spaces that guests see.

use triarch_pci::{BarKind, command};

use crate::config::{Config, SIZE};

/// A configuration space of which some registers are set.
pub(super) fn space(registers: &[(usize, &[u8])]) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    for (at, value) in registers {
        bytes[*at..*at + value.len()].copy_from_slice(value);
    }
    bytes
}

/// The NVMe disk of QEMU: MSI-X in BAR 0, PCI Express, power management, and in the extended space SR-IOV and a serial number.
pub(super) fn nvme() -> [u8; SIZE] {
    space(&[
        (0x00, &[0x36, 0x1b, 0x10, 0x00, 0x07, 0x04, 0x10, 0x00]),
        (0x08, &[0x02, 0x02, 0x08, 0x01, 0x10, 0x20, 0x80, 0xff]),
        (0x10, &[0x04, 0, 0, 0xfe, 0, 0, 0, 0]),
        (0x2c, &[0xf4, 0x1a, 0x00, 0x11]),
        (0x30, &[0x01, 0, 0xf0, 0xfe]),
        (0x34, &[0x40, 0, 0, 0, 0, 0, 0, 0, 0x0b, 0x01]),
        (0x40, &[0x11, 0x80, 0x40, 0x80, 0x00, 0x20, 0, 0, 0x00, 0x30, 0, 0]),
        (
            0x80,
            &[
                0x10, 0x60, 0x02, 0x00, 0x00, 0x80, 0x00, 0x10, 0x10, 0x28, 0x20, 0x00, 0x11, 0x04, 0, 0,
            ],
        ),
        (0x60, &[0x01, 0x00, 0x03, 0xf8, 0x08, 0x01, 0, 0]),
        (0x100, &[0x10, 0x00, 0x01, 0x14, 1, 2, 3, 4]),
        (
            0x140,
            &[0x03, 0x00, 0x01, 0x00, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8],
        ),
    ])
}

const SIZES: [u64; 6] = [0x4000, 0, 0, 0, 0, 0];

fn config(device: &[u8; SIZE]) -> Config {
    Config::new(device, &SIZES, true)
}

pub(super) fn read<const N: usize>(config: &Config, at: u16) -> [u8; N] {
    let mut data = [0; N];
    config.read(at, &mut data, |data| {
        data.fill(0xee);
        true
    });
    data
}

fn u16_at(config: &Config, at: u16) -> u16 {
    u16::from_le_bytes(read(config, at))
}

/// Offsets and ids of the capabilities that are seen.
pub(super) fn capabilities(config: &Config) -> Vec<(u8, u8)> {
    let mut found = Vec::new();
    let [mut at] = read(config, 0x34);
    while at != 0 && found.len() < 64 {
        let [id, next] = read(config, at.into());
        found.push((at, id));
        at = next;
    }
    found
}

fn extended(config: &Config) -> Vec<(u16, u16)> {
    let mut found = Vec::new();
    let mut at = 0x100;
    while at != 0 && found.len() < 64 {
        let header = u32::from_le_bytes(read(config, at));
        if header == 0 {
            break;
        }
        found.push((at, header as u16));
        at = (header >> 20) as u16;
    }
    found
}

#[test]
fn who_it_is_is_seen_and_what_the_host_has_set_up_is_not() {
    let config = config(&nvme());
    assert_eq!(read(&config, 0), [0x36, 0x1b, 0x10, 0x00]);
    assert_eq!(read(&config, 8), [0x02, 0x02, 0x08, 0x01]);
    assert_eq!(read(&config, 0x2c), [0xf4, 0x1a, 0x00, 0x11]);
    assert_eq!(read(&config, 4), [0, 0, 0x10, 0], "COMMAND as after a reset");
    assert_eq!(read(&config, 0x0c), [0; 4], "one function, whatever the device has");
    assert_eq!(read(&config, 0x10), [4, 0, 0, 0], "no address of the host");
    assert_eq!(read(&config, 0x30), [0; 4], "no ROM");
    assert_eq!(read(&config, 0x3c), [0; 2], "no interrupt pin");
}

#[test]
fn only_known_capabilities_are_seen_where_the_device_has_them() {
    let config = config(&nvme());
    assert_eq!(capabilities(&config), [(0x40, 0x11), (0x80, 0x10), (0x60, 0x01)]);
    assert_eq!(
        extended(&config),
        [(0x100, 0xffff), (0x140, 0x03)],
        "SR-IOV is not seen"
    );
    assert_eq!(read(&config, 0x104), [0; 4]);
    assert_eq!(read(&config, 0x148), [0xee; 4], "the serial number is the device's");
    let mut hidden = nvme();
    hidden[0x80] = 0x03;
    hidden[0x60] = 0x05;
    hidden[0x62..0x64].copy_from_slice(&[0x86, 0x01]);
    let config = Config::new(&hidden, &SIZES, true);
    assert_eq!(
        capabilities(&config),
        [(0x40, 0x11), (0x60, 0x05)],
        "vital product data is not seen"
    );
    assert!(
        extended(&config).is_empty(),
        "without PCI Express there is no extended space"
    );
    assert_eq!(
        config.msi().map(|msi| (msi.count, msi.wide, msi.masks)),
        Some((8, true, true))
    );
}

#[test]
fn chains_that_lead_nowhere_end() {
    for next in [0x40, 0x3c, 0x00, 0xff, 0xfd] {
        let mut device = nvme();
        device[0x41] = next;
        let config = config(&device);
        assert_eq!(capabilities(&config)[0], (0x40, 0x11));
        assert!(capabilities(&config).len() <= 2, "{next:#x}");
    }
    let mut device = nvme();
    device[0x103] = 0x10;
    assert!(extended(&config(&device)).is_empty(), "a loop");
    device[0x34] = 0xfc;
    device[0xfc] = 0x11;
    assert!(capabilities(&config(&device)).is_empty(), "cut off by the end");
    device[0x06] = 0;
    assert!(capabilities(&config(&device)).is_empty());
}

#[test]
fn bars_are_those_of_the_device_without_their_addresses() {
    let mut device = nvme();
    device[0x10..0x28].copy_from_slice(&[
        0x0c, 0, 0, 0xe0, 0x7f, 0, 0, 0, // 64 bits, prefetchable
        0x00, 0, 0, 0xfe, // 32 bits
        0x08, 0, 0, 0xf0, // 32 bits, prefetchable
        0x01, 0xc0, 0, 0, // ports
        0x04, 0, 0, 0, // 64 bits without a second register
    ]);
    let sizes = [32 << 30, 0, 0x1000, 0x200_0000, 0x20, 0x1000];
    let shown = |ports| {
        let config = Config::new(&device, &sizes, ports);
        config
            .bars()
            .map(|bar| bar.map(|bar| (bar.kind, bar.size, bar.address)))
    };
    let wide = Some((BarKind::Memory64 { prefetchable: true }, 32 << 30, 0));
    let narrow = |prefetchable, size| Some((BarKind::Memory32 { prefetchable }, size, 0));
    let ports = Some((BarKind::Io, 0x20, 0));
    assert_eq!(
        shown(true),
        [wide, None, narrow(false, 0x1000), narrow(true, 0x200_0000), ports, None]
    );
    assert_eq!(shown(false)[4], None, "a bus without ports");
    let odd = Config::new(&device, &[0x3000, 0, 8, 1 << 33, 2, 0], true);
    assert_eq!(odd.bars(), [None; 6], "sizes that no BAR has");
}

#[test]
fn a_guest_sizes_and_places_a_bar() {
    let mut config = config(&nvme());
    config.write(0x10, &[0xff; 4]);
    config.write(0x14, &[0xff; 4]);
    assert_eq!(read(&config, 0x10), [0x04, 0xc0, 0xff, 0xff]);
    assert_eq!(read(&config, 0x14), [0xff; 4]);
    config.write(0x10, &[0x34, 0x12, 0x80, 0]);
    config.write(0x14, &[0x05, 0, 0, 0]);
    let effects = config.write(4, &(command::MEMORY | command::BUS_MASTER).to_le_bytes());
    assert!(effects.command && !effects.reset && !effects.messages);
    let bar = config.bars()[0].expect("a BAR");
    assert_eq!((bar.address, bar.decoded), (0x5_0080_0000, true));
    assert!(!config.write(4, &[6, 0]).command, "the same again");
}

#[test]
fn what_is_read_only_stays() {
    let mut config = config(&nvme());
    let before: Vec<[u8; 4]> = (0..SIZE as u16).step_by(4).map(|at| read(&config, at)).collect();
    for at in (0..SIZE as u16).step_by(4) {
        config.write(at, &[0xff; 4]);
        config.write(at, &[0; 4]);
    }
    let after: Vec<[u8; 4]> = (0..SIZE as u16).step_by(4).map(|at| read(&config, at)).collect();
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        // Device control begins as the device had it.
        if 4 * at != 0x88 {
            assert_eq!(before, after, "{:#x}", 4 * at);
        }
    }
    config.write(0xffe, &[0xff; 4]);
    let mut beyond = [0; 4];
    config.read(0xffe, &mut beyond, |_| false);
    assert_eq!(beyond, [0xff; 4], "nothing is there");
}

#[test]
fn the_device_looks_like_a_part_of_the_root_complex() {
    let config = config(&nvme());
    assert_eq!(u16_at(&config, 0x82), 0x0092);
    assert_eq!(read(&config, 0x8c), [0; 4], "no link");
    assert_eq!(
        read(&config, 0x8a),
        [0x20 & 0xee, 0],
        "pending transactions are the device's"
    );
}

#[test]
fn below_a_port_it_is_an_endpoint_with_its_link() {
    let device = nvme();
    let mut config = config(&device);
    config.show_link(&device);
    assert_eq!(u16_at(&config, 0x82), 0x0002, "an endpoint");
    assert_eq!(read(&config, 0x8c), [0x11, 0, 0, 0], "no power management of the link");
    assert_eq!(u16_at(&config, 0x92), 0x0011, "its link is up: one lane at 2.5 GT/s");
    config.write(0x90, &[0xff, 0xff]);
    assert_eq!(u16_at(&config, 0x90), 0x00cb);
    let mut fast = device;
    fast[0x8c..0x8e].copy_from_slice(&[0x04, 0x05]);
    fast[0x92..0x94].copy_from_slice(&[0x03, 0x51]);
    config.show_link(&fast);
    assert_eq!((u16_at(&config, 0x8c), u16_at(&config, 0x92)), (0x0104, 0x0103));
}

#[test]
fn power_states_are_the_guests_own() {
    let mut config = config(&nvme());
    assert_eq!(u16_at(&config, 0x62), 3, "no wake-up events");
    assert_eq!(u16_at(&config, 0x64), 0x08);
    config.write(0x64, &[0x03, 0x81]);
    assert_eq!(u16_at(&config, 0x64), 0x0b);
}

#[test]
fn a_guest_that_resets_the_function_is_heard() {
    let mut config = config(&nvme());
    config.write(4, &[6, 0]);
    let effects = config.write(0x42, &0xc040u16.to_le_bytes());
    assert!(effects.messages);
    assert_eq!(u16_at(&config, 0x42), 0xc040, "65 vectors");
    assert!(config.write(0x88, &[0x10, 0xa8]).reset);
    assert!(config.write(0x89, &[0x80]).reset);
    assert!(!config.write(0x88, &[0x80]).reset);
    config.reset();
    assert_eq!((config.command(), u16_at(&config, 0x42)), (0, 0x0040));
    let mut without = nvme();
    without[0x87] = 0;
    let mut config = Config::new(&without, &SIZES, true);
    assert!(!config.write(0x88, &[0x10, 0xa8]).reset, "it cannot do that");
}

#[test]
fn what_the_vendor_has_is_read_through() {
    let mut device = nvme();
    device[0x60..0x68].copy_from_slice(&[0x09, 0x00, 0x08, 1, 2, 3, 4, 5]);
    let mut config = config(&device);
    assert_eq!(read(&config, 0x60), [0x09, 0x00, 0x08, 0xee]);
    assert_eq!(read(&config, 0x64), [0xee; 4]);
    config.write(0x64, &[0; 4]);
    let mut data = [0; 4];
    config.read(0x64, &mut data, |_| false);
    assert_eq!(data, [0; 4], "a device that does not answer");
    device[0x62] = 0xf0;
    assert_eq!(
        capabilities(&Config::new(&device, &SIZES, true)).len(),
        2,
        "longer than what is there"
    );
}

#[test]
fn as_many_vectors_are_seen_as_the_host_has() {
    let mut config = config(&nvme());
    assert_eq!(config.trapped(0), [0x2000..0x2410, 0x3000..0x3010]);
    assert!(config.trapped(2).is_empty());
    config.limit_msix(16);
    assert_eq!(u16_at(&config, 0x42), 15);
    assert_eq!(config.trapped(0), [0x2000..0x2100, 0x3000..0x3008]);
    config.limit_msix(0);
    assert_eq!(u16_at(&config, 0x42), 0);
}
