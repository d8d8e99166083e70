//! The client against the real agent, over a socket pair on this machine.

use super::*;
use std::fs;
use triarch_guest_init::agent::serve;

/// An agent that first prints `noise`, then serves.
fn session(noise: &'static [u8]) -> Agent {
    let (ours, theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        let mut writer = theirs.try_clone().unwrap();
        writer.write_all(noise).unwrap();
        let _ = serve(theirs, writer);
    });
    Agent::connect(ours, Duration::from_secs(20)).unwrap()
}

#[test]
fn greets_through_noise_and_a_foreign_answer() {
    let foreign = b"[ 0.0] boot {\"type\"\n{\"type\":\"hello\",\"token\":\"x\",\"kernel\":\"old\",\
        \"cpus\":9,\"vendor\":\"\",\"memory_mib\":1}\nlogin: ";
    let agent = session(foreign);
    assert_ne!(agent.machine().kernel, "old");
    assert!(agent.machine().memory_mib > 1);
}

#[test]
fn runs_commands() {
    let agent = session(b"");
    let exec = Exec::new(["sh", "-c", "cat; echo $A; pwd; echo bad >&2; exit 5"]);
    let output = agent.output(&exec.env("A", "b c").cwd("/tmp").stdin("in\n")).unwrap();
    let exit = Exit {
        code: Some(5),
        signal: None,
        timed_out: false,
    };
    let expected = Output {
        exit,
        stdout: b"in\nb c\n/tmp\n".into(),
        stderr: b"bad\n".into(),
    };
    assert_eq!(output, expected);
    assert_eq!(agent.shell("echo fine; echo").unwrap(), "fine");
}

#[test]
fn a_failed_check_shows_what_was_printed() {
    let error = session(b"").shell("echo one; false; echo two").unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("one") && !text.ends_with("two") && text.contains("Some(1)"),
        "{text}"
    );
    assert!(!error.is_machine_failure());
}

#[test]
fn several_threads_share_a_session() {
    let agent = session(b"");
    thread::scope(|scope| {
        let run = |i: u32| agent.shell(&format!("seq 1 20000; echo thread {i}"));
        let all: Vec<_> = (0..4).map(|i| (i, scope.spawn(move || run(i)))).collect();
        for (i, handle) in all {
            let text = handle.join().unwrap().unwrap();
            assert_eq!(text.lines().count(), 20001);
            assert!(text.ends_with(&format!("\nthread {i}")));
        }
    });
}

#[test]
fn files_travel_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b");
    let content: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let agent = session(b"");
    agent.put(path.to_str().unwrap(), 0o600, &content).unwrap();
    assert!(fs::read(&path).unwrap() == content);
    assert!(agent.get(path.to_str().unwrap()).unwrap() == content);
    let error = agent.get("/no/such").unwrap_err();
    assert!(
        matches!(&error, AgentError::Refused(why) if why.contains("/no/such")),
        "{error}"
    );
}

#[test]
fn kills_and_limits_commands() {
    let agent = session(b"");
    let running = agent.start(&Exec::shell("echo up; sleep 60")).unwrap();
    assert_eq!(running.next_output().unwrap().as_deref(), Some(b"up\n".as_slice()));
    running.kill().unwrap();
    assert_eq!(running.wait(|_, _| ()).unwrap().signal, Some(9));
    let exec = Exec::shell("sleep 60").timeout(Duration::from_millis(100));
    assert!(agent.output(&exec).unwrap().exit.timed_out);
    assert!(matches!(agent.shell("exit").map(|t| t.len()), Ok(0)));
}

#[test]
fn a_silent_machine_is_noticed() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let error = Agent::connect(ours, Duration::from_millis(300)).err().unwrap();
    assert!(matches!(error, AgentError::Silent(_)) && error.is_machine_failure());
}

#[test]
fn a_machine_that_goes_is_noticed_by_all() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let other = theirs.try_clone().unwrap();
    thread::spawn(move || serve(theirs.try_clone().unwrap(), theirs));
    let agent = Agent::connect(ours, Duration::from_secs(20)).unwrap();
    let running = agent.start(&Exec::shell("sleep 60")).unwrap();
    other.shutdown(Shutdown::Both).unwrap();
    let error = running.wait(|_, _| ()).unwrap_err();
    assert!(matches!(error, AgentError::Lost(_)), "{error}");
    assert!(matches!(agent.shell("true"), Err(AgentError::Lost(_))));
}

#[test]
fn a_dropped_session_leaves_no_thread() {
    let threads = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let name = |p: std::path::PathBuf| fs::read_to_string(p.join("comm")).unwrap_or_default();
        tasks.filter(|task| name(task.path()).trim() == "agent").count()
    };
    // Other tests run sessions beside this one; leaked ones would be fifty.
    for _ in 0..50 {
        let agent = session(b"");
        // Output that nobody reads fills the route.
        drop(agent.start(&Exec::shell("yes")).unwrap());
    }
    assert!(threads() < 25, "{}", threads());
}
