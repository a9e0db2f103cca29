//! What of a TD's vCPU its program can neither see nor set.
//!
//! The guest's registers are the TD's own. KVM refuses the ioctls that would show or change them, with
//! `EINVAL`, and answers for a register by index only where it is KVM that emulates it.

use crate::ioctl::number::*;

/// Whether an ioctl on a TD's vCPU is refused.
pub(crate) const fn refuses(request: u64) -> bool {
    matches!(
        request,
        KVM_GET_REGS
            | KVM_SET_REGS
            | KVM_GET_SREGS
            | KVM_SET_SREGS
            | KVM_GET_SREGS2
            | KVM_SET_SREGS2
            | KVM_GET_FPU
            | KVM_SET_FPU
            | KVM_GET_XSAVE
            | KVM_GET_XSAVE2
            | KVM_SET_XSAVE
            | KVM_GET_XCRS
            | KVM_SET_XCRS
            | KVM_GET_DEBUGREGS
            | KVM_SET_DEBUGREGS
            | KVM_SET_GUEST_DEBUG
            | KVM_GET_LAPIC
            | KVM_SET_LAPIC
            | KVM_SET_TSC_KHZ
            | KVM_TRANSLATE
    )
}

/// Registers that KVM emulates for a TD, which the program may read, and the guest by hypercall. The
/// others are the module's.
pub(crate) const fn emulates_msr(index: u32) -> bool {
    const IA32_UCODE_REV: u32 = 0x8b;
    const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
    const IA32_POWER_CTL: u32 = 0x1fc;
    const IA32_PAT: u32 = 0x277;
    const MTRR_CAP: u32 = 0xfe;
    const MTRR_FIRST: u32 = 0x200;
    const MTRR_LAST: u32 = 0x26f;
    const MTRR_DEFAULT: u32 = 0x2ff;
    const IA32_TSC_DEADLINE: u32 = 0x6e0;
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const PLATFORM_INFO: u32 = 0xce;
    const MISC_FEATURES_ENABLES: u32 = 0x140;
    const IA32_APIC_BASE: u32 = 0x1b;
    const IA32_EFER: u32 = 0xc000_0080;
    const IA32_FEATURE_CONTROL: u32 = 0x3a;
    const MCG_CAP: u32 = 0x179;
    const MCG_CTL: u32 = 0x17b;
    const MCG_EXT_CTL: u32 = 0x4d0;
    const MC0_CTL: u32 = 0x400;
    const MC0_CTL2: u32 = 0x280;
    /// Banks of the machine check architecture that KVM knows at most.
    const BANKS: u32 = 32;
    const MC_LAST: u32 = MC0_CTL + 4 * BANKS - 1;
    const MC_LAST_CTL2: u32 = MC0_CTL2 + BANKS - 1;
    const POLL_CONTROL: u32 = 0x4b56_4d05;
    const X2APIC_FIRST: u32 = 0x800;
    const X2APIC_LAST: u32 = 0x8ff;
    match index {
        IA32_UCODE_REV
        | IA32_ARCH_CAPABILITIES
        | IA32_POWER_CTL
        | IA32_PAT
        | MTRR_CAP
        | MTRR_FIRST..=MTRR_LAST
        | MTRR_DEFAULT
        | IA32_TSC_DEADLINE
        | IA32_MISC_ENABLE
        | PLATFORM_INFO
        | MISC_FEATURES_ENABLES
        | IA32_APIC_BASE
        | IA32_EFER
        | IA32_FEATURE_CONTROL
        | MCG_CAP..=MCG_CTL
        | MCG_EXT_CTL
        | MC0_CTL..=MC_LAST
        | MC0_CTL2..=MC_LAST_CTL2
        | POLL_CONTROL => true,
        // The processor virtualises these: task and processor priority, end of interrupt, and the
        // three sets of eight registers that say which interrupts there are.
        0x808 | 0x80a | 0x80b | 0x810..=0x827 => false,
        X2APIC_FIRST..=X2APIC_LAST => true,
        _ => false,
    }
}

/// Registers among them that cannot be written.
pub(crate) const fn is_read_only_msr(index: u32) -> bool {
    matches!(index, 0x1b | 0x3a | 0xc000_0080)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_that_show_or_change_registers_are_refused_and_others_are_not() {
        for request in [KVM_GET_REGS, KVM_SET_SREGS2, KVM_GET_XSAVE2, KVM_SET_LAPIC] {
            assert!(refuses(request));
        }
        for request in [
            KVM_RUN,
            KVM_SET_CPUID2,
            KVM_PRE_FAULT_MEMORY,
            KVM_GET_MP_STATE,
        ] {
            assert!(!refuses(request));
        }
    }

    #[test]
    fn interrupt_state_that_the_processor_keeps_is_not_emulated() {
        assert!(emulates_msr(0x802));
        assert!(emulates_msr(0x830));
        for index in [0x808, 0x80b, 0x810, 0x818, 0x827] {
            assert!(!emulates_msr(index));
        }
        assert!(!emulates_msr(0xc000_0100), "the guest's FS base");
        assert!(emulates_msr(0xc000_0080) && is_read_only_msr(0xc000_0080));
    }
}
