//! arm64 stage 2: descriptors, the control register VTCR_EL2 and the arithmetic of start levels
//! (Arm ARM, "The VMSAv8-64 address translation system"; SPEC 2.9).
//!
//! Levels count as Arm does: level 3 maps pages, 2, 1 and 0 lead towards the root.

use crate::addr::Hpa;
use bitflags::bitflags;

bitflags! {
    /// The architectural bits of a stage-2 descriptor, without the address. [`MemoryType`],
    /// [`Shareability`] and [`Execute`] name the values of the fields that have several bits.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Stage2Flags: u64 {
        /// The descriptor is valid. While it is 0 the processor ignores every other bit.
        const VALID = 1 << 0;
        /// At level 3 a page (0 is reserved there); above it a pointer to a table instead of a
        /// block.
        const TABLE_OR_PAGE = 1 << 1;
        /// MemAttr\[3:0\].
        const MEM_ATTR = 0xf << 2;
        /// S2AP\[0\]: reads are allowed.
        const READ = 1 << 6;
        /// S2AP\[1\]: writes are allowed. Alone it allows writes only.
        const WRITE = 1 << 7;
        /// SH\[1:0\]. With LPA2 these are address bits 51:50.
        const SHAREABILITY = 3 << 8;
        /// AF: the page was used; without it an access faults unless hardware sets it.
        const ACCESSED = 1 << 10;
        /// DBM: hardware may set S2AP\[1\] itself.
        const DIRTY_MODIFIER = 1 << 51;
        /// Contiguous with its neighbours.
        const CONTIGUOUS = 1 << 52;
        /// XN\[1:0\].
        const EXECUTE_NEVER = 3 << 53;
        /// Bits that the processor leaves to software.
        const SOFTWARE = 0xf << 55;
    }
}

/// The lowest of the four bits that the processor leaves to software.
pub const SOFTWARE_SHIFT: u32 = 55;

/// What kind of memory a stage-2 leaf says it maps, without FEAT_S2FWB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryType {
    /// Device-nGnRE: registers.
    Device,
    /// Normal, not cacheable.
    NormalNonCacheable,
    /// Normal, write-back at both levels of cache.
    Normal,
}

impl MemoryType {
    /// The MemAttr field, in place.
    pub const fn bits(self) -> u64 {
        match self {
            Self::Device => 0b0001 << 2,
            Self::NormalNonCacheable => 0b0101 << 2,
            Self::Normal => 0b1111 << 2,
        }
    }

    /// The type in a descriptor's MemAttr field, or `None` for a type that has no name here.
    pub const fn of(descriptor: u64) -> Option<Self> {
        match descriptor >> 2 & 0xf {
            0b0001 => Some(Self::Device),
            0b0101 => Some(Self::NormalNonCacheable),
            0b1111 => Some(Self::Normal),
            _ => None,
        }
    }
}

/// Who sees the same content without maintenance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Shareability {
    /// Nobody else.
    Non = 0,
    /// Everyone, devices included.
    Outer = 2,
    /// Every processor.
    Inner = 3,
}

impl Shareability {
    /// The SH field of a descriptor, in place.
    pub const fn bits(self) -> u64 {
        (self as u64) << 8
    }
}

/// Who may fetch instructions from a page (XN\[1:0\] with FEAT_XNX; without it only
/// [`Execute::All`] and [`Execute::None`] have their meaning).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Execute {
    /// EL1 and EL0.
    All = 0,
    /// EL0 only.
    El0 = 1,
    /// Nobody.
    None = 2,
    /// EL1 only.
    El1 = 3,
}

impl Execute {
    /// The XN field, in place.
    pub const fn bits(self) -> u64 {
        (self as u64) << 53
    }

    /// What a descriptor's XN field says.
    pub const fn of(descriptor: u64) -> Self {
        match descriptor >> 53 & 3 {
            0 => Self::All,
            1 => Self::El0,
            2 => Self::None,
            _ => Self::El1,
        }
    }
}

/// The size of the smallest page and of every table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Granule {
    /// 4 KiB.
    K4,
    /// 16 KiB.
    K16,
    /// 64 KiB.
    K64,
}

impl Granule {
    /// All three.
    pub const ALL: [Self; 3] = [Self::K4, Self::K16, Self::K64];

    /// log2 of the bytes in a page.
    pub const fn shift(self) -> u32 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// log2 of the entries in a table.
    pub const fn index_bits(self) -> u32 {
        self.shift() - 3
    }

    /// log2 of the bytes that an entry at `level` covers; levels are -1 to 3.
    pub const fn level_shift(self, level: i8) -> u32 {
        self.shift() + self.index_bits() * (3 - level) as u32
    }

    /// VTCR_EL2.TG0, in place.
    const fn tg0(self) -> u64 {
        match self {
            Self::K4 => 0,
            Self::K64 => 1 << 14,
            Self::K16 => 2 << 14,
        }
    }
}

/// How a table's descriptors are laid out: the granule, and whether VTCR_EL2.DS is set (LPA2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// The granule.
    pub granule: Granule,
    /// Whether addresses of 4K and 16K descriptors have 52 bits, with bits 51:50 in the place of
    /// the shareability. 64K descriptors have 52 bits either way, in a place of their own.
    pub lpa2: bool,
}

impl Layout {
    /// A layout; LPA2 has no meaning with 64K pages and is dropped there.
    pub const fn new(granule: Granule, lpa2: bool) -> Self {
        Self {
            granule,
            lpa2: lpa2 && !matches!(granule, Granule::K64),
        }
    }

    /// Bits of the largest address that a descriptor can hold.
    pub const fn address_bits(self) -> u32 {
        match self.granule {
            Granule::K64 => 52,
            _ if self.lpa2 => 52,
            _ => 48,
        }
    }

    /// Every bit of a descriptor that belongs to the address of a page or table.
    pub const fn address_mask(self) -> u64 {
        let low = !((1 << self.granule.shift()) - 1);
        match self.granule {
            Granule::K64 => low & ((1 << 48) - 1) | 0xf << 12,
            _ if self.lpa2 => low & ((1 << 50) - 1) | 3 << 8,
            _ => low & ((1 << 48) - 1),
        }
    }

    /// The address field for `hpa`, whose bits below the page and beyond
    /// [`address_bits`](Self::address_bits) are dropped.
    pub const fn encode_address(self, hpa: Hpa) -> u64 {
        let address = hpa.get();
        let low = !((1 << self.granule.shift()) - 1);
        match self.granule {
            Granule::K64 => address & low & ((1 << 48) - 1) | (address >> 48 & 0xf) << 12,
            _ if self.lpa2 => address & low & ((1 << 50) - 1) | (address >> 50 & 3) << 8,
            _ => address & low & ((1 << 48) - 1),
        }
    }

    /// The address in a descriptor's address field.
    pub const fn decode_address(self, descriptor: u64) -> Hpa {
        let low = !((1 << self.granule.shift()) - 1);
        Hpa::new(match self.granule {
            Granule::K64 => descriptor & low & ((1 << 48) - 1) | (descriptor >> 12 & 0xf) << 48,
            _ if self.lpa2 => descriptor & low & ((1 << 50) - 1) | (descriptor >> 8 & 3) << 50,
            _ => descriptor & low & ((1 << 48) - 1),
        })
    }

    /// Whether an entry at `level` may map a block or page: level 3 always; 1G and 2M, 32M, or
    /// 512M above it; and with LPA2 also 512G (4K) and 64G (16K). A 64K block of 4T needs 52-bit
    /// physical addresses in use and is not counted.
    pub const fn may_map(self, level: i8) -> bool {
        match (self.granule, level) {
            (_, 3 | 2) => true,
            (Granule::K4, 1) => true,
            (Granule::K4, 0) | (Granule::K16, 1) => self.lpa2,
            _ => false,
        }
    }

    /// A table pointer.
    pub const fn table(self, child: Hpa) -> u64 {
        self.encode_address(child) | Stage2Flags::TABLE_OR_PAGE.bits() | Stage2Flags::VALID.bits()
    }

    /// A leaf at `level` for `hpa`, which must be aligned to what the level covers. `attributes`
    /// holds the bits that are neither address nor kind; with LPA2 the shareability is dropped,
    /// since VTCR_EL2 decides it.
    pub const fn leaf(self, hpa: Hpa, level: i8, attributes: u64) -> u64 {
        let kind = if level == 3 {
            Stage2Flags::TABLE_OR_PAGE.bits()
        } else {
            0
        };
        let own = self.address_mask() | Stage2Flags::TABLE_OR_PAGE.bits();
        attributes & !own | self.encode_address(hpa) | kind | Stage2Flags::VALID.bits()
    }
}

/// What a descriptor says to the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage2Entry {
    /// Bit 0 is clear: a translation fault.
    Invalid,
    /// A pointer to the table of the level below.
    Table {
        /// The table's address.
        hpa: Hpa,
    },
    /// A block or page.
    Leaf {
        /// Its address, aligned to what the level covers.
        hpa: Hpa,
        /// The attributes. With LPA2 the shareability is clear.
        flags: Stage2Flags,
    },
    /// Bits 1:0 have a combination that is reserved at this level: a translation fault too.
    Reserved,
    /// The address lies beyond the physical address size: an address size fault.
    AddressSize {
        /// The address.
        hpa: Hpa,
    },
}

/// Decodes a descriptor of a table at `level`, where physical addresses have `pa_bits` bits.
#[inline]
pub const fn decode(descriptor: u64, level: i8, layout: Layout, pa_bits: u32) -> Stage2Entry {
    let flags = Stage2Flags::from_bits_truncate(descriptor);
    if !flags.contains(Stage2Flags::VALID) {
        return Stage2Entry::Invalid;
    }
    let leaf = match (flags.contains(Stage2Flags::TABLE_OR_PAGE), level) {
        (true, 3) => true,
        (true, _) => false,
        (false, 3) => return Stage2Entry::Reserved,
        (false, _) if layout.may_map(level) => true,
        (false, _) => return Stage2Entry::Reserved,
    };
    let mut hpa = layout.decode_address(descriptor);
    if leaf {
        // Address bits below the block are RES0 and ignored here as by the processor.
        hpa = Hpa::new(hpa.get() & !((1 << layout.granule.level_shift(level)) - 1));
    }
    if pa_bits < 64 && hpa.get() >> pa_bits != 0 {
        return Stage2Entry::AddressSize { hpa };
    }
    if leaf {
        let flags = if layout.lpa2 {
            flags.difference(Stage2Flags::SHAREABILITY)
        } else {
            flags
        };
        Stage2Entry::Leaf { hpa, flags }
    } else {
        Stage2Entry::Table { hpa }
    }
}

/// Why there is no geometry for an IPA size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GeometryError {
    /// The IPA size is not 32 to 52 bits.
    IpaBits(u32),
    /// More than 48 bits need 64K pages or LPA2.
    NeedsWideAddresses(u32),
}

/// Where a stage-2 walk begins and how large its root is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// The layout of the descriptors.
    pub layout: Layout,
    /// Bits of an intermediate physical address, 32 to 52.
    pub ipa_bits: u32,
    /// The level of the root, 0 to 2.
    pub start_level: i8,
    /// The number of consecutive tables that form the root, 1 to 16. The root must be aligned to
    /// the next power of two of its size.
    pub root_pages: u32,
}

impl Geometry {
    /// The geometry that needs the fewest levels, with up to 16 tables side by side at the root
    /// and at least two levels (SPEC 2.9).
    ///
    /// # Errors
    /// [`GeometryError`] for an IPA size that the layout cannot translate.
    pub const fn new(layout: Layout, ipa_bits: u32) -> Result<Self, GeometryError> {
        if ipa_bits < 32 || ipa_bits > 52 {
            return Err(GeometryError::IpaBits(ipa_bits));
        }
        if ipa_bits > layout.address_bits() {
            return Err(GeometryError::NeedsWideAddresses(ipa_bits));
        }
        let granule = layout.granule;
        // Sixteen tables side by side resolve four bits.
        let resolved = ipa_bits - 4 - granule.shift();
        let levels = resolved.div_ceil(granule.index_bits());
        let levels = if levels < 2 { 2 } else { levels };
        let start_level = 4 - levels as i8;
        let above = granule.level_shift(start_level - 1);
        let root_pages = (((1u64 << ipa_bits) - 1) >> above) as u32 + 1;
        Ok(Self {
            layout,
            ipa_bits,
            start_level,
            root_pages,
        })
    }

    /// The number of levels, at least 2.
    pub const fn levels(self) -> u32 {
        (4 - self.start_level) as u32
    }

    /// Tables that mapping one page may need: one a level, the root apart.
    pub const fn tables_per_page(self) -> u32 {
        self.levels() - 1
    }

    /// The value of VTCR_EL2.SL0.
    pub const fn sl0(self) -> u64 {
        let base = match self.layout.granule {
            Granule::K4 => 2,
            Granule::K16 | Granule::K64 => 3,
        };
        (base - self.start_level) as u64
    }
}

/// ID_AA64MMFR0_EL1.PARange as VTCR_EL2.PS wants it, and back.
pub const PA_RANGES: [u32; 7] = [32, 36, 40, 42, 44, 48, 52];

/// What a processor's stage 2 can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stage2Caps {
    /// Bits of a physical address: one of [`PA_RANGES`].
    pub pa_bits: u32,
    /// VMIDs have 16 bits.
    pub vmid16: bool,
    /// Hardware sets access flags.
    pub hardware_access_flag: bool,
    /// Hardware manages the dirty state too.
    pub hardware_dirty: bool,
}

impl Stage2Caps {
    /// From ID_AA64MMFR0_EL1 and ID_AA64MMFR1_EL1. A range that is not known yet counts as the
    /// largest known one.
    pub const fn from_id_registers(mmfr0: u64, mmfr1: u64) -> Self {
        let range = (mmfr0 & 0xf) as usize;
        Self {
            pa_bits: PA_RANGES[if range < 7 { range } else { 6 }],
            vmid16: mmfr1 >> 4 & 0xf == 2,
            hardware_access_flag: mmfr1 & 0xf >= 1,
            hardware_dirty: mmfr1 & 0xf >= 2,
        }
    }

    /// Bits of a VMID.
    pub const fn vmid_bits(self) -> u32 {
        if self.vmid16 { 16 } else { 8 }
    }
}

/// VTCR_EL2 for a geometry: write-back inner-shareable walks, hardware access flags where they
/// exist, and 16-bit VMIDs where they exist. Hardware dirty state is left off: a hypervisor that
/// wants it sets [`VTCR_HD`].
pub const fn vtcr(geometry: Geometry, caps: Stage2Caps) -> u64 {
    let mut index = 0;
    let mut ps = 0;
    while index < PA_RANGES.len() {
        // Without wide addresses the output is limited to 48 bits.
        if PA_RANGES[index] <= caps.pa_bits && PA_RANGES[index] <= geometry.layout.address_bits() {
            ps = index as u64;
        }
        index += 1;
    }
    VTCR_RES1
        | (64 - geometry.ipa_bits) as u64
        | geometry.sl0() << 6
        | 1 << 8 // IRGN0: write-back, write-allocate
        | 1 << 10 // ORGN0: the same
        | 3 << 12 // SH0: inner shareable
        | geometry.layout.granule.tg0()
        | ps << 16
        | if caps.vmid16 { VTCR_VS } else { 0 }
        | if caps.hardware_access_flag { VTCR_HA } else { 0 }
        | if geometry.layout.lpa2 { VTCR_DS } else { 0 }
}

/// VS: 16-bit VMIDs.
pub const VTCR_VS: u64 = 1 << 19;
/// HA: hardware sets access flags.
pub const VTCR_HA: u64 = 1 << 21;
/// HD: hardware manages the dirty state.
pub const VTCR_HD: u64 = 1 << 22;
/// Bit 31, which is always 1.
pub const VTCR_RES1: u64 = 1 << 31;
/// DS: 52-bit addresses with 4K and 16K pages (LPA2).
pub const VTCR_DS: u64 = 1 << 32;

/// VTTBR_EL2 for a root and a VMID. The VMID of the host is 0.
pub const fn vttbr(root: Hpa, vmid: u16) -> u64 {
    // Bits 51:48 of a 52-bit root stand in bits 5:2.
    let address = root.get();
    address & ((1 << 48) - 2) | (address >> 48 & 0xf) << 2 | (vmid as u64) << 48
}

#[cfg(test)]
mod tests;
