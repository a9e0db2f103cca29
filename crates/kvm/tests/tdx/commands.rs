//! Commands in the right order, and in every other.

use super::*;

fn vm() -> (Fd, Fd) {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, KVM_X86_TDX_VM as usize);
    (kvm, vm)
}

#[test]
fn the_type_is_announced_and_can_be_created() {
    let (kvm, vm) = vm();
    let types = kvm.call(KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES as usize);
    assert_eq!(types.unwrap() & 1 << KVM_X86_TDX_VM, 1 << KVM_X86_TDX_VM);
    for (capability, there) in [
        (KVM_CAP_MEMORY_ATTRIBUTES, true),
        (KVM_CAP_GUEST_MEMFD, true),
        (KVM_CAP_MAX_VCPUS, true),
        (KVM_CAP_SYNC_REGS, false),
        (KVM_CAP_READONLY_MEM, false),
    ] {
        let answer = vm.call(KVM_CHECK_EXTENSION, capability as usize).unwrap();
        assert_eq!(answer != 0, there, "capability {capability}");
    }
}

#[test]
fn only_trust_domains_have_the_commands() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    assert_eq!(command(&vm, FINALIZE_VM, 0, 0), Err(Errno::NOTTY));
    assert_eq!(command(&vcpu, INIT_VCPU, 0, 0), Err(Errno::INVAL));
}

#[test]
fn the_error_of_the_hardware_is_for_kvm_to_set_and_commands_are_six() {
    let td = Td::new();
    for fd in [&td.vm, &td.vcpu] {
        let command = Command {
            id: GET_CPUID,
            hw_error: 1,
            ..Default::default()
        };
        assert_eq!(fd.set(KVM_MEMORY_ENCRYPT_OP, command), Err(Errno::INVAL));
        assert_eq!(fd.call(KVM_MEMORY_ENCRYPT_OP, 8), Err(Errno::FAULT));
        for id in [6, 7, u32::MAX] {
            assert_eq!(super::command(fd, id, 0, 0), Err(Errno::INVAL));
        }
    }
    for id in [INIT_VCPU, INIT_MEM_REGION, GET_CPUID] {
        assert_eq!(command(&td.vm, id, 0, 0), Err(Errno::INVAL));
    }
    for id in [CAPABILITIES, INIT_VM, FINALIZE_VM] {
        assert_eq!(command(&td.vcpu, id, 0, 0), Err(Errno::INVAL));
    }
}

#[repr(C)]
struct Capabilities {
    attributes: u64,
    xfam: u64,
    others: [u64; 254],
    count: u32,
    padding: u32,
    entries: [kvm_cpuid_entry2; 32],
}

#[test]
fn capabilities_say_what_can_be_configured_if_there_is_room() {
    let (_kvm, vm) = vm();
    let mut capabilities = Capabilities {
        attributes: 0,
        xfam: 0,
        others: [7; 254],
        count: 0,
        padding: 0,
        entries: [kvm_cpuid_entry2::default(); 32],
    };
    let ask = |capabilities: &mut Capabilities, flags| {
        let data = std::ptr::from_mut(capabilities).expose_provenance() as u64;
        command(&vm, CAPABILITIES, flags, data)
    };
    assert_eq!(ask(&mut capabilities, 1), Err(Errno::INVAL));
    assert_eq!(ask(&mut capabilities, 0), Err(Errno::TOOBIG));
    assert_eq!(command(&vm, CAPABILITIES, 0, 8), Err(Errno::FAULT));
    capabilities.count = 32;
    assert_eq!(ask(&mut capabilities, 0), Ok(0));
    assert_eq!(capabilities.attributes, SEPT_VE_DISABLE);
    assert_eq!(capabilities.xfam & 3, 3);
    assert_eq!(capabilities.others, [0; 254]);
    let entries = &capabilities.entries[..capabilities.count as usize];
    let width = entries.iter().find(|entry| entry.function == 0x8000_0008);
    assert_eq!(width.unwrap().eax, 0xff << 16);
}

#[test]
fn init_vm_refuses_what_it_cannot_give_and_can_be_tried_again() {
    let (_kvm, vm) = vm();
    let good = InitVm::new(48);
    type Change = fn(&mut InitVm);
    let bad: [(&str, Change, Errno); 9] = [
        ("attributes", |r| r.attributes = 1, Errno::INVAL),
        ("xfam", |r| r.xfam = 1 << 40, Errno::INVAL),
        ("reserved", |r| r.reserved[11] = 1, Errno::INVAL),
        ("padding", |r| r.padding = 1, Errno::INVAL),
        ("no address width", |r| r.count = 0, Errno::INVAL),
        (
            "address width",
            |r| r.entries[0].eax = 49 << 16,
            Errno::INVAL,
        ),
        ("unknown leaf", |r| r.count = 2, Errno::INVAL),
        (
            "bit that is not there",
            |r| {
                r.count = 2;
                r.entries[1].function = 1;
                r.entries[1].edx = 1 << 30;
            },
            Errno::INVAL,
        ),
        ("too many", |r| r.count = 257, Errno::TOOBIG),
    ];
    for (what, change, error) in bad {
        let mut request = good;
        if what == "unknown leaf" {
            request.entries[1].function = 0x1234_5678;
        }
        change(&mut request);
        assert_eq!(init_vm(&vm, &request), Err(error), "{what}");
    }
    assert_eq!(command(&vm, INIT_VM, 1, address(&good)), Err(Errno::INVAL));
    assert_eq!(command(&vm, INIT_VM, 0, 8), Err(Errno::FAULT));
    assert_eq!(init_vm(&vm, &good), Ok(0));
    assert_eq!(init_vm(&vm, &good), Err(Errno::INVAL), "once is enough");
}

#[test]
fn init_vm_says_what_the_module_found_wrong() {
    let (_kvm, vm) = vm();
    let mut request = InitVm::new(48);
    request.count = 2;
    request.entries[1].function = 7;
    request.entries[1].edx = 1;
    let mut command = Command {
        id: INIT_VM,
        data: address(&request),
        ..Default::default()
    };
    let result = vm.with(KVM_MEMORY_ENCRYPT_OP, &mut command);
    assert_eq!(result, Err(Errno::INVAL));
    assert_eq!(command.hw_error >> 32, 0xc000_0100, "OPERAND_INVALID");
}

#[test]
fn vcpus_come_between_init_vm_and_finalize_and_need_a_local_apic() {
    let (_kvm, vm) = vm();
    assert_eq!(vm.call(KVM_CREATE_VCPU, 0), Err(Errno::IO));
    assert_eq!(vm.call(KVM_CREATE_IRQCHIP, 0), Err(Errno::INVAL));
    assert_eq!(init_vm(&vm, &InitVm::new(48)), Ok(0));
    assert_eq!(vm.call(KVM_CREATE_VCPU, 0), Err(Errno::INVAL));
    split_irqchip(&vm);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    assert_eq!(command(&vcpu, INIT_VCPU, 0, 0), Err(Errno::INVAL), "x2APIC");
    set_cpuid(&vcpu);
    assert_eq!(command(&vcpu, INIT_VCPU, 1, 0), Err(Errno::INVAL), "flags");
    assert_eq!(command(&vcpu, INIT_VCPU, 0, 0), Ok(0));
    assert_eq!(command(&vcpu, INIT_VCPU, 0, 0), Err(Errno::INVAL), "again");
    assert_eq!(vcpu.call(KVM_RUN, 0), Err(Errno::INVAL), "not finalised");
    assert_eq!(finalize(&vm), Ok(0));
    assert_eq!(vm.call(KVM_CREATE_VCPU, 1), Err(Errno::IO));
}

#[test]
fn a_td_has_as_many_vcpus_as_the_machine_has_processors() {
    let (_kvm, vm) = vm();
    split_irqchip(&vm);
    assert_eq!(init_vm(&vm, &InitVm::new(52)), Ok(0));
    let most = vm.call(KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS as usize);
    let vcpus: Vec<_> = (0..most.unwrap() as usize)
        .map(|id| vm.descriptor(KVM_CREATE_VCPU, id))
        .collect();
    assert_eq!(vm.call(KVM_CREATE_VCPU, vcpus.len()), Err(Errno::INVAL));
    for vcpu in &vcpus {
        set_cpuid(vcpu);
        assert_eq!(command(vcpu, INIT_VCPU, 0, 0), Ok(0));
    }
}

#[test]
fn after_finalize_nothing_is_added_and_nothing_begins_again() {
    let td = Td::new();
    let source = page_of(1);
    assert_eq!(td.add_page(DATA, &source), Ok(0));
    assert_eq!(td.finalize(), Ok(0));
    assert_eq!(td.finalize(), Err(Errno::INVAL));
    assert_eq!(td.add_page(DATA + PAGE, &source), Err(Errno::INVAL));
    assert_eq!(init_vm(&td.vm, &InitVm::new(48)), Err(Errno::INVAL));
    for id in [INIT_VCPU, INIT_MEM_REGION, GET_CPUID] {
        assert_eq!(command(&td.vcpu, id, 0, 0), Err(Errno::INVAL));
    }
}

#[test]
fn finalize_needs_a_td_and_ends_a_vcpu_that_was_not_initialised() {
    let (_kvm, uninitialized) = vm();
    assert_eq!(
        command(&uninitialized, FINALIZE_VM, 0, 0),
        Err(Errno::INVAL)
    );
    let td = Td::without_vcpu_init(&InitVm::new(48));
    assert_eq!(td.add_page(DATA, &page_of(1)), Err(Errno::INVAL));
    assert_eq!(td.finalize(), Ok(0));
    assert_eq!(td.vcpu.call(KVM_RUN, 0), Err(Errno::INVAL));
}

#[test]
fn get_cpuid_shows_what_the_module_virtualises() {
    #[repr(C)]
    struct Table {
        count: u32,
        padding: u32,
        entries: [kvm_cpuid_entry2; 256],
    }
    let td = Td::with(&InitVm::new(52));
    let mut table = Table {
        count: 1,
        padding: 0,
        entries: [kvm_cpuid_entry2::default(); 256],
    };
    let ask = |table: &mut Table| {
        let data = std::ptr::from_mut(table).expose_provenance() as u64;
        command(&td.vcpu, GET_CPUID, 0, data)
    };
    assert_eq!(ask(&mut table), Err(Errno::TOOBIG));
    let needed = table.count;
    assert_eq!(ask(&mut table), Ok(0), "the size that it asked for");
    assert_eq!(table.count, needed);
    let entries = &table.entries[..needed as usize];
    let leaf = |function| entries.iter().find(|entry| entry.function == function);
    assert_eq!(leaf(0x8000_0008).unwrap().eax >> 16 & 0xff, 52);
    assert_eq!(leaf(0x8000_0008).unwrap().eax & 0xff, 52);
    assert_ne!(leaf(1).unwrap().edx, 0);
    assert!(leaf(0x4000_0000).is_none(), "that is KVM's to say");
    assert_eq!(command(&td.vcpu, GET_CPUID, 0, 8), Err(Errno::FAULT));
}
