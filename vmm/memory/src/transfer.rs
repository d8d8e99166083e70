//! Guest memory that goes over sockets without being copied in this process.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::discard::advise;
use crate::{GuestMemory, GuestRegion};

/// The smallest page of any guest.
const PAGE: usize = 4096;
/// Most parts of memory in one call (UIO_MAXIOV).
const PARTS: usize = 1024;

/// Bytes of a run whose pages are worth a call of their own.
const LONG: u64 = 8 * PAGE as u64;

static ZEROES: [u8; PAGE] = [0; PAGE];

/// Sends what is on `runs` (GPA and bytes, each in one region) by `socket`, as much of it as goes now, and returns how many bytes went.
///
/// # Errors
/// A run is not in one region, or the socket takes nothing.
pub fn send(memory: &GuestMemory, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut parts = parts(memory, runs)?;
    let message = message(&mut parts);
    // SAFETY: the message has live mappings of `memory` only, which the kernel reads. What is there belongs to the guest, which may change
    // it meanwhile: nothing in this process holds a reference to it.
    done(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) })
}

/// Puts what comes by `socket` on `runs`, one after the other, until they are full or nothing comes for as long as the socket waits. Returns
/// how many bytes came; 0: no more will.
///
/// # Errors
/// A run is not in one region, or nothing came.
pub fn receive(memory: &GuestMemory, runs: &[(u64, u64)], socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut parts = parts(memory, runs)?;
    let mut message = message(&mut parts);
    // SAFETY: the message has live mappings of `memory` only, which the kernel writes to. What is there belongs to the guest: nothing in
    // this process holds a reference to it.
    let came = done(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_WAITALL) })?;
    let mut left = came as u64;
    for (gpa, len) in runs {
        let part = left.min(*len);
        if let Some((region, at)) = memory.to_region_addr(GuestAddress(*gpa)).filter(|_| part > 0) {
            region.bitmap().mark_dirty(at.raw_value() as usize, part as usize);
        }
        left -= part;
    }
    Ok(came)
}

/// Has the host give the pages of `runs` now, all of which are about to be written: that takes less than a page fault for each. Where
/// the host cannot, and of short runs, they come one by one.
pub fn populate(memory: &GuestMemory, runs: &[(u64, u64)]) {
    for (gpa, len) in runs.iter().filter(|(_, len)| *len >= LONG) {
        if let Some((region, at)) = memory.to_region_addr(GuestAddress(*gpa)) {
            let _ = advise(region, at.raw_value(), *len, libc::MADV_POPULATE_WRITE);
        }
    }
}

/// Tells in `zero` for each page of `region` from `offset` on whether it is all zeroes now.
///
/// # Errors
/// They are not all in the region.
pub fn find_zeroes(region: &GuestRegion, offset: u64, zero: &mut [bool]) -> io::Result<()> {
    let start = address(region, offset, (zero.len() * PAGE) as u64)?;
    for (page, zero) in zero.iter_mut().enumerate() {
        // SAFETY: the page is in a live mapping, as was looked up above, and C compares bytes that may change meanwhile: it holds no
        // reference to them, and whatever it tells of a page that changes is true of none or another moment.
        *zero = unsafe { libc::memcmp(start.add(page * PAGE).cast(), ZEROES.as_ptr().cast(), PAGE) } == 0;
    }
    Ok(())
}

/// Where `len` bytes from `offset` of `region` are in this process.
fn address(region: &GuestRegion, offset: u64, len: u64) -> io::Result<*mut u8> {
    if offset.checked_add(len).is_none_or(|end| end > region.len()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    region
        .get_host_address(MemoryRegionAddress(offset))
        .map_err(io::Error::other)
}

fn parts(memory: &GuestMemory, runs: &[(u64, u64)]) -> io::Result<Vec<libc::iovec>> {
    let part = |(gpa, len): &(u64, u64)| {
        let found = memory.to_region_addr(GuestAddress(*gpa));
        let (region, at) = found.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(libc::iovec {
            iov_base: address(region, at.raw_value(), *len)?.cast(),
            iov_len: *len as usize,
        })
    };
    runs.iter().take(PARTS).map(part).collect()
}

fn message(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid `msghdr`: one without name, parts and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len() as _;
    message
}

fn done(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use vm_memory::Bytes;

    use super::*;
    use crate::{RamOptions, allocate};

    const MIB: u64 = 1 << 20;
    const P: u64 = PAGE as u64;

    fn memory(shared: bool) -> GuestMemory {
        let options = RamOptions {
            shared,
            ..RamOptions::default()
        };
        let ranges = [(GuestAddress(0), MIB), (GuestAddress(4 * MIB), MIB)];
        allocate(&ranges, &options).expect("allocate")
    }

    fn dirty(memory: &GuestMemory, gpa: u64) -> bool {
        let (region, at) = memory.to_region_addr(GuestAddress(gpa)).expect("memory");
        region.bitmap().dirty_at(at.raw_value() as usize)
    }

    #[test]
    fn runs_go_from_memory_to_memory() {
        for shared in [false, true] {
            let (from, to) = (memory(shared), memory(shared));
            let runs = [(4 * MIB + P, 3 * P), (P, P), (MIB - P, P)];
            for (index, (gpa, len)) in runs.iter().enumerate() {
                let bytes = vec![index as u8 + 1; *len as usize];
                from.write_slice(&bytes, GuestAddress(*gpa)).expect("write");
            }
            let (ours, theirs) = UnixStream::pair().expect("sockets");
            populate(&to, &runs);
            populate(&to, &[(4 * MIB, MIB), (MIB - P, MIB), (2 * MIB, MIB), (0, u64::MAX)]);
            assert_eq!(send(&from, &runs, ours.as_fd()).expect("sent"), 5 * PAGE);
            assert_eq!(receive(&to, &runs, theirs.as_fd()).expect("came"), 5 * PAGE);
            for (index, (gpa, len)) in runs.iter().enumerate() {
                let mut bytes = vec![0; *len as usize];
                to.read_slice(&mut bytes, GuestAddress(*gpa)).expect("read");
                assert!(bytes.iter().all(|byte| *byte == index as u8 + 1), "run {index}");
            }
            let byte = |gpa| to.read_obj::<u8>(GuestAddress(gpa)).expect("memory");
            assert_eq!([0, 2 * P, 4 * MIB, 4 * MIB + 4 * P].map(byte), [0; 4]);
            assert!(dirty(&to, P) && dirty(&to, 4 * MIB + 3 * P) && !dirty(&to, 4 * MIB + 4 * P));
        }
    }

    #[test]
    fn what_came_is_told_and_marked_and_no_more() {
        let memory = memory(false);
        let (mut ours, theirs) = UnixStream::pair().expect("sockets");
        theirs
            .set_read_timeout(Some(Duration::from_millis(50)))
            .expect("a time");
        let runs = [(P, P), (4 * P, 2 * P)];
        let nothing = receive(&memory, &runs, theirs.as_fd()).expect_err("nothing came");
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        ours.write_all(&[7; PAGE + 9]).expect("sent");
        assert_eq!(receive(&memory, &runs, theirs.as_fd()).expect("came"), PAGE + 9);
        assert!(dirty(&memory, P) && dirty(&memory, 4 * P) && !dirty(&memory, 5 * P));
        drop(ours);
        assert_eq!(receive(&memory, &runs, theirs.as_fd()).expect("the end"), 0);
    }

    #[test]
    fn what_is_no_memory_is_neither_sent_nor_written() {
        let memory = memory(false);
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        for run in [(MIB - P, 2 * P), (2 * MIB, P), (u64::MAX - P + 1, P), (0, u64::MAX)] {
            assert!(send(&memory, &[(0, P), run], ours.as_fd()).is_err(), "{run:?}");
            assert!(receive(&memory, &[(0, P), run], ours.as_fd()).is_err(), "{run:?}");
        }
        drop(ours);
        let mut rest = Vec::new();
        assert_eq!(theirs.read_to_end(&mut rest).expect("read"), 0);
    }

    #[test]
    fn more_runs_than_a_call_takes_go_in_several() {
        let memory = memory(true);
        let runs = vec![(0, P); PARTS + 10];
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let reads = thread::spawn(move || {
            let mut bytes = Vec::new();
            theirs.read_to_end(&mut bytes).map(|_| bytes.len())
        });
        assert_eq!(send(&memory, &runs, ours.as_fd()).expect("sent"), PARTS * PAGE);
        drop(ours);
        assert_eq!(reads.join().expect("no panic").expect("read"), PARTS * PAGE);
    }

    #[test]
    fn zero_pages_are_those_without_a_byte() {
        let memory = memory(false);
        let region = memory.find_region(GuestAddress(4 * MIB)).expect("a region");
        for at in [0, 2 * P - 1, 3 * P + 1000, 5 * P] {
            region.write_slice(&[1], MemoryRegionAddress(at)).expect("write");
        }
        let mut zero = [false; 5];
        find_zeroes(region, 0, &mut zero).expect("told");
        assert_eq!(zero, [false, false, true, false, true]);
        find_zeroes(region, 4 * P, &mut zero[..1]).expect("told");
        assert!(zero[0]);
        assert!(find_zeroes(region, MIB - P, &mut zero[..2]).is_err());
        assert!(find_zeroes(region, u64::MAX, &mut zero).is_err());
    }
}
