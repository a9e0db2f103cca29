//! One case: a state of the processor to begin with, and what is in memory.

use crate::layout::{
    self, GDT, GDT_LIMIT, IDT32, IDT64, PAGE_TABLES, SEGMENTS, VECTORS, descriptor, selector,
};

/// Index of a segment register in [`Case::segments`].
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Bits of CR0.
pub mod cr0 {
    pub const PE: u32 = 1;
    pub const ET: u32 = 0x10;
    pub const NE: u32 = 0x20;
    pub const WP: u32 = 1 << 16;
    pub const AM: u32 = 1 << 18;
    pub const PG: u32 = 1 << 31;
}

/// Bits of RFLAGS.
pub mod flag {
    pub const FIXED: u64 = 2;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
}

/// How the driver enters a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// Real mode, by a far jump.
    Real,
    /// Protected mode at level 0, by a far jump.
    Inner,
    /// Protected mode at an outer level, by IRETD.
    Outer,
    /// Virtual-8086 mode, by IRETD.
    Virtual,
    /// Long mode, by IRETQ.
    Long,
}

/// Memory that is put in place before a case and compared after it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Windows {
    /// The edges and middles of the segments, the inner stacks and the descriptor tables.
    Segments,
    /// Those and page tables.
    Paging,
}

impl Windows {
    /// Addresses and lengths, in whole words.
    pub fn list(self) -> Vec<(u32, u32)> {
        let mut list = vec![
            (0, 0x400),
            (GDT, 0x480),
            (layout::LDT, 0x100),
            (layout::TSS32, 0x100),
            (layout::TSS16, 0x200),
            (IDT32, 8 * VECTORS),
            (IDT64, 16 * VECTORS),
        ];
        for top in layout::INNER_STACKS.iter().chain(&layout::IST_STACKS) {
            list.push((top - 0x80, 0x80));
        }
        list.push((SEGMENTS[seg::CS], 0x80));
        for base in [0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000, 0x5_0000, 0x6_0000] {
            list.push((base + 0x7fc0, 0x240));
            list.push((base + 0xff80, 0x100));
        }
        if self == Self::Paging {
            // As much of each table as is used.
            for (table, length) in [0x20, 0x20, 0x20, 0x400, 0x20, 0x20, 0x200, 0x20]
                .into_iter()
                .enumerate()
            {
                list.push((PAGE_TABLES + 0x1000 * table as u32, length));
            }
        }
        list
    }
}

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is about.
    pub name: String,
    pub entry: Entry,
    pub windows: Windows,
    pub gdt_limit: u16,
    pub idt_base: u32,
    pub idt_limit: u16,
    pub ldt: u16,
    pub tr: u16,
    pub cr0: u32,
    pub cr3: u32,
    pub cr4: u32,
    pub efer: u32,
    pub pkru: u32,
    pub dr: [u32; 4],
    pub dr7: u32,
    pub segments: [u16; 6],
    pub gpr: [u64; 16],
    pub flags: u64,
    pub rip: u64,
    /// Addresses and the bytes that are put there; later ones lie over earlier ones.
    pub patches: Vec<(u32, Vec<u8>)>,
    /// Width of the code: for disassembly.
    pub bitness: u32,
    /// The instructions.
    pub code: Vec<u8>,
    /// Arithmetic flags that are undefined at the end.
    pub undefined: u64,
    /// How our processor leaves, if it does so without an exception and is right to.
    pub leaves: Option<&'static str>,
    /// A register whose value is undefined at the end, by its number.
    pub undefined_register: Option<usize>,
}

/// Where the code of most cases begins in its segment.
pub const IP: u64 = 0x8000;

impl Case {
    fn new(name: impl Into<String>, entry: Entry, bitness: u32) -> Self {
        Self {
            name: name.into(),
            entry,
            windows: Windows::Segments,
            gdt_limit: GDT_LIMIT,
            idt_base: IDT32,
            idt_limit: (VECTORS * 8 - 1) as u16,
            ldt: selector::LDT,
            tr: selector::TSS32,
            cr0: cr0::PE | cr0::ET | cr0::NE,
            cr3: 0,
            cr4: 0,
            efer: 0,
            pkru: 0,
            dr: [0; 4],
            dr7: 0,
            segments: [0; 6],
            gpr: std::array::from_fn(|i| 0x1111_1111 * i as u64),
            flags: flag::FIXED,
            rip: IP,
            patches: Vec::new(),
            bitness,
            code: Vec::new(),
            undefined: 0,
            leaves: None,
            undefined_register: None,
        }
        .with_stack(0x8100)
    }

    /// Real mode with a segment of its own in each register.
    pub fn real(name: impl Into<String>) -> Self {
        let mut case = Self::new(name, Entry::Real, 16);
        case.cr0 = cr0::ET | cr0::NE;
        case.idt_base = 0;
        case.idt_limit = 0x3ff;
        case.segments = SEGMENTS.map(|base| (base >> 4) as u16);
        case
    }

    /// Virtual-8086 mode with the same segments.
    pub fn virtual_8086(name: impl Into<String>, iopl: u64) -> Self {
        let mut case = Self::new(name, Entry::Virtual, 16);
        case.segments = SEGMENTS.map(|base| (base >> 4) as u16);
        case.flags |= flag::VM | iopl << 12;
        case
    }

    /// Protected mode, with 16- or 32-bit segments of 64 KiB of this level in their slots.
    pub fn protected(name: impl Into<String>, bitness: u32, level: u8) -> Self {
        let entry = if level == 0 {
            Entry::Inner
        } else {
            Entry::Outer
        };
        let mut case = Self::new(name, entry, bitness);
        let flags = if bitness == 32 { access_flags::BIG } else { 0 };
        for (register, base) in SEGMENTS.into_iter().enumerate() {
            let access = if register == seg::CS {
                layout::access::CODE
            } else {
                layout::access::DATA
            } | layout::access::PRESENT
                | layout::access::ACCESSED
                | level << 5;
            case.set_slot(register, base, 0xffff, access, flags);
            case.segments[register] |= u16::from(level);
        }
        case
    }

    /// 64-bit mode (or with another code segment compatibility mode), flat, at a level.
    pub fn long(name: impl Into<String>, level: u8) -> Self {
        let mut case = Self::new(name, Entry::Long, 64);
        case.cr0 |= cr0::PG | cr0::WP;
        case.cr3 = PAGE_TABLES;
        case.cr4 = 0x20;
        case.efer = 0xd01;
        case.idt_base = IDT64;
        case.idt_limit = (VECTORS * 16 - 1) as u16;
        case.tr = selector::TSS64;
        case.windows = Windows::Paging;
        for register in 0..6 {
            let (kind, flags) = if register == seg::CS {
                (layout::access::CODE, layout::access::LONG)
            } else {
                (layout::access::DATA, layout::access::BIG)
            };
            let access = kind | layout::access::PRESENT | layout::access::ACCESSED | level << 5;
            case.set_slot(register, 0, 0xf_ffff, access, flags | layout::access::PAGES);
            case.segments[register] |= u16::from(level);
        }
        case.rip = u64::from(SEGMENTS[seg::CS]) + IP;
        case.gpr[4] = u64::from(SEGMENTS[seg::SS]) + 0x8100;
        case
    }

    /// Puts a descriptor into the slot of a segment register and the slot's selector into the
    /// register, with level 0.
    pub fn set_slot(&mut self, register: usize, base: u32, limit: u32, access: u8, flags: u8) {
        let slot = selector::SLOTS + 8 * register as u16;
        self.patch64(
            layout::gdt_entry(slot),
            descriptor(base, limit, access, flags),
        );
        self.segments[register] = slot;
    }

    pub fn patch64(&mut self, address: u32, value: u64) {
        self.patches.push((address, value.to_le_bytes().to_vec()));
    }

    pub fn with_stack(mut self, pointer: u64) -> Self {
        self.gpr[4] = pointer;
        self
    }

    /// Puts code where RIP is, if the code segment lies where it usually does.
    pub fn with_code(mut self, code: &[u8]) -> Self {
        let at = if self.entry == Entry::Long {
            self.rip as u32
        } else {
            SEGMENTS[seg::CS] + self.rip as u32
        };
        self.code = code.to_vec();
        self.patches.push((at, code.to_vec()));
        self
    }
}

use layout::access as access_flags;
