//! `cargo xtask demo`: a stock Debian guest under Triarch, watched live, then in figures.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use triarch_harness::agent::{Exec, Machine, Stream};

use crate::arch::Arch;
use crate::build::{self, Profile};
use crate::host::{Host, Kind, Options, with_host};
use crate::images;
use crate::kernels::{Kernel, Version};
use crate::root::Rig;
use crate::smaps::{self, Usage};
use crate::table;

const LIMIT: Duration = Duration::from_secs(180);
const GUEST_MIB: u64 = 256;
/// What our init prints when it runs.
const USER_SPACE: &str = "triarch-guest: user space reached";
/// What names the processor in /proc/cpuinfo; ARM's kernel knows only numbers.
const MODELS: [&str; 2] = ["model name", "CPU part"];
const ASK_MODEL: &str = "grep -m1 -e '^model name' -e '^CPU part' /proc/cpuinfo";
const KERNEL_FILE: &str = "kernel";
const INITRAMFS_FILE: &str = "guest.cpio";

/// Boots a stock Debian kernel to user space under Triarch, shows its console, and ends with a
/// table of what ran where, how fast, and in how much memory.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The host; by default this machine if it has hardware KVM, else an emulated AMD, Hygon and ARM
    /// machine, one after the other
    #[arg(long, value_enum)]
    host: Option<Kind>,
    /// QEMU's name of the CPU model of an emulated host, e.g. cortex-a72
    #[arg(long, value_name = "MODEL", requires = "host")]
    cpu: Option<String>,
    /// The guest's kernel
    #[arg(long, value_enum, default_value = "6.1")]
    kernel: Version,
    /// Boot the ELF file by the PVH protocol instead of the bzImage; on ARM the Image instead of the compressed one
    #[arg(long)]
    pvh: bool,
    /// How triarch is compiled
    #[arg(long, value_enum, default_value = "release")]
    profile: Profile,
}

/// What is seen of one guest's life.
#[derive(Debug, Default)]
struct Report {
    host_cpu: String,
    host: Machine,
    guest_cpu: String,
    /// What the guest's init says of its machine.
    guest: String,
    first_byte: Duration,
    user_space: Duration,
    end: Duration,
    memory: Usage,
}

/// Carries out the verb.
///
/// # Errors
/// A part cannot be made, or the guest did not do what it should.
pub fn run(args: &Args) -> Result<()> {
    let kinds = args.host.map_or_else(Kind::defaults, |kind| vec![kind]);
    let mut reports = Vec::new();
    for kind in kinds {
        let options = Options {
            cpu: args.cpu.clone(),
            files: parts(args, kind.arch())?,
            ..Options::default()
        };
        println!("\n== a guest on the host `{kind}` ==");
        let report = with_host(kind, &options, watch).with_context(|| format!("the demo on `{kind}`"))?;
        reports.push((kind, report));
    }
    println!("\n{}", figures(&reports));
    Ok(())
}

fn parts(args: &Args, arch: Arch) -> Result<Vec<(String, u32, PathBuf)>> {
    let rig = Rig::get(arch)?;
    let kernel = Kernel::get(args.kernel, arch, &rig.root)?;
    let triarch = build::program(arch, args.profile, "triarch", "triarch")?;
    let boot = if args.pvh { &kernel.vmlinux } else { &kernel.vmlinuz };
    Ok(vec![
        ("triarch".to_owned(), 0o755, triarch),
        (KERNEL_FILE.to_owned(), 0o644, boot.clone()),
        (INITRAMFS_FILE.to_owned(), 0o644, images::guest(&kernel, &rig)?),
    ])
}

/// The command line a user would type.
fn command(arch: Arch) -> Vec<String> {
    // The guest names its processor, then idles while its VMM is measured.
    let console = arch.console();
    let cmdline = format!("console={console} panic=-1 triarch.run=\"{ASK_MODEL}; sleep 2\"");
    let memory = format!("size={GUEST_MIB}M");
    let words = [
        "./triarch",
        "--kernel",
        KERNEL_FILE,
        "--initramfs",
        INITRAMFS_FILE,
        "--cmdline",
        &cmdline,
        "--cpus",
        "boot=1",
        "--memory",
        &memory,
        "--serial",
        "tty",
        "--console",
        "off",
    ];
    words.map(str::to_owned).to_vec()
}

fn watch(host: &Host) -> Result<Report> {
    let mut report = Report {
        host: host.machine().clone(),
        host_cpu: model(&host.shell(&format!("{ASK_MODEL} || true"))?),
        ..Report::default()
    };
    // The process keeps its number when the shell turns into triarch.
    let mut argv: Vec<String> = ["/bin/sh", "-c", "echo $$ >pid; exec \"$@\"", "sh"]
        .map(str::to_owned)
        .to_vec();
    argv.extend(command(host.kind().arch()));
    let exec = Exec::new(argv).cwd(&host.path("")).timeout(LIMIT);
    let mut console = Console::default();
    let smaps = format!("cat /proc/$(cat {})/smaps", host.path("pid"));
    let start = Instant::now();
    // Measured by a thread of its own: who hears the console must not wait for another answer of the same agent.
    let (exit, sample) = std::thread::scope(|scope| {
        let mut sample = None;
        let exit = host.exec(&exec, |stream, data| {
            show(data);
            if stream == Stream::Stdout && console.take(data, start.elapsed()) {
                sample = Some(scope.spawn(|| host.shell(&smaps)));
            }
        });
        (exit, sample.map(std::thread::ScopedJoinHandle::join))
    });
    let exit = exit?;
    report.end = start.elapsed();
    if exit.timed_out {
        bail!("the guest did not end in {} s", LIMIT.as_secs());
    }
    if !exit.success() {
        bail!("triarch ended with {exit:?}");
    }
    let smaps = sample.context("triarch ended well, but the guest never reached user space")?;
    let smaps = smaps.map_err(|_| anyhow!("measuring the memory panicked"))??;
    report.memory = smaps::usage(&smaps, GUEST_MIB * 1024 / 2)?;
    console.finish(&mut report)?;
    Ok(report)
}

/// The guest's console lives on our standard output; that it cannot be shown is no reason to stop.
fn show(data: &[u8]) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(data).and_then(|()| out.flush());
}

/// Reads the guest's console and notes when what appeared.
#[derive(Debug, Default)]
struct Console {
    text: String,
    first_byte: Option<Duration>,
    user_space: Option<Duration>,
}

impl Console {
    /// Takes what was printed at the time `at`; true when the guest has just reached user space.
    fn take(&mut self, data: &[u8], at: Duration) -> bool {
        self.first_byte.get_or_insert(at);
        self.text.push_str(&String::from_utf8_lossy(data));
        let reached = self.user_space.is_none() && self.text.lines().any(|l| l.starts_with(USER_SPACE));
        if reached {
            self.user_space = Some(at);
        }
        reached
    }

    fn finish(self, report: &mut Report) -> Result<()> {
        report.first_byte = self.first_byte.context("the guest's console stayed silent")?;
        report.user_space = self.user_space.context("the guest never reached user space")?;
        // The kernel repeats its command line, which has the same words: not at a line's start.
        let line = |word: &str| self.text.lines().find(|l| l.starts_with(word)).unwrap_or_default();
        let name = MODELS.map(line).into_iter().find(|l| !l.is_empty());
        report.guest_cpu = model(name.unwrap_or_default());
        let said = line(USER_SPACE).strip_prefix(USER_SPACE);
        report.guest = said.unwrap_or_default().trim_matches([',', ' ', '\r']).to_owned();
        Ok(())
    }
}

/// The processor's name in a line of /proc/cpuinfo.
fn model(line: &str) -> String {
    match line.split_once(':').map(|(key, name)| (key.trim(), name.trim())) {
        None | Some((_, "")) => "not named".to_owned(),
        Some(("CPU part", number)) => format!("part {number}"),
        Some((_, name)) => name.to_owned(),
    }
}

/// One of the guest's words about itself, e.g. what follows `vendor `.
fn said<'a>(guest: &'a str, key: &str) -> &'a str {
    let found = guest.split(", ").find_map(|part| part.strip_prefix(key));
    found.unwrap_or("?").trim()
}

fn figures(reports: &[(Kind, Report)]) -> String {
    type Column = fn(&Report) -> String;
    fn ms(time: Duration) -> String {
        format!("{} ms", time.as_millis())
    }
    let rows: [(&str, Column); 13] = [
        ("host CPU", |r| r.host_cpu.clone()),
        ("host vendor", |r| r.host.vendor.clone()),
        ("host kernel", |r| r.host.kernel.clone()),
        ("guest CPU", |r| r.guest_cpu.clone()),
        ("guest vendor", |r| said(&r.guest, "vendor ").to_owned()),
        ("guest kernel", |r| said(&r.guest, "kernel ").to_owned()),
        ("exec to first console byte", |r| ms(r.first_byte)),
        ("exec to user space", |r| ms(r.user_space)),
        ("exec to power-off", |r| ms(r.end)),
        ("VMM Private_Dirty", |r| format!("{} KiB", r.memory.private_dirty)),
        ("VMM Pss", |r| format!("{} KiB", r.memory.pss)),
        ("VMM RSS", |r| format!("{} KiB", r.memory.rss)),
        ("guest RAM in use", |r| {
            format!("{} of {GUEST_MIB} MiB", r.memory.guest_rss / 1024)
        }),
    ];
    let line = |name: &str, cells: Vec<String>| [vec![name.to_owned()], cells].concat();
    let heading = reports.iter().map(|(kind, _)| kind.to_string()).collect();
    let mut lines = vec![line("", heading)];
    for (name, column) in rows {
        lines.push(line(name, reports.iter().map(|(_, report)| column(report)).collect()));
    }
    table::format(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_is_timed_and_read() {
        let at = Duration::from_millis;
        let mut console = Console::default();
        assert!(!console.take(
            b"[    0.0] Command line: triarch.run=\"grep -m1 'model name' x\"\r\n",
            at(30)
        ));
        assert!(!console.take(b"triarch-guest: user spa", at(900)));
        assert!(console.take(
            b"ce reached, kernel 6.1.0-9, 1 CPUs, vendor HygonGenuine, 240 MiB\r\n",
            at(950)
        ));
        assert!(!console.take(b"model name\t: Hygon C86\r\n", at(960)));
        let mut report = Report::default();
        console.finish(&mut report).unwrap();
        assert_eq!((report.first_byte, report.user_space), (at(30), at(950)));
        assert_eq!(report.guest_cpu, "Hygon C86");
        assert_eq!(said(&report.guest, "vendor "), "HygonGenuine");
        assert_eq!(said(&report.guest, "kernel "), "6.1.0-9");
    }

    #[test]
    fn an_arm_processor_has_a_number() {
        assert_eq!(model("CPU part\t: 0xd0c\n"), "part 0xd0c");
        assert_eq!(model("model name\t: Hygon C86\n"), "Hygon C86");
        assert_eq!(model(""), "not named");
    }

    #[test]
    fn a_guest_that_stops_in_its_kernel_is_an_error() {
        let mut console = Console::default();
        console.take(b"Kernel panic - not syncing\r\n", Duration::from_secs(1));
        let error = console.finish(&mut Report::default()).unwrap_err();
        assert_eq!(error.to_string(), "the guest never reached user space");
    }

    #[test]
    fn the_table_has_a_column_for_each_host() {
        let reports = [(Kind::Amd, Report::default()), (Kind::Hygon, Report::default())];
        let text = figures(&reports);
        let heading = text.lines().next().unwrap();
        assert!(heading.contains("amd") && heading.contains("hygon"), "{heading}");
        assert!(text.contains("exec to user space"), "{text}");
    }
}
