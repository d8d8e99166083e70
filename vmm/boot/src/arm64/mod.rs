//! Direct boot of 64-bit ARM guests ([Linux's protocol][arm64]).
//!
//! The kernel is an `Image`, plain, in gzip, or in an EFI application that unpacks it from gzip (zboot). It is entered with `x0`
//! holding the address of a device tree: the whole machine ([`device_tree`]), or only where the kernel's boot data are
//! ([`stub_device_tree`]), which then finds the machine described by ACPI.
//!
//! [arm64]: https://www.kernel.org/doc/html/latest/arch/arm64/booting.html

mod fdt;
mod image;
#[cfg(test)]
mod tests;

pub use fdt::{Chosen, DeviceTree, EfiPointers, FdtError, Gic, Pci, Timer, device_tree, stub_device_tree};
pub use image::{Image, load_image, load_initramfs};
