//! What the host and the hypervisor say to each other in memory that the host shares.
//!
//! Both records are words of eight bytes. The page that holds one stays pinned as long as the VM or
//! vCPU lives. Whatever the host writes there is read once and checked.

use crate::error::Error;
use crate::interrupts::Interface;
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
/// | 7 | both | what is to be done about it: a [`Request`](crate::request::Request), or 0 |
/// | 8 to 11 | both | x0 to x3 of a call of the guest that the host answers; 8: data of an access |
/// | 12, 13 | hypervisor | the guest's CNTV_CTL_EL0 and CNTV_CVAL_EL0 |
/// | 16 | both | ICH_HCR_EL2: enable, and the conditions of maintenance interrupts |
/// | 17 | both | ICH_VMCR_EL2, by `vgic_v3_save_aprs` and `vgic_v3_restore_vmcr_aprs` |
/// | 18 | host | how many list registers count |
/// | 20 to 23 | both | ICH_AP0R_EL2, as word 17 |
/// | 24 to 27 | both | ICH_AP1R_EL2, as word 17 |
/// | 32 to 47 | both | ICH_LR_EL2 |
#[derive(Clone, Copy, Debug)]
pub struct HostVcpu {
    address: Hpa,
    page: Hfn,
    index: usize,
}

impl HostVcpu {
    /// Words in the record.
    pub const WORDS: usize = 48;
    /// The word with the syndrome.
    pub const SYNDROME: usize = 5;
    /// The word with the address.
    pub const ADDRESS: usize = 6;
    /// The word with the request.
    pub const REQUEST: usize = 7;
    /// The first word of the call.
    pub const CALL: usize = 8;
    /// The word with the data of an access.
    pub const DATA: usize = 8;
    /// The word with CNTV_CTL_EL0; CNTV_CVAL_EL0 follows.
    pub const TIMER: usize = 12;
    /// The word with ICH_HCR_EL2.
    pub const GIC_CONTROL: usize = 16;
    /// The word with ICH_VMCR_EL2.
    pub const INTERFACE: usize = 17;
    /// The word that says how many list registers count.
    pub const LISTS_USED: usize = 18;
    /// The first word of the active priorities of group 0; those of group 1 follow.
    pub const ACTIVE: usize = 20;
    /// The first list register.
    pub const LISTS: usize = 32;

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
        self.word(platform, 0)
    }

    pub(crate) fn entry<P: Platform>(&self, platform: &P) -> (u64, u64) {
        (self.word(platform, 1), self.word(platform, 2))
    }

    pub(crate) fn tables(&self) -> Result<HostStack, Error> {
        HostStack::at(Hpa::new(self.address.get() + 3 * 8))
    }

    /// A word of the record, read once. The index is below [`HostVcpu::WORDS`].
    pub(crate) fn word<P: Platform>(&self, platform: &P, number: usize) -> u64 {
        read(platform, self.page, self.index + number)
    }

    /// Writes a word of the record.
    pub(crate) fn set_word<P: Platform>(&self, platform: &P, number: usize, value: u64) {
        write(platform, self.page, self.index + number, value);
    }

    pub(crate) fn report<P: Platform>(&self, platform: &P, syndrome: u64, address: u64) {
        self.set_word(platform, Self::SYNDROME, syndrome);
        self.set_word(platform, Self::ADDRESS, address);
    }

    pub(crate) fn interface<P: Platform>(&self, platform: &P) -> Interface {
        let word = |number| self.word(platform, number);
        Interface {
            control: word(Self::INTERFACE),
            active0: core::array::from_fn(|number| word(Self::ACTIVE + number)),
            active1: core::array::from_fn(|number| word(Self::ACTIVE + 4 + number)),
        }
    }

    pub(crate) fn set_interface<P: Platform>(&self, platform: &P, interface: &Interface) {
        self.set_word(platform, Self::INTERFACE, interface.control);
        for number in 0..4 {
            self.set_word(platform, Self::ACTIVE + number, interface.active0[number]);
            let second = Self::ACTIVE + 4 + number;
            self.set_word(platform, second, interface.active1[number]);
        }
    }

    pub(crate) fn set_call<P: Platform>(&self, platform: &P, call: [u64; 4]) {
        for (number, value) in call.into_iter().enumerate() {
            self.set_word(platform, Self::CALL + number, value);
        }
    }

    pub(crate) fn call<P: Platform>(&self, platform: &P) -> [u64; 4] {
        core::array::from_fn(|number| self.word(platform, Self::CALL + number))
    }
}

fn inside(address: Hpa, words: usize) -> Result<(Hfn, usize), Error> {
    let (page, index) = split(address.get()).ok_or(Error::Invalid)?;
    if index + words > WORDS {
        return Err(Error::Invalid);
    }
    Ok((page, index))
}
