//! Memory comes and goes while a guest is inside.

use super::*;
use std::thread;

/// `mov ecx, ROUNDS; 1: inc dword ptr [DATA]; loop 1b; hlt`, where a processor begins. Nothing takes
/// the #VE that the halt becomes, so the guest ends in a triple fault.
pub(super) fn code(rounds: u32) -> [u8; 14] {
    let mut code = [0xb9, 0, 0, 0, 0, 0xff, 0x05, 0, 0, 0, 0, 0xe2, 0xf8, 0xf4];
    code[1..5].copy_from_slice(&rounds.to_le_bytes());
    code[7..11].copy_from_slice(&(DATA as u32).to_le_bytes());
    code
}

#[test]
fn a_guest_inside_goes_on_while_other_pages_are_given_and_taken() {
    const ROUNDS: u32 = 1_000_000;
    let td = Td::new();
    let other = td.vm.descriptor(KVM_CREATE_VCPU, 1);
    set_cpuid(&other);
    assert_eq!(command(&other, INIT_VCPU, 0, 0), Ok(0));
    let begin = Memory::new(PAGE as usize);
    begin.write_bytes(0xff0, &code(ROUNDS));
    assert_eq!(td.add_page(RESET_PAGE, &begin), Ok(0));
    assert_eq!(td.add_page(DATA, &page_of(0)), Ok(0));
    assert_eq!(td.finalize(), Ok(0));
    let (first, pages) = (DATA + PAGE, PAGES - 1);
    let prefault = || {
        let mut request = kvm_pre_fault_memory {
            gpa: first,
            size: pages * PAGE,
            ..Default::default()
        };
        other.with(KVM_PRE_FAULT_MEMORY, &mut request)
    };
    let mut rounds = 0;
    thread::scope(|scope| {
        let guest = scope.spawn(|| td.vcpu.call(KVM_RUN, 0));
        while !guest.is_finished() || rounds == 0 {
            assert_eq!(prefault(), Ok(0));
            td.set_private(first, pages / 2, false);
            assert_eq!(prefault(), Ok(0));
            td.set_private(first, pages / 2, true);
            let hole = (KEEP_SIZE | PUNCH, PAGE as i64, (pages * PAGE) as i64);
            let punched = abi::fallocate(td.data_file.0, hole.0, hole.1, hole.2);
            assert_eq!(punched, Some(Ok(())));
            rounds += 1;
        }
        assert_eq!(guest.join().unwrap(), Ok(0));
    });
    assert_eq!(td.run.read::<u32>(8), KVM_EXIT_SHUTDOWN, "after {rounds}");
    assert_eq!(
        td.vcpu.call(KVM_GET_MP_STATE, 8),
        Err(Errno::FAULT),
        "alive"
    );
}

#[test]
fn taking_the_page_that_the_guest_uses_makes_it_leave() {
    let td = Td::new();
    let begin = Memory::new(PAGE as usize);
    begin.write_bytes(0xff0, &code(u32::MAX));
    assert_eq!(td.add_page(RESET_PAGE, &begin), Ok(0));
    assert_eq!(td.add_page(DATA, &page_of(0)), Ok(0));
    assert_eq!(td.finalize(), Ok(0));
    thread::scope(|scope| {
        let guest = scope.spawn(|| td.vcpu.call(KVM_RUN, 0));
        thread::sleep(std::time::Duration::from_millis(20));
        td.set_private(DATA, 1, false);
        // The guest's access is private, and there is nothing private any more.
        assert_eq!(guest.join().unwrap(), Err(Errno::FAULT));
    });
    assert_eq!(td.run.read::<u32>(8), KVM_EXIT_MEMORY_FAULT);
    assert_eq!(td.run.read::<u64>(40), DATA);
}
