//! SIGSEGV and SIGBUS.
//!
//! Guest memory may vanish while a guest uses it: the program unmaps it by a way that is not seen
//! here, or a file that is mapped is truncated. The access then faults in the middle of Twofold's
//! code, at an instruction that has a landing place for this case. Any other fault is the
//! program's own and goes to its handler.

// UNSAFETY: handles signals that interrupt arbitrary code, and changes where it continues.
#![expect(unsafe_code)]

use std::mem::MaybeUninit;

use libc::{
    REG_RIP, SA_NODEFER, SA_ONSTACK, SA_RESETHAND, SA_SIGINFO, SIG_DFL, SIG_IGN, SIGBUS, SIGSEGV,
    c_int, c_void, sigaction as Action, siginfo_t, ucontext_t,
};
use twofold_kvm::abi;

use crate::raw::{self, Mask};
use crate::{handlers, real, signals};

/// Installs the handler of faults. What the program has installed before, and what it installs
/// later, is called from it.
pub(crate) fn install() {
    for signal in [SIGSEGV, SIGBUS] {
        let ours = MaybeUninit::<Action>::zeroed();
        // SAFETY: zero is an empty mask.
        let ours = Action {
            sa_sigaction: faulted as *const () as usize,
            // On the program's alternate stack, if it has one: its own handler may be there to say
            // that the stack has overflowed.
            sa_flags: SA_SIGINFO | SA_ONSTACK | SA_NODEFER,
            ..unsafe { ours.assume_init() }
        };
        let mut before = MaybeUninit::<Action>::zeroed();
        // SAFETY: `faulted` can run at any time; the other structure is written.
        if unsafe { real::sigaction(signal, &raw const ours, before.as_mut_ptr()) } == 0 {
            // SAFETY: all its fields are integers.
            handlers::record_fault_handler(signal, unsafe { before.assume_init() });
        } else {
            return;
        }
    }
    abi::faults_are_handled();
}

extern "C" fn faulted(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passed both. A signal that somebody sent has no address, but its code,
    // which is not positive, tells.
    let (instruction, address, by_kernel) = unsafe {
        let registers = &raw mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs;
        let instruction = (&raw mut (*registers)[REG_RIP as usize]).cast::<usize>();
        (instruction, (*info).si_addr().addr(), (*info).si_code > 0)
    };
    // SAFETY: the saved instruction pointer; the kernel takes it from there when this returns.
    if by_kernel && let Some(landing) = abi::in_guest_access_fixup(unsafe { *instruction }, address)
    {
        // SAFETY: as above.
        unsafe { *instruction = landing };
        return;
    }
    chain(signal, info, context, by_kernel);
}

/// Does what the program wants done.
fn chain(signal: c_int, info: *mut siginfo_t, context: *mut c_void, by_kernel: bool) {
    let action = handlers::disposition(signal);
    match action.sa_sigaction {
        // To ignore a fault is not possible, but a signal that was sent can be ignored.
        SIG_IGN if !by_kernel => {}
        SIG_DFL | SIG_IGN => {
            handlers::surrender(signal);
            if !by_kernel {
                let _ = raw::queue_to_this_thread(signal, info);
            }
            // Otherwise the instruction faults again, and nothing stands in the way.
        }
        handler => {
            if action.sa_flags & SA_RESETHAND != 0 {
                handlers::reset(signal);
            }
            raw::block(mask_of(signal, &action));
            signals::mask_changed();
            signals::call(handler, signal, info, context);
        }
    }
}

/// What the kernel would block while the program's handler runs.
fn mask_of(signal: c_int, action: &Action) -> Mask {
    // SAFETY: a set of signals is 128 bytes, the first 8 of which the kernel knows.
    let mask = unsafe { (&raw const action.sa_mask).cast::<Mask>().read() };
    if action.sa_flags & SA_NODEFER != 0 {
        mask
    } else {
        mask | raw::bit(signal)
    }
}
