//! The initramfs of emulated hosts and of guests: our own init, a shell, and kernel modules.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::cache::{self, Recipe};
use crate::cpio::Archive;
use crate::kernels::{Kernel, Version};
use crate::root::Rig;
use crate::{build, tools};

/// Changes whenever this file makes another image from the same parts.
const SCRIPT: &str = "3";

/// Modules an emulated host loads at start: KVM, its channel to us, and what tests use.
const HOST_MODULES: [&str; 7] = [
    "virtio_pci",
    "virtio_console",
    "tun",
    "virtio_blk",
    "bridge",
    "veth",
    "loop",
];

/// Modules that a host has and loads when a test asks for it: what gives devices to guests, drivers of such devices, and of the card that leads
/// to another host.
const HOST_SPARE: [&str; 4] = ["vfio-pci", "vfio_iommu_type1", "nvme", "virtio_net"];

/// The module with the host's KVM; on ARM it is built in.
fn kvm_modules(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::X86_64 => &["kvm-amd"],
        Arch::Aarch64 => &[],
    }
}

/// Modules a guest loads at start: one for each device Triarch has.
const GUEST_MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "button",
    "evdev",
];

/// Modules that a guest has and loads when a test asks for it (`/init load MODULE`): all others boot sooner without.
const GUEST_SPARE: [&str; 3] = ["virtiofs", "virtio_mem", "nvme"];

/// The same of one kernel only: Debian 12's has no driver for the guest's IOMMU.
fn guest_spare(version: Version) -> &'static [&'static str] {
    match version {
        Version::V6_1 => &[],
        Version::V6_12 => &["virtio_iommu"],
    }
}

/// The initramfs of an emulated host with this kernel.
///
/// # Errors
/// A part is missing, or the file cannot be written.
pub fn host(kernel: &Kernel, rig: &Rig) -> Result<PathBuf> {
    image(
        "host",
        &[&HOST_MODULES, kvm_modules(rig.arch)].concat(),
        &HOST_SPARE,
        kernel,
        rig,
    )
}

/// The initramfs of a guest with this kernel.
///
/// # Errors
/// As [`host`].
pub fn guest(kernel: &Kernel, rig: &Rig) -> Result<PathBuf> {
    let spare = [&GUEST_SPARE, guest_spare(kernel.version)].concat();
    image("guest", &GUEST_MODULES, &spare, kernel, rig)
}

fn image(name: &str, modules: &[&str], spare: &[&str], kernel: &Kernel, rig: &Rig) -> Result<PathBuf> {
    let image = Image {
        name,
        kernel,
        modules,
        spare,
        init: &build::guest_init(rig.arch)?,
        busybox: &rig.busybox,
        applets: &rig.root.busybox(),
    };
    image.get()
}

/// The parts of an initramfs.
struct Image<'a> {
    /// What it is for, a word for the file's name.
    name: &'a str,
    kernel: &'a Kernel,
    /// Modules to load at start, without those they depend on.
    modules: &'a [&'a str],
    /// Further ones that are not loaded.
    spare: &'a [&'a str],
    /// The program that becomes process 1.
    init: &'a Path,
    /// A static one.
    busybox: &'a Path,
    /// The same for this machine, which tells what it can do.
    applets: &'a Path,
}

impl Image<'_> {
    /// Makes the image, or finds it: an uncompressed cpio archive, to which another one can be
    /// appended.
    fn get(&self) -> Result<PathBuf> {
        let modules = self.kernel.modules(self.modules)?;
        let mut spare = self.kernel.modules(self.spare)?;
        spare.retain(|module| !modules.contains(module));
        let name = format!(
            "initramfs-{}-{}-{}",
            self.name,
            self.kernel.arch.debian(),
            self.kernel.version
        );
        let mut recipe = Recipe::new(&name)
            .with("script", SCRIPT)
            .with("release", &self.kernel.release)
            .with_file("init", self.init)?
            .with_file("busybox", self.busybox)?;
        for module in &modules {
            recipe = recipe.with_file("module", module)?;
        }
        for module in &spare {
            recipe = recipe.with_file("spare module", module)?;
        }
        let dir = cache::ensure(&recipe, |dir| {
            let what = format!("packing the initramfs of {} {}", self.name, self.kernel.version);
            tools::step(&what, || self.write(&modules, &spare, &dir.join("initramfs.cpio")))
        })?;
        Ok(dir.join("initramfs.cpio"))
    }

    fn write(&self, modules: &[PathBuf], spare: &[PathBuf], out: &Path) -> Result<()> {
        let mut archive = Archive::new();
        for dir in ["dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/sbin"] {
            archive.dir(dir);
        }
        // The kernel opens it for process 1 before anything is mounted.
        archive.node("dev/console", 0o600, 5, 1);
        archive.file_from("init", 0o755, self.init);
        archive.file_from("bin/busybox", 0o755, self.busybox);
        for applet in tools::output(Command::new(self.applets).arg("--list"))?.lines() {
            if applet != "busybox" {
                archive.symlink(&format!("bin/{applet}"), "busybox");
            }
        }
        archive.symlink("sbin", "bin");
        archive.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
        archive.file("etc/group", 0o644, "root:x:0:\n");
        let mut names = String::new();
        for module in modules.iter().chain(spare) {
            let file = module.file_name().and_then(|n| n.to_str());
            let file = file.context("a module's name is not UTF-8")?;
            let place = format!("lib/modules/{}/{file}", self.kernel.release);
            archive.file_from(&place, 0o644, module);
            if !spare.contains(module) {
                names += &format!("{}\n", file.trim_end_matches(".ko"));
            }
        }
        archive.file("etc/modules", 0o644, names);
        let file = File::create(out).with_context(|| format!("cannot make {}", out.display()))?;
        archive.finish(BufWriter::new(file))?;
        Ok(())
    }
}

/// Writes `base` and then an archive of `dir` and `files` (place, mode, source) into one new file,
/// which has no name any more: it is gone when the returned handle is dropped.
///
/// # Errors
/// A file cannot be read, or there is no space.
pub fn appended(base: &Path, dir: &str, files: &[(String, u32, PathBuf)]) -> Result<File> {
    let mut out = tempfile::tempfile_in(cache::base()?)?;
    let mut first = File::open(base).with_context(|| format!("cannot read {}", base.display()))?;
    std::io::copy(&mut first, &mut out)?;
    let mut archive = Archive::new();
    archive.dir(dir);
    for (place, mode, source) in files {
        let size = fs::metadata(source).with_context(|| format!("cannot read {}", source.display()));
        size?;
        archive.file_from(place, *mode, source);
    }
    archive.finish(BufWriter::new(&mut out))?;
    Ok(out)
}
