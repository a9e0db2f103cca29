//! The two tables of legality, cell by cell: what is allowed changes something, everything else
//! returns its error and changes nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{World, info};
use std::sync::atomic::Ordering;
use twofold_arch::{Gpa, Hpa};
use twofold_tdx::legality::{ENTRY_STATES, Function, OP_STATES, OpState};
use twofold_tdx::{Registers, SeptEntry, State, Status};

const GPA: Gpa = Gpa::new(0x20_0000);

/// A TD in `state` with tables for `GPA`. Returns the table whose entry 1 is for 2M, and the table
/// whose entry 0 is for 4K, which does not hang below it.
fn td(state: OpState) -> (World, Hpa) {
    let world = World::initialized(0, 1);
    let tables = world.tables(GPA, 1);
    if state == OpState::Runnable {
        world.module.mr_finalize(world.tdr).unwrap();
    }
    (world, *tables.last().unwrap())
}

/// Calls `function` on the entry for 2 MiB at `GPA`, with operands that make sense.
fn call(world: &World, function: Function, page: Hpa) -> (Status, Registers) {
    let mut registers = Registers {
        rcx: info(GPA, 1),
        rdx: world.tdr.get(),
        r8: page.get(),
        r9: 0,
    };
    let status = world.module.seamcall(function as u64, &mut registers);
    (status, registers)
}

/// Functions on one entry that can be asked at 2 MiB.
const AT_2M: [Function; 8] = [
    Function::SeptAdd,
    Function::PageAug,
    Function::RangeBlock,
    Function::RangeUnblock,
    Function::PageDemote,
    Function::PagePromote,
    Function::PageRemove,
    Function::SeptRemove,
];

#[test]
fn every_function_on_every_entry_state_does_what_the_table_says() {
    for state in [OpState::Initialized, OpState::Runnable] {
        let (world, table) = td(state);
        let large = world.machine().large(0);
        for function in AT_2M {
            let allowed = ENTRY_STATES
                .iter()
                .find(|(listed, _)| *listed == function)
                .unwrap()
                .1;
            for &from in State::ALL {
                let entry = match from {
                    State::Free | State::Removed => SeptEntry::FREE.with_state(from),
                    _ => SeptEntry::leaf(State::Mapped, large).with_state(from),
                };
                world
                    .machine()
                    .entry(table, 1)
                    .store(entry.raw(), Ordering::SeqCst);
                let page = match (function, from) {
                    (Function::PageAug, State::Free) => world.machine().large(1),
                    (Function::PageAug, _) => world.machine().large(2),
                    _ => world.fresh(),
                };
                let (status, registers) = call(&world, function, page);
                let now = world.machine().entry(table, 1).load(Ordering::SeqCst);
                let wrong_state = status.is(Status::EPT_ENTRY_STATE_INCORRECT)
                    || status.is(Status::GPA_RANGE_ALREADY_BLOCKED);
                assert_eq!(
                    !wrong_state,
                    allowed.contains(&from),
                    "{function:?} on {from:?} while {state:?}: {status}"
                );
                if status.is(Status::SUCCESS) {
                    let expected = match function {
                        Function::RangeBlock => from.blocked(),
                        Function::RangeUnblock => from.unblocked(),
                        Function::SeptAdd | Function::PageDemote => Some(State::NonLeafMapped),
                        Function::PageAug => Some(State::Pending),
                        _ => Some(State::Free),
                    };
                    assert_eq!(
                        SeptEntry::from_raw(now).state(),
                        expected,
                        "{function:?} on {from:?}"
                    );
                } else {
                    assert_eq!(
                        now,
                        entry.raw(),
                        "{function:?} on {from:?} changed the entry"
                    );
                }
                if wrong_state {
                    assert_eq!(registers.rdx >> 8, u64::from(from.public()));
                    assert_eq!(registers.rdx & 7, 1);
                }
            }
        }
    }
}

#[test]
fn every_function_in_every_state_of_the_td_does_what_the_table_says() {
    for function in
        AT_2M
            .into_iter()
            .chain([Function::PageAdd, Function::MrExtend, Function::SeptRead])
    {
        let allowed = OP_STATES
            .iter()
            .find(|(listed, _)| *listed == function)
            .unwrap()
            .1;
        for state in OpState::ALL {
            let world = if state == OpState::Uninitialized {
                World::uninitialized()
            } else {
                td(state).0
            };
            let (status, _) = call(&world, function, world.fresh());
            assert_eq!(
                !status.is(Status::OP_STATE_INCORRECT),
                allowed.contains(&state),
                "{function:?} while {state:?}: {status}"
            );
        }
    }
}

#[test]
fn numbers_without_a_function_and_versions_are_refused() {
    let world = World::initialized(0, 0);
    for rax in [12, 0xffff, 3 | 1 << 16, 1 << 63, u64::from(u32::MAX)] {
        let mut registers = Registers::default();
        let status = world.module.seamcall(rax, &mut registers);
        assert!(status.is(Status::OPERAND_INVALID), "{rax:#x}: {status}");
    }
}

#[test]
fn a_td_that_is_none_is_refused_by_every_function() {
    let world = World::initialized(0, 0);
    for &function in Function::ALL {
        for tdr in [world.fresh(), Hpa::new(7), Hpa::new(u64::MAX)] {
            let mut registers = Registers {
                rcx: tdr.get(),
                rdx: tdr.get(),
                r8: tdr.get(),
                r9: tdr.get(),
            };
            let cache = matches!(function, Function::CacheWriteBack | Function::PageWriteBack);
            let status = world.module.seamcall(function as u64, &mut registers);
            assert_eq!(status.is_error(), !cache, "{function:?}: {status}");
        }
    }
}
