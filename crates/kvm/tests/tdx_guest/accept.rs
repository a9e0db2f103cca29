//! Private memory: faults, ACCEPT and what it answers (SPEC 5.8; row 52).

use crate::common::td::SEPT_VE_DISABLE;
use crate::common::*;
use crate::guest::*;
use crate::stub::Instruction;

/// Statuses, high halves.
const ALREADY_ACCEPTED: u64 = 0x0000_0b0a;
const SIZE_MISMATCH: u64 = 0xc000_0b0b;
const OPERAND_INVALID: u64 = 0xc000_0100;
/// Only where the module was told to fail.
const BUSY: u64 = 0x8000_0200;
const LEVEL_2M: u64 = 1;

fn high(status: u64) -> u64 {
    status >> 32
}

#[test]
fn accepted_memory_is_zero_and_the_guests_own() {
    for shared_bit in [47, 51] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        td.ram.write(0x1000, 0x1111_u64);
        let page = RAM + 0x1000;
        assert_eq!(td.accept(page), 0);
        assert_eq!(td.loaded(page), 0);
        assert_eq!(td.store(page + 8, 0x2222), Ok(Stop::Done));
        assert_eq!(td.loaded(page + 8), 0x2222);
        assert_eq!(td.ram.read::<u64>(0x1000), 0x1111, "another page");
        assert_eq!(td.ram.read::<u64>(0x1008), 0);
    }
}

#[test]
fn accepting_twice_says_so_and_changes_nothing() {
    let td = Td::new();
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(td.store(RAM, 0x3333), Ok(Stop::Done));
    assert_eq!(high(td.accept(RAM)), ALREADY_ACCEPTED);
    assert_eq!(td.loaded(RAM), 0x3333);
    // Memory that the TD started with was never to be accepted.
    assert_eq!(high(td.accept(crate::stub::PAGES_AT)), ALREADY_ACCEPTED);
}

#[test]
fn a_large_page_is_accepted_where_small_ones_are_mapped_piece_by_piece() {
    let td = Td::new();
    // KVM maps 4K pages for TDs: the first attempt makes it map one, and finds that.
    assert_eq!(high(td.accept(RAM | LEVEL_2M)), SIZE_MISMATCH);
    for page in 0..4 {
        assert_eq!(td.accept(RAM + page * PAGE), 0);
    }
    assert_eq!(high(td.accept(RAM | LEVEL_2M)), SIZE_MISMATCH);
    assert_eq!(td.loaded(RAM + 3 * PAGE), 0);
}

#[test]
fn what_is_no_private_page_cannot_be_accepted() {
    for shared_bit in [47, 51] {
        let td = Td::with(Options {
            shared_bit,
            ..Options::default()
        });
        for rcx in [
            td.shared_gpa(RAM),
            RAM | 2,
            RAM | 7,
            RAM | 8,
            (RAM + 0x1000) | LEVEL_2M,
            1 << 52,
            !0xfff,
        ] {
            assert_eq!(high(td.accept(rcx)), OPERAND_INVALID, "{rcx:#x}");
        }
    }
}

#[test]
fn memory_that_waits_is_told_to_the_guest_which_accepts_it_and_goes_on() {
    let td = Td::new();
    td.skip(0);
    // The first access makes KVM give the page, the second finds that it waits.
    let Ok(Stop::Ve(ve)) = td.load(RAM + 0x18) else {
        panic!("no #VE");
    };
    assert_eq!((ve.status, ve.reason), (0, 48));
    assert_eq!((ve.gpa, ve.gla), (RAM + 0x18, RAM + 0x18));
    // The guest cannot be told to accept while its handler waits, so it skips the instruction.
    td.skip(3);
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(td.loaded(RAM + 0x18), 0);
}

#[test]
fn a_guest_that_does_not_want_to_be_told_of_waiting_memory_ends_there() {
    let td = Td::with(Options {
        attributes: SEPT_VE_DISABLE,
        ..Options::default()
    });
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(td.loaded(RAM), 0);
    assert_eq!(td.load(RAM + PAGE), Err(Errno::IO));
    // Nothing works any more.
    assert_eq!(td.resume(), Err(Errno::IO));
}

#[test]
fn private_memory_that_the_program_calls_shared_is_the_programs_to_convert() {
    let td = Td::new();
    td.set_private(RAM + PAGE, PAGE, false);
    let fault = |td: &Td| {
        assert_eq!(td.run.read::<u32>(8), kvm_bindings::KVM_EXIT_MEMORY_FAULT);
        (td.exit::<u64>(0), td.exit::<u64>(8), td.exit::<u64>(16))
    };
    let private = u64::from(kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE);
    let registers = [(reg::RAX, 6), (reg::RCX, RAM + PAGE)];
    let stop = td.execute(Instruction::Tdcall, &registers);
    assert_eq!(stop, Err(Errno::FAULT));
    assert_eq!(fault(&td), (private, RAM + PAGE, PAGE));
    // Converted, the same instruction completes.
    td.set_private(RAM + PAGE, PAGE, true);
    assert_eq!(td.resume(), Ok(Stop::Done));
    let status = td.register(reg::RAX);
    assert!(status == 0 || high(status) == BUSY && td.accept(RAM + PAGE) == 0);
    // And the other way: a shared access to private memory.
    assert_eq!(td.load(Td::shared(RAM + PAGE)), Err(Errno::FAULT));
    assert_eq!(fault(&td), (0, RAM + PAGE, PAGE));
    td.set_private(RAM + PAGE, PAGE, false);
    td.ram.write(PAGE as usize, 0x4444_u64);
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.register(reg::RAX), 0x4444);
}

#[test]
fn private_memory_comes_back_empty_after_it_was_shared() {
    let td = Td::new();
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(td.store(RAM, 0x5555), Ok(Stop::Done));
    td.set_private(RAM, PAGE, false);
    assert_eq!(td.store(Td::shared(RAM), 0x6666), Ok(Stop::Done));
    assert_eq!(td.ram.read::<u64>(0), 0x6666, "the program's own memory");
    td.set_private(RAM, PAGE, true);
    td.skip(3);
    assert!(matches!(td.load(RAM), Ok(Stop::Ve(_))), "it waits again");
    assert_eq!(td.resume(), Ok(Stop::Done));
    assert_eq!(td.accept(RAM), 0);
    assert_eq!(td.loaded(RAM), 0);
}
