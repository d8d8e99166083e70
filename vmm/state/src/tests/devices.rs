//! The states of devices in files of their own.

use std::os::unix::fs::MetadataExt;
use std::{fs, io};

use crate::{DeviceFile, DeviceFiles, Payloads, Snapshot, SnapshotError, SnapshotWriter};

use super::about;

/// What a device is.
fn state(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 7) as u8).collect()
}

fn write(writer: &mut SnapshotWriter, state: &[u8]) -> Result<DeviceFile, SnapshotError> {
    let mut left = state;
    writer.device(|buffer| {
        // Never as much as there is room for.
        let len = left.len().min(buffer.len()).min(300_000);
        buffer[..len].copy_from_slice(&left[..len]);
        left = &left[len..];
        Ok(len)
    })
}

fn read(files: &DeviceFiles, file: &DeviceFile) -> Result<Vec<u8>, SnapshotError> {
    let mut all = Vec::new();
    files.read(file, |part| {
        assert!(part.len() <= 1 << 20);
        all.extend_from_slice(part);
        Ok(())
    })?;
    Ok(all)
}

#[test]
fn devices_become_what_was_saved_and_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let dir = directory.path().join("snapshot");
    let mut writer = SnapshotWriter::create(&dir).expect("a writer");
    let (large, none) = (state(3_000_001), state(0));
    let first = write(&mut writer, &large).expect("written");
    let second = write(&mut writer, &none).expect("written");
    writer.finish(b"{}", &about(), Payloads::default()).expect("finished");
    let files = Snapshot::open(&dir, "x86_64")
        .expect("opened")
        .devices()
        .expect("files");
    assert_eq!(read(&files, &first).expect("read"), large);
    assert_eq!(read(&files, &second).expect("read"), none);
    // Nobody takes what a driver refuses.
    let refused = files.read(&first, |_| Err(io::ErrorKind::InvalidInput.into()));
    assert!(matches!(refused, Err(SnapshotError::Host { .. })));
    let path = dir.join("device-0");
    let mut changed = large.clone();
    changed[2_000_000] ^= 1;
    for (what, bytes) in [
        ("changed", &changed[..]),
        ("cut short", &large[1..]),
        ("longer", &[&large[..], b"x"].concat()[..]),
    ] {
        fs::write(&path, bytes).expect("damage");
        assert!(
            matches!(read(&files, &first), Err(SnapshotError::DeviceDamaged(_))),
            "{what}"
        );
    }
    fs::remove_file(&path).expect("removed");
    assert!(read(&files, &first).is_err());
}

#[test]
fn what_somebody_left_is_neither_written_into_nor_kept() {
    let top = tempfile::tempdir().expect("a directory");
    let dir = top.path().join("snapshot");
    fs::create_dir(&dir).expect("a directory");
    let victim = top.path().join("victim");
    fs::write(&victim, "mine").expect("a file");
    std::os::unix::fs::symlink(&victim, dir.join("device-0")).expect("a link");
    for name in ["device-1", "device-2", "device-other"] {
        fs::write(dir.join(name), "left").expect("a file");
    }
    let mut writer = SnapshotWriter::create(&dir).expect("a writer");
    let file = write(&mut writer, &state(10)).expect("written");
    writer.finish(b"{}", &about(), Payloads::default()).expect("finished");
    assert_eq!(fs::read_to_string(&victim).expect("a file"), "mine");
    let own = fs::symlink_metadata(dir.join("device-0")).expect("a file");
    assert!(own.is_file() && own.mode() & 0o077 == 0, "{:o}", own.mode());
    let files = Snapshot::open(&dir, "x86_64").expect("opened").devices();
    assert_eq!(read(&files.expect("files"), &file).expect("read"), state(10));
    let there = |name: &str| dir.join(name).exists();
    assert_eq!(
        ["device-1", "device-2", "device-other"].map(there),
        [false, false, true]
    );
}

#[test]
fn a_snapshot_whose_device_fails_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let dir = directory.path().join("snapshot");
    let mut writer = SnapshotWriter::create(&dir).expect("a writer");
    write(&mut writer, &state(10)).expect("written");
    let mut parts = 0;
    let failed = writer.device(|buffer| {
        parts += 1;
        match parts {
            1 => Ok(buffer.len()),
            _ => Err(io::Error::other("the device is broken")),
        }
    });
    let error = failed.expect_err("fails");
    assert!(
        error.to_string().contains("cannot read the state of a device for"),
        "{error}"
    );
    drop(writer);
    assert!(!dir.exists());
}
