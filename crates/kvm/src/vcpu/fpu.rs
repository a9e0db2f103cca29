//! x87, SSE and AVX state and PKRU: `KVM_GET_FPU`, `KVM_GET_XSAVE`, `KVM_GET_XCRS` and their opposites.

use super::VcpuState;
use kvm_bindings::{kvm_fpu, kvm_xcr, kvm_xcrs};
use rustix::io::Errno;
use twofold_cpu::FpuState;
use twofold_cpu::state::xcr0;
use twofold_cpu::xsave;

/// Words in `struct kvm_xsave`: 4096 bytes.
pub(crate) const XSAVE_WORDS: usize = 1024;
/// Bits of MXCSR that exist.
const MXCSR_MASK: u32 = 0xffff;

/// Offsets in an XSAVE area, in bytes (SDM Vol. 1, "XSAVE Area").
mod offset {
    pub(super) const FIP: usize = 8;
    pub(super) const FDP: usize = 16;
    pub(super) const MXCSR: usize = 24;
    pub(super) const MXCSR_MASK: usize = 28;
    pub(super) const ST: usize = 32;
    pub(super) const XMM: usize = 160;
    pub(super) const XSTATE_BV: usize = 512;
    /// XCOMP_BV and the reserved rest of the header.
    pub(super) const HEADER_REST: std::ops::Range<usize> = 520..576;
}

impl VcpuState {
    /// `KVM_GET_FPU`
    pub(super) fn fpu(&self) -> kvm_fpu {
        let fpu = self.cpu.fpu();
        kvm_fpu {
            fpr: fpu.st.map(u128::to_le_bytes),
            fcw: fpu.fcw,
            fsw: fpu.fsw,
            ftwx: fpu.ftw,
            pad1: 0,
            last_opcode: fpu.fop,
            last_ip: fpu.fip,
            last_dp: fpu.fdp,
            xmm: fpu.xmm.map(u128::to_le_bytes),
            mxcsr: fpu.mxcsr,
            pad2: 0,
        }
    }

    /// `KVM_SET_FPU`
    pub(super) fn set_fpu(&mut self, fpu: &kvm_fpu) {
        self.cpu.set_fpu(&FpuState {
            fcw: fpu.fcw,
            fsw: fpu.fsw,
            ftw: fpu.ftwx,
            fop: fpu.last_opcode,
            fip: fpu.last_ip,
            fdp: fpu.last_dp,
            st: fpu.fpr.map(u128::from_le_bytes),
            mxcsr: fpu.mxcsr,
            xmm: fpu.xmm.map(u128::from_le_bytes),
            ..self.cpu.fpu()
        });
    }

    /// `KVM_GET_XSAVE` and `KVM_GET_XSAVE2`: an XSAVE area in the standard format, with every component
    /// that the guest may have.
    pub(super) fn xsave(&self) -> [u32; XSAVE_WORDS] {
        let fpu = self.cpu.fpu();
        let mut area = [0_u8; XSAVE_WORDS * 4];
        let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &fpu.fcw.to_le_bytes());
        put(2, &fpu.fsw.to_le_bytes());
        put(4, &[fpu.ftw]);
        put(6, &fpu.fop.to_le_bytes());
        put(offset::FIP, &fpu.fip.to_le_bytes());
        put(offset::FDP, &fpu.fdp.to_le_bytes());
        put(offset::MXCSR, &fpu.mxcsr.to_le_bytes());
        put(offset::MXCSR_MASK, &MXCSR_MASK.to_le_bytes());
        for (index, value) in fpu.st.iter().enumerate() {
            put(offset::ST + 16 * index, &value.to_le_bytes());
        }
        for (index, value) in fpu.xmm.iter().enumerate() {
            put(offset::XMM + 16 * index, &value.to_le_bytes());
        }
        let components = self.cpu.xcr0_allowed() | xcr0::X87 | xcr0::SSE;
        if components & xcr0::AVX != 0 {
            for (index, value) in fpu.ymm_high.iter().enumerate() {
                put(avx_offset() + 16 * index, &value.to_le_bytes());
            }
        }
        if components & xcr0::PKRU != 0 {
            put(pkru_offset(), &self.cpu.msrs().pkru.to_le_bytes());
        }
        put(offset::XSTATE_BV, &components.to_le_bytes());
        let mut words = [0; XSAVE_WORDS];
        for (word, bytes) in words.iter_mut().zip(area.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }

    /// `KVM_SET_XSAVE`: `EINVAL` for components that the processor does not have, for anything in
    /// the reserved part of the header, and for reserved bits of MXCSR. Components that are not in
    /// the area get their initial configuration, but for PKRU, which is left alone.
    pub(super) fn set_xsave(&mut self, words: &[u32; XSAVE_WORDS]) -> Result<(), Errno> {
        let mut area = [0_u8; XSAVE_WORDS * 4];
        for (bytes, word) in area.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        let present = u64::from_le_bytes(part(&area, offset::XSTATE_BV));
        if present & !xsave::components() != 0
            || area[offset::HEADER_REST].iter().any(|byte| *byte != 0)
        {
            return Err(Errno::INVAL);
        }
        let mxcsr = u32::from_le_bytes(part(&area, offset::MXCSR));
        let with_mxcsr = present & (xcr0::X87 | xcr0::SSE | xcr0::AVX) != 0;
        if with_mxcsr && mxcsr & !MXCSR_MASK != 0 {
            return Err(Errno::INVAL);
        }
        let mut fpu = FpuState::default();
        if with_mxcsr {
            fpu.mxcsr = mxcsr;
        }
        if present & xcr0::X87 != 0 {
            fpu.fcw = u16::from_le_bytes(part(&area, 0));
            fpu.fsw = u16::from_le_bytes(part(&area, 2));
            fpu.ftw = area[4];
            fpu.fop = u16::from_le_bytes(part(&area, 6));
            fpu.fip = u64::from_le_bytes(part(&area, offset::FIP));
            fpu.fdp = u64::from_le_bytes(part(&area, offset::FDP));
            for (index, value) in fpu.st.iter_mut().enumerate() {
                *value = u128::from_le_bytes(part(&area, offset::ST + 16 * index));
            }
        }
        if present & xcr0::SSE != 0 {
            for (index, value) in fpu.xmm.iter_mut().enumerate() {
                *value = u128::from_le_bytes(part(&area, offset::XMM + 16 * index));
            }
        }
        if present & xcr0::AVX != 0 {
            for (index, value) in fpu.ymm_high.iter_mut().enumerate() {
                *value = u128::from_le_bytes(part(&area, avx_offset() + 16 * index));
            }
        }
        self.cpu.set_fpu(&fpu);
        if present & xcr0::PKRU != 0 {
            let mut msrs = self.cpu.msrs();
            msrs.pkru = u32::from_le_bytes(part(&area, pkru_offset()));
            self.cpu.set_msrs(&msrs);
        }
        Ok(())
    }

    /// `KVM_GET_XCRS`
    pub(super) fn xcrs(&self) -> kvm_xcrs {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0] = kvm_xcr {
            xcr: 0,
            reserved: 0,
            value: self.cpu.msrs().xcr0,
        };
        xcrs
    }

    /// `KVM_SET_XCRS`: `EINVAL` for more registers than the structure holds, for a flag, and for
    /// an XCR0 that the processor cannot hold.
    pub(super) fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        let count = xcrs.nr_xcrs as usize;
        if count > xcrs.xcrs.len() || xcrs.flags != 0 {
            return Err(Errno::INVAL);
        }
        // Registers other than XCR0 are ignored, and so is a second value for it.
        if let Some(register) = xcrs.xcrs[..count].iter().find(|register| register.xcr == 0) {
            if !self.cpu.may_hold_xcr0(register.value) {
                return Err(Errno::INVAL);
            }
            let mut msrs = self.cpu.msrs();
            msrs.xcr0 = register.value;
            self.cpu.set_msrs(&msrs);
        }
        Ok(())
    }
}

fn avx_offset() -> usize {
    xsave::AVX_PLACE.offset as usize
}

fn pkru_offset() -> usize {
    xsave::pkru_place().offset as usize
}

fn part<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&area[at..at + N]);
    bytes
}
