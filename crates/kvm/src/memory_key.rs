//! A protection key for trust domains' private memory (SDM Vol. 3, "Protection Keys"; pkeys(7)).
//!
//! Where the processor has such keys, the memory can be reached only by a thread that has opened it:
//! one that runs a TD's guest, or does the TDX module's work on a page. Any other access of the
//! program ends in SIGSEGV. Threads and signal handlers begin with the memory closed, because the
//! kernel gives them rights to the memory without a key alone. A program may open it by itself: that
//! is still a model, not a boundary.

// UNSAFETY: asks the kernel for a key, and changes the thread's own rights.
#![expect(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::ffi::c_void;
use std::marker::PhantomData;
use std::sync::LazyLock;

/// Neither reads nor writes: `PKEY_DISABLE_ACCESS`. Two bits for each key in PKRU.
const NO_ACCESS: u32 = 1;

/// The key, allocated when the first trust domain needs it. `None`: there are no keys, or no more.
static KEY: LazyLock<Option<u32>> = LazyLock::new(|| {
    if !has_keys() {
        return None;
    }
    // SAFETY: pkey_alloc has two integers for arguments, and gives a key that nobody uses.
    let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, NO_ACCESS) };
    u32::try_from(key)
        .inspect_err(|_| {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, "no protection key for private memory");
        })
        .ok()
});

/// Whether the operating system has switched protection keys on: CPUID.7.OSPKE.
fn has_keys() -> bool {
    const OSPKE: u32 = 1 << 4;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & OSPKE != 0
}

/// Gives memory the key, if there is one.
///
/// # Safety
/// The memory is a private mapping of the caller's own, readable and writable, which is accessed
/// only with [`Open`] from now on.
pub(crate) unsafe fn protect(start: *mut c_void, length: usize) {
    let Some(key) = *KEY else {
        return;
    };
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: changes no mapping but the caller's, and no right but by the key.
    let result = unsafe { libc::syscall(libc::SYS_pkey_mprotect, start, length, rights, key) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "private memory is not protected by a key");
    }
}

/// This thread may access private memory until it is dropped.
#[must_use = "the memory is closed again when this is dropped"]
pub(crate) struct Open {
    /// PKRU before, if there is a key.
    before: Option<u32>,
    /// The right is a thread's.
    _not_send: PhantomData<*const ()>,
}

impl Open {
    /// Opens the memory for this thread. Cheap, and nothing without a key.
    #[inline]
    pub(crate) fn new() -> Self {
        let before = KEY.map(|key| {
            let before = read_pkru();
            write_pkru(before & !(3 << (2 * key)));
            before
        });
        Self {
            before,
            _not_send: PhantomData,
        }
    }
}

impl Drop for Open {
    #[inline]
    fn drop(&mut self) {
        if let Some(before) = self.before {
            write_pkru(before);
        }
    }
}

fn read_pkru() -> u32 {
    let rights;
    // SAFETY: there is a key, so the instruction exists; it reads a register of this thread.
    unsafe {
        asm!("rdpkru", in("ecx") 0, out("eax") rights, out("edx") _, options(nomem, nostack));
    }
    rights
}

fn write_pkru(rights: u32) {
    // SAFETY: as above; rights to other keys stay as they are. Not `nomem`: no access may move
    // across.
    unsafe { asm!("wrpkru", in("eax") rights, in("ecx") 0, in("edx") 0, options(nostack)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_come_with_the_first_opening_and_go_with_the_last() {
        let closed = |key: u32| read_pkru() >> (2 * key) & 3 != 0;
        let Some(key) = *KEY else {
            // Nothing to open; nothing may break either.
            drop(Open::new());
            return;
        };
        let outer = Open::new();
        assert!(!closed(key));
        drop(Open::new());
        assert!(!closed(key));
        drop(outer);
        // This thread may have had all rights before it asked for the key; new ones have not.
        assert!(std::thread::spawn(move || closed(key)).join().unwrap());
    }

    #[test]
    fn guarded_memory_is_reached_only_while_it_is_open() {
        const BYTES: usize = 4096;
        // SAFETY: a new mapping, which stays.
        let page = unsafe {
            let page = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                BYTES,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::PRIVATE,
            )
            .unwrap();
            protect(page, BYTES);
            page
        };
        let address = page.expose_provenance();
        let into_a_pipe = move || {
            // The kernel reads with this thread's rights, and has an error instead of a signal.
            let (_reader, writer) = rustix::pipe::pipe().unwrap();
            let page = std::ptr::with_exposed_provenance::<u8>(address);
            // SAFETY: mapped; bytes that nobody writes.
            let bytes = unsafe { std::slice::from_raw_parts(page, 8) };
            rustix::io::write(&writer, bytes)
        };
        let (closed, open) = std::thread::spawn(move || {
            let closed = into_a_pipe();
            let _open = Open::new();
            (closed, into_a_pipe())
        })
        .join()
        .unwrap();
        assert_eq!(open, Ok(8));
        match *KEY {
            Some(_) => assert_eq!(closed, Err(rustix::io::Errno::FAULT)),
            None => assert_eq!(closed, Ok(8)),
        }
    }
}
