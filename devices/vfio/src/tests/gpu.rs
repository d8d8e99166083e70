//! What GPUs need: large BARs, cliques, and the registers of each other.

use std::sync::Arc;

use triarch_device_core::mock::MockRouter;
use triarch_device_core::{Bus, MsiRouter};
use triarch_pci::{AddError, BarAllocator, BarKind, PciFunction, PciRoot};

use super::fake::{Fake, Sysfs, options};
use super::space::{capabilities, nvme, read, space};
use crate::config::{CliqueError, Config, SIZE};
use crate::{DmaMap, FunctionError, Iommu, Options, VfioPci, lock};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The start of an H100's configuration space, as somebody's host showed it (10de:2330, `hexdump /sys/bus/pci/devices/.../config`): up to
/// where its PCI Express capability begins.
fn h100() -> [u8; SIZE] {
    space(&[
        (
            0x00,
            &[
                0xde, 0x10, 0x30, 0x23, 0x47, 0x05, 0x10, 0x00, 0xa1, 0x00, 0x02, 0x03, 0, 0, 0, 0,
            ],
        ),
        (
            0x10,
            &[
                0x0c, 0x00, 0x00, 0x02, 0xc0, 0x38, 0, 0, 0x0c, 0x00, 0x00, 0x00, 0xa0, 0x38, 0, 0,
            ],
        ),
        (
            0x20,
            &[
                0x0c, 0x00, 0x00, 0x00, 0xc0, 0x38, 0, 0, 0, 0, 0, 0, 0xde, 0x10, 0xc1, 0x16,
            ],
        ),
        (0x30, &[0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x0a, 0x01, 0, 0]),
        (0x40, &[0x01, 0x48, 0x13, 0, 0x08, 0, 0, 0, 0x05, 0x60, 0x88, 0x01]),
    ])
}

/// What its BARs have: registers, memory of 80 GB rounded up, and more registers.
const SIZES: [u64; 6] = [16 * MIB, 0, 128 * GIB, 0, 32 * MIB, 0];

#[test]
fn an_h100_is_seen_with_all_of_its_memory() {
    let config = Config::new(&h100(), &SIZES, true);
    assert_eq!(read(&config, 0), [0xde, 0x10, 0x30, 0x23]);
    assert_eq!(read(&config, 9), [0, 2, 3], "a 3D controller");
    let wide = |size| Some((BarKind::Memory64 { prefetchable: true }, size));
    let bars = config.bars().map(|bar| bar.map(|bar| (bar.kind, bar.size)));
    let shown = [wide(SIZES[0]), None, wide(SIZES[2]), None, wide(SIZES[4]), None];
    assert_eq!(bars, shown);
    assert_eq!(capabilities(&config), [(0x40, 0x01), (0x48, 0x05)]);
    assert_eq!(
        config.msi().map(|msi| (msi.count, msi.wide, msi.masks)),
        Some((16, true, true))
    );
    let mut config = config;
    config.write(0x18, &[0xff; 4]);
    config.write(0x1c, &[0xff; 4]);
    assert_eq!(
        (read(&config, 0x18), read(&config, 0x1c)),
        ([0x0c, 0, 0, 0], [0xe0, 0xff, 0xff, 0xff])
    );
}

fn gpu(fake: &Fake, iommu: &Iommu, sysfs: &Sysfs, name: &str, options: Options) -> Result<VfioPci, FunctionError> {
    let path = sysfs.device(name, Some(7), Some("vfio-pci"));
    let router: Arc<dyn MsiRouter> = Arc::new(MockRouter::default());
    let device = iommu.open(&path, false).expect("a device");
    VfioPci::new(&device, Arc::new(fake.clone()), &router, options)
}

#[test]
fn huge_bars_have_a_place_where_the_guest_has_the_address_bits() {
    let (mmio, io) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
    let windows = |bits: u32| BarAllocator {
        mmio32: 0xc000_0000..0xd000_0000,
        mmio64: 64 * GIB..1 << bits,
        io: 0x1000..0x2000,
    };
    let function = || {
        let fake = Fake::new(&h100(), SIZES);
        let made = gpu(&fake, &fake.iommu(), &Sysfs::new(), "0000:01:00.0", options(None));
        Arc::new(made.expect("a function"))
    };
    let root = PciRoot::new(0, mmio.clone(), io.clone(), windows(46));
    for n in 0..8 {
        let function = function();
        root.add(function.clone(), None).expect("a slot");
        let bar = function.bars()[2].expect("its memory");
        assert_eq!(bar.address % (128 * GIB), 0);
        assert!(
            bar.address >= 128 * GIB * (n + 1) && bar.address + bar.size <= 1 << 46,
            "{bar:?}"
        );
    }
    let narrow = PciRoot::new(0, mmio, io, windows(37));
    let refused = narrow.add(function(), None);
    assert_eq!(
        refused,
        Err(AddError::NoRoom {
            bar: 2,
            size: 128 * GIB
        })
    );
}

#[test]
fn a_clique_is_told_where_the_driver_looks() {
    let mut config = Config::new(&h100(), &SIZES, true);
    assert_eq!(config.join_clique(5), Ok(()));
    assert_eq!(capabilities(&config), [(0xc8, 0x09), (0x40, 0x01), (0x48, 0x05)]);
    assert_eq!(read(&config, 0xc8), [0x09, 0x40, 0x08, b'P']);
    assert_eq!(read(&config, 0xcc), [b'2', b'P', 5 << 3, 0]);
    config.write(0xcc, &[0xff; 4]);
    assert_eq!(read(&config, 0xcc), [b'2', b'P', 5 << 3, 0], "nobody changes it");
    // As GPUs since Turing have it: MSI-X where others look for the clique.
    let mut turing = h100();
    turing[0x49] = 0xc8;
    turing[0xc8..0xcc].copy_from_slice(&[0x11, 0x00, 0x05, 0x00]);
    let mut config = Config::new(&turing, &SIZES, true);
    assert_eq!(config.join_clique(15), Ok(()));
    assert_eq!(read(&config, 0xd4), [0x09, 0x40, 0x08, b'P']);
    assert_eq!(read(&config, 0xd8), [b'2', b'P', 15 << 3, 0]);
    // One that is not seen takes its place, too.
    turing[0xc9] = 0xd8;
    turing[0xd8] = 0x13;
    let full = Config::new(&turing, &SIZES, true).join_clique(0);
    assert_eq!(full, Err(CliqueError::NoPlace));
    assert_eq!(
        Config::new(&nvme(), &SIZES, true).join_clique(0),
        Err(CliqueError::Stranger)
    );
    let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
    let asked = Options {
        clique: Some(1),
        ..options(None)
    };
    let refused = gpu(&fake, &fake.iommu(), &Sysfs::new(), "0000:01:00.0", asked);
    let said = refused.err().expect("refused").to_string();
    assert!(said.starts_with("0000:01:00.0: only GPUs of NVIDIA"), "{said}");
    assert_eq!((fake.open_files(), lock(&fake.world).admitted), (0, 0));
}

#[test]
fn devices_of_one_guest_reach_each_others_registers() {
    let fake = Fake::new(&nvme(), [0x4000, 0, 0, 0, 0, 0]);
    let (iommu, sysfs, map) = (fake.iommu(), Sysfs::new(), DmaMap::default());
    map.insert(0, MIB, 0x7000_0000).expect("memory");
    let function = |name| {
        let function = gpu(&fake, &iommu, &sysfs, name, options(Some(map.clone())));
        let function = function.expect("a function");
        map.attach(function.host().container()).expect("memory");
        function
    };
    let reached = || {
        let world = lock(&fake.world);
        world
            .maps
            .iter()
            .map(|((_, at), (len, ..))| (*at, *len))
            .collect::<Vec<_>>()
    };
    let memory = (0, MIB);
    let first = function("0000:01:00.0");
    first.bar_moved(0, Some(GIB));
    assert_eq!(reached(), [memory], "nobody else is there");
    let second = function("0000:02:00.0");
    assert_eq!(reached(), [memory, (GIB, 0x2000)], "without the table");
    second.bar_moved(0, Some(2 * GIB));
    assert_eq!(reached(), [memory, (GIB, 0x2000), (2 * GIB, 0x2000)]);
    first.bar_moved(0, None);
    assert_eq!(reached(), [memory, (2 * GIB, 0x2000)]);
    first.bar_moved(0, Some(3 * GIB));
    assert_eq!(reached(), [memory, (2 * GIB, 0x2000), (3 * GIB, 0x2000)]);
    second.stop();
    assert_eq!(reached(), [memory], "one is left");
    fake.fail("map", libc::EFAULT);
    let third = function("0000:03:00.0");
    third.bar_moved(0, Some(4 * GIB));
    assert_eq!(reached(), [memory], "a host that cannot do that");
    assert_eq!(lock(&fake.world).mapped.len(), 2, "the guest reaches them all the same");
    map.clear();
    drop((first, second, third));
    assert!(reached().is_empty());
    assert_eq!(fake.open_files(), 0);
}
