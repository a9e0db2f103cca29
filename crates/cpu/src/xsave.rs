//! XSAVE and its relatives, and XCR0: state that an operating system need not know to save (SDM
//! Vol. 1, "Managing State Using the XSAVE Feature Set").
//!
//! An area is the FXSAVE image, a header, and the components behind it: at places that CPUID names
//! (standard format), or one behind the other (compacted format).

use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Address, Handler, Op, Segmented};
use crate::protection_keys::PKRU_BYTES;
use crate::simd::image::{BEFORE_VECTORS, decode_x87, encode_mxcsr, encode_x87, vector_count};
use crate::simd::{Host, mxcsr};
use crate::state::{FpuState, cr0, cr4, gpr, xcr0};
use crate::system::{pair, set_pair};
use crate::trap::Trap;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use iced_x86::Mnemonic as M;
use std::sync::LazyLock;

/// Bytes of the FXSAVE image.
const LEGACY: u64 = 512;
/// Where the components behind the header begin.
const EXTENDED: u64 = LEGACY + HEADER;
/// Bytes of the header: XSTATE_BV, XCOMP_BV, six reserved words.
const HEADER: u64 = 64;
/// Where MXCSR and its mask are.
const MXCSR: u64 = 24;
/// Where XMM0 is.
const XMM: u64 = 160;
/// Bytes of the AVX component.
const AVX_BYTES: u64 = 256;
/// XCOMP_BV: the area is in compacted format.
const COMPACTED: u64 = 1 << 63;
/// KVM's `struct kvm_xsave` holds so many bytes.
const LARGEST_AREA: u32 = 4096;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Xgetbv => xgetbv,
        M::Xsetbv => xsetbv,
        M::Xsave => save::<Plain, false>,
        M::Xsave64 => save::<Plain, true>,
        M::Xsaveopt => save::<Optimized, false>,
        M::Xsaveopt64 => save::<Optimized, true>,
        M::Xsavec => save::<Compact, false>,
        M::Xsavec64 => save::<Compact, true>,
        M::Xrstor => restore::<false>,
        M::Xrstor64 => restore::<true>,
        _ => return None,
    })
}

/// State components that the processor has: the bits of [`xcr0`].
pub fn components() -> u64 {
    let avx = if Host::detected().avx { xcr0::AVX } else { 0 };
    xcr0::X87 | xcr0::SSE | avx | xcr0::PKRU
}

/// Where a component behind the header lies in the standard format, and its size, both in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Offset from the beginning of the area.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
}

/// The upper halves of the YMM registers in the standard format.
pub const AVX_PLACE: Place = Place {
    offset: EXTENDED as u32,
    size: AVX_BYTES as u32,
};

/// The first byte behind the upper halves of the YMM registers.
const BEHIND_AVX: u32 = AVX_PLACE.offset + AVX_PLACE.size;

/// Whether the host's processor has PKRU, so that [`pkru_place`] is also what its CPUID says.
pub fn host_has_pkru() -> bool {
    host_pkru_offset().is_some()
}

/// Where the host puts PKRU in the standard format.
fn host_pkru_offset() -> Option<u32> {
    static OFFSET: LazyLock<Option<u32>> = LazyLock::new(|| {
        if __cpuid(0).eax < 0xd {
            return None;
        }
        let host = __cpuid_count(0xd, xcr0::PKRU.trailing_zeros());
        let fits = BEHIND_AVX..=LARGEST_AREA - PKRU_BYTES;
        (host.eax == PKRU_BYTES && fits.contains(&host.ebx)).then_some(host.ebx)
    });
    *OFFSET
}

/// PKRU in the standard format. Where the host has it too, it lies where the host puts it: programs
/// such as QEMU take the layout of `KVM_GET_XSAVE` from the CPUID instruction, not from KVM.
pub fn pkru_place() -> Place {
    Place {
        offset: host_pkru_offset().unwrap_or(BEHIND_AVX),
        size: PKRU_BYTES,
    }
}

/// Bytes of an area in standard format that holds the components of a bitmap.
pub fn standard_bytes(components: u64) -> u64 {
    if components & xcr0::PKRU != 0 {
        let place = pkru_place();
        u64::from(place.offset + place.size)
    } else if components & xcr0::AVX != 0 {
        EXTENDED + AVX_BYTES
    } else {
        EXTENDED
    }
}

/// Bytes of an area in compacted format that has room for the components of a bitmap.
pub fn compacted_bytes(components: u64) -> u64 {
    let pkru = if components & xcr0::PKRU != 0 {
        u64::from(PKRU_BYTES)
    } else {
        0
    };
    compacted_pkru(components) + pkru
}

/// Where PKRU lies in the compacted format.
fn compacted_pkru(components: u64) -> u64 {
    EXTENDED
        + if components & xcr0::AVX != 0 {
            AVX_BYTES
        } else {
            0
        }
}

fn require_osxsave(core: &mut Core) -> Result<(), Trap> {
    if core.cr4 & cr4::OSXSAVE == 0 {
        return Err(core.invalid_opcode());
    }
    Ok(())
}

/// XGETBV of XCR0, and of which of its components are not in their initial configuration.
fn xgetbv(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    require_osxsave(core)?;
    let value = match core.reg::<u32>(gpr::RCX as u8) {
        0 => core.msrs.xcr0,
        1 => core.msrs.xcr0 & core.in_use(),
        _ => return Err(core.general_protection(0)),
    };
    set_pair(core, value);
    Ok(())
}

fn xsetbv(core: &mut Core, _op: &Op) -> Result<(), Trap> {
    require_osxsave(core)?;
    core.require_ring_0()?;
    let value = pair(core);
    if core.reg::<u32>(gpr::RCX as u8) != 0 || !core.may_hold_xcr0(value) {
        return Err(core.general_protection(0));
    }
    core.msrs.xcr0 = value;
    core.update_mode();
    Ok(())
}

impl Core {
    /// Whether XCR0 takes a value: x87 state is always enabled, AVX needs SSE, and nothing is enabled
    /// that is not there.
    pub(crate) fn may_hold_xcr0(&self, value: u64) -> bool {
        value & xcr0::X87 != 0
            && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0)
            && value & !self.xcr0_allowed == 0
    }

    /// Whether the operating system has enabled AVX by CR4.OSXSAVE and XCR0.
    pub(crate) fn avx_is_enabled(&self) -> bool {
        const STATE: u64 = xcr0::SSE | xcr0::AVX;
        self.cr4 & cr4::OSXSAVE != 0 && self.msrs.xcr0 & STATE == STATE
    }

    /// The components that are not in their initial configuration (XINUSE). MXCSR does not count.
    fn in_use(&self) -> u64 {
        let state = &self.vectors;
        let initial = FpuState::default();
        let count = vector_count(self);
        let x87 = state.fcw != initial.fcw
            || state.fsw != 0
            || state.ftw != 0
            || state.fop != 0
            || state.fip != 0
            || state.fdp != 0
            || state.st != initial.st;
        let any = |registers: &[u128; 16]| registers[..count].iter().any(|&value| value != 0);
        [
            (x87, xcr0::X87),
            (any(&state.xmm), xcr0::SSE),
            (any(&state.ymm_high), xcr0::AVX),
            (self.msrs.pkru != 0, xcr0::PKRU),
        ]
        .into_iter()
        .filter(|(used, _)| *used)
        .fold(0, |all, (_, component)| all | component)
    }
}

/// The address of the area, of which `bytes` are used, after the checks that every instruction makes.
fn area(core: &mut Core, op: &Op, write: bool, bytes: u64) -> Result<u64, Trap> {
    require_osxsave(core)?;
    if core.cr0 & cr0::TS != 0 {
        return Err(core.device_not_available());
    }
    // Where it begins is looked at before its length.
    if Segmented::for_read(core, op, 1)? & 63 != 0 {
        return Err(core.general_protection(0));
    }
    if write {
        Segmented::for_write(core, op, bytes)
    } else {
        Segmented::for_read(core, op, bytes)
    }
}

/// What tells the instructions that save from each other.
trait Saving {
    /// The area is in compacted format, and its header is replaced.
    const COMPACTED: bool;
    /// Components in their initial configuration are not written.
    const SKIPS_INITIAL: bool;
}

/// XSAVE.
struct Plain;
/// XSAVEOPT. That a component has not been modified since it was restored is never known.
struct Optimized;
/// XSAVEC.
struct Compact;

impl Saving for Plain {
    const COMPACTED: bool = false;
    const SKIPS_INITIAL: bool = false;
}

impl Saving for Optimized {
    const COMPACTED: bool = false;
    const SKIPS_INITIAL: bool = true;
}

impl Saving for Compact {
    const COMPACTED: bool = true;
    const SKIPS_INITIAL: bool = true;
}

fn save<S: Saving, const WIDE: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let requested = pair(core) & core.msrs.xcr0;
    let bytes = if S::COMPACTED {
        compacted_bytes(requested)
    } else {
        standard_bytes(requested)
    };
    let linear = area(core, op, true, bytes)?;
    core.touch_write(linear, bytes)?;

    let mxcsr = core.mxcsr();
    let mut in_use = core.in_use();
    if S::COMPACTED && mxcsr != mxcsr::DEFAULT {
        in_use |= xcr0::SSE;
    }
    let saved = if S::SKIPS_INITIAL {
        requested & in_use
    } else {
        requested
    };
    let count = vector_count(core);
    let at = |offset: u64| linear.wrapping_add(offset);
    if saved & xcr0::X87 != 0 {
        let image = encode_x87::<WIDE>(&core.vectors);
        core.store(at(0), image[0])?;
        core.store(at(16), image[1] as u64)?;
        for (i, &paragraph) in (0u64..).zip(&image).skip(2) {
            core.store(at(16 * i), paragraph)?;
        }
    }
    let with_mxcsr = if S::COMPACTED {
        saved & xcr0::SSE
    } else {
        requested & (xcr0::SSE | xcr0::AVX)
    };
    if with_mxcsr != 0 {
        core.store(at(MXCSR), encode_mxcsr(mxcsr))?;
    }
    if saved & xcr0::SSE != 0 {
        let registers = core.vectors.xmm;
        store_registers(core, at(XMM), &registers[..count])?;
    }
    if saved & xcr0::AVX != 0 {
        let registers = core.vectors.ymm_high;
        store_registers(core, at(EXTENDED), &registers[..count])?;
    }
    if saved & xcr0::PKRU != 0 {
        let offset = if S::COMPACTED {
            compacted_pkru(requested)
        } else {
            pkru_place().offset.into()
        };
        core.store(at(offset), u64::from(core.msrs.pkru))?;
    }
    if S::COMPACTED {
        core.store(at(LEGACY), saved)?;
        core.store(at(LEGACY + 8), requested | COMPACTED)
    } else {
        let before: u64 = core.load(at(LEGACY))?;
        core.store(at(LEGACY), before & !requested | in_use & requested)
    }
}

fn store_registers(core: &mut Core, linear: u64, registers: &[u128]) -> Result<(), Trap> {
    for (i, &register) in (0u64..).zip(registers) {
        core.store(linear.wrapping_add(16 * i), register)?;
    }
    Ok(())
}

fn load_registers(core: &mut Core, linear: u64, registers: &mut [u128]) -> Result<(), Trap> {
    for (i, register) in (0u64..).zip(registers) {
        *register = core.load(linear.wrapping_add(16 * i))?;
    }
    Ok(())
}

/// An area's header.
struct Header {
    present: u64,
    layout: u64,
}

impl Header {
    /// Reads a header. #GP for what no instruction writes, and for components that are not enabled.
    fn read(core: &mut Core, linear: u64) -> Result<Self, Trap> {
        let mut words = [0u64; 8];
        for (i, word) in (0u64..).zip(&mut words) {
            *word = core.load(linear.wrapping_add(LEGACY + 8 * i))?;
        }
        let [present, layout, reserved @ ..] = words;
        let enabled = core.msrs.xcr0;
        let valid = if layout & COMPACTED != 0 {
            layout & !COMPACTED & !enabled == 0
                && present & !(layout & !COMPACTED) == 0
                && reserved == [0; 6]
        } else {
            layout == 0 && present & !enabled == 0 && reserved[0] == 0
        };
        if valid {
            Ok(Self { present, layout })
        } else {
            Err(core.general_protection(0))
        }
    }

    fn is_compacted(&self) -> bool {
        self.layout & COMPACTED != 0
    }
}

/// XRSTOR. What is not in the area is set to its initial configuration.
fn restore<const WIDE: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let requested = pair(core) & core.msrs.xcr0;
    let linear = area(core, op, false, EXTENDED)?;
    // If there is no area, the fault is at its beginning.
    core.load::<u8>(linear)?;
    let header = Header::read(core, linear)?;
    let at = |offset: u64| linear.wrapping_add(offset);
    let count = vector_count(core);
    let loaded = requested & header.present;
    let initial = FpuState::default();
    let mut state = core.vectors;
    let mut mxcsr = core.mxcsr();
    let mut pkru = core.msrs.pkru;
    if loaded & xcr0::X87 != 0 {
        let mut image = [0; BEFORE_VECTORS];
        load_registers(core, at(0), &mut image)?;
        decode_x87::<WIDE>(&image, &mut state);
    } else if requested & xcr0::X87 != 0 {
        state = FpuState {
            mxcsr: state.mxcsr,
            xmm: state.xmm,
            ymm_high: state.ymm_high,
            ..initial
        };
    }
    // The standard format has MXCSR even where it has no XMM registers.
    let with_mxcsr = if header.is_compacted() {
        loaded & xcr0::SSE
    } else {
        requested & (xcr0::SSE | xcr0::AVX)
    };
    if with_mxcsr != 0 {
        mxcsr = core.load(at(MXCSR))?;
        if mxcsr::has_reserved_bits(mxcsr) {
            return Err(core.general_protection(0));
        }
    } else if requested & xcr0::SSE != 0 {
        mxcsr = mxcsr::DEFAULT;
    }
    if loaded & xcr0::SSE != 0 {
        load_registers(core, at(XMM), &mut state.xmm[..count])?;
    } else if requested & xcr0::SSE != 0 {
        state.xmm[..count].fill(0);
    }
    if loaded & xcr0::AVX != 0 {
        load_registers(core, at(EXTENDED), &mut state.ymm_high[..count])?;
    } else if requested & xcr0::AVX != 0 {
        state.ymm_high[..count].fill(0);
    }
    if loaded & xcr0::PKRU != 0 {
        let offset = if header.is_compacted() {
            compacted_pkru(header.layout)
        } else {
            pkru_place().offset.into()
        };
        pkru = core.load(at(offset))?;
    } else if requested & xcr0::PKRU != 0 {
        pkru = 0;
    }
    core.vectors = state;
    core.set_mxcsr(mxcsr);
    core.set_pkru(pkru);
    Ok(())
}
