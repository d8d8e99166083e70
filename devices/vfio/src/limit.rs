//! How much memory this process may lock.

use std::fs;

use crate::sys::memlock_limit;

/// CAP_IPC_LOCK.
const IPC_LOCK: u32 = 14;

/// Bytes that this process may lock in memory, `None` if nobody counts.
pub(crate) fn lockable() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if has_capability(&status, IPC_LOCK) {
        return None;
    }
    memlock_limit()
}

/// Whether the process with this /proc/PID/status has a capability.
fn has_capability(status: &str, number: u32) -> bool {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    bits.is_some_and(|bits| bits & 1 << number != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_lock_everything_is_known_by_a_capability() {
        let status = |caps: &str| format!("Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t{caps}\n");
        assert!(has_capability(&status("000001ffffffffff"), IPC_LOCK));
        assert!(has_capability(&status("0000000000004000"), IPC_LOCK));
        assert!(!has_capability(&status("0000000000003fff"), IPC_LOCK));
        assert!(!has_capability("", IPC_LOCK));
    }
}
