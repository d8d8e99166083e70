//! NUMA nodes of the host that memory is taken from.

use std::io;
use std::path::Path;

use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};

use crate::{GuestRegion, MemoryError};

/// Bits of a set of nodes: more than any kernel is built for.
const NODES: usize = 1024;

/// The nodes that have memory, as the kernel lists them: `0-1,3`. Empty on a kernel without NUMA.
fn with_memory(sysfs: &Path) -> String {
    let list = std::fs::read_to_string(sysfs.join("has_memory")).unwrap_or_default();
    list.trim().to_owned()
}

/// Whether `node` is in a list of the kernel's.
fn is_in(list: &str, node: u32) -> bool {
    list.split(',').any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let bounds = first.parse::<u32>().ok().zip(last.parse::<u32>().ok());
        bounds.is_some_and(|(first, last)| (first..=last).contains(&node))
    })
}

/// Makes sure that the host has memory in `node`.
pub(crate) fn check(node: u32) -> Result<(), MemoryError> {
    let list = with_memory(Path::new("/sys/devices/system/node"));
    match is_in(&list, node) && (node as usize) < NODES {
        true => Ok(()),
        false => Err(MemoryError::NoNode { node, nodes: list }),
    }
}

/// Has the pages of `len` bytes from `offset` of `region` come from the host's `node`, and from no other, when they are first used.
pub(crate) fn bind(region: &GuestRegion, offset: u64, len: u64, node: u32) -> io::Result<()> {
    let start = region
        .get_host_address(MemoryRegionAddress(offset))
        .map_err(io::Error::other)?;
    let mut mask = [0u64; NODES / 64];
    let word = mask.get_mut(node as usize / 64).ok_or(io::ErrorKind::InvalidInput)?;
    *word = 1 << (node % 64);
    // The kernel takes one bit less than it is told of.
    let bits = NODES as u64 + 1;
    // SAFETY: the bytes are part of a live mapping of ours, and the call changes only where its pages come from; the mask has as many bits
    // as the call reads, and outlives it.
    let done = unsafe { libc::syscall(libc::SYS_mbind, start, len, libc::MPOL_BIND, mask.as_ptr(), bits, 0u64) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::{RamOptions, allocate};

    const MIB: u64 = 1 << 20;

    #[test]
    fn lists_of_nodes_are_understood() {
        for (list, inside, outside) in [
            ("0", &[0][..], &[1, 10][..]),
            ("0-1,3", &[0, 1, 3], &[2, 4]),
            ("2,8-15", &[2, 8, 15], &[0, 7, 16]),
            ("", &[], &[0]),
        ] {
            assert!(inside.iter().all(|node| is_in(list, *node)), "{list}");
            assert!(!outside.iter().any(|node| is_in(list, *node)), "{list}");
        }
        assert_eq!(with_memory(Path::new("/nowhere")), "");
    }

    #[test]
    fn memory_comes_from_the_node_that_is_named() {
        let Some(node) = (0..64).find(|node| check(*node).is_ok()) else {
            return eprintln!("skipped: this kernel has no NUMA");
        };
        for shared in [false, true] {
            let options = RamOptions {
                shared,
                host_node: Some(node),
                prefault: true,
                ..RamOptions::default()
            };
            let memory = allocate(&[(GuestAddress(0), 4 * MIB)], &options).expect("a node's memory");
            let region = memory.iter().next().expect("a region");
            assert_eq!(policy(region), (libc::MPOL_BIND, 1 << node), "shared {shared}");
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_refused_by_name() {
        let options = RamOptions {
            host_node: Some(999),
            ..RamOptions::default()
        };
        let error = allocate(&[(GuestAddress(0), MIB)], &options)
            .expect_err("refused")
            .to_string();
        assert!(error.starts_with("the host has no memory in NUMA node 999"), "{error}");
    }

    /// How the kernel chooses pages for the first byte of `region`, and which nodes may have them.
    fn policy(region: &GuestRegion) -> (i32, u64) {
        const OF_ADDRESS: u64 = 2;
        let (mut mode, mut mask) = (0i32, [0u64; NODES / 64]);
        // SAFETY: both pointers are to what outlives the call, and the mask has as many bits as the call writes.
        let done = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut mode,
                mask.as_mut_ptr(),
                NODES as u64 + 1,
                region.as_ptr(),
                OF_ADDRESS,
            )
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        (mode, mask[0])
    }
}
