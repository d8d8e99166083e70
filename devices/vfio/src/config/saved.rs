//! Registers that a guest wrote, in another device of the same kind.

use super::{Config, SIZE};

impl Config {
    /// The registers as the guest has them.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Takes over those that the guest could write, of a device whose other registers are the same.
    ///
    /// # Errors
    /// Where they are not.
    pub(crate) fn restore(&mut self, saved: &[u8]) -> Result<(), usize> {
        let saved: &[u8; SIZE] = saved.try_into().map_err(|_| SIZE)?;
        let both = || self.writable.iter().zip(&self.live[..]);
        let registers = self.bytes.iter().zip(saved).zip(both());
        let differs =
            |((own, saved), (writable, live)): ((&u8, &u8), (&u8, &u8))| (own ^ saved) & !(writable | live) != 0;
        if let Some(at) = registers.into_iter().position(differs) {
            return Err(at);
        }
        for ((own, saved), writable) in self.bytes.iter_mut().zip(saved).zip(&self.writable[..]) {
            *own = *own & !writable | saved & writable;
        }
        Ok(())
    }
}
