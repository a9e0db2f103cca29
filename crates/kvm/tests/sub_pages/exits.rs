//! What a guest's writes end in, and what the program can do about it.

use super::*;

const FULL: u32 = KVM_SUBPAGE_FULL_ACCESS;

#[test]
fn row_4_each_of_32_denied_writes_exits_with_its_address_and_none_when_all_may_be_written() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0]);
    for sub_page in 0..32 {
        let address = DATA + sub_page * 128 + sub_page % 120;
        assert_eq!(guarded.store(address, u64::MAX), denied(address, 3));
        assert_eq!(guarded.regs().rip, CODE, "before the instruction");
        assert_eq!(guarded.word(address), 0);
        assert_eq!(guarded.load(address), 0, "reads are free");
    }
    guarded.protect(0, &[FULL]);
    for sub_page in 0..32 {
        let address = DATA + sub_page * 128;
        assert_eq!(guarded.store(address, sub_page + 1), End::Halt);
        assert_eq!(guarded.word(address), sub_page + 1);
    }
}

#[test]
fn row_5_a_write_across_the_edge_of_sub_pages_needs_both() {
    let guarded = Guarded::new();
    for (map, denied_at) in [
        (0b11, None),
        (0b01, Some(0x80)),
        (0b10, Some(0x7c)),
        (0b00, Some(0x7c)),
    ] {
        guarded.protect(0, &[map]);
        let end = guarded.store(DATA + 0x7c, u64::MAX);
        let expected = denied_at.map_or(End::Halt, |offset| denied(DATA + offset, 3));
        assert_eq!(end, expected, "{map:#b}");
        let written = if denied_at.is_none() { u64::MAX } else { 0 };
        assert_eq!(guarded.word(DATA + 0x7c), written);
        guarded.data.write(0x7c, 0_u64);
    }
    // And across the edge of pages, each has its own map.
    for (first, second, denied_at) in [
        (1 << 31, 1, None),
        (1 << 31, !1, Some(0x1000)),
        (!(1 << 31), 1, Some(0xffc)),
        (0, 0, Some(0xffc)),
        (1 << 31, FULL, None),
        (FULL, 0, Some(0x1000)),
    ] {
        guarded.protect(0, &[first, second]);
        let end = guarded.store(DATA + 0xffc, u64::MAX);
        let expected = denied_at.map_or(End::Halt, |offset| denied(DATA + offset, 3));
        assert_eq!(end, expected, "{first:#x} {second:#x}");
        let written = if denied_at.is_none() { u64::MAX } else { 0 };
        assert_eq!(guarded.word(DATA + 0xffc), written);
        guarded.data.write(0xffc, 0_u64);
    }
}

#[test]
fn row_6_a_guest_page_table_in_a_protected_page_is_never_written_by_the_processors_walk() {
    let guarded = Guarded::new();
    // The last table moves into the data, where its bytes may all be written but for the last.
    for entry in 0..512 {
        guarded.data.write(entry * 8, entry as u64 * PAGE + 7);
    }
    guarded.put(TABLES + 2 * PAGE, DATA + 7);
    guarded.protect(0, &[FULL >> 1]);
    // The walk of the code's own address comes first, and every walk marks what it reads.
    let entry = |address: u64| DATA + (address >> 12) * 8;
    let end = guarded.store(DATA + 5 * PAGE, 1);
    assert_eq!(
        end,
        denied(entry(CODE), 0),
        "no instruction could be skipped"
    );
    assert_eq!(guarded.word(entry(CODE)), CODE + 7, "no flag was set");
    // The program's way out is not to protect that page.
    guarded.protect(0, &[FULL]);
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.word(entry(CODE)) & 0x20, 0x20);
    assert_eq!(guarded.word(entry(DATA + 5 * PAGE)) & 0x60, 0x60);
}

#[test]
fn the_program_may_skip_the_instruction() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0]);
    // mov qword [rdi], 7 (7 bytes); inc rbx
    let code = [0x48, 0xc7, 0x07, 7, 0, 0, 0, 0x48, 0xff, 0xc3];
    let end = guarded.execute(&code, |regs| regs.rdi = DATA + 8);
    assert_eq!(end, denied(DATA + 8, 7));
    let mut regs = guarded.regs();
    assert_eq!((regs.rip, regs.rbx), (CODE, 0));
    regs.rip += 7;
    assert_eq!(guarded.vcpu.set(KVM_SET_REGS, regs), Ok(0));
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!((guarded.regs().rbx, guarded.word(DATA + 8)), (1, 0));
}

#[test]
fn the_program_may_widen_the_map_and_let_the_guest_try_again() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0]);
    // lock xadd [rdi], rax
    let code = [0xf0, 0x48, 0x0f, 0xc1, 0x07];
    let end = guarded.execute(&code, |regs| (regs.rdi, regs.rax) = (DATA + 0x100, 5));
    assert_eq!(end, denied(DATA + 0x100, 5));
    assert_eq!(guarded.resume(), end, "nothing has changed: the same again");
    guarded.protect(0, &[1 << 2]);
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.word(DATA + 0x100), 5);
}

#[test]
fn the_program_may_do_the_write_itself() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0]);
    let end = guarded.store(DATA + 0x200, 0x1234);
    let End::Denied { address, length } = end else {
        panic!("{end:?}")
    };
    let mut regs = guarded.regs();
    // The program's own mapping is not protected.
    guarded.data.write((address - DATA) as usize, regs.rax);
    regs.rip += u64::from(length);
    assert_eq!(guarded.vcpu.set(KVM_SET_REGS, regs), Ok(0));
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.load(address), 0x1234);
}

#[test]
fn row_11_a_string_instruction_stops_at_the_denied_piece_and_goes_on_from_there() {
    let guarded = Guarded::new();
    guarded.protect(0, &[!(1 << 3)]);
    for (element, code) in [
        (1, vec![0xf3, 0xaa]),
        (2, vec![0x66, 0xf3, 0xab]),
        (4, vec![0xf3, 0xab]),
        (8, vec![0xf3, 0x48, 0xab]),
    ] {
        let count = 0x400 / element;
        let end = guarded.execute(&code, |regs| {
            (regs.rdi, regs.rcx) = (DATA, count);
            regs.rax = 0x1111_1111_1111_1111 * element;
        });
        assert_eq!(end, denied(DATA + 0x180, code.len() as u8));
        let regs = guarded.regs();
        assert_eq!(regs.rdi, DATA + 0x180, "what came before is done");
        assert_eq!(regs.rcx, count - 0x180 / element);
        assert_eq!(guarded.word(DATA + 0x178), 0x1111_1111_1111_1111 * element);
        assert_eq!(guarded.word(DATA + 0x180), 0);
        guarded.protect(0, &[FULL]);
        assert_eq!(guarded.resume(), End::Halt);
        assert_eq!(guarded.word(DATA + 0x3f8), 0x1111_1111_1111_1111 * element);
        guarded.data.write_bytes(0, &[0; 0x400]);
        guarded.protect(0, &[!(1 << 3)]);
    }
    // Copied from elsewhere in the same page, and downwards.
    guarded.data.write(0x800, 0x55_u64);
    let end = guarded.execute(&[0xfd, 0xf3, 0x48, 0xa5], |regs| {
        (regs.rsi, regs.rdi, regs.rcx) = (DATA + 0x800, DATA + 0x208, 3);
    });
    assert_eq!(end, denied(DATA + 0x1f8, 3));
    assert_eq!(guarded.word(DATA + 0x208), 0x55);
}

#[test]
fn row_11_what_is_read_from_a_device_does_not_land_in_a_denied_piece() {
    let guarded = Guarded::new();
    guarded.protect(0, &[!1]);
    // mov rsi, a device's address; movsq
    let device = 0x18_0000;
    guarded.prepare(&[0x48, 0xa5], |regs| (regs.rsi, regs.rdi) = (device, DATA));
    // The device is asked first, as a processor reads before it writes.
    assert_eq!(guarded.resume(), End::Other(KVM_EXIT_MMIO));
    guarded.run.write(32 + 8, 0x4242_u64);
    assert_eq!(guarded.resume(), denied(DATA, 2));
    assert_eq!(guarded.word(DATA), 0);
    guarded.protect(0, &[FULL]);
    assert_eq!(guarded.resume(), End::Halt, "the device is not asked again");
    assert_eq!(guarded.word(DATA), 0x4242);
}

#[test]
fn row_11_port_input_asks_no_device_for_what_it_could_not_store() {
    let guarded = Guarded::new();
    guarded.protect(0, &[!0b10]);
    // insb
    let code = [0x6c];
    let end = guarded.execute(&code, |regs| (regs.rdi, regs.rdx) = (DATA + 0x80, 0x42));
    assert_eq!(end, denied(DATA + 0x80, 1));
    // What the program answers is stored where it may be.
    guarded.protect(0, &[0b10]);
    assert_eq!(guarded.resume(), End::Other(KVM_EXIT_IO));
    let offset: u64 = guarded.run.read(32 + 8);
    guarded.run.write(offset as usize, 0x77_u8);
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.word(DATA + 0x80), 0x77);
    // And if the permission goes while the device is asked, the answer waits.
    let end = guarded.execute(&code, |regs| (regs.rdi, regs.rdx) = (DATA + 0x88, 0x42));
    assert_eq!(end, End::Other(KVM_EXIT_IO));
    guarded.protect(0, &[0]);
    guarded.run.write(offset as usize, 0x78_u8);
    assert_eq!(guarded.resume(), denied(DATA + 0x88, 1));
    guarded.protect(0, &[FULL]);
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.word(DATA + 0x88), 0x78);
}

#[test]
fn an_event_whose_frame_is_denied_waits_and_is_no_instruction_to_be_skipped() {
    let guarded = Guarded::new();
    guarded.protect(0, &[0]);
    // ud2
    let end = guarded.execute(&[0x0f, 0x0b], |regs| regs.rsp = DATA + 0x100);
    assert_eq!(end, denied(DATA + 0xf8, 0), "SS is pushed first");
    assert_eq!(guarded.regs().rip, CODE);
    guarded.protect(0, &[0b11]);
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.regs().rip, HANDLERS + 7);
    assert_eq!(guarded.word(DATA + 0xd8), CODE);
    // An interrupt from outside, and NMI, wait until they can be delivered.
    guarded.protect(0, &[0]);
    guarded.prepare(&[0x90], |regs| {
        (regs.rsp, regs.rflags) = (DATA + 0x100, 0x202)
    });
    assert_eq!(
        guarded.vcpu.set(KVM_INTERRUPT, kvm_interrupt { irq: 0x40 }),
        Ok(0)
    );
    assert_eq!(guarded.resume(), denied(DATA + 0xf8, 0));
    assert_eq!(guarded.resume(), denied(DATA + 0xf8, 0));
    guarded.protect(0, &[FULL]);
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.regs().rip, HANDLERS + 0x41);
}

#[test]
fn state_images_vectors_pushes_and_exchanges_are_judged_over_all_their_bytes() {
    let guarded = Guarded::new();
    guarded.protect(0, &[!(1 << 4)]);
    let edge = DATA + 0x200;
    for (name, code, place, expected) in [
        ("fxsave", vec![0x0f, 0xae, 0x07], DATA + 0x10, edge),
        ("movups", vec![0x0f, 0x11, 0x07], edge - 15, edge),
        ("movaps", vec![0x0f, 0x29, 0x07], edge + 0x70, edge + 0x70),
        ("xchg", vec![0x48, 0x87, 0x07], edge - 1, edge),
        (
            "lock inc",
            vec![0xf0, 0x48, 0xff, 0x07],
            edge + 0x79,
            edge + 0x79,
        ),
        // The comparison fails, and the write is one all the same.
        (
            "lock cmpxchg",
            vec![0xf0, 0x48, 0x0f, 0xb1, 0x0f],
            edge - 7,
            edge,
        ),
        ("sgdt", vec![0x0f, 0x01, 0x07], edge - 9, edge),
    ] {
        let end = guarded.execute(&code, |regs| {
            (regs.rdi, regs.rax) = (place, 0x1234);
        });
        assert_eq!(end, denied(expected, code.len() as u8), "{name}");
    }
    for (name, code) in [("push", vec![0x50]), ("call", vec![0xe8, 0, 0, 0, 0])] {
        let end = guarded.execute(&code, |regs| regs.rsp = edge + 4);
        assert_eq!(end, denied(edge, code.len() as u8), "{name}");
        assert_eq!(guarded.regs().rsp, edge + 4);
    }
    let untouched = (0..0x1000).all(|offset| guarded.data.read::<u8>(offset) == 0);
    assert!(untouched, "nothing was written");
}

#[test]
fn code_may_run_from_a_protected_page_and_change_what_it_may() {
    let guarded = Guarded::new();
    guarded.protect(0, &[!1]);
    // In the data: mov byte [rip+0x80-7], 1; mov byte [rip-14], 1; hlt
    guarded.data.write_bytes(
        0,
        &[
            0xc6, 0x05, 0x79, 0, 0, 0, 1, 0xc6, 0x05, 0xf2, 0xff, 0xff, 0xff, 1, 0xf4,
        ],
    );
    let end = guarded.execute(&[], |regs| regs.rip = DATA);
    assert_eq!(end, denied(DATA, 7));
    assert_eq!(guarded.regs().rip, DATA + 7);
    assert_eq!(guarded.word(DATA + 0x80), 1);
    guarded.protect(0, &[FULL]);
    assert_eq!(guarded.resume(), End::Halt);
    assert_eq!(guarded.data.read::<u8>(0), 1);
}
