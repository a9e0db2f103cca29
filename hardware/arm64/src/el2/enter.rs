//! Running the host and guests: the way down and up again.

// UNSAFETY: switches exception levels and what the lower ones have.
#![expect(unsafe_code)]

use super::registers::{read, write};
use core::arch::asm;
use twofold_pkvm::Registers;
use twofold_pkvm::run::{Exit, Stage2};

unsafe extern "C" {
    fn enter_lower(registers: *mut Registers) -> u64;
}

/// HCR_EL2 for the host: stage 2, 64-bit EL1, and its SMCs come here.
pub(crate) const HCR_HOST: u64 = 1 << 31 | 1 << 19 | 1;
/// HCR_EL2 for a guest: the same, waiting traps, and interrupts come here.
const HCR_GUEST: u64 = HCR_HOST | 1 << 13 | 1 << 5 | 1 << 4 | 1 << 3;
/// SCTLR_EL1 after a reset: RES1 and nothing on.
const SCTLR_RESET: u64 = 0x30d0_0800;
/// Where SCTLR_EL1 stands among the system registers.
const SCTLR: usize = 0;

macro_rules! system_registers {
    ($($index:literal $name:literal,)*) => {
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
    22 "csselr_el1", 23 "mdscr_el1",
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

/// Runs a guest on this processor, which has the host's registers, until it leaves.
pub(crate) fn enter_guest(registers: &mut Registers, stage2: Stage2) -> Exit {
    if registers.system[SCTLR] == 0 {
        registers.system[SCTLR] = SCTLR_RESET;
    }
    let mut host = [0; twofold_pkvm::vm::SYSTEM_REGISTERS];
    save(&mut host);
    let (vttbr, vtcr) = (read!("vttbr_el2"), read!("vtcr_el2"));
    load(&registers.system);
    // Only the guest's stage 2 counts from here on, and for EL1 only.
    write!("vtcr_el2", stage2.vtcr);
    write!("vttbr_el2", stage2.vttbr);
    write!("hcr_el2", HCR_GUEST);
    barrier();
    let exit = enter(registers);
    save(&mut registers.system);
    write!("hcr_el2", HCR_HOST);
    write!("vttbr_el2", vttbr);
    write!("vtcr_el2", vtcr);
    load(&host);
    barrier();
    exit
}
