//! A Linux guest: a stock kernel, our own init, and its agent.

use crate::agent::{Agent, AgentError, Exec, Power, connect_socket};
use crate::images::Kernel;
use crate::suite::Context;
use crate::vm::{Ended, Vm, VmBuilder};
use crate::vsock;
use anyhow::{Context as _, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a guest prints when it has reached user space.
pub const BANNER: &str = "triarch-guest: user space reached";
/// How long a boot may take: the host may be emulated, and busy.
pub const BOOT: Duration = Duration::from_secs(120);
/// What a guest's command line needs for [`LinuxVm::backtrace`]; it says nothing to ARM's kernel.
pub const PANICS: &str = "unknown_nmi_panic=1";
/// How long a kernel takes to print a backtrace on a serial line, on a busy emulated host.
const PANIC: Duration = Duration::from_secs(20);
/// How long a guest may take for nothing, beyond what any is given.
const MOMENT: Duration = Duration::from_secs(5);
const AGENT_PORT: u32 = 1024;
const CID: u32 = 3;

/// How the agent in the guest is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Not at all: the command line says what the guest does.
    None,
    /// By vsock.
    Vsock,
    /// By the virtio console, on a socket.
    Console,
}

/// What Linux calls the serial line of a guest on this host.
pub fn serial_line() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "ttyAMA0",
        _ => "ttyS0",
    }
}

/// A Linux guest to be started: one vCPU, 256 MiB, the serial line on the VMM's standard output.
pub struct LinuxBuilder {
    vm: VmBuilder,
    channel: Channel,
    console: OsString,
    cmdline: String,
}

impl LinuxBuilder {
    /// A guest that starts `kernel` from its ELF file and whose agent is reached by vsock.
    ///
    /// # Errors
    /// An image is missing.
    pub fn new(context: &Context, kernel: Kernel) -> Result<Self> {
        let vm = VmBuilder::new(context)?
            .flag("--kernel", context.images.path(&kernel.elf())?)
            .flag("--initramfs", context.images.path(&kernel.initramfs())?)
            .flag("--serial", "tty")
            .cpus(1)
            .memory_mib(256);
        Ok(Self {
            vm,
            channel: Channel::Vsock,
            console: "off".into(),
            // A panic ends in a reset at once: a test shall not wait for nothing.
            cmdline: format!("console={} quiet panic=-1", serial_line()),
        })
    }

    /// Changes the VM.
    #[must_use]
    pub fn vm(mut self, change: impl FnOnce(VmBuilder) -> VmBuilder) -> Self {
        self.vm = change(self.vm);
        self
    }

    /// The VM's directory, which holds its sockets.
    pub fn dir(&self) -> &Path {
        self.vm.dir()
    }

    /// Adds to the kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, parameters: &str) -> Self {
        self.cmdline = format!("{} {parameters}", self.cmdline);
        self
    }

    /// Chooses how the agent is reached.
    #[must_use]
    pub fn channel(mut self, channel: Channel) -> Self {
        self.channel = channel;
        self
    }

    /// Sets where the virtio console goes; [`Channel::Console`] takes it for the agent.
    #[must_use]
    pub fn console(mut self, value: impl Into<OsString>) -> Self {
        self.console = value.into();
        self
    }

    /// Lets the guest run these shell commands and then power off, without an agent.
    #[must_use]
    pub fn run(self, commands: &str) -> Self {
        self.channel(Channel::None)
            .cmdline(&format!("triarch.run=\"{commands}\""))
    }

    /// Starts the VM and returns at once.
    ///
    /// # Errors
    /// The VMM cannot be started.
    pub fn start(self) -> Result<Vm> {
        let (vm, console, agent) = match self.channel {
            Channel::None => (self.vm, self.console, String::new()),
            Channel::Vsock => {
                let value = format!("cid={CID},socket={}", vsock_socket(self.vm.dir()).display());
                let agent = format!(" triarch.agent=vsock:{AGENT_PORT}");
                (self.vm.set("--vsock", value), self.console, agent)
            }
            Channel::Console => {
                let value = format!("socket={}", console_socket(self.vm.dir()).display());
                (self.vm, value.into(), " triarch.agent=console:hvc0".into())
            }
        };
        vm.set("--cmdline", self.cmdline + &agent)
            .set("--console", console)
            .start()
    }

    /// Starts the VM and waits until the guest's agent answers.
    ///
    /// # Errors
    /// The guest does not get so far.
    pub fn boot(self) -> Result<LinuxVm> {
        let channel = self.channel;
        let vm = self.start()?;
        let connected = vm
            .output()
            .wait_for(BANNER, 0, BOOT)
            .and_then(|_| connect(&vm, channel))
            .with_context(|| format!("the guest did not come up{}", vm.last_words()));
        Ok(LinuxVm {
            agent: connected?,
            vm,
            channel,
        })
    }
}

fn vsock_socket(dir: &Path) -> PathBuf {
    dir.join("vsock.sock")
}

fn console_socket(dir: &Path) -> PathBuf {
    dir.join("console.sock")
}

fn connect(vm: &Vm, channel: Channel) -> Result<Agent> {
    let stream = match channel {
        Channel::Console => connect_socket(console_socket(vm.dir()), BOOT)?,
        Channel::Vsock | Channel::None => vsock::connect(&vsock_socket(vm.dir()), AGENT_PORT, BOOT)?,
    };
    Ok(Agent::connect(stream, BOOT)?)
}

/// A Linux guest that runs.
pub struct LinuxVm {
    // First: the session ends before the VM.
    agent: Agent,
    vm: Vm,
    channel: Channel,
}

impl LinuxVm {
    /// A guest in `vm` that came up long ago, in another process: its agent is reached by vsock.
    ///
    /// Such a guest hears that its streams are gone, and may close the first new one with the old ones: then there is a second.
    ///
    /// # Errors
    /// It does not answer.
    pub fn attach(vm: Vm) -> Result<Self> {
        let channel = Channel::Vsock;
        let stays = || {
            let agent = connect(&vm, channel)?;
            agent.shell("sleep 1").map(|_| agent).map_err(anyhow::Error::from)
        };
        let lost = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(AgentError::Lost(_)));
        let agent = match stays() {
            Err(error) if lost(&error) => stays(),
            other => other,
        };
        let agent = agent.with_context(|| format!("no agent{}", vm.last_words()))?;
        Ok(Self { agent, vm, channel })
    }

    /// The guest's agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The socket of the vsock device.
    pub fn vsock_socket(&self) -> PathBuf {
        vsock_socket(self.vm.dir())
    }

    /// Runs a shell script in the guest that has to succeed, and gives what it printed. If the guest
    /// is lost, the error shows the VMM's last output.
    ///
    /// # Errors
    /// The script failed, or the guest did.
    pub fn shell(&self, script: &str) -> Result<String> {
        let lost = |e: &AgentError| e.is_machine_failure();
        self.agent.shell(script).map_err(|e| match lost(&e) {
            true => anyhow::Error::new(e).context(format!("the guest is lost{}", self.vm.last_words())),
            false => e.into(),
        })
    }

    /// The same guest, in which no request of the agent's takes longer than `limit`, unless a command says so.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.agent = self.agent.within(limit);
        self
    }

    /// Whether the agent answers: a guest that does not soon is lost.
    pub fn is_lost(&self) -> bool {
        let answer = self.agent.check(&Exec::shell("true").timeout(MOMENT));
        answer.is_err_and(|error| error.is_machine_failure())
    }

    /// The backtrace of a guest that was booted with [`PANICS`]: the VMM sends it a non-maskable interrupt, and its kernel panics, also one
    /// that hangs. That ends it. A VMM without an API, and an ARM guest, which has no such interrupt, give nothing.
    pub fn backtrace(&self) -> String {
        let out = self.vm.output();
        let before = out.len();
        if self.vm.api().is_ok_and(|api| api.put("vm.nmi", None).is_ok()) {
            // Then the kernel says that this is the end, and resets: what firmware or the next kernel says is of no interest.
            let _ = out.wait_for("Kernel panic", before, PANIC);
            let _ = out.wait_for("Kernel Offset", before, PANIC);
        }
        let text = out.text();
        let said = text.get(before..).unwrap_or_default();
        let end = said.find("Kernel Offset").unwrap_or(said.len());
        said[..end].to_owned()
    }

    /// Restarts the guest and waits until its agent answers again.
    ///
    /// # Errors
    /// It does not come back.
    pub fn reboot(self) -> Result<Self> {
        let Self { agent, vm, channel } = self;
        let before = vm.output().len();
        agent.power(Power::Reboot)?;
        vm.output().wait_for(BANNER, before, BOOT)?;
        drop(agent);
        let agent = connect(&vm, channel).with_context(|| format!("no agent after a restart{}", vm.last_words()))?;
        Ok(Self { agent, vm, channel })
    }

    /// Powers the guest off; the VMM has to end with exit code 0.
    ///
    /// # Errors
    /// It does not.
    pub fn power_off(self) -> Result<Ended> {
        let Self { agent, vm, .. } = self;
        agent.power(Power::Poweroff)?;
        drop(agent);
        vm.expect_end(0)
    }

    /// Ends the session with the guest, and gives the VM.
    pub fn into_vm(self) -> Vm {
        self.vm
    }
}
