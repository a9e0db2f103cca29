//! Where things lie in the memory of every case, and the descriptors that describe it.
//!
//! 64 KiB at each of `CODE`, `DATA`, … are what the segment registers of most cases begin with: so
//! an access through the wrong register shows, and offsets wrap within reach of a window.

/// The global descriptor table.
pub const GDT: u32 = 0x8000;
/// Its limit: 0x100 entries.
pub const GDT_LIMIT: u16 = 0x7ff;
/// The local descriptor table.
pub const LDT: u32 = 0x8800;
/// Its limit.
pub const LDT_LIMIT: u16 = 0xff;
/// The 32-bit task state segment, with the I/O permission bitmap behind it.
pub const TSS32: u32 = 0x9000;
/// The 16-bit task state segment.
pub const TSS16: u32 = 0x9400;
/// The 64-bit task state segment.
pub const TSS64: u32 = 0x9500;
/// Interrupt gates of 32-bit mode.
pub const IDT32: u32 = 0x9800;
/// Interrupt gates of 64-bit mode.
pub const IDT64: u32 = 0xa000;
/// Tops of the stacks of levels 0 to 2 in the task state segments.
pub const INNER_STACKS: [u32; 3] = [0xc000, 0xd000, 0xe000];
/// Top of the stacks of the interrupt stack table.
pub const IST_STACKS: [u32; 2] = [0xf000, 0xf800];
/// Vectors that have handlers.
pub const VECTORS: u32 = 64;

/// First bytes of the segments that registers begin with, in the order ES, CS, SS, DS, FS, GS.
pub const SEGMENTS: [u32; 6] = [0x3_0000, 0x1_0000, 0x4_0000, 0x2_0000, 0x5_0000, 0x6_0000];
/// Page tables of the cases that page.
pub const PAGE_TABLES: u32 = 0x7_0000;

/// Selectors of the driver's own descriptors, which every table of a case has too.
pub mod selector {
    pub const CODE32: u16 = 0x08;
    pub const DATA32: u16 = 0x10;
    pub const CODE64: u16 = 0x28;
    pub const TSS32: u16 = 0x30;
    /// 16 bytes.
    pub const TSS64: u16 = 0x38;
    /// 16 bytes.
    pub const LDT: u16 = 0x48;
    pub const TSS16: u16 = 0x58;
    /// The stacks of levels 0 to 2 in the task state segments.
    pub const INNER_STACKS: u16 = 0xa0;
    /// The first of the slots of a case's own segments, in the order of `SEGMENTS`.
    pub const SLOTS: u16 = 0x60;
    /// Descriptors that a family of cases fills as it likes.
    pub const FREE: u16 = 0x100;
}

/// Parts of a descriptor's access byte and flags.
pub mod access {
    pub const PRESENT: u8 = 0x80;
    pub const CODE: u8 = 0x1a;
    pub const DATA: u8 = 0x12;
    pub const EXPAND_DOWN: u8 = 0x04;
    pub const ACCESSED: u8 = 0x01;
    /// Flags (the upper nibble of byte 6): 32 bits.
    pub const BIG: u8 = 4;
    /// Flags: 64-bit code.
    pub const LONG: u8 = 2;
    /// Flags: the limit is in pages.
    pub const PAGES: u8 = 8;
}

/// A segment descriptor. `limit` is as it lies in the descriptor: in bytes or pages.
pub fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    u64::from(limit & 0xffff)
        | u64::from(base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | u64::from(limit >> 16 & 15) << 48
        | u64::from(flags) << 52
        | u64::from(base >> 24) << 56
}

/// A gate of 16 or 32 bits, or the lower half of one of 64.
pub fn gate(selector: u16, offset: u32, access: u8, count: u8) -> u64 {
    u64::from(offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(count) << 32
        | u64::from(access) << 40
        | u64::from(offset >> 16) << 48
}

/// The address of the global descriptor that a selector names.
pub fn gdt_entry(selector: u16) -> u32 {
    GDT + u32::from(selector & !7)
}
