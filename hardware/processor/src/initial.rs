//! What is in memory before each case.

use crate::layout::{
    self, IDT32, IDT64, INNER_STACKS, IST_STACKS, LDT, LDT_LIMIT, PAGE_TABLES, SEGMENTS, TSS16,
    TSS32, TSS64, VECTORS, access, descriptor, gate, selector,
};

/// Bytes between two handlers of real, protected and 64-bit mode.
const HANDLER_BYTES: [u32; 3] = [16, 16, 32];
/// Offset of the I/O permission bitmap in the 32-bit and the 64-bit task state segment.
pub const BITMAP: u32 = 0x68;

/// Addresses and what is put there.
#[derive(Default)]
struct Memory(Vec<(u32, Vec<u8>)>);

impl Memory {
    fn put(&mut self, address: u32, value: u64) {
        self.0.push((address, value.to_le_bytes().to_vec()));
    }

    fn put32(&mut self, address: u32, value: u32) {
        self.0.push((address, value.to_le_bytes().to_vec()));
    }
}

/// What every case begins with. `handlers` are the first handlers of real, protected and 64-bit
/// mode.
pub fn patches(handlers: [u32; 3]) -> Vec<(u32, Vec<u8>)> {
    let mut memory = Memory::default();
    gates(&mut memory, handlers);
    descriptors(&mut memory);
    page_tables(&mut memory);
    let code = SEGMENTS[crate::case::seg::CS];
    memory.0.push((code, vec![0xcc; 0x1_0000]));
    memory.0
}

fn gates(memory: &mut Memory, [real, protected, wide]: [u32; 3]) {
    let handler = |mode: usize, vector: u32| {
        let first = [real, protected, wide][mode];
        first + vector.min(VECTORS - 1) * HANDLER_BYTES[mode]
    };
    for vector in 0..256 {
        memory.put32(vector * 4, handler(0, vector));
    }
    for vector in 0..VECTORS {
        // User code may use INT3, INTO and the upper half.
        let kind = if matches!(vector, 3 | 4 | 0x30..) {
            0xee
        } else {
            0x8e
        };
        let low = gate(selector::CODE32, handler(1, vector), kind, 0);
        memory.put(IDT32 + vector * 8, low);
        let low = gate(selector::CODE64, handler(2, vector), kind, 0);
        memory.put(IDT64 + vector * 16, low);
    }
}

fn descriptors(memory: &mut Memory) {
    let system = |base, limit, kind| descriptor(base, limit, access::PRESENT | kind, 0);
    for (selector, value) in [
        (selector::CODE32, 0x00cf_9b00_0000_ffff),
        (selector::DATA32, 0x00cf_9300_0000_ffff),
        (selector::CODE64, 0x00af_9b00_0000_ffff),
        (selector::TSS32, system(TSS32, 0xff, 9)),
        (selector::TSS64, system(TSS64, 0xff, 9)),
        (selector::LDT, system(LDT, LDT_LIMIT.into(), 2)),
        (selector::TSS16, system(TSS16, 0x2b, 1)),
    ] {
        memory.put(layout::gdt_entry(selector), value);
    }
    for (level, top) in (0u32..).zip(INNER_STACKS) {
        let selector = selector::INNER_STACKS + 8 * level as u16;
        let kind = access::PRESENT | access::DATA | access::ACCESSED | (level as u8) << 5;
        let stack = descriptor(0, 0xf_ffff, kind, access::BIG | access::PAGES);
        memory.put(layout::gdt_entry(selector), stack);
        let selector = u32::from(selector) | level;
        memory.put32(TSS32 + 4 + level * 8, top);
        memory.put32(TSS32 + 8 + level * 8, selector);
        memory.put(TSS64 + 4 + level * 8, top.into());
        memory.put32(TSS16 + 2 + level * 4, top | selector << 16);
    }
    for (i, top) in (0u32..).zip(IST_STACKS) {
        memory.put(TSS64 + 0x24 + i * 8, top.into());
    }
    for tss in [TSS32, TSS64] {
        // The bitmap forbids every second pair of ports.
        memory.put32(tss + 0x64, BITMAP << 16);
        let mut bitmap = vec![0xcc; (0xff - BITMAP) as usize];
        bitmap.push(0xff);
        memory.0.push((tss + BITMAP, bitmap));
    }
}

/// The first 2 MiB as they are, by 4 KiB pages; user code may use the cases' segments.
fn page_tables(memory: &mut Memory) {
    for level in 0..3 {
        let table = PAGE_TABLES + level * 0x1000;
        memory.put(table, (u64::from(table) + 0x1000) | 7);
    }
    for page in 0..512u32 {
        let user = (0x10..0x70).contains(&page);
        let flags = if user { 7 } else { 3 };
        memory.put(
            PAGE_TABLES + 0x3000 + page * 8,
            u64::from(page) << 12 | flags,
        );
    }
}
