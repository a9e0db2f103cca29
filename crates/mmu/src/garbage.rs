//! What has been replaced and waits until every reader has passed.

// UNSAFETY: frees values by type-erased pointers.
#![expect(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;
use twofold_table::Quiesced;

/// Values that were unlinked from something that readers without a lock look at. Dropping the
/// list leaks them; only [`clear`](Self::clear) frees.
#[derive(Default)]
pub(crate) struct Garbage {
    items: Vec<Item>,
}

struct Item {
    value: NonNull<()>,
    free: unsafe fn(NonNull<()>),
}

// SAFETY: an item is an owned box of a `Send` value (see `add`) that nobody else will free.
unsafe impl Send for Item {}

impl Garbage {
    /// Takes over a value that new readers can no longer find.
    ///
    /// # Safety
    /// `value` came from `Box::into_raw` and is given away once. It has been unlinked.
    pub(crate) unsafe fn add<T: Send + Sync + 'static>(&mut self, value: NonNull<T>) {
        unsafe fn free<T>(value: NonNull<()>) {
            // SAFETY: `add` stored the pointer of a box of this type, which it owns.
            drop(unsafe { Box::from_raw(value.cast::<T>().as_ptr()) });
        }
        self.items.push(Item {
            value: value.cast(),
            free: free::<T>,
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Frees everything. The proof is newer than every [`add`](Self::add).
    pub(crate) fn clear(&mut self, _readers: &Quiesced) {
        for item in self.items.drain(..) {
            // SAFETY: the item is owned, no new reader finds it, and those that had found it have
            // passed.
            unsafe { (item.free)(item.value) };
        }
    }
}
