//! The image that every machine runs: the assembled driver, the table of cases behind it, and the
//! records that it leaves in memory. `driver.asm` has the other side of each format.

use crate::case::{Case, Entry, Windows};
use crate::layout::GDT;
use anyhow::{Result, ensure};

/// Where the image is loaded.
pub const BASE: u32 = 0x10_0000;
/// Where it has to end.
const LIMIT: usize = 0x200_0000;
/// Where the records begin.
pub const OUTPUT: u32 = 0x300_0000;
/// Physical memory that the driver uses.
pub const MEMORY: usize = 0x700_0000;

/// Offsets in the driver's header.
mod header {
    pub const END: usize = 0x14;
    pub const INITIAL: usize = 0x24;
    pub const CASES: usize = 0x28;
    pub const VERBOSE: usize = 0x2c;
}

/// Bytes of addresses at the driver's end.
const ADDRESSES: usize = 20;
/// Bytes of a case before its patches.
pub const CONTEXT_BYTES: usize = 236;
/// Bytes of a record before its list of changes.
const RECORD_BYTES: usize = 280;
/// Bytes of the stack in a record.
pub const FRAME_BYTES: usize = 64;

/// What a machine left of a case.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Mode of the handler: 0 real, 1 protected, 2 64-bit.
    pub handler: u32,
    pub vector: u32,
    /// With the stack pointer of the handler.
    pub gpr: [u64; 16],
    /// In the handler.
    pub flags: u64,
    pub cr2: u64,
    pub cr0: u32,
    pub cr3: u32,
    pub cr4: u32,
    pub efer: u32,
    pub dr6: u32,
    pub dr7: u32,
    /// CS, SS, DS, ES, FS, GS, TR and LDTR in the handler.
    pub selectors: [u16; 8],
    /// Bases and limits of the GDT and the IDT.
    pub tables: [u8; 12],
    /// Base of the handler's stack.
    pub stack_base: u32,
    /// What lies at the top of the handler's stack.
    pub frame: Vec<u8>,
    /// Words of the windows that have changed, by address.
    pub changes: Vec<(u32, u32)>,
}

/// What the driver says of itself: where `saved` and `home` are, and the handlers of real, protected
/// and 64-bit mode.
///
/// # Errors
/// It is too short.
pub fn addresses(driver: &[u8]) -> Result<[u32; 5]> {
    ensure!(
        driver.len() > 0x100,
        "the driver has {} bytes",
        driver.len()
    );
    let begin = driver.len() - ADDRESSES;
    Ok([0, 4, 8, 12, 16].map(|at| word(driver, begin + at)))
}

/// The image of these cases.
///
/// # Errors
/// They do not fit.
pub fn build(driver: &[u8], cases: &[Case], verbose: bool) -> Result<Vec<u8>> {
    let mut image = driver.to_vec();
    let [_, _, handlers @ ..] = addresses(driver)?;
    let address = |image: &Vec<u8>| BASE + image.len() as u32;
    let mut windows = Vec::new();
    for kind in [Windows::Segments, Windows::Paging] {
        windows.push(address(&image));
        for (start, length) in kind.list() {
            image.extend(start.to_le_bytes());
            image.extend(length.to_le_bytes());
        }
        image.extend([0; 8]);
    }
    let initial = address(&image);
    append_patches(&mut image, &crate::initial::patches(handlers));
    let first = address(&image);
    for (id, case) in (0u32..).zip(cases) {
        let begin = image.len();
        append_context(&mut image, case, id, windows[case.windows as usize]);
        append_patches(&mut image, &case.patches);
        let length = (image.len() - begin) as u32;
        image[begin..begin + 4].copy_from_slice(&length.to_le_bytes());
    }
    image.extend([0; 4]);
    ensure!(
        image.len() < LIMIT - BASE as usize,
        "{} cases make an image of {} bytes, which do not fit; ask for fewer",
        cases.len(),
        image.len()
    );
    let end = address(&image);
    for (at, value) in [
        (header::END, end),
        (header::INITIAL, initial),
        (header::CASES, first),
        (header::VERBOSE, u32::from(verbose)),
    ] {
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    Ok(image)
}

fn append_patches(image: &mut Vec<u8>, patches: &[(u32, Vec<u8>)]) {
    for (address, bytes) in patches {
        image.extend(address.to_le_bytes());
        image.extend((bytes.len() as u32).to_le_bytes());
        image.extend(bytes);
        while !image.len().is_multiple_of(4) {
            image.push(0);
        }
    }
    image.extend([0; 8]);
}

fn append_context(image: &mut Vec<u8>, case: &Case, id: u32, windows: u32) {
    let begin = image.len();
    let entry = match case.entry {
        Entry::Real => 0,
        Entry::Inner => 1,
        Entry::Outer => 2,
        Entry::Virtual => 3,
        Entry::Long => 4,
    };
    let mut words = |values: &[u32]| values.iter().for_each(|v| image.extend(v.to_le_bytes()));
    words(&[0, id, entry, windows]);
    image.extend(case.gdt_limit.to_le_bytes());
    image.extend(GDT.to_le_bytes());
    image.extend(case.idt_limit.to_le_bytes());
    image.extend(case.idt_base.to_le_bytes());
    image.extend(case.ldt.to_le_bytes());
    image.extend(case.tr.to_le_bytes());
    let mut words = |values: &[u32]| values.iter().for_each(|v| image.extend(v.to_le_bytes()));
    words(&[case.cr0, case.cr3, case.cr4, case.efer, case.pkru]);
    words(&case.dr);
    words(&[case.dr7]);
    let [es, cs, ss, ds, fs, gs] = case.segments;
    for selector in [es, ss, ds, fs, gs, 0] {
        image.extend(selector.to_le_bytes());
    }
    for value in case.gpr.iter().chain([&case.flags, &case.rip]) {
        image.extend(value.to_le_bytes());
    }
    image.extend([0; 4]);
    image.extend(u32::from(cs).to_le_bytes());
    debug_assert_eq!(image.len() - begin, CONTEXT_BYTES);
}

/// The records of a machine's memory from [`OUTPUT`] on. Fewer than there are cases if the machine
/// did not reach its end.
///
/// # Errors
/// Something that is not a record.
pub fn records(memory: &[u8], count: usize) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::with_capacity(count);
    let mut at = 0;
    while outcomes.len() < count {
        if at + RECORD_BYTES > memory.len() {
            break;
        }
        let length = word(memory, at) as usize;
        if length == 0 {
            break;
        }
        ensure!(
            length >= RECORD_BYTES
                && at + length <= memory.len()
                && word(memory, at + 4) as usize == outcomes.len(),
            "record {} is none: length {length}, case {}",
            outcomes.len(),
            word(memory, at + 4)
        );
        outcomes.push(record(&memory[at + 8..at + length]));
        at += length;
    }
    Ok(outcomes)
}

fn record(bytes: &[u8]) -> Outcome {
    let mut tables = [0; 12];
    tables.copy_from_slice(&bytes[192..204]);
    let changes = bytes[RECORD_BYTES - 8..]
        .chunks_exact(8)
        .map(|change| (word(change, 0), word(change, 4)))
        .collect();
    Outcome {
        handler: word(bytes, 0),
        vector: word(bytes, 4),
        gpr: std::array::from_fn(|i| long(bytes, 8 + i * 8)),
        flags: long(bytes, 136),
        cr2: long(bytes, 144),
        cr0: word(bytes, 152),
        cr3: word(bytes, 156),
        cr4: word(bytes, 160),
        efer: word(bytes, 164),
        dr6: word(bytes, 168),
        dr7: word(bytes, 172),
        selectors: std::array::from_fn(|i| word(bytes, 176 + i * 2) as u16),
        tables,
        stack_base: word(bytes, 204),
        frame: bytes[208..208 + FRAME_BYTES].to_vec(),
        changes,
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}
