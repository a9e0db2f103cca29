//! Faults, zaps and entries of a TD, with the real TDX module: the module's own steps are points where
//! another thread may go on, too.

use crate::common::td::{PRIVATE, TdMachine};
use crate::{explore, together};
use shuttle::thread::yield_now as give_way;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use twofold_arch::Level;
use twofold_mmu::{FaultError, Outcome, Reader, TdRoots};
use twofold_tdx::{Accept, PageType, Point, Status};

type Work = Box<dyn FnOnce(&TdMachine) + Send>;

/// Frames 0..8 are private.
fn machine() -> Arc<TdMachine> {
    let machine = TdMachine::new(false, 2);
    machine.slot(0, 0, 8);
    machine.set(0..8, true);
    Arc::new(machine)
}

/// The same, running, with these frames mapped and accepted.
fn running(accepted: &[u64]) -> Arc<TdMachine> {
    let machine = machine();
    machine.td.finalize();
    let mut cpu = Cpu::new(&machine, 0);
    for &gfn in accepted {
        cpu.reach(&machine, gfn);
    }
    machine.td.leave(0);
    machine
}

fn finish(machine: Arc<TdMachine>) {
    Arc::into_inner(machine).unwrap().finish();
}

/// A virtual processor, and the thread that runs it.
struct Cpu {
    number: usize,
    reader: Reader,
    roots: TdRoots,
}

impl Cpu {
    fn new(machine: &TdMachine, number: usize) -> Self {
        Self {
            number,
            reader: machine.mmu.reader(),
            roots: machine.roots(),
        }
    }

    fn fault(&mut self, machine: &TdMachine, gfn: u64) -> Result<Outcome, FaultError> {
        machine.fault(&mut self.reader, &self.roots, gfn, PRIVATE)
    }

    /// Faults until the page is there (`true`) or is not private any more.
    fn map(&mut self, machine: &TdMachine, gfn: u64) -> bool {
        loop {
            match self.fault(machine, gfn) {
                Ok(Outcome::Fixed { .. } | Outcome::Spurious) => return true,
                Ok(Outcome::Retry) => give_way(),
                Err(FaultError::WrongKind { private: true }) => return false,
                other => panic!("{other:?}"),
            }
        }
    }

    /// The guest uses a page: enters, and if it is not there leaves, faults, and accepts it. Returns
    /// whether it could.
    fn reach(&mut self, machine: &TdMachine, gfn: u64) -> bool {
        let td = &machine.td;
        loop {
            match td.use_private(self.number, gfn) {
                Some(true) => return true,
                Some(false) => {}
                None => {
                    if !td.enter(self.number) {
                        give_way();
                    }
                    continue;
                }
            }
            match td.accept(self.number, gfn) {
                Some(Accept::Exit { .. }) => {
                    td.leave(self.number);
                    if !self.map(machine, gfn) {
                        return false;
                    }
                }
                Some(Accept::Returned(status))
                    if status.is(Status::OPERAND_BUSY)
                        || status.is(Status::OPERAND_BUSY_HOST_PRIORITY) =>
                {
                    give_way();
                }
                Some(Accept::Returned(_)) | None => {}
                Some(Accept::Again) => panic!("a page of 4K has no pieces"),
            }
        }
    }
}

/// A guest that uses these frames as long as they are there.
fn guest(mut cpu: Cpu, gfns: &'static [u64]) -> Work {
    Box::new(move |machine| {
        for &gfn in gfns {
            cpu.reach(machine, gfn);
        }
        machine.td.leave(cpu.number);
    })
}

#[test]
fn two_faults_on_one_private_page_ask_the_module_once() {
    explore("two faults on one private page", 1, || {
        let machine = machine();
        let fixed = Arc::new(AtomicU64::new(0));
        let work = [0, 1].map(|number| -> Work {
            let (mut cpu, fixed) = (Cpu::new(&machine, number), Arc::clone(&fixed));
            Box::new(move |machine| match cpu.fault(machine, 1) {
                Ok(Outcome::Fixed { level: Level::L4K }) => {
                    fixed.fetch_add(1, Ordering::SeqCst);
                }
                // The other has the entry, or has done it.
                Ok(Outcome::Retry | Outcome::Spurious) => {}
                other => panic!("{other:?}"),
            })
        });
        together(&machine, work.into());
        assert_eq!(fixed.load(Ordering::SeqCst), 1);
        assert_eq!(machine.td.owned(PageType::Regular).len(), 1);
        assert_eq!(machine.td.owned(PageType::Ept).len(), 3);
        finish(machine);
    });
}

#[test]
fn faults_on_private_neighbours_share_their_tables() {
    explore("private neighbours", 1, || {
        let machine = machine();
        machine.memory.make_busy(Point::SeptEntry, 2, 1);
        let work = [0, 1].map(|number| -> Work {
            let mut cpu = Cpu::new(&machine, number);
            Box::new(move |machine| assert!(cpu.map(machine, 1 + number as u64)))
        });
        together(&machine, work.into());
        assert_eq!(machine.td.owned(PageType::Regular).len(), 2);
        assert_eq!(machine.td.owned(PageType::Ept).len(), 3);
        finish(machine);
    });
}

#[test]
fn a_conversion_leaves_no_private_page_behind_a_fault() {
    explore("fault and conversion", 1, || {
        let machine = machine();
        machine.td.finalize();
        let mut cpu = Cpu::new(&machine, 0);
        let work: Vec<Work> = vec![
            Box::new(move |machine| {
                let _ = cpu.map(machine, 1);
            }),
            Box::new(|machine| {
                machine.set(0..4, false);
                assert_eq!(machine.td.owned(PageType::Regular).len(), 0);
            }),
        ];
        together(&machine, work);
        finish(machine);
    });
}

#[test]
fn a_guest_inside_never_uses_a_page_that_a_hole_has_taken() {
    explore("guest and hole", 1, || {
        let machine = running(&[1, 2]);
        let cpu = Cpu::new(&machine, 0);
        let work: Vec<Work> = vec![
            guest(cpu, &[1, 2, 1]),
            Box::new(|machine| machine.punch(1..2)),
        ];
        together(&machine, work);
        finish(machine);
    });
}

#[test]
fn two_guests_enter_while_a_page_is_blocked_tracked_and_removed() {
    explore("entries and removal", 1, || {
        let machine = running(&[1]);
        let cpus = [Cpu::new(&machine, 0), Cpu::new(&machine, 1)];
        let mut work: Vec<Work> = cpus.map(|cpu| guest(cpu, &[1, 1])).into();
        work.push(Box::new(|machine| {
            machine.set(1..2, false);
            assert_eq!(machine.td.owned(PageType::Regular).len(), 0);
        }));
        together(&machine, work);
        finish(machine);
    });
}

#[test]
fn a_page_is_not_accepted_and_removed_at_once() {
    explore("accept and removal", 1, || {
        let machine = machine();
        machine.td.finalize();
        let mut cpu = Cpu::new(&machine, 0);
        assert!(cpu.map(&machine, 3));
        let work: Vec<Work> = vec![
            guest(cpu, &[3]),
            Box::new(|machine| {
                // With the host's claim on the entry, too.
                machine.memory.make_busy(Point::SeptEntry, 0, 1);
                machine.set(3..4, false);
                assert_eq!(machine.td.secure(3), None);
            }),
        ];
        together(&machine, work);
        finish(machine);
    });
}

#[test]
fn two_removals_and_a_fault_beside_them_do_not_disturb_each_other() {
    explore("two removals and a fault", 1, || {
        let machine = running(&[1, 2]);
        let mut cpu = Cpu::new(&machine, 1);
        let work: Vec<Work> = vec![
            Box::new(move |machine| assert!(cpu.map(machine, 3))),
            Box::new(|machine| machine.punch(1..2)),
            Box::new(|machine| machine.set(2..3, false)),
        ];
        together(&machine, work);
        assert_eq!(machine.td.owned(PageType::Regular).len(), 1);
        finish(machine);
    });
}

#[test]
fn a_check_beside_faults_finds_the_mirror_as_it_should_be() {
    explore("check and fault", 1, || {
        let machine = machine();
        let mut cpu = Cpu::new(&machine, 0);
        let work: Vec<Work> = vec![
            Box::new(move |machine| assert!(cpu.map(machine, 1))),
            Box::new(|machine| {
                let report = machine.mmu.check();
                assert!(report.violations.is_empty(), "{report}");
            }),
        ];
        together(&machine, work);
        finish(machine);
    });
}
