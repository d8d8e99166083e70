//! The agent's protocol.
//!
//! Each message is one line of JSON, which ends with `\n`; where its `size` is not zero, that many
//! raw bytes follow. The client speaks first, with [`Request::Hello`]; each side skips what it
//! cannot parse until then, since a serial line may carry boot messages. Requests with an `id` run
//! side by side, and their replies, which bear the same `id`, may interleave.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};

/// Longest header line that is looked at, in bytes; longer ones are noise.
pub const MAX_HEADER: u64 = 1 << 20;
/// Most bytes of standard input that a command is given.
pub const MAX_STDIN: u64 = 64 << 20;
/// Most bytes in one chunk of output.
pub const CHUNK: usize = 64 << 10;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Request {
    /// Starts a session; answered by [`Reply::Hello`] with the same token.
    Hello {
        /// Chosen by the client, so that it knows the answer to be its own.
        token: String,
    },
    /// Runs a command; the data that follows is its standard input.
    Exec {
        /// Names this command in replies and in `Kill`.
        id: u64,
        /// The command itself.
        #[serde(flatten)]
        command: Command,
    },
    /// Writes the data that follows to a file; missing directories are made.
    Put {
        /// Names this request in replies.
        id: u64,
        /// Where to.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Reads a file.
    Get {
        /// Names this request in replies.
        id: u64,
        /// Which file.
        path: String,
    },
    /// Kills a running command and its children (SIGKILL to its process group).
    Kill {
        /// Names this request in replies.
        id: u64,
        /// The `id` of the command.
        exec: u64,
    },
    /// Ends the machine; answered by [`Reply::Done`] just before.
    Power {
        /// Names this request in replies.
        id: u64,
        /// How.
        action: Power,
    },
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Command {
    /// Program and arguments; the program is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Variables added to the agent's environment.
    pub env: BTreeMap<String, String>,
    /// Working directory; `/` if none is given.
    pub cwd: Option<String>,
    /// Kill it after this many milliseconds.
    pub timeout_ms: Option<u64>,
    /// Let it run beyond the session; its output goes nowhere and `Started` is the only reply.
    pub detach: bool,
}

/// How a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Power {
    /// Switch off.
    Poweroff,
    /// Restart.
    Reboot,
    /// Let the kernel panic.
    Panic,
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Reply {
    /// The session stands.
    Hello {
        /// The client's token.
        token: String,
        /// The machine.
        #[serde(flatten)]
        machine: Machine,
    },
    /// Output of a command follows.
    Stdout {
        /// Of the request.
        id: u64,
    },
    /// Error output of a command follows.
    Stderr {
        /// Of the request.
        id: u64,
    },
    /// Part of a file follows.
    Data {
        /// Of the request.
        id: u64,
    },
    /// A detached command runs.
    Started {
        /// Of the request.
        id: u64,
        /// Its process.
        pid: u32,
    },
    /// A command ended.
    Exit {
        /// Of the request.
        id: u64,
        /// How.
        #[serde(flatten)]
        exit: Exit,
    },
    /// The request was carried out.
    Done {
        /// Of the request.
        id: u64,
    },
    /// The request failed.
    Error {
        /// Of the request.
        id: u64,
        /// Why.
        message: String,
    },
}

/// The machine that the agent runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Release of the running kernel.
    pub kernel: String,
    /// Processors online.
    pub cpus: u32,
    /// Vendor of the processors, as `/proc/cpuinfo` has it.
    pub vendor: String,
    /// Memory that the kernel manages, in MiB.
    pub memory_mib: u64,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, if it exited.
    pub code: Option<i32>,
    /// Signal, if one ended it.
    pub signal: Option<i32>,
    /// Whether it was killed because its time was over.
    #[serde(default)]
    pub timed_out: bool,
}

impl Exit {
    /// Whether the command ended by itself with exit code 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

#[derive(Serialize, Deserialize)]
struct Header<T> {
    #[serde(flatten)]
    body: T,
    #[serde(default, skip_serializing_if = "is_zero")]
    size: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The signature that serde asks for.
fn is_zero(size: &u64) -> bool {
    *size == 0
}

/// Writes one message: header line and data.
///
/// # Errors
/// The writer's.
pub fn write<T: Serialize>(mut writer: impl Write, body: T, data: &[u8]) -> io::Result<()> {
    header(&mut writer, body, data.len() as u64)?;
    writer.write_all(data)?;
    writer.flush()
}

/// Writes the header line of a message whose `size` bytes of data the caller writes next.
///
/// # Errors
/// The writer's.
pub fn header<T: Serialize>(mut writer: impl Write, body: T, size: u64) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Header { body, size })?;
    line.push(b'\n');
    writer.write_all(&line)
}

/// Reads the next header line, skipping what is none. Gives the message and the number of bytes of
/// data that follow it, which the caller has to read; `None` at the end of the stream.
///
/// # Errors
/// The reader's.
pub fn read<T: DeserializeOwned>(mut reader: impl BufRead) -> io::Result<Option<(T, u64)>> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(MAX_HEADER).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        // A header may follow noise that had no end of line.
        let start = line.windows(2).position(|w| w == b"{\"").unwrap_or(0);
        if let Ok(header) = serde_json::from_slice::<Header<T>>(&line[start..]) {
            return Ok(Some((header.body, header.size)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_noise() {
        let exec = Request::Exec {
            id: 7,
            command: Command {
                argv: vec!["cat".into()],
                detach: true,
                ..Command::default()
            },
        };
        let hello = Request::Hello { token: "t".into() };
        let mut wire = b"[    0.1] booting\n{\"type\":\"unknown\"}\nlogin: ".to_vec();
        write(&mut wire, &hello, b"").unwrap();
        write(&mut wire, &exec, b"{\n}").unwrap();
        let mut reader = wire.as_slice();
        assert_eq!(read::<Request>(&mut reader).unwrap(), Some((hello, 0)));
        assert_eq!(read::<Request>(&mut reader).unwrap(), Some((exec, 3)));
        assert_eq!(reader, b"{\n}");
    }

    #[test]
    fn replies_have_the_documented_form() {
        let exit = Exit {
            code: None,
            signal: Some(9),
            timed_out: true,
        };
        let mut wire = Vec::new();
        write(&mut wire, &Reply::Exit { id: 2, exit }, b"").unwrap();
        write(&mut wire, &Reply::Stdout { id: 2 }, b"hi").unwrap();
        let text = String::from_utf8(wire).unwrap();
        assert_eq!(
            text,
            "{\"type\":\"exit\",\"id\":2,\"code\":null,\"signal\":9,\"timed_out\":true}\n\
             {\"type\":\"stdout\",\"id\":2,\"size\":2}\nhi"
        );
    }

    /// A line without end is given up at the limit: what follows there is a line of its own.
    #[test]
    fn an_endless_line_takes_bounded_memory() {
        let mut wire = b"{\"".to_vec();
        wire.resize(usize::try_from(MAX_HEADER).unwrap(), b'x');
        let hello = Request::Hello { token: "t".into() };
        write(&mut wire, &hello, b"").unwrap();
        assert_eq!(read::<Request>(&mut wire.as_slice()).unwrap(), Some((hello, 0)));
    }
}
