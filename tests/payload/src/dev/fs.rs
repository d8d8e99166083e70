//! virtio-fs (virtio 1.2 §5.11): messages of FUSE (linux/fuse.h), one at a time, about files in the root directory.

use super::{Driver, Setup};
use crate::clock::Deadline;
use crate::pci::Function;
use crate::virtio::Transport;
use crate::virtio::ring::{Dma, Options, Queue, Segment};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const ROOT: u64 = 1;
const READ_WRITE: u32 = 2;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// What is read and written at once.
const PIECE: usize = 64 << 10;
/// A message with its fixed part, or with a name.
const MORE: usize = 4096;
/// Bytes of the tag in the configuration.
const TAG: u64 = 36;
const TIMEOUT_MS: u64 = 10_000;

/// A file system that was mounted.
pub struct Fs {
    transport: Transport,
    urgent: Queue,
    requests: Queue,
    request: Dma,
    answer: Dma,
    unique: u64,
}

/// A file that is open.
struct File {
    node: u64,
    handle: u64,
}

impl Driver for Fs {
    fn start(function: Function, setup: &Setup) -> Result<Self, String> {
        let transport = Transport::new(function)?;
        let features = transport.negotiate(setup.features())?;
        let queue = |index| transport.queue(index, setup.size, Options::of(features));
        let (urgent, requests) = (queue(0)?, queue(1)?);
        transport.run();
        let mut fs = Self {
            transport,
            urgent,
            requests,
            request: Dma::new(MORE + PIECE)?,
            answer: Dma::new(OUT_HEADER + PIECE)?,
            unique: 0,
        };
        fs.mount()?;
        Ok(fs)
    }

    fn transport(&mut self) -> &mut Transport {
        &mut self.transport
    }

    fn queues(&mut self) -> Vec<&mut Queue> {
        alloc::vec![&mut self.urgent, &mut self.requests]
    }

    fn victim(&self) -> u16 {
        1
    }

    /// Asks what the root directory is.
    fn prove(&mut self) -> Result<(), String> {
        self.ask(GETATTR, ROOT, &[&[0; 16]]).map(|_| ())
    }

    fn remap(&mut self) -> Result<(), String> {
        self.transport.remap(&mut [&mut self.urgent, &mut self.requests])
    }
}

impl Fs {
    /// The name that the host gave it.
    pub fn tag(&self) -> Result<String, String> {
        let bytes = self.transport.config(0, TAG)?;
        let text = bytes.iter().take_while(|byte| **byte != 0);
        Ok(text.map(|byte| char::from(*byte)).collect())
    }

    /// All that the file `name` has.
    pub fn read(&mut self, name: &str) -> Result<Vec<u8>, String> {
        let file = self.open(name)?;
        let mut bytes = Vec::new();
        loop {
            let piece = self.ask(READ, file.node, &[&range(&file, bytes.len(), PIECE)])?;
            if piece.is_empty() {
                break;
            }
            bytes.extend(piece);
        }
        self.close(&file)?;
        Ok(bytes)
    }

    /// Writes `bytes` from the begin of the file `name` on.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), String> {
        let file = self.open(name)?;
        for (n, piece) in bytes.chunks(PIECE).enumerate() {
            let answer = self.ask(WRITE, file.node, &[&range(&file, n * PIECE, piece.len()), piece])?;
            if number(&answer, 0)? as u32 != piece.len() as u32 {
                return Err("not all was written".into());
            }
        }
        self.close(&file)
    }

    /// Version 7.31, and no more than every file system can.
    fn mount(&mut self) -> Result<(), String> {
        self.ask(INIT, 0, &[&words([7, 31, 1 << 20, 0])]).map(|_| ())
    }

    fn open(&mut self, name: &str) -> Result<File, String> {
        let node = number(&self.ask(LOOKUP, ROOT, &[name.as_bytes(), &[0]])?, 0)?;
        let handle = number(&self.ask(OPEN, node, &[&words([READ_WRITE, 0])])?, 0)?;
        Ok(File { node, handle })
    }

    fn close(&mut self, file: &File) -> Result<(), String> {
        let mut body = [0; 24];
        body[..8].copy_from_slice(&file.handle.to_le_bytes());
        self.ask(RELEASE, file.node, &[&body]).map(|_| ())
    }

    /// Sends a message; what its answer has behind the header.
    fn ask(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, String> {
        let body = body.concat();
        let len = IN_HEADER + body.len();
        if len > self.request.len() {
            return Err("the message is too long".into());
        }
        self.unique += 1;
        // By root, of no process.
        self.request.bytes()[..IN_HEADER].fill(0);
        self.request.put(0, (len as u32).to_le_bytes());
        self.request.put(4, opcode.to_le_bytes());
        self.request.put(8, self.unique.to_le_bytes());
        self.request.put(16, node.to_le_bytes());
        self.request.bytes()[IN_HEADER..len].copy_from_slice(&body);
        let room = self.answer.len();
        let chain = [
            Segment::read(&self.request, 0, len),
            Segment::write(&self.answer, 0, room),
        ];
        self.requests.want_interrupt(true);
        self.requests.add(&chain).ok_or("queue is full")?;
        self.requests.kick();
        let Some((_, used)) = self.requests.wait(Deadline::after_ms(TIMEOUT_MS)) else {
            return Err(format!("no answer, device status {:#x}", self.transport.status()));
        };
        let answer = self.answer.bytes().get(..used as usize).ok_or("too long an answer")?;
        let header = number(answer, 0)?;
        if number(answer, 8)? != self.unique {
            return Err("an answer to something else".into());
        }
        match (header >> 32) as i32 {
            0 => Ok(answer[OUT_HEADER..].to_vec()),
            error => Err(format!("message {opcode} has the error {error}")),
        }
    }
}

/// `fuse_read_in` and `fuse_write_in`.
fn range(file: &File, offset: usize, len: usize) -> [u8; 40] {
    let mut body = [0; 40];
    body[..8].copy_from_slice(&file.handle.to_le_bytes());
    body[8..16].copy_from_slice(&(offset as u64).to_le_bytes());
    body[16..20].copy_from_slice(&(len as u32).to_le_bytes());
    body
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn number(bytes: &[u8], at: usize) -> Result<u64, String> {
    let field = bytes.get(at..at + 8).ok_or("a short answer")?;
    field
        .try_into()
        .map(u64::from_le_bytes)
        .map_err(|_| "a short answer".into())
}
