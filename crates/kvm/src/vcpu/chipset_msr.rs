//! Registers of processors' surroundings (northbridge, power, debugging of the silicon) that guests
//! use without asking CPUID. They mean nothing here; as with KVM they read as a constant, and some
//! may be written.

const IA32_EBL_CR_POWERON: u32 = 0x2a;
const EBC_FREQUENCY_ID: u32 = 0x2c;
const IA32_UCODE_WRITE: u32 = 0x79;
const IA32_PERF_STATUS: u32 = 0x198;
const IA32_PERF_CTL: u32 = 0x199;
const AMD_SYSCFG: u32 = 0xc001_0010;
const AMD_NB_CFG: u32 = 0xc001_001f;
const AMD_PATCH_LOADER: u32 = 0xc001_0020;
const AMD_INT_PENDING: u32 = 0xc001_0055;
const AMD_MMIO_CONF_BASE: u32 = 0xc001_0058;
const AMD_TSEG_ADDR: u32 = 0xc001_0112;
const AMD_TSEG_MASK: u32 = 0xc001_0113;
const AMD_DC_CFG: u32 = 0xc001_1022;
const AMD_TW_CFG: u32 = 0xc001_1023;
const AMD_BU_CFG2: u32 = 0xc001_102a;

/// What a register always reads as.
pub(super) fn value(index: u32) -> Option<u64> {
    match index {
        IA32_EBL_CR_POWERON | IA32_PERF_CTL | AMD_SYSCFG | AMD_NB_CFG | AMD_INT_PENDING
        | AMD_MMIO_CONF_BASE | AMD_TSEG_ADDR | AMD_TSEG_MASK | AMD_DC_CFG | AMD_TW_CFG
        | AMD_BU_CFG2 => Some(0),
        // The bus clock of a Pentium 4: 133 MHz.
        EBC_FREQUENCY_ID => Some(1 << 24),
        // A ratio of 4, at 1000 mV.
        IA32_PERF_STATUS => Some(4 << 40 | 1000),
        _ => None,
    }
}

/// Whether a write goes through, to no effect.
pub(super) fn ignores_write(index: u32, value: u64) -> bool {
    match index {
        IA32_UCODE_WRITE | AMD_PATCH_LOADER | AMD_NB_CFG | AMD_DC_CFG | AMD_BU_CFG2 => true,
        AMD_MMIO_CONF_BASE => value == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_that_takes_any_value_still_reads_as_its_constant() {
        assert!(ignores_write(AMD_NB_CFG, 5));
        assert_eq!(value(AMD_NB_CFG), Some(0));
        assert!(!ignores_write(AMD_SYSCFG, 0));
        assert_eq!(value(IA32_UCODE_WRITE), None);
    }
}
