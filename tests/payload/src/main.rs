//! A bare-metal guest for tests of a VMM: it enters by PVH, runs in ring 3, drives the platform's devices and answers
//! commands over COM1. README.md lists the commands, boot.s tells how ring 3 and ring 0 share the work.
#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod clock;
mod cmd;
mod data;
mod dev;
mod fault;
mod heap;
mod interrupts;
mod io;
mod memops;
mod memory;
mod paging;
mod pci;
mod ring0;
mod serial;
mod shell;
mod smp;
mod virtio;

use acpi::Acpi;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::global_asm;
use dev::Devices;
use memory::Platform;
use pci::{Access, Function};

global_asm!(include_str!("boot.s"), options(att_syntax));

/// All the guest knows.
pub struct Guest {
    platform: Platform,
    acpi: Result<Acpi, String>,
    functions: Vec<Function>,
    devices: Devices,
    processors: Option<Vec<smp::Processor>>,
}

impl Guest {
    /// The tables, or why there are none.
    pub fn acpi(&self) -> Result<&Acpi, String> {
        self.acpi.as_ref().map_err(Clone::clone)
    }
}

/// Ring 3 begins here; `start_info` is the address the VMM left in EBX.
#[unsafe(no_mangle)]
extern "C" fn payload_main(start_info: u64) -> ! {
    interrupts::init();
    serial::init();
    // SAFETY: passed on from the entry untouched; a VMM puts it below 4 GiB.
    let platform = match unsafe { Platform::read(start_info) } {
        Ok(platform) => platform,
        Err(why) => {
            serial::write(&format!("triarch-payload: {why}\n"));
            ring0::park()
        }
    };
    let acpi = acpi::read(platform.rsdp);
    let access = match acpi.as_ref().ok().and_then(|acpi| acpi.ecam) {
        Some((base, _)) => pci::map_registers(base, 1 << 20).map_or(Access::Ports, Access::Ecam),
        None => Access::Ports,
    };
    let functions = pci::scan(access);
    serial::write("triarch-payload ready\n");
    shell::run(&mut Guest {
        platform,
        acpi,
        functions,
        devices: Devices::default(),
        processors: None,
    })
}
