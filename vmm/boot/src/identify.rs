//! Tells what a file given as a kernel is, by its first bytes.

use std::fmt;

/// Bytes of a file that [`identify`] wants to see (fewer if the file is shorter).
pub(crate) const PROBE_SIZE: usize = 4096;

/// A guest's architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestArch {
    /// 64-bit Intel, AMD and Hygon.
    X86_64,
    /// 64-bit ARM.
    Aarch64,
}

impl fmt::Display for GuestArch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::X86_64 => "x86-64",
            Self::Aarch64 => "arm64",
        })
    }
}

/// What a file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// An ELF file with this `e_machine`.
    Elf {
        /// The architecture's number in the ELF header.
        machine: u16,
    },
    /// An x86 bzImage (or the older zImage), also as an EFI application.
    BzImage,
    /// An arm64 `Image`, also as an EFI application.
    Arm64Image,
    /// An EFI application that unpacks a kernel (arm64 `vmlinuz.efi`).
    EfiZboot,
    /// Something that no loader of ours takes, in words with an article.
    Other(&'static str),
}

impl FileKind {
    /// The architecture that the file is for, if its kind tells.
    pub fn arch(&self) -> Option<GuestArch> {
        match self {
            Self::BzImage
            | Self::Elf {
                machine: EM_386 | EM_X86_64,
            } => Some(GuestArch::X86_64),
            Self::Arm64Image | Self::Elf { machine: EM_AARCH64 } => Some(GuestArch::Aarch64),
            _ => None,
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elf { machine } => match machine_name(*machine) {
                Some(name) => write!(f, "an ELF file for {name}"),
                None => write!(f, "an ELF file for machine type {machine}"),
            },
            Self::BzImage => f.write_str("an x86 bzImage"),
            Self::Arm64Image => f.write_str("an arm64 Linux Image"),
            Self::EfiZboot => f.write_str("a compressed EFI kernel (zboot)"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;

fn machine_name(machine: u16) -> Option<&'static str> {
    Some(match machine {
        EM_386 => "32-bit x86",
        EM_X86_64 => "x86-64",
        EM_AARCH64 => "arm64",
        8 => "MIPS",
        20 => "32-bit PowerPC",
        21 => "64-bit PowerPC",
        22 => "s390",
        40 => "32-bit ARM",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => return None,
    })
}

/// Signatures at the start of a file that is not a kernel. The first match wins.
const OTHERS: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "a gzip-compressed file"),
    (b"\xfd7zXZ\0", "an xz-compressed file"),
    (b"\x28\xb5\x2f\xfd", "a zstd-compressed file"),
    (b"BZh", "a bzip2-compressed file"),
    (b"\x5d\0\0", "an lzma-compressed file"),
    (b"\x04\x22\x4d\x18", "an lz4-compressed file"),
    (b"\x02\x21\x4c\x18", "an lz4-compressed file"),
    (b"070701", "a cpio archive (an initramfs?)"),
    (b"070702", "a cpio archive (an initramfs?)"),
    (b"QFI\xfb", "a qcow2 disk image"),
    (b"\x27\x05\x19\x56", "a U-Boot uImage"),
    (b"\xd0\x0d\xfe\xed", "a device tree blob"),
    (b"!<arch>\n", "a Debian package or an ar archive"),
    (b"\xed\xab\xee\xdb", "an RPM package"),
    (b"PK\x03\x04", "a zip archive"),
    (b"#!", "a script"),
    (b"MZ", "an EFI application or a Windows program"),
];

/// What a file is whose first bytes are `head` (4 KiB tell everything; fewer tell less).
pub fn identify(head: &[u8]) -> FileKind {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    if at(0, b"\x7fELF") {
        let machine = match (head.get(5), head.get(18..20)) {
            (Some(2), Some(&[high, low])) => u16::from_be_bytes([high, low]),
            (_, Some(&[low, high])) => u16::from_le_bytes([low, high]),
            _ => 0,
        };
        return FileKind::Elf { machine };
    }
    // Kernels that are EFI applications too begin with "MZ", so ask for their own magic first.
    if at(0x202, b"HdrS") && at(0x1fe, &[0x55, 0xaa]) {
        return FileKind::BzImage;
    }
    if at(0x38, b"ARM\x64") {
        return FileKind::Arm64Image;
    }
    if at(0, b"MZ") && at(4, b"zimg") {
        return FileKind::EfiZboot;
    }
    if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| at(0, magic)) {
        return FileKind::Other(name);
    }
    if at(0x438, &[0x53, 0xef]) {
        return FileKind::Other("an ext2, ext3 or ext4 file system");
    }
    if at(0x1fe, &[0x55, 0xaa]) {
        return FileKind::Other("a disk image or a boot sector");
    }
    if at(0x101, b"ustar") {
        return FileKind::Other("a tar archive");
    }
    FileKind::Other(by_content(head))
}

fn by_content(head: &[u8]) -> &'static str {
    if head.iter().all(|&byte| byte == 0) {
        "a file of zeros"
    } else if head
        .iter()
        .all(|&byte| matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e))
    {
        "a text file"
    } else {
        "a file of an unknown kind"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; PROBE_SIZE];
        for (offset, part) in parts {
            bytes[*offset..offset + part.len()].copy_from_slice(part);
        }
        bytes
    }

    #[test]
    fn architectures_by_magic() {
        let bz = identify(&file(&[(0, b"MZ"), (0x1fe, &[0x55, 0xaa]), (0x202, b"HdrS")]));
        assert_eq!((bz, bz.arch()), (FileKind::BzImage, Some(GuestArch::X86_64)));
        let arm = identify(&file(&[(0, b"MZ"), (0x38, b"ARM\x64")]));
        assert_eq!(arm.arch(), Some(GuestArch::Aarch64));
        assert_eq!(arm.to_string(), "an arm64 Linux Image");
        let elf = identify(&file(&[(0, b"\x7fELF\x02\x01"), (18, &[183, 0])]));
        assert_eq!(elf.arch(), Some(GuestArch::Aarch64));
        assert_eq!(elf.to_string(), "an ELF file for arm64");
        let elf = identify(&file(&[(0, b"\x7fELF\x02\x01"), (18, &[62, 0])]));
        assert_eq!(elf.arch(), Some(GuestArch::X86_64));
        let big_endian = identify(&file(&[(0, b"\x7fELF\x02\x02"), (18, &[0, 22])]));
        assert_eq!(big_endian.to_string(), "an ELF file for s390");
    }

    #[test]
    fn other_files_by_name() {
        for (parts, words) in [
            (vec![(0usize, &b"\x1f\x8b\x08"[..])], "gzip"),
            (vec![(0, &b"MZ\0\0zimg"[..])], "zboot"),
            (vec![(0, &b"MZ\x90"[..])], "EFI application"),
            (vec![(0, &b"070701"[..])], "cpio"),
            (vec![(0x1fe, &[0x55, 0xaa][..])], "disk image"),
            (vec![(0x438, &[0x53, 0xef][..])], "ext4"),
            (vec![], "zeros"),
            (vec![(7, &[1][..])], "unknown"),
        ] {
            let kind = identify(&file(&parts));
            assert!(kind.to_string().contains(words), "{kind} lacks {words}");
            assert_eq!(kind.arch(), None);
        }
        assert_eq!(identify(b"hello, world\n").to_string(), "a text file");
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_name(head in proptest::collection::vec(any::<u8>(), 0..1200)) {
            prop_assert!(!identify(&head).to_string().is_empty());
        }
    }
}
