//! What the judge cannot see of the x87 unit: that it is switched off, where exceptions are
//! reported, its state in other modes' formats, and operands that fault or are emulated.

use crate::guest::{Guest, run_with_mmio};
use twofold_arch::Gpa;
use twofold_cpu::{Exit, FpuState};

const MP: u64 = 1 << 1;
const EM: u64 = 1 << 2;
const TS: u64 = 1 << 3;
const NE: u64 = 1 << 5;

const PF: u64 = 14;
const NM: u64 = 7;
const MF: u64 = 16;

/// Where data is.
const DATA: u64 = 0x2_0000;
/// Where nothing is mapped.
const NOWHERE: u64 = 0x40_0000;
/// 1.0 in a register.
const ONE: u128 = 0x3fff_8000_0000_0000_0000;
/// Division by zero alone is not masked.
const ZERO_DIVIDE: u16 = 0x37b;

/// A guest in 64-bit mode whose RBX points to data and RCX nowhere.
fn guest(code: &[u8]) -> Guest {
    let mut guest = Guest::long(code);
    guest.set(0x1000, |registers| {
        registers.gpr[1] = NOWHERE;
        registers.gpr[3] = DATA;
        registers.gpr[4] = 0x1_0000;
    });
    guest
}

fn set_cr0(guest: &mut Guest, bits: u64, to: u64) {
    let mut system = guest.cpu.system_registers();
    system.cr0 = system.cr0 & !bits | to;
    guest.cpu.set_system_registers(&system);
}

fn set_fpu(guest: &mut Guest, change: impl Fn(&mut FpuState)) {
    let mut fpu = guest.cpu.fpu();
    change(&mut fpu);
    guest.cpu.set_fpu(&fpu);
}

/// The vector that the guest's next run ends in, and the address of the instruction.
fn fault(guest: &mut Guest) -> (u64, u64) {
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let vector = guest.cpu.registers().rip.wrapping_sub(0x7001);
    (vector, guest.read_u64(guest.gpr(4) as usize))
}

#[test]
fn a_unit_that_is_switched_off_is_not_available() {
    const FLD1: &[u8] = b"\xd9\xe8\xf4";
    const FNINIT: &[u8] = b"\xdb\xe3\xf4";
    const FNSTENV: &[u8] = b"\xd9\x33\xf4";
    const FADD_NOWHERE: &[u8] = b"\xd8\x01\xf4";
    const WAIT: &[u8] = b"\x9b\xf4";
    for (code, bits, raises) in [
        (FLD1, MP | TS, true),
        (FLD1, TS, true),
        (FLD1, EM, true),
        (FLD1, MP, false),
        (FNINIT, EM, true),
        (FNSTENV, TS, true),
        (FADD_NOWHERE, EM, true),
        (WAIT, MP | TS, true),
        (WAIT, TS, false),
        (WAIT, MP | EM, false),
    ] {
        let mut guest = guest(code);
        set_cr0(&mut guest, MP | EM | TS, bits);
        let before = guest.cpu.fpu();
        assert_eq!(guest.cpu.run(), Exit::Halt);
        let ends = guest.cpu.registers().rip;
        if raises {
            assert_eq!(ends, 0x7001 + NM, "{code:02x?} with {bits:#x}");
            assert_eq!(guest.cpu.fpu(), before);
        } else {
            assert_eq!(
                ends,
                0x1000 + code.len() as u64,
                "{code:02x?} with {bits:#x}"
            );
        }
    }
}

#[test]
fn an_unmasked_exception_is_reported_by_the_next_instruction_that_waits() {
    // fldz; fld1; fdiv st0,st1; fnstsw ax; fnop; fninit; hlt
    let code = b"\xd9\xee\xd9\xe8\xd8\xf1\xdf\xe0\xd9\xd0\xdb\xe3\xf4";
    for numeric_errors in [NE, 0] {
        let mut guest = guest(code);
        set_cr0(&mut guest, NE, numeric_errors);
        set_fpu(&mut guest, |fpu| fpu.fcw = ZERO_DIVIDE);
        assert_eq!(fault(&mut guest), (MF, 0x1008));
        assert_eq!(guest.gpr(0), 0xb084, "ES, B and ZE, top 6");
        let fpu = guest.cpu.fpu();
        assert_eq!(fpu.fsw, 0xb084);
        assert_eq!(fpu.st[..2], [ONE, 0], "the operands are as before");
        assert_eq!((fpu.fip, fpu.fop, fpu.fdp), (0x1004, 0x0f1, 0));
        // What does not wait goes on, and clears it.
        guest.set(0x100a, |_| {});
        assert_eq!(guest.cpu.run(), Exit::Halt);
        assert_eq!(guest.cpu.registers().rip, 0x100d);
        assert_eq!(guest.cpu.fpu().fsw, 0);
    }
}

#[test]
fn wait_reports_an_exception_and_code_without_x87_does_not() {
    // nop; mov eax,[rbx]; movaps xmm0,xmm1; fwait; hlt
    let mut guest = guest(b"\x90\x8b\x03\x0f\x28\xc1\x9b\xf4");
    set_fpu(&mut guest, |fpu| {
        fpu.fcw = ZERO_DIVIDE;
        fpu.fsw = 4;
    });
    assert_eq!(fault(&mut guest), (MF, 0x1006));
    assert_eq!(
        guest.cpu.fpu().fsw,
        0x8084,
        "the summary follows from the flags"
    );
}

#[test]
fn an_exception_that_waits_comes_before_the_operand_is_touched() {
    // fld qword [rcx]; hlt
    let code = b"\xdd\x01\xf4";
    let mut waiting = guest(code);
    set_fpu(&mut waiting, |fpu| {
        fpu.fcw = ZERO_DIVIDE;
        fpu.fsw = 0x8084;
    });
    assert_eq!(fault(&mut waiting), (MF, 0x1000));
    let mut plain = guest(code);
    assert_eq!(plain.cpu.run(), Exit::Halt);
    assert_eq!(plain.cpu.registers().rip, 0x7001 + PF);
}

#[test]
fn an_operand_that_faults_leaves_the_unit_as_it_was() {
    // fst dword; fstp tword; fistp word; fbstp; fnstenv; fnsave; fldenv; frstor; fadd, at [rcx]
    for code in [
        b"\xd9\x11",
        b"\xdb\x39",
        b"\xdf\x19",
        b"\xdf\x31",
        b"\xd9\x31",
        b"\xdd\x31",
        b"\xd9\x21",
        b"\xdd\x21",
        b"\xd8\x01",
    ] {
        let mut guest = guest(code);
        set_fpu(&mut guest, |fpu| {
            fpu.fsw = 0x3800;
            fpu.ftw = 0x80;
            fpu.st[0] = ONE;
            (fpu.fop, fpu.fip, fpu.fdp) = (1, 2, 3);
        });
        let before = guest.cpu.fpu();
        assert_eq!(guest.cpu.run(), Exit::Halt);
        assert_eq!(guest.cpu.registers().rip, 0x7001 + PF, "{code:02x?}");
        assert_eq!(guest.cpu.system_registers().cr2, NOWHERE);
        assert_eq!(guest.cpu.fpu(), before, "{code:02x?}");
    }
}

#[test]
fn the_pointers_name_the_last_instruction_that_computed() {
    // fld dword gs:[rbx+8]; fnop; fnstcw [rbx]; hlt
    let mut guest = guest(b"\x65\xd9\x43\x08\xd9\xd0\xd9\x3b\xf4");
    let mut system = guest.cpu.system_registers();
    system.gs.base = 0x100;
    guest.cpu.set_system_registers(&system);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let fpu = guest.cpu.fpu();
    assert_eq!((fpu.fip, fpu.fop), (0x1004, 0x1d0), "fnop");
    assert_eq!(fpu.fdp, DATA + 8, "an offset in its segment");
}

#[test]
fn emulated_memory_is_read_and_written_in_ten_bytes() {
    // fld tword [rbx]; fstp tword [rbx+16]; hlt
    let mut guest = guest(b"\xdb\x2b\xdb\x7b\x10\xf4");
    guest.map(DATA >> 12, false);
    let read = |gpa, len| Exit::MmioRead {
        gpa: Gpa::new(gpa),
        len,
    };
    assert_eq!(run_with_mmio(&mut guest), read(DATA, 8));
    guest.cpu.complete_mmio_read(&(ONE as u64).to_le_bytes());
    assert_eq!(run_with_mmio(&mut guest), read(DATA + 8, 2));
    assert_eq!(guest.cpu.fpu().ftw, 0, "not yet");
    guest.cpu.complete_mmio_read(&0x3fffu16.to_le_bytes());
    let mut written: Vec<u8> = Vec::new();
    loop {
        match run_with_mmio(&mut guest) {
            Exit::MmioWrite { gpa, len, data } => {
                assert_eq!(gpa, Gpa::new(DATA + 16 + written.len() as u64));
                written.extend(&data[..len as usize]);
            }
            exit => {
                assert_eq!(exit, Exit::Halt);
                break;
            }
        }
    }
    assert_eq!(written, ONE.to_le_bytes()[..10]);
    assert_eq!(guest.cpu.fpu().ftw, 0, "it was popped");
}

/// The unit with something in each field: two registers full, of which the second is zero.
fn sample() -> FpuState {
    let mut state = FpuState {
        fcw: 0x27f,
        fsw: 0x3000,
        ftw: 0xc0,
        fop: 0x5a5,
        fip: 0x9876_5432,
        fdp: 0xfedc_ba98,
        ..FpuState::default()
    };
    state.st[0] = ONE;
    state
}

#[test]
fn the_environment_has_four_formats() {
    // fnstenv; fninit; fldenv; hlt at [rbx], or [bx]
    let long = |prefix: &[u8]| {
        let parts: [&[u8]; 6] = [
            prefix,
            b"\xd9\x33",
            b"\xdb\xe3",
            prefix,
            b"\xd9\x23",
            b"\xf4",
        ];
        guest(&parts.concat())
    };
    let real = |prefix: &[u8]| {
        let parts: [&[u8]; 6] = [
            prefix,
            b"\xd9\x37",
            b"\xdb\xe3",
            prefix,
            b"\xd9\x27",
            b"\xf4",
        ];
        let mut guest = Guest::real(&parts.concat());
        guest.set(0x1000, |registers| registers.gpr[3] = 0x3000);
        guest
    };
    let wide = |words: [u32; 7]| words.map(u32::to_le_bytes).concat();
    let narrow = |words: [u16; 7]| words.map(u16::to_le_bytes).concat();
    let sample = sample();
    for (mut guest, at, image, fop, pointer_bits) in [
        (
            long(&[]),
            DATA,
            wide([
                0xffff_027f,
                0xffff_3000,
                0xffff_4fff,
                0x9876_5432,
                0x05a5_0000,
                0xfedc_ba98,
                0xffff_0000,
            ]),
            0x5a5,
            32,
        ),
        (
            long(&[0x66]),
            DATA,
            narrow([0x27f, 0x3000, 0x4fff, 0x5432, 0, 0xba98, 0]),
            0,
            16,
        ),
        (
            real(&[0x66]),
            0x3000,
            wide([
                0xffff_027f,
                0xffff_3000,
                0xffff_4fff,
                0xffff_5432,
                0x0987_65a5,
                0xffff_ba98,
                0x0fed_c000,
            ]),
            0x5a5,
            32,
        ),
        (
            real(&[]),
            0x3000,
            narrow([0x27f, 0x3000, 0x4fff, 0x5432, 0x65a5, 0xba98, 0xc000]),
            0x5a5,
            20,
        ),
    ] {
        guest.cpu.set_fpu(&sample);
        assert_eq!(guest.cpu.run(), Exit::Halt);
        let memory = guest.arena.memory(at, image.len() + 2);
        assert_eq!(
            memory[..image.len()],
            image,
            "{pointer_bits} bits, opcode {fop:#x}"
        );
        assert_eq!(memory[image.len()..], [0, 0]);
        let mask = u64::MAX >> (64 - pointer_bits);
        assert_eq!(
            guest.cpu.fpu(),
            FpuState {
                fop,
                fip: sample.fip & mask,
                fdp: sample.fdp & mask,
                ..sample
            }
        );
    }
}

#[test]
fn storing_the_environment_masks_exceptions_and_saving_initialises() {
    // fnstenv [rbx]; fnop; fnsave [rbx]; hlt
    let mut guest = guest(b"\xd9\x33\xd9\xd0\xdd\x33\xf4");
    guest.cpu.set_fpu(&FpuState {
        fcw: ZERO_DIVIDE,
        fsw: 0x8084 | 0x3000,
        ..sample()
    });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x1007, "nothing waits");
    let image = guest.arena.memory(DATA, 108).to_vec();
    assert_eq!(image[0..2], 0x37fu16.to_le_bytes());
    assert_eq!(
        image[4..6],
        0x3004u16.to_le_bytes(),
        "the flag, not the summary"
    );
    assert_eq!(image[28..38], ONE.to_le_bytes()[..10]);
    let mut initial = FpuState::default();
    // Register 6, which was the top.
    initial.st[6] = ONE;
    assert_eq!(guest.cpu.fpu(), initial);
    // frstor [rbx]; hlt
    guest.write(0x1000, b"\xdd\x23\xf4");
    guest.set(0x1000, |registers| registers.gpr[3] = DATA);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let restored = guest.cpu.fpu();
    assert_eq!(
        (restored.fcw, restored.fsw, restored.ftw),
        (0x37f, 0x3004, 0xc0)
    );
    assert_eq!(restored.st[0], ONE);
    assert_eq!((restored.fip, restored.fop), (0x1002, 0x1d0));
}
