//! A VM to try single mechanisms of the MMU with.

use super::{Found, Processor, TestHost, World, region, usual_frame, walk};
use std::sync::Arc;
use twofold_arch::{Gfn, Level, Pferr};
use twofold_mmu::{Config, Fault, FaultError, Mmu, Outcome, Reader, Root, RootRole};

/// A VM with one virtual processor that has loaded the normal root.
pub struct Vm<F: Processor> {
    pub world: Arc<World>,
    pub mmu: Mmu<F, TestHost>,
    pub reader: Reader,
    pub root: Root,
}

pub const HVA: u64 = 0x4000_0000;
pub const LOG: u32 = 1;
pub const READONLY: u32 = 2;

impl<F: Processor> Vm<F> {
    pub fn new() -> Self {
        Self::with(Config {
            slot_zap_all: false,
            ..Config::default()
        })
    }

    pub fn with(config: Config) -> Self {
        let world = World::new(0x1000_0000_0000);
        let mmu = Mmu::new(TestHost(Arc::clone(&world)), config);
        let reader = mmu.reader();
        let root = mmu.load_root(RootRole::NORMAL).unwrap();
        Self {
            world,
            mmu,
            reader,
            root,
        }
    }

    /// A slot at `gfn` with host memory at the same distance from `HVA`.
    pub fn slot(&self, id: u32, gfn: u64, pages: u64, flags: u32) {
        self.mmu
            .set_region(region(id, gfn, pages, (HVA >> 12) + gfn, flags))
            .unwrap();
    }

    pub fn fault(&mut self, gfn: u64, error: Pferr) -> Result<Outcome, FaultError> {
        let gpa = Gfn::new(gfn).address();
        self.mmu
            .fault(&mut self.reader, &self.root, Fault { gpa, error })
    }

    pub fn found(&self, gfn: u64) -> Found {
        walk::<F>(
            &self.world,
            self.root.hpa(),
            Level::L512G,
            Gfn::new(gfn).address(),
        )
    }

    pub fn page(gfn: u64, write: bool, level: Level) -> Found {
        Found::Page {
            frame: usual_frame(HVA + (gfn << 12)),
            write,
            level,
        }
    }
}

pub fn fixed(level: Level) -> Result<Outcome, FaultError> {
    Ok(Outcome::Fixed { level })
}
