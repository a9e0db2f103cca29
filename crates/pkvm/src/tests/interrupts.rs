//! Guests' interrupts and timers.

use super::setting::*;
use crate::error::Error;
use crate::interrupts::{Interface, Interrupts};
use crate::platform::Platform;
use crate::run::{Context, Exit, Reason};
use crate::shared::HostVcpu;
use crate::testing::{Ram, become_processor};
use crate::vm::{Handle, system};

const PLACE: Place = Place(100);
/// Pending, group 1, interrupt 27.
const PENDING: u64 = 1 << 62 | 1 << 60 | 27;
const ACTIVE: u64 = 1 << 63 | 1 << 60 | 27;

fn set(hyp: &Hyp<'_>, number: usize, value: u64) {
    set_word(hyp, PLACE.host_vcpu(0), number, value);
}

fn seen(hyp: &Hyp<'_>, number: usize) -> u64 {
    word(hyp, PLACE.host_vcpu(0), number)
}

/// What the guest runs with; it does `body` and an interrupt of the host stops it.
fn run(
    hyp: &Hyp<'_>,
    handle: Handle,
    body: impl Fn(&mut crate::vm::Registers, &mut Context),
) -> Result<Reason, Error> {
    with(hyp, handle, || {
        hyp.vcpu_run(&mut |registers, context| {
            body(registers, context);
            Exit::Interrupt
        })
    })
}

#[test]
fn the_guest_runs_with_the_hosts_list_registers_and_the_host_sees_what_became_of_them() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &[]);
    set(&hyp, HostVcpu::GIC_CONTROL, 0b11);
    set(&hyp, HostVcpu::LISTS_USED, 2);
    for (number, value) in [PENDING, 7, 8].into_iter().enumerate() {
        set(&hyp, HostVcpu::LISTS + number, value);
    }
    run(&hyp, handle, |_, context| {
        let mut expected = Interrupts {
            control: 0b11,
            used: 2,
            ..Interrupts::default()
        };
        expected.list[..2].copy_from_slice(&[PENDING, 7]);
        assert_eq!(context.interrupts, expected);
        context.interrupts.control |= 1 << 27;
        context.interrupts.list[0] = ACTIVE;
        context.interrupts.list[2] = 0xbad;
    })
    .unwrap();
    assert_eq!(seen(&hyp, HostVcpu::GIC_CONTROL), 0b11 | 1 << 27);
    assert_eq!(seen(&hyp, HostVcpu::LISTS), ACTIVE);
    assert_eq!(seen(&hyp, HostVcpu::LISTS + 2), 8, "it was not used");
}

#[test]
fn list_registers_that_there_are_not_and_traps_that_nobody_serves_are_refused() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &[]);
    let runs = || run(&hyp, handle, |_, _| {});
    for used in [5, 16, 17, 1 << 32, u64::MAX] {
        set(&hyp, HostVcpu::LISTS_USED, used);
        assert_eq!(runs(), Err(Error::Invalid), "{used}");
    }
    set(&hyp, HostVcpu::LISTS_USED, 4);
    assert_eq!(runs(), Ok(Reason::Interrupt));
    for bit in (8..27).chain(32..64) {
        set(&hyp, HostVcpu::GIC_CONTROL, 1 << bit);
        assert_eq!(runs(), Err(Error::Invalid), "bit {bit}");
    }
    let ram = Ram::new(256, 64).without_features();
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &[]);
    set(&hyp, HostVcpu::LISTS_USED, 1);
    assert_eq!(run(&hyp, handle, |_, _| {}), Err(Error::Invalid));
    set(&hyp, HostVcpu::LISTS_USED, 0);
    assert_eq!(run(&hyp, handle, |_, _| {}), Ok(Reason::Interrupt));
}

#[test]
fn a_guests_interface_goes_with_it_and_never_to_another_guest() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let gic = hyp.platform().virtual_gic().unwrap();
    let first = start(&hyp, PLACE, true, &[]);
    let second = start(&hyp, Place(110), true, &[]);
    let mine = Interface {
        control: 0xff00_0002,
        active0: [1, 2, 3, 4],
        active1: [5, 6, 7, 8],
    };
    hyp.vcpu_load(first, 0).unwrap();
    assert_eq!(gic.save(), Interface::default());
    // The guest changes it while it runs.
    gic.load(&mine);
    hyp.vcpu_put().unwrap();
    hyp.vcpu_load(second, 0).unwrap();
    assert_eq!(
        gic.save(),
        Interface::default(),
        "nothing of the first guest"
    );
    hyp.vcpu_put().unwrap();
    become_processor(1);
    hyp.vcpu_load(first, 0).unwrap();
    assert_eq!(gic.save(), mine, "on another processor");
    hyp.vcpu_put().unwrap();
    become_processor(0);
}

#[test]
fn the_host_saves_and_restores_the_interface_of_the_vcpu_that_it_has_loaded() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let gic = hyp.platform().virtual_gic().unwrap();
    let handle = start(&hyp, PLACE, false, &[]);
    let other = start(&hyp, Place(110), false, &[]);
    let (record, others) = (PLACE.host_vcpu(0), Place(110).host_vcpu(0));
    assert_eq!(
        hyp.save_interface(record),
        Err(Error::Invalid),
        "none is loaded"
    );
    hyp.vcpu_load(handle, 0).unwrap();
    for wrong in [
        others,
        twofold_arch::Hpa::new(0),
        twofold_arch::Hpa::new(u64::MAX),
    ] {
        assert_eq!(hyp.save_interface(wrong), Err(Error::Invalid));
        assert_eq!(hyp.restore_interface(wrong), Err(Error::Invalid));
    }
    let interface = Interface {
        control: 9,
        active0: [1, 0, 0, 2],
        active1: [3, 0, 0, 4],
    };
    gic.load(&interface);
    hyp.save_interface(record).unwrap();
    let words = [HostVcpu::INTERFACE, HostVcpu::ACTIVE, HostVcpu::ACTIVE + 7];
    assert_eq!(words.map(|number| seen(&hyp, number)), [9, 1, 4]);
    set(&hyp, HostVcpu::INTERFACE, 10);
    set(&hyp, HostVcpu::ACTIVE + 4, 30);
    assert_eq!(gic.save(), interface, "only the call changes it");
    hyp.restore_interface(record).unwrap();
    let changed = Interface {
        control: 10,
        active1: [30, 0, 0, 4],
        ..interface
    };
    assert_eq!(gic.save(), changed);
    hyp.vcpu_put().unwrap();
    hyp.vcpu_load(other, 0).unwrap();
    hyp.vcpu_put().unwrap();
    hyp.vcpu_load(handle, 0).unwrap();
    assert_eq!(gic.save(), changed);
}

#[test]
fn the_hosts_offset_moves_ordinary_guests_on_its_processor_and_no_protected_one() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let ordinary = start(&hyp, PLACE, false, &[]);
    let protected = start(&hyp, Place(110), true, &[]);
    let offset = |handle| {
        let found = std::cell::Cell::new(None);
        run(&hyp, handle, |_, context| {
            found.set(Some(context.counter_offset));
        })
        .unwrap();
        found.get().unwrap()
    };
    hyp.set_counter_offset(u64::MAX - 5).unwrap();
    assert_eq!(offset(ordinary), u64::MAX - 5);
    assert_eq!(offset(protected), 0);
    become_processor(1);
    assert_eq!(offset(ordinary), 0, "each processor has its own");
    become_processor(crate::platform::MAX_PROCESSORS);
    assert_eq!(hyp.set_counter_offset(1), Err(Error::Invalid));
    become_processor(0);
}

#[test]
fn a_guests_timer_is_kept_and_the_host_learns_when_it_fires() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let handle = start(&hyp, PLACE, true, &[]);
    run(&hyp, handle, |registers, _| {
        assert_eq!(registers.system[system::TIMER_CONTROL], 0);
        registers.system[system::TIMER_CONTROL] = 0b101;
        registers.system[system::TIMER_COMPARE] = 1234;
    })
    .unwrap();
    assert_eq!(seen(&hyp, HostVcpu::TIMER), 0b101);
    assert_eq!(seen(&hyp, HostVcpu::TIMER + 1), 1234);
    // What the host writes there means nothing.
    set(&hyp, HostVcpu::TIMER, 0);
    set(&hyp, HostVcpu::TIMER + 1, 0);
    run(&hyp, handle, |registers, _| {
        assert_eq!(registers.system[system::TIMER_CONTROL], 0b101);
        assert_eq!(registers.system[system::TIMER_COMPARE], 1234);
    })
    .unwrap();
}
