//! The formats of second-stage tables: what an entry means to the processor, and how it reports a
//! failure.

use super::{GuestAccess, Operation, Purpose, Rights};
use crate::trap::SecondStageFault;
use twofold_arch::ept::{self, EptCaps, EptEntry, EptFlags, Eptp, Qualification};
use twofold_arch::npt::{self, NptCaps, NptEntry, NptFlags};
use twofold_arch::{Gpa, Hpa, Level, Pferr};

/// What an entry means, whatever its format.
pub(super) enum Decoded {
    NotPresent,
    Table { hpa: Hpa, rights: Rights },
    Leaf { hpa: Hpa, rights: Rights },
    Malformed,
}

/// Why a walk failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::memory) enum Failure {
    /// What the entries that were read allow together; nothing if one was not present.
    Denied {
        rights: Rights,
        present: bool,
        /// The entry that decided does not let an EPT violation become #VE.
        suppress_ve: bool,
    },
    /// The processor refuses an entry.
    Malformed,
    /// Sub-page permissions have to be asked for, and a table of theirs is missing.
    SubPageMiss,
    /// The processor refuses an entry of the sub-page permission table.
    SubPageMalformed,
}

/// A table format, and where the tables are.
pub(super) trait Format: Copy {
    /// The accessed flag of an entry.
    const ACCESSED: u64;
    /// The dirty flag of a leaf.
    const DIRTY: u64;
    fn root(self) -> (Hpa, Level);
    /// Whether A and D flags exist. With them, an access to a guest table counts as a write.
    fn flags_managed(self) -> bool;
    /// Whether dirty flags that are set are logged where a log is chosen.
    fn logs(self) -> bool;
    fn decode(self, entry: u64, level: Level) -> Decoded;
    /// The table that has a say in whether a page may be written that the entries of the walk, the
    /// last of which is `leaf`, forbid to write and allow to read.
    fn sub_pages(self, leaf: u64, level: Level) -> Option<Hpa>;
    fn fault(self, failure: Failure, access: &GuestAccess) -> SecondStageFault;
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Ept {
    pub(super) pointer: Eptp,
    pub(super) caps: EptCaps,
    /// The root of the sub-page permission table, if there is one.
    pub(super) sppt: Option<Hpa>,
}

impl Format for Ept {
    const ACCESSED: u64 = EptFlags::ACCESSED.bits();
    const DIRTY: u64 = EptFlags::DIRTY.bits();

    fn root(self) -> (Hpa, Level) {
        (self.pointer.root, self.pointer.level)
    }

    fn flags_managed(self) -> bool {
        self.pointer.accessed_dirty
    }

    fn logs(self) -> bool {
        self.pointer.accessed_dirty
    }

    #[inline(always)]
    fn decode(self, entry: u64, level: Level) -> Decoded {
        // R, W and X are bits 0 to 2 of an entry, as they are of `Rights`.
        let rights = |flags: EptFlags| Rights::from_bits_truncate(flags.bits() as u8);
        match ept::decode(entry, level, self.caps) {
            EptEntry::NotPresent { .. } => Decoded::NotPresent,
            EptEntry::Table { hpa, flags } => Decoded::Table {
                hpa,
                rights: rights(flags),
            },
            EptEntry::Leaf { hpa, flags, .. } => Decoded::Leaf {
                hpa,
                rights: rights(flags),
            },
            EptEntry::Misconfig(_) => Decoded::Malformed,
        }
    }

    fn sub_pages(self, leaf: u64, level: Level) -> Option<Hpa> {
        self.sppt.filter(|_| {
            level == Level::L4K
                && EptFlags::from_bits_retain(leaf).contains(EptFlags::SUB_PAGE_WRITE)
        })
    }

    #[cold]
    fn fault(self, failure: Failure, access: &GuestAccess) -> SecondStageFault {
        let (gpa, gla) = (Gpa::new(access.gpa), access.linear);
        let rights = match failure {
            Failure::Denied { rights, .. } => rights,
            Failure::Malformed => return SecondStageFault::EptMisconfiguration { gpa },
            Failure::SubPageMiss => return SecondStageFault::SpptMiss { gpa, gla },
            Failure::SubPageMalformed => {
                return SecondStageFault::SpptMisconfiguration { gpa, gla };
            }
        };
        let mut qualification = match (access.operation, access.purpose) {
            // SDM Vol. 3, "EPT Violations": with accessed and dirty flags enabled, accesses to
            // guest paging structures are both.
            (Operation::Write, Purpose::GuestTable) if self.flags_managed() => {
                Qualification::READ | Qualification::WRITE
            }
            (Operation::Read, _) => Qualification::READ,
            (Operation::Write, _) => Qualification::WRITE,
            (Operation::Fetch, _) => Qualification::FETCH,
        };
        qualification |= Qualification::LINEAR_VALID;
        qualification.set(Qualification::ENTRY_READ, rights.contains(Rights::READ));
        qualification.set(Qualification::ENTRY_WRITE, rights.contains(Rights::WRITE));
        qualification.set(
            Qualification::ENTRY_EXECUTE,
            rights.contains(Rights::EXECUTE),
        );
        if let Purpose::Final {
            user,
            writable,
            no_execute,
        } = access.purpose
        {
            qualification |= Qualification::FINAL;
            qualification.set(Qualification::LINEAR_USER, user);
            qualification.set(Qualification::LINEAR_WRITABLE, writable);
            qualification.set(Qualification::LINEAR_NO_EXECUTE, no_execute);
        }
        SecondStageFault::EptViolation {
            gpa,
            qualification: qualification.bits(),
            gla,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Npt {
    pub(super) root: Hpa,
    pub(super) level: Level,
    pub(super) caps: NptCaps,
}

impl Format for Npt {
    const ACCESSED: u64 = NptFlags::ACCESSED.bits();
    const DIRTY: u64 = NptFlags::DIRTY.bits();

    fn root(self) -> (Hpa, Level) {
        (self.root, self.level)
    }

    fn flags_managed(self) -> bool {
        true
    }

    /// AMD's processors have no such log.
    fn logs(self) -> bool {
        false
    }

    #[inline(always)]
    fn decode(self, entry: u64, level: Level) -> Decoded {
        // Every nested access is a user access: without U nothing is allowed.
        let rights = |flags: NptFlags| {
            if !flags.contains(NptFlags::USER) {
                return Rights::empty();
            }
            let mut rights = Rights::READ;
            rights.set(Rights::WRITE, flags.contains(NptFlags::WRITE));
            rights.set(Rights::EXECUTE, !flags.contains(NptFlags::NO_EXECUTE));
            rights
        };
        match npt::decode(entry, level, self.caps) {
            NptEntry::NotPresent => Decoded::NotPresent,
            NptEntry::Table { hpa, flags } => Decoded::Table {
                hpa,
                rights: rights(flags),
            },
            NptEntry::Leaf { hpa, flags } => Decoded::Leaf {
                hpa,
                rights: rights(flags),
            },
            NptEntry::Reserved(_) => Decoded::Malformed,
        }
    }

    /// AMD's processors have no such permissions.
    fn sub_pages(self, _leaf: u64, _level: Level) -> Option<Hpa> {
        None
    }

    #[cold]
    fn fault(self, failure: Failure, access: &GuestAccess) -> SecondStageFault {
        let mut error = Pferr::USER;
        match failure {
            Failure::Denied { present, .. } => error.set(Pferr::PRESENT, present),
            Failure::Malformed | Failure::SubPageMiss | Failure::SubPageMalformed => {
                error |= Pferr::PRESENT | Pferr::RSVD
            }
        }
        error.set(Pferr::WRITE, access.operation == Operation::Write);
        error.set(Pferr::FETCH, access.operation == Operation::Fetch);
        error |= match access.purpose {
            Purpose::Final { .. } => Pferr::GUEST_FINAL,
            Purpose::GuestTable => Pferr::GUEST_PAGE,
        };
        SecondStageFault::NestedPageFault {
            gpa: Gpa::new(access.gpa),
            error: error.bits(),
        }
    }
}
