//! Makes a bare kernel a usable system, and describes it.

use crate::proto::Machine;
use crate::sys;
use std::env::set_current_dir;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chroot, symlink};
use std::path::Path;

const NOSUID: u64 = libc::MS_NOSUID;
const NODEV: u64 = libc::MS_NODEV;

/// Source, target, type, flags and options of what is mounted, in order.
const MOUNTS: [(&str, &str, &str, u64, &str); 8] = [
    ("proc", "/proc", "proc", NOSUID | NODEV, ""),
    ("sysfs", "/sys", "sysfs", NOSUID | NODEV, ""),
    ("devtmpfs", "/dev", "devtmpfs", NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", "devpts", NOSUID, "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", NOSUID | NODEV, "mode=1777"),
    ("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=1777"),
    ("tmpfs", "/run", "tmpfs", NOSUID | NODEV, "mode=0755"),
    ("hugetlbfs", "/dev/hugepages", "hugetlbfs", NOSUID | NODEV, ""),
];

/// Mounts the file systems that programs expect and brings the loopback interface up. What fails is
/// reported, one line each, and does not stop the rest: a test that needs it will tell.
pub fn system() -> Vec<String> {
    let mut problems = Vec::new();
    if let Err(e) = root_of_its_own() {
        problems.push(format!("cannot make / a mount that can be left: {e}"));
    }
    // The kernel lets anybody write to the root of an initramfs, where DPDK then loads no library from.
    if let Err(e) = fs::set_permissions("/", Permissions::from_mode(0o755)) {
        problems.push(format!("cannot protect /: {e}"));
    }
    for (source, target, kind, flags, data) in MOUNTS {
        let mounted = fs::create_dir_all(target).and_then(|()| sys::mount(source, target, kind, flags, data));
        match mounted {
            Ok(()) => {}
            // A kernel may have mounted /dev itself, or lack huge pages.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) && kind == "hugetlbfs" => {}
            Err(e) => problems.push(format!("cannot mount {target}: {e}")),
        }
    }
    for (target, link) in [("/proc/self/fd", "/dev/fd"), ("/proc/mounts", "/etc/mtab")] {
        if !Path::new(link).exists() {
            // Convenience for shells; a read-only /etc is no problem.
            let _ = symlink(target, link);
        }
    }
    if let Err(e) = sys::interface_up("lo") {
        problems.push(format!("cannot bring lo up: {e}"));
    }
    problems
}

/// Puts a mount over `/` that shows the same: the kernel's first one, into which an initramfs is unpacked, is the only one that
/// pivot_root(2) cannot leave, which is how programs such as passt confine themselves.
fn root_of_its_own() -> io::Result<()> {
    const BESIDE: &str = "/run";
    fs::create_dir_all(BESIDE)?;
    sys::mount("/", BESIDE, "", libc::MS_BIND, "")?;
    set_current_dir(BESIDE)?;
    sys::mount(".", "/", "", libc::MS_MOVE, "")?;
    chroot(".")?;
    set_current_dir("/")
}

/// Describes the running machine.
pub fn machine() -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    Machine {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        cpus: online(&read("/sys/devices/system/cpu/online")),
        vendor: vendor(&read("/proc/cpuinfo")),
        memory_mib: memory_mib(&read("/proc/meminfo")),
    }
}

/// The line that a guest prints when it has reached user space.
pub fn banner(machine: &Machine) -> String {
    let Machine {
        kernel,
        cpus,
        vendor,
        memory_mib,
    } = machine;
    format!(
        "triarch-guest: user space reached, kernel {kernel}, {cpus} CPUs, vendor {vendor}, \
         {memory_mib} MiB"
    )
}

/// The modules named in `list`, one a line, `#` starting a comment.
///
/// # Errors
/// The file cannot be read.
pub fn module_names(list: &Path) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(list)?;
    let names = text.lines().map(|l| l.split('#').next().unwrap_or_default().trim());
    Ok(names.filter(|l| !l.is_empty()).map(str::to_owned).collect())
}

/// Counts CPUs in a list such as `0-3,5`.
fn online(list: &str) -> u32 {
    let count = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim().split(',').filter_map(count).sum()
}

fn vendor(cpuinfo: &str) -> String {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|l| l.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    field("vendor_id")
        .or_else(|| field("CPU implementer").map(|code| format!("implementer {code}")))
        .unwrap_or_else(|| "unknown".into())
}

fn memory_mib(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_prints() {
        assert_eq!((online("0\n"), online("0-3,5\n"), online("")), (1, 5, 0));
        assert_eq!(vendor("processor\t: 0\nvendor_id\t: HygonGenuine\n"), "HygonGenuine");
        assert_eq!(vendor("CPU implementer\t: 0x41\n"), "implementer 0x41");
        assert_eq!(memory_mib("MemTotal:         249876 kB\nMemFree: 1 kB\n"), 244);
    }

    #[test]
    fn describes_this_machine() {
        let machine = machine();
        assert!(machine.cpus > 0 && machine.memory_mib > 0, "{machine:?}");
        assert!(banner(&machine).starts_with("triarch-guest: user space reached, kernel "));
    }

    #[test]
    fn module_lists_have_comments() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "# disks\nvirtio_blk # block\n\n evdev\n").unwrap();
        assert_eq!(module_names(file.path()).unwrap(), ["virtio_blk", "evdev"]);
    }
}
