//! Whether this machine's KVM can be used.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The only version of the interface that there is (Linux, Documentation/virt/kvm/api.rst).
const API_VERSION: i32 = 12;
const KVM_GET_API_VERSION: libc::Ioctl = 0xae00;

/// Why no VM can be run here, if so.
pub fn unavailable() -> Option<String> {
    unusable(Path::new("/dev/kvm"))
}

fn unusable(device: &Path) -> Option<String> {
    let name = device.display();
    let file = match File::options().read(true).write(true).open(device) {
        Ok(file) => file,
        Err(e) => return Some(format!("{name}: {e}")),
    };
    // SAFETY: an open descriptor; this ioctl takes no argument.
    match unsafe { libc::ioctl(file.as_raw_fd(), KVM_GET_API_VERSION, 0) } {
        API_VERSION => None,
        error @ ..0 => Some(format!(
            "{name} does not answer ({error}): {}",
            io::Error::last_os_error()
        )),
        other => Some(format!(
            "{name} speaks version {other} of the interface, not {API_VERSION}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kvm_is_unusable() {
        let why = unusable(Path::new("/nonexistent")).unwrap();
        assert!(why.starts_with("/nonexistent: No such file"), "{why}");
        let why = unusable(Path::new("/dev/null")).unwrap();
        assert!(why.starts_with("/dev/null does not answer"), "{why}");
    }
}
