//! A processor that asks the sub-page permission table, and a VM whose frames are protected.

use super::vm::Vm;
use super::{Processor, Step, World};
use std::sync::atomic::Ordering;
use twofold_arch::sppt::{AccessMap, SpptEntry, WriteVector};
use twofold_arch::{Gfn, Gpa, Hpa, Level, Pferr};
use twofold_mmu::{Config, Ept, Fault, FaultError, MmuFormat, Outcome, Root, RootRole};

/// Why a processor leaves the guest instead of writing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// A violation or misconfiguration of the second-stage tables.
    Fault(Pferr),
    /// A table of the sub-page permission table is missing.
    Miss,
    /// It has a reserved bit set.
    Misconfigured,
}

/// A write of `bytes` at `gpa`, all in one page, by a processor without translations, which sets
/// accessed and dirty bits if it has such (`flags`). Returns whether it set a dirty bit.
pub fn write(
    world: &World,
    root: Hpa,
    level: Level,
    sppt: Option<Hpa>,
    gpa: Gpa,
    bytes: u64,
    flags: bool,
) -> Result<bool, Refused> {
    let error = Pferr::WRITE | Pferr::GUEST_FINAL;
    let (mut table, mut at) = (root, level);
    loop {
        let index = at.index(gpa.frame());
        let value = world.read(table, index);
        match Ept::entry(value, at) {
            Step::Nothing => return Err(Refused::Fault(error)),
            Step::Refused => return Err(Refused::Fault(error | Pferr::RSVD)),
            Step::Table(next) => {
                table = next;
                at = at.below().unwrap();
            }
            Step::Leaf { write, .. } => {
                let asks = at == Level::L4K && value & Ept::SUB_PAGE_WRITE != 0;
                let allowed = match (write, sppt) {
                    (true, _) => true,
                    (false, Some(sppt)) if asks => {
                        vector(world, sppt, gpa)?.allows(gpa.get() % 4096, bytes)
                    }
                    _ => false,
                };
                if !allowed {
                    return Err(Refused::Fault(error | Pferr::PRESENT));
                }
                if !flags {
                    return Ok(false);
                }
                let set = world.entry(table, index).compare_exchange(
                    value,
                    value | Ept::ACCESSED | Ept::DIRTY,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if set.is_ok() {
                    return Ok(value & Ept::DIRTY == 0);
                }
                (table, at) = (root, level);
            }
        }
    }
}

/// What the sub-page permission table says of the page at `gpa`.
pub fn vector(world: &World, sppt: Hpa, gpa: Gpa) -> Result<AccessMap, Refused> {
    let mut table = sppt;
    for level in [Level::L512G, Level::L1G, Level::L2M] {
        let entry = world.read(table, level.index(gpa.frame()));
        table = match SpptEntry::decode(entry, super::MAXPHYADDR) {
            SpptEntry::NotPresent => return Err(Refused::Miss),
            SpptEntry::Reserved => return Err(Refused::Misconfigured),
            SpptEntry::Table(next) => next,
        };
    }
    let entry = world.read(table, Level::L4K.index(gpa.frame()));
    WriteVector(entry)
        .access_map()
        .ok_or(Refused::Misconfigured)
}

/// What became of a write by the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// It was done, after so many exits of each kind.
    Done { faults: u32, misses: u32 },
    /// The program is told.
    Denied,
    /// It is MMIO.
    Mmio,
}

/// A write that needed no exit.
pub const AT_ONCE: Written = Written::Done {
    faults: 0,
    misses: 0,
};

impl Written {
    pub fn is_done(self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

/// Sub-page protection of a VM, as its program and its guest see it.
pub trait Guarded {
    fn guarded(config: Config) -> Self;
    fn protect(&self, gfn: u64, map: u32);
    fn map_of(&self, gfn: u64) -> u32;
    fn root_of(&self, role: RootRole) -> Root;
    fn write_by(&mut self, root: &Root, gpa: u64, bytes: u64) -> Result<Written, FaultError>;
    fn write(&mut self, gpa: u64) -> Written;
    fn raw_leaf(&self, gfn: u64) -> u64;
    fn is_sound(&self);
}

impl Guarded for Vm<Ept> {
    /// A VM with sub-pages enabled.
    fn guarded(config: Config) -> Self {
        let vm = Self::with(config);
        vm.mmu.enable_sub_pages().unwrap();
        vm
    }

    fn protect(&self, gfn: u64, map: u32) {
        self.mmu
            .set_access(0, Gfn::new(gfn), &[AccessMap(map)])
            .unwrap();
    }

    fn map_of(&self, gfn: u64) -> u32 {
        let mut maps = [AccessMap(0)];
        self.mmu.get_access(0, Gfn::new(gfn), &mut maps).unwrap();
        maps[0].0
    }

    fn root_of(&self, role: RootRole) -> Root {
        self.mmu.load_root(role).unwrap()
    }

    /// A write by a processor that has loaded `root`, carried on until it is done or the program is
    /// told.
    fn write_by(&mut self, root: &Root, gpa: u64, bytes: u64) -> Result<Written, FaultError> {
        let gpa = Gpa::new(gpa);
        let (mut faults, mut misses) = (0, 0);
        for _ in 0..8 {
            let role = root.role();
            let sppt = self.mmu.sppt_root(role);
            let flags = self.mmu.config().accessed_dirty;
            let outcome = match write(&self.world, root.hpa(), role.level, sppt, gpa, bytes, flags)
            {
                Ok(_) => return Ok(Written::Done { faults, misses }),
                Err(Refused::Fault(error)) => {
                    faults += 1;
                    let denied = self.mmu.first_denied(role.as_id(), gpa, bytes);
                    let gpa = denied.unwrap_or(gpa);
                    self.mmu
                        .fault(&mut self.reader, root, Fault { gpa, error })?
                }
                Err(Refused::Miss) => {
                    misses += 1;
                    self.mmu.sppt_miss(&mut self.reader, root, gpa)?
                }
                Err(Refused::Misconfigured) => panic!("the table is misconfigured at {gpa}"),
            };
            match outcome {
                Outcome::SubPageDenied => return Ok(Written::Denied),
                Outcome::Mmio => return Ok(Written::Mmio),
                Outcome::ObsoleteRoot => panic!("a test uses an obsolete root"),
                Outcome::Fixed { .. } | Outcome::Spurious | Outcome::Retry => {}
            }
        }
        panic!("the guest does not get on with its write at {gpa}");
    }

    /// A write of one byte by the processor of the VM.
    fn write(&mut self, gpa: u64) -> Written {
        let root = self.root.clone();
        self.write_by(&root, gpa, 1).unwrap()
    }

    /// The leaf of 4K at a frame below the normal root, bit for bit.
    fn raw_leaf(&self, gfn: u64) -> u64 {
        let mut table = self.root.hpa();
        for level in [Level::L512G, Level::L1G, Level::L2M] {
            match Ept::entry(self.world.read(table, level.index(Gfn::new(gfn))), level) {
                Step::Table(next) => table = next,
                _ => return 0,
            }
        }
        self.world.read(table, Level::L4K.index(Gfn::new(gfn)))
    }

    fn is_sound(&self) {
        let report = self.mmu.check();
        assert!(report.violations.is_empty(), "{report}");
    }
}
