//! Operations of the engine, each on both backends.
#![allow(missing_docs)]

mod common;

use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use common::*;
use triarch_block::{Disk, DiskCounters, DiskOptions, Full, GrowError, Op};

const MIB: usize = 1 << 20;

fn errno(result: std::io::Result<u64>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn data_written_is_in_the_file_and_is_read_back() {
    for backend in backends() {
        let file = image(4 * MIB as u64);
        let disk = open(file.path(), backend, false);
        let mut queue = disk.queue(0, 16).unwrap();
        let data = pattern(1, 64 << 10);
        let mut from = Memory::with(&data, 3);
        let bufs = from.bufs(5000);
        assert_eq!(
            run(
                &mut *queue,
                &Op::Write {
                    offset: 512,
                    bufs: &bufs,
                    durable: false
                }
            )
            .unwrap(),
            65536
        );
        assert_eq!(run(&mut *queue, &Op::Flush).unwrap(), 0);
        let mut found = vec![0; data.len()];
        file.as_file().read_exact_at(&mut found, 512).unwrap();
        assert!(found == data);
        let mut to = Memory::new(data.len(), 1);
        let bufs = to.bufs(777);
        assert_eq!(
            run(
                &mut *queue,
                &Op::Read {
                    offset: 512,
                    bufs: &bufs
                }
            )
            .unwrap(),
            65536
        );
        assert!(to.get() == data);
        assert_eq!(disk.size(), 4 * MIB as u64);
    }
}

#[test]
fn more_vectors_than_one_call_takes() {
    for (backend, direct) in backends().into_iter().flat_map(|b| [(b, false), (b, true)]) {
        let file = image(4 * MIB as u64);
        let disk = open(file.path(), backend, direct);
        let mut queue = disk.queue(0, 4).unwrap();
        let data = pattern(2, 3000 * 512);
        let mut from = Memory::with(&data, 0);
        let bufs = from.bufs(512);
        assert_eq!(bufs.len(), 3000);
        run(
            &mut *queue,
            &Op::Write {
                offset: 4096,
                bufs: &bufs,
                durable: true,
            },
        )
        .unwrap();
        let mut to = Memory::new(data.len(), 0);
        let bufs = to.bufs(512);
        assert_eq!(
            run(
                &mut *queue,
                &Op::Read {
                    offset: 4096,
                    bufs: &bufs
                }
            )
            .unwrap(),
            data.len() as u64
        );
        assert!(to.get() == data);
    }
}

#[test]
fn direct_io_takes_buffers_of_any_alignment() {
    for backend in backends() {
        let file = image(4 * MIB as u64);
        let disk = open(file.path(), backend, true);
        let mut queue = disk.queue(0, 64).unwrap();
        // More operations than bounce buffers, each longer than one.
        let parts: Vec<Vec<u8>> = (0..20).map(|i| pattern(100 + i, 160 << 10)).collect();
        let mut memory: Vec<Memory> = parts.iter().map(|p| Memory::with(p, 1)).collect();
        for (i, memory) in memory.iter_mut().enumerate() {
            let bufs = memory.bufs(10_001);
            let op = Op::Write {
                offset: (i * (160 << 10)) as u64,
                bufs: &bufs,
                durable: i % 2 == 0,
            };
            queue.submit(&op, i as u64).unwrap();
        }
        queue.kick().unwrap();
        assert!(wait(&mut *queue, 20).into_values().all(|r| r.unwrap() == 160 << 10));
        let mut to: Vec<Memory> = parts.iter().map(|p| Memory::new(p.len(), 7)).collect();
        for (i, memory) in to.iter_mut().enumerate() {
            let bufs = memory.bufs(999);
            queue
                .submit(
                    &Op::Read {
                        offset: (i * (160 << 10)) as u64,
                        bufs: &bufs,
                    },
                    i as u64,
                )
                .unwrap();
        }
        queue.kick().unwrap();
        assert!(wait(&mut *queue, 20).into_values().all(|r| r.is_ok()));
        assert!(to.iter().zip(&parts).all(|(to, part)| to.get() == part));
        drop(queue);
        let mut whole = vec![0; 20 * (160 << 10)];
        file.as_file().read_exact_at(&mut whole, 0).unwrap();
        assert!(whole == parts.concat());
    }
}

#[test]
fn ranges_outside_the_disk_or_off_its_blocks_are_refused() {
    for backend in backends() {
        let file = image(MIB as u64);
        let disk = open(file.path(), backend, false);
        let mut queue = disk.queue(0, 4).unwrap();
        let mut memory = Memory::new(1024, 0);
        let bufs = memory.bufs(1024);
        let end = MIB as u64;
        assert!(
            run(
                &mut *queue,
                &Op::Read {
                    offset: end - 1024,
                    bufs: &bufs
                }
            )
            .is_ok()
        );
        for offset in [end - 512, end, end + 512, 1, u64::MAX - 511, u64::MAX, i64::MAX as u64] {
            assert_eq!(errno(run(&mut *queue, &Op::Read { offset, bufs: &bufs })), libc::EINVAL);
            assert_eq!(
                errno(run(
                    &mut *queue,
                    &Op::Write {
                        offset,
                        bufs: &bufs,
                        durable: false
                    }
                )),
                libc::EINVAL
            );
            let op = Op::Discard {
                offset,
                len: 1024,
                durable: false,
            };
            assert_eq!(errno(run(&mut *queue, &op)), libc::EINVAL);
        }
        for len in [1, 513, end + 512, u64::MAX] {
            let op = Op::WriteZeroes {
                offset: 512,
                len,
                unmap: true,
                durable: false,
            };
            assert_eq!(errno(run(&mut *queue, &op)), libc::EINVAL);
        }
        let bufs = memory.bufs(100);
        assert_eq!(
            errno(run(
                &mut *queue,
                &Op::Read {
                    offset: 0,
                    bufs: &bufs[..1]
                }
            )),
            libc::EINVAL
        );
        assert_eq!(run(&mut *queue, &Op::Read { offset: 0, bufs: &[] }).unwrap(), 0);
        assert_eq!(file.as_file().metadata().unwrap().len(), end);
    }
}

#[test]
fn a_file_that_shrank_gives_errors() {
    for backend in backends() {
        let file = image(MIB as u64);
        let disk = open(file.path(), backend, false);
        let mut queue = disk.queue(0, 4).unwrap();
        file.as_file().set_len(600).unwrap();
        let mut memory = Memory::new(1024, 0);
        let bufs = memory.bufs(1024);
        assert_eq!(errno(run(&mut *queue, &Op::Read { offset: 0, bufs: &bufs })), libc::EIO);
        assert_eq!(
            errno(run(
                &mut *queue,
                &Op::Read {
                    offset: 4096,
                    bufs: &bufs
                }
            )),
            libc::EIO
        );
    }
}

#[test]
fn a_readonly_disk_refuses_every_change() {
    for backend in backends() {
        let mut file = image(8192);
        file.write_all(&[7; 8192]).unwrap();
        let disk = Disk::open(&DiskOptions {
            readonly: true,
            ..options(file.path(), backend, false)
        })
        .unwrap();
        let mut queue = disk.queue(0, 4).unwrap();
        let mut memory = Memory::new(512, 0);
        let bufs = memory.bufs(512);
        assert_eq!(
            errno(run(
                &mut *queue,
                &Op::Write {
                    offset: 0,
                    bufs: &bufs,
                    durable: false
                }
            )),
            libc::EROFS
        );
        let op = Op::Discard {
            offset: 0,
            len: 4096,
            durable: false,
        };
        assert_eq!(errno(run(&mut *queue, &op)), libc::EROFS);
        let op = Op::WriteZeroes {
            offset: 0,
            len: 4096,
            unmap: false,
            durable: false,
        };
        assert_eq!(errno(run(&mut *queue, &op)), libc::EROFS);
        assert!(run(&mut *queue, &Op::Flush).is_ok());
        assert!(run(&mut *queue, &Op::Read { offset: 0, bufs: &bufs }).is_ok());
        assert_eq!(memory.get(), [7; 512]);
        assert_eq!(std::fs::read(file.path()).unwrap(), [7; 8192]);
    }
}

#[test]
fn discard_releases_and_zeroes_write() {
    for (backend, direct) in backends().into_iter().flat_map(|b| [(b, false), (b, true)]) {
        let mut file = image(4 * MIB as u64);
        file.write_all(&vec![7; 4 * MIB]).unwrap();
        file.as_file().sync_all().unwrap();
        let used = || file.as_file().metadata().unwrap().blocks() * 512;
        let before = used();
        let disk = open(file.path(), backend, direct);
        let mut queue = disk.queue(0, 4).unwrap();
        let op = Op::Discard {
            offset: 0,
            len: MIB as u64,
            durable: true,
        };
        assert_eq!(run(&mut *queue, &op).unwrap(), MIB as u64);
        assert_eq!(before - used(), MIB as u64);
        let op = Op::WriteZeroes {
            offset: 2 * MIB as u64,
            len: MIB as u64,
            unmap: true,
            durable: false,
        };
        assert_eq!(run(&mut *queue, &op).unwrap(), MIB as u64);
        assert_eq!(before - used(), 2 * MIB as u64);
        let op = Op::WriteZeroes {
            offset: 3 * MIB as u64 + 512,
            len: 65536,
            unmap: false,
            durable: true,
        };
        assert_eq!(run(&mut *queue, &op).unwrap(), 65536);
        assert_eq!(before - used(), 2 * MIB as u64);
        let content = std::fs::read(file.path()).unwrap();
        let zero = |at: usize| {
            at < MIB || (2 * MIB..3 * MIB).contains(&at) || (512..66_048).contains(&(at.wrapping_sub(3 * MIB)))
        };
        assert!(content.iter().enumerate().all(|(at, byte)| (*byte == 0) == zero(at)));
        assert_eq!(content.len(), 4 * MIB);
    }
}

#[test]
fn a_queue_holds_its_depth_and_no_more() {
    for backend in backends() {
        let file = image(MIB as u64);
        let disk = open(file.path(), backend, false);
        let mut queue = disk.queue(0, 3).unwrap();
        assert_eq!(queue.depth(), 3);
        let mut memory = Memory::new(512, 0);
        let bufs = memory.bufs(512);
        let op = Op::Read { offset: 0, bufs: &bufs };
        for round in 0..5 {
            for tag in 0..3 {
                queue.submit(&op, tag).unwrap();
            }
            assert_eq!(queue.submit(&op, 9), Err(Full));
            assert_eq!(queue.in_flight(), 3);
            assert_eq!(disk.counters().read().in_flight, 3);
            queue.kick().unwrap();
            match round % 2 {
                0 => assert_eq!(wait(&mut *queue, 3).len(), 3),
                _ => queue
                    .drain(&mut |tag, r| assert!(tag < 3 && r.unwrap() == 512))
                    .unwrap(),
            }
            assert_eq!(queue.in_flight(), 0);
            assert!(!readable(&*queue, 0), "readable without a completion");
        }
        let counters = disk.counters().read();
        let reads = counters.reads;
        assert_eq!((reads.count, reads.bytes, reads.latency.count()), (15, 15 * 512, 15));
        assert!(reads.latency.min > 0 && reads.latency.sum >= 15 * reads.latency.min);
        let others = DiskCounters {
            reads,
            ..DiskCounters::default()
        };
        assert_eq!(counters, others);
    }
}

#[test]
fn refused_operations_wake_the_waiter_too() {
    for backend in backends() {
        let file = image(4096);
        let disk = open(file.path(), backend, false);
        let mut queue = disk.queue(0, 4).unwrap();
        queue
            .submit(
                &Op::Discard {
                    offset: 1,
                    len: 1,
                    durable: false,
                },
                5,
            )
            .unwrap();
        assert!(!readable(&*queue, 0));
        queue.kick().unwrap();
        assert!(readable(&*queue, 0));
        assert_eq!(queue.completions(&mut |tag, r| assert!(tag == 5 && r.is_err())), 1);
        let expected = DiskCounters {
            errors: 1,
            ..DiskCounters::default()
        };
        assert_eq!(disk.counters().read(), expected);
    }
}

#[test]
fn dropping_a_queue_waits_for_its_operations() {
    for backend in backends() {
        let file = image(16 * MIB as u64);
        let disk = open(file.path(), backend, true);
        let data = pattern(5, MIB);
        let mut memory = Memory::with(&data, 0);
        let bufs = memory.bufs(64 << 10);
        let mut queue = disk.queue(0, 64).unwrap();
        for i in 0..16 {
            queue
                .submit(
                    &Op::Write {
                        offset: i * MIB as u64,
                        bufs: &bufs,
                        durable: false,
                    },
                    i,
                )
                .unwrap();
        }
        // Not even kicked.
        drop(queue);
        assert_eq!(disk.counters().read().in_flight, 0);
        assert_eq!(disk.counters().read().writes.count, 16);
        assert!(std::fs::read(file.path()).unwrap() == data.repeat(16));
    }
}

#[test]
fn queues_of_one_disk_work_side_by_side() {
    for backend in backends() {
        let file = image(8 * MIB as u64);
        let disk = open(file.path(), backend, false);
        let total = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for worker in 0..4usize {
                let (disk, total) = (&disk, &total);
                scope.spawn(move || {
                    let mut queue = disk.queue(worker as u16, 8).unwrap();
                    for round in 0..50u64 {
                        let offset = ((worker * 2 * MIB) + (round as usize * 4096)) as u64;
                        let data = pattern(round * 4 + worker as u64, 4096);
                        let mut memory = Memory::with(&data, 0);
                        let bufs = memory.bufs(4096);
                        run(
                            &mut *queue,
                            &Op::Write {
                                offset,
                                bufs: &bufs,
                                durable: false,
                            },
                        )
                        .unwrap();
                        memory.get_mut().fill(0);
                        let bufs = memory.bufs(512);
                        total.fetch_add(
                            run(&mut *queue, &Op::Read { offset, bufs: &bufs }).unwrap(),
                            Ordering::Relaxed,
                        );
                        assert!(memory.get() == data);
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 50 * 4096);
        assert_eq!(disk.counters().read().writes.bytes, 4 * 50 * 4096);
        for (number, queue) in disk.counters().read_queues() {
            assert!(number < 4);
            assert_eq!((queue.reads.count, queue.writes.count, queue.errors), (50, 50, 0));
        }
    }
}

#[test]
fn a_new_size_is_noticed() {
    for backend in backends() {
        let file = image(MIB as u64);
        let disk = open(file.path(), backend, false);
        assert_eq!(disk.refresh_size().unwrap(), None);
        file.as_file().set_len(2 * MIB as u64 + 100).unwrap();
        assert_eq!(disk.size(), MIB as u64);
        assert_eq!(disk.refresh_size().unwrap(), Some(2 * MIB as u64));
        let mut queue = disk.queue(0, 1).unwrap();
        let mut memory = Memory::new(512, 0);
        let bufs = memory.bufs(512);
        assert!(
            run(
                &mut *queue,
                &Op::Read {
                    offset: 2 * MIB as u64 - 512,
                    bufs: &bufs
                }
            )
            .is_ok()
        );
        file.as_file().set_len(MIB as u64).unwrap();
        assert_eq!(disk.refresh_size().unwrap(), Some(MIB as u64));
        assert_eq!(
            errno(run(
                &mut *queue,
                &Op::Read {
                    offset: 2 * MIB as u64 - 512,
                    bufs: &bufs
                }
            )),
            libc::EINVAL
        );
    }
}

#[test]
fn a_disk_grows_and_never_shrinks() {
    for backend in backends() {
        let file = image(MIB as u64);
        let disk = open(file.path(), backend, false);
        disk.grow(MIB as u64).expect("the size it has");
        disk.grow(2 * MIB as u64).expect("larger");
        assert_eq!(disk.refresh_size().unwrap(), Some(2 * MIB as u64));
        assert!(matches!(disk.grow(MIB as u64), Err(GrowError::Shrinks { .. })));
        assert!(matches!(
            disk.grow(3 * MIB as u64 + 1),
            Err(GrowError::Unaligned { .. })
        ));
        assert_eq!(file.as_file().metadata().unwrap().len(), 2 * MIB as u64);
        drop(disk);
        let mut options = options(file.path(), backend, false);
        options.readonly = true;
        let disk = Disk::open(&options).expect("a disk");
        assert!(matches!(disk.grow(3 * MIB as u64), Err(GrowError::ReadOnly)));
    }
}
