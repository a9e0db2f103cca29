//! What concerns the whole process: the first use of KVM, and what `fork` and `vfork` make of it.

// UNSAFETY: a page that the kernel wipes in forked children, and the functions that the dynamic
// linker calls when the library is loaded and when the program ends.
#![expect(unsafe_code)]

use std::env;
use std::io::Write;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use libc::c_int;
use rustix::io::Errno;
use twofold_kvm::abi;

use crate::signals::Undisturbed;
use crate::{faults, handlers, log, raw, real, signals};

/// Whether the program has opened `/dev/kvm`. Until then this library changes nothing about it.
static IN_USE: AtomicBool = AtomicBool::new(false);

/// The process whose memory this is.
static OWNER: AtomicUsize = AtomicUsize::new(0);

/// A word that is 1 here and 0 in a forked child, by whichever system call it was forked: the
/// kernel wipes its page there. Null before the first use of KVM.
static MARK: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());

/// Opens Twofold's `/dev/kvm`.
///
/// # Errors
/// The process has no descriptor or memory left.
pub(crate) fn open_kvm(flags: c_int) -> Result<c_int, Errno> {
    static FIRST: Once = Once::new();
    settle();
    FIRST.call_once(first_use);
    let _section = Undisturbed::begin();
    abi::open(flags)
}

fn first_use() {
    log::start();
    OWNER.store(raw::process_id(), Ordering::Relaxed);
    watch_for_fork();
    faults::install();
    handlers::take_over();
    abi::faults_are_handled();
    abi::register_run_signals(&signals::MaskedRun);
    IN_USE.store(true, Ordering::Release);
    tracing::debug!("the program opened /dev/kvm");
}

fn watch_for_fork() {
    let size = 4096;
    // SAFETY: a new anonymous mapping replaces nothing.
    let page = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            size,
            rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
            rustix::mm::MapFlags::PRIVATE,
        )
    };
    let Ok(page) = page else { return };
    // SAFETY: the mapping made above. Its contents do not matter to a child.
    if unsafe { rustix::mm::madvise(page, size, rustix::mm::Advice::LinuxWipeOnFork) }.is_err() {
        return;
    }
    let mark = page.cast::<AtomicU32>();
    // SAFETY: the mapping is aligned, writable, and never removed.
    unsafe { (*mark).store(1, Ordering::Relaxed) };
    MARK.store(mark, Ordering::Release);
}

/// Notices that this process is a forked child. Costs two loads when it is not.
#[inline]
pub(crate) fn settle() {
    let mark = MARK.load(Ordering::Acquire);
    // SAFETY: null, or the word that is never unmapped.
    if let Some(mark) = unsafe { mark.as_ref() }
        && mark.load(Ordering::Relaxed) == 0
    {
        settle_child(mark);
    }
}

#[cold]
fn settle_child(mark: &AtomicU32) {
    mark.store(1, Ordering::Relaxed);
    OWNER.store(raw::process_id(), Ordering::Relaxed);
    handlers::after_fork();
    abi::fork_child();
}

/// Whether this is a child of `vfork`, which runs in its parent's memory: its descriptors are
/// copies, and what it does to them is not to be noted here.
pub(crate) fn is_borrowed() -> bool {
    IN_USE.load(Ordering::Acquire) && OWNER.load(Ordering::Relaxed) != raw::process_id()
}

extern "C" fn when_loaded() {
    real::look_up_all();
}

extern "C" fn when_ended() {
    if !IN_USE.load(Ordering::Acquire) || is_borrowed() {
        return;
    }
    settle();
    if env::var_os("TWOFOLD_SUMMARY").is_some_and(|value| value != "0") {
        // Standard error may be closed by now.
        let _ = writeln!(std::io::stderr(), "{}", abi::summary());
    }
}

// SAFETY: the dynamic linker calls the entries of these sections, with arguments that the C
// convention lets a function ignore.
#[used]
#[unsafe(link_section = ".init_array")]
static WHEN_LOADED: extern "C" fn() = when_loaded;

#[used]
#[unsafe(link_section = ".fini_array")]
static WHEN_ENDED: extern "C" fn() = when_ended;
