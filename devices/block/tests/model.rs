//! Random operations against a plain vector of bytes.
#![allow(missing_docs)]

mod common;

use common::*;
use proptest::prelude::*;
use triarch_block::{Backend, Op};

const BLOCKS: u64 = 2048;
const BLOCK: u64 = 512;

#[derive(Debug, Clone)]
enum Step {
    Read {
        piece: usize,
        skew: usize,
    },
    Write {
        piece: usize,
        skew: usize,
        seed: u64,
        durable: bool,
    },
    Zeroes {
        unmap: bool,
    },
    Discard,
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<(u64, u64, Step)>> {
    let piece = prop_oneof![Just(512usize), Just(4096), 1usize..6000];
    let skew = prop_oneof![Just(0usize), Just(512), 0usize..4096];
    let step = prop_oneof![
        4 => (piece.clone(), skew.clone()).prop_map(|(piece, skew)| Step::Read { piece, skew }),
        4 => (piece, skew, any::<u64>(), any::<bool>())
            .prop_map(|(piece, skew, seed, durable)| Step::Write { piece, skew, seed, durable }),
        1 => any::<bool>().prop_map(|unmap| Step::Zeroes { unmap }),
        1 => Just(Step::Discard),
        1 => Just(Step::Flush),
    ];
    // Ranges often touch or leave the end of the disk.
    let range = prop_oneof![(0..BLOCKS + 8, 0u64..64), (BLOCKS - 400..BLOCKS + 8, 0u64..600)];
    proptest::collection::vec(
        (range, step).prop_map(|((at, n), step)| (at * BLOCK, n * BLOCK, step)),
        1..40,
    )
}

fn check(backend: Backend, direct: bool, steps: &[(u64, u64, Step)]) -> Result<(), TestCaseError> {
    let file = image(BLOCKS * BLOCK);
    let disk = open(file.path(), backend, direct);
    let mut queue = disk.queue(0, 4).unwrap();
    let mut model = vec![0u8; (BLOCKS * BLOCK) as usize];
    for (offset, len, step) in steps {
        let (offset, len) = (*offset, *len);
        let range = offset as usize..(offset + len) as usize;
        let fits = range.end <= model.len();
        match step {
            Step::Read { piece, skew } => {
                let mut memory = Memory::new(len as usize, *skew);
                let bufs = memory.bufs(*piece);
                let result = run(&mut *queue, &Op::Read { offset, bufs: &bufs });
                prop_assert_eq!(result.ok(), fits.then_some(len));
                if fits {
                    prop_assert!(memory.get() == &model[range]);
                } else {
                    prop_assert!(memory.get().iter().all(|b| *b == 0xa5), "a refused read wrote memory");
                }
            }
            Step::Write {
                piece,
                skew,
                seed,
                durable,
            } => {
                let data = pattern(*seed, len as usize);
                let mut memory = Memory::with(&data, *skew);
                let bufs = memory.bufs(*piece);
                let result = run(
                    &mut *queue,
                    &Op::Write {
                        offset,
                        bufs: &bufs,
                        durable: *durable,
                    },
                );
                prop_assert_eq!(result.ok(), fits.then_some(len));
                if fits {
                    model[range].copy_from_slice(&data);
                }
            }
            Step::Zeroes { unmap } => {
                let op = Op::WriteZeroes {
                    offset,
                    len,
                    unmap: *unmap,
                    durable: false,
                };
                prop_assert_eq!(run(&mut *queue, &op).ok(), fits.then_some(len));
                if fits {
                    model[range].fill(0);
                }
            }
            Step::Discard => {
                let op = Op::Discard {
                    offset,
                    len,
                    durable: false,
                };
                prop_assert_eq!(run(&mut *queue, &op).ok(), fits.then_some(len));
                if fits {
                    // The engine punches holes, which read as zeroes, on the file systems tests run on.
                    model[range].fill(0);
                }
            }
            Step::Flush => prop_assert_eq!(run(&mut *queue, &Op::Flush).ok(), Some(0)),
        }
    }
    drop(queue);
    prop_assert!(std::fs::read(file.path()).unwrap() == model);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn disk_behaves_like_a_vector(steps in steps(), direct in any::<bool>()) {
        for backend in backends() {
            check(backend, direct, &steps)?;
        }
    }
}
