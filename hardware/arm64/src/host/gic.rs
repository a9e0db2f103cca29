//! The host's own interrupt controller, as far as the timer of guests needs it: a GICv3 whose
//! registers the host reaches through its stage 2 like those of any device.

// UNSAFETY: device registers, and this processor's interface.
#![expect(unsafe_code)]

use core::arch::asm;

const DISTRIBUTOR: u64 = 0x0800_0000;
const REDISTRIBUTOR: u64 = 0x080a_0000;
/// The part of a redistributor that is about the processor's own interrupts.
const OWN: u64 = REDISTRIBUTOR + 0x1_0000;

/// The virtual timer's interrupt.
pub(crate) const TIMER: u64 = 27;

fn write(address: u64, value: u32) {
    // SAFETY: callers name registers of the controller.
    unsafe { (address as *mut u32).write_volatile(value) };
}

fn read(address: u64) -> u32 {
    // SAFETY: as above.
    unsafe { (address as *const u32).read_volatile() }
}

/// Lets the virtual timer interrupt the first processor. At EL1 interrupts stay masked: it is a guest
/// that they stop.
pub(crate) fn open_timer() {
    const GROUP1: u32 = 1 << 1;
    const AFFINITY: u32 = 1 << 4;
    const ASLEEP: u32 = 1 << 1;
    const CHILDREN_ASLEEP: u32 = 1 << 2;
    write(DISTRIBUTOR, AFFINITY | GROUP1);
    let waker = REDISTRIBUTOR + 0x14;
    write(waker, read(waker) & !ASLEEP);
    while read(waker) & CHILDREN_ASLEEP != 0 {
        core::hint::spin_loop();
    }
    let group = OWN + 0x80;
    write(group, read(group) | 1 << TIMER);
    write(OWN + 0x100, 1 << TIMER);
    // SAFETY: this processor's own interface: every priority, group 1.
    unsafe {
        asm!(
            "msr icc_pmr_el1, {mask}",
            "msr icc_igrpen1_el1, {one}",
            "isb",
            mask = in(reg) 0xffu64,
            one = in(reg) 1u64,
            options(nostack)
        );
    }
}

/// The timer's interrupt is not to be signalled.
pub(crate) fn close_timer() {
    write(OWN + 0x180, 1 << TIMER);
}

/// Takes the timer's interrupt as if it had been acknowledged: it is not signalled again until the
/// guest ends the virtual one.
pub(crate) fn activate_timer() {
    write(OWN + 0x300, 1 << TIMER);
}

/// Whether the timer's interrupt is active.
pub(crate) fn timer_is_active() -> bool {
    read(OWN + 0x300) & 1 << TIMER != 0
}
