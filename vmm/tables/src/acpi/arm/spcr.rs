//! SPCR: the console (Microsoft's Serial Port Console Redirection table, revision 1.07).

use super::super::table::Table;
use super::config::Uart;

const REVISION: u8 = 2;
const PL011: u8 = 3;
/// The interrupt is one of a GIC.
const GIC_INTERRUPT: u8 = 1 << 3;
/// Generic address: memory space, 32 bits wide, at bit 0, accessed by 32 bits.
const REGISTERS: [u8; 4] = [0, 32, 0, 3];
const ONE_STOP_BIT: u8 = 1;
const NO_PCI_DEVICE: u16 = 0xffff;

pub(super) fn spcr(uart: &Uart) -> Vec<u8> {
    let mut table = Table::new(*b"SPCR", REVISION);
    table.push(&[PL011, 0, 0, 0]);
    table.push(&REGISTERS);
    table.push(&u64::from(uart.base).to_le_bytes());
    table.push(&[GIC_INTERRUPT, 0]);
    table.push(&uart.gsi.to_le_bytes());
    // Baud rate as it is, no parity, no flow control, VT100, no language.
    table.push(&[0, 0, ONE_STOP_BIT, 0, 0, 0]);
    table.push(&NO_PCI_DEVICE.to_le_bytes());
    table.push(&NO_PCI_DEVICE.to_le_bytes());
    // Bus, device, function, flags, segment, UART clock.
    table.push(&[0; 12]);
    table.finish()
}
