//! An asymmetric memory barrier: free for the side that runs often, a system call for the side
//! that runs rarely.
//!
//! A vCPU announces that it enters guest mode with a plain store followed by a compiler fence
//! ([`light_barrier`]) and then looks for requests. Whoever posts a request calls
//! [`heavy_barrier`] between posting it and looking at the vCPU's state. Together the two are as
//! strong as a sequentially consistent fence on each side: either the vCPU sees the request or
//! the requester sees the vCPU in guest mode.

use core::sync::atomic::{Ordering, compiler_fence};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::thread::{MembarrierCommand, membarrier};
use std::sync::{Mutex, PoisonError};

/// The cheap half: orders this thread's earlier stores before its later loads as seen by a thread
/// that calls [`heavy_barrier`] in between.
#[inline(always)]
pub fn light_barrier() {
    compiler_fence(Ordering::SeqCst);
}

/// The dear half: when it returns, every other running thread of this process has passed a full
/// memory barrier since the call began.
///
/// Uses `membarrier(PRIVATE_EXPEDITED)`; where the kernel lacks or forbids it, changes the
/// protection of a resident page, which interrupts every CPU that runs a thread of this process.
///
/// # Panics
///
/// Never. If both ways are refused by the kernel the process is aborted, since going on would
/// mean that a vCPU may use memory that has been given back.
pub fn heavy_barrier() {
    let expedited = || membarrier(MembarrierCommand::PrivateExpedited).is_ok();
    // The first call of a process is refused because it has not registered. That is not remembered
    // by who does it first: a child that is forked meanwhile would wait for that thread, which it
    // does not have.
    if expedited() || membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok() && expedited()
    {
        return;
    }
    if protection_barrier().is_err() {
        tracing::error!(
            "neither membarrier(2) nor mprotect(2) works here; vCPUs cannot be kept in step"
        );
        std::process::abort();
    }
}

/// Takes write permission from a resident page: the kernel must interrupt every CPU that may have
/// cached the translation, and an interrupt is a barrier.
fn protection_barrier() -> rustix::io::Result<()> {
    static PAGE: Mutex<Option<usize>> = Mutex::new(None);
    const LENGTH: usize = 4096;
    let mut page = PAGE.lock().unwrap_or_else(PoisonError::into_inner);
    let address = match *page {
        Some(address) => address,
        None => {
            #[expect(unsafe_code)]
            // UNSAFETY: mapping memory is a raw system call.
            // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
            let mapped = unsafe {
                rustix::mm::mmap_anonymous(
                    std::ptr::null_mut(),
                    LENGTH,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )?
            };
            *page = Some(mapped as usize);
            mapped as usize
        }
    };
    let pointer = std::ptr::with_exposed_provenance_mut::<u8>(address);
    #[expect(unsafe_code)]
    // UNSAFETY: changing the protection of memory is a raw system call.
    // SAFETY: the page was mapped above for this purpose alone and is never unmapped; the store
    // happens while it is writable because the mutex is held.
    unsafe {
        rustix::mm::mprotect(
            pointer.cast(),
            LENGTH,
            MprotectFlags::READ | MprotectFlags::WRITE,
        )?;
        // The page must be present and writable in the page tables, or there is nothing to flush.
        pointer.write_volatile(1);
        rustix::mm::mprotect(pointer.cast(), LENGTH, MprotectFlags::READ)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

    /// Store buffering: with a plain store and load on one side and a heavy barrier on the other,
    /// both sides must never miss each other.
    fn store_buffering(barrier: fn()) {
        const ROUNDS: u32 = 500;
        let x = AtomicU32::new(0);
        let y = AtomicU32::new(0);
        let light_saw = AtomicU32::new(0);
        let round = AtomicU32::new(0);
        let done = AtomicU32::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in 1..=ROUNDS {
                    while round.load(Ordering::Acquire) < i {
                        std::hint::spin_loop();
                        std::thread::yield_now();
                    }
                    x.store(i, Relaxed);
                    light_barrier();
                    light_saw.store(y.load(Relaxed), Relaxed);
                    done.store(i, Ordering::Release);
                }
            });
            for i in 1..=ROUNDS {
                round.store(i, Ordering::Release);
                y.store(i, Relaxed);
                barrier();
                let heavy_saw = x.load(Relaxed);
                while done.load(Ordering::Acquire) < i {
                    std::thread::yield_now();
                }
                assert!(
                    heavy_saw == i || light_saw.load(Relaxed) == i,
                    "round {i}: both sides missed each other"
                );
            }
        });
    }

    #[test]
    fn the_two_halves_order_a_store_before_a_load() {
        store_buffering(heavy_barrier);
    }

    #[test]
    fn without_membarrier_a_protection_change_does_the_same() {
        store_buffering(|| protection_barrier().unwrap());
    }
}
