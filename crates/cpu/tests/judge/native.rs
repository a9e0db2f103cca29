//! The judge: one instruction on the host's own processor.
//!
//! A breakpoint gives control to a signal handler, which puts the case's registers into the
//! context that the kernel restores when the handler returns. The instruction is followed by
//! breakpoints; whatever signal comes next, the handler takes the registers out of its context and
//! puts back those from before.
#![allow(unsafe_code)]
// UNSAFETY: runs bytes as code, in a signal's context.

use crate::state::{CODE, CODE_BYTES, Case, DATA, DATA_BYTES, GS_BASE, Outcome, Registers};
use std::arch::asm;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const IDLE: u8 = 0;
const ENTERING: u8 = 1;
const RUNNING: u8 = 2;

/// Where Linux says that the half of user code ends (TASK_SIZE_MAX).
const USER_END: u64 = 0x7fff_ffff_f000;

/// Bytes of the largest extended state that is kept.
const EXTENDED: usize = 8192;

struct Shared {
    request: Registers,
    selector: u16,
    has_avx: bool,
    outcome: Outcome,
    saved: [i64; 23],
    saved_extended: [u8; EXTENDED],
    saved_extended_length: usize,
}

struct Cell(UnsafeCell<Option<Shared>>);
// SAFETY: only touched by the thread that holds `TURN` and by its own signal handler.
unsafe impl Sync for Cell {}

static SHARED: Cell = Cell(UnsafeCell::new(None));
static PHASE: AtomicU8 = AtomicU8::new(IDLE);
static TURN: Mutex<()> = Mutex::new(());

/// Where each general register is in a context, in the order of their encoding.
const CONTEXT: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Registers of user code when nothing is asked of them.
pub fn plain_registers() -> Registers {
    Registers {
        gpr: [0; 16],
        rip: CODE,
        rflags: 2,
        xmm: [0; 16],
        ymm_high: [0; 16],
        mxcsr: 0x1f80,
        st: [0; 8],
        fcw: 0x37f,
        fsw: 0,
        ftw: 0,
        fop: 0,
        fip: 0,
        fdp: 0,
    }
}

/// The host's processor. One at a time.
pub struct Native {
    _turn: MutexGuard<'static, ()>,
    stack: Vec<u8>,
}

impl Native {
    /// Maps the pages and installs the handlers.
    pub fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let stack = vec![0u8; 256 << 10];
        // SAFETY: the addresses are this test's own; MAP_FIXED_NOREPLACE refuses others'. The
        // handler and its stack live as long as this value.
        unsafe {
            for (address, length, protection) in [
                (
                    CODE,
                    CODE_BYTES,
                    libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                ),
                (DATA, DATA_BYTES, libc::PROT_READ | libc::PROT_WRITE),
            ] {
                let mapped = libc::mmap(
                    address as *mut libc::c_void,
                    length,
                    protection,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                );
                assert_eq!(mapped as u64, address, "the test's addresses are taken");
            }
            *SHARED.0.get() = Some(Shared {
                request: plain_registers(),
                selector: 0x33,
                has_avx: is_x86_feature_detected!("avx"),
                outcome: Outcome {
                    registers: plain_registers(),
                    vector: 0,
                    error: 0,
                    address: 0,
                },
                saved: [0; 23],
                saved_extended: [0; EXTENDED],
                saved_extended_length: 0,
            });
            let alternate = libc::stack_t {
                ss_sp: stack.as_ptr().cast_mut().cast(),
                ss_flags: 0,
                ss_size: stack.len(),
            };
            assert_eq!(libc::sigaltstack(&alternate, std::ptr::null_mut()), 0);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in [
                libc::SIGTRAP,
                libc::SIGSEGV,
                libc::SIGBUS,
                libc::SIGILL,
                libc::SIGFPE,
            ] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
            // ARCH_SET_GS: user code of a 64-bit Linux program does not use GS otherwise.
            assert_eq!(libc::syscall(libc::SYS_arch_prctl, 0x1001, GS_BASE), 0);
            // 32-bit code needs usable data segments; 64-bit code does not look at them.
            asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) 0x2b, options(nostack));
        }
        Self { _turn: turn, stack }
    }

    /// The data pages.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped by `new`, and only used through this value.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_BYTES) }
    }

    /// The code pages.
    pub fn code(&mut self) -> &mut [u8] {
        // SAFETY: as for `data`.
        unsafe { std::slice::from_raw_parts_mut(CODE as *mut u8, CODE_BYTES) }
    }

    /// Executes the instruction at the case's RIP, whose bytes are in place.
    pub fn run(&mut self, case: &Case) -> Outcome {
        // SAFETY: this thread has the turn, and the handler runs only inside the breakpoint.
        unsafe {
            let shared = (*SHARED.0.get()).as_mut().unwrap();
            shared.request = case.registers.clone();
            shared.selector = if case.bitness == 64 { 0x33 } else { 0x23 };
            PHASE.store(ENTERING, Ordering::SeqCst);
            // Every register is as before afterwards.
            asm!("int3");
            assert_eq!(PHASE.load(Ordering::SeqCst), IDLE);
            (*SHARED.0.get()).as_ref().unwrap().outcome.clone()
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: nothing uses the pages or the handlers any more.
        unsafe {
            for signal in [
                libc::SIGTRAP,
                libc::SIGSEGV,
                libc::SIGBUS,
                libc::SIGILL,
                libc::SIGFPE,
            ] {
                libc::signal(signal, libc::SIG_DFL);
            }
            let disabled = libc::stack_t {
                ss_sp: std::ptr::null_mut(),
                ss_flags: libc::SS_DISABLE,
                ss_size: self.stack.len(),
            };
            libc::sigaltstack(&disabled, std::ptr::null_mut());
            libc::munmap(CODE as *mut libc::c_void, CODE_BYTES);
            libc::munmap(DATA as *mut libc::c_void, DATA_BYTES);
        }
    }
}

/// Offsets in the FXSAVE image that a context points to, and behind it.
mod image {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const MAGIC: usize = 464;
    pub const XSTATE_SIZE: usize = 480;
    pub const XSTATE_BV: usize = 512;
    /// Upper halves of the YMM registers.
    pub const AVX: usize = 576;
    /// XSTATE_BV of them.
    pub const HAS_AVX: u64 = 4;
}

extern "C" fn on_signal(signal: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context; `SHARED` belongs to this thread, which is inside
    // `Native::run` unless the phase is idle. Nothing here allocates or panics.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let gregs = &mut context.uc_mcontext.gregs;
        let extended = context.uc_mcontext.fpregs.cast::<u8>();
        let Some(shared) = (*SHARED.0.get()).as_mut() else {
            return;
        };
        match PHASE.load(Ordering::SeqCst) {
            ENTERING => {
                shared.saved = *gregs;
                let has_more = extended.add(image::MAGIC).cast::<u32>().read() == 0x4650_5853;
                let length = if has_more {
                    extended.add(image::XSTATE_SIZE).cast::<u32>().read() as usize + 4
                } else {
                    512
                };
                shared.saved_extended_length = length.min(EXTENDED);
                shared
                    .saved_extended
                    .as_mut_ptr()
                    .copy_from(extended, shared.saved_extended_length);
                let request = &shared.request;
                for (value, place) in request.gpr.iter().zip(CONTEXT) {
                    gregs[place as usize] = *value as i64;
                }
                gregs[libc::REG_RIP as usize] = request.rip as i64;
                gregs[libc::REG_EFL as usize] = (request.rflags | 0x202) as i64;
                let segments = &mut gregs[libc::REG_CSGSFS as usize];
                *segments = *segments & !0xffff | i64::from(shared.selector);
                extended.add(image::FCW).cast::<u16>().write(request.fcw);
                extended.add(image::FSW).cast::<u16>().write(request.fsw);
                extended
                    .add(image::FTW)
                    .cast::<u16>()
                    .write(u16::from(request.ftw));
                extended.add(image::FOP).cast::<u16>().write(request.fop);
                extended.add(image::FIP).cast::<u64>().write(request.fip);
                extended.add(image::FDP).cast::<u64>().write(request.fdp);
                extended
                    .add(image::MXCSR)
                    .cast::<u32>()
                    .write(request.mxcsr);
                extended
                    .add(image::ST)
                    .cast::<[u128; 8]>()
                    .write_unaligned(request.st);
                extended
                    .add(image::XMM)
                    .cast::<[u128; 16]>()
                    .write_unaligned(request.xmm);
                if has_more {
                    // x87, SSE and AVX are not in their initial state.
                    let present = extended.add(image::XSTATE_BV).cast::<u64>();
                    let avx = if shared.has_avx { image::HAS_AVX } else { 0 };
                    present.write(present.read() | 3 | avx);
                    if shared.has_avx {
                        extended
                            .add(image::AVX)
                            .cast::<[u128; 16]>()
                            .write_unaligned(request.ymm_high);
                    }
                }
                PHASE.store(RUNNING, Ordering::SeqCst);
            }
            RUNNING => {
                let outcome = &mut shared.outcome;
                let registers = &mut outcome.registers;
                for (value, place) in registers.gpr.iter_mut().zip(CONTEXT) {
                    *value = gregs[place as usize] as u64;
                }
                registers.rip = gregs[libc::REG_RIP as usize] as u64;
                registers.rflags = gregs[libc::REG_EFL as usize] as u64;
                registers.fcw = extended.add(image::FCW).cast::<u16>().read();
                registers.fsw = extended.add(image::FSW).cast::<u16>().read();
                registers.ftw = extended.add(image::FTW).cast::<u16>().read() as u8;
                registers.fop = extended.add(image::FOP).cast::<u16>().read();
                registers.fip = extended.add(image::FIP).cast::<u64>().read();
                registers.fdp = extended.add(image::FDP).cast::<u64>().read();
                registers.mxcsr = extended.add(image::MXCSR).cast::<u32>().read();
                registers.st = extended.add(image::ST).cast::<[u128; 8]>().read_unaligned();
                registers.xmm = extended
                    .add(image::XMM)
                    .cast::<[u128; 16]>()
                    .read_unaligned();
                // A component in its initial state may not be in the image.
                let present = extended.add(image::XSTATE_BV).cast::<u64>().read();
                registers.ymm_high = if shared.has_avx && present & image::HAS_AVX != 0 {
                    extended
                        .add(image::AVX)
                        .cast::<[u128; 16]>()
                        .read_unaligned()
                } else {
                    [0; 16]
                };
                outcome.vector = gregs[libc::REG_TRAPNO as usize] as u8;
                outcome.error = 0;
                outcome.address = 0;
                if crate::state::has_error_code(outcome.vector) {
                    outcome.error = gregs[libc::REG_ERR as usize] as u32;
                }
                if outcome.vector == 14 {
                    // Of a fault in the kernel's half, Linux does not tell whether a page was
                    // there; in the guest none is.
                    if gregs[libc::REG_CR2 as usize] as u64 >= USER_END {
                        outcome.error &= !1;
                    }
                    outcome.address = gregs[libc::REG_CR2 as usize] as u64;
                }
                *gregs = shared.saved;
                extended.copy_from(shared.saved_extended.as_ptr(), shared.saved_extended_length);
                PHASE.store(IDLE, Ordering::SeqCst);
            }
            _ => {
                // Not ours: the instruction is executed again, with the default action.
                let rip = gregs[libc::REG_RIP as usize] as usize;
                match twofold_cpu::fixup(rip) {
                    Some(landing) => gregs[libc::REG_RIP as usize] = landing as i64,
                    None => {
                        libc::signal(signal, libc::SIG_DFL);
                    }
                }
            }
        }
    }
}
