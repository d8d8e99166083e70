//! Disk images, and data to fill them with.

use crate::dice::Dice;
use anyhow::{Context, Result};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// `len` bytes that look random and are the same for the same `seed`.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut dice = Dice::new(seed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(dice.number().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A raw disk image.
pub struct DiskImage {
    path: PathBuf,
    file: File,
}

impl DiskImage {
    /// Makes an image with `content`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn with(path: impl Into<PathBuf>, content: &[u8]) -> Result<Self> {
        let image = Self::empty(path, content.len() as u64)?;
        image.file.write_all_at(content, 0)?;
        Ok(image)
    }

    /// Makes a sparse image of `size` bytes.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn empty(path: impl Into<PathBuf>, size: u64) -> Result<Self> {
        let path = path.into();
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("cannot make {}", path.display()))?;
        file.set_len(size)?;
        Ok(Self { path, file })
    }

    /// Whether its file system takes direct I/O.
    pub fn can_be_direct(&self) -> bool {
        let mut options = File::options();
        options.read(true).custom_flags(libc::O_DIRECT).open(&self.path).is_ok()
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what the image holds now.
    ///
    /// # Errors
    /// The range is not all inside the image, or reading failed.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, offset)?;
        Ok(data)
    }

    /// The bytes that the image takes on the host; holes take none.
    ///
    /// # Errors
    /// The file is gone.
    pub fn allocated(&self) -> Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_differ_by_seed_and_place() {
        let (one, two) = (pattern(1, 4096), pattern(2, 4096));
        assert_eq!(one, pattern(1, 4096));
        assert_ne!(one, two);
        assert_ne!(one[..2048], one[2048..]);
        assert_eq!((pattern(1, 3).as_slice(), pattern(0, 0).len()), (&one[..3], 0));
    }

    #[test]
    fn images_hold_and_lose_data() {
        let dir = tempfile::tempdir().unwrap();
        let content = pattern(7, 1 << 20);
        let image = DiskImage::with(dir.path().join("a"), &content).unwrap();
        assert_eq!(image.read(4096, 512).unwrap(), content[4096..4608]);
        assert!(image.read((1 << 20) - 1, 2).is_err());
        assert!(image.allocated().unwrap() >= 1 << 20);
        let empty = DiskImage::empty(dir.path().join("b"), 1 << 30).unwrap();
        assert!(empty.allocated().unwrap() < 1 << 20);
        assert!(DiskImage::empty(dir.path().join("b"), 512).is_err());
    }
}
