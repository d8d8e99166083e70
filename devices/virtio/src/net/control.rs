//! The control queue (virtio 1.2, 5.1.6.5).

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use triarch_device_core::{Sandbox, ThreadClass, Worker};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::features as f;
use super::port::{NetPort, Status};
use crate::{Chain, ChainReader, RingFault, VirtQueue};

const OK: u8 = 0;
const ERR: u8 = 1;
/// The largest VLAN id and one.
const VLAN_IDS: u16 = 4096;

/// What the control queue's thread owns while it runs.
pub(super) struct Control {
    pub(super) name: String,
    pub(super) queue: VirtQueue,
    pub(super) port: Arc<NetPort>,
}

impl Control {
    pub(super) fn spawn(self, sandbox: &Arc<dyn Sandbox>) -> io::Result<Worker<Control>> {
        let epoll = Epoll::new()?;
        let kick = self.queue.kick().as_raw_fd();
        epoll.ctl(ControlOperation::Add, kick, EpollEvent::new(EventSet::IN, 1))?;
        let name = self.name.clone();
        Worker::spawn(&name, ThreadClass::Net, sandbox, self, move |control, stop| {
            if let Err(error) = control.run(&epoll, stop) {
                tracing::error!("{} stopped: {error}", control.name);
            }
        })
    }

    fn run(&mut self, epoll: &Epoll, stop: &EventFd) -> io::Result<()> {
        epoll.ctl(
            ControlOperation::Add,
            stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN, 0),
        )?;
        loop {
            self.serve();
            let mut events = [EpollEvent::default(); 2];
            let n = match epoll.wait(-1, &mut events) {
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if events[..n].iter().any(|e| e.data() == 0) {
                return Ok(());
            }
            // It is only read to make it unreadable.
            let _ = self.queue.kick().read();
        }
    }

    /// Answers every command there is.
    fn serve(&mut self) {
        loop {
            let Some(chain) = self.queue.pop() else {
                if self.queue.arm() {
                    continue;
                }
                return;
            };
            self.answer(&chain);
            self.queue.signal();
        }
    }

    fn answer(&mut self, chain: &Chain) {
        if chain.writable_len() == 0 {
            let fault = RingFault::Request("a control command has no room for its answer");
            return self.queue.fault(&fault);
        }
        let memory = self.queue.memory();
        let done = self.execute(&mut chain.reader(&memory));
        let answer = if done.is_some() { OK } else { ERR };
        let written = match chain.writer(&memory).write_all(&[answer]) {
            Ok(()) => 1,
            Err(_) => 0,
        };
        self.queue.complete(chain.head(), written);
    }

    /// Does what the command says; `None` when it is malformed, was not negotiated or the host refuses.
    fn execute(&self, command: &mut ChainReader<'_>) -> Option<()> {
        let [class, code] = take(command)?;
        let mut status = self.port.status();
        let features = status.driver.as_ref()?.features;
        let has = |feature: u64| (features & feature != 0).then_some(());
        match (class, code) {
            (0, _) => {
                has(if code < 2 { f::CTRL_RX } else { f::CTRL_RX_EXTRA })?;
                rx_mode(&mut status, code, take(command)?)
            }
            (1, 0) => {
                has(f::CTRL_RX)?;
                mac_table(command).and_then(|()| mac_table(command))
            }
            (1, 1) => {
                has(f::CTRL_MAC_ADDR)?;
                status.state.mac = take(command)?;
                Some(())
            }
            (2, 0 | 1) => {
                has(f::CTRL_VLAN)?;
                // The host's end takes tagged frames as they are.
                (u16::from_le_bytes(take(command)?) < VLAN_IDS).then_some(())
            }
            (3, 0) => {
                has(f::GUEST_ANNOUNCE)?;
                status.state.announce = false;
                Some(())
            }
            (4, 0) => {
                has(f::MQ)?;
                let pairs = u16::from_le_bytes(take(command)?);
                (1..=self.port.pairs()).contains(&pairs).then_some(())?;
                self.port.use_pairs(pairs).ok()?;
                status.state.pairs = pairs;
                Some(())
            }
            (5, 0) => {
                has(f::CTRL_GUEST_OFFLOADS)?;
                let offloads = u64::from_le_bytes(take(command)?);
                (offloads & !f::guest_offloads(features) == 0).then_some(())?;
                self.port.use_offloads(offloads).ok()?;
                status.state.offloads = offloads;
                Some(())
            }
            _ => None,
        }
    }
}

fn take<const N: usize>(command: &mut ChainReader<'_>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    command.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

fn rx_mode(status: &mut Status, code: u8, [on]: [u8; 1]) -> Option<()> {
    let mode = &mut status.state.rx_mode;
    let flag = match code {
        0 => &mut mode.promiscuous,
        1 => &mut mode.all_multicast,
        2 => &mut mode.all_unicast,
        3 => &mut mode.no_multicast,
        4 => &mut mode.no_unicast,
        5 => &mut mode.no_broadcast,
        _ => return None,
    };
    *flag = on != 0;
    Some(())
}

/// Passes over a table of addresses to filter by. Every frame is passed on, so it only has to be there as a whole.
fn mac_table(command: &mut ChainReader<'_>) -> Option<()> {
    let entries = u32::from_le_bytes(take(command)?);
    let bytes = entries.checked_mul(6).filter(|n| *n <= command.left())?;
    command.take_segments(bytes).ok().map(|_| ())
}
