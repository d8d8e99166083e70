//! Stock Debian kernels, for the emulated hosts and for the guests.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Recipe};
use crate::root::Root;
use crate::{modules, packages, tools};

/// Changes whenever this file makes something else from the same package.
const SCRIPT: &str = "4";
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Boot protocol fields of a bzImage (Linux, Documentation/arch/x86/boot.rst).
const SETUP_SECTS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// Modules taken from the packages, with all they depend on.
const WANTED: [&str; 26] = [
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
    "nvme",
    "button",
    "evdev",
];

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
    /// Its full name, e.g. `6.1.0-50-cloud-amd64`.
    pub release: String,
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The ELF file inside the bzImage, for the PVH boot protocol.
    pub vmlinux: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The newest kernel of that version on the mirror when it was first needed.
    ///
    /// # Errors
    /// It cannot be downloaded or unpacked.
    pub fn get(version: Version, root: &Root) -> Result<Self> {
        let recipe = Recipe::new(&format!("kernel-{version}"))
            .with("script", SCRIPT)
            .with("package", META_PACKAGE)
            .with("modules", &WANTED.join(" "));
        let dir = cache::ensure(&recipe, |dir| make(dir, version, root))?;
        Ok(Self {
            version,
            release: fs::read_to_string(dir.join("release"))?.trim().to_owned(),
            bzimage: dir.join("vmlinuz"),
            vmlinux: dir.join("vmlinux"),
            modules: dir.join("modules"),
        })
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

fn make(dir: &Path, version: Version, root: &Root) -> Result<()> {
    let scratch = tempfile::tempdir_in(cache::base()?)?;
    let tree = scratch.path();
    let release = packages::with_apt(|apt| {
        let (package, number) = newest(version, &apt.versions(META_PACKAGE)?)?;
        tools::step(&format!("downloading {package} {number}"), || {
            let file = apt.download_alone(&package, &number)?;
            packages::unpack(&file, tree)?;
            packages::record(&[file], dir)
        })?;
        Ok(package.trim_start_matches("linux-image-").to_owned())
    })?;
    let bzimage = tree.join(format!("boot/vmlinuz-{release}"));
    fs::copy(&bzimage, dir.join("vmlinuz")).context("the package has no vmlinuz")?;
    fs::copy(tree.join(format!("boot/config-{release}")), dir.join("config"))?;
    fs::write(dir.join("release"), &release)?;
    tools::step(&format!("unpacking the ELF file in Linux {version}"), || {
        extract_vmlinux(&dir.join("vmlinuz"), &dir.join("vmlinux"), tree, root)
    })?;
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
fn newest(version: Version, records: &[(String, String)]) -> Result<(String, String)> {
    let start = format!("{version}.");
    // apt lists the newest first.
    let record = records
        .iter()
        .find(|(number, _)| number.starts_with(&start))
        .with_context(|| format!("the mirror has no {META_PACKAGE} of Linux {version}"))?;
    let depends = packages::field(&record.1, "Depends").unwrap_or_default();
    let (package, rest) = depends.split_once(' ').unwrap_or((depends, ""));
    let number = rest.trim_start_matches("(= ").split(')').next();
    match number {
        Some(number) if package.starts_with("linux-image-") && !number.is_empty() => {
            Ok((package.to_owned(), number.to_owned()))
        }
        _ => bail!("{META_PACKAGE} {} depends on `{depends}`", record.0),
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
    let mut command = root.command(&format!("usr/bin/{program}"));
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

    fn record(number: &str, depends: &str) -> (String, String) {
        let text = format!("Package: {META_PACKAGE}\nVersion: {number}\nDepends: {depends}\n");
        (number.to_owned(), text)
    }

    #[test]
    fn the_newest_of_a_version_is_taken() {
        let records = [
            record("6.12.107-1", "linux-image-6.12.107+deb13-cloud-amd64 (= 6.12.107-1)"),
            record("6.1.176-1", "linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)"),
            record("6.1.170-1", "linux-image-6.1.0-47-cloud-amd64 (= 6.1.170-1)"),
        ];
        let pick = |v| newest(v, &records).unwrap();
        assert_eq!(
            pick(Version::V6_1),
            ("linux-image-6.1.0-50-cloud-amd64".into(), "6.1.176-1".into())
        );
        assert_eq!(pick(Version::V6_12).1, "6.12.107-1");
        assert!(newest(Version::V6_1, &records[..1]).is_err());
        assert!(newest(Version::V6_1, &[record("6.1.1-1", "dpkg")]).is_err());
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
