//! The real-time clock of the machine.

use anyhow::{Context as _, Result, ensure};
use std::time::{SystemTime, UNIX_EPOCH};
use triarch_harness::images::Kernel;
use triarch_harness::linux::{LinuxBuilder, LinuxVm};
use triarch_harness::suite::{Context, Outcome, Test};

pub const TESTS: &[Test] = &[
    Test::nested("clock::linux_6_1_starts_at_the_hosts_time", |c| {
        starts_now(c, Kernel::V6_1)
    }),
    Test::nested("clock::linux_6_12_starts_at_the_hosts_time", |c| {
        starts_now(c, Kernel::V6_12)
    }),
    Test::nested("clock::keeps_what_it_is_set_to", keeps_time),
];

/// Seconds that may pass between two looks at a clock: hosts are emulated, and busy.
const SLOW: u64 = 60;

fn seconds(guest: &LinuxVm, script: &str) -> Result<u64> {
    let answer = guest.shell(script)?;
    answer.trim().parse().with_context(|| format!("{script}: {answer}"))
}

fn starts_now(context: &Context, kernel: Kernel) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, kernel)?.boot()?;
    let host = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    for (what, script) in [
        ("the kernel's time", "date +%s"),
        ("the clock's time", "cat /sys/class/rtc/rtc0/since_epoch"),
    ] {
        let time = seconds(&guest, script)?;
        ensure!(host.abs_diff(time) <= SLOW, "{what} is {time}, the host's {host}");
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}

/// Days on which calendars go wrong, if they do: each is set, and read back by another way through it.
fn keeps_time(context: &Context) -> Result<Outcome> {
    let guest = LinuxBuilder::new(context, Kernel::V6_1)?.boot()?;
    for (date, since_1970) in [
        ("2000-02-29 12:34:56", 951_827_696u64),
        ("2024-12-31 00:00:00", 1_735_603_200),
        ("2027-01-31 01:02:03", 1_801_357_323),
        ("2027-02-28 22:00:00", 1_803_852_000),
        ("2027-03-01 00:00:00", 1_803_859_200),
        ("2028-02-29 09:59:59", 1_835_431_199),
        ("2032-12-31 20:00:00", 1_988_136_000),
        ("2038-01-20 00:00:00", 2_147_558_400),
        ("2099-11-30 17:18:19", 4_099_742_299),
    ] {
        guest.shell(&format!("date -u -s '{date}' && hwclock -w -u"))?;
        let clock = seconds(&guest, "cat /sys/class/rtc/rtc0/since_epoch")?;
        ensure!(
            (since_1970..since_1970 + SLOW).contains(&clock),
            "{date} is {since_1970}, the clock says {clock}"
        );
        let shown = guest.shell("cat /sys/class/rtc/rtc0/date")?;
        let day = date.split(' ').next().unwrap_or_default();
        ensure!(shown.trim() == day, "set to {date}, the clock shows {shown}");
    }
    guest.power_off()?;
    Ok(Outcome::Passed)
}
