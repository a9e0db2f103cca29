//! Entering a TD, and keeping its virtual processors out of it.

use super::life::{Td, TdVcpu};
use super::platform::ProcessPlatform;
use rustix::io::Errno;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use twofold_tdx::Entered;

/// A virtual processor that is inside. Dropped, it leaves.
#[must_use = "the virtual processor leaves when this is dropped"]
pub(crate) struct Inside<'td> {
    entered: Entered<'td, ProcessPlatform>,
    /// Afterwards, so that who finds nobody inside finds nobody whom the module counts.
    _counted: Counted<'td>,
}

impl<'td> Deref for Inside<'td> {
    type Target = Entered<'td, ProcessPlatform>;

    fn deref(&self) -> &Self::Target {
        &self.entered
    }
}

struct Counted<'td>(&'td AtomicU32);

impl<'td> Counted<'td> {
    fn new(count: &'td AtomicU32) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Td {
    /// TDH.VP.ENTER: the virtual processor is inside until the result is dropped. While virtual
    /// processors are kept out, or the module is busy, it tries again, until `stop` says that there
    /// is something else to do: `None`.
    ///
    /// # Errors
    /// `EIO` for a TD that can never be entered again.
    pub(crate) fn enter(
        &self,
        vcpu: TdVcpu,
        stop: impl Fn() -> bool,
    ) -> Result<Option<Inside<'_>>, Errno> {
        loop {
            // Counted first: who keeps others out looks at the count after it has said so.
            let counted = Counted::new(&self.inside);
            if self.held.load(Ordering::SeqCst) == 0 {
                match self.module().vp_enter(vcpu.tdvpr) {
                    Ok(entered) => {
                        return Ok(Some(Inside {
                            entered,
                            _counted: counted,
                        }));
                    }
                    Err(failure) if !failure.status.may_be_retried() => {
                        self.bug("it cannot be entered", Some(failure.status));
                        return Err(Errno::IO);
                    }
                    Err(_) => {}
                }
            }
            drop(counted);
            if self.is_bugged() {
                return Err(Errno::IO);
            }
            if stop() {
                return Ok(None);
            }
            rustix::thread::sched_yield();
        }
    }
}
