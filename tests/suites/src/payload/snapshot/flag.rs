//! `--restore`: the same from the command line.

use super::super::guest::{Guest, SERIAL, test_ram};
use super::super::payload_tests;
use super::{MIB, edit, small};
use anyhow::{Result, ensure};
use serde_json::json;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use triarch_harness::suite::{Context, Outcome, patient};
use triarch_harness::vm::VmBuilder;

payload_tests!("snapshot::flag":
    it_goes_on_at_once,
    it_stays_paused_for_whoever_resumes_it,
    what_is_wrong_is_told,
);

fn from(directory: &Path, options: &str) -> String {
    format!("source_url=file://{}{options}", directory.display())
}

fn it_goes_on_at_once(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    for mode in ["copy", "mapped"] {
        let vm = VmBuilder::new(context)?;
        let serial = vm.dir().join(SERIAL);
        edit(&directory, |config| config["serial"]["socket"] = json!(serial))?;
        let options = format!(",memory_restore_mode={mode},resume=on");
        let vm = vm.flag("--restore", from(&directory, &options)).start()?;
        let mut guest = Guest::attach_restored(vm, &serial)?;
        guest.ask(&format!("mem verify {} {MIB} 5", test_ram()))?;
        guest.power_off()?;
    }
    Ok(Outcome::Passed)
}

fn it_stays_paused_for_whoever_resumes_it(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let vm = VmBuilder::new(context)?.api().flag("--restore", from(&directory, ""));
    let serial = vm.dir().join(SERIAL);
    edit(&directory, |config| config["serial"]["socket"] = json!(serial))?;
    let mut guest = Guest::attach_restored(vm.start()?, &serial)?;
    // Questions are answered while it is restored, and before there is anything to tell.
    let deadline = Instant::now() + patient(Duration::from_secs(5));
    let is_paused = || -> Result<bool> {
        let answer = guest.vm().api()?.request("GET", "vm.info", None)?;
        Ok(answer.is_success() && answer.body.contains("\"state\":\"Paused\""))
    };
    while !is_paused()? {
        ensure!(Instant::now() < deadline, "it is not paused");
        thread::sleep(Duration::from_millis(5));
    }
    guest.vm().resume()?;
    guest.ask(&format!("mem verify {} {MIB} 5", test_ram()))?;
    guest.power_off()?;
    Ok(Outcome::Passed)
}

fn what_is_wrong_is_told(context: &Context) -> Result<Outcome> {
    let kept = tempfile::tempdir_in(&context.dir)?;
    let directory = small(context, kept.path())?;
    let resumed = from(&directory, ",resume=on");
    let nowhere = from(kept.path(), ",resume=on");
    let fds = from(&directory, ",resume=on,net_fds=[net0@[200]]");
    for (value, more, code, words) in [
        (
            &resumed,
            Some(("--memory", "size=64M")),
            2,
            "--memory describes a VM, and --restore",
        ),
        (&from(&directory, ""), None, 2, "add resume=on"),
        (&nowhere, None, 1, "holds no snapshot"),
        (&fds, None, 1, "descriptor 200 was not inherited"),
    ] {
        let vm = VmBuilder::new(context)?.flag("--restore", value);
        let vm = more.into_iter().fold(vm, |vm, (flag, value)| vm.flag(flag, value));
        let ended = vm.start()?.expect_end(code)?;
        ensure!(
            ended.stderr.contains(words) && ended.stderr.lines().count() == 1,
            "{}",
            ended.stderr
        );
    }
    Ok(Outcome::Passed)
}
