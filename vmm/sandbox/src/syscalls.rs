//! Which system calls each class of thread needs, and why.

use libc::*;
use triarch_device_core::ThreadClass;

/// One permission.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Allowed {
    /// The call, whatever its arguments.
    Call(i64),
    /// The call if its argument number `arg` is `value`, compared in 32 bits.
    With {
        /// Number of the call.
        number: i64,
        /// Index of the argument.
        arg: u8,
        /// What it must be.
        value: u64,
    },
}

/// Everything a Rust thread may do at any time: memory, locks, time, waiting on descriptors it has, logging, dying.
const BASE: &[i64] = &[
    SYS_brk,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_exit,
    SYS_exit_group,
    SYS_fcntl,
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_madvise,
    SYS_mmap,
    SYS_mprotect,
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_ppoll,
    SYS_read,
    SYS_readv,
    SYS_restart_syscall,
    SYS_rseq,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_yield,
    SYS_set_robust_list,
    SYS_sigaltstack,
    SYS_tgkill,
    SYS_write,
    SYS_writev,
];

/// Descriptors to wait with, which devices make when a driver starts them.
const EVENTS: &[i64] = &[
    SYS_dup,
    SYS_epoll_create1,
    SYS_eventfd2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
];

/// Submitting disk requests.
const DISK: &[i64] = &[
    SYS_fallocate,
    SYS_fdatasync,
    SYS_fstat,
    SYS_fsync,
    SYS_io_uring_enter,
    SYS_io_uring_register,
    SYS_io_uring_setup,
    SYS_lseek,
    SYS_preadv,
    SYS_preadv2,
    SYS_pread64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_pwrite64,
    SYS_statx,
];

/// Unix sockets of vsock and consoles. Making them is limited to AF_UNIX beside this list.
const SOCKETS: &[i64] = &[
    SYS_accept4,
    SYS_bind,
    SYS_connect,
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_listen,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_setsockopt,
    SYS_shutdown,
    SYS_unlinkat,
];

/// Reading at places of files that others opened: what the kernel counts, from /proc.
const METRICS: &[i64] = &[SYS_pread64];

/// Sending lines to a daemon, also to the one that took the place of the first. Files are open before.
const REPORT: &[i64] = &[SYS_connect, SYS_sendto];

/// What a daemon is given: rings in memory that both have, a file where it notes what it has, and a socket for its requests.
const SHARED: &[i64] = &[
    SYS_ftruncate,
    SYS_memfd_create,
    SYS_pread64,
    SYS_pwrite64,
    SYS_socketpair,
    SYS_sysinfo,
];

/// Giving memory that other processes map back to the host.
const MEMORY: &[i64] = &[SYS_fallocate, SYS_mbind];

/// Letting a guest reach memory, and taking it away.
const MEMORY_SLOTS: &[u64] = &[0x4020_ae46]; // KVM_SET_USER_MEMORY_REGION

/// Reading guest memory where it has something, and what the guest wrote; giving it back to the host.
const MIGRATION: &[i64] = &[SYS_fallocate, SYS_lseek, SYS_pread64, SYS_fdatasync];

/// Not waiting for a socket, as the standard library asks for it.
const NO_WAIT: &[u64] = &[0x5421]; // FIONBIO

/// What of memory was written, by KVM's account.
const DIRTY_LOG: &[u64] = &[
    0x4010_ae42, // KVM_GET_DIRTY_LOG
    0xc018_aec0, // KVM_CLEAR_DIRTY_LOG
    0xaec7,      // KVM_RESET_DIRTY_RINGS
];

/// Serving page faults of guest memory, from a file that others opened.
const PAGER: &[u64] = &[
    0xc020_aa00, // UFFDIO_REGISTER
    0x8010_aa01, // UFFDIO_UNREGISTER
    0x8010_aa02, // UFFDIO_WAKE
    0xc028_aa03, // UFFDIO_COPY
    0xc020_aa04, // UFFDIO_ZEROPAGE
];

/// Building a machine, again after a guest's reset: files, threads, terminals, taps.
const BUILD: &[i64] = &[
    SYS_clone,
    SYS_clone3,
    SYS_dup3,
    SYS_faccessat,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_flock,
    SYS_fstat,
    SYS_fstatfs,
    SYS_ftruncate,
    SYS_geteuid,
    SYS_getdents64,
    SYS_getpgid,
    SYS_getuid,
    SYS_mbind,
    SYS_memfd_create,
    SYS_mkdirat,
    SYS_newfstatat,
    SYS_openat,
    SYS_pipe2,
    SYS_prctl,
    SYS_prlimit64,
    SYS_readlinkat,
    SYS_renameat,
    SYS_rt_sigtimedwait,
    SYS_sched_getaffinity,
    SYS_seccomp,
    SYS_signalfd4,
    SYS_socketpair,
    SYS_statx,
    SYS_sysinfo,
    SYS_uname,
    SYS_userfaultfd,
    SYS_wait4,
];

/// KVM, while the guest runs: entering it, what moving a BAR or an MSI means, starting and stopping a vCPU.
const KVM_RUNNING: &[u64] = &[
    0xae80,      // KVM_RUN
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0x4010_aeab, // KVM_GET_ONE_REG
    0x4010_aeac, // KVM_SET_ONE_REG
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x4020_aeae, // KVM_ARM_VCPU_INIT
];

/// Devices of the host, while the guest runs: their interrupts, and resetting one. Their registers are read and written, too.
const VFIO_RUNNING: &[u64] = &[
    0x3b6e, // VFIO_DEVICE_SET_IRQS
    0x3b6f, // VFIO_DEVICE_RESET
];

/// The same, while they go to another host: what they are, and what memory they wrote.
const VFIO_MOVING: &[u64] = &[
    0x3b6f, // VFIO_DEVICE_RESET
    0x3b75, // VFIO_DEVICE_FEATURE
    0x3b79, // VFIO_MIG_GET_PRECOPY_INFO
];

/// Reading and writing registers.
const REGISTERS: &[i64] = &[SYS_pread64, SYS_pwrite64];

/// Memory that devices of the host reach.
const DMA: &[u64] = &[
    0x3b69, // VFIO_GROUP_UNSET_CONTAINER: whoever has it last
    0x3b70, // VFIO_IOMMU_GET_INFO
    0x3b71, // VFIO_IOMMU_MAP_DMA
    0x3b72, // VFIO_IOMMU_UNMAP_DMA
    0x3b80, // IOMMU_DESTROY
    0x3b84, // IOMMU_IOAS_IOVA_RANGES
    0x3b85, // IOMMU_IOAS_MAP
    0x3b86, // IOMMU_IOAS_UNMAP
];

/// KVM, while the guest is paused: reading all of a vCPU. Numbers that only one architecture has are refused by the other.
const KVM_SAVING: &[u64] = &[
    0x8090_ae81, // KVM_GET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x8400_ae8e, // KVM_GET_LAPIC
    0xc008_ae91, // KVM_GET_CPUID2
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0xaea3,      // KVM_GET_TSC_KHZ
    0x9000_aea4, // KVM_GET_XSAVE
    0x8188_aea6, // KVM_GET_XCRS
    0xc080_aebe, // KVM_GET_NESTED_STATE
    0xc008_aeb0, // KVM_GET_REG_LIST
    0x9000_aecf, // KVM_GET_XSAVE2
    0x4018_aee2, // KVM_GET_DEVICE_ATTR
];

/// Taps.
const TUN: &[u64] = &[
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54d9, // TUNSETQUEUE
];

/// Block devices.
const BLOCK: &[u64] = &[
    0x1277,      // BLKDISCARD
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
];

/// Terminals.
const TERMINAL: &[u64] = &[
    0x5403, // TCSETSW
    0x5413, // TIOCGWINSZ
    0x5421, // FIONBIO
    0x541b, // FIONREAD
];

/// A panic on any thread gives the terminal back before it is reported.
const PANIC: &[u64] = &[
    0x5401, // TCGETS: the C library looks whether the settings were taken
    0x5402, // TCSETS
];

fn calls(list: &'static [i64]) -> impl Iterator<Item = Allowed> {
    list.iter().map(|number| Allowed::Call(*number))
}

fn ioctls(list: &'static [u64]) -> impl Iterator<Item = Allowed> {
    list.iter().map(|request| Allowed::With {
        number: SYS_ioctl,
        arg: 1,
        value: *request,
    })
}

fn sockets(families: &'static [i32]) -> impl Iterator<Item = Allowed> {
    families.iter().map(|family| Allowed::With {
        number: SYS_socket,
        arg: 0,
        value: *family as u64,
    })
}

fn unix_sockets() -> impl Iterator<Item = Allowed> {
    sockets(&[AF_UNIX])
}

/// What threads of `class` may do.
pub(crate) fn of(class: ThreadClass) -> Vec<Allowed> {
    let base = calls(BASE).chain(ioctls(PANIC));
    match class {
        ThreadClass::Vcpu => base
            .chain(calls(EVENTS))
            .chain(ioctls(KVM_RUNNING))
            .chain(ioctls(KVM_SAVING))
            .chain(ioctls(VFIO_RUNNING))
            // Registers that a guest moves, for other devices.
            .chain(ioctls(DMA))
            .chain(calls(REGISTERS))
            .chain(activation())
            .collect(),
        ThreadClass::Disk => base
            .chain(calls(EVENTS))
            .chain(calls(DISK))
            .chain(ioctls(BLOCK))
            .collect(),
        ThreadClass::Net => base.chain(calls(EVENTS)).chain(ioctls(TUN)).collect(),
        // Tags of packets come beside them, and with no other flag is a message taken.
        ThreadClass::Switch => base
            .chain(calls(EVENTS))
            .chain([Allowed::With {
                number: SYS_recvmsg,
                arg: 2,
                value: MSG_DONTWAIT as u64,
            }])
            .collect(),
        ThreadClass::Vsock => base
            .chain(calls(EVENTS))
            .chain(calls(SOCKETS))
            .chain(unix_sockets())
            .collect(),
        ThreadClass::Http => base
            .chain(calls(EVENTS))
            .chain(calls(SOCKETS))
            .chain(calls(METRICS))
            .collect(),
        ThreadClass::Report => base.chain(calls(REPORT)).collect(),
        ThreadClass::VhostUser => base
            .chain(calls(EVENTS))
            .chain(calls(SOCKETS))
            .chain(calls(SHARED))
            .chain(unix_sockets())
            .collect(),
        ThreadClass::BackEnd => base
            .chain(unix_sockets())
            .chain(calls(EVENTS))
            .chain(calls(SOCKETS))
            .chain(calls(SHARED))
            .chain(calls(&[
                // Disks: a queue is made ready by whoever starts it.
                SYS_io_uring_setup,
                SYS_io_uring_register,
                SYS_fstat,
                SYS_statx,
                // One that goes to another host is made durable first.
                SYS_fdatasync,
            ]))
            .collect(),
        ThreadClass::Memory => base
            .chain(calls(EVENTS))
            .chain(calls(MEMORY))
            .chain(ioctls(MEMORY_SLOTS))
            .chain(ioctls(DMA))
            .collect(),
        // Connects to other hosts, whose names and certificates were read before.
        ThreadClass::Migration => base
            .chain(calls(EVENTS))
            .chain(calls(SOCKETS))
            .chain(calls(MIGRATION))
            .chain(ioctls(NO_WAIT))
            .chain(ioctls(MEMORY_SLOTS))
            .chain(ioctls(DIRTY_LOG))
            .chain(ioctls(VFIO_MOVING))
            .chain(sockets(&[AF_UNIX, AF_INET, AF_INET6]))
            .collect(),
        ThreadClass::Pager => base
            .chain(calls(EVENTS))
            .chain(calls(METRICS))
            .chain(ioctls(PAGER))
            .collect(),
        ThreadClass::Device => base
            .chain(calls(EVENTS))
            .chain(calls(SOCKETS))
            .chain(ioctls(TERMINAL))
            .collect(),
        // Builds and rebuilds the machine, with every ioctl of KVM, taps and terminals that takes, so ioctls are not listed.
        ThreadClass::Control => base
            .chain(calls(EVENTS))
            .chain(calls(DISK))
            .chain(calls(SOCKETS))
            .chain(calls(BUILD))
            .chain([Allowed::Call(SYS_ioctl), Allowed::Call(SYS_socket)])
            .collect(),
    }
}

/// What devices do on the vCPU thread whose register write starts them.
fn activation() -> impl Iterator<Item = Allowed> {
    ioctls(TUN).chain(calls(&[
        SYS_io_uring_setup,
        SYS_io_uring_register,
        SYS_fstat,
        SYS_statx,
    ]))
}
