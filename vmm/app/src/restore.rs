//! `--restore`: a guest that goes on where it was saved.

use anyhow::{Context, bail};
use triarch_api::flags::{self, Restored};
use triarch_api::server::inherited;
use triarch_machine::Controller;
use triarch_state::CONFIG;

use crate::config_file;

/// What the flag's `text` asks for. Unless the API is `served`, nobody can let a paused guest go on.
pub(crate) fn parse(text: &str, served: bool) -> anyhow::Result<Restored> {
    let restored = flags::restore(text)?;
    if !restored.config.resume && !served {
        bail!(
            "--restore: the guest would stay paused, without an API to resume it; add resume=on, or give --api-socket PATH beside it"
        );
    }
    Ok(restored)
}

/// Whether the guest has devices whose daemons this process starts. What cannot be read is told of later, when all of it is.
pub(crate) fn needs_daemons(saved: &Restored) -> bool {
    let config = saved.config.directory().map(|directory| directory.join(CONFIG));
    config.is_ok_and(|path| config_file::read(&path).is_ok_and(|(config, _)| config.needs_daemons()))
}

/// Makes the VM that was saved.
pub(crate) fn start(controller: &mut Controller, saved: Restored) -> anyhow::Result<()> {
    let take = |fd: &i32| {
        let wrong =
            || format!("--restore: descriptor {fd} was not inherited; open the tap before starting this program");
        inherited(*fd).with_context(wrong)
    };
    let fds = saved.fds.iter().map(take).collect::<anyhow::Result<_>>()?;
    controller.restore(&saved.config, fds).context("--restore")
}
