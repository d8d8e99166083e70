//! Flags themselves.

use super::{builder, payload_tests, refused};
use anyhow::Result;
use triarch_harness::suite::{Context, Outcome};
use triarch_harness::vm::VmBuilder;

payload_tests!("bad_input":
    unknown_flags,
    flags_that_would_go_unheard,
);

fn unknown_flags(context: &Context) -> Result<Outcome> {
    let flag = |name: &str, value: &str| -> Result<_> { Ok(builder(context)?.set(name, value)) };
    refused(context, flag("--bogus", "1")?, &["--bogus", "--help"])?;
    refused(context, flag("--seccomp", "maybe")?, &["maybe", "log"])?;
    refused(
        context,
        flag("--log-file", "/nonexistent/l")?,
        &["--log-file", "/nonexistent/l", "No such file"],
    )?;
    refused(context, flag("--firmware", "f")?, &["--firmware", "--kernel"])?;
    refused(context, builder(context)?.flag("--cpus", "2"), &["'2'", "--help"])?;
    Ok(Outcome::Passed)
}

fn flags_that_would_go_unheard(context: &Context) -> Result<Outcome> {
    refused(context, VmBuilder::new(context)?, &["nothing to do", "--kernel"])?;
    let vm = VmBuilder::new(context)?.api().flag("--disk", "path=/nonexistent/d");
    refused(context, vm, &["--disk", "--kernel FILE"])?;
    Ok(Outcome::Passed)
}
