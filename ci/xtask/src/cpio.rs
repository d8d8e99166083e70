//! Writes cpio archives in the "newc" format, the one the Linux kernel unpacks as an initramfs
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Archives are reproducible: entries are sorted by path, owned by root, and carry no times, so
//! that the same content always has the same bytes and can be cached under its hash.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const TRAILER: &str = "TRAILER!!!";
/// Archives end on a block boundary, as GNU cpio's do, so that another one can be appended.
const BLOCK: u64 = 512;

/// What one path of the archive is.
#[derive(Debug)]
enum Node {
    Dir,
    Bytes(Vec<u8>),
    /// Read only when the archive is written: a tree may be larger than memory.
    Copy(PathBuf),
    Symlink(Vec<u8>),
    CharDev {
        major: u32,
        minor: u32,
    },
}

#[derive(Debug)]
struct Entry {
    mode: u32,
    node: Node,
}

/// A cpio archive in the making. Paths are relative to the archive's root, with or without a
/// leading slash; missing parent directories are added; a later entry replaces an earlier one.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory (mode 0755).
    pub fn dir(&mut self, path: &str) -> &mut Self {
        self.insert(path, 0o755, Node::Dir)
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.insert(path, mode, Node::Bytes(bytes.into()))
    }

    /// Adds a regular file whose content is read from `source` when the archive is written.
    pub fn file_from(&mut self, path: &str, mode: u32, source: impl Into<PathBuf>) -> &mut Self {
        self.insert(path, mode, Node::Copy(source.into()))
    }

    /// Adds a symbolic link at `path` that points to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.insert(path, 0o777, Node::Symlink(target.as_bytes().to_vec()))
    }

    /// Adds a character device node.
    pub fn node(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        self.insert(path, mode, Node::CharDev { major, minor })
    }

    /// Adds everything below the directory `dir` under `prefix`. Sockets, FIFOs and block devices
    /// are left out: an initramfs has no use for them.
    ///
    /// # Errors
    /// A directory or link cannot be read, a file is no longer there, or a name is not UTF-8.
    #[cfg_attr(not(test), expect(dead_code, reason = "for hosts with daemons from a whole root"))]
    pub fn append_tree(&mut self, prefix: &str, dir: &Path) -> io::Result<&mut Self> {
        let mut pending = vec![(normal(prefix), dir.to_path_buf())];
        while let Some((prefix, dir)) = pending.pop() {
            for item in fs::read_dir(&dir).map_err(|e| at(&dir, &e))? {
                let source = item?.path();
                let name = source
                    .file_name()
                    .and_then(|n| n.to_str())
                    .ok_or_else(|| at(&source, &io::Error::other("the name is not UTF-8")))?;
                let path = format!("{prefix}/{name}");
                let meta = fs::symlink_metadata(&source).map_err(|e| at(&source, &e))?;
                let mode = meta.permissions().mode() & 0o7777;
                let kind = meta.file_type();
                if kind.is_dir() {
                    self.insert(&path, mode, Node::Dir);
                    pending.push((path, source));
                } else if kind.is_symlink() {
                    let target = fs::read_link(&source).map_err(|e| at(&source, &e))?;
                    self.insert(&path, mode, Node::Symlink(target.as_os_str().as_bytes().to_vec()));
                } else if kind.is_file() {
                    self.insert(&path, mode, Node::Copy(source));
                } else if kind.is_char_device() {
                    let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
                    self.insert(&path, mode, Node::CharDev { major, minor });
                }
            }
        }
        Ok(self)
    }

    /// Writes the archive, trailer and padding included, and returns the number of bytes.
    ///
    /// # Errors
    /// The writer fails, a source file cannot be read or changes its size meanwhile, a file is
    /// 4 GiB or more (newc has 32-bit sizes), or an entry lies below something not a directory.
    pub fn finish(&self, writer: impl Write) -> io::Result<u64> {
        let mut out = Counted { writer, written: 0 };
        let mut inode = 0;
        for (path, entry) in &self.entries {
            self.check_parent(path)?;
            inode += 1;
            write_entry(&mut out, inode, path, entry).map_err(|e| at(Path::new(path), &e))?;
        }
        header(
            &mut out,
            &Header {
                links: 1,
                ..Header::default()
            },
            TRAILER,
        )?;
        out.pad(BLOCK)?;
        out.writer.flush()?;
        Ok(out.written)
    }

    fn insert(&mut self, path: &str, mode: u32, node: Node) -> &mut Self {
        let path = normal(path);
        if path.is_empty() {
            return self;
        }
        for (end, _) in path.match_indices('/') {
            self.entries.entry(path[..end].to_owned()).or_insert(Entry {
                mode: 0o755,
                node: Node::Dir,
            });
        }
        self.entries.insert(path, Entry { mode, node });
        self
    }

    /// The kernel drops, without a word, what it cannot place: refuse it here.
    fn check_parent(&self, path: &str) -> io::Result<()> {
        let Some((parent, _)) = path.rsplit_once('/') else {
            return Ok(());
        };
        match self.entries.get(parent).map(|e| &e.node) {
            Some(Node::Dir) => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("/{parent} is not a directory, but /{path} lies in it"),
            )),
        }
    }
}

/// The fields of a newc header that differ between entries.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    links: u32,
    size: u32,
    device: (u32, u32),
}

fn write_entry(out: &mut Counted<impl Write>, inode: u32, path: &str, entry: &Entry) -> io::Result<()> {
    let mut head = Header {
        inode,
        mode: entry.mode,
        links: 1,
        ..Header::default()
    };
    match &entry.node {
        Node::Dir => {
            head.mode |= S_IFDIR;
            head.links = 2;
            header(out, &head, path)
        }
        Node::CharDev { major, minor } => {
            head.mode |= S_IFCHR;
            head.device = (*major, *minor);
            header(out, &head, path)
        }
        Node::Symlink(target) => {
            head.mode |= S_IFLNK;
            content(out, head, path, target.len() as u64, target.as_slice())
        }
        Node::Bytes(bytes) => {
            head.mode |= S_IFREG;
            content(out, head, path, bytes.len() as u64, bytes.as_slice())
        }
        Node::Copy(source) => {
            head.mode |= S_IFREG;
            let file = File::open(source).map_err(|e| at(source, &e))?;
            let size = file.metadata()?.len();
            content(out, head, path, size, file)
        }
    }
}

fn content(out: &mut Counted<impl Write>, mut head: Header, path: &str, size: u64, data: impl Read) -> io::Result<()> {
    head.size = u32::try_from(size).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "larger than 4 GiB"))?;
    header(out, &head, path)?;
    let copied = io::copy(&mut data.take(size), out)?;
    if copied != size {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "shrank while it was read"));
    }
    out.pad(4)
}

fn header(out: &mut Counted<impl Write>, head: &Header, path: &str) -> io::Result<()> {
    let name_size = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
    // Magic, inode, mode, uid, gid, links, mtime, size, device, rdevice, name size, checksum.
    let (major, minor) = head.device;
    let fields = [
        head.inode, head.mode, 0, 0, head.links, 0, head.size, 0, 0, major, minor, name_size, 0,
    ];
    let mut text = String::from("070701");
    for field in fields {
        text.push_str(&format!("{field:08X}"));
    }
    out.write_all(text.as_bytes())?;
    out.write_all(path.as_bytes())?;
    out.write_all(&[0])?;
    out.pad(4)
}

/// A path without leading, trailing or doubled slashes and without "." parts.
fn normal(path: &str) -> String {
    path.split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect::<Vec<_>>()
        .join("/")
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Counts what it writes: alignment is relative to the start of the archive.
struct Counted<W> {
    writer: W,
    written: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.writer.write(buf)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl<W: Write> Counted<W> {
    fn pad(&mut self, to: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        io::copy(&mut io::repeat(0).take(missing), self).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Archive {
        let mut archive = Archive::new();
        archive
            .file("/bin/tool", 0o755, "12345")
            .symlink("sbin", "bin")
            .node("dev/console", 0o600, 5, 1)
            .dir("proc")
            .file("empty", 0o644, "");
        archive
    }

    fn bytes(archive: &Archive) -> Vec<u8> {
        let mut out = Vec::new();
        let written = archive.finish(&mut out).unwrap();
        assert_eq!(written, out.len() as u64);
        out
    }

    /// Name, mode, rdev and data of an entry.
    type Parsed = (String, u32, (u32, u32), Vec<u8>);

    /// Reads back every entry before the trailer.
    fn parse(data: &[u8]) -> Vec<Parsed> {
        let mut at = 0;
        let mut entries = Vec::new();
        loop {
            assert_eq!(&data[at..at + 6], b"070701");
            let field = |i: usize| {
                let from = at + 6 + i * 8;
                let text = std::str::from_utf8(&data[from..from + 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, rdev, name_size) =
                (field(1), field(6) as usize, (field(9), field(10)), field(11) as usize);
            let name = &data[at + 110..at + 110 + name_size];
            assert_eq!(name.last(), Some(&0));
            let name = String::from_utf8(name[..name_size - 1].to_vec()).unwrap();
            let start = (at + 110 + name_size).next_multiple_of(4);
            if name == TRAILER {
                assert!(data[start..].iter().all(|b| *b == 0));
                assert_eq!(data.len() % 512, 0);
                return entries;
            }
            entries.push((name, mode, rdev, data[start..start + size].to_vec()));
            at = (start + size).next_multiple_of(4);
        }
    }

    #[test]
    fn writes_every_kind_of_entry_with_its_parents_first() {
        let expected = [
            ("bin", 0o040_755, (0, 0), ""),
            ("bin/tool", 0o100_755, (0, 0), "12345"),
            ("dev", 0o040_755, (0, 0), ""),
            ("dev/console", 0o020_600, (5, 1), ""),
            ("empty", 0o100_644, (0, 0), ""),
            ("proc", 0o040_755, (0, 0), ""),
            ("sbin", 0o120_777, (0, 0), "bin"),
        ]
        .map(|(name, mode, rdev, data)| (name.to_owned(), mode, rdev, data.as_bytes().to_vec()));
        assert_eq!(parse(&bytes(&sample())), expected);
    }

    #[test]
    fn equal_content_has_equal_bytes() {
        let mut other = Archive::new();
        other
            .file("empty", 0o644, "")
            .dir("proc")
            .node("/dev//console", 0o600, 5, 1);
        other
            .symlink("./sbin", "bin")
            .file("bin/tool", 0o600, "old")
            .file("bin/tool", 0o755, "12345");
        assert_eq!(bytes(&sample()), bytes(&other));
    }

    #[test]
    fn packs_a_tree_from_disk() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/c.txt"), "hello").unwrap();
        fs::set_permissions(dir.path().join("a/b/c.txt"), PermissionsExt::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("b/c.txt", dir.path().join("a/link")).unwrap();
        let mut archive = Archive::new();
        archive.append_tree("/usr", dir.path()).unwrap();
        let entries = parse(&bytes(&archive));
        let names: Vec<_> = entries.iter().map(|e| e.0.as_str()).collect();
        assert_eq!(names, ["usr", "usr/a", "usr/a/b", "usr/a/b/c.txt", "usr/a/link"]);
        assert_eq!(
            (entries[3].1, entries[3].3.as_slice()),
            (0o100_640, b"hello".as_slice())
        );
        assert_eq!(entries[4].3, b"b/c.txt");
    }

    #[test]
    fn refuses_what_the_kernel_would_drop() {
        let mut archive = Archive::new();
        archive.symlink("bin", "usr/bin").file("bin/tool", 0o755, "x");
        let error = archive.finish(io::sink()).unwrap_err();
        assert_eq!(error.to_string(), "/bin is not a directory, but /bin/tool lies in it");
    }

    #[test]
    fn names_the_file_that_is_missing() {
        let mut archive = Archive::new();
        archive.file_from("vmlinuz", 0o644, "/nonexistent/vmlinuz");
        let error = archive.finish(io::sink()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vmlinuz"), "{error}");
    }

    /// The judgement of another implementation, where one is installed.
    #[test]
    fn other_tools_list_it() {
        let data = bytes(&sample());
        for (tool, args) in [("cpio", ["-t", "--quiet"]), ("bsdtar", ["-tf", "-"])] {
            let child = Command::new(tool)
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            let Ok(mut child) = child else {
                eprintln!("{tool} is not installed: not asked");
                continue;
            };
            child.stdin.take().unwrap().write_all(&data).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{tool}: {output:?}");
            let listed = String::from_utf8(output.stdout).unwrap();
            let names: Vec<_> = listed.lines().collect();
            let expected = ["bin", "bin/tool", "dev", "dev/console", "empty", "proc", "sbin"];
            assert_eq!(names, expected, "{tool}");
        }
    }
}
