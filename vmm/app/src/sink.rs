//! The end of the log: a file, or what the process got as standard error.
//!
//! Any thread may log, also one that a guest waits for. So a line that the host does not take at once is lost and counted: a full
//! disk, a pipe nobody reads or a reader that is gone neither ends the VMM nor delays it. Only what a regular file's page cache does
//! not take at once is waited for.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use tracing_subscriber::fmt::MakeWriter;

use crate::outlet::open_append;

/// A pipe that is ready takes this much without waiting (PIPE_BUF, pipe(7)), and so does a socket.
const AT_ONCE: usize = 4096;
const FLAGS: i32 = OFlags::NONBLOCK.union(OFlags::NOCTTY).bits() as i32;

/// The mode of a log file that is made, less the umask.
const LOG_MODE: u32 = 0o666;

/// Where the log goes.
#[derive(Clone)]
pub(crate) struct Sink(Arc<Shared>);

struct Shared {
    path: Option<PathBuf>,
    /// What says that lines were lost, as one line of the log.
    loss: fn(u64) -> String,
    output: Mutex<Output>,
}

struct Output {
    file: File,
    /// It blocks; so it is asked for readiness before each so many bytes.
    at_once: Option<usize>,
    lost: u64,
    /// The last line was cut off.
    torn: bool,
}

impl Sink {
    /// A log in the file `path`, which is appended to.
    pub(crate) fn file(path: &Path, loss: fn(u64) -> String) -> io::Result<Self> {
        Ok(Self::new(
            Some(path),
            Output::new(open_append(path, LOG_MODE)?, None),
            loss,
        ))
    }

    /// A log on standard error.
    pub(crate) fn stderr(loss: fn(u64) -> String) -> io::Result<Self> {
        Ok(Self::new(None, inherit(&io::stderr())?, loss))
    }

    fn new(path: Option<&Path>, output: Output, loss: fn(u64) -> String) -> Self {
        Self(Arc::new(Shared {
            path: path.map(Path::to_owned),
            loss,
            output: Mutex::new(output),
        }))
    }

    /// Opens the log file anew, by its name; `None` if this is none. After an error the log goes where it went.
    pub(crate) fn reopen(&self) -> Option<io::Result<()>> {
        let file = open_append(self.0.path.as_ref()?, LOG_MODE);
        Some(file.map(|file| self.output().file = file))
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        self.0.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, line: &[u8]) {
        let mut output = self.output();
        if output.lost > 0 {
            let loss = (self.0.loss)(output.lost);
            if output.put(loss.as_bytes()) {
                output.lost = 0;
            }
        }
        if output.lost > 0 || !output.put(line) {
            output.lost += 1;
        }
    }
}

impl Output {
    fn new(file: File, at_once: Option<usize>) -> Self {
        Self {
            file,
            at_once,
            lost: 0,
            torn: false,
        }
    }

    /// Puts out a whole line. Returns whether anything of it was taken.
    fn put(&mut self, line: &[u8]) -> bool {
        if self.torn && self.write(b"\n") == 1 {
            self.torn = false;
        }
        let done = if self.torn { 0 } else { self.write(line) };
        self.torn |= done > 0 && done < line.len();
        done > 0
    }

    /// Writes as much as can be written without waiting; returns how much that is.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let mut part = &bytes[done..];
            if let Some(at_once) = self.at_once {
                if !ready(&self.file) {
                    break;
                }
                part = &part[..part.len().min(at_once)];
            }
            match self.file.write(part) {
                Ok(n @ 1..) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        done
    }
}

fn ready(file: &File) -> bool {
    // Where nobody reads any more it counts as ready, and the write fails.
    let mut fds = [PollFd::new(file, PollFlags::OUT)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
}

/// A way to write to `stream` without waiting, and without touching the flags that it shares with other processes.
fn inherit(stream: &impl AsFd) -> io::Result<Output> {
    let file = File::from(stream.as_fd().try_clone_to_owned()?);
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        return Ok(Output::new(file, None));
    }
    if kind.is_socket() {
        return Ok(Output::new(file, Some(AT_ONCE)));
    }
    // A second open file description of the same pipe or terminal has flags of its own.
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    match OpenOptions::new().write(true).custom_flags(FLAGS).open(name) {
        Ok(again) => Ok(Output::new(again, None)),
        Err(_) => Ok(Output::new(file, Some(if kind.is_fifo() { AT_ONCE } else { 1 }))),
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.clone())
    }
}

/// Takes lines, each with one call, and never fails: nobody could do anything about it.
pub(crate) struct Line(Sink);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn loss(lines: u64) -> String {
        format!("{lines} lost\n")
    }

    fn over(end: &impl AsFd) -> Sink {
        Sink::new(None, inherit(end).expect("inherit"), loss)
    }

    /// Writes numbered lines until two were lost; returns how many were written.
    fn fill(sink: &Sink) -> usize {
        (1..)
            .inspect(|i| sink.line(format!("{i:0100}\n").as_bytes()))
            .find(|_| sink.output().lost == 2)
            .expect("it is full at some time")
    }

    /// What arrives is whole lines, and the number of the lost ones stands where they would be.
    fn check(sink: &Sink, mut reader: impl Read) {
        let written = fill(sink);
        // One read takes all that is in a pipe.
        let mut buffer = vec![0; 1 << 20];
        let mut n = reader.read(&mut buffer).expect("read");
        sink.line(b"after\n");
        n += reader.read(&mut buffer[n..]).expect("read");
        let text = String::from_utf8(buffer[..n].to_vec()).expect("text");
        let (text, after) = text.split_at(text.len() - 6);
        assert_eq!(after, "after\n");
        let mut next = 1;
        for line in text.lines() {
            match line.strip_suffix(" lost") {
                Some(lost) => next += lost.parse::<usize>().expect("a number"),
                None => {
                    assert_eq!(line.parse(), Ok(next), "{line}");
                    next += 1;
                }
            }
        }
        assert_eq!(next, written + 1);
    }

    #[test]
    fn a_full_pipe_loses_whole_lines_and_says_so() {
        let (reader, writer) = io::pipe().expect("pipe");
        check(&over(&writer), reader);
    }

    #[test]
    fn so_does_a_pipe_that_cannot_be_opened_again() {
        let (reader, writer) = io::pipe().expect("pipe");
        let file = File::from(writer.as_fd().try_clone_to_owned().expect("dup"));
        let sink = Sink::new(None, Output::new(file, Some(AT_ONCE)), loss);
        check(&sink, reader);
    }

    #[test]
    fn a_socket_that_nobody_reads_never_waits() {
        let (_reader, writer) = UnixStream::pair().expect("pair");
        fill(&over(&writer));
    }

    #[test]
    fn without_a_reader_lines_are_lost_and_nothing_else_happens() {
        let (reader, writer) = io::pipe().expect("pipe");
        let sink = over(&writer);
        drop(reader);
        sink.line(b"a\n");
        // One that has no reader from the start cannot be opened again either.
        let late = over(&writer);
        late.line(b"a\n");
        assert_eq!((sink.output().lost, late.output().lost), (1, 1));
    }

    #[test]
    fn a_full_disk_loses_lines_until_another_file_is_opened() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("log");
        std::os::unix::fs::symlink("/dev/full", &path).expect("link");
        let sink = Sink::file(&path, loss).expect("open");
        sink.line(b"a\n");
        sink.line(b"b\n");
        fs::remove_file(&path).expect("remove");
        sink.reopen().expect("a file").expect("open");
        sink.line(b"c\n");
        assert_eq!(fs::read_to_string(&path).expect("read"), "2 lost\nc\n");
        fs::rename(&path, dir.path().join("log.1")).expect("rename");
        sink.line(b"d\n");
        sink.reopen().expect("a file").expect("open");
        sink.line(b"e\n");
        assert_eq!(fs::read_to_string(&path).expect("read"), "e\n");
        assert_eq!(
            fs::read_to_string(dir.path().join("log.1")).expect("read"),
            "2 lost\nc\nd\n"
        );
        // Nowhere to go: it stays.
        fs::remove_file(&path).expect("remove");
        fs::create_dir(&path).expect("directory");
        sink.reopen().expect("a file").expect_err("a directory");
        sink.line(b"f\n");
        assert_eq!(sink.output().lost, 0);
    }
}
