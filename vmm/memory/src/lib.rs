//! Guest memory: memfd regions, huge pages, prefault, dirty tracking.
//!
//! Guest physical addresses (GPA) are [`vm_memory::GuestAddress`]; sizes are bytes.

#![allow(unsafe_code)] // madvise, userfaultfd and sockets on mappings this crate owns

mod align;
mod backing;
mod content;
mod cow;
mod discard;
mod handed;
mod node;
mod ram;
mod regions;
mod sparse;
mod touched;
mod transfer;
mod userfault;

pub use backing::{Backing, ZoneRam, adopt_zones, allocate_zones};
pub use content::read_content;
pub use cow::map_copy_on_write;
pub use discard::{DiscardError, Discarder, PART};
pub use handed::{HandedError, Identity, adopt, adopt_region, check_handed, file_of, shared_file};
pub use ram::{HugePages, MemoryError, RamOptions, allocate};
pub use regions::{allocate_region, gaps, insert, remove};
pub use sparse::SparseMemory;
pub use touched::{Touched, host_page};
pub use transfer::{find_zeroes, populate, receive, send};
pub use userfault::{Fault, Userfault, UserfaultError};

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

/// Guest memory as devices and loaders read and write it. Its bitmap marks the VMM's own writes for migration.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;
/// One contiguous region of [`GuestMemory`].
pub type GuestRegion = GuestRegionMmap<AtomicBitmap>;
/// [`GuestMemory`] whose regions may come and go while devices use it.
pub type GuestMemoryHandle = GuestMemoryAtomic<GuestMemory>;
