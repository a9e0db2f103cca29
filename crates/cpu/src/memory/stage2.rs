//! The second-stage walk: from a guest-physical address to host memory, through EPT or NPT.
//!
//! The walk is the hardware's. It reads the entries that the hypervisor wrote, knows only the
//! architecture's bits, sets accessed and dirty flags in the tables themselves by
//! compare-exchange, and reports a failure as the processor does: an EPT violation with its
//! qualification, an EPT misconfiguration, or a nested page fault with its error code.

use super::access::{Datum, Vanished};
use super::sub_page::{self, Verdict};
use super::{Memory, PAGE_MASK, PAGE_SHIFT, Pml};
use crate::machine::{Machine, SecondStageKind};
use crate::trap::{Exit, SecondStageFault};
use bitflags::bitflags;
use twofold_arch::ept::{self, EptCaps, EptEntry, EptFlags, Eptp, Qualification};
use twofold_arch::npt::{self, NptCaps, NptEntry, NptFlags};
use twofold_arch::{Gpa, Hpa, Level, Pferr};

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

/// What an entry means, whatever its format.
enum Decoded {
    NotPresent,
    Table { hpa: Hpa, rights: Rights },
    Leaf { hpa: Hpa, rights: Rights },
    Malformed,
}

/// Why a walk failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Failure {
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
trait Format: Copy {
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
struct Ept {
    pointer: Eptp,
    caps: EptCaps,
    /// The root of the sub-page permission table, if there is one.
    sppt: Option<Hpa>,
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
struct Npt {
    root: Hpa,
    level: Level,
    caps: NptCaps,
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

/// A table that a walk came by on its way to a leaf.
#[derive(Clone, Copy, Debug)]
struct Start {
    table: Hpa,
    level: Level,
    /// What the entries above allow together.
    rights: Rights,
}

/// The processor's paging-structure cache of the second stage: for each 2 MiB of guest-physical
/// addresses the table that holds their leaves. Everything above was marked as accessed.
pub(crate) struct WalkCache(Box<[Option<(u64, Start)>; Self::COUNT]>);

impl WalkCache {
    const COUNT: usize = 256;

    pub(crate) fn new() -> Self {
        Self(Box::new([None; Self::COUNT]))
    }

    pub(crate) fn flush(&mut self) {
        self.0.fill(None);
    }

    fn get(&self, gpa: u64) -> Option<Start> {
        let region = gpa >> Level::L2M.shift();
        match self.0[region as usize & (Self::COUNT - 1)] {
            Some((cached, start)) if cached == region => Some(start),
            _ => None,
        }
    }

    fn put(&mut self, gpa: u64, start: Start) {
        let region = gpa >> Level::L2M.shift();
        self.0[region as usize & (Self::COUNT - 1)] = Some((region, start));
    }
}

fn walk<F: Format>(
    machine: &Machine,
    format: F,
    cache: &mut WalkCache,
    log: &mut Option<Pml>,
    access: &GuestAccess,
) -> Result<HostPage, Refusal> {
    if let Some(start) = cache.get(access.gpa) {
        if let Some(page) = known_page(machine, format, access, start) {
            return Ok(page);
        }
        if let Ok((page, _)) = descend(machine, format, log, access, start) {
            return Ok(page);
        }
    }
    // What is cached never decides that an access fails.
    let stop = match walk_from_root(machine, format, log, access) {
        Ok((page, last)) => {
            if last.level <= Level::L2M {
                cache.put(access.gpa, last);
            }
            return Ok(page);
        }
        Err(stop) => stop,
    };
    let convertible = stop.is_convertible();
    let exit = match stop {
        Stop::Refused(failure) => Exit::SecondStage(format.fault(failure, access)),
        Stop::SubPageDenied {
            rights,
            suppress_ve,
            distance,
        } => {
            let failure = Failure::Denied {
                rights,
                present: true,
                suppress_ve,
            };
            // What is reported is the first byte that must not be written.
            let denied = GuestAccess {
                gpa: access.gpa + distance,
                linear: access.linear.wrapping_add(distance),
                ..*access
            };
            Exit::SecondStage(format.fault(failure, &denied))
        }
        Stop::LogFull => Exit::PmlFull,
        Stop::Vanished(place) => Exit::HostFault { hva: place as u64 },
    };
    Err(Refusal { exit, convertible })
}

/// What the last table says if it allows the access by itself and no flag has to be set: most of the
/// time. `None` decides nothing.
#[inline(always)]
fn known_page<F: Format>(
    machine: &Machine,
    format: F,
    access: &GuestAccess,
    start: Start,
) -> Option<HostPage> {
    let gfn = Gpa::new(access.gpa).frame();
    let place = machine.host(start.table) + start.level.index(gfn) * size_of::<u64>();
    let entry = read_entry(place).ok()?;
    let decoded = match start.level {
        // Nearly always, and simpler to decode.
        Level::L4K => format.decode(entry, Level::L4K),
        level => format.decode(entry, level),
    };
    let Decoded::Leaf { hpa, rights } = decoded else {
        return None;
    };
    let rights = rights & start.rights;
    let flags = access.operation.flags::<F>();
    let settled = !format.flags_managed() || entry & flags == flags;
    (settled && rights.contains(access.operation.right())).then(|| HostPage {
        hpa: inside_page(hpa, start.level, access.gpa),
        rights,
        dirty: !format.flags_managed() || entry & F::DIRTY != 0,
        vector: None,
    })
}

/// The 4 KiB page with this address inside a page of `level`.
#[inline(always)]
fn inside_page(hpa: Hpa, level: Level, gpa: u64) -> Hpa {
    Hpa::new(hpa.get() | gpa & (level.bytes() - 1) & PAGE_MASK)
}

/// Walks without an access, to show what there is.
fn trace<F: Format>(machine: &Machine, format: F, gpa: Gpa) -> Vec<(Level, u64)> {
    let mut seen = Vec::new();
    let (mut table, mut level) = format.root();
    if table.get() == 0 {
        return seen;
    }
    loop {
        let place = machine.host(table) + level.index(gpa.frame()) * size_of::<u64>();
        let Ok(entry) = read_entry(place) else {
            return seen;
        };
        seen.push((level, entry));
        match (format.decode(entry, level), level.below()) {
            (Decoded::Table { hpa, .. }, Some(below)) => (table, level) = (hpa, below),
            _ => return seen,
        }
    }
}

fn walk_from_root<F: Format>(
    machine: &Machine,
    format: F,
    log: &mut Option<Pml>,
    access: &GuestAccess,
) -> Result<(HostPage, Start), Stop> {
    let (table, level) = format.root();
    // Addresses that the root does not cover are not translated by anything.
    if table.get() == 0 || access.gpa >> (level.shift() + 9) != 0 {
        return Err(Stop::Refused(Failure::Denied {
            rights: Rights::empty(),
            present: false,
            // There is no entry that could say otherwise.
            suppress_ve: true,
        }));
    }
    descend(
        machine,
        format,
        log,
        access,
        Start {
            table,
            level,
            rights: Rights::all(),
        },
    )
}

/// Why a walk ended early.
pub(super) enum Stop {
    /// The tables do not allow the access.
    Refused(Failure),
    /// Sub-page permissions do not allow a write of the byte at this distance from its first.
    SubPageDenied {
        rights: Rights,
        suppress_ve: bool,
        distance: u64,
    },
    /// A dirty flag has to be set, and the log of those has no room.
    LogFull,
    /// There is no memory at this address of the process.
    Vanished(usize),
}

impl Stop {
    /// Whether the entry that decided lets an EPT violation become #VE.
    const fn is_convertible(&self) -> bool {
        match *self {
            Self::Refused(Failure::Denied { suppress_ve, .. })
            | Self::SubPageDenied { suppress_ve, .. } => !suppress_ve,
            Self::Refused(_) | Self::LogFull | Self::Vanished(_) => false,
        }
    }
}

/// Whether a leaf, or an entry that is not present, keeps an EPT violation from becoming #VE.
const fn suppresses_ve(entry: u64) -> bool {
    EptFlags::from_bits_retain(entry).contains(EptFlags::SUPPRESS_VE)
}

/// Walks down from a table. Also returns the last table of the walk.
#[inline(always)]
fn descend<F: Format>(
    machine: &Machine,
    format: F,
    log: &mut Option<Pml>,
    access: &GuestAccess,
    start: Start,
) -> Result<(HostPage, Start), Stop> {
    let wanted = access.operation.right();
    let refuse = |failure| Err(Stop::Refused(failure));
    let gfn = Gpa::new(access.gpa).frame();
    'again: loop {
        let Start {
            mut table,
            mut level,
            mut rights,
        } = start;
        // Entries of this walk that lack an accessed flag.
        let mut stale = [(0usize, 0u64); 5];
        let mut stale_count = 0;
        loop {
            let place = machine.host(table) + level.index(gfn) * size_of::<u64>();
            let entry = read_entry(place)?;
            let (hpa, allowed, leaf) = match format.decode(entry, level) {
                Decoded::NotPresent => {
                    return refuse(Failure::Denied {
                        rights: Rights::empty(),
                        present: false,
                        suppress_ve: suppresses_ve(entry),
                    });
                }
                Decoded::Malformed => return refuse(Failure::Malformed),
                Decoded::Table { hpa, rights } => (hpa, rights, false),
                Decoded::Leaf { hpa, rights } => (hpa, rights, true),
            };
            let last = Start {
                table,
                level,
                rights,
            };
            rights &= allowed;
            if !leaf {
                if format.flags_managed() && entry & F::ACCESSED == 0 {
                    stale[stale_count] = (place, entry);
                    stale_count += 1;
                }
                table = hpa;
                // A leaf is found at level 1 at the latest: the formats know no other entry there.
                let Some(below) = level.below() else {
                    return refuse(Failure::Malformed);
                };
                level = below;
                continue;
            }
            let mut vector = None;
            if !rights.contains(wanted) {
                let Some(sppt) = sub_pages(format, entry, level, rights, access) else {
                    return refuse(Failure::Denied {
                        rights,
                        present: true,
                        suppress_ve: suppresses_ve(entry),
                    });
                };
                let maxphyaddr = machine.config().maxphyaddr;
                match sub_page::judge(machine, sppt, maxphyaddr, access.gpa, access.bytes)? {
                    Verdict::Allowed { vector: place } => vector = Some(place),
                    Verdict::Denied(distance) => {
                        return Err(Stop::SubPageDenied {
                            rights,
                            suppress_ve: suppresses_ve(entry),
                            distance,
                        });
                    }
                    Verdict::Miss => return refuse(Failure::SubPageMiss),
                    Verdict::Misconfigured => return refuse(Failure::SubPageMalformed),
                }
            }
            let mut dirty = true;
            if format.flags_managed() {
                let flags = access.operation.flags::<F>();
                dirty = (entry | flags) & F::DIRTY != 0;
                let log = log
                    .as_mut()
                    .filter(|_| format.logs() && !entry & flags & F::DIRTY != 0);
                // No flag changes if the log has no room.
                if log.as_ref().is_some_and(|log| log.is_full()) {
                    return Err(Stop::LogFull);
                }
                for &(place, entry) in &stale[..stale_count] {
                    if !exchange_entry(place, entry, entry | F::ACCESSED)? {
                        continue 'again;
                    }
                }
                if entry & flags != flags && !exchange_entry(place, entry, entry | flags)? {
                    continue 'again;
                }
                if let Some(log) = log {
                    log.log(machine, access.gpa).map_err(Stop::Vanished)?;
                }
            }
            let page = HostPage {
                hpa: inside_page(hpa, level, access.gpa),
                rights,
                dirty,
                vector,
            };
            return Ok((page, last));
        }
    }
}

/// The table of sub-page permissions that judges an access which the entries of a walk forbid, if
/// one does: only for a write, not of the guest's page walk, to a page that may be read.
fn sub_pages<F: Format>(
    format: F,
    leaf: u64,
    level: Level,
    rights: Rights,
    access: &GuestAccess,
) -> Option<Hpa> {
    let eligible = access.operation == Operation::Write
        && matches!(access.purpose, Purpose::Final { .. })
        && rights.contains(Rights::READ);
    eligible.then(|| format.sub_pages(leaf, level)).flatten()
}

/// Reads a table entry. Tables are the hypervisor's own memory and do not vanish, but a wrong root
/// must not crash the program either.
#[inline(always)]
pub(super) fn read_entry(place: usize) -> Result<u64, Stop> {
    let pointer = std::ptr::with_exposed_provenance::<u8>(place);
    #[expect(unsafe_code)]
    // UNSAFETY: second-stage tables are raw memory.
    // SAFETY: the address comes from the root or from an entry that points to a table; the MMU
    // frees a table only after no vCPU can be walking it.
    unsafe { u64::load(pointer) }.map_err(|Vanished| Stop::Vanished(place))
}

fn exchange_entry(place: usize, old: u64, new: u64) -> Result<bool, Stop> {
    let pointer = std::ptr::with_exposed_provenance_mut::<u8>(place);
    #[expect(unsafe_code)]
    // UNSAFETY: second-stage tables are raw memory.
    // SAFETY: as for `read_entry`.
    let found = unsafe { u64::compare_exchange(pointer, old, new) };
    found
        .map(|found| found == old)
        .map_err(|Vanished| Stop::Vanished(place))
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
