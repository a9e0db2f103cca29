//! A TD to test mirrors with: the real TDX module behind the MMU's hooks, on a machine with a few
//! hundred pages that know whether they are used.
//!
//! The program's shared memory is only numbers, as elsewhere. Pages of the guest memory file and of
//! tables are the machine's: a page that is given back must not belong to the TD any more.

mod memory;
mod module;

pub use memory::{FILE, HVA, Machine, Memory, PAGE};
pub use module::Td;

use super::Found;
use std::ops::Range;
use std::sync::Arc;
use twofold_arch::ept::{self, EptCaps, EptEntry, EptFlags};
use twofold_arch::{Gfn, Gpa, Hpa, Level, Pferr};
use twofold_mmu::{
    AccessKind, Config, Conversion, Ept, Fault, FaultError, MmioFault, Mmu, Outcome, PrivateMemory,
    Reader, TdRoots,
};
use twofold_tdx::PageType;

pub const GUEST_MEMFD: u32 = 4;
pub const PRIVATE: Pferr = Pferr::PRIVATE_ACCESS.union(Pferr::WRITE);
pub const SHARED: Pferr = Pferr::WRITE;

/// What every TD has.
pub fn config() -> Config {
    Config {
        slot_zap_all: false,
        private_memory: Some(PrivateMemory {
            access: AccessKind::ByProcessor,
            conversion: Conversion::ZapOpposite,
        }),
        mmio: MmioFault::Violation,
        ..Config::default()
    }
}

/// The machine that runs the TD.
pub struct TdMachine {
    pub mmu: Mmu<Ept, Machine>,
    pub td: Arc<Td>,
    pub memory: Arc<Memory>,
    pub shared_bit: u8,
}

impl TdMachine {
    /// A TD that can be built, with the shared bit at 47 or (`wide`) at 51.
    pub fn new(wide: bool, vcpus: u64) -> Self {
        Self::with_attributes(wide, 0, vcpus)
    }

    pub fn with_attributes(wide: bool, attributes: u64, vcpus: u64) -> Self {
        let memory = Memory::new();
        let td = Td::new(&memory, wide, attributes, vcpus);
        let mmu = Mmu::new(Machine(Arc::clone(&memory)), config());
        let shared_bit = if wide { 51 } else { 47 };
        let tables: Arc<Td> = Arc::clone(&td);
        mmu.enable_mirror(shared_bit, tables).unwrap();
        Self {
            mmu,
            td,
            memory,
            shared_bit,
        }
    }

    pub fn roots(&self) -> TdRoots {
        self.mmu.load_td_roots().unwrap().unwrap()
    }

    /// A slot whose halves are at the same distance from `HVA` and `FILE` as its frames from 0.
    pub fn slot(&self, id: u32, gfn: u64, pages: u64) {
        let region = super::region(id, gfn, pages, (HVA >> 12) + gfn, GUEST_MEMFD);
        self.mmu
            .set_region_with_guest_memory(region, || Ok(FILE + gfn * PAGE))
            .unwrap();
    }

    pub fn delete_slot(&self, id: u32) {
        self.mmu.set_region(super::region(id, 0, 0, 0, 0)).unwrap();
    }

    pub fn set(&self, range: Range<u64>, private: bool) {
        let gfns = Gfn::new(range.start)..Gfn::new(range.end);
        self.mmu.set_attributes(gfns, private).unwrap();
    }

    /// A hole in the file: the pages are the host's again, and must not be the TD's.
    pub fn punch(&self, range: Range<u64>) {
        let addresses = FILE + range.start * PAGE..FILE + range.end * PAGE;
        let change = self.mmu.begin_private_change(addresses.clone());
        let pages: Vec<_> = {
            let mut file = self.memory.file.lock().unwrap();
            let keys: Vec<_> = file.range(addresses).map(|(&key, _)| key).collect();
            keys.iter().filter_map(|key| file.remove(key)).collect()
        };
        assert_eq!(self.mmu.bug(), None);
        for page in pages {
            assert_eq!(
                self.td.module.metadata(page),
                None,
                "the host takes a page that is the TD's"
            );
            self.memory.write_word(page, 0xdead);
            self.memory.give_back(page);
        }
        self.mmu.end_host_change(change);
    }

    /// The program's memory changes.
    pub fn change_host(&self, range: Range<u64>) {
        drop(
            self.mmu
                .host_change(HVA + range.start * PAGE..HVA + range.end * PAGE),
        );
    }

    pub fn fault(
        &self,
        reader: &mut Reader,
        roots: &TdRoots,
        gfn: u64,
        error: Pferr,
    ) -> Result<Outcome, FaultError> {
        let gpa = Gfn::new(gfn).address();
        self.mmu.td_fault(reader, roots, Fault { gpa, error })
    }

    /// The leaf that the mirror has for `gfn`.
    pub fn mirrored(&self, roots: &TdRoots, gfn: u64) -> Option<Hpa> {
        let root = roots.mirror();
        let (mut table, mut level) = (root.hpa(), root.role().level);
        loop {
            let entry = self.memory.entry(table, level.index(Gfn::new(gfn)));
            match ept::decode(entry, level, EptCaps::full(51)) {
                EptEntry::NotPresent { flags } => {
                    assert!(flags.contains(EptFlags::SUPPRESS_VE), "{entry:#x}");
                    return None;
                }
                EptEntry::Table { hpa, .. } => {
                    table = hpa;
                    level = level.below().unwrap();
                }
                EptEntry::Leaf { hpa, .. } => {
                    assert_eq!(level, Level::L4K);
                    return Some(hpa);
                }
                EptEntry::Misconfig(_) => panic!("{entry:#x} is misconfigured"),
            }
        }
    }

    /// What the processor finds in the shared EPT for an address as the guest uses it, and whether a
    /// violation would become #VE.
    pub fn shared_walk(&self, roots: &TdRoots, gpa: Gpa) -> (Found, bool) {
        let root = roots.shared();
        let (mut table, mut level) = (root.hpa(), root.role().level);
        loop {
            let entry = self.memory.entry(table, level.index(gpa.frame()));
            match ept::decode(entry, level, EptCaps::full(51)) {
                EptEntry::NotPresent { flags } => {
                    return (Found::Nothing, !flags.contains(EptFlags::SUPPRESS_VE));
                }
                EptEntry::Misconfig(_) => return (Found::Refused, false),
                EptEntry::Table { hpa, .. } => {
                    table = hpa;
                    level = level.below().unwrap();
                }
                EptEntry::Leaf { hpa, flags, .. } => {
                    let found = Found::Page {
                        frame: hpa.get() >> 12,
                        write: flags.contains(EptFlags::WRITE),
                        level,
                    };
                    return (found, false);
                }
            }
        }
    }

    /// [`shared_walk`](Self::shared_walk) with the shared bit set.
    pub fn shared(&self, roots: &TdRoots, gfn: u64) -> Found {
        let gpa = Gpa::new((gfn * PAGE) | (1 << self.shared_bit));
        self.shared_walk(roots, gpa).0
    }

    /// Every entry below `root` that a processor takes for not present.
    pub fn not_present(&self, root: Hpa, level: Level, each: &mut impl FnMut(u64)) {
        for index in 0..512 {
            let entry = self.memory.entry(root, index);
            match ept::decode(entry, level, EptCaps::full(51)) {
                EptEntry::NotPresent { .. } => each(entry),
                EptEntry::Table { hpa, .. } => {
                    self.not_present(hpa, level.below().unwrap(), each);
                }
                EptEntry::Leaf { .. } => {}
                EptEntry::Misconfig(_) => panic!("{entry:#x} is misconfigured"),
            }
        }
    }

    /// The VM ends: everything is given back.
    pub fn finish(self) {
        let report = self.mmu.check();
        assert!(report.violations.is_empty(), "{report}");
        assert_eq!(self.mmu.bug(), None);
        self.end();
    }

    /// The same for one that may have a bug.
    pub fn end(self) {
        drop(self.mmu);
        let td = &self.td;
        let file: Vec<_> = self.memory.file.lock().unwrap().values().copied().collect();
        for kind in [PageType::Regular, PageType::Ept] {
            assert!(td.owned(kind).is_empty(), "{kind:?} pages are the TD's");
        }
        for page in file {
            self.memory.give_back(page);
        }
        for kind in [
            PageType::Tdvpx,
            PageType::Tdvpr,
            PageType::Tdcx,
            PageType::Tdr,
        ] {
            for page in td.owned(kind) {
                td.reclaim(Hpa::new(page));
                self.memory.give_back(Hpa::new(page));
            }
        }
        assert_eq!(self.memory.used(), 0, "pages leaked");
    }
}
