//! Whether what the processor reads says what the access maps say: in the leaves and in the sub-page
//! permission table.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::invariants::{Report, Rule, Violation};
use crate::mmu::{Mmu, Writer};
use crate::spte::{self, PRIVATE};
use alloc::collections::BTreeSet;
use twofold_arch::sppt::{AccessMap, WriteVector};
use twofold_arch::{Gfn, Gpa, Level};
use twofold_table::sppt::{Sppt, is_cut};
use twofold_table::{Cursor, Entry, Height};

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Whether a leaf allows writes to protected frames only by way of the sub-page permission
    /// table, and to others without it; asked of each frame's map and not of the counts.
    pub(crate) fn obeys_access_map(&self, as_id: u16, gfn: Gfn, level: Level, entry: u64) -> bool {
        if entry & PRIVATE != 0 {
            return !spte::has_sub_pages::<F>(entry);
        }
        let mut frames = (gfn.get()..gfn.get() + level.frames()).map(Gfn::new);
        match frames.any(|gfn| self.access_map(as_id, gfn) != AccessMap::FULL) {
            true => level == Level::L4K && entry & F::WRITE == 0,
            false => !spte::has_sub_pages::<F>(entry),
        }
    }

    /// Looks at every vector of the table of an address space. Adds its pages to `tables`.
    pub(crate) fn check_sppt(
        &self,
        writer: &Writer<F>,
        as_id: u16,
        tables: &mut BTreeSet<u64>,
        report: &mut Report,
    ) {
        let Some(table) = self.sppt_locked(as_id, writer) else {
            return;
        };
        tables.insert(table.root().page.hpa().get());
        let mut cursor = Cursor::new(table, Gpa::new(0)..Gpa::new(table.end()));
        while let Some(seen) = cursor.next() {
            let (place, entry) = (seen.place(), seen.value());
            let gfn = place.gpa().frame();
            let rule = match seen.entry::<Sppt>() {
                _ if place.height() == Height::LEAF => {
                    let map = WriteVector(entry).access_map();
                    (map != Some(self.access_map(as_id, gfn))).then_some(Rule::SubPages)
                }
                Entry::Empty => None,
                // Whoever cuts the processors off ends what he does before he gives up the lock.
                Entry::Table(_) if is_cut(entry) => Some(Rule::SubPages),
                Entry::Table(child) => (!tables.insert(child.get())).then_some(Rule::SharedTable),
                Entry::Frozen => Some(Rule::Frozen),
                Entry::Leaf | Entry::Special => Some(Rule::NotEmpty),
            };
            if let Some(rule) = rule {
                report.add(Violation {
                    rule,
                    root: None,
                    gfn,
                    level: Level::from_number(place.height().get()),
                    entry,
                });
            }
        }
    }
}
