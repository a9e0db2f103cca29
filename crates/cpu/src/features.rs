//! Which features of the instruction set this processor has. What [`crate::cpuid::supported`] tells
//! a guest says the same; a test holds the two together.

use crate::random::Sources;
use crate::simd::Host;
use iced_x86::CpuidFeature;

/// Whether the processor has a feature. An instruction of one that it has not is an invalid opcode,
/// as on every processor without that feature.
pub(crate) fn has(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::ADX
        | F::BMI1
        | F::BMI2
        | F::CLFLUSHOPT
        | F::CLFSH
        | F::CLWB
        | F::CMOV
        | F::CMPXCHG16B
        | F::CPUID
        | F::CX8
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::FSGSBASE
        | F::FXSR
        | F::INVPCID
        | F::LZCNT
        | F::MOVBE
        | F::MSR
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::PKU
        | F::POPCNT
        | F::PREFETCHW
        | F::RDPID
        | F::RDPMC
        | F::RDTSCP
        | F::SEP
        | F::SERIALIZE
        | F::SMAP
        | F::SYSCALL
        | F::TSC
        | F::XSAVE
        | F::XSAVEC
        | F::XSAVEOPT => true,
        F::RDRAND => Sources::detected().rdrand,
        F::RDSEED => Sources::detected().rdseed,
        vector => Host::detected().offers(vector),
    }
}
