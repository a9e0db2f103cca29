//! The host's stage 2 of the original, read from memory and decoded.

use crate::Result;
use crate::debugger::Debugger;
use std::collections::BTreeMap;
use twofold_arch::Hpa;
use twofold_arch::stage2::{
    Geometry, Granule, Layout, MemoryType, PA_RANGES, Stage2Caps, Stage2Entry, Stage2Flags,
    VTCR_HA, VTCR_VS, decode, vtcr,
};

#[derive(Default)]
struct Found {
    leaves: BTreeMap<(i8, &'static str), u64>,
    tables: u64,
    empty: u64,
    annotated: BTreeMap<u64, u64>,
    software: BTreeMap<u64, u64>,
    complaints: Vec<String>,
}

struct Walk {
    debugger: Debugger,
    layout: Layout,
    pa_bits: u32,
    found: Found,
}

impl Walk {
    /// Everything in a table whose first entry is for `address`.
    fn table(&mut self, table: u64, level: i8, address: u64) -> Result<()> {
        let size = 1u64 << self.layout.granule.level_shift(level);
        for (index, entry) in self.debugger.table(table)?.into_iter().enumerate() {
            let address = address + index as u64 * size;
            self.entry(entry, level, address)?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: u64, level: i8, address: u64) -> Result<()> {
        let ends = Stage2Flags::VALID | Stage2Flags::TABLE_OR_PAGE;
        let mask = self.layout.address_mask() | ends.bits();
        match decode(entry, level, self.layout, self.pa_bits) {
            Stage2Entry::Invalid if entry == 0 => self.found.empty += 1,
            Stage2Entry::Invalid => *self.found.annotated.entry(entry).or_default() += 1,
            Stage2Entry::Table { hpa } => {
                self.found.tables += 1;
                if entry & !mask != 0 {
                    self.complain(entry, level, address, "a table with unknown bits");
                }
                self.table(hpa.get(), level + 1, address)?;
            }
            Stage2Entry::Leaf { hpa, flags } => {
                let known =
                    Stage2Flags::all() - Stage2Flags::CONTIGUOUS - Stage2Flags::DIRTY_MODIFIER;
                if entry & !(mask | known.bits()) != 0 {
                    self.complain(entry, level, address, "a leaf with unknown bits");
                }
                if hpa != Hpa::new(address) {
                    self.complain(entry, level, address, "not mapped to itself");
                }
                let kind = match MemoryType::of(entry) {
                    Some(MemoryType::Normal) => "memory",
                    Some(MemoryType::Device) => "device",
                    Some(MemoryType::NormalNonCacheable) => "not cacheable",
                    None => "?",
                };
                if kind == "?" || !flags.contains(Stage2Flags::ACCESSED) {
                    self.complain(entry, level, address, "unknown kind of memory, or no AF");
                }
                *self.found.leaves.entry((level, kind)).or_default() += 1;
                let state = flags.bits() >> 55 & 0xf;
                *self.found.software.entry(state).or_default() += 1;
            }
            Stage2Entry::Reserved => self.complain(entry, level, address, "reserved"),
            Stage2Entry::AddressSize { .. } => {
                self.complain(entry, level, address, "beyond the machine's addresses");
            }
        }
        Ok(())
    }

    fn complain(&mut self, entry: u64, level: i8, address: u64, what: &str) {
        let text = format!("{entry:#018x} at level {level} for {address:#x}: {what}");
        self.found.complaints.push(text);
    }
}

/// Decodes the table of a machine that has stopped, and says what is in it.
///
/// # Errors
/// If an entry is not what this project's codec expects.
pub(crate) fn decode_all(mut debugger: Debugger) -> Result<()> {
    let [root, control] = ["VTTBR_EL2", "VTCR_EL2"].map(|name| debugger.number(name));
    let (root, control) = (root?, control?);
    let (vttbr, theirs) = (debugger.register(root)?, debugger.register(control)?);
    debugger.ask("Qqemu.PhyMemMode:1")?;
    let layout = Layout::new(Granule::K4, false);
    let geometry = Geometry::new(layout, 64 - (theirs & 0x3f) as u32)
        .map_err(|error| format!("VTCR_EL2 {theirs:#x}: {error:?}"))?;
    let caps = Stage2Caps {
        pa_bits: PA_RANGES[(theirs >> 16 & 7).min(6) as usize],
        vmid16: theirs & VTCR_VS != 0,
        hardware_access_flag: theirs & VTCR_HA != 0,
        hardware_dirty: false,
    };
    let ours = vtcr(geometry, caps);
    println!("VTTBR_EL2 {vttbr:#x}, VTCR_EL2 {theirs:#x}: {geometry:?}");
    let mut walk = Walk {
        debugger,
        layout,
        pa_bits: caps.pa_bits,
        found: Found::default(),
    };
    if ours != theirs {
        let text = format!("VTCR_EL2 is {theirs:#x}, and {ours:#x} by our arithmetic");
        walk.found.complaints.push(text);
    }
    let page = vttbr & ((1 << 48) - 2);
    for number in 0..u64::from(geometry.root_pages) {
        let covered = 1u64 << layout.granule.level_shift(geometry.start_level - 1);
        walk.table(page + number * 4096, geometry.start_level, number * covered)?;
    }
    let found = walk.found;
    for ((level, kind), count) in &found.leaves {
        println!("level {level}, {kind}: {count} leaves");
    }
    println!("{} tables, {} empty entries", found.tables, found.empty);
    for (entry, count) in &found.annotated {
        println!("annotation {entry:#x}: {count} pages");
    }
    println!(
        "software bits of leaves, and how many have them: {:?}",
        found.software
    );
    for complaint in &found.complaints {
        println!("COMPLAINT: {complaint}");
    }
    if !found.complaints.is_empty() || found.leaves.is_empty() || found.annotated.is_empty() {
        return Err("the original's table is not what this project's codec expects".into());
    }
    println!("every entry is understood");
    Ok(())
}
