//! Gets a vCPU thread out of the guest.
//!
//! A signal interrupts KVM_RUN; its handler also sets `immediate_exit`, so that a signal which arrives just before KVM_RUN is not
//! lost: the run that follows returns at once.

use std::cell::Cell;
use std::io;
use std::thread::JoinHandle;

use rustix::thread::{Pid, gettid};
use triarch_hypervisor::{ImmediateExit, Vcpu};
use vmm_sys_util::signal::{Killable, register_signal_handler};

/// The signal used.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

thread_local! {
    static CURRENT: Cell<Option<ImmediateExit>> = const { Cell::new(None) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A thread that is ending has no cell any more, and nothing to leave.
    let _ = CURRENT.try_with(|current| {
        if let Some(switch) = current.get() {
            switch.set(true);
        }
    });
}

/// Installs the handler, once per process and before the first vCPU thread.
pub fn install_kick_signal() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick).map_err(io::Error::from)
}

/// Interrupts the guest on another thread.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) -> io::Result<()> {
    thread.kill(kick_signal()).map_err(io::Error::from)
}

/// A thread that runs a vCPU, for others that do not own it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThreadId(Pid);

impl ThreadId {
    /// The calling thread.
    pub(crate) fn current() -> Self {
        // Not libc's: the standard library has a weak reference to it, and the optimizer makes one weak reference of both, for which the
        // linker fetches nothing from a static libc.
        Self(gettid())
    }

    /// Interrupts the guest on it. One that has ended has nothing to leave.
    pub(crate) fn kick(self) {
        // SAFETY: a signal of ours, to a thread of this process by its number. Whatever thread has the number now, the handler of the
        // signal does nothing where no vCPU runs.
        let _ = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0.as_raw_nonzero(), kick_signal()) };
    }
}

/// Makes the calling thread the one that runs `vcpu`, for as long as the guard lives.
pub(crate) struct Running;

impl Running {
    pub(crate) fn enter(vcpu: &Vcpu) -> Self {
        CURRENT.set(Some(vcpu.immediate_exit()));
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.set(None);
    }
}
