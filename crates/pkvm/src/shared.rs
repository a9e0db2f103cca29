//! What the host and the hypervisor say to each other in memory that the host shares.
//!
//! Both records are words of eight bytes. The page that holds one stays pinned as long as the VM or
//! vCPU lives. Whatever the host writes there is read once and checked.

use crate::error::Error;
use crate::platform::{Platform, WORDS, read, split, write};
use crate::stack::HostStack;
use twofold_arch::{Hfn, Hpa};

/// The host's record of a VM: [`HostVm::WORDS`] words, within one page.
///
/// | word | written by | what |
/// |---|---|---|
/// | 0 | host | the handle that was reserved |
/// | 1 | host | how many vCPUs it will have |
/// | 2 | host | bit 0: protected; bits 15:8: IPA bits, 0 for 40 |
/// | 4, 5 | both | stack of the pages of the VM and its vCPUs, given back at the end: first, count |
/// | 6, 7 | both | stack of table pages, given back at the end |
#[derive(Clone, Copy, Debug)]
pub struct HostVm {
    address: Hpa,
    page: Hfn,
    index: usize,
}

impl HostVm {
    /// Words in the record.
    pub const WORDS: usize = 8;
    /// Word 2: the VM is protected.
    pub const PROTECTED: u64 = 1 << 0;
    /// Word 2: where the IPA size stands.
    pub const IPA_SHIFT: u32 = 8;

    /// The record at `address`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not aligned or crosses the end of its page.
    pub fn at(address: Hpa) -> Result<Self, Error> {
        let (page, index) = inside(address, Self::WORDS)?;
        Ok(Self {
            address,
            page,
            index,
        })
    }

    pub(crate) const fn page(&self) -> Hfn {
        self.page
    }

    pub(crate) fn handle<P: Platform>(&self, platform: &P) -> u64 {
        read(platform, self.page, self.index)
    }

    pub(crate) fn created_vcpus<P: Platform>(&self, platform: &P) -> u64 {
        read(platform, self.page, self.index + 1)
    }

    /// Whether the VM is protected, and its IPA size in bits or 0.
    pub(crate) fn kind<P: Platform>(&self, platform: &P) -> Result<(bool, u32), Error> {
        let word = read(platform, self.page, self.index + 2);
        if word & !(Self::PROTECTED | 0xff << Self::IPA_SHIFT) != 0 {
            return Err(Error::Invalid);
        }
        Ok((
            word & Self::PROTECTED != 0,
            (word >> Self::IPA_SHIFT) as u32,
        ))
    }

    pub(crate) fn teardown(&self) -> Result<HostStack, Error> {
        HostStack::at(Hpa::new(self.address.get() + 4 * 8))
    }

    pub(crate) fn table_teardown(&self) -> Result<HostStack, Error> {
        HostStack::at(Hpa::new(self.address.get() + 6 * 8))
    }
}

/// The host's record of a vCPU: [`HostVcpu::WORDS`] words, within one page.
///
/// | word | written by | what |
/// |---|---|---|
/// | 0 | host | its index in the VM |
/// | 1 | host | where it begins |
/// | 2 | host | what it finds in x0 then |
/// | 3, 4 | both | stack of pages for the guest's tables: first, count |
/// | 5 | hypervisor | why the guest stopped: ESR_EL2 |
/// | 6 | hypervisor | the guest's address, for an abort |
/// | 8 to 11 | both | x0 to x3 of a call of the guest that the host answers |
#[derive(Clone, Copy, Debug)]
pub struct HostVcpu {
    address: Hpa,
    page: Hfn,
    index: usize,
}

impl HostVcpu {
    /// Words in the record.
    pub const WORDS: usize = 16;
    /// The word with the syndrome.
    pub const SYNDROME: usize = 5;
    /// The word with the address.
    pub const ADDRESS: usize = 6;
    /// The first word of the call.
    pub const CALL: usize = 8;

    /// The record at `address`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not aligned or crosses the end of its page.
    pub fn at(address: Hpa) -> Result<Self, Error> {
        let (page, index) = inside(address, Self::WORDS)?;
        Ok(Self {
            address,
            page,
            index,
        })
    }

    pub(crate) const fn page(&self) -> Hfn {
        self.page
    }

    pub(crate) fn index<P: Platform>(&self, platform: &P) -> u64 {
        read(platform, self.page, self.index)
    }

    pub(crate) fn entry<P: Platform>(&self, platform: &P) -> (u64, u64) {
        (
            read(platform, self.page, self.index + 1),
            read(platform, self.page, self.index + 2),
        )
    }

    pub(crate) fn tables(&self) -> Result<HostStack, Error> {
        HostStack::at(Hpa::new(self.address.get() + 3 * 8))
    }

    pub(crate) fn report<P: Platform>(&self, platform: &P, syndrome: u64, address: u64) {
        write(platform, self.page, self.index + Self::SYNDROME, syndrome);
        write(platform, self.page, self.index + Self::ADDRESS, address);
    }

    pub(crate) fn set_call<P: Platform>(&self, platform: &P, call: [u64; 4]) {
        for (number, value) in call.into_iter().enumerate() {
            write(platform, self.page, self.index + Self::CALL + number, value);
        }
    }

    pub(crate) fn call<P: Platform>(&self, platform: &P) -> [u64; 4] {
        core::array::from_fn(|number| read(platform, self.page, self.index + Self::CALL + number))
    }
}

fn inside(address: Hpa, words: usize) -> Result<(Hfn, usize), Error> {
    let (page, index) = split(address.get()).ok_or(Error::Invalid)?;
    if index + words > WORDS {
        return Err(Error::Invalid);
    }
    Ok((page, index))
}
