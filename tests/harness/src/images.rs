//! What Linux guests boot: kernels and initramfs images that the tests find beside themselves.

use crate::suite::beside_us;
use anyhow::{Result, bail};
use std::fmt;
use std::path::{Path, PathBuf};

/// A stock Debian kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's.
    V6_1,
    /// Debian 13's.
    V6_12,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// The name of its bzImage among the images; of the compressed Image on ARM.
    pub fn bzimage(self) -> String {
        format!("vmlinuz-{self}")
    }

    /// The name of its ELF file, of the plain Image on ARM. They start faster: there is nothing to unpack.
    pub fn elf(self) -> String {
        format!("vmlinux-{self}")
    }

    /// The name of its initramfs, with `triarch-guest-init` in it.
    pub fn initramfs(self) -> String {
        format!("initramfs-{self}.cpio")
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        })
    }
}

/// The directory with what guests boot.
#[derive(Clone, Debug)]
pub struct Images {
    dir: PathBuf,
}

impl Images {
    /// `TRIARCH_IMAGES`, or the directory of this program.
    pub fn find() -> Self {
        let dir = std::env::var_os("TRIARCH_IMAGES").map(PathBuf::from);
        Self {
            dir: dir.unwrap_or_else(|| beside_us("")),
        }
    }

    /// The images in `dir`.
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }

    /// Path of one image.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if !path.is_file() {
            bail!(
                "there is no {name} in {}; TRIARCH_IMAGES names the directory",
                self.dir.display()
            );
        }
        Ok(path)
    }
}
