//! VFIO_DEVICE_FEATURE, as far as it is about moving a device.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};

use super::{DeviceFd, check, code, on, v};
use crate::kernel::{DataFile, MoveKinds, MoveState, Moves};

const DEVICE_FEATURE: libc::Ioctl = code(17);
const MIG_GET_PRECOPY_INFO: libc::Ioctl = code(21);

const GET: u32 = v::VFIO_DEVICE_FEATURE_GET;
const SET: u32 = v::VFIO_DEVICE_FEATURE_SET;
const PROBE: u32 = v::VFIO_DEVICE_FEATURE_PROBE;

/// Two numbers of 32 bits as they lie in memory.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// The other way round.
fn numbers(pair: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = pair.to_ne_bytes();
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// VFIO_DEVICE_FEATURE: a header of two numbers, their bytes and `flags`, and `data`.
fn feature(fd: BorrowedFd<'_>, flags: u32, data: &mut [u64]) -> io::Result<()> {
    let size = 8 * (1 + data.len()) as u32;
    let mut words = vec![pair(size, flags)];
    words.extend_from_slice(data);
    // SAFETY: the kernel reads and writes no more than the first number says, which is there, and outlives the call. Addresses in `data`
    // are of what the caller has borrowed.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), DEVICE_FEATURE, words.as_mut_ptr()) })?;
    data.copy_from_slice(&words[1..]);
    Ok(())
}

/// What a kernel or driver answers that does not know of it.
fn unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

impl Moves for DeviceFd {
    fn can_move(&self) -> io::Result<Option<MoveKinds>> {
        let mut flags = [0];
        match feature(self.0.as_fd(), GET | v::VFIO_DEVICE_FEATURE_MIGRATION, &mut flags) {
            Err(error) if unknown(&error) => return Ok(None),
            other => other?,
        }
        let has = |bit: u32| flags[0] & u64::from(bit) != 0;
        Ok(has(v::VFIO_MIGRATION_STOP_COPY).then(|| MoveKinds {
            p2p: has(v::VFIO_MIGRATION_P2P),
            pre_copy: has(v::VFIO_MIGRATION_PRE_COPY),
        }))
    }

    fn enter(&self, state: MoveState) -> io::Result<Option<Box<dyn DataFile>>> {
        let mut wanted = [pair(state as u32, u32::MAX)];
        feature(
            self.0.as_fd(),
            SET | v::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
            &mut wanted,
        )?;
        let (_, fd) = numbers(wanted[0]);
        let Some(fd) = i32::try_from(fd).ok() else {
            return Ok(None);
        };
        // SAFETY: the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        // Drivers without data would have us wait for as long as they like.
        rustix::io::ioctl_fionbio(&file, true)?;
        Ok(Some(Box::new(DataFd(file))))
    }

    fn state(&self) -> io::Result<MoveState> {
        let mut found = [pair(0, u32::MAX)];
        feature(
            self.0.as_fd(),
            GET | v::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
            &mut found,
        )?;
        Ok(MoveState::of(numbers(found[0]).0))
    }

    fn data_size(&self) -> io::Result<u64> {
        let mut size = [0];
        feature(self.0.as_fd(), GET | v::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, &mut size)?;
        Ok(size[0])
    }

    fn can_log(&self) -> bool {
        let asked = PROBE | SET | v::VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
        feature(self.0.as_fd(), asked, &mut []).is_ok()
    }

    fn start_log(&self, page: u64, ranges: &[(u64, u64)]) -> io::Result<()> {
        let ranges: Vec<u64> = ranges.iter().flat_map(|(iova, len)| [*iova, *len]).collect();
        let mut control = [page, pair(ranges.len() as u32 / 2, 0), ranges.as_ptr() as u64];
        feature(
            self.0.as_fd(),
            SET | v::VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
            &mut control,
        )
    }

    fn stop_log(&self) -> io::Result<()> {
        feature(self.0.as_fd(), SET | v::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, &mut [])
    }

    fn take_log(&self, page: u64, iova: u64, len: u64, bitmap: &mut [u64]) -> io::Result<()> {
        if (bitmap.len() as u64) < len.div_ceil(page).div_ceil(64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut report = [iova, len, page, bitmap.as_mut_ptr() as u64];
        // The kernel sets a bit for each page, for all of which there is room in `bitmap`.
        feature(
            self.0.as_fd(),
            GET | v::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
            &mut report,
        )
    }
}

/// What a device's data are read from and written to.
struct DataFd(File);

impl DataFile for DataFd {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn ahead(&self) -> io::Result<u64> {
        let mut info = v::vfio_precopy_info {
            argsz: size_of::<v::vfio_precopy_info>() as u32,
            flags: 0,
            initial_bytes: 0,
            dirty_bytes: 0,
        };
        on(self.0.as_fd(), MIG_GET_PRECOPY_INFO, &mut info)?;
        Ok(info.initial_bytes.saturating_add(info.dirty_bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn the_codes_and_layouts_are_those_of_the_kernel() {
        assert_eq!((DEVICE_FEATURE, MIG_GET_PRECOPY_INFO), (0x3b75, 0x3b79));
        let sizes = (
            size_of::<v::vfio_device_feature>(),
            size_of::<v::vfio_device_feature_mig_state>(),
            size_of::<v::vfio_device_feature_dma_logging_control>(),
            size_of::<v::vfio_device_feature_dma_logging_report>(),
        );
        assert_eq!(sizes, (8, 8, 24, 32));
        assert_eq!(numbers(pair(3, u32::MAX)), (3, u32::MAX));
        let states = [
            (v::vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR, MoveState::Error),
            (v::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP, MoveState::Stop),
            (v::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING, MoveState::Running),
            (
                v::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
                MoveState::StopCopy,
            ),
            (v::vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING, MoveState::Resuming),
            (
                v::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P,
                MoveState::RunningP2p,
            ),
            (v::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY, MoveState::PreCopy),
            (
                v::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P,
                MoveState::PreCopyP2p,
            ),
        ];
        for (number, state) in states {
            assert_eq!((MoveState::of(number), state as u32), (state, number));
        }
        assert_eq!(MoveState::of(8), MoveState::Error);
    }

    #[test]
    fn a_file_that_is_no_device_can_nothing() {
        let file = DeviceFd(tempfile::tempfile().expect("a file"));
        assert_eq!(file.can_move().expect("an answer"), None);
        assert!(!file.can_log());
        assert!(file.take_log(4096, 0, 1 << 20, &mut [0; 3]).is_err(), "no room");
    }

    #[test]
    fn nobody_waits_for_a_driver_without_data() {
        let (read, write) = io::pipe().expect("a pipe");
        let data = |end: OwnedFd| DataFd(end.into());
        let (mut read, mut write) = (data(read.into()), data(write.into()));
        for end in [&read, &write] {
            rustix::io::ioctl_fionbio(&end.0, true).expect("set");
        }
        let none =
            |result: io::Result<usize>| result.err().map(|error| error.kind()) == Some(io::ErrorKind::WouldBlock);
        assert!(none(read.read(&mut [0; 8])));
        while write.write(&[1; 4096]).is_ok() {}
        assert!(none(write.write(&[1; 4096])));
    }
}
