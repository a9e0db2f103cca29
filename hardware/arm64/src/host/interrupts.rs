//! A guest with a timer: its interrupt stops the guest, and the host hands it on through a list
//! register.

use crate::calls::call;
use crate::clock::{ticks, wait_until};
use crate::gic;
use crate::vm::{ENTRY, PAGE, Pages, Program, Vm, check};
use twofold_pkvm::hypercall::Call;
use twofold_pkvm::run::Reason;
use twofold_pkvm::{Error, HostVcpu};

/// ICH_LR_EL2: pending, of group 1, and tied to the physical interrupt of the same number.
const TIMER_PENDING: u64 = 1 << 62 | 1 << 61 | 1 << 60 | 0x80 << 48 | gic::TIMER << 32 | gic::TIMER;
/// ICH_LR_EL2: pending or active.
const STATE: u64 = 3 << 62;
/// ICH_VMCR_EL2: group 1 is enabled, and where the priority mask stands.
const GROUP1: u64 = 1 << 1;
const MASK_SHIFT: u32 = 24;

/// Whether the guest's timer has fired and it wants to know (CNTV_CTL_EL0).
fn has_fired(vm: &Vm) -> bool {
    vm.word(HostVcpu::TIMER) == 0b101
}

/// The guest's timer has fired: the guest is to take the interrupt when it runs.
fn deliver(vm: &Vm) {
    gic::activate_timer();
    vm.set_word(HostVcpu::LISTS, TIMER_PENDING);
    vm.set_word(HostVcpu::LISTS_USED, 1);
}

/// A protected guest takes two interrupts of its timer: one while it spins, one while it waits.
pub(crate) fn by_a_timer(pages: &mut Pages) {
    gic::open_timer();
    let vm = Vm::new(pages, true, 8);
    let text = pages.take();
    Program::Timer.copy_to(text);
    vm.set_word(HostVcpu::GIC_CONTROL, 1);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    assert_eq!(call(Call::DonateGuest, &[text / PAGE, ENTRY / PAGE]), Ok(0));
    check!(
        vm.run() == Reason::Interrupt as u64 && has_fired(&vm),
        "a protected guest spins until its timer fires: the interrupt stops it, and the host sees that it was its timer's"
    );
    vm.set_word(HostVcpu::LISTS_USED, 17);
    check!(
        call(Call::VcpuRun, &[]) == Err(Error::Invalid),
        "more list registers than there are: the guest does not run"
    );
    deliver(&vm);
    let [count, number, _] = vm.run_to_call(0x1000_0001);
    check!(
        count == 1 && number == gic::TIMER,
        "through a list register the guest takes interrupt {number} in its own vector"
    );
    check!(
        vm.word(HostVcpu::LISTS) & STATE == 0 && !gic::timer_is_active(),
        "its end of the interrupt empties the list register and ends the physical one"
    );
    interface(&vm);
    let mut waited = 0;
    let [count, number, late] = loop {
        let reason = vm.run();
        if reason == Reason::Call as u64 {
            break [1, 2, 3].map(|number| vm.word(HostVcpu::CALL + number));
        }
        let compare = vm.word(HostVcpu::TIMER + 1);
        if reason == Reason::Wait as u64 {
            waited += 1;
            wait_until("the guest's timer does not fire", || ticks() >= compare);
        } else {
            assert!(reason == Reason::Interrupt as u64 && has_fired(&vm));
        }
        deliver(&vm);
    };
    check!(
        count == 2 && number == gic::TIMER && late == 1 && waited <= 1,
        "the guest waits for the next: the host keeps it until the time that the guest has set, and hands the interrupt on"
    );
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    gic::close_timer();
    vm.end(&[ENTRY / PAGE]);
}

/// The guest's interface, saved and restored.
fn interface(vm: &Vm) {
    let save = || {
        assert_eq!(call(Call::VgicV3SaveAprs, &[vm.vcpu]), Ok(0));
        vm.word(HostVcpu::INTERFACE)
    };
    let own = save();
    check!(
        own & GROUP1 != 0 && own >> MASK_SHIFT >= 0xf0 && vm.word(HostVcpu::ACTIVE + 4) == 0,
        "the interface as the guest has set it up, saved: {own:#x}; no priority is active"
    );
    let restore = |value| {
        vm.set_word(HostVcpu::INTERFACE, value);
        assert_eq!(call(Call::VgicV3RestoreVmcrAprs, &[vm.vcpu]), Ok(0));
    };
    restore(0);
    let closed = save();
    restore(own);
    check!(
        closed >> MASK_SHIFT == 0 && closed & GROUP1 == 0 && save() == own,
        "restored as the host wants it, and as it was"
    );
    check!(
        call(Call::VgicV3SaveAprs, &[vm.vcpu + 8]) == Err(Error::Invalid)
            && call(Call::VgicV3RestoreVmcrAprs, &[0]) == Err(Error::Invalid),
        "by another vCPU's name neither works"
    );
}
