//! The memory of a process, from `/proc/PID/smaps`.

use anyhow::Result;
use triarch_harness::smaps::{self, MMPermissions};

/// Memory in KiB, of all but guest RAM.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Pages only this process has, written by it.
    pub private_dirty: u64,
    /// Resident pages, shared ones counted in proportion.
    pub pss: u64,
    /// Resident pages.
    pub rss: u64,
    /// Resident pages of guest RAM.
    pub guest_rss: u64,
}

/// Adds up the mappings in such a file. Those of `guest_kib` and more are taken for guest RAM.
///
/// A program that was just copied, or lies on a tmpfs, is itself dirty in the page cache, which smaps counts as
/// Private_Dirty of whoever maps it. So of private file mappings only the pages copied on write count (Anonymous).
///
/// # Errors
/// It is no such file.
pub fn usage(text: &str, guest_kib: u64) -> Result<Usage> {
    let mut total = Usage::default();
    for mapping in smaps::read(text)? {
        let kib = |name| smaps::kib(&mapping, name);
        if kib("Size") >= guest_kib {
            total.guest_rss += kib("Rss");
            continue;
        }
        let file = smaps::file(&mapping).is_some() && mapping.perms.contains(MMPermissions::PRIVATE);
        total.rss += kib("Rss");
        total.pss += kib("Pss");
        total.private_dirty += kib(if file { "Anonymous" } else { "Private_Dirty" });
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0010000000 rw-s 00000000 00:01 7 /memfd:ram (deleted)
Size:             262144 kB
KernelPageSize:        4 kB
Rss:               90000 kB
Pss:               90000 kB
Pss_Dirty:         90000 kB
Private_Dirty:     90000 kB
VmFlags: rd wr sh
55d000000000-55d000100000 r-xp 00000000 08:01 9 /rig/triarch
Size:               1024 kB
Rss:                 600 kB
Pss:                 300 kB
Pss_Dirty:             7 kB
Private_Dirty:       600 kB
Anonymous:             8 kB
55d000200000-55d000210000 rw-p 00100000 08:01 9 /rig/triarch
Size:                 64 kB
Rss:                  64 kB
Pss:                  64 kB
Private_Dirty:        64 kB
Anonymous:            16 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Rss:                  40 kB
Pss:                  40 kB
Private_Dirty:        36 kB
Anonymous:            36 kB
";

    #[test]
    fn guest_memory_is_left_out() {
        let expected = Usage {
            private_dirty: 36 + 8 + 16,
            pss: 404,
            rss: 704,
            guest_rss: 90_000,
        };
        assert_eq!(usage(SMAPS, 131_072).unwrap(), expected);
        assert_eq!(usage(SMAPS, 1_000_000).unwrap().guest_rss, 0);
    }
}
