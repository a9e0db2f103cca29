//! The warm pool that every contender takes its tables from: pages of the program that have been
//! touched, last given back first. All take from the same one in turns, so nobody's tables are in a
//! better state than the next one's.
//!
//! UNSAFETY: fills pages by address.
#![expect(unsafe_code)]

use crate::huge::Huge;
use anyhow::Result;
use std::sync::{Mutex, PoisonError};
use twofold_arch::PAGE_SIZE;

struct Stack {
    free: Vec<u64>,
    pages: u64,
}

static STACK: Mutex<Stack> = Mutex::new(Stack {
    free: Vec::new(),
    pages: 0,
});

fn stack() -> std::sync::MutexGuard<'static, Stack> {
    // A push or a pop leaves nothing half done.
    STACK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes sure that `count` pages can be taken. They stay in the pool for as long as the program
/// runs.
///
/// # Errors
/// If the machine does not have that much memory.
pub(crate) fn reserve(count: u64) -> Result<()> {
    let mut stack = stack();
    let missing = count.saturating_sub(stack.free.len() as u64);
    if missing == 0 {
        return Ok(());
    }
    let memory = Huge::new(missing * PAGE_SIZE)?;
    let base = memory.address();
    std::mem::forget(memory);
    stack
        .free
        .extend((0..missing).rev().map(|page| base + page * PAGE_SIZE));
    stack.pages += missing;
    // Giving pages back never allocates.
    let capacity = stack.pages as usize - stack.free.len();
    stack.free.reserve(capacity);
    Ok(())
}

/// The address of a page with any content, or `None` if fewer were reserved than are used.
#[inline]
pub(crate) fn take() -> Option<u64> {
    stack().free.pop()
}

/// Gives back a page from [`take`].
#[inline]
pub(crate) fn give_back(page: u64) {
    stack().free.push(page);
}

/// Pages that have been taken and not given back.
pub(crate) fn in_use() -> u64 {
    let stack = stack();
    stack.pages - stack.free.len() as u64
}

/// [`take`], every entry of the page written.
pub(crate) fn take_filled(value: u64) -> Option<u64> {
    let page = take()?;
    let entries = std::ptr::with_exposed_provenance_mut::<[u64; 512]>(page as usize);
    // SAFETY: a page that was taken belongs to who has taken it.
    unsafe { entries.write([value; 512]) };
    Some(page)
}
