//! The host's end of a port: a tap, or a network card by way of a packet socket.

#![allow(unsafe_code)] // vectored I/O, messages

use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use libc::iovec;
use triarch_net::PacketQueue;

use super::packet::{Rest, vector};
use crate::offload::{Accepts, HEADER, move_checksum};
use crate::switch::Drop;
use crate::switch::frame::{TAG, TAG_AT, ethertype};

/// What a port of the host is made of.
pub struct HostEnd {
    /// Its queues, at least one.
    pub queues: Vec<Arc<PacketQueue>>,
    /// Bytes of virtio header before each packet: 12, or 10 without `num_buffers`.
    pub header: usize,
    /// Tags of packets that are read are told beside them, as packet sockets do, not in them.
    pub tags_beside: bool,
    /// What can be written there undone.
    pub accepts: Accepts,
    /// What it is in the eyes of an administrator: `tap vmtap0`.
    pub label: String,
}

/// Such a port at work.
pub(super) struct Host {
    pub(super) end: HostEnd,
    /// For each queue, what it is called among all that can have work.
    pub(super) sources: Vec<u64>,
    vectors: Vectors,
}

/// The allocation of vectors between uses, empty then.
#[derive(Default)]
struct Vectors(Vec<iovec>);

// SAFETY: it holds no pointers: the vector is empty whenever nobody is at work with it.
unsafe impl Send for Vectors {}

/// What reading led to.
pub(super) enum Read {
    /// A packet, header included, in this part of the buffer.
    Packet(Range<usize>),
    /// Nothing is there.
    Nothing,
    /// One that cannot be had, or none this time.
    Lost,
}

impl Host {
    pub(super) fn new(end: HostEnd) -> Self {
        Self {
            end,
            sources: Vec::new(),
            vectors: Vectors::default(),
        }
    }

    /// What becomes readable with packets of queue `index`.
    pub(super) fn fd(&self, index: usize) -> Option<RawFd> {
        self.end.queues.get(index).map(|queue| queue.as_raw_fd())
    }

    /// Reads one packet, header first.
    pub(super) fn read(&self, index: usize, buffer: &mut [u8]) -> Read {
        let Some(queue) = self.end.queues.get(index) else {
            return Read::Nothing;
        };
        let read = match self.end.tags_beside {
            true => read_beside(queue, self.end.header, buffer),
            false => {
                let whole = [place(buffer)];
                // SAFETY: the vector is the buffer, which is borrowed for the call.
                unsafe { queue.read(&whole) }.map(|n| (n < buffer.len()).then_some(0..n))
            }
        };
        match read {
            Ok(Some(packet)) if packet.len() > self.end.header => Read::Packet(packet),
            Ok(_) => Read::Lost,
            Err(error) => match error.raw_os_error() {
                // The kernel met a packet it cannot describe, and dropped it; or the interface went down, which is told once.
                Some(libc::EINVAL | libc::EFAULT | libc::ENOMEM | libc::EINTR | libc::ENETDOWN) => Read::Lost,
                _ => Read::Nothing,
            },
        }
    }

    /// Writes one packet.
    pub(super) fn write(
        &mut self,
        flow: u8,
        header: &[u8; HEADER],
        head: &[u8],
        rest: Rest<'_>,
    ) -> Result<usize, Drop> {
        let index = usize::from(flow) % self.end.queues.len().max(1);
        let Some(queue) = self.end.queues.get(index) else {
            return Err(Drop::Down);
        };
        let mut vectors = std::mem::take(&mut self.vectors.0);
        vectors.push(vector(&header[..self.end.header.min(HEADER)]));
        vectors.push(vector(head));
        let written = rest.vectors(&mut vectors).and_then(|()| {
            // SAFETY: the first two vectors and those of memory of this process are borrowed for longer than the call; those of a
            // guest's came from its memory, which is borrowed too.
            unsafe { queue.write(&vectors) }
        });
        vectors.clear();
        self.vectors.0 = vectors;
        match written {
            Ok(_) => Ok(index),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(Drop::Malformed),
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Err(Drop::TooLong),
            Err(_) => Err(Drop::Host),
        }
    }
}

fn place(buffer: &mut [u8]) -> iovec {
    iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    }
}

/// Room for what a packet socket tells beside a packet.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Reads one packet whose tag, if it has one, is told beside it (PACKET_AUXDATA of packet(7)), and puts the tag in. `None`: it was longer
/// than the buffer.
fn read_beside(queue: &PacketQueue, header: usize, buffer: &mut [u8]) -> io::Result<Option<Range<usize>>> {
    let at = header + TAG_AT;
    let mut control = Control([0; 64]);
    // SAFETY: plain data, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    // Header and addresses, room for a tag, all the rest.
    let (front, rest) = buffer.split_at_mut(at);
    let mut vectors = [place(front), place(&mut rest[TAG..])];
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: all that the message points to is live and as long as it says.
    let n = unsafe { libc::recvmsg(queue.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let Ok(n) = usize::try_from(n) else {
        return Err(io::Error::last_os_error());
    };
    if message.msg_flags & libc::MSG_TRUNC != 0 || n < at {
        return Ok(None);
    }
    // SAFETY: the kernel has filled the message, whose control data are live.
    let tag = unsafe { tag_beside(&message) };
    Ok(Some(with_tag(buffer, header, n, tag)))
}

/// The tag that is told beside a packet: its EtherType and what is in it.
///
/// # Safety
/// The message was filled by the kernel, and what it points to lives.
unsafe fn tag_beside(message: &libc::msghdr) -> Option<(u16, u16)> {
    // SAFETY: the caller has seen to the message; the kernel wrote whole headers, each with the data it announces.
    unsafe {
        let mut item = libc::CMSG_FIRSTHDR(message);
        while !item.is_null() {
            if (*item).cmsg_level == libc::SOL_PACKET && (*item).cmsg_type == libc::PACKET_AUXDATA {
                let about: libc::tpacket_auxdata =
                    libc::CMSG_DATA(item).cast::<libc::tpacket_auxdata>().read_unaligned();
                if about.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
                    return None;
                }
                let known = about.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
                let kind = if known { about.tp_vlan_tpid } else { ethertype::VLAN };
                return Some((kind, about.tp_vlan_tci));
            }
            item = libc::CMSG_NXTHDR(message, item);
        }
    }
    None
}

/// Closes the gap behind the addresses of a packet of `n` bytes, or puts a tag there; where the packet is then.
fn with_tag(buffer: &mut [u8], header: usize, n: usize, tag: Option<(u16, u16)>) -> Range<usize> {
    let at = header + TAG_AT;
    let Some((kind, tci)) = tag else {
        buffer.copy_within(..at, TAG);
        return TAG..n + TAG;
    };
    buffer[at..at + 2].copy_from_slice(&kind.to_be_bytes());
    buffer[at + 2..at + TAG].copy_from_slice(&tci.to_be_bytes());
    // The kernel counted without it.
    move_checksum(buffer, TAG as u16);
    0..n + TAG
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::card::{self, CardError, card};
    use crate::offload::LEGACY_HEADER;
    use triarch_net::{PacketBackend, Tap};

    /// A packet with a gap in it, whose checksum begins at `start`.
    fn packet(start: u8) -> Vec<u8> {
        let header = [1, 0, 0, 0, 0, 0, start, 0, 16, 0];
        [&header[..], &[7; 12], &[0xee; 4], &[8, 0, 0x45, 1, 2, 3], &[0; 8]].concat()
    }

    #[test]
    fn a_tag_is_put_where_it_was() {
        let mut buffer = packet(34);
        let range = with_tag(&mut buffer, LEGACY_HEADER, 28, Some((0x8100, 0x6005)));
        assert_eq!(range, 0..32);
        let (header, frame) = buffer[range].split_at(LEGACY_HEADER);
        assert_eq!(header, [1, 0, 0, 0, 0, 0, 38, 0, 16, 0]);
        assert_eq!(frame, [&[7; 12][..], &[0x81, 0, 0x60, 5, 8, 0, 0x45, 1, 2, 3]].concat());
    }

    #[test]
    fn without_one_nothing_is_between() {
        let mut buffer = packet(34);
        let range = with_tag(&mut buffer, LEGACY_HEADER, 28, None);
        let (header, frame) = buffer[range].split_at(LEGACY_HEADER);
        assert_eq!(header, [1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
        assert_eq!(frame, [&[7; 12][..], &[8, 0, 0x45, 1, 2, 3]].concat());
    }

    /// Runs `test` in a network namespace of its own, with a tap `wire0` whose other end is the test's, where such can be made.
    fn with_wire(test: fn(&Tap, Host)) {
        let inside = std::thread::spawn(move || {
            // SAFETY: takes a plain flag, and changes only which network this thread sees.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                return eprintln!("not tried: {}", io::Error::last_os_error());
            }
            let mut tap = match Tap::open(Some("wire0"), 1) {
                Ok(tap) => tap,
                Err(error) => return eprintln!("not tried: {error}"),
            };
            assert!(matches!(card("wire0", Vec::new()), Err(CardError::Down(_))));
            tap.bring_up().expect("up");
            tap.set_offloads(tap.offloads()).expect("offloads");
            test(&tap, Host::new(card("wire0", Vec::new()).expect("a card")));
        });
        inside.join().expect("the test");
    }

    /// A TCP segment with `len` bytes of data behind IPv4, from a station called `from`, in a VLAN or none; its checksum is not finished.
    fn segment(from: u8, tci: Option<u16>, len: usize) -> Vec<u8> {
        let total = (40 + len as u16).to_be_bytes();
        let tag = tci.map_or(Vec::new(), |tci| [[0x81, 0], tci.to_be_bytes()].concat());
        let ip = [
            0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        let tcp = [0, 1, 0, 9, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 1, 0, 0, 0, 0, 0];
        let data: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
        [&[2; 6][..], &[2, 0, 0, 0, 0, from], &tag, &[8, 0], &ip, &tcp, &data].concat()
    }

    /// Its header: pieces of 1400 bytes if it is longer.
    fn header(tag: u16, len: usize) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[0] = 1;
        header[6..8].copy_from_slice(&(34 + tag).to_le_bytes());
        header[8] = 16;
        if len > 1400 {
            header[1] = 1;
            header[2..4].copy_from_slice(&(54 + tag).to_le_bytes());
            header[4..6].copy_from_slice(&1400_u16.to_le_bytes());
        }
        header
    }

    /// The next packet of the station called `from`; others are the kernel's.
    fn next(from: u8, mut read: impl FnMut() -> Option<Vec<u8>>) -> Vec<u8> {
        for _ in 0..500 {
            match read() {
                Some(packet) if packet.windows(6).take(19).any(|mac| mac == [2, 0, 0, 0, 0, from]) => return packet,
                Some(_) => {}
                None => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
        }
        panic!("nothing came");
    }

    const SENT: [(Option<u16>, u16, usize); 4] = [
        (None, 0, 500),
        (Some(0x6005), 4, 500),
        (None, 0, 9000),
        (Some(7), 4, 9000),
    ];

    #[test]
    fn what_is_on_the_wire_comes_in_as_it_was() {
        with_wire(|tap, host| {
            let mut buffer = vec![0; triarch_net::MAX_PACKET + 1];
            for (tci, tag, len) in SENT {
                let packet = [&header(tag, len)[..], &segment(1, tci, len)].concat();
                // SAFETY: the vector is the packet, which is borrowed for the call.
                unsafe { tap.queues()[0].write(&[vector(&packet)]) }.expect("write");
                let came = next(1, || match host.read(0, &mut buffer) {
                    Read::Packet(range) => Some(buffer[range].to_vec()),
                    _ => None,
                });
                let (before, frame) = came.split_at(LEGACY_HEADER);
                assert_eq!(frame, segment(1, tci, len), "{tci:x?}, {len} bytes");
                let (kind, sum) = (&before[..2], &before[4..]);
                assert_eq!(
                    (kind, sum),
                    (&header(tag, len)[..2], &header(tag, len)[4..10]),
                    "{before:?}"
                );
            }
        });
    }

    #[test]
    fn what_goes_out_is_on_the_wire_and_does_not_come_in() {
        with_wire(|tap, host| {
            // Another one, since nobody sees what he himself sends.
            let mut sender = Host::new(card("wire0", Vec::new()).expect("a card"));
            let mut buffer = vec![0; triarch_net::MAX_PACKET + 1];
            for (tci, tag, len) in SENT {
                let frame = segment(2, tci, len);
                let (head, rest) = frame.split_at(60);
                let written = sender.write(0, &header(tag, len), head, Rest::Own(rest));
                assert_eq!(written, Ok(0), "{tci:x?}, {len} bytes");
                let came = next(2, || {
                    let whole = [place(&mut buffer)];
                    // SAFETY: the vector is the buffer, which is borrowed for the call.
                    let n = unsafe { tap.queues()[0].read(&whole) }.ok()?;
                    Some(buffer[..n].to_vec())
                });
                let (before, got) = came.split_at(HEADER);
                assert_eq!(got, frame, "{tci:x?}, {len} bytes");
                assert_eq!(before[..2], header(tag, len)[..2], "{before:?}");
            }
            assert!(matches!(host.read(0, &mut buffer), Read::Nothing));
            let long = segment(2, None, 3000);
            assert_eq!(sender.write(0, &[0; HEADER], &long, Rest::Own(&[])), Err(Drop::TooLong));
        });
    }

    #[test]
    fn what_is_no_card_is_refused() {
        assert!(matches!(card("a/b", Vec::new()), Err(CardError::Name(_))));
        let file = std::fs::File::open("/dev/null").expect("open");
        assert!(matches!(card("eth0", vec![file.into()]), Err(CardError::BadFd(_))));
        with_wire(|_, _| {
            assert!(matches!(card("wire1", Vec::new()), Err(CardError::Missing(_))));
            // One that somebody else opened serves, and only one.
            let open = || card::open("wire0").expect("a socket");
            card("wire0", vec![open()]).expect("a card");
            assert!(matches!(card("wire0", vec![open(), open()]), Err(CardError::BadFd(_))));
        });
    }
}
