//! Model-specific registers: `KVM_GET_MSRS`, `KVM_SET_MSRS`, and RDMSR and WRMSR of the guest.

use super::chipset_msr;
use super::lapic::Lapic;
use super::lapic::{self, Effect, Refused};
use super::machine_check::{IA32_MCG_CTL, IA32_MCG_STATUS, MachineCheck};
use super::{VcpuState, paravirt};
use crate::tsc::Sync;
use twofold_cpu::Msrs;
use twofold_cpu::state::{cr0, cr4, efer};

pub(super) const IA32_TSC: u32 = 0x10;
const IA32_PLATFORM_ID: u32 = 0x17;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_BIOS_SIGN_ID: u32 = 0x8b;
const IA32_TSC_ADJUST: u32 = 0x3b;
pub(super) const MSR_PLATFORM_INFO: u32 = 0xce;
const IA32_MTRRCAP: u32 = 0xfe;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_DEBUGCTL: u32 = 0x1d9;
const IA32_POWER_CTL: u32 = 0x1fc;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_MTRR_PHYSBASE0: u32 = 0x200;
const IA32_MTRR_LAST_VARIABLE: u32 = 0x20f;
const IA32_MTRR_FIX64K: u32 = 0x250;
const IA32_MTRR_FIX16K: [u32; 2] = [0x258, 0x259];
const IA32_MTRR_FIX4K_FIRST: u32 = 0x268;
const IA32_MTRR_FIX4K_LAST: u32 = 0x26f;
const IA32_PAT: u32 = 0x277;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_PERF_CAPABILITIES: u32 = 0x345;
const IA32_EFER: u32 = 0xc000_0080;
const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;
const IA32_CSTAR: u32 = 0xc000_0083;
const IA32_FMASK: u32 = 0xc000_0084;
const IA32_FS_BASE: u32 = 0xc000_0100;
const IA32_GS_BASE: u32 = 0xc000_0101;
const IA32_KERNEL_GS_BASE: u32 = 0xc000_0102;
const IA32_TSC_AUX: u32 = 0xc000_0103;
/// AMD's hardware configuration register (MSR_K7_HWCR), which KVM offers to every guest.
const MSR_HWCR: u32 = 0xc001_0015;
/// McStatusWrEn and TscFreqSel.
const HWCR_KEPT: u64 = HWCR_STATUS_WRITABLE | 1 << 24;
/// McStatusWrEn
const HWCR_STATUS_WRITABLE: u64 = 1 << 18;
/// Writes to these have no effect: TlbCacheDis, HltXSpCycEn and FFDIS.
const HWCR_IGNORED: u64 = 1 << 3 | 1 << 6 | 1 << 8;

/// What `KVM_GET_MSR_INDEX_LIST` answers: the registers that a program has to save to carry a vCPU
/// over. All of them can be read and written back.
pub(crate) static SAVED: &[u32] = &[
    IA32_SYSENTER_CS,
    IA32_SYSENTER_ESP,
    IA32_SYSENTER_EIP,
    IA32_STAR,
    IA32_LSTAR,
    IA32_CSTAR,
    IA32_FMASK,
    IA32_KERNEL_GS_BASE,
    IA32_TSC,
    IA32_TSC_AUX,
    IA32_TSC_ADJUST,
    IA32_PAT,
    IA32_POWER_CTL,
    IA32_TSC_DEADLINE,
    paravirt::OLD_WALL_CLOCK,
    paravirt::OLD_SYSTEM_TIME,
    paravirt::WALL_CLOCK,
    paravirt::SYSTEM_TIME,
    paravirt::STEAL_TIME,
    MSR_HWCR,
    MSR_PLATFORM_INFO,
    IA32_MISC_ENABLE,
    IA32_MCG_STATUS,
    IA32_MCG_CTL,
    IA32_MTRR_DEF_TYPE,
    IA32_MTRR_FIX64K,
    IA32_MTRR_FIX16K[0],
    IA32_MTRR_FIX16K[1],
    IA32_MTRR_FIX4K_FIRST,
    IA32_MTRR_FIX4K_FIRST + 1,
    IA32_MTRR_FIX4K_FIRST + 2,
    IA32_MTRR_FIX4K_FIRST + 3,
    IA32_MTRR_FIX4K_FIRST + 4,
    IA32_MTRR_FIX4K_FIRST + 5,
    IA32_MTRR_FIX4K_FIRST + 6,
    IA32_MTRR_FIX4K_LAST,
    IA32_MTRR_PHYSBASE0,
    IA32_MTRR_PHYSBASE0 + 1,
    IA32_MTRR_PHYSBASE0 + 2,
    IA32_MTRR_PHYSBASE0 + 3,
    IA32_MTRR_PHYSBASE0 + 4,
    IA32_MTRR_PHYSBASE0 + 5,
    IA32_MTRR_PHYSBASE0 + 6,
    IA32_MTRR_PHYSBASE0 + 7,
    IA32_MTRR_PHYSBASE0 + 8,
    IA32_MTRR_PHYSBASE0 + 9,
    IA32_MTRR_PHYSBASE0 + 10,
    IA32_MTRR_PHYSBASE0 + 11,
    IA32_MTRR_PHYSBASE0 + 12,
    IA32_MTRR_PHYSBASE0 + 13,
    IA32_MTRR_PHYSBASE0 + 14,
    IA32_MTRR_LAST_VARIABLE,
];

/// What `KVM_GET_MSR_FEATURE_INDEX_LIST` answers: registers that describe the processor.
pub(crate) static FEATURES: &[u32] = &[
    IA32_ARCH_CAPABILITIES,
    IA32_PERF_CAPABILITIES,
    IA32_BIOS_SIGN_ID,
];

/// The value of a register in [`FEATURES`].
pub(crate) fn feature(index: u32) -> Option<u64> {
    match index {
        IA32_ARCH_CAPABILITIES | IA32_PERF_CAPABILITIES => Some(0),
        IA32_BIOS_SIGN_ID => Some(1 << 32),
        _ => None,
    }
}

/// Registers that hold what was written and mean nothing to the processor: memory types matter
/// only to caches, of which there are none.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    misc_enable: u64,
    power_ctl: u64,
    hwcr: u64,
    platform_info: u64,
    mtrr_def_type: u64,
    mtrr_variable: [u64; 16],
    mtrr_fixed: [u64; 11],
}

impl Default for Stored {
    fn default() -> Self {
        Self {
            // Fast strings.
            misc_enable: 1,
            power_ctl: 0,
            hwcr: 0,
            platform_info: 0,
            mtrr_def_type: 0,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
        }
    }
}

impl Stored {
    fn fixed_index(index: u32) -> Option<usize> {
        match index {
            IA32_MTRR_FIX64K => Some(0),
            _ if IA32_MTRR_FIX16K.contains(&index) => {
                Some(1 + (index - IA32_MTRR_FIX16K[0]) as usize)
            }
            IA32_MTRR_FIX4K_FIRST..=IA32_MTRR_FIX4K_LAST => {
                Some(3 + (index - IA32_MTRR_FIX4K_FIRST) as usize)
            }
            _ => None,
        }
    }

    fn slot(&mut self, index: u32) -> Option<&mut u64> {
        Some(match index {
            IA32_MISC_ENABLE => &mut self.misc_enable,
            IA32_POWER_CTL => &mut self.power_ctl,
            MSR_HWCR => &mut self.hwcr,
            MSR_PLATFORM_INFO => &mut self.platform_info,
            IA32_MTRR_DEF_TYPE => &mut self.mtrr_def_type,
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_LAST_VARIABLE => {
                &mut self.mtrr_variable[(index - IA32_MTRR_PHYSBASE0) as usize]
            }
            _ => &mut self.mtrr_fixed[Self::fixed_index(index)?],
        })
    }

    /// Whether the value may be written there.
    fn allows(index: u32, value: u64) -> bool {
        let is_type = |kind: u64| matches!(kind, 0 | 1 | 4 | 5 | 6);
        match index {
            MSR_HWCR => value & !HWCR_KEPT == 0,
            IA32_MTRR_DEF_TYPE => value & !0xcff == 0 && is_type(value & 0xff),
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_LAST_VARIABLE if index & 1 == 0 => {
                value & 0xf00 == 0 && is_type(value & 0xff)
            }
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_LAST_VARIABLE => value & 0x7ff == 0,
            _ if Self::fixed_index(index).is_some() => value
                .to_le_bytes()
                .into_iter()
                .all(|kind| is_type(kind.into())),
            _ => true,
        }
    }
}

impl VcpuState {
    /// The value of a register, or `None` if the vCPU has no such register. `from_guest` hides what
    /// only the program may see.
    pub(super) fn msr(&mut self, index: u32, from_guest: bool) -> Option<u64> {
        let system = self.cpu.system_registers();
        let msrs = self.cpu.msrs();
        Some(match index {
            IA32_TSC => self.cpu.tsc(),
            IA32_TSC_ADJUST => msrs.tsc_adjust,
            IA32_APIC_BASE => self.apic_base,
            IA32_TSC_DEADLINE => self.lapic.as_ref().map_or(0, Lapic::deadline),
            _ if lapic::X2APIC.contains(&index) => {
                let lapic = self.lapic.as_ref()?;
                if self.apic_base & lapic::base::X2APIC == 0 {
                    return None;
                }
                lapic.read_msr(index, self.cpu.cr8())?
            }
            IA32_PLATFORM_ID | IA32_DEBUGCTL => 0,
            _ if MachineCheck::owns(index) => self.machine_check.read(index, from_guest)?,
            // Eight variable ranges, the fixed ranges, write-combining.
            IA32_MTRRCAP => 0x508,
            IA32_SYSENTER_CS => msrs.sysenter_cs,
            IA32_SYSENTER_ESP => msrs.sysenter_esp,
            IA32_SYSENTER_EIP => msrs.sysenter_eip,
            IA32_PAT => msrs.pat,
            IA32_EFER => system.efer,
            IA32_STAR => msrs.star,
            IA32_LSTAR => msrs.lstar,
            IA32_CSTAR => msrs.cstar,
            IA32_FMASK => msrs.sfmask,
            IA32_FS_BASE => system.fs.base,
            IA32_GS_BASE => system.gs.base,
            IA32_KERNEL_GS_BASE => msrs.kernel_gs_base,
            IA32_TSC_AUX => msrs.tsc_aux,
            _ => match feature(index)
                .or_else(|| chipset_msr::value(index))
                .or_else(|| self.paravirt_msr(index))
            {
                Some(value) => value,
                None => *self.stored_msrs.slot(index)?,
            },
        })
    }

    /// Sets a register. `from_guest` applies the rules of WRMSR that a program's
    /// `KVM_SET_MSRS` is free of. Whether the register exists and takes the value.
    pub(super) fn set_msr(&mut self, index: u32, mut value: u64, from_guest: bool) -> bool {
        match index {
            MSR_HWCR => value &= !HWCR_IGNORED,
            MSR_PLATFORM_INFO if from_guest => return false,
            IA32_APIC_BASE => return self.set_apic_base(value, from_guest),
            IA32_EFER => return self.set_efer(value, from_guest),
            IA32_FS_BASE | IA32_GS_BASE => {
                if !self.is_canonical(value) {
                    return false;
                }
                let mut system = self.cpu.system_registers();
                if index == IA32_FS_BASE {
                    &mut system.fs
                } else {
                    &mut system.gs
                }
                .base = value;
                self.cpu.set_system_registers(&system);
                return true;
            }
            // Read-only for the guest; a program may write back what it read.
            IA32_BIOS_SIGN_ID => return value == 0 || !from_guest,
            IA32_ARCH_CAPABILITIES | IA32_PERF_CAPABILITIES | IA32_PLATFORM_ID => {
                return !from_guest && value == 0;
            }
            IA32_DEBUGCTL => return value == 0,
            _ if MachineCheck::owns(index) => {
                let status_writable = self.stored_msrs.hwcr & HWCR_STATUS_WRITABLE != 0;
                return self
                    .machine_check
                    .write(index, value, from_guest, status_writable);
            }
            _ if chipset_msr::ignores_write(index, value) => return true,
            _ => {}
        }
        if Stored::allows(index, value)
            && let Some(slot) = self.stored_msrs.slot(index)
        {
            *slot = value;
            return true;
        }
        let mut msrs = self.cpu.msrs();
        match index {
            IA32_TSC if from_guest => msrs.write_tsc(value),
            IA32_TSC_ADJUST if from_guest => msrs.write_tsc_adjust(value),
            // The program's value moves nothing.
            IA32_TSC_ADJUST => msrs.tsc_adjust = value,
            IA32_SYSENTER_ESP | IA32_SYSENTER_EIP | IA32_LSTAR | IA32_CSTAR
            | IA32_KERNEL_GS_BASE
                if !self.is_canonical(value) =>
            {
                return false;
            }
            _ if set_instruction_msr(&mut msrs, index, value) => {}
            _ => return false,
        }
        self.cpu.set_msrs(&msrs);
        true
    }

    /// Whether a linear address is sign-extended from the bits that the paging mode gives it.
    fn is_canonical(&self, address: u64) -> bool {
        let wide = self.cpu.system_registers().cr4 & cr4::LA57 != 0;
        is_sign_extended(address, if wide { 57 } else { 48 })
    }

    /// The program sets the time stamp counter.
    pub(super) fn set_tsc(&mut self, value: u64, sync: &Sync) {
        let mut msrs = self.cpu.msrs();
        msrs.tsc_offset = sync.offset(self.tsc_khz, value, msrs.scaled_host_tsc(), true);
        self.cpu.set_msrs(&msrs);
    }

    fn set_apic_base(&mut self, value: u64, from_guest: bool) -> bool {
        let takes = self.takes_base(value, from_guest);
        if takes {
            self.set_base(value);
        }
        takes
    }

    /// Whether IA32_APIC_BASE takes a value: x2APIC mode is there with a local APIC, needs it
    /// enabled, and the guest enters it from the enabled state and leaves it to the disabled one.
    pub(super) fn takes_base(&self, value: u64, from_guest: bool) -> bool {
        const MODE: u64 = lapic::base::X2APIC | lapic::base::ENABLED;
        let valid = ((1 << crate::cpuid::GUEST_ADDRESS_BITS) - 1) & !0x2ff;
        let (before, now) = (self.apic_base & MODE, value & MODE);
        let x2apic = now & lapic::base::X2APIC != 0;
        value & !valid == 0
            && !(x2apic && (now != MODE || self.lapic.is_none()))
            && !(from_guest && before == MODE && now == lapic::base::ENABLED)
            && !(from_guest && before == 0 && now == MODE)
    }

    /// IA32_APIC_BASE has this value from now on.
    pub(super) fn set_base(&mut self, value: u64) {
        self.apic_base = value;
        if let Some(lapic) = &mut self.lapic {
            lapic.set_base(value);
        }
    }

    /// Sets a register of the local APIC; `None` if it is not one.
    pub(super) fn write_apic_msr(
        &mut self,
        index: u32,
        value: u64,
    ) -> Option<Result<Effect, Refused>> {
        if index == IA32_TSC_DEADLINE {
            if let Some(lapic) = &mut self.lapic {
                lapic.set_deadline(value, &self.cpu);
            }
            return Some(Ok(Effect::Timer));
        }
        if !lapic::X2APIC.contains(&index) {
            return None;
        }
        let lapic = self.lapic.as_mut().filter(|lapic| lapic.is_x2apic());
        Some(lapic.map_or(Err(Refused), |lapic| {
            lapic.write_msr(index, value, &mut self.cpu)
        }))
    }

    fn set_efer(&mut self, value: u64, from_guest: bool) -> bool {
        let known = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        if value & !known != 0 {
            return false;
        }
        let mut system = self.cpu.system_registers();
        if from_guest && system.cr0 & cr0::PG != 0 && (value ^ system.efer) & efer::LME != 0 {
            return false;
        }
        // LMA follows CR0.PG and LME; writing it has no effect.
        system.efer = value & !efer::LMA | system.efer & efer::LMA;
        self.cpu.set_system_registers(&system);
        true
    }
}

/// The registers that instructions use. Whether this is one that takes the value.
fn set_instruction_msr(msrs: &mut Msrs, index: u32, value: u64) -> bool {
    let slot = match index {
        IA32_SYSENTER_CS => &mut msrs.sysenter_cs,
        IA32_SYSENTER_ESP => &mut msrs.sysenter_esp,
        IA32_SYSENTER_EIP => &mut msrs.sysenter_eip,
        IA32_PAT => &mut msrs.pat,
        IA32_STAR => &mut msrs.star,
        IA32_LSTAR => &mut msrs.lstar,
        IA32_CSTAR => &mut msrs.cstar,
        IA32_FMASK => &mut msrs.sfmask,
        IA32_KERNEL_GS_BASE => &mut msrs.kernel_gs_base,
        IA32_TSC_AUX => &mut msrs.tsc_aux,
        _ => return false,
    };
    let allowed = match index {
        IA32_PAT => value
            .to_le_bytes()
            .iter()
            .all(|kind| matches!(kind, 0 | 1 | 4..=7)),
        IA32_TSC_AUX => value >> 32 == 0,
        _ => true,
    };
    if allowed {
        *slot = value;
    }
    allowed
}

fn is_sign_extended(address: u64, bits: u32) -> bool {
    let unused = 64 - bits;
    (address as i64) << unused >> unused == address as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_addresses_are_sign_extended_from_their_top_bit() {
        assert!(is_sign_extended(0, 48));
        assert!(is_sign_extended(0x7fff_ffff_ffff, 48));
        assert!(!is_sign_extended(0x8000_0000_0000, 48));
        assert!(is_sign_extended(0x8000_0000_0000, 57));
        assert!(is_sign_extended(0xffff_8000_0000_0000, 48));
    }

    #[test]
    fn memory_types_that_do_not_exist_are_refused() {
        assert!(Stored::allows(IA32_MTRR_DEF_TYPE, 0xc06));
        assert!(!Stored::allows(IA32_MTRR_DEF_TYPE, 0xc02));
        assert!(!Stored::allows(IA32_MTRR_FIX64K, 3));
        assert!(!set_instruction_msr(&mut Msrs::default(), IA32_PAT, 2));
        assert!(set_instruction_msr(
            &mut Msrs::default(),
            IA32_PAT,
            0x0007_0406_0007_0406
        ));
    }
}
