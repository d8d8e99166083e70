//! Where guest memory lies in this process, which is this test's alone: what others map and unmap in the meantime would decide it, too.

use triarch_memory::{GuestRegion, RamOptions, allocate};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Bytes of a huge page.
const HUGE: u64 = 2 << 20;

#[test]
fn a_huge_page_of_the_host_can_be_one_of_the_guest() {
    // The first is not whole huge pages, so that the next has a bad place unless something is done.
    let ranges = [(0, 5 * HUGE + 0x3000), (1 << 32, HUGE), (1 << 33, 9 * HUGE)];
    for shared in [false, true] {
        let options = RamOptions {
            shared,
            ..RamOptions::default()
        };
        let ranges = ranges.map(|(base, size)| (GuestAddress(base), size));
        let memory = allocate(&ranges, &options).expect("allocate");
        let well = |region: &GuestRegion| region.as_ptr() as u64 % HUGE == region.start_addr().0 % HUGE;
        assert!(memory.iter().all(well), "shared: {shared}");
    }
}
