//! What an emulated host has for its guests: an IOMMU, and PCI devices behind it that may be given away.
//!
//! | place | device |
//! |---|---|
//! | 00:05.0 | an NVMe disk |
//! | 00:06.0, 00:06.1 | two more in one slot, and so in one IOMMU group |
//! | 00:07.0 | an e1000e interface |
//! | 00:08.0 | a virtio interface that respects the IOMMU |
//! | 00:09.0 | a display, with a frame buffer of 16 MiB |
//! | 00:0a.0 | a virtio interface on one wire with both, which the host keeps |
//! | behind 00:0b.0 | an NVMe disk that can have virtual functions |

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::Result;

use crate::arch::Arch;
use crate::cache;

/// Bytes of each disk. What nobody writes takes nothing.
const DISK: u64 = 64 << 20;
/// Each disk's properties beside its image.
const DISKS: [&str; 3] = [
    "nvme,serial=spare0,addr=05.0",
    "nvme,serial=spare1,addr=06.0,multifunction=on",
    "nvme,serial=spare2,addr=06.1",
];
/// The others: nobody starts from them, so that none needs a program of its own.
const OTHERS: [&str; 8] = [
    "e1000e,netdev=wire0,mac=52:54:00:00:00:07,addr=07.0,romfile=",
    "virtio-net-pci,netdev=wire1,mac=52:54:00:00:00:08,addr=08.0,romfile=,iommu_platform=on,disable-legacy=on",
    "bochs-display,addr=09.0,romfile=",
    "virtio-net-pci,netdev=wire2,mac=52:54:00:00:00:0a,addr=0a.0,romfile=",
    "pcie-root-port,id=above,chassis=1,addr=0b.0",
    "nvme-subsys,id=many",
    // Four virtual functions with two queue pairs and two interrupts each at most.
    "nvme,id=parent,serial=spare3,subsys=many,bus=above,sriov_max_vfs=4,sriov_vq_flexible=8,sriov_vi_flexible=8,max_ioqpairs=10,msix_qsize=9",
    "nvme-ns,bus=parent,nsid=1,drive=spare3,shared=on",
];
/// Ends of the wire that the interfaces are on.
const WIRE_ENDS: usize = 3;

/// The devices of one host, as long as it does not run: then they are the emulator's.
#[derive(Debug)]
pub struct Devices {
    /// Files without names.
    disks: Vec<File>,
}

impl Devices {
    /// Empty disks.
    ///
    /// # Errors
    /// Their images cannot be made.
    pub fn new() -> Result<Self> {
        let base = cache::base()?;
        let disk = |_| {
            let file = tempfile::tempfile_in(&base)?;
            file.set_len(DISK)?;
            Ok(file)
        };
        let disks = (0..=DISKS.len()).map(disk).collect::<Result<_>>()?;
        Ok(Self { disks })
    }

    /// The emulator's arguments.
    pub fn arguments(&self, arch: Arch) -> Vec<String> {
        let mut words = Vec::new();
        let mut add = |flag: &str, value: String| words.extend([flag.to_owned(), value]);
        if arch == Arch::X86_64 {
            // Without remapping of interrupts VFIO refuses to give devices away.
            add("-device", "intel-iommu,intremap=on,caching-mode=off".to_owned());
        }
        let process = std::process::id();
        for (n, disk) in self.disks.iter().enumerate() {
            let path = format!("/proc/{process}/fd/{}", disk.as_raw_fd());
            add("-drive", format!("file={path},if=none,id=spare{n},format=raw"));
        }
        for (n, device) in DISKS.iter().enumerate() {
            add("-device", format!("{device},drive=spare{n}"));
        }
        for end in 0..WIRE_ENDS {
            add("-netdev", format!("hubport,id=wire{end},hubid=0"));
        }
        for device in OTHERS {
            add("-device", device.to_owned());
        }
        words
    }
}

/// What the host's kernel has to be told, so that the IOMMU translates.
pub fn cmdline(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "intel_iommu=on iommu=nopt triarch.spare=pci",
        Arch::Aarch64 => "iommu.passthrough=0 triarch.spare=pci",
    }
}
