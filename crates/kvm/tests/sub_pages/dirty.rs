//! Dirty logs and rings: a permitted write is in them as every other, a denied one is not.

use super::*;
use rustix::mm::{MapFlags, ProtFlags};

const FULL: u32 = KVM_SUBPAGE_FULL_ACCESS;
const RING_BYTES: u64 = 16384;

pub(super) fn log(vm: &Fd) -> u64 {
    let mut bitmap = 0_u64;
    let mut request = kvm_dirty_log {
        slot: 1,
        ..Default::default()
    };
    request.__bindgen_anon_1.padding2 = (&raw mut bitmap).addr() as u64;
    assert_eq!(vm.set(KVM_GET_DIRTY_LOG, request), Ok(0));
    bitmap
}

fn clear(vm: &Fd, bitmap: u64) {
    let mut request = kvm_clear_dirty_log {
        slot: 1,
        num_pages: PAGES as u32,
        ..Default::default()
    };
    request.__bindgen_anon_1.padding2 = (&raw const bitmap).addr() as u64;
    assert_eq!(vm.set(KVM_CLEAR_DIRTY_LOG, request), Ok(0));
}

#[test]
fn row_10_a_permitted_write_is_in_the_bitmap_of_each_round_and_a_denied_one_in_none() {
    let guarded = Guarded::with(|_| (), KVM_MEM_LOG_DIRTY_PAGES);
    guarded.protect(0, &[0b1, 0b1, FULL]);
    assert_eq!(log(&guarded.vm), 0);
    for round in 1..6 {
        assert_eq!(guarded.store(DATA, round), End::Halt);
        assert_eq!(
            guarded.store(DATA + PAGE + 0x80, round),
            denied(DATA + PAGE + 0x80, 3)
        );
        assert_eq!(guarded.store(DATA + 2 * PAGE, round), End::Halt);
        assert_eq!(log(&guarded.vm), 0b101, "round {round}");
        assert_eq!(log(&guarded.vm), 0);
        // What was taken away to log the next write has not become permitted.
        let end = guarded.store(DATA + 0x80, round);
        assert_eq!(end, denied(DATA + 0x80, 3));
        assert_eq!(log(&guarded.vm), 0);
    }
}

#[test]
fn row_10_logging_that_begins_and_ends_leaves_the_protection_alone() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0b10]);
    for round in 0..4 {
        for flags in [0, KVM_MEM_LOG_DIRTY_PAGES] {
            guarded.set_slot(flags);
            assert_eq!(guarded.store(DATA, round), denied(DATA, 3));
            assert_eq!(guarded.store(DATA + 0x80, round), End::Halt);
            if flags != 0 {
                assert_eq!(log(&guarded.vm), 1);
            }
            assert_eq!(guarded.store(DATA, round), denied(DATA, 3));
            assert_eq!(guarded.store(DATA + 0xf8, round), End::Halt);
        }
    }
    assert_eq!(guarded.word(DATA), 0);
}

#[test]
fn row_10_a_page_that_is_protected_or_opened_while_it_is_logged_stays_logged() {
    let guarded = Guarded::with(|_| (), KVM_MEM_LOG_DIRTY_PAGES);
    let mut expected = 0;
    for map in [FULL, 0b1, 0b11, FULL, 0, 0b1, FULL, 0b1] {
        guarded.protect(5, &[map]);
        let page = DATA + 5 * PAGE;
        assert_eq!(
            log(&guarded.vm),
            expected,
            "{map:#x}: setting a map writes nothing"
        );
        let end = guarded.store(page, 1);
        expected = 0;
        if map & 1 != 0 {
            assert_eq!(end, End::Halt);
            assert_eq!(log(&guarded.vm), 1 << 5, "{map:#x}");
            assert_eq!(guarded.store(page + 8, 1), End::Halt);
            assert_eq!(log(&guarded.vm), 1 << 5, "{map:#x}, again");
        } else {
            assert_eq!(end, denied(page, 3));
        }
    }
}

#[test]
fn row_10_a_log_that_is_collected_by_hand_has_every_permitted_write() {
    let manual = |vm: &Fd| {
        let result = enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1);
        assert_eq!(result, Ok(0));
    };
    let guarded = Guarded::with(manual, KVM_MEM_LOG_DIRTY_PAGES);
    guarded.protect(0, &[0b1; 4]);
    for page in 0..4 {
        assert_eq!(guarded.store(DATA + page * PAGE, 1), End::Halt);
    }
    assert_eq!(log(&guarded.vm), 0b1111);
    clear(&guarded.vm, 0b0110);
    assert_eq!(log(&guarded.vm), 0b1001);
    assert_eq!(guarded.store(DATA + PAGE, 2), End::Halt);
    assert_eq!(
        guarded.store(DATA + 2 * PAGE + 0x80, 2),
        denied(DATA + 2 * PAGE + 0x80, 3)
    );
    assert_eq!(log(&guarded.vm), 0b1011);
}

#[test]
fn row_10_a_ring_has_the_permitted_write_and_not_the_denied_one() {
    let rings = |vm: &Fd| assert_eq!(enable(vm, KVM_CAP_DIRTY_LOG_RING, RING_BYTES), Ok(0));
    let guarded = Guarded::with(rings, KVM_MEM_LOG_DIRTY_PAGES);
    // SAFETY: a new mapping.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            RING_BYTES as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            guarded.vcpu.borrow(),
            64 * 4096,
        )
    };
    let ring = Memory {
        start: start.unwrap().cast(),
        length: RING_BYTES as usize,
    };
    let mut next = 0;
    let mut harvest = || {
        let mut found = Vec::new();
        while ring.read::<u32>(next * 16) == 1 {
            assert_eq!(ring.read::<u32>(next * 16 + 4), 1, "the slot");
            found.push(ring.read::<u64>(next * 16 + 8));
            ring.write(next * 16, 2_u32);
            next += 1;
        }
        found
    };
    guarded.protect(0, &[0b1, 0b1]);
    for round in 0..4 {
        assert_eq!(guarded.store(DATA, round), End::Halt);
        let page = DATA + PAGE;
        assert_eq!(guarded.store(page + 0x80, round), denied(page + 0x80, 3));
        assert_eq!(harvest(), [0], "round {round}");
        assert_eq!(guarded.store(DATA, round), End::Halt);
        assert_eq!(harvest(), [], "not before the reset");
        assert_eq!(guarded.vm.call(KVM_RESET_DIRTY_RINGS, 0), Ok(1));
    }
}
