//! The second-stage walk: from a guest-physical address to host memory, through EPT or NPT.
//!
//! The walk is the hardware's. It reads the entries that the hypervisor wrote, knows only the
//! architecture's bits, sets accessed and dirty flags in the tables themselves by
//! compare-exchange, and reports a failure as the processor does: an EPT violation with its
//! qualification, an EPT misconfiguration, or a nested page fault with its error code.

mod format;
mod walk;

pub(crate) use walk::WalkCache;
pub(super) use walk::{Stop, read_entry};

use super::{Memory, PAGE_SHIFT, Pml};
use crate::machine::{Machine, SecondStageKind};
use crate::trap::Exit;
use bitflags::bitflags;
use format::{Ept, Format, Npt};
use twofold_arch::ept::{EptCaps, Eptp};
use twofold_arch::npt::NptCaps;
use twofold_arch::{Gpa, Hpa, Level};
use walk::{trace, walk};

/// Where the second-stage tables are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SecondStage {
    /// Extended page tables.
    Ept(Eptp),
    /// Nested page tables.
    Npt {
        /// The root table (nCR3).
        root: Hpa,
        /// Its level: [`Level::L512G`] or [`Level::L256T`].
        level: Level,
    },
    /// The two extended page tables of a TD. Guest-physical addresses have no bits above the shared
    /// one: those that have are a page fault with a reserved bit (TDX Module Base Architecture
    /// Specification, "Guest Physical Address Translation").
    Td {
        /// For addresses without the shared bit: the Secure EPT.
        secure: Eptp,
        /// For addresses with it. They are looked up with the bit.
        shared: Eptp,
        /// The number of the shared bit: 47 or 51.
        shared_bit: u8,
    },
}

bitflags! {
    /// What the entries of a walk allow together.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) struct Rights: u8 {
        const READ = 1;
        const WRITE = 2;
        const EXECUTE = 4;
    }
}

/// What is done at a guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    Read,
    Write,
    Fetch,
}

impl Operation {
    /// The right that it needs.
    const fn right(self) -> Rights {
        match self {
            Self::Read => Rights::READ,
            Self::Write => Rights::WRITE,
            Self::Fetch => Rights::EXECUTE,
        }
    }

    /// The flags that it sets in a leaf, where there are flags.
    const fn flags<F: Format>(self) -> u64 {
        match self {
            Self::Write => F::ACCESSED | F::DIRTY,
            Self::Read | Self::Fetch => F::ACCESSED,
        }
    }
}

/// On whose behalf a guest-physical address is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// It is what a linear address translates to. What the guest's own tables say about that
    /// address is reported with a violation.
    Final {
        user: bool,
        writable: bool,
        no_execute: bool,
    },
    /// The guest's page walk reads one of the guest's table entries, or sets its A or D flag.
    GuestTable,
}

/// An access to a guest-physical address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestAccess {
    pub(crate) gpa: u64,
    /// How many bytes, all in the page of `gpa`. Only the sub-page permissions of a write depend on
    /// it.
    pub(crate) bytes: u64,
    pub(crate) operation: Operation,
    /// The linear address that is being translated or accessed.
    pub(crate) linear: u64,
    pub(crate) purpose: Purpose,
}

/// A 4 KiB page of host memory that a guest-physical address translates to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HostPage {
    pub(crate) hpa: Hpa,
    /// Without the right to write if that was given to this access alone, by sub-page permissions.
    pub(crate) rights: Rights,
    /// The leaf's dirty flag is set, or there is none to set.
    pub(crate) dirty: bool,
    /// Where the sub-page permissions are that allowed this access, if they did.
    pub(crate) vector: Option<usize>,
}

/// The tables in use.
#[derive(Clone, Copy, Debug)]
enum Tables {
    Ept(Ept),
    Npt(Npt),
    Td(Td),
}

/// The tables of a TD.
#[derive(Clone, Copy, Debug)]
struct Td {
    secure: Ept,
    shared: Ept,
    shared_bit: u8,
}

impl Td {
    /// The tables that translate an address.
    const fn of(self, gpa: u64) -> Ept {
        if gpa >> self.shared_bit & 1 != 0 {
            self.shared
        } else {
            self.secure
        }
    }
}

/// Why an access was refused.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Refusal {
    /// What the processor leaves the guest with.
    pub(crate) exit: Exit,
    /// The entry that decided lets an EPT violation become #VE.
    pub(crate) convertible: bool,
}

impl Refusal {
    /// Whether the tables refused it.
    pub(crate) const fn is_fault(&self) -> bool {
        matches!(self.exit, Exit::SecondStage(_))
    }
}

/// The second stage of one vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walker {
    tables: Tables,
}

impl Walker {
    /// A walker before the hypervisor has chosen tables: it finds no translation.
    pub(crate) fn none(machine: &Machine) -> Self {
        // A root at level 1 covers one table's worth of addresses; the address is never used,
        // because `translate` refuses a null root.
        let second_stage = match machine.config().second_stage {
            SecondStageKind::Ept => SecondStage::Ept(Eptp::new(Hpa::new(0), Level::L512G, true)),
            SecondStageKind::Npt => SecondStage::Npt {
                root: Hpa::new(0),
                level: Level::L512G,
            },
        };
        Self::new(machine, second_stage)
    }

    pub(crate) fn new(machine: &Machine, second_stage: SecondStage) -> Self {
        let maxphyaddr = machine.config().maxphyaddr;
        let ept = |pointer| Ept {
            pointer,
            caps: EptCaps::full(maxphyaddr),
            sppt: None,
        };
        let tables = match second_stage {
            SecondStage::Ept(pointer) => Tables::Ept(ept(pointer)),
            SecondStage::Td {
                secure,
                shared,
                shared_bit,
            } => Tables::Td(Td {
                secure: ept(secure),
                shared: ept(shared),
                shared_bit,
            }),
            SecondStage::Npt { root, level } => Tables::Npt(Npt {
                root,
                level,
                caps: NptCaps::full(maxphyaddr),
            }),
        };
        Self { tables }
    }

    /// Chooses the root of the sub-page permission table, or none. Whether it could be: NPT has no
    /// such table.
    pub(crate) fn set_sppt(&mut self, root: Option<Hpa>) -> bool {
        match &mut self.tables {
            Tables::Ept(format) => {
                format.sppt = root;
                true
            }
            Tables::Npt(_) | Tables::Td(_) => root.is_none(),
        }
    }

    /// The root of the sub-page permission table.
    pub(crate) fn sppt(&self) -> Option<Hpa> {
        match self.tables {
            Tables::Ept(format) => format.sppt,
            Tables::Npt(_) | Tables::Td(_) => None,
        }
    }

    /// Whether a TD's code and page tables may not be at an address: they are private, and have no
    /// bits above the shared one either.
    pub(crate) fn forbids_code(&self, gpa: u64) -> bool {
        match self.tables {
            Tables::Td(td) => gpa >> td.shared_bit != 0,
            Tables::Ept(_) | Tables::Npt(_) => false,
        }
    }

    /// Whether an address is that of a TD and has bits above the shared one.
    pub(crate) fn is_beyond_shared_bit(&self, gpa: Gpa) -> bool {
        match self.tables {
            Tables::Td(td) => gpa.get() >> td.shared_bit > 1,
            Tables::Ept(_) | Tables::Npt(_) => false,
        }
    }

    /// The entries on the way to an address.
    pub(crate) fn trace(&self, machine: &Machine, gpa: Gpa) -> Vec<(Level, u64)> {
        match self.tables {
            Tables::Ept(format) => trace(machine, format, gpa),
            Tables::Npt(format) => trace(machine, format, gpa),
            Tables::Td(td) => trace(machine, td.of(gpa.get()), gpa),
        }
    }

    /// Whether a read of a guest table entry counts as a write of the page that holds it.
    pub(crate) fn guest_tables_are_written(&self) -> bool {
        match self.tables {
            Tables::Ept(format) => format.flags_managed(),
            Tables::Npt(format) => format.flags_managed(),
            // Guest tables are private.
            Tables::Td(td) => td.secure.flags_managed(),
        }
    }

    /// Translates, sets accessed and dirty flags, and logs dirty flags that it sets.
    ///
    /// # Errors
    /// What the processor leaves the guest with.
    pub(crate) fn translate(
        &self,
        machine: &Machine,
        cache: &mut WalkCache,
        log: &mut Option<Pml>,
        access: &GuestAccess,
    ) -> Result<HostPage, Refusal> {
        match self.tables {
            Tables::Ept(format) => walk(machine, format, cache, log, access),
            Tables::Npt(format) => walk(machine, format, cache, log, access),
            Tables::Td(td) => walk(machine, td.of(access.gpa), cache, log, access),
        }
    }
}

impl Memory {
    /// Translates a guest-physical address to a page of host memory.
    pub(crate) fn second_stage(
        &mut self,
        machine: &Machine,
        access: &GuestAccess,
    ) -> Result<HostPage, Refusal> {
        self.walker
            .translate(machine, &mut self.walk_cache, &mut self.pml, access)
    }

    /// The entries of the second stage on the way to an address.
    pub(crate) fn trace_second_stage(&self, machine: &Machine, gpa: Gpa) -> Vec<(Level, u64)> {
        self.walker.trace(machine, gpa)
    }
}

const _: () = assert!(
    PAGE_SHIFT == 12,
    "levels are shifted by what the formats prescribe"
);
