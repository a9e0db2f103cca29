//! Huge pages without execute permission (SPEC 6.7): KVM's answer to processors whose instruction
//! TLB fails when an executable mapping changes its size (CVE-2018-12207).
//!
//! Huge leaves do not allow fetches. A fetch maps or splits down to 4K, and the entry of the table
//! that this needed where a huge leaf could have been is marked, so that the next read does not
//! make a huge leaf of it again. Marked tables are remembered in the order in which they were
//! made; a hypervisor takes a part of them out from time to time, and what is not executed
//! any more becomes huge again.

use crate::format::MmuFormat;
use crate::host::Host;
use crate::mmu::Mmu;
use crate::region::RegionFlags;
use crate::root::RootRole;
use crate::sync::atomic::Ordering;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use twofold_arch::{Gfn, PAGE_SHIFT};
use twofold_table::{Debt, Entry, Height};

/// Bit 56 of an entry that points to a table, ignored by both processors: only the mitigation
/// keeps a huge leaf from being here.
pub const NX_SPLIT: u64 = 1 << 56;

/// Tables taken out under one hold of the lock.
const BATCH: usize = 64;

/// Where a marked table is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Key {
    root_level: u8,
    smm: bool,
    guest_mode: bool,
    /// Of the entry that is marked.
    height: u8,
    gfn: u64,
}

/// The marked tables of a VM, and some that are gone.
#[derive(Debug, Default)]
pub(crate) struct Marked {
    since: BTreeMap<Key, u64>,
    made: u64,
}

impl<F: MmuFormat, H: Host> Mmu<F, H> {
    /// Whether huge leaves are kept from being executable now.
    #[inline]
    pub fn nx_huge_pages(&self) -> bool {
        self.nx_huge_pages.load(Ordering::Relaxed)
    }

    /// Turns the mitigation on or off for this VM (`KVM_CAP_VM_DISABLE_NX_HUGE_PAGES`, or KVM's
    /// module parameter). Everything that is mapped goes, so that no leaf of the other kind
    /// stays.
    pub fn set_nx_huge_pages(&self, on: bool) {
        if self.nx_huge_pages.swap(on, Ordering::SeqCst) != on {
            self.zap_all();
        }
    }

    /// Remembers a table whose entry, at `height` and for `gfn`, was marked.
    #[cold]
    pub(crate) fn remember_marked(&self, role: RootRole, height: Height, gfn: Gfn) {
        let mut marked = self.nx_marked.lock(self.host());
        let now = marked.made;
        marked.made += 1;
        let key = Key {
            root_level: role.level.number(),
            smm: role.smm,
            guest_mode: role.guest_mode,
            height: height.get(),
            gfn: gfn.address().get() >> F::shift(height) << (F::shift(height) - PAGE_SHIFT),
        };
        marked.since.insert(key, now);
    }

    /// Tables that only the mitigation keeps from being huge leaves (`nx_lpage_splits`).
    pub(crate) fn count_marked(&self) -> u64 {
        self.marked_tables().len() as u64
    }

    /// Takes out a part of the marked tables, the oldest first: one in `ratio`, rounded up; 0 means
    /// none. Those of slots that log stay. Returns how many went.
    pub fn recover_nx_huge_pages(&self, ratio: u32) -> u64 {
        if ratio == 0 {
            return 0;
        }
        let marked = self.marked_tables();
        let count = marked.len().div_ceil(ratio as usize);
        let mut recovered = 0;
        for batch in marked[..count].chunks(BATCH) {
            let writer = self.lock();
            let mut debt = Debt::none();
            for key in batch {
                let (as_id, gfn) = (u16::from(key.smm), Gfn::new(key.gfn));
                let logs = self.spaces.get(usize::from(as_id)).is_some_and(|space| {
                    let slot = space.tree.find_locked(gfn);
                    slot.is_some_and(|slot| slot.info.flags.contains(RegionFlags::LOG_DIRTY))
                });
                if logs {
                    continue;
                }
                for root in writer.roots.iter().filter(|root| key.is_of(root.role)) {
                    let table = self.table_locked(root, &writer);
                    let seen = table.lookup(gfn.address(), Height::new(key.height));
                    let is_marked = seen.place().height() == Height::new(key.height)
                        && seen.value() & NX_SPLIT != 0
                        && matches!(seen.entry::<F>(), Entry::Table(_));
                    // Who was faster has taken it out.
                    if is_marked && table.remove(seen, &mut debt).is_ok() {
                        recovered += 1;
                    }
                }
            }
            self.pay(&writer, debt);
        }
        recovered
    }

    /// Where marked tables are now, the oldest first. Forgets those that are gone.
    fn marked_tables(&self) -> Vec<Key> {
        let writer = self.lock();
        let mut marked = self.nx_marked.lock(self.host());
        marked.since.retain(|key, _| {
            writer.roots.iter().any(|root| {
                if !key.is_of(root.role) || root.is_obsolete() {
                    return false;
                }
                let gpa = Gfn::new(key.gfn).address();
                let seen = self
                    .table_locked(root, &writer)
                    .lookup(gpa, Height::new(key.height));
                seen.place().height() == Height::new(key.height)
                    && matches!(seen.entry::<F>(), Entry::Table(_))
                    && seen.value() & NX_SPLIT != 0
            })
        });
        let mut by_age: Vec<_> = marked
            .since
            .iter()
            .map(|(key, since)| (*since, *key))
            .collect();
        by_age.sort_unstable();
        by_age.into_iter().map(|(_, key)| key).collect()
    }
}

impl Key {
    fn is_of(&self, role: RootRole) -> bool {
        (self.root_level, self.smm, self.guest_mode, false)
            == (role.level.number(), role.smm, role.guest_mode, role.mirror)
    }
}
