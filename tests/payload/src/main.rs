//! A bare-metal guest for tests of a VMM: it drives the platform's devices and answers commands over the serial line.
//! README.md lists the commands; arch/ has all that depends on the processor.
#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod arch;
mod clock;
mod cmd;
mod data;
mod dev;
mod fault;
mod heap;
mod interrupts;
mod memory;
mod pci;
mod serial;
mod shell;
mod smp;
mod virtio;

use acpi::Acpi;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use dev::Devices;
use memory::Platform;
use pci::{Access, Function};

/// All the guest knows.
pub struct Guest {
    platform: Platform,
    acpi: Result<Acpi, String>,
    functions: Vec<Function>,
    /// Their virtio types, 0 for those that have none: what is gone cannot be asked any more.
    kinds: Vec<u16>,
    devices: Devices,
    processors: Option<Vec<smp::Processor>>,
    /// Those that came while it ran, with their place in the MADT.
    added: Vec<(u32, smp::Processor)>,
}

impl Guest {
    /// The tables, or why there are none.
    pub fn acpi(&self) -> Result<&Acpi, String> {
        self.acpi.as_ref().map_err(Clone::clone)
    }
}

/// The entry code ends here; `argument` is what the VMM left in the register that the boot protocol names.
#[unsafe(no_mangle)]
extern "C" fn payload_main(argument: u64) -> ! {
    // SAFETY: passed on from the entry untouched.
    let platform = unsafe { arch::boot::read(argument) }.unwrap_or_else(|why| give_up(why));
    let acpi = acpi::read(platform.rsdp);
    if let Err(why) = arch::interrupts::init(acpi.as_ref().ok()) {
        give_up(acpi.as_ref().err().unwrap_or(&why));
    }
    serial::init();
    let ecam = acpi.as_ref().ok().and_then(|acpi| acpi.ecam);
    let access = ecam.and_then(|(base, last)| pci::map_registers(base, (u64::from(last) + 1) << 20).ok());
    let access = access
        .map(Access::Ecam)
        .or_else(|| arch::config::Ports::find().map(Access::Ports));
    let functions = access
        .map(|access| pci::scan(access, ecam.map_or(0, |(_, last)| last)))
        .unwrap_or_default();
    let kinds = functions
        .iter()
        .map(|function| virtio::kind(*function).unwrap_or(0))
        .collect();
    serial::write("triarch-payload ready\n");
    shell::run(&mut Guest {
        platform,
        acpi,
        functions,
        kinds,
        devices: Devices::default(),
        processors: None,
        added: Vec::new(),
    })
}

fn give_up(why: &str) -> ! {
    serial::write(&format!("triarch-payload: {why}\n"));
    arch::power::park()
}
