//! The virtual side of this processor's GICv3 interface.

// UNSAFETY: system registers that a guest's interrupts depend on.
#![expect(unsafe_code)]

use super::registers::{read, write};
use core::arch::asm;
use twofold_pkvm::interrupts::{Interface, Interrupts, LIST_REGISTERS, VirtualGic};

/// The registers of the calling processor.
#[derive(Debug)]
pub(crate) struct Gic;

/// Whether processors have the registers.
pub(crate) fn is_there() -> bool {
    read!("id_aa64pfr0_el1") >> 24 & 0xf != 0
}

/// Lets EL1 use the registers, and begins with nothing for guests.
pub(crate) fn take() {
    if !is_there() {
        return;
    }
    // System registers, no bypass; EL1 may use its own.
    write!("icc_sre_el2", 0xf);
    // SAFETY: a barrier.
    unsafe { asm!("isb", options(nostack)) };
    write!("ich_hcr_el2", 0);
    Gic.clear();
    Gic.load(&Interface::default());
}

macro_rules! list_registers {
    ($($index:literal $name:literal,)*) => {
        fn write_list(index: usize, value: u64) {
            match index {
                $($index => write!($name, value),)*
                _ => {}
            }
        }

        fn read_list(index: usize) -> u64 {
            match index {
                $($index => read!($name),)*
                _ => 0,
            }
        }
    };
}

list_registers! {
    0 "ich_lr0_el2", 1 "ich_lr1_el2", 2 "ich_lr2_el2", 3 "ich_lr3_el2",
    4 "ich_lr4_el2", 5 "ich_lr5_el2", 6 "ich_lr6_el2", 7 "ich_lr7_el2",
    8 "ich_lr8_el2", 9 "ich_lr9_el2", 10 "ich_lr10_el2", 11 "ich_lr11_el2",
    12 "ich_lr12_el2", 13 "ich_lr13_el2", 14 "ich_lr14_el2", 15 "ich_lr15_el2",
}

/// How many registers of active priorities there are for each group.
fn active_registers() -> usize {
    match read!("ich_vtr_el2") >> 26 & 7 {
        6 => 4,
        5 => 2,
        _ => 1,
    }
}

impl VirtualGic for Gic {
    fn config(&self) -> u64 {
        const SYSTEM_REGISTERS: u64 = 1;
        let memory_mapped = read!("icc_sre_el2") & SYSTEM_REGISTERS == 0;
        read!("ich_vtr_el2") | u64::from(memory_mapped) << 63
    }

    fn list_registers(&self) -> usize {
        (read!("ich_vtr_el2") & 0x1f) as usize + 1
    }

    fn clear(&self) {
        for index in 0..self.list_registers().min(LIST_REGISTERS) {
            write_list(index, 0);
        }
    }

    fn load(&self, interface: &Interface) {
        write!("ich_vmcr_el2", interface.control);
        let (zero, one) = (&interface.active0, &interface.active1);
        write!("ich_ap0r0_el2", zero[0]);
        write!("ich_ap1r0_el2", one[0]);
        if active_registers() > 1 {
            write!("ich_ap0r1_el2", zero[1]);
            write!("ich_ap1r1_el2", one[1]);
        }
        if active_registers() > 2 {
            write!("ich_ap0r2_el2", zero[2]);
            write!("ich_ap0r3_el2", zero[3]);
            write!("ich_ap1r2_el2", one[2]);
            write!("ich_ap1r3_el2", one[3]);
        }
    }

    fn save(&self) -> Interface {
        let mut interface = Interface {
            control: read!("ich_vmcr_el2"),
            ..Interface::default()
        };
        let (zero, one) = (&mut interface.active0, &mut interface.active1);
        zero[0] = read!("ich_ap0r0_el2");
        one[0] = read!("ich_ap1r0_el2");
        if active_registers() > 1 {
            zero[1] = read!("ich_ap0r1_el2");
            one[1] = read!("ich_ap1r1_el2");
        }
        if active_registers() > 2 {
            zero[2] = read!("ich_ap0r2_el2");
            zero[3] = read!("ich_ap0r3_el2");
            one[2] = read!("ich_ap1r2_el2");
            one[3] = read!("ich_ap1r3_el2");
        }
        interface
    }
}

/// Loads what the host delivers to a guest that runs now.
pub(crate) fn deliver(interrupts: &Interrupts) {
    if !is_there() {
        return;
    }
    for (index, list) in interrupts.list[..interrupts.used].iter().enumerate() {
        write_list(index, *list);
    }
    write!("ich_hcr_el2", interrupts.control);
}

/// Takes back what the guest has made of it. The registers are empty then.
pub(crate) fn collect(interrupts: &mut Interrupts) {
    if !is_there() {
        return;
    }
    interrupts.control = read!("ich_hcr_el2");
    write!("ich_hcr_el2", 0);
    for (index, list) in interrupts.list[..interrupts.used].iter_mut().enumerate() {
        *list = read_list(index);
        write_list(index, 0);
    }
}
