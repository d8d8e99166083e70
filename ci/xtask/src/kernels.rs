//! Stock Debian kernels, for the emulated hosts and for the guests.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::cache::{self, Recipe};
use crate::root::Root;
use crate::{modules, packages, tools};

/// Changes whenever this file makes something else from the same package.
const SCRIPT: &str = "5";
/// Boot protocol fields of a bzImage (Linux, Documentation/arch/x86/boot.rst).
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Offset and value of the magic number in an Image (Linux, Documentation/arch/arm64/booting.rst).
const IMAGE_MAGIC: (usize, &[u8]) = (0x38, b"ARM\x64");

/// Modules taken from the packages, with all they depend on.
const WANTED: [&str; 29] = [
    "kvm-amd",
    "kvm-intel",
    "tun",
    "bridge",
    "veth",
    "loop",
    "overlay",
    "ext4",
    "crc32c_generic",
    "af_packet",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
    "vhost_net",
    "vhost_vsock",
    "virtiofs",
    "virtio_pmem",
    "virtio_mem",
    "virtio_iommu",
    "nvme",
    "vfio-pci",
    "vfio_iommu_type1",
    "button",
    "evdev",
];

/// The package that depends on the newest kernel.
fn meta_package(arch: Arch) -> String {
    format!("linux-image-cloud-{}", arch.debian())
}

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Version {
    /// Debian 12's, the steadiest emulated host.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13's.
    #[value(name = "6.12")]
    V6_12,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Which one.
    pub version: Version,
    /// For which machines.
    pub arch: Arch,
    /// Its full name, e.g. `6.1.0-50-cloud-amd64`.
    pub release: String,
    /// Compressed: x86's bzImage, ARM's Image in gzip's format.
    pub vmlinuz: PathBuf,
    /// Uncompressed: the ELF file inside the bzImage, for the PVH boot protocol; ARM's Image.
    pub vmlinux: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The newest kernel of that version on the mirror when it was first needed.
    ///
    /// # Errors
    /// It cannot be downloaded or unpacked.
    pub fn get(version: Version, arch: Arch, root: &Root) -> Result<Self> {
        let recipe = Recipe::new(&format!("kernel-{}-{version}", arch.debian()))
            .with("script", SCRIPT)
            .with("package", &meta_package(arch))
            .with("modules", &WANTED.join(" "));
        let dir = cache::ensure(&recipe, |dir| make(dir, version, arch, root))?;
        Ok(Self {
            version,
            arch,
            release: fs::read_to_string(dir.join("release"))?.trim().to_owned(),
            vmlinuz: dir.join("vmlinuz"),
            vmlinux: dir.join("vmlinux"),
            modules: dir.join("modules"),
        })
    }

    /// The file that the package ships, which QEMU starts.
    pub fn shipped(&self) -> &Path {
        match self.arch {
            Arch::X86_64 => &self.vmlinuz,
            Arch::Aarch64 => &self.vmlinux,
        }
    }

    /// The module files of `names` and of all they depend on, each after those it needs. What is
    /// built into this kernel has no file and is left out.
    ///
    /// # Errors
    /// A module is neither there nor built in.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        modules::Set::flat(&self.modules)?.closure(names)
    }
}

fn make(dir: &Path, version: Version, arch: Arch, root: &Root) -> Result<()> {
    let scratch = tempfile::tempdir_in(cache::base()?)?;
    let tree = scratch.path();
    let release = packages::with_apt(arch, |apt| {
        let meta = meta_package(arch);
        let (package, number) = newest(&meta, version, &apt.versions(&meta)?)?;
        tools::step(&format!("downloading {package} {number}"), || {
            let file = apt.download_alone(&package, &number)?;
            packages::unpack(&file, tree)?;
            packages::record(&[file], dir)
        })?;
        Ok(package.trim_start_matches("linux-image-").to_owned())
    })?;
    fs::copy(tree.join(format!("boot/config-{release}")), dir.join("config"))?;
    fs::write(dir.join("release"), &release)?;
    let shipped = tree.join(format!("boot/vmlinuz-{release}"));
    let (vmlinuz, vmlinux) = (dir.join("vmlinuz"), dir.join("vmlinux"));
    match arch {
        Arch::X86_64 => {
            fs::copy(&shipped, &vmlinuz).context("the package has no vmlinuz")?;
            tools::step(&format!("unpacking the ELF file in Linux {version}"), || {
                extract_vmlinux(&vmlinuz, &vmlinux, tree, root)
            })?;
        }
        Arch::Aarch64 => {
            let image = fs::read(&shipped).context("the package has no vmlinuz")?;
            if image.get(IMAGE_MAGIC.0..IMAGE_MAGIC.0 + 4) != Some(IMAGE_MAGIC.1) {
                bail!("the kernel of {release} is no plain Image");
            }
            fs::write(&vmlinux, image)?;
            tools::step(&format!("compressing the Image of Linux {version}"), || {
                let mut gzip = Command::new("gzip");
                Ok(fs::write(
                    &vmlinuz,
                    tools::output_bytes(gzip.args(["-n", "-c"]).arg(&vmlinux))?,
                )?)
            })?;
        }
    }
    // Older packages ship /lib, newer ones /usr/lib.
    let places = ["lib/modules", "usr/lib/modules"].map(|p| tree.join(p).join(&release));
    let Some(from) = places.iter().find(|p| p.is_dir()) else {
        bail!("the package of Linux {release} has no modules");
    };
    tools::step(&format!("picking modules of Linux {version}"), || {
        modules::flatten(from, &WANTED, &dir.join("modules"), root)
    })
}

/// The package and version that the newest meta package of this kernel points to.
fn newest(meta: &str, version: Version, records: &[(String, String)]) -> Result<(String, String)> {
    let start = format!("{version}.");
    // apt lists the newest first.
    let record = records
        .iter()
        .find(|(number, _)| number.starts_with(&start))
        .with_context(|| format!("the mirror has no {meta} of Linux {version}"))?;
    let depends = packages::field(&record.1, "Depends").unwrap_or_default();
    let (package, rest) = depends.split_once(' ').unwrap_or((depends, ""));
    let number = rest.trim_start_matches("(= ").split(')').next();
    match number {
        Some(number) if package.starts_with("linux-image-") && !number.is_empty() => {
            Ok((package.to_owned(), number.to_owned()))
        }
        _ => bail!("{meta} {} depends on `{depends}`", record.0),
    }
}

fn extract_vmlinux(bzimage: &Path, out: &Path, scratch: &Path, root: &Root) -> Result<()> {
    let image = fs::read(bzimage)?;
    let payload = payload(&image).context("this is no bzImage of protocol 2.08 or later")?;
    let program = match payload {
        [0xfd, b'7', b'z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        other => bail!("the kernel is compressed in an unknown way: {:02x?}", other.get(..4)),
    };
    let packed = scratch.join("payload");
    fs::write(&packed, payload)?;
    let mut command = root.command(format!("usr/bin/{program}"));
    let elf = tools::output_bytes(command.args(["-d", "-c"]).arg(&packed))?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("the bzImage holds no ELF file");
    }
    fs::write(out, elf)?;
    Ok(())
}

/// The compressed kernel inside a bzImage, without the size that follows it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let sectors = usize::from(*image.get(SETUP_SECTS)?);
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    let length = word(PAYLOAD_LENGTH)?.checked_sub(4)?;
    image.get(start..start.checked_add(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "linux-image-cloud-amd64";

    fn record(number: &str, depends: &str) -> (String, String) {
        let text = format!("Package: {META}\nVersion: {number}\nDepends: {depends}\n");
        (number.to_owned(), text)
    }

    #[test]
    fn the_newest_of_a_version_is_taken() {
        let records = [
            record("6.12.107-1", "linux-image-6.12.107+deb13-cloud-amd64 (= 6.12.107-1)"),
            record("6.1.176-1", "linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)"),
            record("6.1.170-1", "linux-image-6.1.0-47-cloud-amd64 (= 6.1.170-1)"),
        ];
        let pick = |v| newest(META, v, &records).unwrap();
        assert_eq!(
            pick(Version::V6_1),
            ("linux-image-6.1.0-50-cloud-amd64".into(), "6.1.176-1".into())
        );
        assert_eq!(pick(Version::V6_12).1, "6.12.107-1");
        assert!(newest(META, Version::V6_1, &records[..1]).is_err());
        assert!(newest(META, Version::V6_1, &[record("6.1.1-1", "dpkg")]).is_err());
    }

    #[test]
    fn the_payload_ends_before_its_size() {
        let mut image = vec![0; 0x800];
        image[SETUP_SECTS] = 1;
        image[PAYLOAD_OFFSET] = 0x10;
        image[PAYLOAD_LENGTH] = 9;
        image[0x410..0x419].copy_from_slice(b"abcdeSIZE");
        assert_eq!(payload(&image), Some(b"abcde".as_slice()));
        image[PAYLOAD_LENGTH + 3] = 0xff;
        assert_eq!(payload(&image), None, "a length past the end");
        assert_eq!(payload(&[]), None);
    }
}
