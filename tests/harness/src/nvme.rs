//! Virtual functions of an NVMe disk of the host's.
#![allow(unsafe_code)]

use crate::jobs::wait;
use crate::pci::Function;
use anyhow::{Context as _, Result, ensure};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

/// Sends a command to the controller (Linux, include/uapi/linux/nvme_ioctl.h): `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const ADMIN_COMMAND: libc::Ioctl = 0xc048_4e41_u32 as libc::Ioctl;
/// Virtualization Management (NVM Express Base Specification 2.0, 5.26).
const VIRTUALIZATION: u8 = 0x1c;
/// Its actions.
const PRIMARY_TAKES: u32 = 1;
const SECONDARY_TAKES: u32 = 8;
const SECONDARY_ONLINE: u32 = 9;
/// What is taken: queue pairs, or interrupts.
const QUEUES: u32 = 0;
const INTERRUPTS: u32 = 1;
/// How long a controller may take to begin anew.
const LIMIT: Duration = Duration::from_secs(60);

/// `struct nvme_passthru_cmd`.
#[repr(C)]
#[derive(Default)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_len: u32,
    data_len: u32,
    words_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// Makes the first virtual function of a disk, with one queue pair for I/O, and gives it; no driver has it yet.
///
/// # Errors
/// The disk cannot have any.
pub fn virtual_function(parent: &Function) -> Result<Function> {
    let path = parent.path();
    parent.give_to("nvme")?;
    let place = parent.place().trim_end_matches('0').to_owned() + "1";
    let child = Function::at(&place);
    if child.path().exists() {
        return Ok(child);
    }
    let name = parent.made("nvme/nvme*")?;
    let state = path.join("nvme").join(&name).join("state");
    let live = || {
        wait("the controller does not begin anew", LIMIT, || {
            Ok((fs::read_to_string(&state)?.trim() == "live").then_some(()))
        })
    };
    live()?;
    let device = Path::new("/dev").join(&name);
    let manage = |controller: u32, kind: u32, action: u32, count: u32| {
        let what = || format!("action {action} on {count} of kind {kind} for controller {controller}");
        virtualization(&device, action | kind << 8 | controller << 16, count).with_context(what)
    };
    // What is to be shared is the parent's in the beginning; it lets go of it when it begins anew.
    manage(0, INTERRUPTS, PRIMARY_TAKES, 0)?;
    manage(0, QUEUES, PRIMARY_TAKES, 0)?;
    fs::write(path.join("nvme").join(&name).join("reset_controller"), "1")?;
    live()?;
    fs::write(path.join("sriov_drivers_autoprobe"), "0")?;
    fs::write(path.join("sriov_numvfs"), "1").context("no virtual function")?;
    manage(1, INTERRUPTS, SECONDARY_TAKES, 2)?;
    manage(1, QUEUES, SECONDARY_TAKES, 2)?;
    manage(1, QUEUES, SECONDARY_ONLINE, 0)?;
    ensure!(child.path().exists(), "no {place}");
    Ok(child)
}

fn virtualization(device: &Path, word_10: u32, word_11: u32) -> Result<()> {
    let file = File::options().read(true).write(true).open(device)?;
    let mut command = Command {
        opcode: VIRTUALIZATION,
        words_10_15: [word_10, word_11, 0, 0, 0, 0],
        ..Command::default()
    };
    // SAFETY: an open descriptor and a live structure of the size that the request's number tells; it names no memory.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), ADMIN_COMMAND, &raw mut command) };
    match status {
        0 => Ok(()),
        1.. => anyhow::bail!("the disk answers with status {status:#x}"),
        _ => Err(io::Error::last_os_error()).context("the disk takes no command"),
    }
}
