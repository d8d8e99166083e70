use proptest::prelude::*;

use super::*;
use crate::blocker::Part;
use crate::memory::Region;

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    let tail = encode::message(message, &mut bytes);
    bytes.extend_from_slice(tail);
    bytes
}

fn decoded(bytes: &[u8]) -> Result<Message<'_>, WireError> {
    let (first, rest) = bytes.split_first_chunk().expect("a head");
    let (kind, len) = decode::head(*first)?;
    assert_eq!(len, rest.len());
    decode::body(kind, rest)
}

fn runs(runs: &[(u64, u64)]) -> Runs {
    Runs(runs.iter().map(|(gpa, len)| (gpa * PAGE, len * PAGE)).collect())
}

fn samples() -> Vec<Message<'static>> {
    static PAGES: [u8; 3 * PAGE as usize] = [7; 3 * PAGE as usize];
    let hello = |role| {
        Message::Hello(Hello {
            token: [3; 16],
            role,
            streams: 4,
            vmm: "1.2.3".into(),
        })
    };
    let layout = Layout::new(vec![
        Region { gpa: 0, len: PAGE },
        Region {
            gpa: 1 << 32,
            len: 1 << 40,
        },
    ]);
    let pages = |packed, bytes| {
        Message::Pages(Pages {
            runs: runs(&[(1, 1), (9, 2)]),
            packed,
            bytes,
        })
    };
    vec![
        hello(Role::Control),
        hello(Role::Data(3)),
        hello(Role::Ask),
        hello(Role::Check),
        hello(Role::PostCopy),
        hello(Role::Demand),
        hello(Role::Push),
        hello(Role::CheckPostCopy),
        Message::Welcome("0.1.0".into()),
        Message::Offer(Offer {
            layout: layout.expect("a layout"),
            config: b"{}",
            cpu: b"[1]",
            post_copy: false,
        }),
        Message::Accepted,
        pages(false, &PAGES),
        pages(true, &PAGES[..100]),
        Message::Zeroes(runs(&[(5, 1000)])),
        Message::RoundEnd(7),
        Message::RoundDone(7),
        Message::Switch,
        Message::State {
            total: 100,
            part: b"state",
        },
        Message::Device {
            device: 3,
            begins: false,
            part: b"state",
        },
        Message::Device {
            device: 3,
            begins: true,
            part: b"",
        },
        Message::Complete,
        Message::Ready,
        Message::Go,
        Message::Running,
        Message::Abort("no"),
        Message::Progress(Progress {
            round: 2,
            remaining: 1 << 50,
        }),
        Message::Alive,
        Message::End,
        Message::Files {
            count: 2,
            places: vec![(0, 0), (1, 1 << 40)],
        },
        Message::Missing(runs(&[(1, 1), (9, 2)])),
        Message::Lacks(runs(&[(1, 1), (9, 2)])),
        Message::Serve,
        Message::Want(runs(&[(1, 1), (9, 1)])),
        Message::Served,
        Message::Blockers(Vec::new()),
        Message::Blockers(vec![Blocker {
            what: Part::Disk,
            name: "root".into(),
            reason: "it is not here".into(),
            remedy: "attach it".into(),
        }]),
    ]
}

#[test]
fn every_message_is_read_as_it_was_written() {
    let all = samples();
    for message in &all {
        let bytes = encoded(message);
        assert_eq!(decoded(&bytes).as_ref(), Ok(message));
    }
    for kind in Kind::ALL {
        assert!(
            all.iter().any(|message| message.kind() == kind),
            "{kind:?} has no sample"
        );
    }
}

#[test]
fn what_is_cut_or_longer_is_refused() {
    for message in samples() {
        let bytes = encoded(&message);
        let body = &bytes[HEAD..];
        let mut longer = body.to_vec();
        longer.push(0);
        assert_ne!(
            decode::body(message.kind(), &longer).as_ref(),
            Ok(&message),
            "{:?}",
            message.kind()
        );
        for len in 0..body.len().min(300) {
            assert_ne!(decode::body(message.kind(), &body[..len]).as_ref(), Ok(&message));
        }
    }
}

#[test]
fn a_length_is_bounded_before_the_body() {
    for kind in Kind::ALL {
        let limit = kind.limit();
        let head = |len: u32| {
            let mut head = [0; HEAD];
            head[..2].copy_from_slice(&(kind as u16).to_le_bytes());
            head[4..].copy_from_slice(&len.to_le_bytes());
            decode::head(head)
        };
        assert_eq!(head(limit as u32), Ok((kind, limit)));
        let len = limit + 1;
        assert_eq!(head(len as u32), Err(WireError::TooLong { len, limit }));
        assert!(head(u32::MAX).is_err());
    }
}

#[test]
fn unknown_kinds_are_told_by_their_number() {
    let head = |number: u16| decode::head([number.to_le_bytes()[0], number.to_le_bytes()[1], 0, 0, 0, 0, 0, 0]);
    assert_eq!(head(0), Err(WireError::Kind(0)));
    assert_eq!(head(22), Err(WireError::Kind(22)));
    assert_eq!(head(63), Err(WireError::Kind(63)));
    assert_eq!(head(69), Err(WireError::Kind(69)));
    assert_eq!(decode::head([13, 0, 1, 0, 0, 0, 0, 0]), Err(WireError::Reserved));
}

#[test]
fn another_version_is_told() {
    let mut bytes = encoded(&Message::Welcome("x".into()));
    bytes[HEAD + 8] = 9;
    assert_eq!(decoded(&bytes), Err(WireError::Version { found: 9 }));
    bytes[HEAD] = b'X';
    assert_eq!(decoded(&bytes), Err(WireError::Magic));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let page = [1; PAGE as usize];
    let bad = [
        Message::Pages(Pages {
            runs: runs(&[(1, 2)]),
            packed: false,
            bytes: &page,
        }),
        // Packed, and not smaller.
        Message::Pages(Pages {
            runs: runs(&[(1, 1)]),
            packed: true,
            bytes: &page,
        }),
        Message::Pages(Pages {
            runs: runs(&[(1, 1 << 30)]),
            packed: true,
            bytes: &page,
        }),
        Message::Zeroes(runs(&[])),
        Message::Zeroes(runs(&[(1, 0)])),
        Message::Zeroes(Runs(vec![(1, PAGE)])),
        Message::Zeroes(Runs(vec![(0, 1)])),
        Message::Zeroes(Runs(vec![(PAGE.wrapping_neg(), PAGE)])),
        Message::Zeroes(runs(&[(0, 1); MAX_RUNS + 1])),
        Message::State { total: 1, part: b"ab" },
        Message::State {
            total: MAX_STATE + 1,
            part: b"ab",
        },
        Message::State { total: 5, part: b"" },
        Message::Device {
            device: 0,
            begins: false,
            part: b"",
        },
        Message::Hello(Hello {
            token: [0; 16],
            role: Role::Data(4),
            streams: 4,
            vmm: String::new(),
        }),
        Message::Hello(Hello {
            token: [0; 16],
            role: Role::Control,
            streams: 17,
            vmm: String::new(),
        }),
    ];
    for message in bad {
        let bytes = encoded(&message);
        let found = decode::body(message.kind(), &bytes[HEAD..]);
        assert!(found.is_err(), "{found:?}");
    }
}

#[test]
fn a_sentence_that_is_too_long_is_cut_between_characters() {
    let long = "ä".repeat(MAX_TEXT);
    let bytes = encoded(&Message::Abort(&long));
    assert_eq!(decoded(&bytes), Ok(Message::Abort(&long[..MAX_TEXT])));
    let long = format!("x{long}");
    let bytes = encoded(&Message::Abort(&long));
    assert_eq!(decoded(&bytes), Ok(Message::Abort(&long[..MAX_TEXT - 1])));
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_an_error(kind in 0..Kind::ALL.len(), bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let kind = Kind::ALL[kind];
        if let Ok(message) = decode::body(kind, &bytes) {
            prop_assert_eq!(&encoded(&message)[HEAD..], &bytes[..]);
        }
    }

    #[test]
    fn damage_is_read_as_something_or_refused(sample in 0..21_usize, at in 0..300_usize, flip in 1..=255_u8) {
        let all = samples();
        let mut bytes = encoded(&all[sample]);
        let at = HEAD + at;
        if let Some(byte) = bytes.get_mut(at) {
            *byte ^= flip;
            if let Ok(message) = decode::body(all[sample].kind(), &bytes[HEAD..]) {
                prop_assert_eq!(encoded(&message), bytes);
            }
        }
    }
}

#[test]
fn what_is_in_the_way_is_bounded() {
    let one = |len: usize| Blocker {
        what: Part::Cpu,
        name: "n".repeat(len),
        reason: "r".repeat(len),
        remedy: "e".repeat(len),
    };
    // What is more than a message takes is left out, and what is left is as long as one may be.
    let bytes = encoded(&Message::Blockers(vec![one(2 * MAX_TEXT); 2 * MAX_BLOCKERS]));
    assert_eq!(
        decoded(&bytes),
        Ok(Message::Blockers(vec![one(MAX_TEXT); MAX_BLOCKERS]))
    );
    let body = |count: u32, what: u32| [count.to_le_bytes(), what.to_le_bytes(), [0; 4], [0; 4], [0; 4]].concat();
    let read = |bytes: &[u8]| decode::body(Kind::Blockers, bytes).map(|_| ());
    assert_eq!(read(&body(1, 7)), Ok(()));
    for bad in [
        body(1, 0),
        body(1, 8),
        body(MAX_BLOCKERS as u32 + 1, 1),
        body(u32::MAX, 1),
    ] {
        assert!(matches!(read(&bad), Err(WireError::Invalid(_))), "{bad:?}");
    }
    assert_eq!(read(&body(2, 1)), Err(WireError::Short));
    assert_eq!(read(&body(0, 1)), Err(WireError::Left));
}

#[test]
fn pages_are_listed_as_in_a_whole_message() {
    let some = runs(&[(1, 1), (9, 2)]);
    let bytes = [7; 3 * PAGE as usize];
    let message = Message::Pages(Pages {
        runs: some.clone(),
        packed: false,
        bytes: &bytes,
    });
    let whole = encoded(&message);
    let mut list = Vec::new();
    encode::pages(&some, &mut list);
    assert_eq!(list, whole[..whole.len() - bytes.len()]);
    let list = &list[HEAD..];
    let first = *list.first_chunk().expect("a list");
    assert_eq!(decode::list_len(first), Ok(list.len()));
    assert_eq!(decode::pages_of(list, bytes.len()), Ok(Some(some)));
    for more in [0, bytes.len() - 1, bytes.len() + 1, usize::MAX] {
        assert!(
            matches!(decode::pages_of(list, more), Err(WireError::Invalid(_))),
            "{more}"
        );
    }
    assert_eq!(
        decode::pages_of(&list[..list.len() - 1], bytes.len()),
        Err(WireError::Short)
    );
    let most = MAX_RUNS as u32;
    let of = |count: u32| [&[0; 4][..], &count.to_le_bytes(), &[0; 16]].concat();
    let len = |count| decode::list_len(*of(count).first_chunk().expect("a list"));
    assert_eq!(len(most), Ok(8 + 16 * MAX_RUNS));
    assert!(len(0).is_err() && len(most + 1).is_err() && len(u32::MAX).is_err());
}

#[test]
fn runs_are_gone_through_in_whatever_steps() {
    for step in [1, 777, PAGE as usize, 3 * PAGE as usize, 3 * PAGE as usize + 1, 1 << 20] {
        let (mut at, mut done) = (0, Vec::new());
        let all = runs(&[(1, 1), (9, 3), (20, 2)]);
        let end: Result<(), ()> = all.each(|left| {
            assert!(left.iter().all(|(_, len)| *len > 0));
            done.push(left[0].0);
            let bytes: u64 = left.iter().map(|(_, len)| len).sum();
            assert_eq!(bytes, 6 * PAGE - at);
            at += bytes.min(step as u64);
            Ok(step)
        });
        assert_eq!((end, at), (Ok(()), 6 * PAGE));
        assert!(done.is_sorted() && done.first() == Some(&PAGE), "{step}: {done:?}");
    }
    assert_eq!(runs(&[(1, 1)]).each(|_| Err("no")), Err("no"));
    assert_eq!(Runs::default().each(|_| Err("no")), Ok(()));
}
