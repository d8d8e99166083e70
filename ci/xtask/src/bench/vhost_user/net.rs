//! Two guests on one switch: frames from one to the other, large segments, and frames there and back.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use triarch_harness::net::enter_namespace;
use triarch_harness::process::Process;

use super::Args;
use super::cpu::Cpu;
use super::guest::{Guest, number};
use super::setup::{Front, Programs, share_memory, wait_for};
use crate::tools;

/// Entries of each queue, and receive buffers.
const QUEUE: u32 = 512;
/// What a guest that listens does longer than the one that sends.
const LISTEN_MS: u64 = 300;
const SETTLE: Duration = Duration::from_millis(100);
/// Data of a large segment, and how much of it fits into a frame.
const SEGMENT: u32 = 65_160;
const MSS: u32 = 1448;
/// The device cuts TCP segments, the guest takes large ones (virtio 1.2 §5.1.3).
const HOST_TSO4: u64 = 1 << 11;

/// What connects the guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// Linux's, with a tap interface each.
    Bridge,
    /// DPDK's, which looks for packets all the time.
    Testpmd,
    /// This project's daemon.
    Netd,
}

impl Switch {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Bridge, Self::Testpmd, Self::Netd];
}

impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bridge => "Linux's bridge",
            Self::Testpmd => "dpdk-testpmd",
            Self::Netd => "triarch-netd",
        })
    }
}

/// What the guests do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// Frames of 64 bytes, one way.
    Small,
    /// TCP segments of 64 KiB, one way; whole frames where the switch takes no segments.
    Large,
    /// A frame of 64 bytes there and one back.
    Turns,
}

impl Traffic {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Small, Self::Large, Self::Turns];
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small => "frames of 64 bytes",
            Self::Large => "segments of 64 KiB",
            Self::Turns => "64 bytes there and back",
        })
    }
}

/// What one measurement gave.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Frames a second that came; MiB a second of large ones; turns a second.
    pub rate: f64,
    /// Microseconds that half of the turns took at most; 0 else.
    pub p50: f64,
    /// Microseconds that 99 of 100 turns took at most; 0 else.
    pub p99: f64,
    /// Microseconds of CPU for each frame, segment or turn: both VMMs with their guests, and the switch.
    pub cpu: f64,
    /// Part of the frames that did not come.
    pub lost: f64,
}

/// Two guests and what connects them. All ends when this is dropped.
pub struct Setup {
    /// The VMM of both.
    pub front: Front,
    /// What connects them.
    pub switch: Switch,
    vmms: [Process; 2],
    daemon: Option<Process>,
    guests: [Guest; 2],
    _dir: TempDir,
}

/// All samples: by traffic, then setup, then round.
pub type Samples = Vec<Vec<Vec<Sample>>>;

/// Starts what is needed and measures it. Moves this thread into a network namespace.
///
/// # Errors
/// A program does not start, or the guests do not reach each other.
pub fn run(programs: &Programs, traffics: &[Traffic], args: &Args) -> Result<(Vec<Setup>, Samples)> {
    enter_namespace()?;
    let mut setups = tools::step("starting pairs of guests", || {
        let pairs = Switch::ALL.into_iter();
        let pairs = pairs.flat_map(|switch| [(Front::Triarch, switch), (Front::Qemu, switch)]);
        let starts = pairs.map(|(front, switch)| {
            Setup::start(programs, front, switch).with_context(|| format!("{front} on {switch}"))
        });
        starts.collect::<Result<Vec<_>>>()
    })?;
    let what = format!(
        "{} kinds of traffic on {} setups, {} rounds",
        traffics.len(),
        setups.len(),
        args.rounds
    );
    let samples = tools::step(&what, || {
        let mut samples: Samples = traffics
            .iter()
            .map(|_| setups.iter().map(|_| Vec::new()).collect())
            .collect();
        for round in 0..=args.rounds {
            for (traffic, samples) in traffics.iter().zip(&mut samples) {
                for turn in 0..setups.len() {
                    // Another one begins each time: none always follows the same.
                    let at = (turn + round as usize) % setups.len();
                    let setup = &mut setups[at];
                    let (front, switch) = (setup.front, setup.switch);
                    let sample = setup.sample(*traffic, args.ms);
                    let sample = sample.with_context(|| format!("{traffic}: {front} on {switch}"))?;
                    // The first round warms caches.
                    if round > 0 {
                        samples[at].push(sample);
                    }
                }
            }
        }
        Ok(samples)
    })?;
    Ok((setups, samples))
}

/// The address of a guest's interface.
fn mac(guest: usize) -> String {
    format!("52:54:00:00:00:{:02x}", guest + 1)
}

impl Setup {
    fn start(programs: &Programs, front: Front, switch: Switch) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let name = match front {
            Front::Triarch => "t",
            Front::Qemu => "q",
        };
        let bridge = format!("br-{name}");
        let busybox = |words: &[&str]| tools::output(Command::new(&programs.rig.busybox).args(words));
        let sockets = [0, 1].map(|guest| dir.path().join(format!("net{guest}.sock")));
        let daemon = match switch {
            Switch::Bridge => {
                busybox(&["brctl", "addbr", &bridge])?;
                busybox(&["ip", "link", "set", &bridge, "up"])?;
                None
            }
            Switch::Testpmd => Some(programs.testpmd(&sockets)),
            Switch::Netd => Some(programs.netd(&sockets)),
        };
        let mut daemon = daemon.map(|mut command| Process::start(&mut command)).transpose()?;
        if let Some(daemon) = &mut daemon {
            sockets.iter().try_for_each(|socket| wait_for(daemon, socket))?;
        }
        let start = |guest: usize| -> Result<(Process, Guest)> {
            let serial = dir.path().join(format!("serial{guest}.sock"));
            let tap = format!("tap-{name}{guest}");
            let mut command = programs.vmm(front, &serial);
            if switch == Switch::Bridge {
                on_tap(&mut command, front, &tap, &mac(guest));
            } else {
                on_socket(&mut command, front, &sockets[guest], &mac(guest));
            }
            let mut vmm = Process::start(&mut command)?;
            let guest = Guest::attach(&mut vmm, &serial)?;
            if switch == Switch::Bridge {
                busybox(&["brctl", "addif", &bridge, &tap])?;
                busybox(&["ip", "link", "set", &tap, "up"])?;
            }
            Ok((vmm, guest))
        };
        let (first, second) = (start(0)?, start(1)?);
        let setup = Self {
            front,
            switch,
            vmms: [first.0, second.0],
            daemon,
            guests: [first.1, second.1],
            _dir: dir,
        };
        setup.hold(true)?;
        Ok(setup)
    }

    /// Stops a daemon that is never idle, or lets it go on: it would take a processor from who is measured.
    fn hold(&self, hold: bool) -> Result<()> {
        let signal = if hold { "-STOP" } else { "-CONT" };
        match &self.daemon {
            Some(daemon) if self.switch == Switch::Testpmd => {
                tools::output(Command::new("kill").args([signal, &daemon.pid().to_string()])).map(drop)
            }
            _ => Ok(()),
        }
    }

    fn sample(&mut self, traffic: Traffic, ms: u64) -> Result<Sample> {
        self.hold(false)?;
        let sample = self.measure(traffic, ms);
        self.hold(true)?;
        sample
    }

    /// CPU time of all its processes.
    fn cpu(&self) -> Result<Duration> {
        let processes = self.vmms.iter().chain(&self.daemon);
        processes.map(|p| Cpu::of(p.pid()).map(|cpu| cpu.all())).sum()
    }

    fn measure(&mut self, traffic: Traffic, ms: u64) -> Result<Sample> {
        let mut segments = true;
        for guest in &mut self.guests {
            let offload = u8::from(traffic == Traffic::Large);
            let said = guest.ask(&format!("net 0 init size={QUEUE} buffers={QUEUE} offload={offload}"))?;
            segments &= hexadecimal(&said, "features")? & HOST_TSO4 != 0;
            // So the switch knows where each is.
            guest.ask("net 0 send 60 1 1")?;
        }
        std::thread::sleep(SETTLE);
        let before = self.cpu()?;
        let [sender, receiver] = &mut self.guests;
        let listen = ms + LISTEN_MS;
        let (there, back) = (mac(1), mac(0));
        let (listens, sends) = match traffic {
            Traffic::Small => (format!("sink {listen}"), format!("flood {there} 64 {ms}")),
            Traffic::Large if segments => (
                format!("sink {listen} tcp"),
                format!("flood {there} {SEGMENT} {ms} mss={MSS}"),
            ),
            Traffic::Large => (format!("sink {listen}"), format!("flood {there} 1514 {ms}")),
            Traffic::Turns => (format!("answer {back} 64 {listen}"), format!("turns {there} 64 {ms}")),
        };
        receiver.tell(&format!("net 0 {listens}"))?;
        std::thread::sleep(SETTLE);
        let sent = sender.ask(&format!("net 0 {sends}"))?;
        let came = receiver.answer()?;
        let cpu = self.cpu()?.saturating_sub(before).as_secs_f64() * 1e6;
        if traffic == Traffic::Turns {
            let turns = number(&sent, "turns")?;
            return Ok(Sample {
                rate: turns * 1000.0 / ms as f64,
                p50: number(&sent, "ns_p50")? / 1000.0,
                p99: number(&sent, "ns_p99")? / 1000.0,
                cpu: cpu / turns,
                lost: 0.0,
            });
        }
        let (frames, seconds) = (number(&came, "frames")?, number(&came, "us")? / 1e6);
        ensure!(frames > 1.0 && seconds > 0.0, "nothing came: {came}, of {sent}");
        let rate = match traffic {
            Traffic::Large => number(&came, "bytes")? / 1_048_576.0 / seconds,
            _ => frames / seconds,
        };
        Ok(Sample {
            rate,
            p50: 0.0,
            p99: 0.0,
            cpu: cpu / frames,
            // What was in flight when the sender stopped counting came, too.
            lost: (1.0 - frames / number(&sent, "frames")?).max(0.0),
        })
    }
}

fn hexadecimal(answer: &str, key: &str) -> Result<u64> {
    let word = answer.split(' ').find_map(|w| w.strip_prefix(key)?.strip_prefix("=0x"));
    let word = word.with_context(|| format!("no {key} in `{answer}`"))?;
    Ok(u64::from_str_radix(word, 16)?)
}

/// Gives a VMM an interface on the tap of this name.
fn on_tap(command: &mut Command, front: Front, tap: &str, mac: &str) {
    match front {
        Front::Triarch => {
            command.args(["--net", &format!("tap={tap},mac={mac},queue_size={QUEUE}")]);
        }
        Front::Qemu => {
            let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off");
            let device = format!("virtio-net-pci,netdev=net,mac={mac},rx_queue_size={QUEUE}");
            command.args(["-netdev", &netdev, "-device", &device]);
        }
    }
}

/// Gives a VMM an interface that the daemon at `socket` serves.
fn on_socket(command: &mut Command, front: Front, socket: &Path, mac: &str) {
    let socket = socket.display();
    match front {
        Front::Triarch => {
            let net = format!("vhost_user=on,vhost_socket={socket},mac={mac},queue_size={QUEUE}");
            command.args(["--net", &net]);
        }
        Front::Qemu => {
            share_memory(command);
            command.args(["-chardev", &format!("socket,id=switch,path={socket}")]);
            let sizes = format!("rx_queue_size={QUEUE},tx_queue_size={QUEUE}");
            let device = format!("virtio-net-pci,netdev=net,mac={mac},{sizes}");
            command.args(["-netdev", "vhost-user,id=net,chardev=switch", "-device", &device]);
        }
    }
}

impl Programs {
    /// From one socket to the other; with statistics, as it would end otherwise when there is no terminal.
    fn testpmd(&self, sockets: &[PathBuf; 2]) -> Command {
        let mut command = Command::new(&self.testpmd);
        // Several run side by side: no files that they would share.
        command.args([
            "-l",
            "0-1",
            "--no-pci",
            "--no-huge",
            "-m",
            "256",
            "--no-telemetry",
            "--no-shconf",
        ]);
        let parts = self.testpmd.with_extension("d");
        for plugin in ["librte_net_vhost.so.25", "librte_mempool_ring.so.25"] {
            command.arg("-d").arg(parts.join(plugin));
        }
        for (n, socket) in sockets.iter().enumerate() {
            let device = format!("net_vhost{n},iface={},tso=1,legacy-ol-flags=1", socket.display());
            command.args(["--vdev", &device]);
        }
        let multiple_segments = "--tx-offloads=0x8000";
        command.args([
            "--",
            "--forward-mode=io",
            "--auto-start",
            "--total-num-mbufs=16384",
            multiple_segments,
        ]);
        command.arg("--stats-period=3600");
        command
    }

    fn netd(&self, sockets: &[PathBuf; 2]) -> Command {
        let mut command = Command::new(&self.netd);
        for (n, socket) in sockets.iter().enumerate() {
            command.args(["--port", &format!("name=guest{n},socket={}", socket.display())]);
        }
        command
    }
}
