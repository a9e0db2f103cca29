//! The guest's own page walk: from a linear to a guest-physical address (SDM Vol. 3, "Paging").
//!
//! One loop walks every paging mode; a mode is described by [`Shape`] and the rules for its
//! entries. Where the tables are read is the caller's: the processor reads them through the second
//! stage, a debugger's translation reads them from the slots.

#[cfg(test)]
mod tests;

use crate::state::{cr0, cr4, efer};

/// Bits of a page-fault error code.
pub(crate) mod code {
    pub(crate) const PRESENT: u32 = 1 << 0;
    pub(crate) const WRITE: u32 = 1 << 1;
    pub(crate) const USER: u32 = 1 << 2;
    pub(crate) const RESERVED: u32 = 1 << 3;
    pub(crate) const FETCH: u32 = 1 << 4;
    pub(crate) const KEY: u32 = 1 << 5;
}

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE_BIT: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// The address field of an 8-byte entry at its widest.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The kind of paging in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Kind {
    /// CR0.PG is 0: linear addresses are guest-physical ones.
    #[default]
    None,
    /// 4-byte entries, two levels.
    Legacy,
    /// 8-byte entries, three levels, the topmost with four entries.
    Pae,
    /// 8-byte entries, four levels.
    Long4,
    /// 8-byte entries, five levels.
    Long5,
}

/// How the tables of a kind are laid out.
#[derive(Clone, Copy)]
struct Shape {
    levels: u32,
    entry_bytes: u64,
    index_bits: u32,
}

impl Kind {
    const fn shape(self) -> Shape {
        match self {
            Self::None => Shape {
                levels: 0,
                entry_bytes: 8,
                index_bits: 9,
            },
            Self::Legacy => Shape {
                levels: 2,
                entry_bytes: 4,
                index_bits: 10,
            },
            Self::Pae => Shape {
                levels: 3,
                entry_bytes: 8,
                index_bits: 9,
            },
            Self::Long4 => Shape {
                levels: 4,
                entry_bytes: 8,
                index_bits: 9,
            },
            Self::Long5 => Shape {
                levels: 5,
                entry_bytes: 8,
                index_bits: 9,
            },
        }
    }
}

/// Everything that a walk depends on besides the tables: worked out when a control register
/// changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Paging {
    kind: Kind,
    /// Where the topmost table is.
    root: u64,
    /// CR0.WP: supervisors may not write read-only pages.
    write_protect: bool,
    /// CR4.PSE: 4 MiB pages in legacy paging.
    page_size_extension: bool,
    no_execute: bool,
    smep: bool,
    smap: bool,
    maxphyaddr: u8,
    /// What must be zero in an entry that maps a page of the smallest size.
    last_reserved: u64,
    /// PKRU, if protection keys are in force.
    keys: Option<u32>,
}

/// What is done at a linear address, and with whose rights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LinearAccess {
    pub(crate) write: bool,
    pub(crate) fetch: bool,
    /// With user rights.
    pub(crate) user: bool,
    /// An explicit access while RFLAGS.AC suspends SMAP.
    pub(crate) smap_suspended: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mapping {
    pub(crate) gpa: u64,
    /// Bytes that the guest's page has; 4096 without paging.
    pub(crate) size: u64,
    /// The page belongs to user mode.
    pub(crate) user: bool,
    /// All entries allow writing.
    pub(crate) writable: bool,
    /// Some entry forbids fetches.
    pub(crate) no_execute: bool,
    /// The leaf's protection key.
    pub(crate) key: u8,
    /// The leaf's dirty flag is set, or there is none.
    pub(crate) dirty: bool,
}

/// Why a walk failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Failure<E> {
    /// #PF with this error code.
    PageFault(u32),
    /// The tables could not be accessed.
    Tables(E),
}

impl<E> From<E> for Failure<E> {
    fn from(error: E) -> Self {
        Self::Tables(error)
    }
}

/// What the entries above the last level say about a linear address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Upper {
    /// Guest-physical address of the last table.
    pub(crate) table: u64,
    pub(crate) user: bool,
    pub(crate) writable: bool,
    pub(crate) no_execute: bool,
}

/// The guest's tables.
pub(crate) trait GuestTables {
    /// Why they could not be accessed.
    type Error;

    /// What [`GuestTables::remember`] was told about the upper levels for the same 2 MiB, if that
    /// is still known: the processor's paging-structure cache.
    fn recall(&self, _linear: u64) -> Option<Upper> {
        None
    }

    /// Notes what the upper levels say, all of them marked as accessed.
    fn remember(&mut self, _linear: u64, _upper: Upper) {}

    /// Reads an entry of 4 or 8 bytes. `None`: nothing is there, as if the entry were not present.
    fn read(&mut self, gpa: u64, bytes: u64) -> Result<Option<u64>, Self::Error>;

    /// Sets flags in an entry that was read as `old`. `false`: it has changed since. Tables that
    /// are only looked at report that all went well.
    fn set_flags(
        &mut self,
        gpa: u64,
        bytes: u64,
        old: u64,
        flags: u64,
    ) -> Result<bool, Self::Error>;
}

/// The bits below `count`.
const fn low_bits(count: u32) -> u64 {
    if count >= 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

impl Paging {
    /// What the control registers say.
    pub(crate) fn new(cr0: u64, cr3: u64, cr4: u64, efer: u64, maxphyaddr: u8) -> Self {
        let kind = if cr0 & cr0::PG == 0 {
            Kind::None
        } else if cr4 & cr4::PAE == 0 {
            Kind::Legacy
        } else if efer & efer::LMA == 0 {
            Kind::Pae
        } else if cr4 & cr4::LA57 == 0 {
            Kind::Long4
        } else {
            Kind::Long5
        };
        let root = match kind {
            Kind::Legacy => cr3 & 0xffff_f000,
            Kind::Pae => cr3 & 0xffff_ffe0,
            _ => cr3 & ADDRESS,
        };
        let mut paging = Self {
            kind,
            root,
            write_protect: cr0 & cr0::WP != 0,
            page_size_extension: cr4 & cr4::PSE != 0,
            no_execute: efer & efer::NXE != 0 && cr4 & cr4::PAE != 0,
            smep: cr4 & cr4::SMEP != 0,
            smap: cr4 & cr4::SMAP != 0,
            maxphyaddr,
            last_reserved: 0,
            keys: None,
        };
        paging.last_reserved = paging.reserved(1, true);
        paging
    }

    /// With the rights that PKRU gives to protection keys, if CR4 and the kind of paging put them in
    /// force.
    pub(crate) fn with_keys(self, cr4: u64, pkru: u32) -> Self {
        let long = matches!(self.kind, Kind::Long4 | Kind::Long5);
        Self {
            keys: (long && cr4 & cr4::PKE != 0).then_some(pkru),
            ..self
        }
    }

    /// Whether the page's protection key forbids the access (SDM Vol. 3, "Protection Keys").
    fn key_forbids(&self, mapping: &Mapping, access: LinearAccess) -> bool {
        let Some(rights) = self.keys else {
            return false;
        };
        if access.fetch || !mapping.user {
            return false;
        }
        let rights = rights >> (2 * mapping.key);
        rights & 1 != 0 || (rights & 2 != 0 && access.write && (access.user || self.write_protect))
    }

    /// CR4.SMAP is set.
    pub(crate) fn smap(&self) -> bool {
        self.smap
    }

    /// Bits of a present entry that must be zero.
    fn reserved(&self, level: u32, leaf: bool) -> u64 {
        let beyond = ADDRESS & !low_bits(u32::from(self.maxphyaddr));
        let no_execute = if self.no_execute { 0 } else { NO_EXECUTE };
        match self.kind {
            Kind::None => 0,
            Kind::Legacy if leaf && level == 2 => {
                // PSE-36: bits 20:13 are address bits 39:32, as far as the processor has them.
                let wide = u32::from(self.maxphyaddr).saturating_sub(32).min(8);
                1 << 21 | (0xff << 13 & !(low_bits(wide) << 13))
            }
            Kind::Legacy => 0,
            Kind::Pae if level == 3 => NO_EXECUTE | 0x7ff << 52 | beyond | 0x1e6,
            Kind::Pae if leaf && level == 2 => 0x7ff << 52 | beyond | no_execute | 0xff << 13,
            Kind::Pae => 0x7ff << 52 | beyond | no_execute,
            Kind::Long4 | Kind::Long5 => {
                let inner = match (level, leaf) {
                    (4 | 5, _) => PAGE_SIZE_BIT,
                    (3, true) => low_bits(30) & !low_bits(13),
                    (2, true) => low_bits(21) & !low_bits(13),
                    _ => 0,
                };
                beyond | no_execute | inner
            }
        }
    }

    /// Whether an entry at `level` maps a page.
    fn is_leaf(&self, level: u32, entry: u64) -> bool {
        let large = entry & PAGE_SIZE_BIT != 0;
        match (self.kind, level) {
            (_, 1) => true,
            (Kind::Legacy, 2) => large && self.page_size_extension,
            (Kind::Pae, 2) => large,
            (Kind::Long4 | Kind::Long5, 2 | 3) => large,
            _ => false,
        }
    }

    /// Error code bits that depend on the access alone.
    pub(super) fn access_code(&self, access: LinearAccess) -> u32 {
        let mut error = 0;
        if access.write {
            error |= code::WRITE;
        }
        if access.user {
            error |= code::USER;
        }
        if access.fetch && (self.no_execute || self.smep) {
            error |= code::FETCH;
        }
        error
    }

    /// Whether the rights of a mapping suffice (SDM Vol. 3, "Determination of Access Rights").
    pub(crate) fn permits(&self, mapping: &Mapping, access: LinearAccess) -> bool {
        if self.kind == Kind::None {
            return true;
        }
        if access.user && !mapping.user {
            return false;
        }
        if access.fetch {
            return !mapping.no_execute && (access.user || !mapping.user || !self.smep);
        }
        if !access.user && mapping.user && self.smap && !access.smap_suspended {
            return false;
        }
        if self.key_forbids(mapping, access) {
            return false;
        }
        !access.write || mapping.writable || (!access.user && !self.write_protect)
    }

    /// Where the entry of the last table for a linear address is, and its bytes.
    #[inline(always)]
    pub(crate) fn last_entry(&self, upper: &Upper, linear: u64) -> (u64, u64) {
        let shape = self.kind.shape();
        let index = linear >> 12 & low_bits(shape.index_bits);
        (upper.table + index * shape.entry_bytes, shape.entry_bytes)
    }

    /// What an entry of the last table says if it allows the access and no flag has to be set in
    /// it. `None` decides nothing: that is left to [`walk`](Self::walk).
    #[inline(always)]
    pub(crate) fn last_mapping(
        &self,
        upper: Upper,
        entry: u64,
        linear: u64,
        access: LinearAccess,
    ) -> Option<Mapping> {
        let flags = PRESENT | Self::flags_of(access);
        if entry & (flags | self.last_reserved) != flags {
            return None;
        }
        let mapping = self.leaf(self.narrow(upper, entry), entry, 12, linear, access);
        self.permits(&mapping, access).then_some(mapping)
    }

    /// The flags that an access sets in the entry that maps the page.
    #[inline(always)]
    const fn flags_of(access: LinearAccess) -> u64 {
        if access.write {
            ACCESSED | DIRTY
        } else {
            ACCESSED
        }
    }

    /// What is left of the rights that the entries above give.
    #[inline(always)]
    fn narrow(&self, upper: Upper, entry: u64) -> Upper {
        Upper {
            table: upper.table,
            writable: upper.writable & (entry & WRITABLE != 0),
            user: upper.user & (entry & USER != 0),
            no_execute: upper.no_execute | (self.no_execute && entry & NO_EXECUTE != 0),
        }
    }

    /// Where an entry leads that maps a page of `1 << shift` bytes.
    #[inline(always)]
    fn leaf(
        &self,
        rights: Upper,
        entry: u64,
        shift: u32,
        linear: u64,
        access: LinearAccess,
    ) -> Mapping {
        let size = 1u64 << shift;
        let mut base = entry & ADDRESS & !(size - 1);
        if self.kind == Kind::Legacy {
            base &= 0xffff_ffff;
            if shift > 12 {
                base |= (entry >> 13 & 0xff) << 32;
            }
        }
        Mapping {
            gpa: base | linear & (size - 1),
            size,
            user: rights.user,
            writable: rights.writable,
            no_execute: rights.no_execute,
            key: (entry >> 59 & 15) as u8,
            dirty: access.write || entry & DIRTY != 0,
        }
    }

    /// Translates a canonical linear address.
    ///
    /// Accessed and dirty flags are set after the access was found to be allowed, from the root
    /// down. If an entry has changed in the meantime the walk starts again.
    pub(crate) fn walk<T: GuestTables>(
        &self,
        tables: &mut T,
        linear: u64,
        access: LinearAccess,
    ) -> Result<Mapping, Failure<T::Error>> {
        if self.kind == Kind::None {
            return Ok(Mapping {
                gpa: linear,
                size: 4096,
                user: true,
                writable: true,
                no_execute: false,
                key: 0,
                dirty: true,
            });
        }
        if let Some(upper) = tables.recall(linear)
            && let Ok(mapping) = self.descend(tables, linear, access, Some(upper))
        {
            return Ok(mapping);
        }
        // What is remembered never decides that an access fails.
        self.descend(tables, linear, access, None)
    }

    /// Walks down from the root, or from the last level on.
    fn descend<T: GuestTables>(
        &self,
        tables: &mut T,
        linear: u64,
        access: LinearAccess,
        start: Option<Upper>,
    ) -> Result<Mapping, Failure<T::Error>> {
        let shape = self.kind.shape();
        'again: loop {
            let (mut upper, mut level) = match start {
                Some(upper) => (upper, 1),
                None => {
                    let all = Upper {
                        table: self.root,
                        user: true,
                        writable: true,
                        no_execute: false,
                    };
                    (all, shape.levels)
                }
            };
            // Entries of this walk that lack an accessed flag.
            let mut stale = [(0u64, 0u64); 5];
            let mut stale_count = 0;
            loop {
                let shift = 12 + shape.index_bits * (level - 1);
                let index_bits = if self.kind == Kind::Pae && level == 3 {
                    2
                } else {
                    shape.index_bits
                };
                let index = linear >> shift & low_bits(index_bits);
                let place = upper.table + index * shape.entry_bytes;
                let entry = match tables.read(place, shape.entry_bytes)? {
                    Some(entry) if entry & PRESENT != 0 => entry,
                    _ => return Err(Failure::PageFault(self.access_code(access))),
                };
                let leaf = self.is_leaf(level, entry);
                if entry & self.reserved(level, leaf) != 0 {
                    let error = self.access_code(access) | code::PRESENT | code::RESERVED;
                    return Err(Failure::PageFault(error));
                }
                // The topmost entries of PAE paging have no rights and no accessed flag.
                let bare = self.kind == Kind::Pae && level == 3;
                let rights = if bare {
                    upper
                } else {
                    self.narrow(upper, entry)
                };
                if !leaf {
                    if !bare && entry & ACCESSED == 0 {
                        stale[stale_count] = (place, entry);
                        stale_count += 1;
                    }
                    upper = Upper {
                        table: entry & ADDRESS,
                        ..rights
                    };
                    level -= 1;
                    continue;
                }
                let mapping = self.leaf(rights, entry, shift, linear, access);
                if !self.permits(&mapping, access) {
                    let mut error = self.access_code(access) | code::PRESENT;
                    if self.key_forbids(&mapping, access) {
                        error |= code::KEY;
                    }
                    return Err(Failure::PageFault(error));
                }
                for &(place, entry) in &stale[..stale_count] {
                    if !tables.set_flags(place, shape.entry_bytes, entry, ACCESSED)? {
                        continue 'again;
                    }
                }
                let flags = Self::flags_of(access);
                if entry & flags != flags
                    && !tables.set_flags(place, shape.entry_bytes, entry, flags)?
                {
                    continue 'again;
                }
                if level == 1 && start.is_none() {
                    tables.remember(linear, upper);
                }
                return Ok(mapping);
            }
        }
    }

    /// Whether a linear address is canonical (SDM Vol. 1, "Canonical Addressing"). Always true
    /// outside long mode, where linear addresses have 32 bits.
    #[inline(always)]
    pub(crate) fn is_canonical(&self, linear: u64) -> bool {
        let unused = match self.kind {
            Kind::Long4 => 16,
            Kind::Long5 => 7,
            Kind::None | Kind::Legacy | Kind::Pae => return true,
        };
        ((linear as i64) << unused >> unused) as u64 == linear
    }
}
