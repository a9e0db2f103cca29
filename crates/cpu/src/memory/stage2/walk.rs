//! One walk, in either format: down from the root, or from a table that an earlier walk came by.

use super::format::{Decoded, Failure, Format};
use super::{GuestAccess, HostPage, Operation, Purpose, Refusal, Rights};
use crate::machine::Machine;
use crate::memory::access::{Datum, Vanished};
use crate::memory::sub_page::{self, Verdict};
use crate::memory::{PAGE_MASK, Pml};
use crate::trap::Exit;
use twofold_arch::ept::EptFlags;
use twofold_arch::{Gpa, Hpa, Level};

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

pub(super) fn walk<F: Format>(
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
pub(super) fn trace<F: Format>(machine: &Machine, format: F, gpa: Gpa) -> Vec<(Level, u64)> {
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
pub(in crate::memory) enum Stop {
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
pub(in crate::memory) fn read_entry(place: usize) -> Result<u64, Stop> {
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
