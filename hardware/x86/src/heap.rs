//! Memory for `alloc`: the MMU's slots and bookkeeping, and the scenarios.

// UNSAFETY: hands static memory to the allocator.
#![expect(unsafe_code)]

use core::cell::UnsafeCell;
use linked_list_allocator::LockedHeap;

const SIZE: usize = 4 << 20;

#[repr(C, align(4096))]
struct Memory(UnsafeCell<[u8; SIZE]>);

// SAFETY: only the allocator touches the bytes, under its lock.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([0; SIZE]));

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Makes allocation possible. Called once, before anything is allocated.
pub fn init() {
    // SAFETY: the memory is static, used for nothing else, and given away once.
    unsafe { HEAP.lock().init(MEMORY.0.get().cast(), SIZE) }
}

/// Bytes that are allocated.
pub fn used() -> usize {
    HEAP.lock().used()
}
