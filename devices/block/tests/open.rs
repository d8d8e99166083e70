//! Opening: locks, refusals, what is found out, and the choice of the backend.
//!
//! Nothing here starts a program: its copy of the descriptors would hold locks for a moment longer.
#![allow(missing_docs, unsafe_code)]

mod common;

use std::collections::BTreeMap;
use std::error::Error;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use common::*;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use triarch_block::{Backend, Disk, DiskOptions, Op, OpenError};

fn open_error(options: &DiskOptions) -> OpenError {
    Disk::open(options).expect_err("opened")
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text = format!("{text}: {e}");
        source = e.source();
    }
    text
}

#[test]
fn a_second_writer_is_refused_and_readers_share() {
    let file = image(4096);
    let write = DiskOptions::new(file.path());
    let read = DiskOptions {
        readonly: true,
        ..write.clone()
    };
    let writer = Disk::open(&write).unwrap();
    for options in [&write, &read] {
        let error = open_error(options);
        assert!(matches!(error, OpenError::Locked { .. }), "{error:?}");
        let text = chain(&error);
        assert!(text.contains(file.path().to_str().unwrap()), "{text}");
        assert!(text.contains("another process holds a lock"), "{text}");
    }
    drop(writer);
    let readers = [Disk::open(&read).unwrap(), Disk::open(&read).unwrap()];
    assert!(matches!(open_error(&write), OpenError::Locked { .. }));
    drop(readers);
    Disk::open(&write).unwrap();
}

#[test]
fn a_lock_outlives_the_disk_object_while_a_queue_uses_it() {
    let file = image(4096);
    let options = DiskOptions::new(file.path());
    let queue = Disk::open(&options).unwrap().queue(0, 1).unwrap();
    assert!(matches!(open_error(&options), OpenError::Locked { .. }));
    drop(queue);
    Disk::open(&options).unwrap();
}

#[test]
fn what_is_no_disk_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| DiskOptions::new(dir.path().join(name));
    assert!(matches!(open_error(&at("none")), OpenError::Missing { .. }));
    assert!(matches!(
        open_error(&DiskOptions::new(dir.path())),
        OpenError::NotADisk { kind: "directory", .. }
    ));
    assert!(matches!(
        open_error(&DiskOptions::new("/dev/null")),
        OpenError::NotADisk {
            kind: "character device",
            ..
        }
    ));
    // A pipe without a writer must not block.
    let pipe = std::ffi::CString::new(dir.path().join("pipe").to_str().unwrap()).unwrap();
    // SAFETY: a C string.
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
    assert!(matches!(
        open_error(&at("pipe")),
        OpenError::NotADisk { kind: "pipe", .. }
    ));
    std::fs::write(dir.path().join("empty"), "").unwrap();
    assert!(matches!(open_error(&at("empty")), OpenError::Empty { .. }));
    std::fs::write(dir.path().join("odd"), [0; 1000]).unwrap();
    let error = open_error(&at("odd"));
    assert!(matches!(
        error,
        OpenError::Unaligned {
            size: 1000,
            block: 512,
            ..
        }
    ));
    assert!(
        chain(&error).contains("1000 bytes, which is not a multiple of its block size of 512"),
        "{error}"
    );
    // A refused disk is not left locked.
    std::fs::File::options()
        .write(true)
        .open(dir.path().join("odd"))
        .unwrap()
        .set_len(1024)
        .unwrap();
    Disk::open(&at("odd")).unwrap();
}

#[test]
fn serial_numbers_are_checked_and_have_a_stable_default() {
    let file = image(4096);
    let with = |serial: &str| DiskOptions {
        serial: Some(serial.into()),
        ..DiskOptions::new(file.path())
    };
    for bad in ["", "123456789012345678901", "tab\t", "Grüße"] {
        assert!(matches!(open_error(&with(bad)), OpenError::Serial { .. }), "{bad:?}");
    }
    assert_eq!(
        Disk::open(&with("12345678901234567890")).unwrap().serial(),
        "12345678901234567890"
    );
    let default = || Disk::open(&DiskOptions::new(file.path())).unwrap().serial().to_owned();
    assert_eq!(default(), default());
    assert_eq!(default().len(), 20);
    let other = image(4096);
    assert_ne!(Disk::open(&DiskOptions::new(other.path())).unwrap().serial(), default());
}

#[test]
fn geometry_of_files() {
    let file = image(1 << 20);
    let disk = open(file.path(), Backend::Auto, false);
    let geometry = disk.geometry();
    assert_eq!(geometry.logical_block, 512);
    assert_eq!(
        u64::from(geometry.physical_block),
        file.as_file().metadata().unwrap().blksize().min(4096)
    );
    assert_eq!(geometry.minimum_io, geometry.physical_block);
    assert!(geometry.discard_granularity >= 512);
    assert!(!disk.is_device() && !disk.readonly());
}

/// Runs `f` on a thread of its own, whose changes to credentials, mounts and filters end with it.
fn on_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(f).join().unwrap())
}

#[test]
fn missing_permission_names_the_way_out() {
    if !is_root() {
        eprintln!("skipped: needs root to give up permissions");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 512]).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    on_thread(|| {
        // The raw call changes this thread alone, glibc's function would change all.
        // SAFETY: no memory is involved.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
        assert_eq!(changed, 0);
        let error = open_error(&DiskOptions::new(&path));
        assert!(matches!(error, OpenError::Permission { .. }), "{error:?}");
        assert!(chain(&error).contains("readonly=on"), "{error}");
        Disk::open(&DiskOptions {
            readonly: true,
            ..DiskOptions::new(&path)
        })
        .unwrap();
    });
}

#[test]
fn a_readonly_file_system_is_recognised() {
    if !is_root() {
        eprintln!("skipped: needs root to mount");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    on_thread(|| {
        let target = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
        let mount = |from: &std::ffi::CStr, kind: &std::ffi::CStr, flags| {
            // SAFETY: C strings, no data.
            let result = unsafe { libc::mount(from.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        };
        // SAFETY: no memory is involved.
        let unshared = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) };
        assert_eq!(unshared, 0);
        // SAFETY: C strings, no data.
        let private = unsafe {
            libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            )
        };
        assert_eq!(private, 0);
        mount(c"none", c"tmpfs", 0);
        let path = dir.path().join("disk");
        std::fs::write(&path, [3; 512]).unwrap();
        mount(c"none", c"tmpfs", libc::MS_REMOUNT | libc::MS_RDONLY);
        let error = open_error(&DiskOptions::new(&path));
        assert!(matches!(error, OpenError::ReadOnly { .. }), "{error:?}");
        assert!(error.to_string().contains("readonly=on"));
        let disk = Disk::open(&DiskOptions {
            readonly: true,
            ..DiskOptions::new(&path)
        })
        .unwrap();
        let mut queue = disk.queue(0, 1).unwrap();
        let mut memory = Memory::new(512, 0);
        let bufs = memory.bufs(512);
        run(&mut *queue, &Op::Read { offset: 0, bufs: &bufs }).unwrap();
        assert_eq!(memory.get(), [3; 512]);
    });
}

#[test]
fn without_io_uring_the_plain_backend_takes_over() {
    let file = image(4096);
    on_thread(|| {
        let rules = BTreeMap::from([(libc::SYS_io_uring_setup, vec![])]);
        let filter = SeccompFilter::new(
            rules,
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EPERM as u32),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        let program: BpfProgram = filter.unwrap().try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
        let disk = open(file.path(), Backend::Auto, false);
        let mut queue = disk.queue(0, 4).unwrap();
        assert_eq!(queue.backend(), "sync");
        run(&mut *queue, &Op::Flush).unwrap();
        assert_eq!(disk.queue(0, 4).unwrap().backend(), "sync");
        drop((queue, disk));
        let error = open_error(&options(file.path(), Backend::IoUring, false));
        assert!(matches!(error, OpenError::Backend { .. }), "{error:?}");
        assert!(chain(&error).contains("Operation not permitted"), "{}", chain(&error));
    });
    if backends().contains(&Backend::IoUring) {
        assert_eq!(
            open(file.path(), Backend::Auto, false).queue(0, 4).unwrap().backend(),
            "io_uring"
        );
    }
}

#[test]
fn direct_io_is_refused_where_there_is_none() {
    // procfs files are regular and have no direct I/O.
    let options = DiskOptions {
        direct: true,
        readonly: true,
        ..DiskOptions::new("/proc/version")
    };
    let error = open_error(&options);
    assert!(matches!(error, OpenError::NoDirect { .. }), "{error:?}");
    assert!(error.to_string().contains("direct=off"));
}

#[test]
fn a_lock_is_handed_over_and_taken_back() {
    let file = image(4096);
    let options = DiskOptions::new(file.path());
    let source = Disk::open(&options).unwrap();
    let destination = Disk::open_unlocked(&options).unwrap();
    let error = destination.take_lock().expect_err("the source has it");
    assert!(matches!(error, OpenError::Locked { .. }), "{error:?}");
    source.sync().unwrap();
    source.release_lock().unwrap();
    destination.take_lock().unwrap();
    destination.take_lock().unwrap();
    let error = source.take_lock().expect_err("the destination has it");
    assert!(matches!(error, OpenError::Locked { .. }), "{error:?}");
    drop(destination);
    source.take_lock().unwrap();
    assert!(matches!(open_error(&options), OpenError::Locked { .. }));
}
