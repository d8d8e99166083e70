//! The memory of a process, from /proc/PID/smaps (Linux, Documentation/filesystems/proc.rst).

/// Memory in KiB, of all but guest RAM.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Pages only this process has, written since they were mapped.
    pub private_dirty: u64,
    /// Resident pages, shared ones counted in proportion.
    pub pss: u64,
    /// Resident pages.
    pub rss: u64,
    /// Resident pages of guest RAM.
    pub guest_rss: u64,
}

/// Adds up the mappings in `smaps`. Those of `guest_kib` and more are taken for guest RAM.
pub fn usage(smaps: &str, guest_kib: u64) -> Usage {
    let mut total = Usage::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let Some((key, rest)) = line.split_once(':') else {
            continue;
        };
        let Some(kib) = rest
            .trim()
            .strip_suffix(" kB")
            .and_then(|n| n.trim().parse::<u64>().ok())
        else {
            continue;
        };
        match key {
            // The first line of a mapping's block.
            "Size" => is_guest = kib >= guest_kib,
            "Rss" if is_guest => total.guest_rss += kib,
            "Rss" => total.rss += kib,
            "Pss" if !is_guest => total.pss += kib,
            "Private_Dirty" if !is_guest => total.private_dirty += kib,
            _ => {}
        }
    }
    total
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
Private_Dirty:         0 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Rss:                  40 kB
Pss:                  40 kB
Private_Dirty:        36 kB
";

    #[test]
    fn guest_memory_is_left_out() {
        let expected = Usage {
            private_dirty: 36,
            pss: 340,
            rss: 640,
            guest_rss: 90_000,
        };
        assert_eq!(usage(SMAPS, 131_072), expected);
        assert_eq!(usage(SMAPS, 1_000_000).guest_rss, 0);
    }
}
