//! The allocator: free lists of power-of-two blocks over one range of RAM. The boot processor is the only one that
//! allocates.

use crate::arch::boot::HEAP as RANGE;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

struct State {
    next: usize,
    free: [*mut u8; 32],
}

struct Heap(UnsafeCell<State>);

// SAFETY: only the boot processor allocates and frees, and nothing allocates beside it there: interrupts only count.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(State {
    next: RANGE.start as usize,
    free: [null_mut(); 32],
}));

fn class(layout: Layout) -> usize {
    layout
        .size()
        .max(layout.align())
        .max(16)
        .next_power_of_two()
        .trailing_zeros() as usize
}

// SAFETY: blocks are disjoint, as large as asked and aligned to their own size, which is at least the alignment asked
// for.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let class = class(layout);
        // SAFETY: no other reference exists, see `Sync` above.
        let state = unsafe { &mut *self.0.get() };
        let Some(head) = state.free.get_mut(class) else {
            return null_mut();
        };
        if !head.is_null() {
            let block = *head;
            // SAFETY: a block on a free list is ours and starts with the pointer to the next one.
            *head = unsafe { block.cast::<*mut u8>().read() };
            return block;
        }
        let block = state.next.next_multiple_of(1 << class);
        if block + (1 << class) > RANGE.end as usize {
            return null_mut();
        }
        state.next = block + (1 << class);
        block as *mut u8
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`; the block was given out by it with the same layout, so it holds a pointer.
        unsafe {
            let head = &mut (*self.0.get()).free[class(layout)];
            block.cast::<*mut u8>().write(*head);
            *head = block;
        }
    }
}
