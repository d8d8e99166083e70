//! Running other programs, with errors that say what was run and what it answered.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// A step that lasts longer shows that it lives this often.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Lines of a failed program's output that are shown.
const TAIL: usize = 20;

/// The top directory of the checkout.
pub fn top() -> PathBuf {
    let package =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package
        .ancestors()
        .nth(2)
        .map_or_else(|| package.clone(), Path::to_path_buf)
}

/// The cargo that started us, or the one on the path.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(top());
    command
}

/// Takes away what the environment tells every build: this one has flags and a target of its own.
pub fn without_flags(command: &mut Command) -> &mut Command {
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
    ] {
        command.env_remove(name);
    }
    command
}

/// Where `name` is found on the path, the administrator's directories included: an ordinary
/// user's path often leaves them out.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// A command as one would type it, for messages.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Runs a command with the terminal's standard streams.
///
/// # Errors
/// It cannot be started or ends with another status than 0.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command without input and returns its standard output; its standard error is shown only
/// when it fails.
///
/// # Errors
/// It cannot be started, ends with another status than 0, or prints something not UTF-8.
pub fn output(command: &mut Command) -> Result<String> {
    let bytes = output_bytes(command)?;
    String::from_utf8(bytes).map_err(|_| anyhow!("`{}` printed something not UTF-8", shown(command)))
}

/// Like [`output`], for programs that write data.
///
/// # Errors
/// As [`output`], except for the encoding.
pub fn output_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{}`", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        bail!("`{}` failed: {}\n{}", shown(command), output.status, tail(&said, TAIL));
    }
    Ok(output.stdout)
}

/// The last `lines` lines of `text`, indented.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..]
        .iter()
        .map(|l| format!("    {l}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Does one step of preparation: prints what it is before, the seconds now and then while it
/// lasts, and those it took after.
///
/// # Errors
/// What the step answers, with its name.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    say(&format!("  {what} ..."));
    let result = std::thread::scope(|scope| {
        let (done, waiting) = mpsc::channel::<()>();
        scope.spawn(move || {
            while waiting.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
                say(&format!(" {} s ...", start.elapsed().as_secs()));
            }
        });
        let result = work();
        drop(done);
        result
    });
    let word = if result.is_ok() { "" } else { " failed after" };
    say(&format!("{word} {:.1} s\n", start.elapsed().as_secs_f64()));
    result.with_context(|| format!("{what}: did not succeed"))
}

/// Progress is worth no failure.
fn say(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_command_status_and_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo out; echo err >&2; exit 3"]);
        let error = output(&mut command).unwrap_err().to_string();
        for part in ["`sh -c", "exit status: 3", "    err", "    out"] {
            assert!(error.contains(part), "{part:?} not in {error:?}");
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = output(&mut Command::new("triarch-no-such-program")).unwrap_err();
        assert!(error.to_string().contains("triarch-no-such-program"));
        assert_eq!(find("triarch-no-such-program"), None);
        assert!(find("sh").is_some());
    }

    #[test]
    fn the_tail_keeps_the_last_lines() {
        assert_eq!(tail("a\n\nb\nc\n", 2), "    b\n    c");
        assert_eq!(tail("", 2), "");
    }

    #[test]
    fn the_top_holds_the_workspace() {
        let manifest = std::fs::read_to_string(top().join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[workspace]"));
    }
}
