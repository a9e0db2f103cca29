//! Bad input gets KVM's own errors, number for number.

mod common;

use common::*;
use kvm_bindings::*;

#[test]
fn the_system_answers_what_every_client_asks_first() {
    let kvm = Fd::open();
    assert_eq!(kvm.call(KVM_GET_API_VERSION, 0), Ok(12));
    assert_eq!(kvm.call(KVM_GET_API_VERSION, 1), Err(Errno::INVAL));
    assert_eq!(kvm.call(KVM_GET_VCPU_MMAP_SIZE, 0), Ok(12288));
    assert_eq!(
        kvm.call(KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY as usize),
        Ok(1)
    );
    assert_eq!(kvm.call(KVM_CHECK_EXTENSION, 696_969), Ok(0));
    assert_eq!(kvm.call(KVM_CREATE_VM, 7), Err(Errno::INVAL));
    assert_eq!(kvm.call(KVM_CREATE_VM, 2), Err(Errno::INVAL));
}

#[test]
fn unknown_ioctls_answer_enotty() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    for fd in [&kvm, &vm, &vcpu] {
        assert_eq!(fd.call(0xaeff, 0), Err(Errno::NOTTY));
    }
    assert_eq!(kvm.call(KVM_RUN, 0), Err(Errno::NOTTY));
    assert_eq!(vm.call(KVM_GET_REGS, 0), Err(Errno::NOTTY));
    assert_eq!(vm.call(0x1234, 0), Err(Errno::NOTTY));
    assert_eq!(vcpu.call(0x1234, 0), Err(Errno::INVAL));
}

#[test]
fn slots_are_checked_in_kvms_order() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let memory = Memory::new(0x10000);
    let hva = memory.address();
    let set = |region: kvm_userspace_memory_region| vm.set(KVM_SET_USER_MEMORY_REGION, region);
    let flagged = |flags| kvm_userspace_memory_region {
        flags,
        ..region(0, 0, 0x1000, hva)
    };

    for bit in 2..32 {
        assert_eq!(set(flagged(1 << bit)), Err(Errno::INVAL), "flag {bit}");
    }
    assert_eq!(set(region(0, 0, 0x1001, hva)), Err(Errno::INVAL));
    assert_eq!(set(region(0, 0x800, 0x1000, hva)), Err(Errno::INVAL));
    assert_eq!(set(region(0, 0, 0x1000, hva + 1)), Err(Errno::INVAL));
    assert_eq!(
        set(region(0, 0, 0x1000, 0xffff_8000_0000_0000)),
        Err(Errno::INVAL)
    );
    assert_eq!(set(region(0, 0, 1 << 60, hva)), Err(Errno::INVAL));
    assert_eq!(set(region(0, !0xfff, 0x2000, hva)), Err(Errno::INVAL));
    assert_eq!(set(region(32764, 0, 0x1000, hva)), Err(Errno::INVAL));
    assert_eq!(set(region(2 << 16, 0, 0x1000, hva)), Err(Errno::INVAL));
    assert_eq!(set(region(0, 0, 0, 0)), Err(Errno::INVAL));
    assert_eq!(set(region(0, 1 << 51, 0x1000, hva)), Err(Errno::INVAL));

    assert_eq!(set(region(0, 0x1000, 0x2000, hva)), Ok(0));
    assert_eq!(set(region(1, 0x2000, 0x1000, hva)), Err(Errno::EXIST));
    assert_eq!(set(region(0, 0x1000, 0x1000, hva)), Err(Errno::INVAL));
    assert_eq!(
        set(region(0, 0x1000, 0x2000, hva + 0x1000)),
        Err(Errno::INVAL)
    );
    assert_eq!(set(region(0, 0x8000, 0x2000, hva)), Ok(0));
    assert_eq!(set(region(1, 0x2000, 0x1000, hva)), Ok(0));
    assert_eq!(set(region(1, 0x9000, 0x1000, hva)), Err(Errno::EXIST));
    assert_eq!(set(region(0, 0, 0, 0)), Ok(0));
    assert_eq!(set(region(0, 0, 0, 0)), Err(Errno::INVAL));
}

#[test]
fn the_host_address_of_a_slot_is_not_probed() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    assert_eq!(
        vm.set(KVM_SET_USER_MEMORY_REGION, region(0, 0x10000, 0x10000, 0)),
        Ok(0)
    );
}

#[test]
fn pointers_that_point_nowhere_answer_efault() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    assert_eq!(vm.call(KVM_SET_IDENTITY_MAP_ADDR, 8), Err(Errno::FAULT));
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    for address in [0, 8, 1 << 47, usize::MAX - 7] {
        for request in [
            KVM_GET_SUPPORTED_CPUID,
            KVM_GET_MSR_INDEX_LIST,
            KVM_GET_MSRS,
        ] {
            assert_eq!(
                kvm.call(request, address),
                Err(Errno::FAULT),
                "{request:#x}"
            );
        }
        for request in [
            KVM_SET_USER_MEMORY_REGION,
            KVM_SET_USER_MEMORY_REGION2,
            KVM_GET_DIRTY_LOG,
            KVM_ENABLE_CAP,
            KVM_IOEVENTFD,
            KVM_REGISTER_COALESCED_MMIO,
            KVM_GET_CLOCK,
        ] {
            assert_eq!(vm.call(request, address), Err(Errno::FAULT), "{request:#x}");
        }
        for request in [
            KVM_GET_REGS,
            KVM_SET_REGS,
            KVM_GET_SREGS,
            KVM_SET_SREGS,
            KVM_SET_CPUID2,
            KVM_GET_CPUID2,
            KVM_GET_FPU,
            KVM_SET_XSAVE,
            KVM_GET_VCPU_EVENTS,
            KVM_TRANSLATE,
            KVM_SET_GUEST_DEBUG,
        ] {
            assert_eq!(
                vcpu.call(request, address),
                Err(Errno::FAULT),
                "{request:#x}"
            );
        }
    }
}

#[test]
fn vcpu_ids_are_below_4096_and_given_once() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    for id in [4096, 65537, usize::MAX] {
        assert_eq!(vm.call(KVM_CREATE_VCPU, id), Err(Errno::INVAL));
    }
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 4095);
    assert_eq!(vm.call(KVM_CREATE_VCPU, 4095), Err(Errno::EXIST));
    drop(vcpu);
    assert_eq!(vm.call(KVM_CREATE_VCPU, 4095), Err(Errno::EXIST));
}

#[test]
fn what_must_come_before_the_vcpus_is_refused_after() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    assert_eq!(vm.set(KVM_SET_IDENTITY_MAP_ADDR, 0xfffb_c000_u64), Ok(0));
    assert_eq!(vm.call(KVM_SET_BOOT_CPU_ID, 4097), Err(Errno::INVAL));
    assert_eq!(vm.call(KVM_SET_BOOT_CPU_ID, 1), Ok(0));
    assert_eq!(vm.call(KVM_SET_TSS_ADDR, 0xfffb_d000), Ok(0));
    assert_eq!(vm.call(KVM_SET_TSS_ADDR, 0xffff_e000), Err(Errno::INVAL));
    let _vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    assert_eq!(
        vm.set(KVM_SET_IDENTITY_MAP_ADDR, 0xfffb_c000_u64),
        Err(Errno::INVAL)
    );
    assert_eq!(vm.call(KVM_SET_BOOT_CPU_ID, 1), Err(Errno::BUSY));
    assert_eq!(vm.call(KVM_CREATE_IRQCHIP, 0), Err(Errno::INVAL));
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    assert_eq!(vm.set(KVM_ENABLE_CAP, split), Err(Errno::EXIST));
}

#[test]
fn an_interrupt_controller_is_created_once() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    assert_eq!(
        vm.set(KVM_GET_IRQCHIP, kvm_irqchip::default()),
        Err(Errno::NXIO)
    );
    assert_eq!(
        vm.set(KVM_CREATE_PIT2, kvm_pit_config::default()),
        Err(Errno::NOENT)
    );
    assert_eq!(
        vm.set(KVM_IRQ_LINE, kvm_irq_level::default()),
        Err(Errno::NXIO)
    );
    assert_eq!(vm.call(KVM_CREATE_IRQCHIP, 0), Ok(0));
    assert_eq!(vm.call(KVM_CREATE_IRQCHIP, 0), Err(Errno::EXIST));
    let unknown = kvm_irqchip {
        chip_id: 3,
        ..Default::default()
    };
    assert_eq!(vm.set(KVM_GET_IRQCHIP, unknown), Err(Errno::INVAL));
    assert_eq!(vm.set(KVM_CREATE_PIT2, kvm_pit_config::default()), Ok(0));
    assert_eq!(
        vm.set(KVM_CREATE_PIT2, kvm_pit_config::default()),
        Err(Errno::EXIST)
    );
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    assert_eq!(
        vcpu.set(KVM_INTERRUPT, kvm_interrupt { irq: 32 }),
        Err(Errno::NXIO)
    );
    assert_eq!(
        vcpu.set(KVM_INTERRUPT, kvm_interrupt { irq: 256 }),
        Err(Errno::INVAL)
    );
}

#[test]
fn cpuid_tables_have_kvms_size_rules() {
    const ROOM: usize = 300;
    #[repr(C)]
    struct Table {
        count: u32,
        padding: u32,
        entries: [kvm_cpuid_entry2; ROOM],
    }
    let table = |count| Table {
        count,
        padding: 0,
        entries: [Default::default(); ROOM],
    };
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    for request in [KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID] {
        assert_eq!(kvm.with(request, &mut table(0)), Err(Errno::TOOBIG));
        assert_eq!(kvm.with(request, &mut table(1)), Err(Errno::TOOBIG));
        assert_eq!(kvm.with(request, &mut table(ROOM as u32)), Ok(0));
    }
    let mut padded = table(10);
    padded.entries[0].padding[1] = 1;
    assert_eq!(
        kvm.with(KVM_GET_EMULATED_CPUID, &mut padded),
        Err(Errno::INVAL)
    );

    let mut supported = table(100);
    assert_eq!(kvm.with(KVM_GET_SUPPORTED_CPUID, &mut supported), Ok(0));
    assert!(supported.count > 5 && supported.count < 100);
    assert_eq!(
        vcpu.with(KVM_SET_CPUID2, &mut table(257)),
        Err(Errno::TOOBIG)
    );
    assert_eq!(vcpu.with(KVM_SET_CPUID2, &mut supported), Ok(0));
    let mut got = table(supported.count - 1);
    assert_eq!(vcpu.with(KVM_GET_CPUID2, &mut got), Err(Errno::TOOBIG));
    got.count = 100;
    assert_eq!(vcpu.with(KVM_GET_CPUID2, &mut got), Ok(0));
    assert_eq!(got.count, supported.count);
    assert_eq!(got.entries[..5], supported.entries[..5]);
}

#[test]
fn msr_lists_tell_their_size_and_every_register_can_be_saved_and_restored() {
    #[repr(C)]
    struct List {
        count: u32,
        indices: [u32; 200],
    }
    #[repr(C)]
    struct Values {
        count: u32,
        padding: u32,
        entries: [kvm_msr_entry; 256],
    }
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    let mut list = List {
        count: 0,
        indices: [0; 200],
    };
    assert_eq!(
        kvm.with(KVM_GET_MSR_INDEX_LIST, &mut list),
        Err(Errno::TOOBIG)
    );
    let count = list.count as usize;
    assert!(count >= 2);
    assert_eq!(kvm.with(KVM_GET_MSR_INDEX_LIST, &mut list), Ok(0));
    let mut values = Values {
        count: list.count,
        padding: 0,
        entries: [Default::default(); 256],
    };
    for (entry, index) in values.entries.iter_mut().zip(&list.indices[..count]) {
        entry.index = *index;
    }
    assert_eq!(vcpu.with(KVM_GET_MSRS, &mut values), Ok(count as i32));
    assert_eq!(vcpu.with(KVM_SET_MSRS, &mut values), Ok(count as i32));
    values.entries[1].index = 0xdead;
    assert_eq!(vcpu.with(KVM_GET_MSRS, &mut values), Ok(1));
    values.count = 256;
    assert_eq!(vcpu.with(KVM_GET_MSRS, &mut values), Err(Errno::TOOBIG));
    values.count = 2;
    values.entries[0].index = 0x10a;
    values.entries[1].index = 0x345;
    assert_eq!(kvm.with(KVM_GET_MSRS, &mut values), Ok(2));
}

#[test]
fn states_that_no_processor_can_be_in_are_refused() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    let good: kvm_sregs = vcpu.get(KVM_GET_SREGS);
    assert_eq!((good.cs.base, good.cs.selector), (0xffff_0000, 0xf000));
    assert_eq!(good.cr0, 0x6000_0010);
    let refused = |change: &dyn Fn(&mut kvm_sregs)| {
        let mut sregs = good;
        change(&mut sregs);
        assert_eq!(vcpu.set(KVM_SET_SREGS, sregs), Err(Errno::INVAL));
    };
    refused(&|sregs| sregs.cr0 = 1 << 31);
    refused(&|sregs| sregs.cr0 = 1 << 32);
    refused(&|sregs| sregs.cr0 = 1 << 29);
    refused(&|sregs| sregs.cr4 = 1 << 63);
    refused(&|sregs| sregs.efer = 1 << 10);
    refused(&|sregs| sregs.cs.l = 1);
    refused(&|sregs| {
        sregs.cr0 = 0x8000_0001;
        sregs.efer = 0x500;
    });
    refused(&|sregs| sregs.apic_base = 1);
    assert_eq!(vcpu.set(KVM_SET_SREGS, good), Ok(0));

    let debug = kvm_debugregs {
        dr6: 1 << 32,
        ..Default::default()
    };
    assert_eq!(vcpu.set(KVM_SET_DEBUGREGS, debug), Err(Errno::INVAL));
    let debug = kvm_debugregs {
        flags: 1,
        ..Default::default()
    };
    assert_eq!(vcpu.set(KVM_SET_DEBUGREGS, debug), Err(Errno::INVAL));
    let mp_state = kvm_mp_state {
        mp_state: KVM_MP_STATE_HALTED,
    };
    assert_eq!(vcpu.set(KVM_SET_MP_STATE, mp_state), Err(Errno::INVAL));
    assert_eq!(vcpu.call(KVM_KVMCLOCK_CTRL, 0), Err(Errno::INVAL));

    let mut events: kvm_vcpu_events = vcpu.get(KVM_GET_VCPU_EVENTS);
    assert_eq!(vcpu.set(KVM_SET_VCPU_EVENTS, events), Ok(0));
    events.exception.injected = 1;
    events.exception.nr = 2;
    assert_eq!(vcpu.set(KVM_SET_VCPU_EVENTS, events), Err(Errno::INVAL));
    events.exception.nr = 32;
    assert_eq!(vcpu.set(KVM_SET_VCPU_EVENTS, events), Err(Errno::INVAL));
    events.exception.nr = 6;
    events.flags = 1 << 30;
    assert_eq!(vcpu.set(KVM_SET_VCPU_EVENTS, events), Err(Errno::INVAL));

    let mut xcrs: kvm_xcrs = vcpu.get(KVM_GET_XCRS);
    assert_eq!(vcpu.set(KVM_SET_XCRS, xcrs), Ok(0));
    xcrs.xcrs[0].value = 1 << 40 | 1;
    assert_eq!(vcpu.set(KVM_SET_XCRS, xcrs), Err(Errno::INVAL));
    xcrs.nr_xcrs = 17;
    assert_eq!(vcpu.set(KVM_SET_XCRS, xcrs), Err(Errno::INVAL));
}

#[test]
fn capabilities_are_enabled_with_valid_arguments_only() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let enable = |cap, argument, flags| {
        let mut cap = kvm_enable_cap {
            cap,
            flags,
            ..Default::default()
        };
        cap.args[0] = argument;
        vm.set(KVM_ENABLE_CAP, cap)
    };
    assert_eq!(enable(0, 0, 0), Err(Errno::INVAL));
    assert_eq!(
        enable(KVM_CAP_DISABLE_QUIRKS2, 1 << 63, 0),
        Err(Errno::INVAL)
    );
    assert_eq!(
        enable(
            KVM_CAP_DISABLE_QUIRKS2,
            KVM_X86_QUIRK_SLOT_ZAP_ALL.into(),
            1
        ),
        Err(Errno::INVAL)
    );
    assert_eq!(
        enable(
            KVM_CAP_DISABLE_QUIRKS2,
            KVM_X86_QUIRK_SLOT_ZAP_ALL.into(),
            0
        ),
        Ok(0)
    );
    assert_eq!(enable(KVM_CAP_SPLIT_IRQCHIP, 4097, 0), Err(Errno::INVAL));
    assert_eq!(enable(KVM_CAP_SPLIT_IRQCHIP, 24, 0), Ok(0));
    assert_eq!(enable(KVM_CAP_MAX_VCPU_ID, 4097, 0), Err(Errno::INVAL));
    assert_eq!(enable(KVM_CAP_MAX_VCPU_ID, 8, 0), Ok(0));
    assert_eq!(enable(KVM_CAP_MAX_VCPU_ID, 9, 0), Err(Errno::INVAL));
    assert_eq!(vm.call(KVM_CREATE_VCPU, 8), Err(Errno::INVAL));
    assert_eq!(vm.call(KVM_SET_NR_MMU_PAGES, 63), Err(Errno::INVAL));
    assert_eq!(vm.call(KVM_SET_NR_MMU_PAGES, 64), Ok(0));
    assert_eq!(vm.call(KVM_GET_NR_MMU_PAGES, 0), Ok(64));
}

#[test]
fn the_dirty_log_wants_a_slot_that_logs() {
    let guest = Guest::new(&[0xf4]);
    let mut bitmap = [0_u64; 1];
    let ask = |slot, address| {
        let mut log = kvm_dirty_log {
            slot,
            ..Default::default()
        };
        log.__bindgen_anon_1.padding2 = address;
        guest.vm.set(KVM_GET_DIRTY_LOG, log)
    };
    let address = bitmap.as_mut_ptr().addr() as u64;
    assert_eq!(ask(0, address), Err(Errno::NOENT));
    assert_eq!(ask(5, address), Err(Errno::NOENT));
    assert_eq!(ask(32764, address), Err(Errno::INVAL));
    assert_eq!(ask(2 << 16, address), Err(Errno::INVAL));
    let mut slot = region(0, CODE, MEMORY_SIZE, guest.memory.address());
    slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
    assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    assert_eq!(ask(0, address), Ok(0));
    assert_eq!(ask(0, 8), Err(Errno::FAULT));
}

#[test]
fn coalesced_zones_and_ioeventfds_have_kvms_errors() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let mut zone = kvm_coalesced_mmio_zone {
        addr: 0x1000,
        size: 8,
        ..Default::default()
    };
    zone.__bindgen_anon_1.pio = 2;
    assert_eq!(vm.set(KVM_REGISTER_COALESCED_MMIO, zone), Err(Errno::INVAL));
    assert_eq!(
        vm.set(KVM_UNREGISTER_COALESCED_MMIO, zone),
        Err(Errno::INVAL)
    );
    zone.__bindgen_anon_1.pio = 1;
    assert_eq!(vm.set(KVM_UNREGISTER_COALESCED_MMIO, zone), Ok(0));
    for _ in 0..1000 {
        assert_eq!(vm.set(KVM_REGISTER_COALESCED_MMIO, zone), Ok(0));
    }
    assert_eq!(vm.set(KVM_REGISTER_COALESCED_MMIO, zone), Err(Errno::NOSPC));
    assert_eq!(vm.set(KVM_UNREGISTER_COALESCED_MMIO, zone), Ok(0));
    assert_eq!(vm.set(KVM_REGISTER_COALESCED_MMIO, zone), Ok(0));

    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let event = kvm_ioeventfd {
        addr: 0x1000,
        len: 4,
        fd: std::os::fd::AsRawFd::as_raw_fd(&eventfd),
        ..Default::default()
    };
    let deassign = kvm_ioeventfd { flags: 4, ..event };
    assert_eq!(vm.set(KVM_IOEVENTFD, deassign), Err(Errno::NOENT));
    assert_eq!(vm.set(KVM_IOEVENTFD, event), Ok(0));
    assert_eq!(vm.set(KVM_IOEVENTFD, event), Err(Errno::EXIST));
    assert_eq!(
        vm.set(KVM_IOEVENTFD, kvm_ioeventfd { len: 0, ..event }),
        Err(Errno::EXIST)
    );
    assert_eq!(
        vm.set(KVM_IOEVENTFD, kvm_ioeventfd { len: 2, ..event }),
        Ok(0)
    );
    assert_eq!(vm.set(KVM_IOEVENTFD, deassign), Ok(0));
    assert_eq!(vm.set(KVM_IOEVENTFD, deassign), Err(Errno::NOENT));

    let irqfd = kvm_irqfd {
        fd: event.fd as u32,
        gsi: 4,
        ..Default::default()
    };
    assert_eq!(vm.set(KVM_IRQFD, irqfd), Err(Errno::INVAL));
    assert_eq!(
        vm.set(KVM_IRQFD, kvm_irqfd { flags: 8, ..irqfd }),
        Err(Errno::INVAL)
    );
}

#[test]
fn a_signal_mask_has_eight_bytes() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    assert_eq!(vcpu.call(KVM_SET_SIGNAL_MASK, 0), Ok(0));
    assert_eq!(
        vcpu.set(KVM_SET_SIGNAL_MASK, [4_u32, 0, 0]),
        Err(Errno::INVAL)
    );
    assert_eq!(vcpu.set(KVM_SET_SIGNAL_MASK, [8_u32, 0, 0]), Ok(0));
    assert_eq!(vcpu.call(KVM_SET_SIGNAL_MASK, 0), Ok(0));
}
