//! XSAVE and its relatives, XCR0, and what depends on it.

use crate::guest::Guest;
use twofold_cpu::state::{cr0, cr4, gpr};
use twofold_cpu::{Exit, FpuState, cpuid, vector, xsave};

/// Where the tests have their area.
const AREA: usize = 0x2_0000;
const XSTATE_BV: usize = AREA + 512;
const XCOMP_BV: usize = AREA + 520;
/// Handlers are one HLT each.
const HANDLERS: u64 = 0x7000;

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
const PKRU: u64 = 1 << 9;

/// A guest whose operating system has enabled everything, about to run `code` with RSI at the area.
fn guest(code: &[u8], requested: u64) -> Guest {
    let mut code = code.to_vec();
    code.push(0xf4);
    let mut guest = Guest::long(&code);
    let mut system = guest.cpu.system_registers();
    system.cr4 |= cr4::OSXSAVE | cr4::PKE;
    guest.cpu.set_system_registers(&system);
    let mut msrs = guest.cpu.msrs();
    msrs.xcr0 = guest.cpu.xcr0_allowed();
    guest.cpu.set_msrs(&msrs);
    aim(&mut guest, requested);
    guest
}

fn aim(guest: &mut Guest, requested: u64) {
    guest.set(0x1000, |registers| {
        registers.gpr[gpr::RSP] = 0x1_0000;
        registers.gpr[gpr::RSI] = AREA as u64;
        registers.gpr[gpr::RAX] = requested;
    });
}

/// State with a value of its own in every register, and PKRU.
fn fill(guest: &mut Guest) -> FpuState {
    let state = FpuState {
        fsw: 0x3800,
        ftw: 0x81,
        mxcsr: 0x3f80,
        st: std::array::from_fn(|i| 0x1000 + i as u128),
        xmm: std::array::from_fn(|i| 0x2000 + i as u128),
        ymm_high: std::array::from_fn(|i| 0x3000 + i as u128),
        ..FpuState::default()
    };
    guest.cpu.set_fpu(&state);
    let mut msrs = guest.cpu.msrs();
    msrs.pkru = 0x5554;
    guest.cpu.set_msrs(&msrs);
    state
}

/// Runs to the HLT behind the code; the vector of the exception if there was one.
fn run(guest: &mut Guest) -> Option<u64> {
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let rip = guest.cpu.registers().rip;
    (HANDLERS..HANDLERS + 256)
        .contains(&(rip - 1))
        .then(|| rip - 1 - HANDLERS)
}

const XSAVE: [u8; 3] = [0x0f, 0xae, 0x26];
const XSAVEOPT: [u8; 3] = [0x0f, 0xae, 0x36];
const XSAVEC: [u8; 3] = [0x0f, 0xc7, 0x26];
const XRSTOR: [u8; 3] = [0x0f, 0xae, 0x2e];
const XGETBV: [u8; 3] = [0x0f, 0x01, 0xd0];
const XSETBV: [u8; 3] = [0x0f, 0x01, 0xd1];

fn has_avx(guest: &Guest) -> bool {
    guest.cpu.xcr0_allowed() & AVX != 0
}

#[test]
fn an_area_in_standard_format_has_everything_where_cpuid_says() {
    let mut guest = guest(&XSAVE, u64::MAX);
    fill(&mut guest);
    guest.write_u64(XSTATE_BV, 1 << 40);
    assert_eq!(run(&mut guest), None);
    assert_eq!(guest.read_u64(AREA), 0x37f | 0x3800 << 16 | 0x81 << 32);
    assert_eq!(guest.read_u64(AREA + 24), 0xffff << 32 | 0x3f80, "MXCSR");
    assert_eq!(guest.read_u64(AREA + 32 + 16 * 7), 0x1007, "ST7");
    assert_eq!(guest.read_u64(AREA + 160 + 16 * 15), 0x200f, "XMM15");
    let components = guest.cpu.xcr0_allowed();
    // What was not asked for stays.
    assert_eq!(guest.read_u64(XSTATE_BV), components | 1 << 40);
    assert_eq!(guest.read_u64(XCOMP_BV), 0);
    if has_avx(&guest) {
        assert_eq!(guest.read_u64(AREA + 576 + 16 * 15), 0x300f, "YMM15");
    }
    let pkru = xsave::pkru_place().offset as usize;
    assert_eq!(guest.read_u64(AREA + pkru), 0x5554);
}

#[test]
fn what_was_saved_in_any_format_is_restored() {
    for code in [XSAVE, XSAVEOPT, XSAVEC] {
        let mut guest = guest(&code, u64::MAX);
        let state = fill(&mut guest);
        assert_eq!(run(&mut guest), None);
        guest.cpu.set_fpu(&FpuState::default());
        let mut msrs = guest.cpu.msrs();
        msrs.pkru = 0;
        guest.cpu.set_msrs(&msrs);
        guest.write(0x1000, &XRSTOR);
        aim(&mut guest, u64::MAX);
        assert_eq!(run(&mut guest), None);
        let expected = FpuState {
            ymm_high: if has_avx(&guest) {
                state.ymm_high
            } else {
                [0; 16]
            },
            ..state
        };
        assert_eq!(guest.cpu.fpu(), expected, "{code:x?}");
        assert_eq!(guest.cpu.msrs().pkru, 0x5554, "{code:x?}");
    }
}

#[test]
fn the_compacted_format_leaves_no_room_for_what_was_not_asked_for() {
    let mut guest = guest(&XSAVEC, X87 | SSE | PKRU);
    fill(&mut guest);
    assert_eq!(run(&mut guest), None);
    assert_eq!(guest.read_u64(XSTATE_BV), X87 | SSE | PKRU);
    assert_eq!(guest.read_u64(XCOMP_BV), 1 << 63 | X87 | SSE | PKRU);
    assert_eq!(guest.read_u64(AREA + 576), 0x5554, "behind the header");
}

#[test]
fn components_in_their_initial_configuration_are_left_out_and_restored_to_it() {
    for (code, left_alone) in [(XSAVE, false), (XSAVEOPT, true), (XSAVEC, true)] {
        let mut guest = guest(&code, X87 | SSE);
        guest.cpu.set_fpu(&FpuState::default());
        guest.write_u64(AREA + 160, 0x77);
        guest.write_u64(XSTATE_BV, X87 | SSE);
        assert_eq!(run(&mut guest), None);
        assert_eq!(guest.read_u64(XSTATE_BV), 0);
        let expected = if left_alone { 0x77 } else { 0 };
        assert_eq!(guest.read_u64(AREA + 160), expected, "XMM0, {code:x?}");
        let state = fill(&mut guest);
        guest.write(0x1000, &XRSTOR);
        // Only x87 and SSE: AVX keeps its values.
        aim(&mut guest, X87 | SSE);
        assert_eq!(run(&mut guest), None);
        let initial = FpuState {
            ymm_high: state.ymm_high,
            ..FpuState::default()
        };
        assert_eq!(guest.cpu.fpu(), initial);
    }
}

#[test]
fn a_header_that_no_instruction_writes_is_refused_and_changes_nothing() {
    let compacted = 1u64 << 63;
    let bad = [
        // A component that is not enabled, in either format.
        (1 << 4, 0, 0),
        (0, compacted | 1 << 4, 0),
        // Present but not in the layout.
        (SSE, compacted | X87, 0),
        // A layout without the compacted format.
        (SSE, SSE, 0),
        // A reserved word.
        (SSE, 0, 1),
        (SSE, compacted | SSE, 1),
    ];
    for (present, layout, reserved) in bad {
        let mut guest = guest(&XRSTOR, u64::MAX);
        let state = fill(&mut guest);
        guest.write_u64(XSTATE_BV, present);
        guest.write_u64(XCOMP_BV, layout);
        guest.write_u64(XCOMP_BV + 8, reserved);
        let raised = run(&mut guest);
        assert_eq!(raised, Some(vector::GP.into()), "{present:#x} {layout:#x}");
        assert_eq!(guest.cpu.fpu(), state);
    }
    // MXCSR has bits that do not exist.
    let mut guest = guest(&XRSTOR, u64::MAX);
    guest.write_u64(AREA + 24, 1 << 16);
    assert_eq!(run(&mut guest), Some(vector::GP.into()));
}

#[test]
fn the_instructions_need_the_operating_system_and_an_aligned_area() {
    for code in [XSAVE, XSAVEOPT, XSAVEC, XRSTOR] {
        let mut guest = guest(&code, X87);
        guest.set(0x1000, |registers| {
            registers.gpr[gpr::RSP] = 0x1_0000;
            registers.gpr[gpr::RSI] = AREA as u64 + 32;
        });
        assert_eq!(run(&mut guest), Some(vector::GP.into()), "{code:x?}");
        let mut system = guest.cpu.system_registers();
        system.cr0 |= cr0::TS;
        guest.cpu.set_system_registers(&system);
        aim(&mut guest, X87);
        assert_eq!(run(&mut guest), Some(vector::NM.into()), "{code:x?}");
        system.cr4 &= !cr4::OSXSAVE;
        guest.cpu.set_system_registers(&system);
        aim(&mut guest, X87);
        assert_eq!(run(&mut guest), Some(vector::UD.into()), "{code:x?}");
    }
}

#[test]
fn a_save_that_faults_in_its_second_page_writes_nothing() {
    let mut guest = guest(&XSAVE, u64::MAX);
    fill(&mut guest);
    // The page behind the area's first is not present.
    guest.write_u64(0x8000 + 0x21 * 8, 0);
    guest.set(0x1000, |registers| {
        registers.gpr[gpr::RSP] = 0x1_0000;
        registers.gpr[gpr::RSI] = 0x2_0fc0;
        registers.gpr[gpr::RAX] = u64::MAX;
    });
    assert_eq!(run(&mut guest), Some(vector::PF.into()));
    assert_eq!(guest.cpu.system_registers().cr2, 0x2_1000);
    assert_eq!(guest.read_u64(0x2_0fc0), 0);
}

#[test]
fn xcr0_takes_what_makes_sense_and_xgetbv_returns_it() {
    let all = xsave::components();
    let mut values = vec![
        (X87, true),
        (X87 | SSE, true),
        (all, true),
        (X87 | PKRU, true),
        (0, false),
        (SSE, false),
        (X87 | AVX, false),
        (all | 1 << 5, false),
        (all | 1 << 62, false),
    ];
    if all & AVX != 0 {
        values.push((X87 | SSE | AVX, true));
    }
    for (value, taken) in values {
        let mut guest = guest(&[XSETBV, XGETBV].concat(), 0);
        let before = guest.cpu.msrs().xcr0;
        guest.set(0x1000, |registers| {
            registers.gpr[gpr::RSP] = 0x1_0000;
            registers.gpr[gpr::RAX] = value & 0xffff_ffff;
            registers.gpr[gpr::RDX] = value >> 32;
        });
        let raised = run(&mut guest);
        assert_eq!(raised.is_none(), taken, "{value:#x}");
        let expected = if taken { value } else { before };
        assert_eq!(guest.cpu.msrs().xcr0, expected);
        if taken {
            assert_eq!(guest.gpr(gpr::RAX), value);
        }
    }
}

#[test]
fn xgetbv_tells_which_components_are_in_use() {
    let mut guest = guest(&XGETBV, 0);
    let mut used = |state: FpuState| {
        guest.cpu.set_fpu(&state);
        guest.set(0x1000, |registers| {
            registers.gpr[gpr::RSP] = 0x1_0000;
            registers.gpr[gpr::RCX] = 1;
        });
        assert_eq!(run(&mut guest), None);
        guest.gpr(gpr::RAX)
    };
    assert_eq!(used(FpuState::default()), 0);
    let mut state = FpuState::default();
    state.xmm[9] = 1;
    assert_eq!(used(state), SSE);
    state.fcw = 0x27f;
    assert_eq!(used(state), X87 | SSE);
}

#[test]
fn cpuid_follows_cr4_and_xcr0() {
    // CPUID
    let mut guest = guest(&[0x0f, 0xa2], 0);
    let kind = guest.cpu.machine().config().second_stage;
    guest.cpu.set_cpuid(cpuid::supported(kind, 46));
    let answer = |guest: &mut Guest, leaf: u64, subleaf: u64| {
        guest.set(0x1000, |registers| {
            registers.gpr[gpr::RSP] = 0x1_0000;
            registers.gpr[gpr::RAX] = leaf;
            registers.gpr[gpr::RCX] = subleaf;
        });
        assert_eq!(run(guest), None);
        [gpr::RAX, gpr::RBX, gpr::RCX].map(|register| guest.gpr(register))
    };
    const OSXSAVE: u64 = 1 << 27;
    assert_ne!(answer(&mut guest, 1, 0)[2] & OSXSAVE, 0);
    let all = guest.cpu.xcr0_allowed();
    let pkru = xsave::pkru_place();
    let most = u64::from(pkru.offset + pkru.size);
    assert_eq!(answer(&mut guest, 0xd, 0), [all, most, most]);
    let behind_header = if all & AVX != 0 { 256 } else { 0 };
    assert_eq!(answer(&mut guest, 0xd, 1)[1], 576 + behind_header + 8);
    assert_eq!(
        answer(&mut guest, 0xd, 9)[..2],
        [u64::from(pkru.size), u64::from(pkru.offset)]
    );
    let mut msrs = guest.cpu.msrs();
    msrs.xcr0 = X87 | SSE;
    guest.cpu.set_msrs(&msrs);
    assert_eq!(answer(&mut guest, 0xd, 0), [all, 576, most]);
    assert_eq!(answer(&mut guest, 0xd, 1)[1], 576);
    let mut system = guest.cpu.system_registers();
    system.cr4 &= !cr4::OSXSAVE;
    guest.cpu.set_system_registers(&system);
    assert_eq!(answer(&mut guest, 1, 0)[2] & OSXSAVE, 0);
}

#[test]
fn a_table_that_names_fewer_components_allows_no_others() {
    let mut guest = guest(&[], 0);
    let kind = guest.cpu.machine().config().second_stage;
    let mut table = cpuid::supported(kind, 46);
    for entry in &mut table {
        if (entry.leaf, entry.subleaf) == (0xd, 0) {
            entry.eax = (X87 | SSE) as u32;
        }
    }
    guest.cpu.set_cpuid(table);
    assert!(guest.cpu.may_hold_xcr0(X87 | SSE));
    assert!(!guest.cpu.may_hold_xcr0(X87 | SSE | PKRU));
}

#[test]
fn avx_needs_xcr0_and_protected_mode_and_a_present_unit() {
    // vpxor xmm0, xmm0, xmm0
    let code = [0xc5, 0xf9, 0xef, 0xc0];
    let mut guest = guest(&code, 0);
    if !has_avx(&guest) {
        return;
    }
    fill(&mut guest);
    assert_eq!(run(&mut guest), None);
    let state = guest.cpu.fpu();
    assert_eq!((state.xmm[0], state.ymm_high[0]), (0, 0), "all of YMM0");
    assert_eq!(state.ymm_high[1], 0x3001, "no other register");
    let system = guest.cpu.system_registers();
    let mut disabled = guest.cpu.msrs();
    disabled.xcr0 = X87 | SSE;
    guest.cpu.set_msrs(&disabled);
    aim(&mut guest, 0);
    assert_eq!(run(&mut guest), Some(vector::UD.into()), "XCR0");
    let mut enabled = disabled;
    enabled.xcr0 = X87 | SSE | AVX;
    guest.cpu.set_msrs(&enabled);
    for (cr0_bits, cr4_bits, expected) in [
        (cr0::TS, 0, Some(vector::NM)),
        (cr0::TS, cr4::OSXSAVE, Some(vector::UD)),
        // Neither CR0.EM nor CR4.OSFXSR matters.
        (cr0::EM, cr4::OSFXSR, None),
    ] {
        let mut changed = system;
        changed.cr0 |= cr0_bits;
        changed.cr4 &= !cr4_bits;
        guest.cpu.set_system_registers(&changed);
        aim(&mut guest, 0);
        assert_eq!(run(&mut guest), expected.map(u64::from));
    }
}

#[test]
fn avx_512_is_not_there() {
    // vpxord zmm0, zmm0, zmm0
    let mut guest = guest(&[0x62, 0xf1, 0x7d, 0x48, 0xef, 0xc0], 0);
    assert_eq!(run(&mut guest), Some(vector::UD.into()));
}

#[test]
fn a_gather_that_leaves_for_the_hypervisor_is_made_anew() {
    // vpgatherdd ymm0, [rsi+ymm1], ymm2
    let mut guest = guest(&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x0e], 0);
    if !has_avx(&guest) {
        return;
    }
    // Four elements in the first page, four in the second, which the hypervisor has not mapped yet.
    let offset = |i: u32| if i < 4 { 4 * i } else { 0x1000 + 4 * i };
    let lanes = |at: u32| (0..4).fold(0, |lane, i| lane | u128::from(offset(at + i)) << (32 * i));
    let mut state = FpuState::default();
    (state.xmm[1], state.ymm_high[1]) = (lanes(0), lanes(4));
    (state.xmm[2], state.ymm_high[2]) = (u128::MAX, u128::MAX);
    guest.cpu.set_fpu(&state);
    for i in 0..8 {
        let place = AREA + offset(i) as usize;
        guest.write(place, &(0x100 + i).to_le_bytes());
    }
    let second = (AREA as u64 >> 12) + 1;
    guest.map(second, false);
    assert!(matches!(guest.cpu.run(), Exit::SecondStage(_)));
    assert_eq!(guest.cpu.fpu(), state, "nothing has happened");
    guest.map(second, true);
    assert_eq!(run(&mut guest), None);
    let done = guest.cpu.fpu();
    let expected = |at: u128| (0..4).fold(0, |lane, i| lane | (0x100 + at + i) << (32 * i));
    assert_eq!((done.xmm[0], done.ymm_high[0]), (expected(0), expected(4)));
    assert_eq!((done.xmm[2], done.ymm_high[2]), (0, 0), "the mask");
}
