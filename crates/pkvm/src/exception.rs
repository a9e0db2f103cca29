//! What a processor does when EL1 takes an exception, for exceptions that the hypervisor makes.

/// Exception classes of ESR_EL1 and ESR_EL2.
pub mod class {
    /// Something that has no class of its own.
    pub const UNKNOWN: u64 = 0x00;
    /// A trapped WFI or WFE.
    pub const WAIT: u64 = 0x01;
    /// HVC.
    pub const HVC: u64 = 0x16;
    /// SMC.
    pub const SMC: u64 = 0x17;
    /// An instruction abort from a lower level.
    pub const INSTRUCTION_ABORT: u64 = 0x20;
    /// A data abort from a lower level.
    pub const DATA_ABORT: u64 = 0x24;
    /// Added to an abort's class if it comes from the level that takes it.
    pub const SAME_LEVEL: u64 = 1;
}

/// ESR: the instruction has 32 bits.
pub const LENGTH: u64 = 1 << 25;
/// ESR of an abort: a synchronous external one.
pub const EXTERNAL_ABORT: u64 = 0x10;

const MODE: u64 = 0b1111;
const EL1T: u64 = 0b0100;
const EL1H: u64 = 0b0101;
const STATE32: u64 = 1 << 4;
const MASKED: u64 = 0xf << 6;
const SSBS: u64 = 1 << 12;
const PAN: u64 = 1 << 22;
const DIT: u64 = 1 << 24;
const CONDITIONS: u64 = 0xf << 28;
/// SCTLR_EL1: exceptions leave PSTATE.PAN alone.
const SPAN: u64 = 1 << 23;
/// SCTLR_EL1: what exceptions make PSTATE.SSBS.
const DSSBS: u64 = 1 << 44;

/// Whether PSTATE is that of EL1.
pub const fn at_el1(pstate: u64) -> bool {
    pstate & STATE32 == 0 && pstate >> 2 & 3 == 1
}

/// Where EL1 goes on after a synchronous exception, and with which PSTATE (Arm ARM, D1.3.1).
pub const fn synchronous(pstate: u64, sctlr: u64, vbar: u64) -> (u64, u64) {
    let offset = match pstate & (MODE | STATE32) {
        EL1T => 0x000,
        EL1H => 0x200,
        mode if mode & STATE32 == 0 => 0x400,
        _ => 0x600,
    };
    let mut new = pstate & (CONDITIONS | DIT | PAN) | MASKED | EL1H;
    if sctlr & SPAN == 0 {
        new |= PAN;
    }
    if sctlr & DSSBS != 0 {
        new |= SSBS;
    }
    (vbar.wrapping_add(offset), new)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_exception_goes_to_the_vector_of_where_it_comes_from() {
        for (mode, offset) in [
            (EL1T, 0),
            (EL1H, 0x200),
            (0, 0x400),
            (STATE32, 0x600),
            (STATE32 | 3, 0x600),
        ] {
            let (pc, pstate) = synchronous(mode, SPAN, 0x8000);
            assert_eq!(pc, 0x8000 + offset);
            assert_eq!(pstate, MASKED | EL1H);
        }
    }

    #[test]
    fn conditions_stay_and_pan_and_ssbs_follow_the_control_register() {
        let user = CONDITIONS | DIT | SSBS | 1 << 21;
        assert_eq!(
            synchronous(user, SPAN, 0).1,
            CONDITIONS | DIT | MASKED | EL1H
        );
        assert_eq!(
            synchronous(0, DSSBS, u64::MAX).1,
            PAN | SSBS | MASKED | EL1H
        );
        assert!(at_el1(EL1H) && at_el1(EL1T) && !at_el1(0) && !at_el1(STATE32 | 7));
    }
}
