//! The guest starts, and finds the machine it was promised.

use super::guest::{Guest, builder, field, is_arm, number};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use triarch_harness::suite::{Context, Outcome, patient};

payload_tests!("boot":
    says_hello,
    passes_initramfs,
    writes_first_byte,
    has_acpi,
    keeps_time,
    sleeps,
    talks_over_serial;
    x86:
    talks_over_debug_port: "I/O ports",
);

fn says_hello(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.flag("--cmdline", "one two=3 \"four five\""))?;
    let hello = guest.ask("hello")?;
    let ram = number(&hello, "ram")?;
    ensure!((63 << 20..=64 << 20).contains(&ram), "{ram} bytes of RAM");
    ensure!(number(&hello, "modules")? == 0, "{hello}");
    ensure!(hello.ends_with("cmdline=one two=3 \"four five\""), "{hello}");
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn passes_initramfs(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let initramfs = vm.dir().join("initramfs");
    fs::write(&initramfs, vec![0x5a; 12345])?;
    let mut guest = Guest::start(vm.flag("--initramfs", &initramfs))?;
    let hello = guest.ask("hello")?;
    ensure!(number(&hello, "modules")? == 1, "{hello}");
    Ok(Outcome::Passed)
}

fn writes_first_byte(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?.set("--serial", "tty").flag("--cmdline", "bench");
    let vm = vm.start()?;
    vm.output()
        .wait_for("Ttriarch-payload ready\n", 0, patient(Duration::from_secs(5)))?;
    ensure!(vm.output().text().starts_with('T'), "{:?}", vm.output().text());
    Ok(Outcome::Passed)
}

fn has_acpi(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?.set("--cpus", "boot=2,max=3"))?;
    let acpi = guest.ask("acpi")?;
    let tables: Vec<_> = field(&acpi, "tables")?.split(',').collect();
    let arm = ["GTDT", "SPCR", "IORT", "PPTT"].into_iter().filter(|_| is_arm());
    for table in ["FACP", "DSDT", "APIC", "MCFG"].into_iter().chain(arm) {
        ensure!(tables.contains(&table), "no {table} in {acpi}");
    }
    ensure!(number(&acpi, "processors")? == 3, "{acpi}");
    ensure!(number(&acpi, "enabled")? == 2, "{acpi}");
    ensure!(number(&acpi, "reduced")? == 1, "{acpi}");
    if is_arm() {
        ensure!(number(&acpi, "ecam")? == 0x3000_0000, "{acpi}");
    } else {
        ensure!(number(&acpi, "ecam")? == 0xe800_0000, "{acpi}");
        ensure!(number(&acpi, "sleep")? == 0x600, "{acpi}");
        field(&acpi, "reset")?;
    }
    Ok(Outcome::Passed)
}

/// Seconds since 1970 of a date and time in UTC.
fn seconds(text: &str) -> Option<i64> {
    let numbers: Option<Vec<i64>> = text.split(['-', 'T', ':']).map(|part| part.parse().ok()).collect();
    let [year, month, day, hour, minute, second] = numbers?.try_into().ok()?;
    // Days by the formula for years that begin in March.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

/// The rate of the guest's counter by the host's clock. Answers take their time: over a second that matters little.
fn khz_by_host(guest: &mut Guest) -> Result<u64> {
    let mut moment = || -> Result<_> {
        let before = Instant::now();
        let ticks = number(&guest.ask("time")?, "ticks")?;
        Ok((before + before.elapsed() / 2, ticks))
    };
    let (start, first) = moment()?;
    std::thread::sleep(Duration::from_secs(1));
    let (end, last) = moment()?;
    let micros = u64::try_from((end - start).as_micros())?;
    Ok((last - first) * 1000 / micros.max(1))
}

fn keeps_time(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    let time = guest.ask("time")?;
    let khz = number(&time, "khz")?;
    let other = if is_arm() {
        khz_by_host(&mut guest)?
    } else {
        number(&time, "khz_timer")?
    };
    ensure!(khz.abs_diff(other) < other / 20, "clocks differ, {other} kHz: {time}");
    let clock = field(&time, "rtc")?;
    let clock = clock.parse().ok().or_else(|| seconds(clock));
    let clock = clock.with_context(|| format!("no time in {time}"))?;
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
    ensure!(
        clock.abs_diff(now) <= 2,
        "the guest's clock says {clock}, the host's {now}"
    );
    Ok(Outcome::Passed)
}

fn sleeps(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    let slept = number(&guest.ask("sleep 20")?, "us")?;
    ensure!((20_000..400_000).contains(&slept), "slept {slept} us");
    Ok(Outcome::Passed)
}

fn talks_over_serial(context: &Context) -> Result<Outcome> {
    let mut guest = Guest::start(builder(context)?)?;
    // More than any FIFO holds, in and out.
    let text: String = ('a'..='z').cycle().take(1500).collect();
    ensure!(
        guest.ask(&format!("echo {text}"))? == text,
        "a long line came back changed"
    );
    if !is_arm() {
        // One instruction that puts out many bytes.
        guest.send("outs by one instruction")?;
        let line = guest.read_line()?;
        ensure!(line == "by one instruction", "string output came as `{line}`");
        guest.answer()?;
    }
    ensure!(guest.refused("nonsense")?.contains("unknown command"));
    Ok(Outcome::Passed)
}

fn talks_over_debug_port(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let log = vm.dir().join("debug.txt");
    let mut guest = Guest::start(vm.flag("--debug-console", format!("file={}", log.display())))?;
    for byte in b"boo\n" {
        guest.ask(&format!("port out 0x402 {byte}"))?;
    }
    // The other debug port swallows what it is given.
    guest.ask("port out 0x80 0x55")?;
    ensure!(fs::read(&log)? == b"boo\n");
    Ok(Outcome::Passed)
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn dates_are_counted() {
        assert_eq!(seconds("1970-01-01T00:00:00"), Some(0));
        assert_eq!(seconds("2000-03-01T00:00:01"), Some(951_868_801));
        assert_eq!(seconds("2024-02-29T12:00:00"), Some(1_709_208_000));
        assert_eq!(seconds("yesterday"), None);
    }
}
