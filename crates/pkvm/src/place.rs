//! Objects in donated pages.

// UNSAFETY: VMs and vCPUs live in pages that the host donated; this is where memory becomes an
// object and back.
#![expect(unsafe_code)]

use crate::platform::Platform;
use core::ptr::NonNull;
use twofold_arch::{Hfn, PAGE_SIZE};

/// An object that fills (part of) a page which the hypervisor owns.
#[derive(Debug)]
pub(crate) struct Placed<T>(NonNull<T>);

impl<T> Clone for Placed<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Placed<T> {}

// SAFETY: a `Placed` is only a name; whoever dereferences it promises the rest.
unsafe impl<T: Send + Sync> Send for Placed<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Placed<T> {}

impl<T> Placed<T> {
    const FITS: () = assert!(size_of::<T>() <= PAGE_SIZE as usize && align_of::<T>() <= 4096);

    /// Makes the object in a page that the hypervisor owns, has mapped, and uses for nothing else.
    pub(crate) fn new<P: Platform>(platform: &P, page: Hfn, value: T) -> Self {
        let () = Self::FITS;
        let place = platform.table_ptr(page.address()).cast::<T>();
        // SAFETY: `Platform` gives a pointer to a whole page, which is ours alone until the object
        // is removed; size and alignment fit.
        unsafe { place.write(value) };
        Self(place)
    }

    /// The object.
    ///
    /// # Safety
    /// It must not be [removed](Self::remove) while the reference is used.
    pub(crate) unsafe fn get<'a>(self) -> &'a T {
        // SAFETY: the pointer comes from `new`; the caller keeps the object alive.
        unsafe { self.0.as_ref() }
    }

    /// The object that [`as_ptr`](Self::as_ptr) gave, unless null.
    pub(crate) fn from_ptr(pointer: *mut T) -> Option<Self> {
        NonNull::new(pointer).map(Self)
    }

    /// Where it is.
    pub(crate) const fn as_ptr(self) -> *mut T {
        self.0.as_ptr()
    }

    /// Ends the object. Its page can be given back then.
    ///
    /// # Safety
    /// Nobody may use it now or later.
    pub(crate) unsafe fn remove(self) {
        // SAFETY: the object was made by `new` and is removed once, as the caller promises.
        unsafe { self.0.drop_in_place() };
    }
}
