//! What the guest's RAM is made of on the host.

use super::guest::{Guest, builder, test_ram};
use super::payload_tests;
use anyhow::{Context as _, Result, ensure};
use std::fs;
use triarch_harness::smaps::{self, MemoryMap, VmFlags};
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::Vm;

payload_tests!("backing":
    private_by_default,
    shared,
    prefaulted,
    without_transparent_huge_pages,
    mergeable,
    huge_pages,
);

/// Bytes of RAM of these guests.
const SIZE: u64 = 64 << 20;

/// The mapping that is the guest's RAM.
fn ram(vm: &Vm) -> Result<MemoryMap> {
    let mut all = smaps::of(vm.pid())?.into_iter();
    all.find(|mapping| smaps::size(mapping) == SIZE)
        .with_context(|| format!("no mapping of {SIZE} bytes"))
}

fn has_flag(mapping: &MemoryMap, flag: VmFlags) -> bool {
    mapping.extension.vm_flags.contains(flag)
}

/// Starts a guest with these options of `--memory`, lets it use all of its memory, and gives what `look` sees before and after.
fn start<T>(context: &Context, options: &str, look: impl Fn(&MemoryMap) -> Result<T>) -> Result<[T; 2]> {
    let memory = format!("size=64M{options}");
    let mut guest = Guest::start(builder(context)?.set("--memory", memory))?;
    let before = look(&ram(guest.vm())?)?;
    for what in ["fill", "verify"] {
        guest.ask(&format!("mem {what} {:#x} 0x2000000 1", test_ram()))?;
    }
    let after = look(&ram(guest.vm())?)?;
    // A reset has to find the same.
    guest.send("pm reset")?;
    guest.wait_ready()?;
    look(&ram(guest.vm())?)?;
    guest.power_off()?;
    Ok([before, after])
}

fn private_by_default(context: &Context) -> Result<Outcome> {
    let [before, after] = start(context, "", |ram| {
        ensure!(!has_flag(ram, VmFlags::SH), "shared: {ram:?}");
        ensure!(has_flag(ram, VmFlags::DD), "would be in a core dump: {ram:?}");
        Ok(smaps::kib(ram, "Rss"))
    })?;
    ensure!(before < 24 << 10, "{before} KiB are there before the guest uses them");
    ensure!(after >= 32 << 10, "{after} KiB for a guest that uses 32 MiB");
    Ok(Outcome::Passed)
}

fn shared(context: &Context) -> Result<Outcome> {
    start(context, ",shared=on", |ram| {
        ensure!(
            has_flag(ram, VmFlags::SH) && smaps::file(ram).is_some_and(|file| file.starts_with("/memfd:guest-ram")),
            "not shared: {ram:?}"
        );
        Ok(())
    })?;
    Ok(Outcome::Passed)
}

fn prefaulted(context: &Context) -> Result<Outcome> {
    let [before, _] = start(context, ",prefault=on", |ram| Ok(smaps::kib(ram, "Rss")))?;
    ensure!(before << 10 == SIZE, "only {before} KiB are there at the start");
    Ok(Outcome::Passed)
}

fn without_transparent_huge_pages(context: &Context) -> Result<Outcome> {
    if !fs::exists("/sys/kernel/mm/transparent_hugepage")? {
        return Ok(Outcome::Skipped("this kernel has no transparent huge pages".into()));
    }
    let flags = |ram: &MemoryMap| {
        Ok((
            has_flag(ram, VmFlags::HG),
            has_flag(ram, VmFlags::NH),
            smaps::kib(ram, "AnonHugePages"),
        ))
    };
    let [_, (wanted, refused, _)] = start(context, "", flags)?;
    ensure!(wanted && !refused, "not asked for by default");
    let [_, (wanted, refused, kib)] = start(context, ",thp=off", flags)?;
    ensure!(refused && !wanted && kib == 0, "{kib} KiB of huge pages with thp=off");
    Ok(Outcome::Passed)
}

fn mergeable(context: &Context) -> Result<Outcome> {
    if !fs::exists("/sys/kernel/mm/ksm")? {
        return Ok(Outcome::Skipped("this kernel merges no pages (CONFIG_KSM)".into()));
    }
    let [_, by_default] = start(context, "", |ram| Ok(has_flag(ram, VmFlags::MG)))?;
    let [_, asked_for] = start(context, ",mergeable=on", |ram| Ok(has_flag(ram, VmFlags::MG)))?;
    ensure!(
        asked_for && !by_default,
        "asked for {asked_for}, by default {by_default}"
    );
    Ok(Outcome::Passed)
}

/// The host's pool of huge pages of the default size, which is as it was when this is dropped.
struct Pool(String);

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl Pool {
    /// Adds `count` pages; why there are not as many, if so.
    fn grow(count: u64) -> Result<Result<Self, String>> {
        let before = fs::read_to_string(POOL)?;
        let wanted = before.trim().parse::<u64>()? + count;
        if let Err(e) = fs::write(POOL, wanted.to_string()) {
            return Ok(Err(format!("{POOL}: {e}")));
        }
        let pool = Self(before);
        let now: u64 = fs::read_to_string(POOL)?.trim().parse()?;
        Ok(if now == wanted {
            Ok(pool)
        } else {
            Err(format!(
                "the host's memory is too fragmented: {now} of {wanted} huge pages"
            ))
        })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // If that fails, the host has a few pages less; nothing else can be done.
        let _ = fs::write(POOL, &self.0);
    }
}

fn huge_pages(context: &Context) -> Result<Outcome> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    if !meminfo.contains("Hugepagesize:       2048 kB") {
        return Ok(Outcome::Skipped(
            "the host's default huge pages are not of 2 MiB".into(),
        ));
    }
    let _pool = match Pool::grow(SIZE / (2 << 20))? {
        Ok(pool) => pool,
        Err(why) => return Ok(Outcome::Skipped(why)),
    };
    for options in ["", ",hugepage_size=2M", ",shared=on", ",prefault=on"] {
        let options = format!(",hugepages=on{options}");
        start(context, &options, |ram| {
            ensure!(
                has_flag(ram, VmFlags::HT) && smaps::kib(ram, "KernelPageSize") == 2048,
                "small pages: {ram:?}"
            );
            Ok(())
        })
        .context(options)?;
    }
    Ok(Outcome::Passed)
}
