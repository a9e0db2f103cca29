//! Running the host and guests: the way down and up again.

// UNSAFETY: switches exception levels and what the lower ones have.
#![expect(unsafe_code)]

use super::gic;
use super::registers::{read, write};
use core::arch::asm;
use twofold_pkvm::Registers;
use twofold_pkvm::run::{Context, Exit};
use twofold_pkvm::vm::{SYSTEM, SYSTEM_REGISTERS, system};

unsafe extern "C" {
    fn enter_lower(registers: *mut Registers) -> u64;
}

/// HCR_EL2 for the host: stage 2, 64-bit EL1, and its SMCs come here.
pub(crate) const HCR_HOST: u64 = 1 << 31 | 1 << 19 | 1;
/// HCR_EL2 for a guest: the same, waiting traps, and interrupts come here.
const HCR_GUEST: u64 = HCR_HOST | 1 << 13 | 1 << 5 | 1 << 4 | 1 << 3;
/// SCTLR_EL1 after a reset: RES1 and nothing on.
const SCTLR_RESET: u64 = 0x30d0_0800;
/// CNTHCTL_EL2: what EL1 may reach of the physical timer. A guest only reads the counter: the timer
/// is the host's.
pub(crate) const TIMER_HOST: u64 = 3;
const TIMER_GUEST: u64 = 1;

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut index = 0;
    while index < a.len() && index < b.len() && a[index] == b[index] {
        index += 1;
    }
    index == a.len() && index == b.len()
}

macro_rules! system_registers {
    ($($index:literal $name:literal,)*) => {
        // The order is the one that the hypervisor knows.
        const _: () = {
            $(assert!(same(SYSTEM[$index], $name));)*
            assert!([$($name),*].len() == SYSTEM_REGISTERS);
        };

        fn save(system: &mut [u64]) {
            $(system[$index] = read!($name);)*
        }

        /// Loads EL1's and EL0's registers.
        pub(crate) fn load(system: &[u64]) {
            $(write!($name, system[$index]);)*
        }
    };
}

system_registers! {
    0 "sctlr_el1", 1 "sp_el0", 2 "sp_el1", 3 "elr_el1", 4 "spsr_el1", 5 "vbar_el1",
    6 "cpacr_el1", 7 "ttbr0_el1", 8 "ttbr1_el1", 9 "tcr_el1", 10 "mair_el1", 11 "amair_el1",
    12 "esr_el1", 13 "far_el1", 14 "afsr0_el1", 15 "afsr1_el1", 16 "contextidr_el1",
    17 "tpidr_el0", 18 "tpidrro_el0", 19 "tpidr_el1", 20 "par_el1", 21 "cntkctl_el1",
    22 "csselr_el1", 23 "mdscr_el1", 24 "cntv_cval_el0", 25 "cntv_ctl_el0",
}

/// Runs the lower level until it leaves.
pub(crate) fn enter(registers: &mut Registers) -> Exit {
    // SAFETY: the registers are a lower level's; the code saves and restores EL2's own.
    let interrupted = unsafe { enter_lower(registers) } != 0;
    if interrupted {
        return Exit::Interrupt;
    }
    Exit::Exception {
        syndrome: read!("esr_el2"),
        far: read!("far_el2"),
        hpfar: read!("hpfar_el2"),
    }
}

fn barrier() {
    // SAFETY: a barrier.
    unsafe { asm!("isb", options(nostack)) };
}

/// Runs a guest on this processor, which has the host's registers, until it leaves. The virtual timer
/// is the guest's meanwhile: a host that wants to be woken uses the physical one.
pub(crate) fn enter_guest(registers: &mut Registers, context: &mut Context) -> Exit {
    if registers.system[system::SCTLR] == 0 {
        registers.system[system::SCTLR] = SCTLR_RESET;
    }
    let mut host = [0; SYSTEM_REGISTERS];
    save(&mut host);
    let (vttbr, vtcr) = (read!("vttbr_el2"), read!("vtcr_el2"));
    write!("cntv_ctl_el0", 0);
    write!("cntvoff_el2", context.counter_offset);
    write!("cnthctl_el2", TIMER_GUEST);
    load(&registers.system);
    gic::deliver(&context.interrupts);
    // Only the guest's stage 2 counts from here on, and for EL1 only.
    write!("vtcr_el2", context.stage2.vtcr);
    write!("vttbr_el2", context.stage2.vttbr);
    write!("hcr_el2", HCR_GUEST);
    barrier();
    let exit = enter(registers);
    save(&mut registers.system);
    gic::collect(&mut context.interrupts);
    write!("hcr_el2", HCR_HOST);
    write!("vttbr_el2", vttbr);
    write!("vtcr_el2", vtcr);
    write!("cntv_ctl_el0", 0);
    write!("cntvoff_el2", 0);
    write!("cnthctl_el2", TIMER_HOST);
    load(&host);
    barrier();
    exit
}
