//! What processes have mapped: `/proc/PID/smaps` (proc_pid_smaps(5)).

use std::fs;

use anyhow::{Context as _, Result};
use procfs_core::FromBufRead as _;
use procfs_core::process::MemoryMaps;
pub use procfs_core::process::{MMPermissions, MMapPath, MemoryMap, VmFlags};

/// What process `pid` has mapped now, by addresses.
///
/// # Errors
/// There is no such process, or it is somebody else's.
pub fn of(pid: u32) -> Result<Vec<MemoryMap>> {
    let path = format!("/proc/{pid}/smaps");
    read(&fs::read_to_string(&path).with_context(|| path.clone())?).context(path)
}

/// Reads such a file.
///
/// # Errors
/// It is none.
pub fn read(text: &str) -> Result<Vec<MemoryMap>> {
    Ok(MemoryMaps::from_buf_read(text.as_bytes())?.0)
}

/// One of a mapping's counts (`Rss`, `Private_Dirty`) in KiB; 0 if the kernel does not tell.
pub fn kib(mapping: &MemoryMap, name: &str) -> u64 {
    mapping.extension.map.get(name).map_or(0, |bytes| bytes >> 10)
}

/// The file that is mapped, also one without a place in the file system (`/memfd:name (deleted)`).
pub fn file(mapping: &MemoryMap) -> Option<&str> {
    match &mapping.pathname {
        MMapPath::Path(path) => path.to_str().filter(|path| path.starts_with('/')),
        _ => None,
    }
}

/// Bytes of a mapping.
pub fn size(mapping: &MemoryMap) -> u64 {
    mapping.address.1 - mapping.address.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_stack() {
        let all = of(std::process::id()).unwrap();
        let stack = all.iter().find(|mapping| mapping.pathname == MMapPath::Stack).unwrap();
        assert!(stack.extension.vm_flags.contains(VmFlags::RD | VmFlags::WR));
        let resident = kib(stack, "Rss");
        assert!(resident > 0 && resident <= size(stack) >> 10, "{resident}");
        assert_eq!(kib(stack, "Nothing"), 0);
        let program = std::env::current_exe().unwrap();
        assert!(all.iter().any(|mapping| file(mapping) == program.to_str()), "{all:?}");
    }
}
