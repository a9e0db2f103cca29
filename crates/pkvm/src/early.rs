//! What the host may set up before a processor has finalised: afterwards these calls are gone.
//!
//! Upstream trusts its host until then. Here the host is below its stage 2 from its first
//! instruction, so these arguments are checked like all others.

use crate::error::Error;
use crate::guest::Access;
use crate::hypervisor::Hypervisor;
use crate::page::Pages;
use crate::platform::{Platform, Vectors};
use twofold_arch::{Hpa, PAGE_SIZE};

/// Bits of the protection of a private mapping: [`Access`], and that it is a device.
const DEVICE: u64 = 1 << 3;

impl<P: Platform> Hypervisor<'_, P> {
    /// Maps `size` bytes of a device at EL2, and says where.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a range that is empty or beyond the processors' addresses, and for
    /// protection other than that of a device that is read, or read and written;
    /// [`Error::NotPermitted`] if any of it is memory, which the host could give away later;
    /// [`Error::NoMemory`] if there is no room.
    pub fn create_private_mapping(
        &self,
        address: u64,
        size: u64,
        protection: u64,
    ) -> Result<u64, Error> {
        let access = Access::from_host(protection & !DEVICE)?;
        if protection & DEVICE == 0 || access.contains(Access::EXECUTE) || size == 0 {
            return Err(Error::Invalid);
        }
        let offset = address % PAGE_SIZE;
        let count = size.checked_add(offset).ok_or(Error::Invalid)?;
        let pages = Pages {
            start: Hpa::new(address).frame(),
            count: count.div_ceil(PAGE_SIZE),
        };
        self.pages.check_device(pages)?;
        let place = self.platform().map_device(pages, access);
        Ok(place.ok_or(Error::NoMemory)? + offset)
    }

    /// Exceptions go to EL2 by another way on this processor, named by upstream's number.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a way that there is not. The indirect ones hide where EL2 is; here
    /// that is no secret.
    pub fn set_vectors(&self, number: u64) -> Result<(), Error> {
        let vectors = match number {
            0 => Vectors::Direct,
            1 => Vectors::Hardened,
            _ => return Err(Error::Invalid),
        };
        if self.platform().set_vectors(vectors) {
            Ok(())
        } else {
            Err(Error::Invalid)
        }
    }
}
