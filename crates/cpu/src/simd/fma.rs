//! Fused multiplication and addition (FMA).
//!
//! The host's own instructions compute; the tables here only say what is rounded.

use super::host;
use super::operand::{Lanes, Shape, by_shape};
use super::precision::{Roundings, Step, fused_doubles, fused_singles};
use crate::core_state::Core;
use crate::form::Form;
use crate::op::{Handler, Op};
use crate::trap::Trap;
use iced_x86::Mnemonic as M;

/// A handler for a function of the destination and both sources.
macro_rules! fused {
    ($form:expr, $memory:ident, $value:expr, $order:ident, $signs:ident, $format:ident) => {
        by_shape!(binary, $form, $memory, X => |core, op| {
            fused::<X, $order, $signs, $format>(core, op, $value)
        })
    };
}

/// The handler for an instruction of this subject.
pub(super) fn select(form: &Form) -> Option<Handler> {
    Some(match form.mnemonic {
        M::Vfmadd132ps => fused!(form, Aligned, host::vfmadd132ps, Order132, Madd, Singles),
        M::Vfmadd132pd => fused!(form, Aligned, host::vfmadd132pd, Order132, Madd, Doubles),
        M::Vfmadd132ss => fused!(form, Low32, host::vfmadd132ss, Order132, Madd, Single),
        M::Vfmadd132sd => fused!(form, Low64, host::vfmadd132sd, Order132, Madd, Double),
        M::Vfmadd213ps => fused!(form, Aligned, host::vfmadd213ps, Order213, Madd, Singles),
        M::Vfmadd213pd => fused!(form, Aligned, host::vfmadd213pd, Order213, Madd, Doubles),
        M::Vfmadd213ss => fused!(form, Low32, host::vfmadd213ss, Order213, Madd, Single),
        M::Vfmadd213sd => fused!(form, Low64, host::vfmadd213sd, Order213, Madd, Double),
        M::Vfmadd231ps => fused!(form, Aligned, host::vfmadd231ps, Order231, Madd, Singles),
        M::Vfmadd231pd => fused!(form, Aligned, host::vfmadd231pd, Order231, Madd, Doubles),
        M::Vfmadd231ss => fused!(form, Low32, host::vfmadd231ss, Order231, Madd, Single),
        M::Vfmadd231sd => fused!(form, Low64, host::vfmadd231sd, Order231, Madd, Double),
        M::Vfmsub132ps => fused!(form, Aligned, host::vfmsub132ps, Order132, Msub, Singles),
        M::Vfmsub132pd => fused!(form, Aligned, host::vfmsub132pd, Order132, Msub, Doubles),
        M::Vfmsub132ss => fused!(form, Low32, host::vfmsub132ss, Order132, Msub, Single),
        M::Vfmsub132sd => fused!(form, Low64, host::vfmsub132sd, Order132, Msub, Double),
        M::Vfmsub213ps => fused!(form, Aligned, host::vfmsub213ps, Order213, Msub, Singles),
        M::Vfmsub213pd => fused!(form, Aligned, host::vfmsub213pd, Order213, Msub, Doubles),
        M::Vfmsub213ss => fused!(form, Low32, host::vfmsub213ss, Order213, Msub, Single),
        M::Vfmsub213sd => fused!(form, Low64, host::vfmsub213sd, Order213, Msub, Double),
        M::Vfmsub231ps => fused!(form, Aligned, host::vfmsub231ps, Order231, Msub, Singles),
        M::Vfmsub231pd => fused!(form, Aligned, host::vfmsub231pd, Order231, Msub, Doubles),
        M::Vfmsub231ss => fused!(form, Low32, host::vfmsub231ss, Order231, Msub, Single),
        M::Vfmsub231sd => fused!(form, Low64, host::vfmsub231sd, Order231, Msub, Double),
        M::Vfnmadd132ps => fused!(form, Aligned, host::vfnmadd132ps, Order132, Nmadd, Singles),
        M::Vfnmadd132pd => fused!(form, Aligned, host::vfnmadd132pd, Order132, Nmadd, Doubles),
        M::Vfnmadd132ss => fused!(form, Low32, host::vfnmadd132ss, Order132, Nmadd, Single),
        M::Vfnmadd132sd => fused!(form, Low64, host::vfnmadd132sd, Order132, Nmadd, Double),
        M::Vfnmadd213ps => fused!(form, Aligned, host::vfnmadd213ps, Order213, Nmadd, Singles),
        M::Vfnmadd213pd => fused!(form, Aligned, host::vfnmadd213pd, Order213, Nmadd, Doubles),
        M::Vfnmadd213ss => fused!(form, Low32, host::vfnmadd213ss, Order213, Nmadd, Single),
        M::Vfnmadd213sd => fused!(form, Low64, host::vfnmadd213sd, Order213, Nmadd, Double),
        M::Vfnmadd231ps => fused!(form, Aligned, host::vfnmadd231ps, Order231, Nmadd, Singles),
        M::Vfnmadd231pd => fused!(form, Aligned, host::vfnmadd231pd, Order231, Nmadd, Doubles),
        M::Vfnmadd231ss => fused!(form, Low32, host::vfnmadd231ss, Order231, Nmadd, Single),
        M::Vfnmadd231sd => fused!(form, Low64, host::vfnmadd231sd, Order231, Nmadd, Double),
        M::Vfnmsub132ps => fused!(form, Aligned, host::vfnmsub132ps, Order132, Nmsub, Singles),
        M::Vfnmsub132pd => fused!(form, Aligned, host::vfnmsub132pd, Order132, Nmsub, Doubles),
        M::Vfnmsub132ss => fused!(form, Low32, host::vfnmsub132ss, Order132, Nmsub, Single),
        M::Vfnmsub132sd => fused!(form, Low64, host::vfnmsub132sd, Order132, Nmsub, Double),
        M::Vfnmsub213ps => fused!(form, Aligned, host::vfnmsub213ps, Order213, Nmsub, Singles),
        M::Vfnmsub213pd => fused!(form, Aligned, host::vfnmsub213pd, Order213, Nmsub, Doubles),
        M::Vfnmsub213ss => fused!(form, Low32, host::vfnmsub213ss, Order213, Nmsub, Single),
        M::Vfnmsub213sd => fused!(form, Low64, host::vfnmsub213sd, Order213, Nmsub, Double),
        M::Vfnmsub231ps => fused!(form, Aligned, host::vfnmsub231ps, Order231, Nmsub, Singles),
        M::Vfnmsub231pd => fused!(form, Aligned, host::vfnmsub231pd, Order231, Nmsub, Doubles),
        M::Vfnmsub231ss => fused!(form, Low32, host::vfnmsub231ss, Order231, Nmsub, Single),
        M::Vfnmsub231sd => fused!(form, Low64, host::vfnmsub231sd, Order231, Nmsub, Double),
        M::Vfmaddsub132ps => fused!(
            form,
            Aligned,
            host::vfmaddsub132ps,
            Order132,
            MaddSub,
            Singles
        ),
        M::Vfmaddsub132pd => fused!(
            form,
            Aligned,
            host::vfmaddsub132pd,
            Order132,
            MaddSub,
            Doubles
        ),
        M::Vfmaddsub213ps => fused!(
            form,
            Aligned,
            host::vfmaddsub213ps,
            Order213,
            MaddSub,
            Singles
        ),
        M::Vfmaddsub213pd => fused!(
            form,
            Aligned,
            host::vfmaddsub213pd,
            Order213,
            MaddSub,
            Doubles
        ),
        M::Vfmaddsub231ps => fused!(
            form,
            Aligned,
            host::vfmaddsub231ps,
            Order231,
            MaddSub,
            Singles
        ),
        M::Vfmaddsub231pd => fused!(
            form,
            Aligned,
            host::vfmaddsub231pd,
            Order231,
            MaddSub,
            Doubles
        ),
        M::Vfmsubadd132ps => fused!(
            form,
            Aligned,
            host::vfmsubadd132ps,
            Order132,
            MsubAdd,
            Singles
        ),
        M::Vfmsubadd132pd => fused!(
            form,
            Aligned,
            host::vfmsubadd132pd,
            Order132,
            MsubAdd,
            Doubles
        ),
        M::Vfmsubadd213ps => fused!(
            form,
            Aligned,
            host::vfmsubadd213ps,
            Order213,
            MsubAdd,
            Singles
        ),
        M::Vfmsubadd213pd => fused!(
            form,
            Aligned,
            host::vfmsubadd213pd,
            Order213,
            MsubAdd,
            Doubles
        ),
        M::Vfmsubadd231ps => fused!(
            form,
            Aligned,
            host::vfmsubadd231ps,
            Order231,
            MsubAdd,
            Singles
        ),
        M::Vfmsubadd231pd => fused!(
            form,
            Aligned,
            host::vfmsubadd231pd,
            Order231,
            MsubAdd,
            Doubles
        ),
        _ => return None,
    })
}

/// Which operands are multiplied and which is added.
trait Order {
    /// Both factors and the addend.
    fn arrange<T>(destination: T, first: T, second: T) -> [T; 3];
}

struct Order132;
struct Order213;
struct Order231;

impl Order for Order132 {
    fn arrange<T>(destination: T, first: T, second: T) -> [T; 3] {
        [destination, second, first]
    }
}

impl Order for Order213 {
    fn arrange<T>(destination: T, first: T, second: T) -> [T; 3] {
        [first, destination, second]
    }
}

impl Order for Order231 {
    fn arrange<T>(destination: T, first: T, second: T) -> [T; 3] {
        [first, second, destination]
    }
}

/// The signs of product and addend.
trait Signs {
    /// In the even and in the odd lanes.
    const STEPS: [Step; 2];
}

macro_rules! signs {
    ($($name:ident: $even:expr, $odd:expr;)*) => { $(
        struct $name;
        impl Signs for $name {
            const STEPS: [Step; 2] = [$even, $odd];
        }
    )* };
}

const fn step(negate_product: bool, negate_addend: bool) -> Step {
    Step::Fused {
        negate_product,
        negate_addend,
    }
}

signs! {
    Madd: step(false, false), step(false, false);
    Msub: step(false, true), step(false, true);
    Nmadd: step(true, false), step(true, false);
    Nmsub: step(true, true), step(true, true);
    MaddSub: step(false, true), step(false, false);
    MsubAdd: step(false, false), step(false, true);
}

/// The lanes that are computed.
trait Format {
    fn roundings(steps: [Step; 2], operands: [u128; 3]) -> Roundings;
}

struct Singles;
struct Doubles;
struct Single;
struct Double;

impl Format for Singles {
    fn roundings([even, odd]: [Step; 2], [a, b, c]: [u128; 3]) -> Roundings {
        fused_singles([even, odd, even, odd], a, b, c)
    }
}

impl Format for Doubles {
    fn roundings(steps: [Step; 2], [a, b, c]: [u128; 3]) -> Roundings {
        fused_doubles(steps, a, b, c)
    }
}

impl Format for Single {
    fn roundings([low, _]: [Step; 2], [a, b, c]: [u128; 3]) -> Roundings {
        fused_singles([low], a, b, c)
    }
}

impl Format for Double {
    fn roundings([low, _]: [Step; 2], [a, b, c]: [u128; 3]) -> Roundings {
        fused_doubles([low], a, b, c)
    }
}

#[inline(always)]
fn fused<X: Shape, O: Order, S: Signs, F: Format>(
    core: &mut Core,
    op: &Op,
    compute: impl Fn(u128, u128, u128) -> u128,
) -> Result<(), Trap> {
    let c = X::second(core, op)?;
    let b = X::first(core, op);
    let a = X::Value::get(core, op.dst);
    let result = if core.float_is_live() {
        a.zip3(b, c, compute)
    } else {
        core.float_exact(&|| a.zip3(b, c, &compute), &|| {
            let [a, b, c] = O::arrange(a, b, c);
            a.fold3(b, c, Roundings::default(), |all, a, b, c| {
                all.and(F::roundings(S::STEPS, [a, b, c]))
            })
        })?
    };
    X::store(core, op, result);
    Ok(())
}
