use std::cell::Cell;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;

use crate::{
    About, CONFIG, Kind, MEMORY, PAGE, Part, Payloads, STATE, Snapshot, SnapshotError, SnapshotWriter, Source,
    UNFINISHED_STATE,
};

mod chain;
mod devices;

const MIB: u64 = 1 << 20;
const SERIAL: Kind = Kind::new("serial", 1);
const DISK: Kind = Kind::new("disk", 2);

fn about() -> About {
    About {
        vmm: "0.1.0".into(),
        arch: "x86_64".into(),
        id: None,
        base: None,
    }
}

thread_local! {
    /// Which directory that is made durable is not: counted from one, and from then on.
    static SYNC_FAILS: Cell<u32> = const { Cell::new(0) };
}

/// What becomes of a directory that is made durable.
pub(crate) fn sync_fails() -> io::Result<()> {
    match SYNC_FAILS.get() {
        0 => Ok(()),
        1 => Err(io::Error::other("the disk does not answer")),
        more => {
            SYNC_FAILS.set(more - 1);
            Ok(())
        }
    }
}

/// Memory by its GPAs.
#[derive(Clone)]
struct Memory(Vec<(u64, Vec<u8>)>);

impl Memory {
    /// Two regions with a few bytes here and there.
    fn sample() -> Self {
        let mut low = vec![0; 9 * MIB as usize];
        for at in [0, 4 * MIB - 1, 4 * MIB + 3 * PAGE, 9 * MIB - 1] {
            low[at as usize] = at as u8 | 1;
        }
        let mut high = vec![0; 6 * MIB as usize];
        high[5] = 7;
        Self(vec![(0, low), (1 << 32, high)])
    }

    fn empty(&self) -> Self {
        Self(self.0.iter().map(|(gpa, bytes)| (*gpa, vec![0; bytes.len()])).collect())
    }

    fn ranges(&self) -> Vec<Range<u64>> {
        self.0
            .iter()
            .map(|(gpa, bytes)| *gpa..*gpa + bytes.len() as u64)
            .collect()
    }

    fn at(&mut self, gpa: u64, len: usize) -> &mut [u8] {
        let (start, bytes) = self
            .0
            .iter_mut()
            .rev()
            .find(|(start, _)| *start <= gpa)
            .expect("memory");
        &mut bytes[(gpa - *start) as usize..][..len]
    }

    fn parts(&self) -> Vec<Part> {
        let part = |range| Part { range, pages: None };
        self.ranges().into_iter().map(part).collect()
    }

    fn save(&self, writer: &mut SnapshotWriter) -> Result<u64, SnapshotError> {
        writer.memory(self.parts(), self, |_, _| {})
    }

    fn find(&self, gpa: u64) -> (u64, &[u8]) {
        let mut all = self.0.iter().rev();
        let (start, bytes) = all.find(|(start, _)| *start <= gpa).expect("memory");
        (*start, bytes)
    }
}

impl Source for Memory {
    /// Only those pages that hold anything, in runs of two pages at most.
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let (start, bytes) = self.find(range.start);
        let mut pages = range.clone().step_by(PAGE as usize);
        let any = |page: u64| bytes[(page - start) as usize..][..PAGE as usize] != [0; PAGE as usize];
        Ok(pages
            .find(|page| any(*page))
            .map(|page| page..range.end.min(page + 2 * PAGE)))
    }

    fn read(&self, gpa: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (start, bytes) = self.find(gpa);
        buffer.copy_from_slice(&bytes[(gpa - start) as usize..][..buffer.len()]);
        Ok(())
    }
}

fn payloads() -> Payloads {
    let mut payloads = Payloads::default();
    payloads.put(SERIAL, "", &[1, 2, 3]).expect("a state");
    payloads.put(DISK, "a", &"first").expect("a state");
    payloads.put(DISK, "b", &"second").expect("a state");
    payloads
}

/// A directory with a snapshot.
fn saved() -> (TempDir, PathBuf, Memory) {
    let top = tempfile::tempdir().expect("a directory");
    let dir = top.path().join("snapshot");
    let memory = Memory::sample();
    let mut writer = SnapshotWriter::create(&dir).expect("create");
    memory.save(&mut writer).expect("memory");
    writer.finish(b"{\"cpus\":1}", &about(), payloads()).expect("finish");
    (top, dir, memory)
}

fn open(dir: &Path) -> Result<Snapshot, SnapshotError> {
    Snapshot::open(dir, "x86_64")
}

fn read(snapshot: &Snapshot, into: &mut Memory) -> Result<(), SnapshotError> {
    snapshot.memory(
        |_| true,
        |gpa, bytes| {
            into.at(gpa, bytes.len()).copy_from_slice(bytes);
            Ok(())
        },
        |_, _| {},
    )
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .expect("a directory")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    names.sort();
    names
}

#[test]
fn what_was_saved_is_read() {
    let (_top, dir, memory) = saved();
    assert_eq!(names(&dir), [CONFIG, MEMORY, STATE]);
    let mut snapshot = open(&dir).expect("open");
    assert_eq!(snapshot.config(), b"{\"cpus\":1}");
    let mut found = memory.empty();
    read(&snapshot, &mut found).expect("memory");
    assert!(found.0 == memory.0);
    let payloads = &mut snapshot.payloads;
    assert_eq!(payloads.take::<Vec<u8>>(SERIAL, "").expect("serial"), [1, 2, 3]);
    assert_eq!(payloads.take::<String>(DISK, "b").expect("disk"), "second");
    assert_eq!(payloads.take_if_there::<String>(DISK, "c").expect("no disk"), None);
    let left = std::mem::take(payloads).finish().expect_err("one is left");
    assert!(left.to_string().contains("disk a"), "{left}");
}

#[test]
fn pages_of_zeroes_take_no_room() {
    let (_top, dir, _) = saved();
    let file = fs::metadata(dir.join(MEMORY)).expect("memory");
    assert_eq!(file.len(), 15 * MIB);
    assert!(file.blocks() * 512 <= 16 * PAGE, "{} blocks", file.blocks());
}

#[test]
fn a_snapshot_is_text_that_any_reader_of_json_reads() {
    let (_top, dir, _) = saved();
    let text = fs::read(dir.join(STATE)).expect("state");
    let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(value["version"], 1, "readers of the first version read it");
    assert_eq!(value["payloads"][0]["kind"], "disk");
}

#[test]
fn payloads_are_taken_once_and_as_what_they_are() {
    let mut all = payloads();
    assert!(all.put(SERIAL, "", &0).is_err(), "there is one");
    let error = all.take::<String>(Kind::new("disk", 1), "a").expect_err("version 2");
    assert_eq!(
        error.to_string(),
        "the saved state of disk a has version 2; this version of Triarch reads 1"
    );
    let error = all.take::<u8>(DISK, "b").expect_err("a string");
    assert!(error.to_string().contains("disk b"), "{error}");
    let error = all.take::<String>(DISK, "b").expect_err("taken");
    assert_eq!(error.to_string(), "there is no saved state of disk b");
    all.take::<Vec<u8>>(SERIAL, "").expect("serial");
    all.finish().expect("all were taken");
}

struct Unreadable;

impl Source for Unreadable {
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range))
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Other.into())
    }
}

#[test]
fn what_is_not_finished_is_removed() {
    let top = tempfile::tempdir().expect("a directory");
    let dir = top.path().join("snapshot");
    let mut writer = SnapshotWriter::create(&dir).expect("create");
    Memory::sample().save(&mut writer).expect("memory");
    drop(writer);
    assert!(!dir.exists());

    // What was there before stays.
    fs::create_dir(&dir).expect("a directory");
    fs::write(dir.join("mine"), "mine").expect("a file");
    let mut writer = SnapshotWriter::create(&dir).expect("create");
    let error = writer
        .memory(Memory::sample().parts(), &Unreadable, |_, _| {})
        .expect_err("memory cannot be read");
    assert!(matches!(error, SnapshotError::Host { .. }));
    drop(writer);
    assert_eq!(names(&dir), ["mine"]);
}

#[test]
fn what_was_left_by_a_crash_is_no_snapshot_and_in_nobodys_way() {
    let top = tempfile::tempdir().expect("a directory");
    let dir = top.path().join("snapshot");
    let mut writer = SnapshotWriter::create(&dir).expect("create");
    let memory = Memory::sample();
    memory.save(&mut writer).expect("memory");
    assert!(matches!(SnapshotWriter::create(&dir), Err(SnapshotError::InUse(_))));
    assert!(matches!(open(&dir), Err(SnapshotError::Missing(_))));
    // As if the process had been killed: nothing is removed, and nobody has the lock.
    let kept = top.path().join("kept");
    fs::rename(&dir, &kept).expect("rename");
    drop(writer);
    fs::create_dir(&dir).expect("a directory");
    fs::copy(kept.join(MEMORY), dir.join(MEMORY)).expect("copy");
    fs::write(dir.join("state.json.tmp"), "{").expect("half of a state");
    assert!(matches!(open(&dir), Err(SnapshotError::Missing(_))));
    let mut writer = SnapshotWriter::create(&dir).expect("create");
    memory.save(&mut writer).expect("memory");
    writer.finish(b"{}", &about(), payloads()).expect("finish");
    read(&open(&dir).expect("open"), &mut memory.empty()).expect("memory");
    assert_eq!(names(&dir), [CONFIG, MEMORY, STATE]);
}

#[test]
fn a_snapshot_is_not_overwritten() {
    let (_top, dir, _) = saved();
    let before = fs::read(dir.join(STATE)).expect("state");
    let error = SnapshotWriter::create(&dir).err().expect("there is one");
    assert!(error.to_string().contains("name another directory"), "{error}");
    assert_eq!(fs::read(dir.join(STATE)).expect("state"), before);
    open(&dir).expect("open");
}

#[test]
fn each_damage_is_found() {
    let (_top, dir, memory) = saved();
    let path = dir.join(STATE);
    let text = fs::read_to_string(&path).expect("state");
    let with = |text: &str| {
        fs::write(&path, text).expect("state");
        open(&dir).expect_err("damaged")
    };
    assert!(matches!(
        with(&text.replace("second", "Second")),
        SnapshotError::Damaged
    ));
    assert!(matches!(with(&text[..text.len() - 1]), SnapshotError::Damaged));
    assert!(matches!(with("{}"), SnapshotError::Format));
    assert!(matches!(with(""), SnapshotError::Format));
    fs::write(&path, &text).expect("state");
    let error = Snapshot::open(&dir, "aarch64").expect_err("another architecture");
    assert_eq!(
        error.to_string(),
        "the snapshot is of a guest on x86_64, this host is aarch64"
    );

    let file = dir.join(MEMORY);
    let bytes = fs::read(&file).expect("memory");
    let mut flipped = bytes.clone();
    flipped[4 * MIB as usize - 1] ^= 1;
    fs::write(&file, &flipped).expect("memory");
    let damaged = read(&open(&dir).expect("open"), &mut memory.empty());
    assert!(matches!(damaged, Err(SnapshotError::MemoryDamaged { gpa: 0, .. })));
    fs::write(&file, &bytes[..bytes.len() - 1]).expect("memory");
    let error = open(&dir).expect_err("cut short");
    assert!(error.to_string().contains("cut short"), "{error}");
    fs::remove_file(&file).expect("remove");
    assert!(matches!(open(&dir), Err(SnapshotError::Host { .. })));
}

/// A `state.json` with `body` and the right checksum.
fn signed(body: &str) -> Vec<u8> {
    let checksum = crc32fast::hash(body.as_bytes());
    format!("{{\"format\":\"triarch-snapshot\",\"checksum\":\"{checksum:08x}\",\n{body}").into_bytes()
}

fn parse(version: u32, ranges: &str, payloads: &str) -> Result<(), SnapshotError> {
    let body = format!(
        r#""version":{version},"vmm":"9.9","arch":"x86_64","memory":{{"chunk":4194304,"ranges":[{ranges}]}},"payloads":[{payloads}]}}"#
    );
    crate::document::parse(&signed(&body), "x86_64", MIB).map(drop)
}

#[test]
fn what_contradicts_itself_is_refused() {
    let good = r#"{"gpa":4096,"size":8192,"offset":0,"checksums":[null]}"#;
    let state = r#"{"kind":"serial","version":1,"state":null}"#;
    parse(1, good, state).expect("good");
    let error = parse(3, good, state).expect_err("a later version");
    assert!(error.to_string().contains("Triarch 9.9 in format 3"), "{error}");
    for range in [
        r#"{"gpa":4097,"size":8192,"offset":0,"checksums":[null]}"#,
        r#"{"gpa":4096,"size":0,"offset":0,"checksums":[]}"#,
        r#"{"gpa":4096,"size":8192,"offset":1,"checksums":[null]}"#,
        r#"{"gpa":4096,"size":8192,"offset":0,"checksums":[]}"#,
        r#"{"gpa":4096,"size":8192,"offset":0,"checksums":[null,null]}"#,
        r#"{"gpa":4096,"size":8192,"offset":1044480,"checksums":[null]}"#,
        r#"{"gpa":18446744073709543424,"size":8192,"offset":0,"checksums":[null]}"#,
        r#"{"gpa":4096,"size":8192,"offset":18446744073709543424,"checksums":[null]}"#,
        r#"{"gpa":4096,"size":18446744073709547520,"offset":0,"checksums":[null]}"#,
    ] {
        let error = parse(1, range, state).expect_err("a bad region");
        assert!(matches!(error, SnapshotError::Memory(_)), "{range}: {error}");
    }
    let second = r#"{"gpa":8192,"size":4096,"offset":8192,"checksums":[null]}"#;
    assert!(
        parse(1, &format!("{good},{second}"), state).is_err(),
        "overlap in the guest"
    );
    let second = r#"{"gpa":16384,"size":4096,"offset":4096,"checksums":[null]}"#;
    assert!(
        parse(1, &format!("{good},{second}"), state).is_err(),
        "overlap in the file"
    );
    let error = parse(1, good, &format!("{state},{state}")).expect_err("twice");
    assert!(matches!(error, SnapshotError::Payloads(_)));
    let unknown = r#"{"kind":"serial","version":1,"state":null,"more":1}"#;
    assert!(matches!(parse(1, good, unknown), Err(SnapshotError::Document(_))));
}

#[test]
fn an_endless_file_is_not_read() {
    let (_top, dir, _) = saved();
    fs::remove_file(dir.join(CONFIG)).expect("remove");
    std::os::unix::fs::symlink("/dev/zero", dir.join(CONFIG)).expect("link");
    assert!(matches!(open(&dir), Err(SnapshotError::TooLarge { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_memory_comes_back(dirty in prop::collection::vec((0u64..12 * MIB / PAGE, 1u8..), 0..20)) {
        let mut memory = Memory(vec![(MIB, vec![0; 12 * MIB as usize])]);
        for (page, value) in dirty {
            memory.at(MIB + page * PAGE + u64::from(value), 1)[0] = value;
        }
        let top = tempfile::tempdir().expect("a directory");
        let mut writer = SnapshotWriter::create(top.path()).expect("create");
        memory.save(&mut writer).expect("memory");
        writer.finish(b"{}", &about(), Payloads::default()).expect("finish");
        let mut found = memory.empty();
        read(&open(top.path()).expect("open"), &mut found).expect("memory");
        prop_assert!(found.0 == memory.0);
    }

    #[test]
    fn a_flipped_bit_of_the_state_is_found(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (_top, dir, _) = saved();
        let mut text = fs::read(dir.join(STATE)).expect("state");
        let at = at.index(text.len());
        text[at] ^= 1 << bit;
        // A digit of the checksum may be written in two ways.
        let same = text[at].eq_ignore_ascii_case(&(text[at] ^ 1 << bit));
        fs::write(dir.join(STATE), &text).expect("state");
        prop_assert!(same || open(&dir).is_err());
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        crate::fuzzing::state(&bytes);
    }
}

#[test]
fn what_may_not_outlive_a_loss_of_power_is_none() {
    // Before it has its name, with it, and when its directory has.
    for fails in 1..=3 {
        let top = tempfile::tempdir().expect("a directory");
        let dir = top.path().join("snapshot");
        let mut writer = SnapshotWriter::create(&dir).expect("create");
        Memory::sample().save(&mut writer).expect("memory");
        SYNC_FAILS.set(fails);
        let finished = writer.finish(b"{}", &about(), payloads());
        SYNC_FAILS.set(0);
        assert!(finished.is_err());
        assert!(!dir.exists(), "{:?}", names(&dir));
    }
}

#[test]
fn whoever_left_files_reads_nothing_of_the_guest() {
    let top = tempfile::tempdir().expect("a directory");
    let dir = top.path().join("snapshot");
    fs::create_dir(&dir).expect("a directory");
    let victim = top.path().join("victim");
    fs::write(&victim, "mine").expect("a file");
    for name in [CONFIG, UNFINISHED_STATE] {
        std::os::unix::fs::symlink(&victim, dir.join(name)).expect("a link");
    }
    fs::write(dir.join(MEMORY), "left").expect("a file");
    fs::set_permissions(dir.join(MEMORY), fs::Permissions::from_mode(0o666)).expect("a mode");
    let theirs = fs::File::open(dir.join(MEMORY)).expect("a file");
    let mut writer = SnapshotWriter::create(&dir).expect("create");
    assert!(matches!(SnapshotWriter::create(&dir), Err(SnapshotError::InUse(_))));
    Memory::sample().save(&mut writer).expect("memory");
    writer.finish(b"{}", &about(), payloads()).expect("finish");
    assert_eq!(fs::read_to_string(&victim).expect("a file"), "mine");
    assert_eq!(io::read_to_string(theirs).expect("a file"), "left");
    for name in names(&dir) {
        let found = fs::symlink_metadata(dir.join(&name)).expect("a file");
        assert!(
            found.is_file() && found.mode() & 0o077 == 0,
            "{name}: {:o}",
            found.mode()
        );
    }
    open(&dir).expect("a snapshot");
}

#[test]
fn memory_is_not_written_to_where_a_link_leads() {
    let top = tempfile::tempdir().expect("a directory");
    let dir = top.path().join("snapshot");
    fs::create_dir(&dir).expect("a directory");
    let victim = top.path().join("victim");
    fs::write(&victim, "mine").expect("a file");
    std::os::unix::fs::symlink(&victim, dir.join(MEMORY)).expect("a link");
    assert!(SnapshotWriter::create(&dir).is_err());
    assert_eq!(fs::read_to_string(&victim).expect("a file"), "mine");
}
