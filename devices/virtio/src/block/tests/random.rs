//! Random requests in random shapes, and random garbage.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use proptest::prelude::*;
use triarch_block::Backend;
use vm_memory::{Bytes, GuestAddress};

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Read { sector: u64, sectors: usize },
    Write { sector: u64, sectors: usize, seed: u64 },
    Zeroes { sector: u64, sectors: u32, unmap: bool },
    Flush,
    Id,
}

fn step() -> impl Strategy<Value = Step> {
    let sector = || prop_oneof![8 => 0..SECTORS + 4, 1 => any::<u64>()];
    prop_oneof![
        4 => (sector(), 0usize..40).prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        4 => (sector(), 0usize..40, any::<u64>())
            .prop_map(|(sector, sectors, seed)| Step::Write { sector, sectors, seed }),
        1 => (sector(), 0u32..40, any::<bool>())
            .prop_map(|(sector, sectors, unmap)| Step::Zeroes { sector, sectors, unmap }),
        1 => Just(Step::Flush),
        1 => Just(Step::Id),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_of_any_request_acts_like_a_vector(
        steps in prop::collection::vec(
            (step(), prop::collection::vec(1usize..21_000, 0..12), any::<bool>(), any::<bool>()), 1..25),
        event_idx in any::<bool>(),
        sync in any::<bool>(),
    ) {
        let backend = if sync { Backend::Sync } else { Backend::Auto };
        let mut rig = Rig::with(false, backend, event_idx, u64::MAX);
        let mut model = vec![0u8; (SECTORS * 512) as usize];
        for (step, mut cuts, near, indirect) in steps {
            if near {
                // Through the header, between data and status, and of single bytes.
                cuts.extend([1, 7, 15, 16, 17, 20, 512]);
            }
            let shape = Shape { cuts, indirect };
            let span = |sector: u64, sectors: u64| {
                let end = sector.checked_add(sectors)?;
                (end <= SECTORS).then(|| (sector * 512) as usize..(end * 512) as usize)
            };
            match step {
                Step::Read { sector, sectors } => {
                    let answer = rig.request(IN, sector, &[], sectors * 512, &shape);
                    match span(sector, sectors as u64) {
                        Some(range) => {
                            prop_assert_eq!((answer.status, answer.used), (OK, (sectors * 512) as u32 + 1));
                            prop_assert!(answer.data == model[range]);
                        }
                        None => prop_assert_eq!(answer.status, IOERR),
                    }
                }
                Step::Write { sector, sectors, seed } => {
                    let data = pattern(seed, sectors * 512);
                    let answer = rig.request(OUT, sector, &data, 0, &shape);
                    let range = span(sector, sectors as u64);
                    prop_assert_eq!((answer.status, answer.used), (if range.is_some() { OK } else { IOERR }, 1));
                    if let Some(range) = range {
                        model[range].copy_from_slice(&data);
                    }
                }
                Step::Zeroes { sector, sectors, unmap } => {
                    let body = super::range(sector, sectors, unmap.into());
                    let answer = rig.request(WRITE_ZEROES, 0, &body, 0, &shape);
                    let range = span(sector, sectors.into());
                    prop_assert_eq!(answer.status, if range.is_some() { OK } else { IOERR });
                    if let Some(range) = range {
                        model[range].fill(0);
                    }
                }
                Step::Flush => prop_assert_eq!(rig.request(FLUSH, 0, &[], 0, &shape).status, OK),
                Step::Id => prop_assert_eq!(&rig.request(GET_ID, 0, &[], 20, &shape).data[..8], b"serial-1"),
            }
        }
        let queue = rig.device.stop_queue(0).expect("the queue");
        prop_assert!(!queue.faulted());
        let mut content = vec![0; model.len()];
        rig.file.as_file().read_exact_at(&mut content, 0).unwrap();
        prop_assert!(content == model);
    }

    #[test]
    fn no_chain_stops_the_device_from_ending(
        descriptors in prop::collection::vec(
            (prop_oneof![DATA..DATA + 64, any::<u64>()], prop_oneof![1u32..600, any::<u32>()], 0u16..8, 0u16..10), 8),
        bytes in prop::collection::vec(0u8..16, 64),
        heads in prop::collection::vec(0u16..9, 1..20),
    ) {
        let mut rig = Rig::new();
        rig.driver.ram().write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let descriptors: Vec<Desc> =
            descriptors.into_iter().map(|(addr, len, flags, next)| Desc { addr, len, flags, next }).collect();
        rig.driver.write_descriptors(&descriptors);
        for head in &heads {
            rig.driver.offer(*head);
        }
        rig.driver.kick();
        let mut answered = 0;
        while answered < heads.len() && rig.driver.interrupt.needs_reset_count() == 0 {
            match rig.driver.used() {
                Some(_) => answered += 1,
                None => std::thread::sleep(Duration::from_micros(100)),
            }
        }
        let queue = rig.device.stop_queue(0).expect("the queue");
        prop_assert_eq!(queue.faulted(), rig.driver.interrupt.needs_reset_count() > 0);
        prop_assert_eq!(rig.device.handle().counters().in_flight, 0);
        // The device works for the next driver.
        rig.device.reset();
        rig.driver = FakeDriver::new(256, false);
        rig.device.activate(rig.driver.context(u64::MAX)).unwrap();
        rig.device.start_queue(rig.driver.queue()).unwrap();
        prop_assert_eq!(rig.simple(IN, 0, &[], 512).status, OK);
    }
}
