//! The memory of a process, from /proc/PID/smaps (Linux, Documentation/filesystems/proc.rst).

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

/// Adds up the mappings in `smaps`. Those of `guest_kib` and more are taken for guest RAM.
///
/// A program that was just copied, or lies on a tmpfs, is itself dirty in the page cache, which smaps counts as
/// Private_Dirty of whoever maps it. So of private file mappings only the pages copied on write count (Anonymous).
pub fn usage(smaps: &str, guest_kib: u64) -> Usage {
    let mut total = Usage::default();
    let (mut is_guest, mut is_file) = (false, false);
    for line in smaps.lines() {
        let Some((key, kib)) = field(line) else {
            // A mapping's first line: addresses, permissions, offset, device, inode, path.
            let words: Vec<&str> = line.split_whitespace().collect();
            let private = words.get(1).is_some_and(|w| w.len() == 4 && w.ends_with('p'));
            if words.first().is_some_and(|w| w.contains('-')) {
                is_file = private && words.get(5).is_some_and(|w| w.starts_with('/'));
            }
            continue;
        };
        match key {
            "Size" => is_guest = kib >= guest_kib,
            "Rss" if is_guest => total.guest_rss += kib,
            _ if is_guest => {}
            "Rss" => total.rss += kib,
            "Pss" => total.pss += kib,
            "Anonymous" if is_file => total.private_dirty += kib,
            "Private_Dirty" if !is_file => total.private_dirty += kib,
            _ => {}
        }
    }
    total
}

/// A line such as `Rss:   12 kB`.
fn field(line: &str) -> Option<(&str, u64)> {
    let (key, rest) = line.split_once(':')?;
    let kib = rest.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some((key, kib))
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
        assert_eq!(usage(SMAPS, 131_072), expected);
        assert_eq!(usage(SMAPS, 1_000_000).guest_rss, 0);
    }
}
