use std::fs;
use std::os::unix::net::UnixDatagram;

use triarch_device_core::NoSandbox;

use super::*;

fn record(request: &str) -> AuditRecord {
    AuditRecord {
        time: "2026-11-02T03:04:05.000006Z".into(),
        uid: 1,
        gid: 2,
        pid: 3,
        request: request.into(),
        parameters: None,
        status: 409,
        error: Some("no".into()),
        duration_us: 7,
    }
}

fn start(log: AuditLog) -> Audit {
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    Audit::start(&log, &sandbox).expect("start")
}

fn queue() -> Queue {
    Queue {
        items: Mutex::default(),
        new_file: Mutex::default(),
        news: Event::new().expect("an event"),
    }
}

#[test]
fn a_file_gets_one_line_of_json_each_behind_what_it_had() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("audit");
    fs::write(&path, "before\n").expect("write");
    let audit = start(AuditLog::File(path.clone()));
    for n in 0..100 {
        audit.sink().record(&record(&format!("vm.{n}")));
    }
    drop(audit);
    let text = fs::read_to_string(&path).expect("read");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!((lines.len(), lines[0]), (101, "before"));
    for (n, line) in lines[1..].iter().enumerate() {
        let value: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert_eq!(value["request"], format!("vm.{n}"));
    }
}

#[test]
fn a_daemon_gets_what_its_protocol_says() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("log");
    let daemon = UnixDatagram::bind(&path).expect("bind");
    daemon
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    let receive = || {
        let mut buffer = [0; 8192];
        let count = daemon.recv(&mut buffer).expect("a datagram");
        String::from_utf8(buffer[..count].to_vec()).expect("text")
    };
    let json = record("vm.boot").to_json();
    let audit = start(AuditLog::Syslog(path.clone()));
    audit.sink().record(&record("vm.boot"));
    let pid = std::process::id();
    assert_eq!(receive(), format!("<86>Nov  2 03:04:05 triarch[{pid}]: {json}"));
    let audit = start(AuditLog::Journal(path.clone()));
    audit.sink().record(&record("vm.boot"));
    let text = receive();
    let fields: Vec<_> = text.lines().collect();
    assert_eq!(fields[0], format!("MESSAGE={json}"));
    for field in [
        "PRIORITY=6",
        "SYSLOG_IDENTIFIER=triarch",
        "TRIARCH_REQUEST=vm.boot",
        "TRIARCH_UID=1",
        "TRIARCH_STATUS=409",
    ] {
        assert!(fields.contains(&field), "{field} in {text}");
    }
}

#[test]
fn a_daemon_that_comes_back_gets_what_waited() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("log");
    let daemon = UnixDatagram::bind(&path).expect("bind");
    let audit = start(AuditLog::Syslog(path.clone()));
    drop(daemon);
    fs::remove_file(&path).expect("remove");
    for n in 0..5 {
        audit.sink().record(&record(&format!("vm.{n}")));
    }
    std::thread::sleep(Duration::from_millis(50));
    let daemon = UnixDatagram::bind(&path).expect("bind");
    daemon
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("a timeout");
    for n in 0..5 {
        let mut buffer = [0; 8192];
        let count = daemon.recv(&mut buffer).expect("a datagram");
        let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
        assert!(text.contains(&format!(r#""request":"vm.{n}""#)), "{text}");
    }
}

#[test]
fn what_finds_no_room_is_counted_in_its_place() {
    let queue = queue();
    for n in 0..WAITING + 10 {
        queue.record(&record(&format!("vm.{n}")));
    }
    assert_eq!(queue.items().len(), WAITING + 1);
    assert_eq!(queue.items().back(), Some(&Item::Lost(10)));
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("audit");
    let mut writer = Writer::open(&AuditLog::File(path.clone())).expect("open");
    write_some(&queue, &mut writer).expect("write");
    queue.record(&record("vm.last"));
    write_some(&queue, &mut writer).expect("write");
    let text = fs::read_to_string(&path).expect("read");
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), WAITING + 2);
    assert_eq!(
        (&lines[WAITING]["lost"], &lines[WAITING + 1]["request"]),
        (&10.into(), &"vm.last".into())
    );
}

/// Takes so many bytes, and the rest when there is room again.
struct SmallDisk {
    taken: Vec<u8>,
    room: usize,
}

impl Write for SmallDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room);
        if count == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.taken.extend_from_slice(&bytes[..count]);
        self.room -= count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_tears_no_line() {
    let mut disk = SmallDisk {
        taken: Vec::new(),
        room: 3,
    };
    let mut rest = b"abcdef\n".to_vec();
    assert!(write_rest(&mut disk, &mut rest).is_err());
    assert_eq!(rest, b"def\n");
    disk.room = 100;
    write_rest(&mut disk, &mut rest).expect("room");
    assert_eq!(disk.taken, b"abcdef\n");
}

#[test]
fn a_full_device_loses_nothing_and_does_not_hang_the_end() {
    let mut writer = Writer::open(&AuditLog::File("/dev/full".into())).expect("open");
    let queue = queue();
    queue.record(&record("vm.boot"));
    for _ in 0..3 {
        assert!(write_some(&queue, &mut writer).is_err());
        assert_eq!(queue.items().len(), 1);
    }
    let audit = start(AuditLog::File("/dev/full".into()));
    audit.sink().record(&record("vm.boot"));
    let start = std::time::Instant::now();
    drop(audit);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn what_is_not_there_at_the_start_is_an_error() {
    let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
    for log in [
        AuditLog::File("/nope/audit".into()),
        AuditLog::Syslog("/nope/log".into()),
    ] {
        let error = Audit::start(&log, &sandbox).err().expect("an error");
        assert!(
            format!("{error:#}").starts_with("--audit-log: cannot write /nope/"),
            "{error:#}"
        );
    }
}

#[test]
fn a_file_that_was_renamed_is_followed_by_a_new_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, old) = (directory.path().join("audit"), directory.path().join("audit.1"));
    let audit = start(AuditLog::File(path.clone()));
    let reopener = audit.reopener().expect("a file");
    let lines = |path: &Path| fs::read_to_string(path).map_or(0, |text| text.lines().count());
    let wait_for = |path: &Path, count| {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while lines(path) < count {
            assert!(
                std::time::Instant::now() < deadline,
                "{} has no {count} lines",
                path.display()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    audit.sink().record(&record("vm.pause"));
    wait_for(&path, 1);
    fs::rename(&path, &old).expect("rename");
    audit.sink().record(&record("vm.resume"));
    wait_for(&old, 2);
    reopener.reopen().expect("open");
    audit.sink().record(&record("vm.boot"));
    wait_for(&path, 1);
    drop(audit);
    assert_eq!((lines(&old), lines(&path)), (2, 1));
}
