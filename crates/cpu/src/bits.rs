//! Bit tests and scans, BMI, CRC32 and the add-with-carry pair of ADX.

use crate::alu;
use crate::core_state::Core;
use crate::form::{Form, Kind, by_width};
use crate::int::Int;
use crate::op::{Aux, Dst, Handler, Imm, Mem, Op, Place, Read, Segmented, Src, offset};
use crate::state::rflags;
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// The handler for an instruction of this subject.
pub(crate) fn select(form: &Form) -> Option<Handler> {
    match form.mnemonic {
        M::Bt => by_width!(form, T => select_test::<Keep, T>(form)),
        M::Bts => by_width!(form, T => select_test::<Set, T>(form)),
        M::Btr => by_width!(form, T => select_test::<Reset, T>(form)),
        M::Btc => by_width!(form, T => select_test::<Complement, T>(form)),
        M::Bsf => by_width!(form, T => select_scan::<Forward, T>(form)),
        M::Bsr => by_width!(form, T => select_scan::<Backward, T>(form)),
        M::Tzcnt => by_width!(form, T => select_scan::<TrailingZeros, T>(form)),
        M::Lzcnt => by_width!(form, T => select_scan::<LeadingZeros, T>(form)),
        M::Popcnt => by_width!(form, T => select_scan::<Population, T>(form)),
        M::Andn => select_three::<AndNot>(form),
        M::Bextr => select_swapped::<Extract>(form),
        M::Bzhi => select_swapped::<ZeroHigh>(form),
        M::Pdep => select_three::<Deposit>(form),
        M::Pext => select_three::<Gather>(form),
        M::Blsi => select_lowest::<Isolate>(form),
        M::Blsmsk => select_lowest::<Mask>(form),
        M::Blsr => select_lowest::<Clear>(form),
        M::Adcx => select_add_carry::<false>(form),
        M::Adox => select_add_carry::<true>(form),
        M::Crc32 => select_crc(form),
        _ => None,
    }
}

/// What BT and its kin do to the bit after copying it to CF.
trait Change {
    const STORES: bool = true;
    fn change<T: Int>(value: T, bit: T) -> T;
}

struct Keep;
struct Set;
struct Reset;
struct Complement;

impl Change for Keep {
    const STORES: bool = false;
    #[inline(always)]
    fn change<T: Int>(value: T, _bit: T) -> T {
        value
    }
}
impl Change for Set {
    #[inline(always)]
    fn change<T: Int>(value: T, bit: T) -> T {
        value | bit
    }
}
impl Change for Reset {
    #[inline(always)]
    fn change<T: Int>(value: T, bit: T) -> T {
        value & !bit
    }
}
impl Change for Complement {
    #[inline(always)]
    fn change<T: Int>(value: T, bit: T) -> T {
        value ^ bit
    }
}

fn select_test<C: Change, T: Int>(form: &Form) -> Option<Handler> {
    Some(match (form.kinds[0], form.kinds[1]) {
        (Kind::Reg, Kind::Reg) => test::<C, T, Dst, Src>,
        (Kind::Reg, Kind::Imm) => test::<C, T, Dst, Imm>,
        (Kind::Mem, Kind::Imm) => test::<C, T, Mem<Segmented>, Imm>,
        (Kind::Mem, Kind::Reg) => test_string::<C, T>,
        _ => return None,
    })
}

fn test<C: Change, T: Int, D: Place, S: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let index: T = S::read(core, op)?;
    let bit = T::ONE << (index.zero_extend() as u32 & (T::BITS - 1));
    let old = if C::STORES {
        D::modify(core, op, |value: T| C::change(value, bit))?.0
    } else {
        D::read(core, op)?
    };
    core.flags.set_cf(old & bit != T::ZERO);
    Ok(())
}

/// With a register as the bit index, memory is a string of bits: the index, signed, selects the
/// word too.
fn test_string<C: Change, T: Int>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let index = core.reg::<T>(op.src).sign_extend() as i64;
    let word = index >> T::BITS.trailing_zeros();
    let bit = T::ONE << (index as u32 & (T::BITS - 1));
    let bytes = word.wrapping_mul(T::BYTES as i64) as u64;
    let offset = offset(core, op).wrapping_add(bytes) & op.address_mask();
    let linear = core.linear(op.seg, offset, T::BYTES, C::STORES)?;
    if !core.is_canonical(linear) {
        return Err(core.segment_fault(op.seg));
    }
    let old: T = if C::STORES {
        core.rmw(linear, op.lock, |value| C::change(value, bit))?.0
    } else {
        core.load(linear)?
    };
    core.flags.set_cf(old & bit != T::ZERO);
    Ok(())
}

/// A function of one operand: the result, or `None` to leave the destination alone.
trait Scan {
    fn scan<T: Int>(value: T) -> Option<u32>;
    fn flags<T: Int>(core: &mut Core, value: T, result: Option<u32>);
}

struct Forward;
struct Backward;
struct TrailingZeros;
struct LeadingZeros;
struct Population;

impl Scan for Forward {
    fn scan<T: Int>(value: T) -> Option<u32> {
        (value != T::ZERO).then(|| value.trailing())
    }
    fn flags<T: Int>(core: &mut Core, value: T, _result: Option<u32>) {
        core.flags.set_zf(value == T::ZERO);
    }
}
impl Scan for Backward {
    fn scan<T: Int>(value: T) -> Option<u32> {
        (value != T::ZERO).then(|| T::BITS - 1 - value.leading())
    }
    fn flags<T: Int>(core: &mut Core, value: T, _result: Option<u32>) {
        core.flags.set_zf(value == T::ZERO);
    }
}
impl Scan for TrailingZeros {
    fn scan<T: Int>(value: T) -> Option<u32> {
        Some(value.trailing())
    }
    fn flags<T: Int>(core: &mut Core, value: T, result: Option<u32>) {
        core.flags.set_cf(value == T::ZERO);
        core.flags.set_zf(result == Some(0));
    }
}
impl Scan for LeadingZeros {
    fn scan<T: Int>(value: T) -> Option<u32> {
        Some(value.leading())
    }
    fn flags<T: Int>(core: &mut Core, value: T, result: Option<u32>) {
        core.flags.set_cf(value == T::ZERO);
        core.flags.set_zf(result == Some(0));
    }
}
impl Scan for Population {
    fn scan<T: Int>(value: T) -> Option<u32> {
        Some(value.ones())
    }
    fn flags<T: Int>(core: &mut Core, value: T, _result: Option<u32>) {
        core.flags
            .set_arithmetic(if value == T::ZERO { rflags::ZF } else { 0 });
    }
}

fn select_scan<S: Scan, T: Int>(form: &Form) -> Option<Handler> {
    Some(match form.kinds[1] {
        Kind::Mem => scan::<S, T, Mem<Segmented>>,
        _ => scan::<S, T, Src>,
    })
}

fn scan<S: Scan, T: Int, R: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = R::read(core, op)?;
    let result = S::scan(value);
    if let Some(result) = result {
        core.set_reg(op.dst, T::truncate(u64::from(result)));
    }
    S::flags(core, value, result);
    Ok(())
}

/// A function of two operands and its flags.
trait Pair {
    fn value<T: Int>(a: T, b: T) -> T;
    fn flags<T: Int>(core: &mut Core, a: T, b: T, result: T);
}

struct AndNot;
struct Extract;
struct ZeroHigh;
struct Deposit;
struct Gather;

impl Pair for AndNot {
    fn value<T: Int>(a: T, b: T) -> T {
        !a & b
    }
    fn flags<T: Int>(core: &mut Core, _a: T, _b: T, result: T) {
        core.flags.set_logic(result);
    }
}
impl Pair for Extract {
    fn value<T: Int>(a: T, b: T) -> T {
        let start = b.zero_extend() as u32 & 0xff;
        let length = (b.zero_extend() >> 8) as u32 & 0xff;
        let shifted = if start < T::BITS { a >> start } else { T::ZERO };
        if length < T::BITS {
            shifted & low_mask(length)
        } else {
            shifted
        }
    }
    fn flags<T: Int>(core: &mut Core, _a: T, _b: T, result: T) {
        core.flags.set_logic(result);
    }
}
impl Pair for ZeroHigh {
    fn value<T: Int>(a: T, b: T) -> T {
        let length = b.zero_extend() as u32 & 0xff;
        if length < T::BITS {
            a & low_mask(length)
        } else {
            a
        }
    }
    fn flags<T: Int>(core: &mut Core, _a: T, b: T, result: T) {
        let cf = b.zero_extend() as u32 & 0xff >= T::BITS;
        core.flags.set_result(result, cf, false, false);
    }
}
impl Pair for Deposit {
    fn value<T: Int>(a: T, b: T) -> T {
        let (mut result, mut mask, mut from) = (0u64, b.zero_extend(), a.zero_extend());
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if from & 1 != 0 {
                result |= lowest;
            }
            from >>= 1;
            mask ^= lowest;
        }
        T::truncate(result)
    }
    fn flags<T: Int>(_core: &mut Core, _a: T, _b: T, _result: T) {}
}
impl Pair for Gather {
    fn value<T: Int>(a: T, b: T) -> T {
        let (mut result, mut mask, mut place) = (0u64, b.zero_extend(), 1u64);
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if a.zero_extend() & lowest != 0 {
                result |= place;
            }
            place <<= 1;
            mask ^= lowest;
        }
        T::truncate(result)
    }
    fn flags<T: Int>(_core: &mut Core, _a: T, _b: T, _result: T) {}
}

/// Ones in the low `length` bits, fewer than the width.
fn low_mask<T: Int>(length: u32) -> T {
    (T::ONE << length).sub(T::ONE)
}

/// The first source is a register, the second register or memory.
fn select_three<P: Pair>(form: &Form) -> Option<Handler> {
    Some(match (form.width, form.kinds[2]) {
        (4, Kind::Mem) => pair::<P, u32, Src, Mem<Segmented>>,
        (4, _) => pair::<P, u32, Src, Aux>,
        (_, Kind::Mem) => pair::<P, u64, Src, Mem<Segmented>>,
        (_, _) => pair::<P, u64, Src, Aux>,
    })
}

/// The first source is register or memory, the second a register.
fn select_swapped<P: Pair>(form: &Form) -> Option<Handler> {
    Some(match (form.width, form.kinds[1]) {
        (4, Kind::Mem) => pair::<P, u32, Mem<Segmented>, Aux>,
        (4, _) => pair::<P, u32, Src, Aux>,
        (_, Kind::Mem) => pair::<P, u64, Mem<Segmented>, Aux>,
        (_, _) => pair::<P, u64, Src, Aux>,
    })
}

fn pair<P: Pair, T: Int, A: Read, B: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let a: T = A::read(core, op)?;
    let b: T = B::read(core, op)?;
    let result = P::value(a, b);
    core.set_reg(op.dst, result);
    P::flags(core, a, b, result);
    Ok(())
}

/// BLSI, BLSMSK, BLSR: what becomes of the lowest set bit.
trait Lowest {
    fn value<T: Int>(a: T) -> T;
    /// CF, given that the source is zero or not.
    fn carry(zero: bool) -> bool {
        zero
    }
}

struct Isolate;
struct Mask;
struct Clear;

impl Lowest for Isolate {
    fn value<T: Int>(a: T) -> T {
        a & T::ZERO.sub(a)
    }
    fn carry(zero: bool) -> bool {
        !zero
    }
}
impl Lowest for Mask {
    fn value<T: Int>(a: T) -> T {
        a ^ a.sub(T::ONE)
    }
}
impl Lowest for Clear {
    fn value<T: Int>(a: T) -> T {
        a & a.sub(T::ONE)
    }
}

fn select_lowest<L: Lowest>(form: &Form) -> Option<Handler> {
    Some(match (form.width, form.kinds[1]) {
        (4, Kind::Mem) => lowest::<L, u32, Mem<Segmented>>,
        (4, _) => lowest::<L, u32, Src>,
        (_, Kind::Mem) => lowest::<L, u64, Mem<Segmented>>,
        (_, _) => lowest::<L, u64, Src>,
    })
}

fn lowest<L: Lowest, T: Int, R: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let a: T = R::read(core, op)?;
    let result = L::value(a);
    core.set_reg(op.dst, result);
    core.flags
        .set_result(result, L::carry(a == T::ZERO), false, false);
    Ok(())
}

fn select_add_carry<const OVERFLOW: bool>(form: &Form) -> Option<Handler> {
    Some(match (form.width, form.kinds[1]) {
        (4, Kind::Mem) => add_carry::<u32, Mem<Segmented>, OVERFLOW>,
        (4, _) => add_carry::<u32, Src, OVERFLOW>,
        (_, Kind::Mem) => add_carry::<u64, Mem<Segmented>, OVERFLOW>,
        (_, _) => add_carry::<u64, Src, OVERFLOW>,
    })
}

/// ADCX and ADOX: an addition whose carry goes through CF or OF alone.
fn add_carry<T: Int, R: Read, const OVERFLOW: bool>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let b: T = R::read(core, op)?;
    let a: T = core.reg(op.dst);
    let carry = if OVERFLOW {
        core.flags.of()
    } else {
        core.flags.cf()
    };
    let sum = a.add(b).add(T::truncate(u64::from(carry)));
    core.set_reg(op.dst, sum);
    let out = alu::carries(a, b, sum).sign();
    if OVERFLOW {
        core.flags.set_of(out);
    } else {
        core.flags.set_cf(out);
    }
    Ok(())
}

fn select_crc(form: &Form) -> Option<Handler> {
    Some(match (form.source_width(), form.kinds[1]) {
        (1, Kind::Mem) => crc::<u8, Mem<Segmented>>,
        (1, _) => crc::<u8, Src>,
        (2, Kind::Mem) => crc::<u16, Mem<Segmented>>,
        (2, _) => crc::<u16, Src>,
        (4, Kind::Mem) => crc::<u32, Mem<Segmented>>,
        (4, _) => crc::<u32, Src>,
        (_, Kind::Mem) => crc::<u64, Mem<Segmented>>,
        (_, _) => crc::<u64, Src>,
    })
}

fn crc<T: Int, R: Read>(core: &mut Core, op: &Op) -> Result<(), Trap> {
    let value: T = R::read(core, op)?;
    let seed: u32 = core.reg(op.dst);
    let result = crc32c(seed, value.zero_extend(), T::BITS);
    // The destination is 32 or 64 bits wide; either way the upper half becomes zero.
    core.set_reg(op.dst, u64::from(result));
    Ok(())
}

/// The CRC of polynomial 0x11EDC6F41, bit-reflected, of the low `bits` of `value`.
pub(crate) fn crc32c(seed: u32, value: u64, bits: u32) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = seed;
    for byte in value.to_le_bytes().iter().take(bits as usize / 8) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_the_check_string_is_the_published_value() {
        let crc = b"123456789"
            .iter()
            .fold(u32::MAX, |crc, byte| crc32c(crc, (*byte).into(), 8));
        assert_eq!(!crc, 0xe306_9283);
    }

    #[test]
    fn deposit_and_gather_are_inverse_under_the_mask() {
        let mask = 0xf0f0_1234_8000_0001u64;
        for value in [0, 1, 0x55aa_55aa, u64::MAX] {
            let low = value & ((1 << mask.count_ones()) - 1);
            assert_eq!(Gather::value(Deposit::value(value, mask), mask), low);
        }
    }
}
