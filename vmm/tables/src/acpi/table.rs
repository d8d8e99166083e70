//! The header that all tables but the RSDP share (ACPI 5.2.6).

use acpi_tables::Aml;

pub(super) const OEM_ID: [u8; 6] = *b"TRIARC";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"TRIARCH ";
pub(super) const OEM_REVISION: u32 = 1;
pub(super) const CREATOR_ID: [u8; 4] = *b"TRIA";
pub(super) const CREATOR_REVISION: [u8; 4] = [1, 0, 0, 0];
const LENGTH_AT: usize = 4;
const CHECKSUM_AT: usize = 9;

/// A table that grows; length and checksum are set at the end.
pub(super) struct Table(Vec<u8>);

impl Table {
    pub(super) fn new(signature: [u8; 4], revision: u8) -> Self {
        let mut bytes = signature.to_vec();
        bytes.extend([0; 4]);
        bytes.extend([revision, 0]);
        bytes.extend(OEM_ID);
        bytes.extend(OEM_TABLE_ID);
        bytes.extend(OEM_REVISION.to_le_bytes());
        bytes.extend(CREATOR_ID);
        bytes.extend(CREATOR_REVISION);
        Self(bytes)
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn push_aml(&mut self, aml: &dyn Aml) {
        aml.to_aml_bytes(&mut self.0);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        let length = (self.0.len() as u32).to_le_bytes();
        self.0[LENGTH_AT..LENGTH_AT + 4].copy_from_slice(&length);
        self.0[CHECKSUM_AT] = 0;
        self.0[CHECKSUM_AT] = checksum(&self.0);
        self.0
    }
}

/// The byte that makes the sum of `bytes` and itself zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, &byte| sum.wrapping_add(byte))
        .wrapping_neg()
}
