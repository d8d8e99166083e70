//! A VMM, its API and its guest, as benchmarks use them.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use triarch_harness::net::inheritable;

use super::Ended;

const PATIENCE: Duration = Duration::from_secs(20);

/// A VMM with an API socket that exists before it does, so that nobody has to look for it.
pub(super) struct Vmm {
    pub(super) process: Ended,
    pub(super) socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Vmm {
    /// A socket in a directory of its own, and the command that serves it.
    pub(super) fn prepare(
        program: &Path,
        args: &[String],
    ) -> Result<(Command, UnixListener, PathBuf, tempfile::TempDir)> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket)?;
        let mut command = Command::new(program);
        command
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok((command, listener, socket, dir))
    }

    /// One that serves it.
    pub(super) fn start(program: &Path, args: &[String]) -> Result<Self> {
        let (mut command, listener, socket, dir) = Self::prepare(program, args)?;
        let listener = inheritable(File::from(OwnedFd::from(listener)))?;
        command.args(["--api-socket", &format!("fd={}", listener.as_raw_fd())]);
        let process = Ended(command.spawn().context("triarch cannot be run")?);
        Ok(Self {
            process,
            socket,
            _dir: dir,
        })
    }

    /// One with the payload guest, which is up and listens, and a client. `config` is the VM's configuration.
    pub(super) fn with_guest(program: &Path, config: impl FnOnce(&str) -> String) -> Result<(Self, Client, Guest)> {
        let vmm = Self::start(program, &[])?;
        let serial = vmm.socket.with_file_name("serial.sock");
        let mut client = vmm.client()?;
        let mode = format!(r#"{{"mode":"Socket","socket":"{}"}}"#, serial.display());
        client.put("vm.create", &config(&mode))?;
        client.put("vm.boot", "")?;
        let mut guest = Guest::attach(&serial)?;
        guest.line()?;
        Ok((vmm, client, guest))
    }

    /// A client of it.
    pub(super) fn client(&self) -> Result<Client> {
        Client::connect(&self.socket)
    }
}

/// A client that keeps its connection.
pub(super) struct Client {
    stream: UnixStream,
    answer: Vec<u8>,
}

impl Client {
    /// One more.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let answer = vec![0; 64 << 10];
        Ok(Self { stream, answer })
    }

    /// Waits so long for answers.
    pub(super) fn patience(&mut self, time: Duration) -> Result<()> {
        Ok(self.stream.set_read_timeout(Some(time))?)
    }

    /// Sends a request; its status, when the whole answer is there.
    pub(super) fn call(&mut self, request: &[u8]) -> Result<u16> {
        self.stream.write_all(request)?;
        let mut have = 0;
        loop {
            let count = self.stream.read(&mut self.answer[have..])?;
            ensure!(count > 0, "the connection ended");
            have += count;
            if let Some(status) = whole(&self.answer[..have])? {
                return Ok(status);
            }
        }
    }

    /// Asks for something that has to work.
    pub(super) fn put(&mut self, route: &str, body: &str) -> Result<()> {
        let status = self.call(&request("PUT", route, body))?;
        let said = String::from_utf8_lossy(&self.answer[..400]);
        ensure!(status < 300, "{route} answered {status}: {said}");
        Ok(())
    }

    /// The body of an answer.
    pub(super) fn get(&mut self, route: &str) -> Result<serde_json::Value> {
        let status = self.call(&request("GET", route, ""))?;
        ensure!(status == 200, "{route} answered {status}");
        let end = self.answer.windows(4).position(|w| w == b"\r\n\r\n");
        let body = end.map(|end| &self.answer[end + 4..]).context("no answer")?;
        let value = serde_json::Deserializer::from_slice(body).into_iter().next();
        Ok(value.context("no body")??)
    }

    /// Microseconds from a request to its whole answer.
    pub(super) fn timed(&mut self, request: &[u8]) -> Result<f64> {
        let start = Instant::now();
        let status = self.call(request)?;
        let took = start.elapsed();
        ensure!(status == 200, "it answered {status}");
        Ok(took.as_secs_f64() * 1e6)
    }
}

/// A request's bytes.
pub(super) fn request(method: &str, route: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{method} /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// The status of an answer that is there as a whole.
fn whole(answer: &[u8]) -> Result<Option<u16>> {
    let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&answer[..end])?;
    let status = head
        .get(9..12)
        .and_then(|s| s.parse().ok())
        .with_context(|| format!("not HTTP: {head}"))?;
    let length = head
        .split("\r\n")
        .find_map(|line| line.strip_prefix("Content-Length: "));
    let length: usize = length.map_or(Ok(0), str::parse)?;
    Ok((answer.len() >= end + 4 + length).then_some(status))
}

/// A VM with the payload guest in 512 MiB.
pub(super) fn config(kernel: &Path, serial: &str) -> String {
    format!(
        r#"{{"payload":{{"kernel":"{}"}},"memory":{{"size":536870912}},"serial":{serial},"console":{{"mode":"Off"}}}}"#,
        kernel.display()
    )
}

/// The guest, on its serial line.
pub(super) struct Guest(BufReader<UnixStream>);

impl Guest {
    /// The one whose serial line is there.
    pub(super) fn attach(serial: &Path) -> Result<Self> {
        let stream = UnixStream::connect(serial)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Waits so long for answers.
    pub(super) fn patience(&mut self, time: Duration) -> Result<()> {
        Ok(self.0.get_ref().set_read_timeout(Some(time))?)
    }

    /// Asks; its answer.
    pub(super) fn ask(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.answer()
    }

    /// Asks without waiting for the answer.
    pub(super) fn send(&mut self, command: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(format!("{command}\n").as_bytes())?)
    }

    /// The answer to what was asked: the text behind `ok`.
    pub(super) fn answer(&mut self) -> Result<String> {
        let line = self.line()?;
        let text = line
            .strip_prefix("ok")
            .with_context(|| format!("the guest answered `{line}`"))?;
        Ok(text.trim_start().to_owned())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the serial line ended after `{line}`");
        Ok(line.trim_end().to_owned())
    }
}

/// The number behind `key=` in an answer.
pub(super) fn number(answer: &str, key: &str) -> Result<f64> {
    let value = answer
        .split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    value
        .and_then(|v| v.parse::<f64>().ok())
        .with_context(|| format!("no {key} in `{answer}`"))
}

/// The value below which a part of `values` lies; 0 is the least.
pub(super) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss
    )]
    let at = (sorted.len() as f64 * part) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_among_the_values() {
        let values: Vec<f64> = (0..1000).rev().map(f64::from).collect();
        assert_eq!(
            [0.0, 0.5, 0.99, 1.0].map(|part| quantile(&values, part)),
            [0.0, 500.0, 990.0, 999.0]
        );
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn an_answer_is_whole_when_all_of_it_is_there() {
        let answer = b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\nabc";
        for cut in 0..answer.len() {
            assert_eq!(whole(&answer[..cut]).unwrap(), None, "{cut}");
        }
        assert_eq!(whole(answer).unwrap(), Some(200));
        assert_eq!(whole(b"HTTP/1.1 204 \r\n\r\n").unwrap(), Some(204));
    }
}
