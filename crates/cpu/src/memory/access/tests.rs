//! Accesses to memory that is there, and that is not.

use super::*;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use std::sync::Once;

/// Installs a handler as the product's is: the fix-up table first, then the default action.
pub(in crate::memory) fn install_handler() {
    extern "C" fn on_fault(
        signal: libc::c_int,
        _: *mut libc::siginfo_t,
        context: *mut libc::c_void,
    ) {
        // SAFETY: the kernel passes a valid context to a handler with SA_SIGINFO.
        unsafe {
            let context = &mut *context.cast::<libc::ucontext_t>();
            let rip = &mut context.uc_mcontext.gregs[libc::REG_RIP as usize];
            match fixup(*rip as usize) {
                Some(landing) => *rip = landing as i64,
                None => {
                    libc::signal(signal, libc::SIG_DFL);
                }
            }
        }
    }
    static ONCE: Once = Once::new();
    // SAFETY: the handler is async-signal-safe; the structure is fully initialised.
    ONCE.call_once(|| unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSEGV, &action, core::ptr::null_mut());
        libc::sigaction(libc::SIGBUS, &action, core::ptr::null_mut());
    });
}

struct Pages {
    base: *mut u8,
    length: usize,
}

impl Pages {
    fn new(count: usize) -> Self {
        install_handler();
        let length = count * 4096;
        // SAFETY: the kernel chooses the address.
        let base = unsafe {
            mmap_anonymous(
                core::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        Self {
            base: base.unwrap().cast(),
            length,
        }
    }

    fn take_away(&self, page: usize) {
        // SAFETY: the page is this test's own, and only reached through `Datum`.
        unsafe {
            mprotect(
                self.base.add(page * 4096).cast(),
                4096,
                MprotectFlags::empty(),
            )
            .unwrap();
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: nobody uses the pages any more.
        unsafe { munmap(self.base.cast(), self.length).unwrap() }
    }
}

fn round_trip<T: Datum + std::fmt::Debug>(value: T, other: T) {
    let pages = Pages::new(1);
    // SAFETY: the page is mapped, then not; both are allowed.
    unsafe {
        let at = pages.base.add(64);
        assert_eq!(T::store(at, value), Ok(()));
        assert_eq!(T::load(at), Ok(value));
        assert_eq!(T::compare_exchange(at, other, value), Ok(value));
        assert_eq!(T::load(at), Ok(value));
        assert_eq!(T::compare_exchange(at, value, other), Ok(value));
        assert_eq!(T::load(at), Ok(other));
        assert_eq!(T::from_bytes(value.to_bytes()), value);
        pages.take_away(0);
        assert_eq!(T::load(at), Err(Vanished));
        assert_eq!(T::store(at, value), Err(Vanished));
        assert_eq!(T::compare_exchange(at, value, other), Err(Vanished));
    }
}

#[test]
fn values_of_every_size_are_accessed_and_vanish() {
    round_trip(0x12u8, 0x34);
    round_trip(0x1234u16, 0x5678);
    round_trip(0x1234_5678u32, 0x9abc_def0);
    round_trip(0x1234_5678_9abc_def0u64, 0x0fed_cba9_8765_4321);
    round_trip(
        0x1234_5678_9abc_def0_1122_3344_5566_7788u128,
        0x0fed_cba9_8765_4321_99aa_bbcc_ddee_ff00,
    );
}

#[test]
fn a_copy_stops_where_memory_ends() {
    let pages = Pages::new(2);
    pages.take_away(1);
    // SAFETY: the second page is not mapped, which is allowed.
    unsafe {
        let at = pages.base.add(4096 - 3);
        assert_eq!(copy_to(at, &[1, 2, 3]), Ok(()));
        let mut buffer = [0; 3];
        assert_eq!(copy_from(&mut buffer, at), Ok(()));
        assert_eq!(buffer, [1, 2, 3]);
        assert_eq!(equals(at, &[1, 2, 3]), Ok(true));
        assert_eq!(equals(at, &[1, 2, 4]), Ok(false));
        assert_eq!(copy_to(at, &[9; 4]), Err(Vanished));
        assert_eq!(copy_from(&mut [0; 4], at), Err(Vanished));
        assert_eq!(equals(at, &[9; 4]), Err(Vanished));
        let at8 = pages.base.add(4096 - 16);
        assert_eq!(fill(at8, 0x0807_0605_0403_0201, 2), Ok(()));
        assert_eq!(u64::load(at8.add(8)), Ok(0x0807_0605_0403_0201));
        assert_eq!(fill(at8, 0, 3), Err(Vanished));
        assert_eq!(u32::load(at), Err(Vanished));
    }
}

#[test]
fn a_copy_past_the_caches_is_a_copy_and_stops_where_memory_ends() {
    let pages = Pages::new(3);
    pages.take_away(2);
    let bytes: Vec<u8> = (0..8192u32).map(|i| (i * 7 % 251) as u8).collect();
    for (to, from, length) in [
        (0, 4096, 4096),
        (4096, 0, 4096),
        (3, 4100, 1000),
        (4001, 17, 3999),
        (64, 0, 4096),
        (1, 0, 4096),
        (200, 263, 4000),
        (70, 5000, 63),
        (8, 8, 512),
        (5, 900, 0),
    ] {
        let mut expected = bytes.clone();
        for i in 0..length {
            expected[to + i] = expected[from + i];
        }
        // SAFETY: both ranges lie in the two pages that are mapped.
        unsafe {
            copy_to(pages.base, &bytes).unwrap();
            let base = pages.base;
            assert_eq!(
                copy_past_caches(base.add(to), base.add(from), length),
                Ok(())
            );
            assert_eq!(
                equals(base, &expected),
                Ok(true),
                "{length} from {from} to {to}"
            );
        }
    }
    for (to, from) in [(0, 8000), (8000, 0)] {
        // SAFETY: the third page is not mapped, which is allowed.
        let copied = unsafe { copy_past_caches(pages.base.add(to), pages.base.add(from), 400) };
        assert_eq!(copied, Err(Vanished));
    }
}

#[test]
fn the_table_knows_only_accesses_to_guest_memory() {
    assert_eq!(fixup(0), None);
    assert_eq!(fixup(fixup as *const () as usize), None);
}
