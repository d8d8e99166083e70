//! A guest that is lost, and whose fault that is.

use anyhow::{Error, Result};
use triarch_harness::agent::AgentError;
use triarch_harness::interrupts::given_while_masked;
use triarch_harness::linux::LinuxVm;
use triarch_harness::suite::note;

/// How often an emulated host may lose a guest.
pub struct Faults {
    allowed: u32,
}

impl Faults {
    /// In so many rounds.
    pub fn in_rounds(rounds: u32) -> Self {
        Self {
            allowed: 1 + rounds / 10,
        }
    }

    /// Forgives that `error` ended a round with `guest`, and tells so, if the guest's kernel shows that its processor did what no VMM can make
    /// it do. The guest was booted with [`PANICS`](triarch_harness::linux::PANICS), and is of no use any more.
    ///
    /// # Errors
    /// Any other one, with the backtrace of a guest that is lost.
    pub fn forgive(&mut self, guest: &LinuxVm, error: Error) -> Result<()> {
        let silent = error.downcast_ref::<AgentError>();
        if !silent.is_some_and(AgentError::is_machine_failure) && !guest.is_lost() {
            return Err(error);
        }
        self.judge(&guest.backtrace(), error).map(|words| note(&words))
    }

    /// What is told of a lost guest whose kernel said `backtrace`.
    fn judge(&mut self, backtrace: &str, error: Error) -> Result<String> {
        let Some([entry, flags]) = given_while_masked(backtrace) else {
            return Err(error.context(format!("the guest is lost:\n{backtrace}")));
        };
        let words = format!("an interrupt came while none may (docs/test-hosts.md):\n{entry}\n{flags}");
        let Some(left) = self.allowed.checked_sub(1) else {
            return Err(error.context(format!("once more {words}")));
        };
        self.allowed = left;
        Ok(format!(
            "{words}\nso the host lost the guest, {left} more may be; it was: {error:#}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    const GIVEN: &str = "asm_sysvec_apic_timer_interrupt+0x1a/0x20\nRIP: 0010:a+0x1/0x2\nRSP: 0:1 EFLAGS: 00010082\n";

    #[test]
    fn a_fault_of_the_host_is_forgiven_and_told() {
        let mut faults = Faults::in_rounds(3);
        let words = faults.judge(GIVEN, anyhow!("round 2")).unwrap();
        for part in ["asm_sysvec_apic", "EFLAGS: 00010082", "round 2", "0 more"] {
            assert!(words.contains(part), "{part} not in {words}");
        }
        let error = format!("{:#}", faults.judge(GIVEN, anyhow!("round 3")).unwrap_err());
        assert!(error.contains("once more") && error.contains("round 3"), "{error}");
    }

    #[test]
    fn any_other_loss_fails_with_its_backtrace() {
        let mut faults = Faults::in_rounds(50);
        let own = GIVEN.replace("00010082", "00010282");
        for backtrace in [own.as_str(), "", "RIP: 0010:somewhere"] {
            let error = format!("{:#}", faults.judge(backtrace, anyhow!("round 2")).unwrap_err());
            assert!(error.contains(backtrace) && error.contains("round 2"), "{error}");
        }
        assert_eq!(faults.allowed, 6);
    }
}
