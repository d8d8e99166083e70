//! Where everything is: the identity, the capabilities and the BAR (virtio 1.2, 4.1.2 to 4.1.4).

use triarch_pci::{BarKind, ConfigSpace, Identity, LayoutError, MsiX};

use crate::DeviceId;

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;

/// The one BAR.
pub(super) const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
/// Common configuration.
pub(super) const COMMON: u64 = 0x0000;
/// ISR status.
pub(super) const ISR: u64 = 0x1000;
/// The device's own configuration.
pub(super) const DEVICE: u64 = 0x2000;
/// Doorbells.
pub(super) const NOTIFY: u64 = 0x3000;
/// MSI-X vector table.
pub(super) const TABLE: u64 = 0x4000;
/// MSI-X pending bits, on a page of their own.
pub(super) const PENDING: u64 = 0x7000;

/// Bytes of the common configuration, up to and including queue_reset.
pub(super) const COMMON_LEN: u64 = 0x3c;
/// Bytes the device's own configuration may have.
pub(super) const DEVICE_LEN: u64 = 0x1000;
/// Distance of two queues' doorbells in bytes.
pub(super) const NOTIFY_STRIDE: u64 = 4;
/// As many as have a vector of their own beside the one for configuration changes.
pub(super) const MAX_QUEUES: usize = ((PENDING - TABLE) / 16 - 1) as usize;

/// Offset of the doorbell of queue `index` in the BAR.
pub(super) fn doorbell(index: u16) -> u64 {
    NOTIFY + NOTIFY_STRIDE * u64::from(index)
}

/// Offsets of the capabilities whose registers do something.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capabilities {
    /// MSI-X.
    pub(super) msix: u16,
    /// Access to the BAR through configuration space.
    pub(super) access: u16,
}

/// The fields of the access capability, from its start.
pub(super) mod access {
    /// Which BAR.
    pub(in super::super) const BAR: u16 = 4;
    /// Where in it.
    pub(in super::super) const OFFSET: u16 = 8;
    /// How many bytes.
    pub(in super::super) const LENGTH: u16 = 12;
    /// The data.
    pub(in super::super) const DATA: u16 = 16;
    /// End of the data.
    pub(in super::super) const END: u16 = 20;
}

/// The PCI device id of a device type.
pub(super) fn device_id(id: DeviceId) -> u16 {
    FIRST_DEVICE.saturating_add(id.number())
}

fn class(id: DeviceId) -> u32 {
    match id {
        DeviceId::Net => 0x02_00_00,
        DeviceId::Block => 0x01_00_00,
        DeviceId::Fs => 0x01_80_00,
        DeviceId::Console | DeviceId::Vsock => 0x07_80_00,
        DeviceId::Iommu => 0x08_06_00,
        DeviceId::Rng | DeviceId::Balloon | DeviceId::Mem | DeviceId::Other(_) => 0xff_00_00,
    }
}

/// struct virtio_pci_cap without its first two bytes: cap_len, cfg_type, bar, id, padding, offset and length.
fn structure(kind: u8, extra: u8, offset: u64, length: u64) -> [u8; 14] {
    let mut body = [0; 14];
    body[..3].copy_from_slice(&[16 + extra, kind, BAR]);
    // Both are below the BAR's size.
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..].copy_from_slice(&(length as u32).to_le_bytes());
    body
}

/// The configuration space of a device of type `id` with `queues` queues.
pub(super) fn config_space(id: DeviceId, queues: u16, msix: &MsiX) -> Result<(ConfigSpace, Capabilities), LayoutError> {
    let mut space = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: device_id(id),
        revision: 1,
        class: class(id),
        subsystem_vendor: VENDOR,
        subsystem: device_id(id),
    });
    space.add_bar(BAR.into(), BarKind::Memory64 { prefetchable: true }, BAR_SIZE)?;
    let (body, writable) = msix.capability(BAR, TABLE as u32, PENDING as u32);
    let msix = space.add_capability(MsiX::CAPABILITY_ID, &body, &writable)?;
    let mut add = |body: &[u8], writable: &[u8]| space.add_capability(VENDOR_CAPABILITY, body, writable);
    add(&structure(1, 0, COMMON, COMMON_LEN), &[])?;
    add(&structure(3, 0, ISR, 1), &[])?;
    add(&structure(4, 0, DEVICE, DEVICE_LEN), &[])?;
    let multiplier = (NOTIFY_STRIDE as u32).to_le_bytes();
    let notify = structure(2, 4, NOTIFY, NOTIFY_STRIDE * u64::from(queues));
    add(&[&notify[..], &multiplier].concat(), &[])?;
    // Driver chooses bar, offset, length and data.
    let mut chosen = [0; 18];
    chosen[2] = 0xff;
    chosen[6..].fill(0xff);
    let access = add(&[&structure(5, 4, 0, 0)[..], &[0; 4]].concat(), &chosen)?;
    Ok((space, Capabilities { msix, access }))
}
