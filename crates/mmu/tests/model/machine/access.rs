//! Guest accesses and their faults.

use super::{Machine, Translation, View};
use crate::common::Processor;
use crate::operations::{Access, ROLES};
use crate::reference::{Mapping, READONLY, Slot, extent};
use std::sync::atomic::Ordering;
use twofold_arch::{Gfn, Level, Pferr};
use twofold_mmu::nx_huge_pages::NX_SPLIT;
use twofold_mmu::{Fault, FaultError, Outcome, PopulateError, PrefaultError};
use twofold_table::{Entry, Height};

impl<F: Processor> Machine<F> {
    pub(super) fn access(
        &mut self,
        cpu: usize,
        role: usize,
        gfn: u64,
        access: Access,
        anyway: bool,
    ) {
        for _ in 0..2 {
            let view = self.view(role, gfn);
            let allowed = match (view, access) {
                (View::Leaf { asks: true, .. }, Access::Write) => {
                    let Some(allowed) = self.look_up(role, gfn) else {
                        return;
                    };
                    allowed
                }
                (View::Leaf { write, .. }, Access::Write) => write,
                (View::Leaf { execute, .. }, Access::Fetch) => execute,
                (View::Leaf { .. }, Access::Read) => true,
                _ => false,
            };
            if allowed && !anyway {
                self.use_page(cpu, role, gfn, access);
                return;
            }
            // A fault drops the translation.
            self.tlb.remove(&(cpu, role, gfn));
            let mut error = match access {
                Access::Read => Pferr::USER,
                Access::Write => Pferr::WRITE,
                Access::Fetch => Pferr::FETCH,
            } | Pferr::GUEST_FINAL;
            match view {
                View::Nothing => {}
                View::Refused => error |= Pferr::RSVD,
                View::Leaf { .. } => error |= Pferr::PRESENT,
            }
            let outcome = self.fault(role, gfn, access, error);
            if anyway || !matches!(outcome, Ok(Outcome::Fixed { .. } | Outcome::Spurious)) {
                return;
            }
        }
        panic!("a fault was resolved, and the access is still refused");
    }

    /// A processor uses a page that it may use.
    pub(super) fn use_page(&mut self, cpu: usize, role: usize, gfn: u64, access: Access) {
        let path = self.path(role, gfn);
        let (level, _) = *path.last().unwrap();
        let write = access == Access::Write;
        let mut set_dirty = false;
        if self.reference.rules.flags {
            let table = match path.len() {
                1 => self.root(role).hpa(),
                len => match F::decode(path[len - 2].1, Height::from(path[len - 2].0)) {
                    Entry::Table(table) => table,
                    entry => panic!("{entry:?}"),
                },
            };
            let bits = F::ACCESSED | if write { F::DIRTY } else { 0 };
            let entry = self.world.entry(table, level.index(Gfn::new(gfn)));
            let old = entry.fetch_or(bits, Ordering::AcqRel);
            set_dirty = write && old & F::DIRTY == 0;
            self.reference.change_leaf(role, gfn, |mapping| {
                mapping.accessed = true;
                mapping.dirty |= write;
            });
        }
        let as_id = ROLES[role].as_id();
        if set_dirty && self.reference.rules.pml && !ROLES[role].guest_mode {
            let log = [Gfn::new(gfn).address()];
            self.mmu.drain_pml(&mut self.reader, as_id, log.into_iter());
            self.reference.mark(as_id, gfn);
        }
        if let View::Leaf {
            frame,
            write,
            asks,
            dirty,
            ..
        } = self.view(role, gfn)
        {
            let translation = Translation {
                frame,
                write: write || asks,
                sub_pages: match asks {
                    true => self.vector(role, gfn).unwrap_or(0),
                    false if write => u32::MAX,
                    false => 0,
                },
                dirty,
            };
            self.tlb.insert((cpu, role, gfn), translation);
        }
    }

    pub(super) fn fault(
        &mut self,
        role: usize,
        gfn: u64,
        access: Access,
        error: Pferr,
    ) -> Result<Outcome, FaultError> {
        let path = self.path(role, gfn);
        let before = self.reference.mapped.clone();
        let was_short = self.short_of_pages();
        let root = self.roots[role].as_ref().unwrap();
        let gpa = Gfn::new(gfn).address();
        let refusal = *self.world.refuse.lock().unwrap();
        let outcome = self.mmu.fault(&mut self.reader, root, Fault { gpa, error });
        if outcome == Err(FaultError::OutOfMemory) {
            assert!(was_short, "there were pages");
            self.reference.mapped = before;
            self.learn_levels();
            return outcome;
        }
        let expected = self.expect_fault(role, gfn, access, error, &path, refusal);
        assert_eq!(outcome, expected, "gfn {gfn:#x}");
        outcome
    }

    /// The largest page that may be mapped around `gfn`, where the host has one at `frame` whose
    /// size is `host_level`. A table that the mitigation has made is left alone.
    fn choose_level(
        &self,
        as_id: u16,
        slot: &Slot,
        gfn: u64,
        frame: u64,
        host_level: Level,
        path: &[(Level, u64)],
    ) -> Level {
        let may = |level: Level| {
            let is_marked = self.reference.nx
                && path.iter().any(|&(at, value)| {
                    let is_table = matches!(F::decode(value, Height::from(at)), Entry::Table(_));
                    at == level && is_table && value & NX_SPLIT != 0
                });
            level <= host_level
                && !slot.logs()
                && !is_marked
                && slot.may_be_huge(gfn, level)
                && !self.reference.guards(as_id, extent(gfn, level))
                && (frame ^ gfn).is_multiple_of(level.frames())
        };
        let levels = [Level::L1G, Level::L2M];
        levels
            .into_iter()
            .find(|&level| may(level))
            .unwrap_or(Level::L4K)
    }

    pub(super) fn prefault(&mut self, role: usize, gfn: u64) {
        let path = self.path(role, gfn);
        let was_short = self.short_of_pages();
        let refusal = *self.world.refuse.lock().unwrap();
        let root = self.roots[role].as_ref().unwrap();
        let gfns = Gfn::new(gfn)..Gfn::new(gfn + 1);
        let outcome = self.mmu.prefault(&mut self.reader, root, gfns);
        if outcome == Err(FaultError::OutOfMemory.into()) {
            assert!(was_short, "there were pages");
            return;
        }
        assert_eq!(outcome, self.expect_prefault(role, gfn, &path, refusal));
    }

    fn expect_prefault(
        &mut self,
        role: usize,
        gfn: u64,
        path: &[(Level, u64)],
        refusal: Option<PopulateError>,
    ) -> Result<u64, PrefaultError> {
        let as_id = ROLES[role].as_id();
        let Some((_, slot)) = self.reference.slot_at(as_id, gfn) else {
            return Err(PrefaultError::NoSlot);
        };
        let old = self.reference.get(role, gfn);
        if old.is_some_and(|leaf| leaf.level > Level::L4K) {
            return Ok(1);
        }
        match refusal {
            Some(PopulateError::Again) => return Err(PrefaultError::Retry),
            Some(PopulateError::Interrupted) => return Err(FaultError::Interrupted.into()),
            Some(PopulateError::Poisoned) => return Err(FaultError::Poisoned.into()),
            _ => {}
        }
        let host = self.world.host_state(slot.hva(gfn));
        if !host.present {
            return Err(FaultError::BadHostMemory.into());
        }
        let host_level = self.host_level(slot.host_page(gfn));
        let level = self.choose_level(as_id, &slot, gfn, host.frame, host_level, path);
        if old.is_none() || level > Level::L4K {
            let write = host.writable && slot.flags & READONLY == 0;
            let guarded = self.reference.guards(as_id, gfn..gfn + 1);
            let new = self
                .reference
                .prepared(host.frame, level, write, slot.logs(), guarded);
            self.reference.put_leaf(role, gfn, new);
        }
        Ok(1)
    }

    /// What becomes of a fault that lacks nothing. `path` is what was there before.
    pub(super) fn expect_fault(
        &mut self,
        role: usize,
        gfn: u64,
        access: Access,
        error: Pferr,
        path: &[(Level, u64)],
        refusal: Option<PopulateError>,
    ) -> Result<Outcome, FaultError> {
        let as_id = ROLES[role].as_id();
        let write = access == Access::Write;
        let flags = self.reference.rules.flags;
        let Some((_, slot)) = self.reference.slot_at(as_id, gfn) else {
            return Ok(Outcome::Mmio);
        };
        if write && self.reference.denies(as_id, gfn) {
            return Ok(Outcome::SubPageDenied);
        }
        // Without the host's help.
        let seen = error.intersects(Pferr::PRESENT.union(Pferr::RSVD));
        if let Some(leaf) = self.reference.get(role, gfn)
            && (seen && write || !flags)
        {
            if leaf.allows(access) {
                return Ok(Outcome::Spurious);
            }
            let mut new = Mapping {
                tracked: false,
                ..leaf
            };
            let small_enough = leaf.level == Level::L4K || !slot.logs();
            if write && new.may_write && small_enough {
                new.write = true;
                new.dirty |= flags;
            }
            if new.allows(access) {
                if write {
                    self.reference.mark(as_id, gfn);
                }
                self.reference.put_leaf(role, gfn, new);
                return Ok(Outcome::Fixed { level: leaf.level });
            }
        }
        if write && slot.flags & READONLY != 0 {
            return Ok(Outcome::Mmio);
        }
        match refusal {
            Some(PopulateError::Again) => return Ok(Outcome::Retry),
            Some(PopulateError::Interrupted) => return Err(FaultError::Interrupted),
            Some(PopulateError::Poisoned) => return Err(FaultError::Poisoned),
            _ => {}
        }
        let host = self.world.host_state(slot.hva(gfn));
        if !host.present || write && !host.writable {
            return Err(FaultError::BadHostMemory);
        }
        let writable = host.writable && slot.flags & READONLY == 0;
        let mut has_leaf_table = path.last().unwrap().0 == Level::L4K;
        loop {
            // The host is asked for the size only where no small pages are mapped yet.
            let host_level = match self.setup.must_ask && has_leaf_table {
                true => Level::L4K,
                false => self.host_level(slot.host_page(gfn)),
            };
            let level = match access == Access::Fetch && self.reference.nx {
                true => Level::L4K,
                false => self.choose_level(as_id, &slot, gfn, host.frame, host_level, path),
            };
            match self.reference.get(role, gfn) {
                Some(leaf) if leaf.level >= level && leaf.allows(access) => {
                    return Ok(Outcome::Spurious);
                }
                Some(leaf) if leaf.level > level => {
                    self.reference.split_leaf(role, gfn);
                    has_leaf_table = leaf.level == Level::L2M;
                    continue;
                }
                Some(leaf) => assert_eq!(leaf.frame, host.frame),
                None => {}
            }
            if writable {
                self.reference.mark(as_id, gfn);
            }
            let new = self.reference.fresh(host.frame, level, writable);
            self.reference.put_leaf(role, gfn, new);
            return Ok(Outcome::Fixed { level });
        }
    }
}
