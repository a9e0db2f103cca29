//! Page fault error codes as KVM keeps them: the architecture's bits, the nested page fault's
//! additions, and two that KVM itself invents.

use bitflags::bitflags;

bitflags! {
    /// Why a second-stage access faulted.
    ///
    /// Bits 0 to 37 are those that an AMD processor reports in `EXITINFO1` of a nested page fault
    /// (APM volume 2, "Nested versus Guest Page Faults"); an EPT violation is converted to them by
    /// [`Qualification::to_pferr`](crate::ept::Qualification::to_pferr). Bits 48 and 49 are
    /// synthetic: no processor reports them.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Pferr: u64 {
        /// P: a translation was present and forbade the access.
        const PRESENT = 1 << 0;
        /// RW: the access was a write.
        const WRITE = 1 << 1;
        /// US: the access was made in user mode. Nested walks are user accesses (SPEC 6.13); KVM also
        /// sets it for a read in an EPT violation (SPEC 4.7).
        const USER = 1 << 2;
        /// RSVD: a reserved bit was set in a present entry.
        const RSVD = 1 << 3;
        /// ID: the access was an instruction fetch.
        const FETCH = 1 << 4;
        /// PK: protection keys forbade the access.
        const PK = 1 << 5;
        /// SS: the access was to a shadow stack.
        const SHADOW_STACK = 1 << 6;
        /// SGX: an enclave access check failed.
        const SGX = 1 << 15;
        /// RMP: the reverse map table forbade the access (SEV-SNP).
        const GUEST_RMP = 1 << 31;
        /// The fault is on the final guest-physical address of an access.
        const GUEST_FINAL = 1 << 32;
        /// The fault is on the guest-physical address of one of the guest's page tables.
        const GUEST_PAGE = 1 << 33;
        /// The guest's access had its C-bit set (SEV-SNP).
        const GUEST_ENC = 1 << 34;
        /// The sizes of the nested page and of the RMP entry differ (SEV-SNP).
        const GUEST_SIZEM = 1 << 35;
        /// A VMPL permission check failed (SEV-SNP).
        const GUEST_VMPL = 1 << 36;
        /// SSS: supervisor shadow stack pages are checked in the nested table.
        const GUEST_SSS = 1 << 37;
        /// Synthetic: an access the processor makes on its own, not on behalf of an instruction.
        const IMPLICIT_ACCESS = 1 << 48;
        /// Synthetic: the access was to the private half of confidential memory.
        const PRIVATE_ACCESS = 1 << 49;
    }
}

impl Pferr {
    /// Both synthetic bits, which no processor reports.
    pub const SYNTHETIC: Self = Self::IMPLICIT_ACCESS.union(Self::PRIVATE_ACCESS);

    /// Whether the access was a write.
    pub const fn is_write(self) -> bool {
        self.contains(Self::WRITE)
    }

    /// Whether the access was an instruction fetch.
    pub const fn is_fetch(self) -> bool {
        self.contains(Self::FETCH)
    }

    /// Whether the access was a data read.
    pub const fn is_read(self) -> bool {
        !self.intersects(Self::WRITE.union(Self::FETCH))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_code_has_the_documented_bit_numbers() {
        // SPEC 6.13 and the APM's table, written out once more as numbers.
        for (flag, bit) in [
            (Pferr::PRESENT, 0),
            (Pferr::WRITE, 1),
            (Pferr::USER, 2),
            (Pferr::RSVD, 3),
            (Pferr::FETCH, 4),
            (Pferr::PK, 5),
            (Pferr::SHADOW_STACK, 6),
            (Pferr::SGX, 15),
            (Pferr::GUEST_RMP, 31),
            (Pferr::GUEST_FINAL, 32),
            (Pferr::GUEST_PAGE, 33),
            (Pferr::GUEST_ENC, 34),
            (Pferr::GUEST_SIZEM, 35),
            (Pferr::GUEST_VMPL, 36),
            (Pferr::GUEST_SSS, 37),
            (Pferr::IMPLICIT_ACCESS, 48),
            (Pferr::PRIVATE_ACCESS, 49),
        ] {
            assert_eq!(flag.bits().trailing_zeros(), bit);
            assert_eq!(flag.bits().count_ones(), 1);
        }
    }

    #[test]
    fn every_access_is_exactly_a_read_a_write_or_a_fetch_unless_both_are_claimed() {
        for bits in 0..32 {
            let error = Pferr::from_bits_truncate(bits);
            assert_eq!(error.is_read(), bits & 0b10010 == 0);
            assert_eq!(error.is_write(), bits & 2 != 0);
            assert_eq!(error.is_fetch(), bits & 16 != 0);
        }
    }
}
