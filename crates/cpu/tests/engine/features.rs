//! Features that CPUID and CR4 switch: protection keys, process-context identifiers, narrow
//! physical addresses, and instructions of the system's own.

use crate::guest::Guest;
use twofold_cpu::cpuid::supported;
use twofold_cpu::{CpuidEntry, Exit, SecondStageKind};

const PKE: u64 = 1 << 22;
const PCIDE: u64 = 1 << 17;

fn change_cr4(guest: &mut Guest, bits: u64) {
    let mut system = guest.cpu.system_registers();
    system.cr4 |= bits;
    guest.cpu.set_system_registers(&system);
}

/// The vector that the guest's next run ends in, and the error code on its stack.
fn fault(guest: &mut Guest) -> (u64, u64) {
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let vector = guest.cpu.registers().rip - 0x7001;
    (vector, guest.read_u64(guest.gpr(4) as usize))
}

#[test]
fn a_protection_key_forbids_reads_or_writes_of_user_pages() {
    // xor ecx,ecx; xor edx,edx; mov eax,PKRU; wrpkru; mov eax,[0x20000]; mov [0x20000],eax; hlt
    let run = |rights: u32| {
        let mut code = b"\x31\xc9\x31\xd2\xb8".to_vec();
        code.extend(rights.to_le_bytes());
        code.extend(b"\x0f\x01\xef\x8b\x04\x25\x00\x00\x02\x00\x89\x04\x25\x00\x00\x02\x00\xf4");
        let mut guest = Guest::long(&code);
        change_cr4(&mut guest, PKE);
        // Key 5.
        guest.write_u64(0x8000 + 0x20 * 8, 5 << 59 | 0x2_0000 | 7);
        assert_eq!(guest.cpu.run(), Exit::Halt);
        let rip = guest.cpu.registers().rip;
        let code = guest.read_u64(guest.gpr(4) as usize);
        (rip, code, guest.cpu.msrs().pkru)
    };
    assert_eq!(run(!(3 << 10)).0, 0x101b, "other keys do not matter");
    let (rip, code, pkru) = run(1 << 10);
    assert_eq!((rip, code, pkru), (0x700f, 0x21, 1 << 10), "a read");
    let (rip, code, _) = run(2 << 10);
    assert_eq!((rip, code), (0x700f, 0x23), "a write");
}

#[test]
fn the_key_of_a_supervisors_page_is_not_looked_at_and_write_disable_needs_wp() {
    for (entry, cr0_wp, ends) in [
        (0x2_0000 | 3 | 1 << 59, true, 0x1008),
        (0x2_0000 | 7 | 1 << 59, true, 0x700f),
        (0x2_0000 | 7 | 1 << 59, false, 0x1008),
    ] {
        // mov [0x20000],eax; hlt
        let mut guest = Guest::long(b"\x89\x04\x25\x00\x00\x02\x00\xf4");
        let mut system = guest.cpu.system_registers();
        system.cr4 |= PKE;
        if !cr0_wp {
            system.cr0 &= !(1 << 16);
        }
        guest.cpu.set_system_registers(&system);
        let mut msrs = guest.cpu.msrs();
        msrs.pkru = 2 << 2;
        guest.cpu.set_msrs(&msrs);
        guest.write_u64(0x8000 + 0x20 * 8, entry);
        assert_eq!(guest.cpu.run(), Exit::Halt);
        assert_eq!(guest.cpu.registers().rip, ends);
    }
}

#[test]
fn the_instructions_of_protection_keys_need_cr4_and_a_zero_in_ecx() {
    // rdpkru; hlt
    let mut guest = Guest::long(b"\x0f\x01\xee\xf4");
    assert_eq!(fault(&mut guest).0, 6);
    let mut guest = Guest::long(b"\x0f\x01\xee\xf4");
    change_cr4(&mut guest, PKE);
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 1;
        registers.gpr[4] = 0x1_0000;
    });
    assert_eq!(fault(&mut guest), (13, 0));
}

#[test]
fn address_bits_that_cpuid_denies_are_reserved_in_the_guests_tables() {
    let code = b"\x8b\x04\x25\x00\x00\x02\x00\xf4";
    for (bits, expected) in [(36, Some(0x9)), (46, None)] {
        let mut guest = Guest::long(code);
        guest.cpu.set_cpuid(supported(SecondStageKind::Ept, bits));
        guest.write_u64(0x8000 + 0x20 * 8, 1 << 40 | 7);
        match (guest.cpu.run(), expected) {
            (Exit::Halt, Some(code)) => {
                assert_eq!(guest.cpu.registers().rip, 0x700f);
                assert_eq!(guest.read_u64(guest.gpr(4) as usize), code);
            }
            (Exit::SecondStage(fault), None) => assert_eq!(fault.gpa().get(), 1 << 40),
            other => panic!("{other:?}"),
        }
        // MOV CR3 with such a bit: mov rax,1<<40; mov cr3,rax
        let mut guest = Guest::long(b"\x48\xb8\x00\x00\x00\x00\x00\x01\x00\x00\x0f\x22\xd8");
        guest.cpu.set_cpuid(supported(SecondStageKind::Ept, bits));
        match guest.cpu.run() {
            Exit::Halt => assert_eq!((guest.cpu.registers().rip, bits), (0x700e, 36)),
            exit => assert!(matches!(exit, Exit::SecondStage(_)) && bits == 46),
        }
    }
}

#[test]
fn cr4_takes_only_what_cpuid_names() {
    // mov rax,cr4; or eax,1<<11 (UMIP); mov cr4,rax; hlt
    let code = b"\x0f\x20\xe0\x0d\x00\x08\x00\x00\x0f\x22\xe0\xf4";
    let mut guest = Guest::long(code);
    guest.cpu.set_cpuid(supported(SecondStageKind::Ept, 48));
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x100c);
    let mut guest = Guest::long(code);
    guest.cpu.set_cpuid(vec![CpuidEntry::default()]);
    assert_eq!(fault(&mut guest), (13, 0));
}

#[test]
fn identifiers_are_turned_on_with_an_empty_one_and_cr3_keeps_them_but_not_bit_63() {
    // mov rax,cr4; bts rax,17; mov cr4,rax; mov rax,cr3; or rax,5; bts rax,63; mov cr3,rax;
    // mov rbx,cr3; hlt
    let code = b"\x0f\x20\xe0\x48\x0f\xba\xe8\x11\x0f\x22\xe0\x0f\x20\xd8\x48\x83\xc8\x05\
        \x48\x0f\xba\xe8\x3f\x0f\x22\xd8\x0f\x20\xdb\xf4";
    let mut guest = Guest::long(code);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(3), 0x2005);
    assert_ne!(guest.cpu.system_registers().cr4 & PCIDE, 0);
    let mut guest = Guest::long(code);
    let mut system = guest.cpu.system_registers();
    system.cr3 |= 8;
    guest.cpu.set_system_registers(&system);
    assert_eq!(fault(&mut guest), (13, 0));
}

#[test]
fn invpcid_invalidates_what_it_names_and_refuses_what_is_reserved() {
    // invpcid rcx,[0x20000]; mov eax,[0x21000]; hlt
    let code = b"\x66\x0f\x38\x82\x0c\x25\x00\x00\x02\x00\x8b\x04\x25\x00\x10\x02\x00\xf4";
    let run = |kind: u64, identifier: u64, linear: u64| {
        let mut guest = Guest::long(code);
        guest.write_u64(0x2_0000, identifier);
        guest.write_u64(0x2_0008, linear);
        guest.write_u64(0x2_1000, 1);
        guest.write_u64(0x2_2000, 2);
        // mov eax,[0x21000] first, so that it is cached.
        guest.set(0x100a, |registers| registers.gpr[4] = 0x1_0000);
        assert_eq!(guest.cpu.run(), Exit::Halt);
        guest.write_u64(0x8000 + 0x21 * 8, 0x2_2007);
        guest.set(0x1000, |registers| {
            registers.gpr[1] = kind;
            registers.gpr[4] = 0x1_0000;
        });
        assert_eq!(guest.cpu.run(), Exit::Halt);
        (guest.cpu.registers().rip, guest.gpr(0))
    };
    for kind in 0..4 {
        assert_eq!(run(kind, 0, 0x2_1234), (0x1012, 2), "type {kind}");
    }
    assert_eq!(run(4, 0, 0).0, 0x700e);
    assert_eq!(run(0, 1, 0).0, 0x700e, "identifiers are off");
    assert_eq!(run(2, 1 << 12, 0).0, 0x700e);
    assert_eq!(run(0, 0, 1 << 62).0, 0x700e);
}

#[test]
fn arpl_raises_the_level_that_a_selector_asks_for() {
    use twofold_cpu::Segment;
    // arpl ax,bx; jz +1; hlt; arpl [0x20000],cx; hlt (32-bit)
    let mut guest = Guest::long(b"\x63\xd8\x74\x01\xf4\x63\x0d\x00\x00\x02\x00\xf4");
    let mut system = guest.cpu.system_registers();
    system.cr0 = 0x31;
    system.efer = 0;
    system.cs = Segment {
        long: false,
        big: true,
        ..system.cs
    };
    guest.cpu.set_system_registers(&system);
    guest.write(0x2_0000, &[0x13, 0]);
    guest.set(0x1000, |registers| {
        registers.gpr[0] = 0x20;
        registers.gpr[3] = 0x1b;
        registers.gpr[1] = 0x1a;
    });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x100c);
    assert_eq!(guest.gpr(0), 0x23);
    assert_eq!(guest.read_u64(0x2_0000), 0x13);
    assert_eq!(guest.cpu.registers().rflags & 0x40, 0);
}

#[test]
fn random_numbers_come_with_the_carry_flag() {
    let entry = supported(SecondStageKind::Ept, 48)
        .into_iter()
        .find(|entry| entry.leaf == 1)
        .unwrap();
    // rdrand rax; setc bl; hlt
    let mut guest = Guest::long(b"\x48\x0f\xc7\xf0\x0f\x92\xc3\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    if entry.ecx >> 30 & 1 != 0 {
        assert_eq!(guest.cpu.registers().rip, 0x1008);
        assert_eq!(guest.gpr(3) == 1, guest.gpr(0) != 0);
    } else {
        assert_eq!(guest.cpu.registers().rip, 0x7007, "#UD");
    }
}

#[test]
fn mwait_goes_on_at_once_and_belongs_to_ring_0() {
    // mov eax,0x20000; xor ecx,ecx; xor edx,edx; monitor; mwait; hlt
    let code = b"\xb8\x00\x00\x02\x00\x31\xc9\x31\xd2\x0f\x01\xc8\x0f\x01\xc9\xf4";
    let mut guest = Guest::long(code);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x1010);
    let mut guest = Guest::user(code);
    assert_eq!(fault(&mut guest).0, 6);
}

#[test]
fn an_instruction_of_a_feature_that_is_not_there_is_an_invalid_opcode() {
    for code in [
        // vmxon [rax]; sha1msg1 xmm0,xmm0; xbegin; femms; vpaddd zmm0,zmm0,zmm0; clzero
        &b"\xf3\x0f\xc7\x30"[..],
        b"\x0f\x38\xc9\xc0",
        b"\xc7\xf8\x00\x00\x00\x00",
        b"\x0f\x0e",
        b"\x62\xf1\x7d\x48\xfe\xc0",
        b"\x0f\x01\xfc",
    ] {
        let mut guest = Guest::long(code);
        assert_eq!(fault(&mut guest).0, 6, "{code:02x?}");
    }
    // What is reserved for hints does nothing: nop [rax]; rdsspq rax; cldemote [rax]; hlt
    let mut guest = Guest::long(b"\x0f\x1a\x00\xf3\x48\x0f\x1e\xc8\x0f\x1c\x00\xf4");
    guest.set(0x1000, |registers| registers.gpr[0] = 1 << 50);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.cpu.registers().rip, guest.gpr(0)), (0x100c, 1 << 50));
}

#[test]
fn mmx_follows_the_bits_that_switch_the_x87_unit_off() {
    const EM: u64 = 1 << 2;
    const TS: u64 = 1 << 3;
    const OSFXSR: u64 = 1 << 9;
    let paddb_mm0_mm1 = &b"\x0f\xfc\xc1\xf4"[..];
    let movq2dq_xmm0_mm1 = &b"\xf3\x0f\xd6\xc1\xf4"[..];
    // With an x87 exception waiting or not: the vector, or that it is executed.
    for (code, em_ts, osfxsr, waits, vector) in [
        (paddb_mm0_mm1, 0, 0, false, None),
        (paddb_mm0_mm1, EM | TS, OSFXSR, true, Some(6)),
        (paddb_mm0_mm1, TS, OSFXSR, true, Some(7)),
        (paddb_mm0_mm1, 0, 0, true, Some(16)),
        (movq2dq_xmm0_mm1, 0, OSFXSR, false, None),
        (movq2dq_xmm0_mm1, EM, OSFXSR, false, Some(6)),
        (movq2dq_xmm0_mm1, TS, OSFXSR, true, Some(7)),
        (movq2dq_xmm0_mm1, 0, 0, false, Some(6)),
        (movq2dq_xmm0_mm1, 0, OSFXSR, true, Some(16)),
    ] {
        let mut guest = Guest::long(code);
        let mut system = guest.cpu.system_registers();
        system.cr0 = system.cr0 & !(EM | TS) | em_ts;
        system.cr4 = system.cr4 & !OSFXSR | osfxsr;
        guest.cpu.set_system_registers(&system);
        let mut fpu = guest.cpu.fpu();
        // TOP is 3; with the mask of division by zero gone, its flag is one that waits.
        fpu.fsw = 3 << 11;
        if waits {
            (fpu.fcw, fpu.fsw) = (fpu.fcw & !4, fpu.fsw | 0x8084);
        }
        guest.cpu.set_fpu(&fpu);
        match vector {
            Some(vector) => {
                assert_eq!(fault(&mut guest).0, vector, "{code:02x?} {em_ts:#x}");
                let after = guest.cpu.fpu();
                assert_eq!((after.fsw, after.ftw), (fpu.fsw, fpu.ftw));
            }
            None => {
                assert_eq!(guest.cpu.run(), Exit::Halt);
                assert_eq!(guest.cpu.registers().rip, 0x1000 + code.len() as u64);
                assert_eq!((guest.cpu.fpu().fsw, guest.cpu.fpu().ftw), (0, 0xff));
            }
        }
    }
}

#[test]
fn alignment_is_checked_at_level_3_where_cr0_and_rflags_both_ask_for_it() {
    const AC: u64 = 1 << 18;
    const AM: u64 = 1 << 18;
    // What follows the access is INT 0x80.
    let run = |code: &[u8], address: u64, user: bool, flags: u64, cr0: u64| {
        let code = [code, b"\xcd\x80"].concat();
        let mut guest = if user {
            Guest::user(&code)
        } else {
            Guest::long(&code)
        };
        let mut system = guest.cpu.system_registers();
        system.cr0 = system.cr0 & !AM | cr0;
        guest.cpu.set_system_registers(&system);
        guest.set(0x1000, |registers| {
            registers.rflags |= flags;
            registers.gpr[4] = 0x1_0000;
            registers.gpr[6] = address;
            registers.gpr[7] = 0x2_1000;
            registers.gpr[1] = 4;
        });
        fault(&mut guest)
    };
    // mov eax,[rsi]; mov [rsi],rax; lock inc word [rsi]; rep movsd; movq xmm0,[rsi]
    for (code, bytes) in [
        (&b"\x8b\x06"[..], 4),
        (b"\x48\x89\x06", 8),
        (b"\x66\xf0\xff\x06", 2),
        (b"\xf3\xa5", 4),
        (b"\xf3\x0f\x7e\x06", 8),
    ] {
        for misaligned in [1, bytes / 2] {
            let address = 0x2_0000 + misaligned;
            assert_eq!(run(code, address, true, AC, AM), (17, 0), "{code:x?}");
            assert_eq!(run(code, address, true, 0, AM).0, 0x80, "{code:x?}");
            assert_eq!(run(code, address, true, AC, 0).0, 0x80, "{code:x?}");
            assert_eq!(run(code, address, false, AC, AM).0, 0x80, "{code:x?}");
        }
        assert_eq!(
            run(code, 0x2_0000 + bytes, true, AC, AM).0,
            0x80,
            "{code:x?}"
        );
    }
    // movups xmm0,[rsi]; mov al,[rsi]
    assert_eq!(run(b"\x0f\x10\x06", 0x2_0001, true, AC, AM).0, 0x80);
    assert_eq!(run(b"\x8a\x06", 0x2_0001, true, AC, AM).0, 0x80);
}
