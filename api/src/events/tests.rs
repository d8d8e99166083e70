use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value as Json;

use super::kind::{DEVICE_ACTIVATED, DEVICE_RESET, JOB_FAILED, VM_BOOTED, VM_PAUSED};
use super::*;

fn read_all(log: &EventLog, cursor: &mut Cursor) -> Vec<Json> {
    let mut output = Vec::new();
    while log.read(cursor, 100, &mut output) {}
    let text = String::from_utf8(output).expect("ASCII");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

fn ids(events: &[Json]) -> Vec<u64> {
    events
        .iter()
        .map(|event| event["id"].as_u64().expect("a number"))
        .collect()
}

#[test]
fn readers_get_everything_once_and_from_where_they_want() {
    let log = EventLog::new();
    assert_eq!(log.after(1), Err(Ahead { since: 1, last: 0 }));
    let (mut all, mut late) = (log.after(0).expect("the start"), log.now());
    assert!(read_all(&log, &mut late).is_empty());
    for _ in 0..3 {
        log.post(&VM_PAUSED, &[]);
    }
    let mut now = log.now();
    log.post(&VM_BOOTED, &[]);
    assert_eq!(ids(&read_all(&log, &mut all)), [1, 2, 3, 4]);
    assert_eq!(ids(&read_all(&log, &mut late)), [1, 2, 3, 4]);
    assert_eq!(ids(&read_all(&log, &mut now)), [4]);
    assert_eq!(ids(&read_all(&log, &mut log.after(2).expect("kept"))), [3, 4]);
    assert!(read_all(&log, &mut all).is_empty());
    assert!(log.after(5).is_err());
}

#[test]
fn a_reader_that_was_overtaken_is_told_how_much_it_missed() {
    let log = EventLog::new();
    let mut cursor = log.after(0).expect("the start");
    for _ in 0..HOST_EVENTS + 10 {
        log.post(&VM_PAUSED, &[]);
    }
    let events = read_all(&log, &mut cursor);
    assert_eq!(events.len(), HOST_EVENTS + 1);
    assert_eq!(
        (&events[0]["event"], &events[0]["properties"]["count"]),
        (&"lost".into(), &10.into())
    );
    // The count's number is that of the last one it counts: a client can go on from it.
    assert_eq!(ids(&events)[..3], [10, 11, 12]);
    assert_eq!(ids(&read_all(&log, &mut log.after(10).expect("known")))[0], 11);
}

#[test]
fn long_lines_leave_early() {
    let log = EventLog::new();
    let text = "x".repeat(10_000);
    for _ in 0..1000 {
        log.post(&JOB_FAILED, &[("error", text.as_str().into())]);
    }
    let state = log.state();
    assert!(state.host.bytes <= HOST_BYTES, "{}", state.host.bytes);
    let bytes: usize = state.host.entries.iter().map(|entry| entry.line.len()).sum();
    assert_eq!(state.host.bytes, bytes);
}

#[test]
fn a_guest_neither_grows_the_log_nor_pushes_others_out() {
    let log = EventLog::new();
    log.post(&VM_BOOTED, &[]);
    let names: Vec<String> = (0..40).map(|n| format!("_disk{n}")).collect();
    for _ in 0..5000 {
        for name in &names {
            log.post_guest(name, &DEVICE_ACTIVATED, &[("id", name.as_str().into())]);
            log.post_guest(name, &DEVICE_RESET, &[("id", name.as_str().into())]);
        }
    }
    assert!(log.due().is_some());
    log.post(&VM_PAUSED, &[]);
    let events = read_all(&log, &mut log.after(0).expect("the start"));
    assert!(events.len() <= GUEST_EVENTS + 3, "{} events", events.len());
    assert_eq!((ids(&events)[0], &events[0]["event"]), (1, &"booted".into()));
    assert_eq!(events.last().expect("one")["event"], "paused");
    let lost: u64 = events
        .iter()
        .filter_map(|event| event["properties"]["count"].as_u64())
        .sum();
    let kept = events.iter().filter(|event| event["event"] != "lost").count() as u64;
    assert_eq!(lost + kept, ids(&events).last().copied().expect("one"), "{events:?}");
}

#[test]
fn what_is_held_back_comes_with_a_count_when_its_time_is_over() {
    let log = EventLog::new();
    for _ in 0..100 {
        log.post_guest("_disk0", &DEVICE_RESET, &[("id", "_disk0".into())]);
    }
    let mut cursor = log.now();
    assert!(read_all(&log, &mut cursor).is_empty());
    let due = log.due().expect("one is held");
    // What a reader does when the time has come.
    log.state().release(due, Duration::from_secs(10));
    let events = read_all(&log, &mut cursor);
    assert_eq!(events.len(), 1);
    assert_eq!(
        (&events[0]["event"], &events[0]["source"]),
        (&"reset".into(), &"virtio-device".into())
    );
    let suppressed = events[0]["properties"]["suppressed"].as_u64().expect("a count");
    let seen = read_all(&log, &mut log.after(0).expect("the start")).len() as u64;
    assert_eq!(seen + suppressed, 100);
}

#[test]
fn times_rise_with_numbers_also_from_many_threads() {
    let log = EventLog::new();
    let woken = Arc::new(AtomicUsize::new(0));
    let count = woken.clone();
    log.subscribe(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..100).for_each(|_| log.post(&VM_PAUSED, &[])));
        }
    });
    assert_eq!(woken.load(Ordering::Relaxed), 400);
    let events = read_all(&log, &mut log.after(0).expect("the start"));
    assert_eq!(ids(&events), (1..=400).collect::<Vec<_>>());
    let time = |event: &Json| {
        let part = |name: &str| event["timestamp"][name].as_u64().expect("a number");
        (part("secs"), part("nanos"))
    };
    assert!(events.windows(2).all(|pair| time(&pair[0]) <= time(&pair[1])));
}

#[test]
fn what_is_held_back_does_not_come_after_what_happened_later() {
    let log = EventLog::new();
    let mut cursor = log.now();
    for _ in 0..10 {
        (0..10).for_each(|_| log.post_guest("vm", &VM_BOOTED, &[]));
        log.post(&VM_PAUSED, &[]);
    }
    assert_eq!(log.due(), None);
    let events = read_all(&log, &mut cursor);
    let told: u64 = events
        .iter()
        .filter(|event| event["event"] == "booted")
        .map(|event| 1 + event["properties"]["suppressed"].as_u64().unwrap_or(0))
        .sum();
    assert_eq!((told, &events.last().expect("one")["event"]), (100, &"paused".into()));
}
