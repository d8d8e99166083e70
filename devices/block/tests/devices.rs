//! Block devices, on loop devices.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::process::Command;

use common::*;
use triarch_block::{Disk, DiskOptions, Op, OpenError};

fn open_error(options: &DiskOptions) -> OpenError {
    Disk::open(options).expect_err("opened")
}

/// A loop device that goes with this object.
struct Loop(String);

impl Loop {
    fn new(file: &Path, arguments: &[&str]) -> Result<Self, String> {
        if !is_root() {
            return Err("needs root for a loop device".into());
        }
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .args(arguments)
            .arg(file)
            .output();
        let output = output.map_err(|e| format!("losetup does not run: {e}"))?;
        if !output.status.success() {
            return Err(format!(
                "no loop device: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ));
        }
        Ok(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_devices_work_with_their_own_block_size() {
    for (backend, direct) in backends().into_iter().flat_map(|b| [(b, false), (b, true)]) {
        let file = image(8 << 20);
        let device = match Loop::new(file.path(), &["--sector-size", "4096"]) {
            Ok(device) => device,
            Err(reason) => {
                eprintln!("skipped: {reason}");
                return;
            }
        };
        let disk = open(Path::new(&device.0), backend, direct);
        assert!(disk.is_device());
        assert_eq!(disk.size(), 8 << 20);
        assert_eq!(disk.geometry().logical_block, 4096);
        assert!(disk.geometry().discard_granularity > 0);
        assert!(matches!(
            open_error(&DiskOptions::new(&device.0)),
            OpenError::Locked { .. }
        ));
        let mut queue = disk.queue(0, 8).unwrap();
        let data = pattern(9, 1 << 20);
        let mut memory = Memory::with(&data, 5);
        let bufs = memory.bufs(100_000);
        run(
            &mut *queue,
            &Op::Write {
                offset: 1 << 20,
                bufs: &bufs,
                durable: true,
            },
        )
        .unwrap();
        assert!(
            run(
                &mut *queue,
                &Op::Read {
                    offset: 512,
                    bufs: &bufs
                }
            )
            .is_err()
        );
        let op = Op::WriteZeroes {
            offset: 1 << 20,
            len: 65536,
            unmap: false,
            durable: false,
        };
        assert_eq!(run(&mut *queue, &op).unwrap(), 65536);
        let op = Op::WriteZeroes {
            offset: (1 << 20) + 65536,
            len: 65536,
            unmap: true,
            durable: true,
        };
        assert_eq!(run(&mut *queue, &op).unwrap(), 65536);
        let op = Op::Discard {
            offset: (1 << 20) + 131_072,
            len: 65536,
            durable: false,
        };
        assert_eq!(run(&mut *queue, &op).unwrap(), 65536);
        run(&mut *queue, &Op::Flush).unwrap();
        let mut back = Memory::new(1 << 20, 0);
        let bufs = back.bufs(4096);
        run(
            &mut *queue,
            &Op::Read {
                offset: 1 << 20,
                bufs: &bufs,
            },
        )
        .unwrap();
        assert!(back.get()[..131_072].iter().all(|b| *b == 0));
        assert!(back.get()[196_608..] == data[196_608..]);
    }
}

#[test]
fn a_readonly_block_device_is_recognised() {
    let file = image(1 << 20);
    let device = match Loop::new(file.path(), &["--read-only"]) {
        Ok(device) => device,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return;
        }
    };
    let options = DiskOptions::new(&device.0);
    assert!(matches!(open_error(&options), OpenError::ReadOnly { .. }));
    Disk::open(&DiskOptions {
        readonly: true,
        ..options
    })
    .unwrap();
}
