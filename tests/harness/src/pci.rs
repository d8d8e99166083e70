//! PCI functions of this host that tests may give to guests, and the drivers they belong to (Linux, Documentation/ABI/testing/sysfs-bus-pci).

use crate::jobs::wait;
use crate::process::run;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A word in the command line of an emulated host's kernel: it has functions to spare.
const TO_SPARE: &str = "triarch.spare=pci";
/// Where the kernel shows all functions.
const DEVICES: &str = "/sys/bus/pci/devices";
/// How long what a driver makes of a function may take to appear.
const LIMIT: Duration = Duration::from_secs(60);

/// Why no function of this host may be given to a guest of this VMM, if so. Where nobody said so they may be those that the host runs from.
///
/// # Errors
/// The VMM does not tell what it can do.
pub fn unavailable(triarch: &Path) -> Result<Option<String>> {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if !line.split_whitespace().any(|word| word == TO_SPARE) {
        let why = "no device of this host is to spare: only emulated hosts have such";
        return Ok(Some(why.into()));
    }
    unable(triarch)
}

/// Why this VMM gives no device of the host to a guest, if so.
///
/// # Errors
/// It does not tell what it can do.
pub fn unable(triarch: &Path) -> Result<Option<String>> {
    let help = run(Command::new(triarch).arg("--help"))?;
    Ok((!help.contains("--device ")).then(|| "this version of triarch has no --device".into()))
}

/// A PCI function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    place: String,
}

impl Function {
    /// The function at a place such as `0000:00:05.0`.
    pub fn at(place: &str) -> Self {
        Self { place: place.into() }
    }

    /// Its place.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Its directory, by which a VMM gets it.
    pub fn path(&self) -> PathBuf {
        Path::new(DEVICES).join(&self.place)
    }

    /// The driver it belongs to, if any.
    pub fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.path().join("driver")).ok()?;
        Some(link.file_name()?.to_str()?.to_owned())
    }

    /// Takes it from the driver it belongs to.
    ///
    /// # Errors
    /// The kernel does not do it.
    pub fn release(&self) -> Result<()> {
        if self.driver().is_some() {
            fs::write(self.path().join("driver/unbind"), &self.place).with_context(|| format!("releasing {self:?}"))?;
        }
        Ok(())
    }

    /// Gives it to a driver, which the kernel has.
    ///
    /// # Errors
    /// The driver does not take it.
    pub fn give_to(&self, driver: &str) -> Result<()> {
        if self.driver().as_deref() == Some(driver) {
            return Ok(());
        }
        let what = || format!("giving {} to {driver}", self.place);
        fs::write(self.path().join("driver_override"), driver).with_context(what)?;
        self.release()?;
        fs::write("/sys/bus/pci/drivers_probe", &self.place).with_context(what)?;
        let now = self.driver();
        ensure!(now.as_deref() == Some(driver), "{}, it belongs to {now:?}", what());
        Ok(())
    }

    /// Gives it to VFIO, for a guest.
    ///
    /// # Errors
    /// VFIO cannot be loaded, or does not take it.
    pub fn spare(&self) -> Result<()> {
        run(Command::new("/init").args(["load", "vfio-pci", "vfio_iommu_type1"]))?;
        self.give_to("vfio-pci")
    }

    /// The block device of an NVMe disk, which is given to the host for that.
    ///
    /// # Errors
    /// It is none.
    pub fn disk(&self) -> Result<PathBuf> {
        self.give_to("nvme")?;
        let name = self.made("nvme/nvme*/nvme*n1")?;
        // A namespace that several controllers share is called after its path, nvme3c0n1, and its disk is nvme3n1.
        let (start, rest) = name.split_once('c').unwrap_or((&name, ""));
        let namespace = rest.find('n').map_or("", |at| &rest[at..]);
        Ok(Path::new("/dev").join(format!("{start}{namespace}")))
    }

    /// The network interface of a virtio device, which is given to the host for that.
    ///
    /// # Errors
    /// It is none.
    pub fn interface(&self) -> Result<String> {
        run(Command::new("/init").args(["load", "virtio_net"]))?;
        self.give_to("virtio-pci")?;
        self.made("virtio*/net/*")
    }

    /// The name of what its driver made: the only match of a pattern of the shell below its directory.
    pub(crate) fn made(&self, pattern: &str) -> Result<String> {
        let script = format!("cd {} && ls -d {pattern} 2>/dev/null || true", self.path().display());
        let what = format!("{} has no {pattern}", self.place);
        wait(&what, LIMIT, || {
            let found = run(Command::new("sh").args(["-c", &script]))?;
            Ok(found
                .lines()
                .next()
                .and_then(|line| line.rsplit('/').next())
                .map(str::to_owned))
        })
    }
}
