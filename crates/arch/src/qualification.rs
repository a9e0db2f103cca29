//! The exit qualification of an EPT violation.

use crate::pferr::Pferr;
use bitflags::bitflags;

bitflags! {
    /// What an EPT violation (exit reason 48) reports, and the #VE information page with it (SDM
    /// volume 3C, table "Exit Qualification for EPT Violations").
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Qualification: u64 {
        /// The access was a data read. Together with `WRITE` for an access that does both, and set
        /// for accesses to guest page tables when EPT accessed and dirty flags are enabled.
        const READ = 1 << 0;
        /// The access was a data write.
        const WRITE = 1 << 1;
        /// The access was an instruction fetch.
        const FETCH = 1 << 2;
        /// AND of R over the entries walked.
        const ENTRY_READ = 1 << 3;
        /// AND of W over the entries walked.
        const ENTRY_WRITE = 1 << 4;
        /// AND of X over the entries walked.
        const ENTRY_EXECUTE = 1 << 5;
        /// With mode-based execute control: AND of XU over the entries walked.
        const ENTRY_USER_EXECUTE = 1 << 6;
        /// The guest-linear address field is valid.
        const LINEAR_VALID = 1 << 7;
        /// With `LINEAR_VALID`: the access was to the final address of a translation; without this
        /// bit it was to a guest page table or an update of its A or D bit.
        const FINAL = 1 << 8;
        /// Advanced information: the linear address is a user-mode address.
        const LINEAR_USER = 1 << 9;
        /// Advanced information: the guest's paging allows writes to the linear address.
        const LINEAR_WRITABLE = 1 << 10;
        /// Advanced information: the guest's paging forbids fetches from the linear address.
        const LINEAR_NO_EXECUTE = 1 << 11;
        /// The exit happened in an IRET that had unblocked NMIs.
        const NMI_UNBLOCKING = 1 << 12;
        /// The access was a shadow-stack access.
        const SHADOW_STACK = 1 << 13;
        /// Bit 60 of the leaf, with supervisor shadow-stack control.
        const ENTRY_SUPERVISOR_SHADOW_STACK = 1 << 14;
        /// Guest-paging verification caused the violation.
        const GUEST_PAGING_VERIFICATION = 1 << 15;
        /// The access was asynchronous to instruction execution (trace output, for instance).
        const ASYNCHRONOUS = 1 << 16;
    }
}

impl Qualification {
    /// The same fault as a page fault error code, as KVM converts it (SPEC 4.7).
    pub const fn to_pferr(self) -> Pferr {
        let mut error = Pferr::empty();
        if self.contains(Self::READ) {
            error = error.union(Pferr::USER);
        }
        if self.contains(Self::WRITE) {
            error = error.union(Pferr::WRITE);
        }
        if self.contains(Self::FETCH) {
            error = error.union(Pferr::FETCH);
        }
        if self.intersects(
            Self::ENTRY_READ
                .union(Self::ENTRY_WRITE)
                .union(Self::ENTRY_EXECUTE),
        ) {
            error = error.union(Pferr::PRESENT);
        }
        if self.contains(Self::LINEAR_VALID) {
            error = error.union(if self.contains(Self::FINAL) {
                Pferr::GUEST_FINAL
            } else {
                Pferr::GUEST_PAGE
            });
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_qualification_converts_bit_by_bit() {
        for bits in 0..1u64 << 17 {
            let bit = |n: u32| bits >> n & 1;
            let mut expected = bit(0) << 2 | bit(1) << 1 | bit(2) << 4;
            if bits & 0b111000 != 0 {
                expected |= 1;
            }
            if bit(7) == 1 {
                expected |= 1 << (if bit(8) == 1 { 32 } else { 33 });
            }
            assert_eq!(
                Qualification::from_bits(bits).map(|q| q.to_pferr().bits()),
                Some(expected)
            );
        }
    }
}
