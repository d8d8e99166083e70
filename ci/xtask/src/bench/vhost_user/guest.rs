//! The bare-metal guest, asked over its serial line (tests/payload/README.md).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use triarch_harness::process::Process;

/// A firmware that is emulated slowly takes seconds.
const BOOT: Duration = Duration::from_secs(60);
/// An answer takes no longer than this beyond what was asked for.
const ANSWER: Duration = Duration::from_secs(20);

/// The guest's end of the line.
pub struct Guest(BufReader<UnixStream>);

impl Guest {
    /// Connects to the serial line of `vmm`, which listens at `socket` soon, and waits for the guest.
    ///
    /// # Errors
    /// The VMM ended, or the guest does not start.
    pub fn attach(vmm: &mut Process, socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + BOOT;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline && vmm.wait(Duration::ZERO).is_err() => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => bail!("no connection to the serial line: {error}{}", vmm.last_words()),
            }
        };
        stream.set_read_timeout(Some(BOOT))?;
        let mut guest = Self(BufReader::new(stream));
        while guest.line()? != "triarch-payload ready" {}
        guest.0.get_ref().set_read_timeout(Some(ANSWER))?;
        Ok(guest)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line).context("the guest says nothing")?;
        ensure!(line.ends_with('\n'), "the serial line ended after `{line}`");
        Ok(line.trim_end().to_owned())
    }

    /// Gives a command; what follows `ok` in the answer.
    ///
    /// # Errors
    /// No answer, or another.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.tell(command)?;
        self.answer().with_context(|| format!("`{command}`"))
    }

    /// Gives a command whose answer is taken later.
    ///
    /// # Errors
    /// The serial line is gone.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(format!("{command}\n").as_bytes())?)
    }

    /// Waits for the answer to the command given last; what follows `ok` in it.
    ///
    /// # Errors
    /// No answer, or another.
    pub fn answer(&mut self) -> Result<String> {
        let line = self.line()?;
        let answer = line.strip_prefix("ok").map(str::trim_start);
        answer.map(str::to_owned).with_context(|| format!("it says {line}"))
    }
}

/// The number of `key=number` in an answer.
///
/// # Errors
/// There is none.
pub fn number(answer: &str, key: &str) -> Result<f64> {
    let mut words = answer.split(' ').filter_map(|word| word.split_once('='));
    let value = words.find(|(name, _)| *name == key).map(|(_, value)| value);
    value
        .and_then(|value| value.parse().ok())
        .with_context(|| format!("no {key} in `{answer}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_by_its_whole_key() {
        let answer = "requests=12 us=300 ns_p99=7 ns_p9=3";
        assert_eq!(number(answer, "us").unwrap(), 300.0);
        assert_eq!(number(answer, "ns_p9").unwrap(), 3.0);
        assert!(number(answer, "p99").is_err());
    }
}
