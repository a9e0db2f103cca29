//! The memory half of a processor against tables built by hand.

mod pml;
mod running;
mod sub_pages;
mod td;
mod values;
mod virtualization_exceptions;
mod walks;

use super::*;
use crate::machine::{MachineConfig, SecondStageKind};
use crate::state::{cr0, cr4, efer};
use crate::{Cpu, Exit, SecondStageFault};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::Level;
use twofold_arch::ept::{EptFlags, Eptp, Qualification};
use twofold_arch::npt::NptFlags;

const PAGES: usize = 64;
/// What the tables call the first page: not its address in this process.
const BASE: u64 = 0x45_6780_0000;

/// Host memory: pages by index. 0 to 3 hold the second-stage tables; guest frame n is page n.
struct Host {
    words: Box<[AtomicU64]>,
    kind: SecondStageKind,
}

const FRAMES: usize = 8;

impl Host {
    fn new(kind: SecondStageKind) -> Self {
        let words = (0..(PAGES + 1) * 512).map(|_| AtomicU64::new(0)).collect();
        let host = Self { words, kind };
        for level in 0..3 {
            host.put(level, 0, host.hpa(level + 1) | host.table());
        }
        for frame in FRAMES..PAGES {
            host.put(3, frame, host.hpa(frame) | host.leaf());
        }
        host
    }

    fn table(&self) -> u64 {
        match self.kind {
            SecondStageKind::Ept => EptFlags::RWX.bits(),
            SecondStageKind::Npt => 7,
        }
    }

    fn leaf(&self) -> u64 {
        match self.kind {
            SecondStageKind::Ept => EptFlags::RWX.bits() | 6 << 3,
            SecondStageKind::Npt => 7,
        }
    }

    /// The first word of the first whole page.
    fn first(&self) -> usize {
        (self.words.as_ptr() as usize).wrapping_neg() % 4096 / 8
    }

    fn hpa(&self, page: usize) -> u64 {
        BASE + page as u64 * 4096
    }

    fn word(&self, page: usize, index: usize) -> &AtomicU64 {
        &self.words[self.first() + page * 512 + index]
    }

    fn put(&self, page: usize, index: usize, value: u64) {
        self.word(page, index).store(value, Ordering::Relaxed);
    }

    fn get(&self, page: usize, index: usize) -> u64 {
        self.word(page, index).load(Ordering::Relaxed)
    }

    fn machine(&self) -> Arc<Machine> {
        let start = &raw const self.words[self.first()] as usize;
        Machine::new(MachineConfig {
            second_stage: self.kind,
            maxphyaddr: 46,
            hpa_offset: start.wrapping_sub(BASE as usize),
        })
    }

    fn cpu(&self, machine: &Arc<Machine>) -> Cpu {
        let mut cpu = Cpu::new(Arc::clone(machine), 0);
        let (root, level) = (Hpa::new(self.hpa(0)), Level::L512G);
        cpu.set_second_stage(match self.kind {
            SecondStageKind::Ept => SecondStage::Ept(Eptp::new(root, level, true)),
            SecondStageKind::Npt => SecondStage::Npt { root, level },
        });
        cpu
    }

    /// Guest tables in frames 8 to 11 that map linear page n of the first 2 MiB to frame n, and a
    /// processor in long mode that uses them.
    fn paged(&self, machine: &Arc<Machine>) -> Cpu {
        for level in 0..3 {
            self.put(8 + level, 0, (9 + level as u64) << 12 | 7);
        }
        for frame in 12..PAGES {
            self.put(11, frame, (frame as u64) << 12 | 7);
        }
        let mut cpu = self.cpu(machine);
        let core = &mut cpu.core;
        core.cr0 = cr0::PG | cr0::PE | cr0::WP;
        core.cr3 = 8 << 12;
        core.cr4 = cr4::PAE;
        core.efer = efer::LME | efer::LMA | efer::NXE;
        core.flush_all();
        cpu
    }
}

fn exit_of<T: std::fmt::Debug>(core: &Core, result: Result<T, Trap>) -> Exit {
    match result {
        Err(Trap::Exit) => core.exit,
        other => panic!("expected an exit, got {other:?} {:?}", core.fault),
    }
}

fn fault_of<T: std::fmt::Debug>(
    core: &Core,
    result: Result<T, Trap>,
) -> (u8, Option<u32>, Option<u64>) {
    match result {
        Err(Trap::Exception) => (core.fault.vector, core.fault.error_code, core.fault.payload),
        other => panic!("expected an exception, got {other:?} {:?}", core.exit),
    }
}

fn violation(exit: Exit) -> (u64, Qualification, u64) {
    match exit {
        Exit::SecondStage(SecondStageFault::EptViolation {
            gpa,
            qualification,
            gla,
        }) => (
            gpa.get(),
            Qualification::from_bits_retain(qualification),
            gla,
        ),
        other => panic!("expected an EPT violation, got {other:?}"),
    }
}
