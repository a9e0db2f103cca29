//! Second-stage tables to walk, legal and illegal, the same on both sides of a comparison.
//!
//! The image in `hardware/x86` puts each [`Case`] into memory, lets its guest make one access, and
//! prints what its processor said ([`Walked`]); the program of this package does the same with
//! `twofold-cpu`. Both make the cases from their numbers, so nothing has to be sent.
//!
//! All cases use one guest-physical address, [`GPA`]. The four entries on the way to it are random,
//! but not quite: where an entry leads somewhere, it leads to the next table, to the page at
//! [`TARGET`], or to zeros, so that both sides find the same.
#![no_std]

use core::fmt;
use core::str::FromStr;
use twofold_arch::ept::EptFlags;
use twofold_arch::npt::NptFlags;
use twofold_arch::{Gpa, Hpa, Level};

/// Width of physical addresses on the machines that take part.
pub const PHYSICAL_ADDRESS_BITS: u8 = 40;

/// Cases for each kind of tables.
pub const CASES: u64 = 4000;

/// What the guest accesses, above the first 512 GiB: no entry on the way is needed by the guest itself.
/// Its low 30 bits are those of [`TARGET`], so that leaves of all sizes lead there.
pub const GPA: Gpa = Gpa::new(0x80_4000_0000 | TARGET.get());
/// The word that a walk to the end finds: the code of a `ret`.
pub const TARGET: Hpa = Hpa::new(0x0302_5018);
/// The value of that word.
pub const TARGET_VALUE: u64 = 0xc3;
/// What the guest writes there: a `ret` again.
pub const WRITTEN_VALUE: u64 = 0xaa_00c3;

/// The tables, a page each from the root at level 4 down to level 1.
pub const TABLES: Hpa = Hpa::new(0x0310_0000);
/// Three more, from level 3 down, through which the guest reaches its own memory at 0.
pub const OWN_TABLES: Hpa = Hpa::new(0x0310_4000);
/// Pages of the guest's own memory, from guest-physical address 0 on.
pub const OWN_PAGES: u64 = 16;

/// The sub-page permission tables, a page each from the root at level 4 down to the vectors.
pub const SUB_PAGE_TABLES: Hpa = Hpa::new(0x0310_8000);

/// Which tables are walked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// EPT with accessed and dirty flags.
    Ept,
    /// EPT without.
    EptWithoutFlags,
    /// EPT with accessed and dirty flags, and with violations that become exceptions of the guest
    /// where an entry does not suppress that.
    EptWithExceptions,
    /// EPT with accessed and dirty flags, and with sub-page permissions.
    EptWithSubPages,
    /// Nested paging.
    Npt,
}

impl Kind {
    /// How the kind is called in a log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ept => "ept",
            Self::EptWithoutFlags => "ept-noad",
            Self::EptWithExceptions => "ept-ve",
            Self::EptWithSubPages => "ept-spp",
            Self::Npt => "npt",
        }
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [
            Self::Ept,
            Self::EptWithoutFlags,
            Self::EptWithExceptions,
            Self::EptWithSubPages,
            Self::Npt,
        ]
        .into_iter()
        .find(|kind| kind.name() == name)
    }

    /// An entry that allows everything, without its address and without what only leaves have.
    const fn everything(self) -> u64 {
        match self {
            Self::Ept | Self::EptWithoutFlags | Self::EptWithExceptions | Self::EptWithSubPages => {
                EptFlags::RWX.bits()
            }
            Self::Npt => NptFlags::PRESENT.bits() | NptFlags::WRITE.bits() | NptFlags::USER.bits(),
        }
    }

    /// What a leaf has beside its permissions: a memory type.
    const fn leaf(self) -> u64 {
        match self {
            Self::Ept | Self::EptWithoutFlags | Self::EptWithExceptions | Self::EptWithSubPages => {
                6 << 3
            }
            Self::Npt => 0,
        }
    }

    /// The words that the tables have outside the four entries of a case: the guest's own memory,
    /// which begins at `own`.
    pub fn own_words(self, own: Hpa) -> impl Iterator<Item = (Hpa, u64)> {
        let page = |number: u64| OWN_TABLES.get() + number * 0x1000;
        let upper = [
            (TABLES.get(), page(0)),
            (page(0), page(1)),
            (page(1), page(2)),
        ];
        let leaves = (0..OWN_PAGES).map(move |number| {
            let leaf = self.everything() | self.leaf();
            (page(2) + 8 * number, (own.get() + number * 0x1000) | leaf)
        });
        upper
            .into_iter()
            .map(move |(place, table)| (place, table | self.everything()))
            .chain(leaves)
            .map(|(place, value)| (Hpa::new(place), value))
    }
}

/// What the guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Reads the word at [`GPA`].
    Read,
    /// Writes [`WRITTEN_VALUE`] there.
    Write,
    /// Calls the code there.
    Fetch,
}

/// Four entries and an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Case {
    /// The entries of levels 4, 3, 2 and 1.
    pub entries: [u64; 4],
    /// Those of the sub-page permission tables; nothing looks at them in other kinds.
    pub sub_pages: [u64; 4],
    /// The access.
    pub operation: Operation,
}

/// Levels of the entries of a case.
pub const LEVELS: [Level; 4] = [Level::L512G, Level::L1G, Level::L2M, Level::L4K];

/// Where the four entries of a case are.
pub fn places() -> [Hpa; 4] {
    places_in(TABLES)
}

/// The entries for [`GPA`] in four tables, a page each.
fn places_in(tables: Hpa) -> [Hpa; 4] {
    core::array::from_fn(|step| {
        let index = LEVELS[step].index(GPA.frame()) as u64;
        Hpa::new(tables.get() + step as u64 * 0x1000 + 8 * index)
    })
}

/// A generator of bits: SplitMix64.
struct Bits(u64);

impl Bits {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// True once in `of` times.
    fn once_in(&mut self, of: u64) -> bool {
        self.next().is_multiple_of(of)
    }
}

impl Case {
    /// The case with this number.
    pub fn new(kind: Kind, number: u64) -> Self {
        let mut bits = Bits(number);
        bits.next();
        let operation = match number % 3 {
            0 => Operation::Read,
            1 => Operation::Write,
            _ => Operation::Fetch,
        };
        let mut case = Self {
            entries: core::array::from_fn(|step| entry(kind, LEVELS[step], step, &mut bits)),
            sub_pages: [0; 4],
            operation,
        };
        if kind == Kind::EptWithSubPages {
            case.protect_sub_pages(&mut bits);
        }
        case
    }

    /// Mostly writes, to pages that forbid them and ask the table.
    fn protect_sub_pages(&mut self, bits: &mut Bits) {
        if !bits.once_in(4) {
            self.operation = Operation::Write;
        }
        if !bits.once_in(4) {
            self.entries[3] &= !EptFlags::WRITE.bits();
        }
        if !bits.once_in(8) {
            self.entries[3] |= EptFlags::SUB_PAGE_WRITE.bits();
        }
        self.sub_pages = core::array::from_fn(|step| sub_page_entry(step, bits));
    }

    /// The words of the tables that the case is about, and where they are.
    pub fn words(&self) -> impl Iterator<Item = (Hpa, u64)> + use<> {
        let entries = places().into_iter().zip(self.entries);
        entries.chain(places_in(SUB_PAGE_TABLES).into_iter().zip(self.sub_pages))
    }
}

fn sub_page_entry(step: usize, bits: &mut Bits) -> u64 {
    let strange = bits.once_in(8);
    if step == 3 {
        // The odd bits are reserved.
        let permissions = bits.next() & 0x5555_5555_5555_5555;
        let reserved = 2 << (2 * (bits.next() % 32));
        return if strange {
            permissions | reserved
        } else {
            permissions
        };
    }
    let mut entry = (SUB_PAGE_TABLES.get() + (step as u64 + 1) * 0x1000) | 1;
    if bits.once_in(8) {
        entry &= !1;
    }
    if strange {
        // Any bit but the valid one and those of the address.
        let width = u64::from(PHYSICAL_ADDRESS_BITS);
        let bit = bits.next() % (11 + 64 - width);
        entry |= 1 << if bit < 11 { 1 + bit } else { width + bit - 11 };
    }
    entry
}

fn entry(kind: Kind, level: Level, step: usize, bits: &mut Bits) -> u64 {
    let may_map = matches!(level, Level::L1G | Level::L2M);
    // A leaf, or the bit that makes one where none may be.
    let large = bits.once_in(if may_map { 4 } else { 24 });
    let leaf = level == Level::L4K || large && may_map;
    let mut entry = if leaf {
        TARGET.get() & !(level.bytes() - 1) | kind.leaf()
    } else {
        TABLES.get() + (step as u64 + 1) * 0x1000
    };
    entry |= kind.everything();
    if large {
        entry |= EptFlags::LARGE.bits();
    }
    // Permissions: the three low bits, and NX of nested tables.
    if bits.once_in(3) {
        entry = entry & !7 | bits.next() & 7;
    }
    if kind == Kind::Npt && bits.once_in(6) {
        entry |= NptFlags::NO_EXECUTE.bits();
    }
    // Memory type and what is beside it.
    if bits.once_in(8) {
        entry = entry & !0x78 | bits.next() & 0x78;
    }
    // Flags, and bits that processors ignore.
    if bits.once_in(3) {
        entry |= bits.next() & 0xf00;
    }
    if bits.once_in(4) {
        let ignored = if kind == Kind::Npt { 0x7ff } else { 0xfff };
        entry |= (bits.next() & ignored) << 52;
    }
    // An offset inside a large page.
    if large && may_map && bits.once_in(6) {
        entry |= 1 << (12 + bits.next() % u64::from(level.shift() - 12));
    }
    // An address that is too wide.
    if bits.once_in(16) {
        let width = u64::from(PHYSICAL_ADDRESS_BITS);
        entry |= 1 << (width + bits.next() % (52 - width));
    }
    entry
}

/// How an access ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// As it should; with what was read, or is in memory then.
    Done(u64),
    /// An EPT violation with this qualification.
    Violation(u64),
    /// A #VE of the guest, whose information page has this qualification.
    Exception(u64),
    /// An EPT misconfiguration.
    Misconfiguration,
    /// An SPP-related event with this qualification.
    SubPages(u64),
    /// A nested page fault with this error code.
    NestedFault(u64),
    /// Something that is no answer to the case.
    Strange(u64),
}

/// What a processor did with a case: one line of a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Walked {
    /// The kind of tables.
    pub kind: Kind,
    /// The number of the case.
    pub number: u64,
    /// How it ended.
    pub end: End,
    /// The guest-physical address reported with a fault; 0 without one.
    pub gpa: u64,
    /// The four entries afterwards.
    pub entries: [u64; 4],
}

impl fmt::Display for Walked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (end, detail) = match self.end {
            End::Done(value) => ("done", value),
            End::Violation(qualification) => ("violation", qualification),
            End::Exception(qualification) => ("exception", qualification),
            End::Misconfiguration => ("misconfiguration", 0),
            End::SubPages(qualification) => ("sub-pages", qualification),
            End::NestedFault(error) => ("nested-fault", error),
            End::Strange(number) => ("strange", number),
        };
        let [a, b, c, d] = self.entries;
        write!(
            f,
            "~ {} {} {end} {detail:x} {:x} {a:x} {b:x} {c:x} {d:x}",
            self.kind.name(),
            self.number,
            self.gpa
        )
    }
}

/// A line that is no [`Walked`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotWalked;

impl FromStr for Walked {
    type Err = NotWalked;

    fn from_str(line: &str) -> Result<Self, NotWalked> {
        let mut words = line
            .trim_end()
            .strip_prefix("~ ")
            .ok_or(NotWalked)?
            .split(' ');
        let mut word = || words.next().ok_or(NotWalked);
        let hex = |word: &str| u64::from_str_radix(word, 16).map_err(|_| NotWalked);
        let kind = Kind::from_name(word()?).ok_or(NotWalked)?;
        let number = word()?.parse().map_err(|_| NotWalked)?;
        let name = word()?;
        let detail = hex(word()?)?;
        let end = match name {
            "done" => End::Done(detail),
            "violation" => End::Violation(detail),
            "exception" => End::Exception(detail),
            "misconfiguration" => End::Misconfiguration,
            "sub-pages" => End::SubPages(detail),
            "nested-fault" => End::NestedFault(detail),
            "strange" => End::Strange(detail),
            _ => return Err(NotWalked),
        };
        let gpa = hex(word()?)?;
        let mut entries = [0; 4];
        for entry in &mut entries {
            *entry = hex(word()?)?;
        }
        Ok(Self {
            kind,
            number,
            end,
            gpa,
            entries,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::string::ToString;

    #[test]
    fn a_line_reads_as_what_was_written() {
        for end in [
            End::Done(0xc3),
            End::Violation(0x181),
            End::Exception(0x182),
            End::Misconfiguration,
            End::SubPages(0x800),
            End::NestedFault(0x1_0000_0006),
            End::Strange(7),
        ] {
            let walked = Walked {
                kind: Kind::EptWithoutFlags,
                number: 12,
                end,
                gpa: GPA.get(),
                entries: [1, 2, 3, u64::MAX],
            };
            assert_eq!(walked.to_string().parse(), Ok(walked));
        }
        assert_eq!("= a scenario | ok | ".parse::<Walked>(), Err(NotWalked));
    }

    #[test]
    fn the_entries_are_in_four_tables_and_not_among_the_guests_own() {
        for (step, place) in places().into_iter().enumerate() {
            assert_eq!(place.get() >> 12, (TABLES.get() >> 12) + step as u64);
            assert!(
                Kind::Ept
                    .own_words(Hpa::new(0))
                    .all(|(own, _)| own != place)
            );
        }
    }
}
