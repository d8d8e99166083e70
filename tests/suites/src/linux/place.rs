//! Where a guest may be: what its disk and its interface are at each of several places.

use super::moving::{MAC, NET};
use crate::storage::{Daemon, Program};
use crate::switches::netd;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;
use triarch_harness::process::Process;
use triarch_harness::suite::Context;
use triarch_harness::vm::VmBuilder;

/// Who serves a guest's disk and interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The VMM.
    Vmm,
    /// triarch-blkd and triarch-netd, others at each place.
    Daemons,
}

/// Queues of a disk that a daemon serves.
const QUEUES: u16 = 2;

/// One of these places.
pub struct Place {
    disk: String,
    net: String,
    config: Value,
    // Those that serve them, as long as there is this place; then their sockets.
    served: Option<(Daemon, Process, TempDir)>,
}

impl Place {
    /// One where the disk is `disk`, past the host's cache if it `is_direct`, and the host's end of the interface `tap`, which is there.
    pub fn new(context: &Context, by: By, (disk, is_direct): (&Path, bool), tap: &str) -> Result<Self> {
        let direct = if is_direct { ",direct=on" } else { "" };
        if by == By::Vmm {
            return Ok(Self {
                disk: format!("path={}{direct}", disk.display()),
                net: format!("tap={tap},mac={MAC},id={NET}"),
                config: json!({ "net": [{ "id": NET, "tap": tap }] }),
                served: None,
            });
        }
        let dir = tempfile::Builder::new().prefix("daemon").tempdir_in(&context.dir)?;
        let mut blkd = Daemon::find(Program::Blkd, context, dir.path(), QUEUES).context("there is no triarch-blkd")?;
        // Whoever has the guest has the disk, and the daemon of the other place waits for it.
        blkd.options = if is_direct {
            ",lock=late,direct=on"
        } else {
            ",lock=late"
        };
        blkd.start(disk)?;
        let socket = dir.path().join("net.sock");
        let switch = netd::between(context, &socket, tap, &dir.path().join("netd.sock"))?;
        Ok(Self {
            disk: blkd.flag(&format!(",num_queues={QUEUES}")),
            net: format!("vhost_user=on,socket={},mac={MAC},id={NET}", socket.display()),
            config: json!({
                "disks": [{ "id": "served", "vhost_socket": blkd.socket() }],
                "net": [{ "id": NET, "vhost_socket": socket }],
            }),
            served: Some((blkd, switch, dir)),
        })
    }

    /// The disk and the interface of a guest that begins here.
    pub fn devices(&self, vm: VmBuilder) -> VmBuilder {
        vm.flag("--disk", &self.disk).flag("--net", &self.net)
    }

    /// What a guest that comes here is told of them.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What the daemons said last, for messages.
    pub fn last_words(&mut self) -> String {
        self.served.as_mut().map_or_else(String::new, |(blkd, switch, _)| {
            format!(
                "; the disk's daemon:{}; the switch:{}",
                blkd.last_words(),
                switch.last_words()
            )
        })
    }
}
