//! The host's own vector instructions, as functions over values.
//!
//! The guest's processor and the host's have the same vector instructions, so what one computes is
//! asked of the other: results, NaN payloads, rounding and approximations are the host's, bit for
//! bit. Every function here executes one instruction on values that were fetched before and gives
//! its result back; none touches memory.
//!
//! The integer instructions depend on nothing but their operands. The floating-point ones obey
//! the control bits of MXCSR and set its sticky flags; they are called through
//! [`Core::float`](crate::core_state::Core), which puts the guest's MXCSR in place with every
//! exception masked. They are volatile to the compiler, so that they stay on their side of the
//! instructions that read and write MXCSR.
//!
//! SSE2 is part of every x86-64 processor. What came later is only called by handlers that
//! `select` gives out after asking [`Host`](super::Host).
#![expect(unsafe_code)]
// UNSAFETY: instructions that the compiler must not replace, move or fold are inline assembly.

use bytemuck::must_cast;
use core::arch::asm;
use core::arch::x86_64::__m128i;

/// What the compiler may assume of instructions whose result depends on nothing but their operands.
macro_rules! pure {
    ($macro:ident! $($rest:tt)*) => { $macro! { (pure, nomem, nostack, preserves_flags) $($rest)* } };
}

/// What it may assume of those that obey MXCSR and set its flags.
macro_rules! under_mxcsr {
    ($macro:ident! $($rest:tt)*) => { $macro! { (nomem, nostack, preserves_flags) $($rest)* } };
}

/// Functions of destination and source.
macro_rules! two_operands {
    ($options:tt $($name:ident)*) => { $(
        two_operands! { @ $options $name concat!(stringify!($name), " {0}, {1}") }
    )* };
    ($options:tt $($name:ident = $template:literal;)*) => { $(
        two_operands! { @ $options $name $template }
    )* };
    (@ ($($option:ident),*) $name:ident $template:expr) => {
        #[inline(always)]
        pub(super) fn $name(a: u128, b: u128) -> u128 {
            let mut a: __m128i = must_cast(a);
            let b: __m128i = must_cast(b);
            // SAFETY: changes one vector register that the compiler chose, and at most MXCSR's
            // flags. If the host lacked the instruction it would raise SIGILL; the handlers that
            // get here were selected after its CPUID was asked.
            unsafe {
                asm!(
                    $template,
                    inout(xmm_reg) a, in(xmm_reg) b,
                    options($($option),*)
                );
            }
            must_cast(a)
        }
    };
}

/// Functions of the source alone.
macro_rules! one_operand {
    ($options:tt $($name:ident)*) => { $( one_operand! { @ $options $name } )* };
    (@ ($($option:ident),*) $name:ident) => {
        #[inline(always)]
        pub(super) fn $name(b: u128) -> u128 {
            let a: __m128i;
            let b: __m128i = must_cast(b);
            // SAFETY: as for the functions of two operands.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1}"),
                    lateout(xmm_reg) a, in(xmm_reg) b,
                    options($($option),*)
                );
            }
            must_cast(a)
        }
    };
}

/// Functions of three operands, of which the first is the destination.
macro_rules! three_operands {
    ($options:tt $($name:ident)*) => { $( three_operands! { @ $options $name } )* };
    (@ ($($option:ident),*) $name:ident) => {
        #[inline(always)]
        pub(super) fn $name(a: u128, b: u128, c: u128) -> u128 {
            let mut a: __m128i = must_cast(a);
            let (b, c): (__m128i, __m128i) = (must_cast(b), must_cast(c));
            // SAFETY: as for the functions of two operands.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1}, {2}"),
                    inout(xmm_reg) a, in(xmm_reg) b, in(xmm_reg) c,
                    options($($option),*)
                );
            }
            must_cast(a)
        }
    };
}

/// Functions of destination, source and an immediate, of which the bits that `$dispatch` takes
/// count. `$template` is how the operands are written.
macro_rules! with_immediate {
    ($options:tt $dispatch:ident $template:literal: $($name:ident)*) => { $(
        with_immediate! { @ $options $dispatch $template $name }
    )* };
    (@ ($($option:ident),*) $dispatch:ident $template:literal $name:ident) => {
        #[inline(always)]
        pub(super) fn $name(a: u128, b: u128, immediate: u8) -> u128 {
            #[inline(always)]
            fn with<const IMMEDIATE: u8>(a: u128, b: u128) -> u128 {
                let mut a: __m128i = must_cast(a);
                let b: __m128i = must_cast(b);
                // SAFETY: as for the functions of two operands.
                unsafe {
                    asm!(
                        concat!(stringify!($name), $template),
                        inout(xmm_reg) a, in(xmm_reg) b, const IMMEDIATE,
                        options($($option),*)
                    );
                }
                must_cast(a)
            }
            $dispatch!(immediate, with, a, b)
        }
    };
}

/// Functions of the source and an immediate.
macro_rules! unary_with_immediate {
    ($options:tt $dispatch:ident: $($name:ident)*) => { $(
        unary_with_immediate! { @ $options $dispatch $name }
    )* };
    (@ ($($option:ident),*) $dispatch:ident $name:ident) => {
        #[inline(always)]
        pub(super) fn $name(b: u128, immediate: u8) -> u128 {
            #[inline(always)]
            fn with<const IMMEDIATE: u8>(b: u128) -> u128 {
                let a: __m128i;
                let b: __m128i = must_cast(b);
                // SAFETY: as for the functions of two operands.
                unsafe {
                    asm!(
                        concat!(stringify!($name), " {0}, {1}, {2}"),
                        lateout(xmm_reg) a, in(xmm_reg) b, const IMMEDIATE,
                        options($($option),*)
                    );
                }
                must_cast(a)
            }
            $dispatch!(immediate, with, b)
        }
    };
}

/// Calls the instance of a function for the low bits of a value.
macro_rules! by_bits {
    ($mask:literal, $value:expr, $function:ident, $arguments:tt, $($n:literal)*; $last:literal) => {
        match $value & $mask {
            $($n => $function::<$n> $arguments,)*
            _ => $function::<$last> $arguments,
        }
    };
}

/// Of which the low three bits count.
macro_rules! by_three_bits {
    ($value:expr, $function:ident, $($argument:expr),*) => {
        by_bits!(7, $value, $function, ($($argument),*), 0 1 2 3 4 5 6; 7)
    };
}

/// Of which the low four bits count.
macro_rules! by_four_bits {
    ($value:expr, $function:ident, $($argument:expr),*) => {
        by_bits!(15, $value, $function, ($($argument),*), 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14; 15)
    };
}

/// Of which the low five bits count.
macro_rules! by_five_bits {
    ($value:expr, $function:ident, $($argument:expr),*) => {
        by_bits!(
            31, $value, $function, ($($argument),*),
            0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
            16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; 31
        )
    };
}

// SSE2: arithmetic.
pure! { two_operands!
    paddb paddw paddd paddq paddsb paddsw paddusb paddusw
    psubb psubw psubd psubq psubsb psubsw psubusb psubusw
    pmulhuw pmulhw pmullw pmuludq pmaddwd psadbw
    pavgb pavgw pmaxsw pmaxub pminsw pminub
    pcmpeqb pcmpeqw pcmpeqd pcmpgtb pcmpgtw pcmpgtd
}
// SSE2: shifts of every lane by the low 64 bits of the source.
pure! { two_operands! psllw pslld psllq psraw psrad psrlw psrld psrlq }
// SSE2: lanes rearranged.
pure! { two_operands!
    packssdw packsswb packuswb
    punpcklbw punpcklwd punpckldq punpcklqdq punpckhbw punpckhwd punpckhdq punpckhqdq
    unpcklps unpckhps unpcklpd unpckhpd
}
// SSE: approximations, which neither obey MXCSR nor set its flags.
pure! { two_operands! rcpss rsqrtss }
pure! { one_operand! rcpps rsqrtps }
// SSSE3.
pure! { two_operands!
    pshufb phaddw phaddd phaddsw phsubw phsubd phsubsw pmaddubsw pmulhrsw psignb psignw psignd
}
pure! { one_operand! pabsb pabsw pabsd }
// SSE4.1.
pure! { two_operands!
    pmuldq pmulld packusdw pcmpeqq
    pmaxsb pmaxsd pmaxud pmaxuw pminsb pminsd pminud pminuw
}
pure! { one_operand!
    phminposuw
    pmovsxbw pmovsxbd pmovsxbq pmovsxwd pmovsxwq pmovsxdq
    pmovzxbw pmovzxbd pmovzxbq pmovzxwd pmovzxwq pmovzxdq
}
// SSE4.2.
pure! { two_operands! pcmpgtq }
// AES.
pure! { two_operands! aesenc aesenclast aesdec aesdeclast }
pure! { one_operand! aesimc }

// SSE and SSE2.
under_mxcsr! { two_operands!
    addps addpd addss addsd subps subpd subss subsd
    mulps mulpd mulss mulsd divps divpd divss divsd
    minps minpd minss minsd maxps maxpd maxss maxsd
    sqrtss sqrtsd cvtss2sd cvtsd2ss
}
under_mxcsr! { one_operand!
    sqrtps sqrtpd
    cvtps2pd cvtpd2ps cvtdq2ps cvtdq2pd cvtps2dq cvttps2dq cvtpd2dq cvttpd2dq
}
// Bits 7:3 of the immediate are reserved, and ignored by the legacy encoding.
under_mxcsr! { with_immediate! by_three_bits " {0}, {1}, {2}": cmpps cmppd cmpss cmpsd }
// SSE3.
under_mxcsr! { two_operands! addsubps addsubpd haddps haddpd hsubps hsubpd }
// SSE4.1. Bits 7:4 of the immediate are reserved and ignored.
under_mxcsr! { unary_with_immediate! by_four_bits: roundps roundpd }
under_mxcsr! { with_immediate! by_four_bits " {0}, {1}, {2}": roundss roundsd }
// Every lane multiplied and the sum in every lane.
under_mxcsr! { two_operands! dpps_all = "dpps {0}, {1}, 0xff"; dppd_all = "dppd {0}, {1}, 0x33"; }
pure! { with_immediate! by_three_bits " {0}, {1}, {2}": mpsadbw }
// The carry-less product of the low 64 bits.
pure! { two_operands! pclmullqlqdq = "pclmulqdq {0}, {1}, 0"; }
// AVX. Bits 7:5 of the immediate are reserved, and ignored.
under_mxcsr! { with_immediate! by_five_bits " {0}, {0}, {1}, {2}": vcmpps vcmppd vcmpss vcmpsd }
// FMA.
under_mxcsr! { three_operands!
    vfmadd132ps vfmadd132pd vfmadd132ss vfmadd132sd
    vfmadd213ps vfmadd213pd vfmadd213ss vfmadd213sd
    vfmadd231ps vfmadd231pd vfmadd231ss vfmadd231sd
    vfmsub132ps vfmsub132pd vfmsub132ss vfmsub132sd
    vfmsub213ps vfmsub213pd vfmsub213ss vfmsub213sd
    vfmsub231ps vfmsub231pd vfmsub231ss vfmsub231sd
    vfnmadd132ps vfnmadd132pd vfnmadd132ss vfnmadd132sd
    vfnmadd213ps vfnmadd213pd vfnmadd213ss vfnmadd213sd
    vfnmadd231ps vfnmadd231pd vfnmadd231ss vfnmadd231sd
    vfnmsub132ps vfnmsub132pd vfnmsub132ss vfnmsub132sd
    vfnmsub213ps vfnmsub213pd vfnmsub213ss vfnmsub213sd
    vfnmsub231ps vfnmsub231pd vfnmsub231ss vfnmsub231sd
    vfmaddsub132ps vfmaddsub132pd vfmaddsub213ps vfmaddsub213pd vfmaddsub231ps vfmaddsub231pd
    vfmsubadd132ps vfmsubadd132pd vfmsubadd213ps vfmsubadd213pd vfmsubadd231ps vfmsubadd231pd
}
// F16C. Bits 7:3 of the immediate are ignored.
under_mxcsr! { one_operand! vcvtph2ps }
under_mxcsr! { unary_with_immediate! by_three_bits: vcvtps2ph }

/// Sign bits of lanes, in a general register.
macro_rules! mask {
    ($($name:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $name(b: u128) -> u32 {
            let b: __m128i = must_cast(b);
            let mask: u32;
            // SAFETY: changes one general register that the compiler chose.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0:e}, {1}"),
                    lateout(reg) mask, in(xmm_reg) b,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            mask
        }
    )* };
}
mask! { pmovmskb movmskps movmskpd }

/// Scalar floating point to integer.
macro_rules! to_integer {
    ($($name:ident $narrow:ident $wide:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $narrow(b: u128) -> u32 {
            let b: __m128i = must_cast(b);
            let value: u32;
            // SAFETY: changes one general register that the compiler chose, and MXCSR's flags.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0:e}, {1}"),
                    lateout(reg) value, in(xmm_reg) b,
                    options(nomem, nostack, preserves_flags)
                );
            }
            value
        }
        #[inline(always)]
        pub(super) fn $wide(b: u128) -> u64 {
            let b: __m128i = must_cast(b);
            let value: u64;
            // SAFETY: changes one general register that the compiler chose, and MXCSR's flags.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0:r}, {1}"),
                    lateout(reg) value, in(xmm_reg) b,
                    options(nomem, nostack, preserves_flags)
                );
            }
            value
        }
    )* };
}
to_integer! {
    cvtss2si cvtss2si_32 cvtss2si_64
    cvttss2si cvttss2si_32 cvttss2si_64
    cvtsd2si cvtsd2si_32 cvtsd2si_64
    cvttsd2si cvttsd2si_32 cvttsd2si_64
}

/// Integer to scalar floating point in the low lane of the destination.
macro_rules! from_integer {
    ($($name:ident $narrow:ident $wide:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $narrow(a: u128, b: u32) -> u128 {
            let mut a: __m128i = must_cast(a);
            // SAFETY: changes one vector register that the compiler chose, and MXCSR's flags.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1:e}"),
                    inout(xmm_reg) a, in(reg) b,
                    options(nomem, nostack, preserves_flags)
                );
            }
            must_cast(a)
        }
        #[inline(always)]
        pub(super) fn $wide(a: u128, b: u64) -> u128 {
            let mut a: __m128i = must_cast(a);
            // SAFETY: changes one vector register that the compiler chose, and MXCSR's flags.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1:r}"),
                    inout(xmm_reg) a, in(reg) b,
                    options(nomem, nostack, preserves_flags)
                );
            }
            must_cast(a)
        }
    )* };
}
from_integer! {
    cvtsi2ss cvtsi2ss_32 cvtsi2ss_64
    cvtsi2sd cvtsi2sd_32 cvtsi2sd_64
}

/// The outcome of a scalar comparison as COMISS and its relatives leave it in ZF, PF and CF.
#[derive(Clone, Copy)]
pub(super) struct Ordering {
    pub(super) zf: bool,
    pub(super) pf: bool,
    pub(super) cf: bool,
}

macro_rules! ordering {
    ($($name:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $name(a: u128, b: u128) -> Ordering {
            let a: __m128i = must_cast(a);
            let b: __m128i = must_cast(b);
            let (zf, pf, cf): (u8, u8, u8);
            // SAFETY: changes three byte registers that the compiler chose, arithmetic flags, and
            // MXCSR's flags.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1}"),
                    "setz {2}",
                    "setp {3}",
                    "setc {4}",
                    in(xmm_reg) a, in(xmm_reg) b,
                    lateout(reg_byte) zf, lateout(reg_byte) pf, lateout(reg_byte) cf,
                    options(nomem, nostack)
                );
            }
            Ordering { zf: zf != 0, pf: pf != 0, cf: cf != 0 }
        }
    )* };
}
ordering! { comiss comisd ucomiss ucomisd }

/// This thread's MXCSR.
#[inline(always)]
pub(super) fn mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: writes four bytes to a local variable.
    unsafe {
        asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags));
    }
    value
}

/// Replaces this thread's MXCSR. The bits of `value` that must be zero are cleared, and every
/// exception is masked.
#[inline(always)]
pub(super) fn set_mxcsr(value: u32) {
    let value = value & 0xffff | 0x1f80;
    // SAFETY: reads four bytes of a local variable. Bits 16 and up are clear, so there is no #GP;
    // every exception is masked, so later instructions raise none. Callers put the value back
    // before code that assumes the default rounding mode runs.
    unsafe {
        asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags, readonly));
    }
}

/// Puts back what [`mxcsr`] gave.
#[inline(always)]
pub(super) fn restore_mxcsr(value: u32) {
    // SAFETY: reads four bytes of a local variable, which the host itself had stored.
    unsafe {
        asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags, readonly));
    }
}
