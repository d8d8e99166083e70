//! One vCPU and why it stopped running.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};

/// Why the guest stopped running on a vCPU.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Reads `size` bytes from a port, again and again until `data` is full (one time but for string instructions).
    PortIn {
        /// The port.
        port: u16,
        /// Bytes per access: 1, 2 or 4.
        size: usize,
        /// Where the guest gets them.
        data: &'a mut [u8],
    },
    /// Writes `size` bytes to a port, again and again until `data` is empty.
    PortOut {
        /// The port.
        port: u16,
        /// Bytes per access: 1, 2 or 4.
        size: usize,
        /// What the guest writes.
        data: &'a [u8],
    },
    /// Reads memory that is not RAM.
    MmioRead {
        /// Address (GPA).
        address: u64,
        /// Where the guest gets the value.
        data: &'a mut [u8],
    },
    /// Writes memory that is not RAM.
    MmioWrite {
        /// Address (GPA).
        address: u64,
        /// The value.
        data: &'a [u8],
    },
    /// Nothing happened: a signal. Run again.
    Interrupted,
    /// The vCPU waits to be started by another, or has just been. Run again.
    Waiting,
    /// The vCPU shut down (triple fault on x86): the machine resets.
    Shutdown,
    /// The guest asked its firmware interface for this (KVM_SYSTEM_EVENT_*; PSCI on ARM).
    SystemEvent(u32),
    /// The guest stopped for good in an architecture without an interrupt controller in the kernel.
    Halted,
    /// The guest called its firmware with this function number, see [`Firmware`](crate::Firmware).
    Call(u64),
    /// KVM cannot run the guest any further.
    Failed(String),
}

/// A vCPU. Only the thread that runs it uses it.
pub struct Vcpu {
    fd: VcpuFd,
    run: NonNull<kvm_bindings::kvm_run>,
}

// SAFETY: the pointer is to the kvm_run page, which `fd` keeps mapped and which belongs to no thread in particular; a `Vcpu` is used
// by one thread at a time.
unsafe impl Send for Vcpu {}

impl Vcpu {
    pub(crate) fn new(mut fd: VcpuFd) -> Self {
        let run = NonNull::from(fd.get_kvm_run());
        Self { fd, run }
    }

    /// The kernel's descriptor, for what is specific to an architecture.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// A switch that makes [`run`](Self::run) return at once, safe to use from a signal handler of the vCPU's own thread.
    pub fn immediate_exit(&self) -> ImmediateExit {
        ImmediateExit(self.run)
    }

    /// Runs the guest until it needs the VMM.
    pub fn run(&mut self) -> io::Result<Exit<'_>> {
        let page = self.run.as_ptr();
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            // EAGAIN: an application processor that waits to be started.
            Err(error) if error.errno() == libc::EAGAIN => return Ok(Exit::Waiting),
            Err(error) if error.errno() == libc::EINTR => return Ok(Exit::Interrupted),
            Err(error) => return Err(error.into()),
        };
        // SAFETY: the page is mapped as long as `self.fd` lives, and this union field is valid whenever the exit is port I/O, which
        // are the only arms that use the value. It is plain data, so reading it at another exit is merely meaningless.
        let size = || usize::from(unsafe { (*page).__bindgen_anon_1.io.size }).max(1);
        Ok(match exit {
            VcpuExit::IoIn(port, data) => Exit::PortIn {
                port,
                size: size(),
                data,
            },
            VcpuExit::IoOut(port, data) => Exit::PortOut {
                port,
                size: size(),
                data,
            },
            VcpuExit::MmioRead(address, data) => Exit::MmioRead { address, data },
            VcpuExit::MmioWrite(address, data) => Exit::MmioWrite { address, data },
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Interrupted,
            VcpuExit::Shutdown => Exit::Shutdown,
            VcpuExit::SystemEvent(kind, _) => Exit::SystemEvent(kind),
            VcpuExit::Hlt => Exit::Halted,
            VcpuExit::Hypercall(call) => Exit::Call(call.nr),
            VcpuExit::FailEntry(reason, cpu) => Exit::Failed(format!(
                "the CPU refused to enter the guest: reason {reason:#x} on host CPU {cpu}"
            )),
            VcpuExit::InternalError => {
                // SAFETY: as above; `internal` is valid at this exit.
                let suberror = unsafe { (*page).__bindgen_anon_1.internal.suberror };
                Exit::Failed(format!("KVM met an internal error, suberror {suberror}"))
            }
            VcpuExit::MemoryFault { gpa, size, .. } => {
                Exit::Failed(format!("KVM cannot provide the guest memory {gpa:#x}+{size:#x}"))
            }
            other => Exit::Failed(format!("KVM stopped the guest for an unexpected reason: {other:?}")),
        })
    }

    /// Lets KVM finish the instruction whose I/O was just served, without running the guest any further: the registers are whole when
    /// this returns [`Exit::Interrupted`]. An access that KVM splits comes in parts; each other exit is one more of them, to be served
    /// before this is called again.
    pub fn complete_io(&mut self) -> io::Result<Exit<'_>> {
        self.immediate_exit().set(true);
        let switch = self.immediate_exit();
        let exit = self.run();
        switch.set(false);
        exit
    }
}

/// See [`Vcpu::immediate_exit`]. Not to be used after its [`Vcpu`] is gone.
#[derive(Clone, Copy)]
pub struct ImmediateExit(NonNull<kvm_bindings::kvm_run>);

impl ImmediateExit {
    /// Whether the next run returns at once.
    pub fn set(self, on: bool) {
        // SAFETY: the vCPU (and with it the page) is alive by the contract of this type; the kernel reads the byte when KVM_RUN
        // starts, so it is accessed as an atomic.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}
