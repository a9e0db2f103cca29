//! A TD's registers are its own.

use super::*;

#[test]
fn registers_can_neither_be_seen_nor_set() {
    let td = Td::new();
    for request in [
        KVM_GET_REGS,
        KVM_SET_REGS,
        KVM_GET_SREGS,
        KVM_SET_SREGS,
        KVM_GET_SREGS2,
        KVM_SET_SREGS2,
        KVM_GET_FPU,
        KVM_SET_FPU,
        KVM_GET_XSAVE,
        KVM_SET_XSAVE,
        KVM_GET_XSAVE2,
        KVM_GET_XCRS,
        KVM_SET_XCRS,
        KVM_GET_DEBUGREGS,
        KVM_SET_DEBUGREGS,
        KVM_SET_GUEST_DEBUG,
        KVM_GET_LAPIC,
        KVM_SET_LAPIC,
        KVM_TRANSLATE,
    ] {
        let mut page = [0xee_u8; 8192];
        assert_eq!(td.vcpu.with(request, &mut page), Err(Errno::INVAL));
        assert_eq!(page, [0xee; 8192], "{request:#x} has written something");
    }
}

#[test]
fn only_registers_that_kvm_emulates_are_read_and_written_by_index() {
    #[repr(C)]
    struct Msrs {
        count: u32,
        padding: u32,
        entries: [kvm_msr_entry; 1],
    }
    const APIC_BASE: u32 = 0x1b;
    const EFER: u32 = 0xc000_0080;
    const FS_BASE: u32 = 0xc000_0100;
    const SYSENTER_CS: u32 = 0x174;
    const MTRR_DEFAULT: u32 = 0x2ff;
    let td = Td::new();
    let access = |request, index, data| {
        let mut msrs = Msrs {
            count: 1,
            padding: 0,
            entries: [kvm_msr_entry {
                index,
                data,
                ..Default::default()
            }],
        };
        let done = td.vcpu.with(request, &mut msrs);
        (done, msrs.entries[0].data)
    };
    let (done, base) = access(KVM_GET_MSRS, APIC_BASE, 0);
    assert_eq!(done, Ok(1));
    assert_eq!(base & 0xc00, 0xc00, "x2APIC");
    assert_eq!(access(KVM_SET_MSRS, MTRR_DEFAULT, 0xc06).0, Ok(1));
    for index in [FS_BASE, SYSENTER_CS] {
        assert_eq!(access(KVM_GET_MSRS, index, 7), (Ok(0), 7));
        assert_eq!(access(KVM_SET_MSRS, index, 0).0, Ok(0));
    }
    for index in [APIC_BASE, EFER] {
        assert_eq!(access(KVM_SET_MSRS, index, 0).0, Ok(0));
    }
}

#[test]
fn the_run_page_shows_no_register() {
    let td = Td::new();
    assert_eq!(td.finalize(), Ok(0));
    let offset = std::mem::offset_of!(kvm_run, kvm_valid_regs);
    for field in [offset, offset + 8] {
        td.run.write(field, 1_u64);
        assert_eq!(td.vcpu.call(KVM_RUN, 0), Err(Errno::INVAL));
        td.run.write(field, 0_u64);
    }
}
