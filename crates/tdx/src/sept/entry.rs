//! Secure EPT entries and their states (SPEC 5.6).
//!
//! A processor reads the ordinary EPT bits. What the module has to remember about an entry is in
//! bits that a processor ignores:
//!
//! | bits | meaning |
//! |---|---|
//! | 7, 6, 56, 55, 54, 53, 9 | the state, see [`State`] |
//! | 11 | the entry is locked |
//! | 52 | the host wants the entry: a guest that finds this set stands back |
//! | 20:12 | in a 2M leaf that waits for ACCEPT: 4K pieces that are done |
//! | 63 | suppress #VE, set in every entry |

use core::fmt;
use twofold_arch::Hpa;
use twofold_arch::ept::{EptFlags, MemoryType};
use twofold_table::x86::ADDRESS_MASK;

const PS: u64 = 1 << 7;
const IPAT: u64 = 1 << 6;
const D: u64 = 1 << 9;
const TDEX: u64 = 1 << 53;
const TDBW: u64 = 1 << 54;
const TDB: u64 = 1 << 55;
const TDP: u64 = 1 << 56;
/// The bits of a state code, most significant first.
const STATE_BITS: [u64; 7] = [PS, IPAT, TDP, TDB, TDBW, TDEX, D];
const STATE_MASK: u64 = PS | IPAT | TDP | TDB | TDBW | TDEX | D;
const RWX: u64 = EptFlags::RWX.bits();
const SUPPRESS_VE: u64 = EptFlags::SUPPRESS_VE.bits();
const COUNTER_SHIFT: u32 = 12;
const COUNTER_MASK: u64 = 0x1ff << COUNTER_SHIFT;

/// Bit 11: someone is changing the entry.
pub(super) const LOCKED: u64 = 1 << 11;
/// Bit 52: the host was refused the lock and goes first next time.
pub(super) const HOST_PRIORITY: u64 = 1 << 52;

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $public:literal;)*) => {
        /// The state of a Secure EPT entry, by its code.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum State {
            $($(#[$doc])* $name = $code,)*
        }

        impl State {
            /// Every state.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The state with this code.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The number by which callers of the module know the state.
            pub const fn public(self) -> u8 {
                match self {
                    $(Self::$name => $public,)*
                }
            }
        }
    };
}

states! {
    /// Maps nothing.
    Free = 0x0e, 0;
    /// Was taken out while memory is imported.
    Removed = 0x0c, 5;
    /// Points to a table.
    NonLeafMapped = 0x00, 132;
    /// Points to a table that nobody may use.
    NonLeafBlocked = 0x08, 129;
    /// Maps a page.
    Mapped = 0x60, 4;
    /// Has a page that nobody may use.
    Blocked = 0x68, 1;
    /// Maps a page that the guest may read only.
    BlockedWrite = 0x64, 8;
    /// Exported while blocked for writing.
    ExportedBlockedWrite = 0x66, 9;
    /// Exported, and written since.
    ExportedDirty = 0x63, 11;
    /// Exported, written since, and blocked for writing.
    ExportedDirtyBlockedWrite = 0x67, 12;
    /// Has a page that waits for the guest to accept it.
    Pending = 0x70, 2;
    /// Waits for the guest, and is blocked.
    PendingBlocked = 0x78, 3;
    /// Waits for the guest, and is blocked for writing.
    PendingBlockedWrite = 0x74, 16;
    /// Waits for the guest; exported while blocked for writing.
    PendingExportedBlockedWrite = 0x76, 17;
    /// Waits for the guest; exported, and changed since.
    PendingExportedDirty = 0x73, 19;
    /// Waits for the guest; exported, changed since, and blocked for writing.
    PendingExportedDirtyBlockedWrite = 0x77, 20;
}

impl State {
    const fn bits(self) -> u64 {
        let code = self as u64;
        let mut bits = 0;
        let mut index = 0;
        while index < STATE_BITS.len() {
            if code >> (STATE_BITS.len() - 1 - index) & 1 != 0 {
                bits |= STATE_BITS[index];
            }
            index += 1;
        }
        bits
    }

    /// Whether the entry has a page, as against a table or nothing.
    pub const fn is_leaf(self) -> bool {
        self as u8 & 0x40 != 0
    }

    /// Whether the guest can read the page.
    pub const fn is_guest_accessible(self) -> bool {
        matches!(
            self,
            Self::Mapped
                | Self::BlockedWrite
                | Self::ExportedBlockedWrite
                | Self::ExportedDirty
                | Self::ExportedDirtyBlockedWrite
        )
    }

    /// Whether the page waits for the guest to accept it, whatever else holds.
    pub const fn is_pending(self) -> bool {
        self.is_leaf() && self as u8 & 0x10 != 0
    }

    /// Whether nobody may use what the entry has.
    pub const fn is_blocked(self) -> bool {
        matches!(
            self,
            Self::NonLeafBlocked | Self::Blocked | Self::PendingBlocked
        )
    }

    /// Whether translations through the entry must be tracked before it is taken away, if the TD
    /// may be running.
    pub const fn needs_tracking(self) -> bool {
        !matches!(
            self,
            Self::Free
                | Self::Removed
                | Self::ExportedBlockedWrite
                | Self::PendingExportedBlockedWrite
        )
    }

    /// The state after BLOCK.
    pub const fn blocked(self) -> Option<Self> {
        match self {
            Self::NonLeafMapped => Some(Self::NonLeafBlocked),
            Self::Mapped | Self::BlockedWrite => Some(Self::Blocked),
            Self::Pending | Self::PendingBlockedWrite => Some(Self::PendingBlocked),
            _ => None,
        }
    }

    /// The state after UNBLOCK.
    pub const fn unblocked(self) -> Option<Self> {
        match self {
            Self::NonLeafBlocked => Some(Self::NonLeafMapped),
            Self::Blocked => Some(Self::Mapped),
            Self::PendingBlocked => Some(Self::Pending),
            _ => None,
        }
    }

    /// The permissions that an entry in this state gives.
    const fn permissions(self) -> u64 {
        match self {
            Self::NonLeafMapped | Self::Mapped | Self::ExportedDirty => RWX,
            Self::BlockedWrite | Self::ExportedBlockedWrite | Self::ExportedDirtyBlockedWrite => {
                RWX & !EptFlags::WRITE.bits()
            }
            _ => 0,
        }
    }
}

/// A Secure EPT entry.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct SeptEntry(u64);

impl SeptEntry {
    /// What a new table is full of.
    pub const FREE: Self = Self(SUPPRESS_VE | State::Free.bits());

    /// The entry with this value.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The value.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// A pointer to a table.
    pub const fn table(page: Hpa) -> Self {
        Self::new(State::NonLeafMapped, page)
    }

    /// A leaf in a state that has a page.
    pub const fn leaf(state: State, page: Hpa) -> Self {
        Self::new(state, page)
    }

    const fn new(state: State, page: Hpa) -> Self {
        let memory_type = if state.is_leaf() {
            MemoryType::WriteBack.entry_bits()
        } else {
            0
        };
        Self(
            SUPPRESS_VE
                | state.bits()
                | state.permissions()
                | memory_type
                | page.get() & ADDRESS_MASK,
        )
    }

    /// The state, or `None` for a value that the module never writes.
    #[inline]
    pub const fn state(self) -> Option<State> {
        // Most of the bits of a code lie next to each other: 7 and 6, and 56 to 53.
        let code = (self.0 >> 6 & 3) << 5 | (self.0 >> 53 & 0xf) << 1 | self.0 >> 9 & 1;
        State::from_code(code as u8)
    }

    /// The same entry in another state, with the permissions that go with it.
    #[must_use]
    pub const fn with_state(self, state: State) -> Self {
        Self(self.0 & !(STATE_MASK | RWX) | state.bits() | state.permissions())
    }

    /// Whether someone is changing the entry.
    pub const fn is_locked(self) -> bool {
        self.0 & LOCKED != 0
    }

    /// The entry without its lock and without the host's claim.
    #[must_use]
    pub const fn unlocked(self) -> Self {
        Self(self.0 & !(LOCKED | HOST_PRIORITY))
    }

    /// The page or table of the entry, which was found at `level`.
    pub const fn page(self, level: u8) -> Hpa {
        Hpa::new(self.cleaned(level).0 & ADDRESS_MASK)
    }

    /// In a 2M leaf that waits for ACCEPT: how many of its 4K pieces are done.
    pub const fn accepted_pieces(self, level: u8) -> u16 {
        if self.counts() && level == 1 {
            ((self.0 & COUNTER_MASK) >> COUNTER_SHIFT) as u16
        } else {
            0
        }
    }

    /// The entry with that number.
    #[must_use]
    pub const fn with_accepted_pieces(self, pieces: u16) -> Self {
        Self(self.0 & !COUNTER_MASK | (pieces as u64) << COUNTER_SHIFT & COUNTER_MASK)
    }

    const fn counts(self) -> bool {
        matches!(self.state(), Some(state) if state.is_pending())
    }

    /// The entry without its count, where it has one. A 4K leaf has address bits there instead.
    #[must_use]
    pub const fn cleaned(self, level: u8) -> Self {
        if self.counts() && level == 1 {
            self.with_accepted_pieces(0)
        } else {
            self
        }
    }

    /// The entry as callers are shown it in RCX: the processor's bits only.
    pub const fn architectural(self, level: u8) -> u64 {
        const SHOWN: u64 = RWX | 0x7 << 3 | IPAT | PS | ADDRESS_MASK | SUPPRESS_VE;
        match self.state() {
            Some(State::Free | State::Removed) | None => SUPPRESS_VE,
            Some(_) => self.cleaned(level).0 & SHOWN,
        }
    }

    /// Level and state as callers are shown them in RDX.
    pub const fn information(self, level: u8) -> u64 {
        let state = match self.state() {
            Some(state) => state.public(),
            None => 0,
        };
        level as u64 | (state as u64) << 8
    }
}

impl fmt::Debug for SeptEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state() {
            Some(state) => write!(f, "{state:?}({:#x})", self.0),
            None => write!(f, "invalid({:#x})", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twofold_arch::Level;
    use twofold_arch::ept::{self, EptCaps, EptEntry};

    const PAGE: Hpa = Hpa::new(0x12_3440_0000);

    #[test]
    fn a_free_entry_is_not_zero_and_suppresses_ve() {
        assert_eq!(SeptEntry::FREE.raw(), 0x80e0_0000_0000_0000);
        assert_eq!(SeptEntry::FREE.state(), Some(State::Free));
    }

    #[test]
    fn every_state_survives_in_an_entry_and_every_other_code_is_refused() {
        for code in 0..=0x7f {
            let state = State::from_code(code);
            assert_eq!(
                state.is_some(),
                State::ALL.iter().any(|&state| state as u8 == code)
            );
            if let Some(state) = state {
                let entry = SeptEntry::new(state, PAGE);
                assert_eq!(entry.state(), Some(state));
                assert_eq!(entry.page(0), PAGE);
                let locked = SeptEntry::from_raw(entry.raw() | LOCKED | HOST_PRIORITY);
                assert_eq!(locked.state(), Some(state));
                assert_eq!(locked.unlocked(), entry);
                for &next in State::ALL {
                    assert_eq!(entry.with_state(next).state(), Some(next));
                }
            }
        }
    }

    #[test]
    fn public_states_are_all_different() {
        for (index, state) in State::ALL.iter().enumerate() {
            assert!(
                State::ALL[..index]
                    .iter()
                    .all(|other| other.public() != state.public())
            );
        }
    }

    #[test]
    fn a_processor_reads_what_the_state_means() {
        for &state in State::ALL {
            let entry = SeptEntry::new(state, PAGE);
            for level in [Level::L4K, Level::L2M] {
                let decoded = ept::decode(entry.raw(), level, EptCaps::full(51));
                match state {
                    State::NonLeafMapped if level == Level::L2M => {
                        assert!(matches!(decoded, EptEntry::Table { hpa, .. } if hpa == PAGE));
                    }
                    State::NonLeafMapped => {}
                    _ if state.is_guest_accessible() => {
                        assert!(matches!(decoded, EptEntry::Leaf { hpa, .. } if hpa == PAGE));
                    }
                    _ => assert!(matches!(decoded, EptEntry::NotPresent { .. }), "{state:?}"),
                }
            }
        }
    }

    #[test]
    fn blocking_and_unblocking_are_inverse_where_writing_was_allowed() {
        for state in [State::NonLeafMapped, State::Mapped, State::Pending] {
            let blocked = state.blocked().unwrap();
            assert!(blocked.is_blocked());
            assert_eq!(blocked.unblocked(), Some(state));
            assert_eq!(blocked.blocked(), None);
        }
        for &state in State::ALL {
            assert_eq!(state.is_blocked(), state.unblocked().is_some());
        }
    }

    #[test]
    fn the_count_of_a_pending_2m_page_is_no_part_of_its_address() {
        let entry = SeptEntry::leaf(State::Pending, PAGE).with_accepted_pieces(511);
        assert_eq!(entry.accepted_pieces(1), 511);
        assert_eq!(entry.page(1), PAGE);
        assert_eq!(entry.architectural(1) & ADDRESS_MASK, PAGE.get());
        let small = SeptEntry::leaf(State::Pending, Hpa::new(0x1f_f000));
        assert_eq!(small.accepted_pieces(0), 0);
        assert_eq!(small.page(0), Hpa::new(0x1f_f000));
    }
}
