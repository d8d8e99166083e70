//! A VM with the payload in it: questions over its serial line.

use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::io::{BufRead, BufReader, Chain, Cursor, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::suite::{Context, patient};
use triarch_harness::vm::{Ended, Vm, VmBuilder};

/// The image among the others.
pub(crate) const IMAGE: &str = "triarch-payload";
/// The guest's first line.
const READY: &str = "triarch-payload ready";
/// How long an answer may take; those that take longer say so themselves.
const ANSWER: Duration = Duration::from_secs(8);
/// How long a VMM whose serial line is gone may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The serial line's socket in the VM's directory.
pub const SERIAL: &str = "serial.sock";

/// Whether guests here are ARM's.
pub fn is_arm() -> bool {
    std::env::consts::ARCH == "aarch64"
}

/// Where RAM begins: 16 MiB of it are the guest's own, the rest is for tests (tests/payload/README.md).
pub fn ram_start() -> u64 {
    if is_arm() { 0x4000_0000 } else { 0 }
}

/// Where test RAM begins.
pub fn test_ram() -> u64 {
    ram_start() + (16 << 20)
}

/// One vCPU, 64 MiB, no console beside the serial line.
pub fn builder(context: &Context) -> Result<VmBuilder> {
    let builder = VmBuilder::new(context)?;
    let serial = format!("socket={}", builder.dir().join(SERIAL).display());
    Ok(builder
        .flag("--kernel", context.images.path(IMAGE)?)
        .flag("--serial", serial)
        .flag("--console", "off")
        .cpus(1)
        .memory_mib(64))
}

/// A running payload.
pub struct Guest {
    /// What it said where it was before, and then what it says here.
    line: Chain<Cursor<Vec<u8>>, BufReader<UnixStream>>,
    vm: Vm,
}

impl Guest {
    /// Starts a VM made from [`builder`] and waits for the guest's first line.
    pub fn start(builder: VmBuilder) -> Result<Self> {
        let serial = builder.dir().join(SERIAL);
        Self::attach(builder.start()?, &serial)
    }

    /// Waits for the first line of the guest in `vm`, whose serial line is the socket `serial`.
    pub fn attach(vm: Vm, serial: &Path) -> Result<Self> {
        let mut guest = Self::attach_restored(vm, serial)?;
        guest.wait_ready()?;
        Ok(guest)
    }

    /// Takes the serial line of a guest in `vm` that said that it is there long ago.
    pub fn attach_restored(vm: Vm, serial: &Path) -> Result<Self> {
        Self::attach_moved(vm, serial, Vec::new())
    }

    /// The same of a guest that had said `before` elsewhere, perhaps the beginning of a line.
    pub fn attach_moved(vm: Vm, serial: &Path, before: Vec<u8>) -> Result<Self> {
        let stream = connect(&vm, serial)?;
        stream.set_read_timeout(Some(patient(ANSWER)))?;
        stream.set_write_timeout(Some(patient(ANSWER)))?;
        let line = Cursor::new(before).chain(BufReader::new(stream));
        Ok(Self { line, vm })
    }

    /// The VM around it.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Waits until the guest says that it is there: after the start, or after a reset.
    pub fn wait_ready(&mut self) -> Result<()> {
        let line = self.read_line()?;
        // With `bench` on the command line the entry code writes this byte first.
        let line = line.strip_prefix('T').unwrap_or(&line);
        ensure!(line == READY, "the guest began with `{line}`");
        Ok(())
    }

    /// The next line from the guest.
    pub fn read_line(&mut self) -> Result<String> {
        let mut bytes = Vec::new();
        let result = self.line.read_until(b'\n', &mut bytes);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match result {
            Ok(_) if text.ends_with('\n') => Ok(text.trim_end_matches('\n').to_owned()),
            Ok(_) => bail!("the serial line ended after `{text}`{}", self.last_words()),
            Err(error) => bail!("no line from the guest after `{text}`: {error}{}", self.last_words()),
        }
    }

    /// What the VMM said, given a moment to end where it is about to.
    fn last_words(&self) -> String {
        let deadline = Instant::now() + LAST_WORDS;
        while !has_ended(self.vm.pid()) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        self.vm.last_words()
    }

    /// What the guest has said that nobody has read, where it is no more; ends the VMM.
    pub fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // The line ends with the VM, if need be with an error.
        let _ = self.line.read_to_end(&mut rest);
        rest
    }

    /// Sends a command without waiting for its answer.
    pub fn send(&mut self, command: &str) -> Result<()> {
        self.line
            .get_mut()
            .1
            .get_mut()
            .write_all(format!("{command}\n").as_bytes())?;
        Ok(())
    }

    /// The answer to a command that was sent: the text behind `ok`.
    pub fn answer(&mut self) -> Result<String> {
        let line = self.read_line()?;
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("ok", text) => Ok(text.to_owned()),
            _ => bail!("the guest answered `{line}`"),
        }
    }

    /// Asks; the text behind `ok`.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.answer().with_context(|| format!("asked `{command}`"))
    }

    /// Asks for something that must be refused; the text behind `err`.
    pub fn refused(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        let line = self.read_line()?;
        match line.strip_prefix("err ") {
            Some(text) => Ok(text.to_owned()),
            None => bail!("`{command}` should be refused, the guest answered `{line}`"),
        }
    }

    /// Expects the VMM to end with `code` by itself.
    pub fn expect_end(self, code: i32) -> Result<Ended> {
        self.vm.expect_end(code)
    }

    /// Asks for power-off and expects the VMM to end with 0.
    pub fn power_off(mut self) -> Result<Ended> {
        self.send("pm off")?;
        self.vm.expect_end(0)
    }
}

/// Connects to the serial line as soon as the VMM listens; gives up when the VMM has ended.
fn connect(vm: &Vm, serial: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + patient(ANSWER);
    loop {
        match UnixStream::connect(serial) {
            Ok(stream) => return Ok(stream),
            Err(_) if has_ended(vm.pid()) => bail!("the VMM ended{}", vm.last_words()),
            Err(error) if Instant::now() >= deadline => {
                bail!("no connection to the serial line: {error}{}", vm.last_words())
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Whether a child of ours has ended, without taking note of its end for whoever waits for it.
pub fn has_ended(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        // Nobody's child any more, or its parent has taken note.
        return true;
    };
    // The state stands behind the name, which may contain anything but ends with the last parenthesis.
    stat.rsplit(')')
        .next()
        .is_none_or(|rest| rest.trim_start().starts_with('Z'))
}

/// The value of `key=value` in an answer.
pub fn field<'a>(answer: &'a str, key: &str) -> Result<&'a str> {
    let value = |word: &'a str| word.strip_prefix(key)?.strip_prefix('=');
    let found = answer.split(' ').find_map(value);
    found.with_context(|| format!("no {key} in `{answer}`"))
}

/// The value of `key=number` in an answer, decimal or hexadecimal.
pub fn number(answer: &str, key: &str) -> Result<u64> {
    let text = field(answer, key)?;
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("{key}={text} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let answer = "max_pairs=2 pairs=1 crc32=0x1f text=a";
        assert_eq!(field(answer, "pairs").unwrap(), "1");
        assert_eq!(number(answer, "crc32").unwrap(), 31);
        assert!(number(answer, "text").is_err());
        assert!(field(answer, "air").is_err());
    }
}
