//! Singles to halves (F16C). The opposite direction is an ordinary widening.

use super::host;
use super::operand::{Lanes, One, Two};
use super::precision::{Roundings, Step, singles};
use crate::core_state::Core;
use crate::form::{Form, Kind};
use crate::op::{Address as _, Handler, Op, Segmented};
use crate::trap::Trap;
use bytemuck::must_cast;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match (form.mnemonic, form.kinds[0], form.is_wide()) {
        // The flags that the conversion leaves must not be there if the store faults.
        (M::Vcvtps2ph, Kind::Mem, false) => |core, op| {
            let linear = Segmented::for_write(core, op, 8)?;
            core.touch_write(linear, 8)?;
            let halves = narrow::<One>(core, op)?;
            core.store(linear, halves as u64)
        },
        (M::Vcvtps2ph, Kind::Mem, true) => |core, op| {
            let linear = Segmented::for_write(core, op, 16)?;
            core.touch_write(linear, 16)?;
            let halves = narrow::<Two>(core, op)?;
            core.store(linear, halves)
        },
        (M::Vcvtps2ph, _, false) => |core, op| {
            let halves = narrow::<One>(core, op)?;
            [halves].put_cleared(core, op.dst);
            Ok(())
        },
        (M::Vcvtps2ph, _, true) => |core, op| {
            let halves = narrow::<Two>(core, op)?;
            [halves].put_cleared(core, op.dst);
            Ok(())
        },
        _ => return None,
    })
}

/// Each lane to half of a lane, packed.
fn narrow<V: Lanes>(core: &mut Core, op: &Op) -> Result<u128, Trap> {
    let value = V::get(core, op.src);
    let immediate = op.imm as u8;
    let underflow = core.has_unmasked_underflow();
    let compute = || {
        value.map(|lane| {
            if underflow && has_exact_tiny(lane) {
                signal_exact_tiny();
            }
            host::vcvtps2ph(lane, immediate)
        })
    };
    let roundings = || {
        value.fold(value, Roundings::default(), |all, lane, _| {
            let control = u128::from(immediate);
            let control = (0..4).fold(0, |all, i| all | control << (32 * i));
            all.and(singles([Step::NarrowHalf; 4], lane, control))
        })
    };
    let halves = core.float_exact(&compute, &roundings)?;
    // Each lane's halves are in its lower 64 bits.
    Ok(halves
        .fold(halves, (0, 0), |(all, at), lane, _| {
            (all | (lane & u128::from(u64::MAX)) << at, at + 64)
        })
        .0)
}

/// Whether a single becomes a denormal half without loss: an underflow only if that is unmasked.
fn has_exact_tiny(lane: u128) -> bool {
    let lanes: [u32; 4] = must_cast(lane);
    lanes.into_iter().any(|bits| {
        let exponent = (bits >> 23 & 0xff) as i32 - 127;
        // Halves are normal from 2^-14 on, and their last digit is worth 2^-24.
        let significand = bits & 0x7f_ffff | 0x80_0000;
        let last = exponent - 23 + significand.trailing_zeros() as i32;
        (-24..-14).contains(&exponent) && last >= -24
    })
}

/// Leaves the flag of an exact tiny result in MXCSR as arithmetic does, which the conversion does
/// not: only while results are flushed to zero.
fn signal_exact_tiny() {
    const SMALLEST_NORMAL: u128 = 0x0080_0000;
    const HALF: u128 = 0x3f00_0000;
    host::mulss(SMALLEST_NORMAL, HALF);
}
