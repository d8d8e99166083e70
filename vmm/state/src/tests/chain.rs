//! Snapshots that build on others.

use proptest::prelude::*;

use super::*;
use crate::{Base, CHUNK, MAX_BASES, Pages};

/// Saves `memory` into `dir`: what differs from `before`, if that is told, which `base` has.
fn save(dir: &Path, memory: &Memory, before: Option<(&Memory, &Base)>) -> Base {
    let mut writer = SnapshotWriter::create(dir).expect("create");
    let part = |(gpa, bytes): &(u64, Vec<u8>)| {
        let range = *gpa..*gpa + bytes.len() as u64;
        let old =
            before.and_then(|(before, _)| before.0.iter().find(|old| old.0 == *gpa && old.1.len() == bytes.len()));
        let differs = |old: &Vec<u8>, at: &usize| bytes[*at..*at + PAGE as usize] != old[*at..*at + PAGE as usize];
        let pages = old.map(|(_, old)| {
            let pages = (0..bytes.len()).step_by(PAGE as usize).filter(|at| differs(old, at));
            Pages::of(bytes.len() as u64, pages.map(|at| at as u64..at as u64 + 1))
        });
        Part { range, pages }
    };
    let parts = memory.0.iter().map(part).collect();
    writer.memory(parts, memory, |_, _| {}).expect("memory");
    let about = About {
        id: Some(format!("id of {}", dir.display())),
        base: before.map(|(_, base)| base.clone()),
        ..about()
    };
    let base = writer.finish(b"{}", &about, payloads()).expect("finish");
    base.expect("others may build on it")
}

fn same(dir: &Path, memory: &Memory) {
    let mut found = memory.empty();
    read(&open(dir).expect("open"), &mut found).expect("memory");
    assert!(found.0 == memory.0, "{}", dir.display());
}

/// Three snapshots of a guest whose memory changed, and what it was at each.
fn three(top: &Path) -> [(PathBuf, Memory, Base); 3] {
    let [a, b, c] = ["a", "b", "c"].map(|name| top.join(name));
    let first = Memory::sample();
    let base = save(&a, &first, None);
    let mut second = first.clone();
    second.at(4 * MIB - 1, 1)[0] = 99;
    // Zeroes where there was something, and a chunk that had nothing.
    second.at(4 * MIB + 3 * PAGE, 1)[0] = 0;
    second.at((1 << 32) + 5 * MIB, 2).fill(3);
    let above = save(&b, &second, Some((&first, &base)));
    let mut third = second.clone();
    third.at(0, 1)[0] = 55;
    third.at((1 << 32) + 5 * MIB, 2).fill(4);
    // A region that came, and one of other pages in the place of another.
    third.0.push((1 << 33, vec![8; MIB as usize]));
    let last = save(&c, &third, Some((&second, &above)));
    [(a, first, base), (b, second, above), (c, third, last)]
}

#[test]
fn each_of_a_chain_is_what_the_guest_was() {
    let top = tempfile::tempdir().expect("a directory");
    let all = three(top.path());
    for (dir, memory, base) in &all {
        same(dir, memory);
        let snapshot = open(dir).expect("open");
        assert!(snapshot.itself().expect("others may build on it").is(base));
        assert_eq!(snapshot.memory_file().is_some(), base.bases == 0);
    }
    let held = |dir: &Path| fs::metadata(dir.join(MEMORY)).expect("memory").len();
    assert_eq!([1, 2].map(|at| held(&all[at].0)), [3 * PAGE, 2 * PAGE + MIB]);
    let text = fs::read(all[1].0.join(STATE)).expect("state");
    let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(value["version"], crate::VERSION);
}

#[test]
fn a_chain_that_moves_as_a_whole_is_found() {
    let top = tempfile::tempdir().expect("a directory");
    let before = top.path().join("before");
    fs::create_dir(&before).expect("a directory");
    let [.., (_, memory, _)] = three(&before);
    let after = top.path().join("after");
    fs::rename(&before, &after).expect("rename");
    same(&after.join("c"), &memory);
}

#[test]
fn a_base_that_is_gone_or_another_one_is_named() {
    let top = tempfile::tempdir().expect("a directory");
    let [(a, first, _), (b, second, _), (c, ..)] = three(top.path());
    let chain = |error: &SnapshotError| {
        let (mut text, mut next) = (error.to_string(), std::error::Error::source(error));
        while let Some(error) = next {
            text = format!("{text}: {error}");
            next = error.source();
        }
        text
    };
    let refused = || chain(&open(&c).expect_err("refused"));
    let kept = top.path().join("kept");
    fs::rename(&b, &kept).expect("rename");
    let text = refused();
    assert!(
        text.contains(b.to_str().expect("a name")) && text.contains("no snapshot"),
        "{text}"
    );
    // The same memory, saved again, is another snapshot.
    save(&b, &second, None);
    let text = refused();
    assert!(text.contains("another snapshot by now"), "{text}");
    fs::remove_dir_all(&b).expect("remove");
    fs::rename(&kept, &b).expect("rename");
    // One that calls itself the same and tells something else.
    fs::rename(&a, &kept).expect("rename");
    save(&a, &first.empty(), None);
    let text = refused();
    assert!(
        text.contains(b.to_str().expect("a name")) && text.contains("another snapshot by now"),
        "{text}"
    );
    fs::remove_dir_all(&a).expect("remove");
    fs::rename(&kept, &a).expect("rename");
    open(&c).expect("all is as it was");
    // Its memory is looked at when it is read.
    let file = a.join(MEMORY);
    let mut bytes = fs::read(&file).expect("memory");
    bytes[9 * MIB as usize - 1] ^= 1;
    fs::write(&file, bytes).expect("memory");
    let error = read(&open(&c).expect("open"), &mut three_at(&c)).expect_err("damaged");
    assert!(chain(&error).contains(a.to_str().expect("a name")), "{error}");
}

/// Room for the memory of the snapshot in `dir`.
fn three_at(dir: &Path) -> Memory {
    let snapshot = open(dir).expect("open");
    let room = |range: &crate::MemoryRange| (range.gpa, vec![0; range.size as usize]);
    Memory(snapshot.ranges().iter().map(room).collect())
}

#[test]
fn a_base_without_the_region_is_refused() {
    let top = tempfile::tempdir().expect("a directory");
    let [a, b] = ["a", "b"].map(|name| top.path().join(name));
    let mut memory = Memory::sample();
    let base = save(&a, &Memory(vec![memory.0[0].clone()]), None);
    let mut before = memory.clone();
    before.at(1 << 32, 1)[0] = 1;
    save(&b, &memory, Some((&before, &base)));
    let error = open(&b).expect_err("refused");
    let source = std::error::Error::source(&error).expect("a cause").to_string();
    assert!(
        source.contains("no region of 0x600000 bytes at 0x100000000"),
        "{source}"
    );
    memory.0.clear();
}

#[test]
fn chains_are_bounded() {
    let top = tempfile::tempdir().expect("a directory");
    let memory = Memory(vec![(0, vec![0; PAGE as usize])]);
    let dir = |at: u32| top.path().join(at.to_string());
    let mut base = save(&dir(0), &memory, None);
    for at in 1..=MAX_BASES {
        assert!(base.has_room());
        base = save(&dir(at), &memory, Some((&memory, &base)));
    }
    assert!(!base.has_room());
    open(&dir(MAX_BASES)).expect("as many as may be");
    save(&dir(MAX_BASES + 1), &memory, Some((&memory, &base)));
    assert!(matches!(open(&dir(MAX_BASES + 1)), Err(SnapshotError::Chain(_))));
}

#[test]
fn pages_that_contradict_the_region_are_refused() {
    let range = |pages: &str| format!(r#"{{"gpa":4096,"size":8192,"offset":0,"checksums":[null],"pages":{pages}}}"#);
    let base = r#""base":{"directory":"/a","id":"b","checksum":1,"bases":0},"#;
    let parse = |base: &str, pages: &str| {
        let ranges = range(pages);
        let body = format!(
            r#""version":2,"vmm":"9.9","arch":"x86_64",{base}"memory":{{"chunk":4194304,"ranges":[{ranges}]}},"payloads":[]}}"#
        );
        crate::document::parse(&signed(&body), "x86_64", MIB).map(drop)
    };
    let text = |digits: &str| format!(r#"["{digits}{}"]"#, "0".repeat(256 - digits.len()));
    parse(base, &text("0000000000000003")).expect("good");
    parse(base, "[\"\"]").expect("good");
    assert!(parse("", &text("0000000000000003")).is_err(), "on nothing");
    for bad in [
        text("0000000000000007"),
        "[]".into(),
        "[\"\",\"\"]".into(),
        "[\"0\"]".into(),
    ] {
        assert!(parse(base, &bad).is_err(), "{bad}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_changes_come_back(changes in prop::collection::vec(prop::collection::vec((0u64..5 * MIB / PAGE, 0u8..3), 0..12), 1..5)) {
        let top = tempfile::tempdir().expect("a directory");
        let mut memory = Memory(vec![(CHUNK as u64, vec![0; 5 * MIB as usize])]);
        let mut last: Option<(Memory, Base)> = None;
        for (at, pages) in changes.iter().enumerate() {
            for (page, value) in pages {
                memory.at(CHUNK as u64 + page * PAGE, PAGE as usize).fill(*value);
            }
            let dir = top.path().join(at.to_string());
            let base = save(&dir, &memory, last.as_ref().map(|(memory, base)| (memory, base)));
            same(&dir, &memory);
            last = Some((memory.clone(), base));
        }
    }
}
