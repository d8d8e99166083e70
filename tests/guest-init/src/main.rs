//! PID 1 of test machines; see the library's documentation.
//!
//! As PID 1 it also takes, on the kernel command line:
//! - `triarch.agent=CHANNEL[,CHANNEL]`: serve the agent on the first of these that exists;
//! - `triarch.run="COMMANDS"`: run this by `/bin/sh`, print its exit code and power off.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;
use triarch_guest_init::channel::Channel;
use triarch_guest_init::proto::Power;
use triarch_guest_init::reap;
use triarch_guest_init::{cmdline, modules, power, reading, setup, soak, tools};

/// How long devices may take to appear.
const CHANNEL_WAIT: Duration = Duration::from_secs(30);
/// Pause before an agent that ended is started again.
const RESTART: Duration = Duration::from_secs(1);
const SELF: &str = "/proc/self/exe";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const USAGE: &str = "usage: triarch-guest-init agent CHANNEL[,CHANNEL] | load MODULE... | vsock-echo PORT | \
                     vsock-connect CID PORT | disk-soak DISK TABLE THREADS BLOCKS MILLISECONDS SEED | \
                     disk-read DISK THREADS MILLISECONDS";

fn main() -> ExitCode {
    if process::id() == 1 {
        return init();
    }
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("triarch-guest-init: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<(), String> {
    let number = |text: &str| text.parse::<u32>().map_err(|e| format!("{text}: {e}"));
    let result = match arguments {
        ["agent", channels] => return agent(channels),
        ["vsock-echo", port] => tools::vsock_echo(number(port)?),
        ["load", modules @ ..] => load(modules.iter().map(|&name| name.to_owned()).collect()),
        ["disk-read", plan @ ..] => reading::main(plan),
        ["disk-soak", plan @ ..] => soak::main(plan),
        ["vsock-connect", cid, port] => tools::vsock_connect(number(cid)?, number(port)?),
        _ => return Err(USAGE.into()),
    };
    result.map_err(|e| format!("{}: {e}", arguments.join(" ")))
}

fn agent(channels: &str) -> Result<(), String> {
    let channels = Channel::list(channels)?;
    let channel =
        Channel::first(&channels, CHANNEL_WAIT).ok_or_else(|| format!("no channel appeared in {CHANNEL_WAIT:?}"))?;
    channel.serve().map_err(|e| format!("{channel}: {e}"))
}

/// PID 1: prepares the system, then starts and reaps processes for ever. Only this thread starts
/// any: reaping in one thread what another one waits for would go wrong.
fn init() -> ExitCode {
    let mut problems = setup::system();
    problems.extend(load_modules());
    let init = Init {
        console: File::options().read(true).write(true).open("/dev/console").ok(),
    };
    for problem in &problems {
        init.say(problem);
    }
    // Before the banner: whoever has seen it may press.
    init.watch_button();
    init.print(&setup::banner(&setup::machine()));
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let channels = cmdline::value(&line, "triarch.agent");
    let mut agent = channels
        .as_deref()
        .and_then(|c| init.start(Path::new(SELF), &["agent", c]));
    let commands = cmdline::value(&line, "triarch.run");
    let run = commands.and_then(|c| init.start(Path::new("/bin/sh"), &["-c", &c]));
    loop {
        let Some((pid, status)) = reap() else {
            thread::park();
            continue;
        };
        if run == Some(pid) {
            init.say(&format!("run finished, {status}"));
            init.end(Power::Poweroff);
        } else if agent == Some(pid) {
            init.say(&format!("the agent ended, {status}; starting it again"));
            thread::sleep(RESTART);
            agent = channels
                .as_deref()
                .and_then(|c| init.start(Path::new(SELF), &["agent", c]));
        }
    }
}

fn load_modules() -> Vec<String> {
    let list = Path::new("/etc/modules");
    if !list.exists() {
        return Vec::new();
    }
    let loaded = setup::module_names(list).and_then(|names| modules::load(&names, &modules_dir()));
    loaded.unwrap_or_else(|e| vec![format!("cannot load modules from {}: {e}", modules_dir().display())])
}

/// Where the modules of the running kernel are.
fn modules_dir() -> PathBuf {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Path::new("/lib/modules").join(release.trim())
}

/// Loads modules that are not loaded at start.
fn load(names: Vec<String>) -> io::Result<()> {
    let problems = modules::load(&names, &modules_dir())?;
    if problems.is_empty() {
        return Ok(());
    }
    Err(io::Error::other(problems.join("; ")))
}

struct Init {
    console: Option<File>,
}

impl Init {
    /// Writes one line to the console in one piece. There is nobody to tell if that fails.
    fn print(&self, line: &str) {
        if let Some(mut console) = self.console.as_ref() {
            let _ = console.write_all(format!("{line}\n").as_bytes());
        }
    }

    fn say(&self, message: &str) {
        self.print(&format!("triarch-guest: {message}"));
    }

    /// Starts a program on the console, in its own session, and gives its process.
    fn start(&self, program: &Path, arguments: &[&str]) -> Option<u32> {
        let console = || {
            let copy = self.console.as_ref().and_then(|c| c.try_clone().ok());
            copy.map_or_else(Stdio::null, Stdio::from)
        };
        let child = Command::new(program)
            .args(arguments)
            .env("PATH", PATH)
            .env("HOME", "/")
            .env("TERM", "linux")
            .current_dir("/")
            .stdin(console())
            .stdout(console())
            .stderr(console())
            .process_group(0)
            .spawn();
        match child {
            Ok(child) => Some(child.id()),
            Err(e) => {
                self.say(&format!("cannot start {}: {e}", program.display()));
                None
            }
        }
    }

    fn end(&self, action: Power) {
        if let Err(e) = power::end(action) {
            self.say(&format!("cannot end the machine: {e}"));
        }
    }

    /// Powers off when the power button is pressed, as a distribution's login manager does.
    fn watch_button(&self) {
        let Ok(console) = self.console.as_ref().map(File::try_clone).transpose() else {
            return;
        };
        let watcher = Self { console };
        let Some(button) = power::Button::open() else {
            return;
        };
        let watch = move || {
            if button.wait().is_some() {
                watcher.say("power button pressed");
                watcher.end(Power::Poweroff);
            }
        };
        if let Err(e) = thread::Builder::new().name("button".into()).spawn(watch) {
            self.say(&format!("cannot watch the power button: {e}"));
        }
    }
}
