//! The common configuration registers (virtio 1.2, 4.1.4.3).

use triarch_device_core::AccessError;

use super::core::{Core, QueueSlot};
use super::layout::COMMON_LEN;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_NOTIFY_DATA: u64 = 0x38;
const QUEUE_RESET: u64 = 0x3a;

/// Reads any bytes of the registers: reading has no side effect.
pub(super) fn read(core: &Core, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
    let registers = render(core);
    let from = usize::try_from(offset).map_err(|_| AccessError::BadAccess)?;
    let wanted = from.checked_add(data.len()).and_then(|end| registers.get(from..end));
    data.copy_from_slice(wanted.ok_or(AccessError::BadAccess)?);
    Ok(())
}

/// Writes one register in its own width, or half of a 64-bit one.
pub(super) fn write(core: &mut Core, offset: u64, data: &[u8]) -> Result<(), AccessError> {
    let value = data.iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    match (offset, data.len()) {
        (DEVICE_FEATURE_SELECT, 4) => core.device_feature_select = value as u32,
        (DRIVER_FEATURE_SELECT, 4) => core.driver_feature_select = value as u32,
        (DRIVER_FEATURE, 4) => set_driver_features(core, value as u32),
        (CONFIG_VECTOR, 2) => core.interrupts.set_config_vector(value as u16),
        (STATUS, 1) => core.set_status(value as u8),
        (QUEUE_SELECT, 2) => core.queue_select = value as u16,
        (QUEUE_VECTOR, 2) => core.set_vector(core.queue_select, value as u16),
        (QUEUE_ENABLE, 2) if value == 1 => core.enable(core.queue_select),
        (QUEUE_RESET, 2) if value == 1 => core.reset_queue(core.queue_select),
        (QUEUE_ENABLE | QUEUE_RESET, 2) => {}
        (QUEUE_SIZE, 2) => set_queue_size(core, value as u16),
        (QUEUE_DESC..=0x37, 4 | 8) if offset.is_multiple_of(data.len() as u64) => set_address(core, offset, data),
        // Registers a driver may only read.
        (DEVICE_FEATURE, 4) | (GENERATION, 1) | (NUM_QUEUES | QUEUE_NOTIFY_OFF | QUEUE_NOTIFY_DATA, 2) => {}
        _ => return Err(AccessError::BadAccess),
    }
    Ok(())
}

fn render(core: &Core) -> [u8; COMMON_LEN as usize] {
    let mut r = [0; COMMON_LEN as usize];
    let mut put = |at: u64, bytes: &[u8]| r[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    let interrupts = &core.interrupts;
    let offered = half(core.offered(), core.device_feature_select);
    let acknowledged = half(core.driver_features, core.driver_feature_select);
    put(DEVICE_FEATURE_SELECT, &core.device_feature_select.to_le_bytes());
    put(DEVICE_FEATURE, &offered.to_le_bytes());
    put(DRIVER_FEATURE_SELECT, &core.driver_feature_select.to_le_bytes());
    put(DRIVER_FEATURE, &acknowledged.to_le_bytes());
    put(CONFIG_VECTOR, &interrupts.config_vector().to_le_bytes());
    put(NUM_QUEUES, &(core.queues.len() as u16).to_le_bytes());
    put(STATUS, &[interrupts.status()]);
    put(GENERATION, &[interrupts.generation()]);
    put(QUEUE_SELECT, &core.queue_select.to_le_bytes());
    put(QUEUE_VECTOR, &interrupts.queue_vector(core.queue_select).to_le_bytes());
    // A queue that does not exist has size zero.
    if let Some(queue) = core.queues.get(usize::from(core.queue_select)) {
        put(QUEUE_SIZE, &queue.size.to_le_bytes());
        put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
        put(QUEUE_NOTIFY_OFF, &core.queue_select.to_le_bytes());
        put(QUEUE_DESC, &queue.descriptors.to_le_bytes());
        put(QUEUE_DRIVER, &queue.driver.to_le_bytes());
        put(QUEUE_DEVICE, &queue.device.to_le_bytes());
    }
    // QUEUE_RESET reads zero: a reset is done when its write is.
    r
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_driver_features(core: &mut Core, value: u32) {
    if !core.negotiating() {
        return;
    }
    match core.driver_feature_select {
        0 => core.driver_features = core.driver_features & !0xffff_ffff | u64::from(value),
        1 => core.driver_features = core.driver_features & 0xffff_ffff | u64::from(value) << 32,
        _ => core.foreign_features |= value != 0,
    }
}

/// The selected queue while its registers may change.
fn idle_queue(core: &mut Core) -> Option<&mut QueueSlot> {
    core.queues
        .get_mut(usize::from(core.queue_select))
        .filter(|queue| !queue.enabled)
}

fn set_queue_size(core: &mut Core, size: u16) {
    let Some(queue) = idle_queue(core) else { return };
    if size.is_power_of_two() && size <= queue.max_size {
        queue.size = size;
    } else {
        core.warn(&format_args!("the driver asked for a queue of {size} descriptors"));
    }
}

fn set_address(core: &mut Core, offset: u64, data: &[u8]) {
    let Some(queue) = idle_queue(core) else { return };
    let address = match offset {
        QUEUE_DESC..QUEUE_DRIVER => &mut queue.descriptors,
        QUEUE_DRIVER..QUEUE_DEVICE => &mut queue.driver,
        _ => &mut queue.device,
    };
    let mut bytes = address.to_le_bytes();
    let from = (offset & 7) as usize;
    // Aligned accesses of 4 or 8 bytes stay in the register.
    bytes[from..from + data.len()].copy_from_slice(data);
    *address = u64::from_le_bytes(bytes);
}
