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

use super::precision::Step;
use bytemuck::must_cast;
use core::arch::asm;
use core::arch::x86_64::__m128i;

/// Functions of destination and source whose result depends on nothing else.
macro_rules! integer {
    ($($name:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $name(a: u128, b: u128) -> u128 {
            let mut a: __m128i = must_cast(a);
            let b: __m128i = must_cast(b);
            // SAFETY: changes one vector register that the compiler chose. If the host lacked the
            // instruction it would raise SIGILL; the handlers that get here were selected after
            // its CPUID was asked.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1}"),
                    inout(xmm_reg) a, in(xmm_reg) b,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            must_cast(a)
        }
    )* };
}

/// Functions of the source alone whose result depends on nothing else.
macro_rules! integer_unary {
    ($($name:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $name(b: u128) -> u128 {
            let a: __m128i;
            let b: __m128i = must_cast(b);
            // SAFETY: as for the functions of two operands.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1}"),
                    lateout(xmm_reg) a, in(xmm_reg) b,
                    options(pure, nomem, nostack, preserves_flags)
                );
            }
            must_cast(a)
        }
    )* };
}

/// Functions of destination and source that obey MXCSR and set its flags.
macro_rules! float {
    ($($name:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $name(a: u128, b: u128) -> u128 {
            let mut a: __m128i = must_cast(a);
            let b: __m128i = must_cast(b);
            // SAFETY: changes one vector register that the compiler chose, and MXCSR's flags. For
            // instructions later than SSE2, as for the integer ones.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1}"),
                    inout(xmm_reg) a, in(xmm_reg) b,
                    options(nomem, nostack, preserves_flags)
                );
            }
            must_cast(a)
        }
    )* };
}

/// Functions of the source alone that obey MXCSR and set its flags.
macro_rules! float_unary {
    ($($name:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $name(b: u128) -> u128 {
            let a: __m128i;
            let b: __m128i = must_cast(b);
            // SAFETY: as for the functions of two operands.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {0}, {1}"),
                    lateout(xmm_reg) a, in(xmm_reg) b,
                    options(nomem, nostack, preserves_flags)
                );
            }
            must_cast(a)
        }
    )* };
}

/// Functions of destination, source and an immediate that obey MXCSR and set its flags. Of the
/// immediate the low three or four bits count.
macro_rules! float_immediate {
    ($dispatch:ident: $($name:ident)*) => { $(
        #[inline(always)]
        pub(super) fn $name(a: u128, b: u128, immediate: u8) -> u128 {
            #[inline(always)]
            fn with<const IMMEDIATE: u8>(a: u128, b: u128) -> u128 {
                let mut a: __m128i = must_cast(a);
                let b: __m128i = must_cast(b);
                // SAFETY: as for the functions of two operands.
                unsafe {
                    asm!(
                        concat!(stringify!($name), " {0}, {1}, {2}"),
                        inout(xmm_reg) a, in(xmm_reg) b, const IMMEDIATE,
                        options(nomem, nostack, preserves_flags)
                    );
                }
                must_cast(a)
            }
            $dispatch!(immediate, with, a, b)
        }
    )* };
}

/// Calls the instance of a function for the low three bits of a value.
macro_rules! by_three_bits {
    ($value:expr, $function:ident, $a:expr, $b:expr) => {
        match $value & 7 {
            0 => $function::<0>($a, $b),
            1 => $function::<1>($a, $b),
            2 => $function::<2>($a, $b),
            3 => $function::<3>($a, $b),
            4 => $function::<4>($a, $b),
            5 => $function::<5>($a, $b),
            6 => $function::<6>($a, $b),
            _ => $function::<7>($a, $b),
        }
    };
}

/// Calls the instance of a function for the low four bits of a value.
macro_rules! by_four_bits {
    ($value:expr, $function:ident, $a:expr, $b:expr) => {
        match $value & 15 {
            0 => $function::<0>($a, $b),
            1 => $function::<1>($a, $b),
            2 => $function::<2>($a, $b),
            3 => $function::<3>($a, $b),
            4 => $function::<4>($a, $b),
            5 => $function::<5>($a, $b),
            6 => $function::<6>($a, $b),
            7 => $function::<7>($a, $b),
            8 => $function::<8>($a, $b),
            9 => $function::<9>($a, $b),
            10 => $function::<10>($a, $b),
            11 => $function::<11>($a, $b),
            12 => $function::<12>($a, $b),
            13 => $function::<13>($a, $b),
            14 => $function::<14>($a, $b),
            _ => $function::<15>($a, $b),
        }
    };
}

// SSE2: arithmetic.
integer! {
    paddb paddw paddd paddq paddsb paddsw paddusb paddusw
    psubb psubw psubd psubq psubsb psubsw psubusb psubusw
    pmulhuw pmulhw pmullw pmuludq pmaddwd psadbw
    pavgb pavgw pmaxsw pmaxub pminsw pminub
    pcmpeqb pcmpeqw pcmpeqd pcmpgtb pcmpgtw pcmpgtd
}
// SSE2: shifts of every lane by the low 64 bits of the source.
integer! { psllw pslld psllq psraw psrad psrlw psrld psrlq }
// SSE2: lanes rearranged.
integer! {
    packssdw packsswb packuswb
    punpcklbw punpcklwd punpckldq punpcklqdq punpckhbw punpckhwd punpckhdq punpckhqdq
    unpcklps unpckhps unpcklpd unpckhpd
}
// SSE: approximations, which neither obey MXCSR nor set its flags.
integer! { rcpss rsqrtss }
integer_unary! { rcpps rsqrtps }
// SSSE3.
integer! {
    pshufb phaddw phaddd phaddsw phsubw phsubd phsubsw pmaddubsw pmulhrsw psignb psignw psignd
}
integer_unary! { pabsb pabsw pabsd }
// SSE4.1.
integer! {
    pmuldq pmulld packusdw pcmpeqq
    pmaxsb pmaxsd pmaxud pmaxuw pminsb pminsd pminud pminuw
}
integer_unary! {
    phminposuw
    pmovsxbw pmovsxbd pmovsxbq pmovsxwd pmovsxwq pmovsxdq
    pmovzxbw pmovzxbd pmovzxbq pmovzxwd pmovzxwq pmovzxdq
}
// SSE4.2.
integer! { pcmpgtq }
// AES.
integer! { aesenc aesenclast aesdec aesdeclast }
integer_unary! { aesimc }

// SSE and SSE2.
float! {
    addps addpd addss addsd subps subpd subss subsd
    mulps mulpd mulss mulsd divps divpd divss divsd
    minps minpd minss minsd maxps maxpd maxss maxsd
    sqrtss sqrtsd cvtss2sd cvtsd2ss
}
float_unary! {
    sqrtps sqrtpd
    cvtps2pd cvtpd2ps cvtdq2ps cvtdq2pd cvtps2dq cvttps2dq cvtpd2dq cvttpd2dq
}
// Bits 7:3 of the immediate are reserved, and ignored by the legacy encoding.
float_immediate! { by_three_bits: cmpps cmppd cmpss cmpsd }
// SSE3.
float! { addsubps addsubpd haddps haddpd hsubps hsubpd }
// SSE4.1. Bits 7:4 of the immediate are reserved and ignored.
float_immediate! { by_four_bits: roundps roundpd roundss roundsd }

/// DPPS with every lane multiplied and the sum in every lane.
#[inline(always)]
pub(super) fn dpps_all(a: u128, b: u128) -> u128 {
    let mut a: __m128i = must_cast(a);
    let b: __m128i = must_cast(b);
    // SAFETY: as for the functions of two operands.
    unsafe {
        asm!("dpps {0}, {1}, 0xff", inout(xmm_reg) a, in(xmm_reg) b,
             options(nomem, nostack, preserves_flags));
    }
    must_cast(a)
}

/// DPPD with both lanes multiplied and the sum in both.
#[inline(always)]
pub(super) fn dppd_all(a: u128, b: u128) -> u128 {
    let mut a: __m128i = must_cast(a);
    let b: __m128i = must_cast(b);
    // SAFETY: as for the functions of two operands.
    unsafe {
        asm!("dppd {0}, {1}, 0x33", inout(xmm_reg) a, in(xmm_reg) b,
             options(nomem, nostack, preserves_flags));
    }
    must_cast(a)
}

/// MPSADBW. Of the immediate the low three bits count.
pub(super) fn mpsadbw(a: u128, b: u128, immediate: u8) -> u128 {
    #[inline(always)]
    fn with<const IMMEDIATE: u8>(a: u128, b: u128) -> u128 {
        let mut a: __m128i = must_cast(a);
        let b: __m128i = must_cast(b);
        // SAFETY: as for the integer functions of two operands.
        unsafe {
            asm!(
                "mpsadbw {0}, {1}, {2}",
                inout(xmm_reg) a, in(xmm_reg) b, const IMMEDIATE,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        must_cast(a)
    }
    by_three_bits!(immediate, with, a, b)
}

/// The carry-less product of the low 64 bits.
pub(super) fn pclmullqlqdq(a: u128, b: u128) -> u128 {
    let mut a: __m128i = must_cast(a);
    let b: __m128i = must_cast(b);
    // SAFETY: as for the integer functions of two operands.
    unsafe {
        asm!("pclmulqdq {0}, {1}, 0", inout(xmm_reg) a, in(xmm_reg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    must_cast(a)
}

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

/// Whether the result of a step on two numbers in the x87 format is inexact in the precision of a
/// single or a double. `rounding` is the rounding control, which both units encode alike.
pub(super) fn x87_is_inexact(step: Step, a: u128, b: u128, single: bool, rounding: u32) -> bool {
    // Every exception masked.
    let control = 0x3f | if single { 0 } else { 2 << 8 } | (rounding as u16 & 3) << 10;
    let mut environment = [0u8; 28];
    let status: u16;
    macro_rules! compute {
        ($instruction:literal) => {
            // SAFETY: writes 28 bytes to a local array and reads local variables; the x87 unit's
            // stack is empty between Rust functions, and its environment is put back.
            unsafe {
                asm!(
                    "fnstenv [{environment}]",
                    "fldcw [{control}]",
                    "fnclex",
                    "fld tbyte ptr [{a}]",
                    "fld tbyte ptr [{b}]",
                    $instruction,
                    "fnstsw ax",
                    "fstp st(0)",
                    "fldenv [{environment}]",
                    environment = in(reg) &raw mut environment,
                    control = in(reg) &raw const control,
                    a = in(reg) &raw const a,
                    b = in(reg) &raw const b,
                    out("ax") status,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    options(nostack)
                );
            }
        };
    }
    match step {
        Step::Add => compute!("faddp st(1), st"),
        Step::Subtract => compute!("fsubp st(1), st"),
        Step::Multiply | Step::Narrow => compute!("fmulp st(1), st"),
        Step::Divide => compute!("fdivp st(1), st"),
    }
    status & 1 << 5 != 0
}

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
