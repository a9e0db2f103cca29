//! What a SEAMCALL or TDCALL returns in RAX (SPEC 5.9).

use core::fmt;

/// A completion status: the class and name in the high half, a detail in the low half. For most
/// errors the detail is the [`Operand`] that was wrong. Callers compare the high half only.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Status(u64);

/// Which operand an error is about: the low half of a [`Status`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Operand {
    /// RAX: the function's number or version.
    Rax = 0,
    /// RCX.
    Rcx = 1,
    /// RDX.
    Rdx = 2,
    /// R8.
    R8 = 8,
    /// R9.
    R9 = 9,
    /// The TD's root page.
    Tdr = 0x80,
    /// The TD's control structure.
    Tdcs = 0x90,
    /// A virtual processor's control structure.
    Tdvps = 0x91,
    /// The Secure EPT as a whole.
    SeptTree = 0x92,
    /// One Secure EPT entry.
    SeptEntry = 0x93,
    /// The TD's TLB epoch.
    TdEpoch = 0xa9,
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $high:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Self = Self($high << 32);)*

            /// The name of the status, without its detail.
            pub fn name(self) -> Option<&'static str> {
                match self.high() {
                    $($high => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }

        #[cfg(test)]
        const ALL: &[(Status, u64)] = &[$((Status::$name, $high)),*];
    };
}

statuses! {
    /// Done.
    SUCCESS = 0;
    /// Interrupted with progress; call again with the same operands.
    INTERRUPTED_RESUMABLE = 0x8000_0003;
    /// Interrupted without progress; call again.
    INTERRUPTED_RESTARTABLE = 0x8000_0004;
    /// An operand makes no sense.
    OPERAND_INVALID = 0xc000_0100;
    /// An address is outside the memory that may become private.
    OPERAND_ADDR_RANGE_ERROR = 0xc000_0101;
    /// A lock is held by someone else. Nothing waits: call again.
    OPERAND_BUSY = 0x8000_0200;
    /// Virtual processors of the epoch before are still inside.
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201;
    /// The module as a whole is busy.
    SYS_BUSY = 0x8000_0202;
    /// The host wants the entry and has precedence; the guest calls again.
    OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204;
    /// A page is not of the type that it has to be.
    PAGE_METADATA_INCORRECT = 0xc000_0300;
    /// Pages still belong to the TD.
    TD_ASSOCIATED_PAGES_EXIST = 0xc000_0400;
    /// The TD has all the control pages that it takes.
    TDCX_NUM_INCORRECT = 0xc000_0610;
    /// The TD's life cycle is not at a point where this is possible.
    LIFECYCLE_STATE_INCORRECT = 0xc000_0607;
    /// The TD is not in a state where this is possible: already finalised, for instance.
    OP_STATE_INCORRECT = 0xc000_0608;
    /// The virtual processor is not in a state where this is possible.
    VCPU_STATE_INCORRECT = 0xc000_0700;
    /// The virtual processor is on another logical processor.
    VCPU_ASSOCIATED = 0x8000_0701;
    /// There is no information about a #VE that the guest has not taken.
    NO_VALID_VE_INFO = 0xc000_0704;
    /// Virtual processors were not flushed from their logical processors.
    FLUSHVP_NOT_DONE = 0x8000_0824;
    /// The key is not in the state that this needs.
    HKID_NOT_FREE = 0xc000_0820;
    /// A table is missing on the way to the entry.
    EPT_WALK_FAILED = 0xc000_0b00;
    /// The range is not blocked, and the TD may be running.
    GPA_RANGE_NOT_BLOCKED = 0xc000_0b06;
    /// The range is blocked already.
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0b07;
    /// Old translations may be in use still: TRACK, and have every virtual processor leave.
    TLB_TRACKING_NOT_DONE = 0xc000_0b08;
    /// The 512 entries do not make one larger page.
    EPT_INVALID_PROMOTE_CONDITIONS = 0xc000_0b09;
    /// The guest has accepted this page before.
    PAGE_ALREADY_ACCEPTED = 0x0000_0b0a;
    /// The guest asked for a larger page than is mapped.
    PAGE_SIZE_MISMATCH = 0xc000_0b0b;
    /// The entry is not in a state where this is possible.
    EPT_ENTRY_STATE_INCORRECT = 0xc000_0b0d;
    /// A table to be removed still maps something.
    EPT_PAGE_NOT_FREE = 0xc000_0b0e;
    /// There is no metadata field with this number, or the caller may not read it.
    METADATA_FIELD_ID_INCORRECT = 0xc000_0c00;
    /// The virtual processor cannot go on.
    NON_RECOVERABLE_VCPU = 0x4000_0001;
    /// The TD cannot go on.
    NON_RECOVERABLE_TD = 0x6000_0002;
}

impl Status {
    /// The status with a detail in its low half.
    pub const fn with(self, operand: Operand) -> Self {
        self.with_detail(operand as u32)
    }

    /// The status with any number in its low half.
    pub const fn with_detail(self, detail: u32) -> Self {
        Self(self.0 & !0xffff_ffff | detail as u64)
    }

    /// The value of RAX.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The value of RAX as a status.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The high half: what callers compare.
    pub const fn high(self) -> u64 {
        self.0 >> 32
    }

    /// The low half.
    pub const fn detail(self) -> u32 {
        self.0 as u32
    }

    /// Whether this is the same status, whatever the detail.
    pub const fn is(self, other: Self) -> bool {
        self.high() == other.high()
    }

    /// Whether nothing was done (bit 63). `PAGE_ALREADY_ACCEPTED` and `GPA_RANGE_ALREADY_BLOCKED`
    /// are not errors in this sense.
    pub const fn is_error(self) -> bool {
        self.0 >> 63 != 0
    }

    /// Whether the same call may succeed later (an error without bit 62).
    pub const fn may_be_retried(self) -> bool {
        self.is_error() && self.0 >> 62 & 1 == 0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) if self.detail() == 0 => f.write_str(name),
            Some(name) => write!(f, "{name} ({:#x})", self.detail()),
            None => write!(f, "status {:#018x}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn no_two_statuses_share_a_value() {
        for (index, (_, high)) in ALL.iter().enumerate() {
            assert!(ALL[..index].iter().all(|(_, other)| other != high));
        }
    }

    #[test]
    fn a_detail_changes_the_low_half_only() {
        for &(status, high) in ALL {
            let detailed = status.with(Operand::SeptTree);
            assert_eq!(detailed.high(), high);
            assert_eq!(detailed.detail(), 0x92);
            assert!(detailed.is(status));
        }
        let shown = format!("{}", Status::OPERAND_BUSY.with(Operand::SeptTree));
        assert_eq!(shown, "OPERAND_BUSY (0x92)");
    }

    #[test]
    fn busy_may_be_retried_and_a_wrong_operand_may_not() {
        assert!(Status::OPERAND_BUSY.may_be_retried());
        assert!(Status::PREVIOUS_TLB_EPOCH_BUSY.may_be_retried());
        assert!(!Status::OPERAND_INVALID.may_be_retried());
        assert!(!Status::SUCCESS.may_be_retried());
        assert!(!Status::PAGE_ALREADY_ACCEPTED.is_error());
    }
}
