//! The capability by which NVIDIA's driver learns that its device reaches others directly (GPUDirect P2P approval).
//!
//! | byte | |
//! |---|---|
//! | 0, 1 | capability of the vendor (0x09), the next one |
//! | 2 | its length, 8 |
//! | 3 to 5 | `P2P` |
//! | 6 | bits 2 to 0: version 0; bits 6 to 3: the clique |
//! | 7 | 0 |

use thiserror::Error;

use super::{CAPABILITIES, Config, STATUS, STATUS_CAPABILITIES, id, u16_of};

/// Where the driver looks for it: the second one is for GPUs since Turing, which have something else at the first.
const PLACES: [usize; 2] = [0xc8, 0xd4];
const LEN: usize = 8;
const NVIDIA: u16 = 0x10de;
const DISPLAY: u8 = 0x03;

/// Why a device cannot be in a clique.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CliqueError {
    /// It is no GPU of NVIDIA's.
    #[error("only GPUs of NVIDIA can be in a clique (x_nv_gpudirect_clique), and this is another device")]
    Stranger,
    /// The places are taken.
    #[error("the places where its driver looks for the clique are taken; leave x_nv_gpudirect_clique out")]
    NoPlace,
}

impl Config {
    /// Shows the device as one of the clique `number`, 0 to 15, where its driver looks.
    pub(crate) fn join_clique(&mut self, number: u8) -> Result<(), CliqueError> {
        if u16_of(&self.bytes[..], 0) != NVIDIA || self.bytes[0x0b] != DISPLAY {
            return Err(CliqueError::Stranger);
        }
        let free = |at: &usize| {
            let ours = *at..*at + LEN;
            let empty = |bytes: &[u8]| bytes[ours.clone()].iter().all(|byte| *byte == 0);
            !self.taken.iter().any(|at| ours.contains(at))
                && empty(&self.bytes[..])
                && empty(&self.writable[..])
                && empty(&self.live[..])
        };
        let at = PLACES.into_iter().find(free).ok_or(CliqueError::NoPlace)?;
        let capability = [
            id::VENDOR,
            self.bytes[CAPABILITIES],
            LEN as u8,
            b'P',
            b'2',
            b'P',
            (number & 0xf) << 3,
            0,
        ];
        self.bytes[at..at + LEN].copy_from_slice(&capability);
        self.bytes[CAPABILITIES] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES as u8;
        Ok(())
    }
}
