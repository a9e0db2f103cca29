//! Entering a TD.

use super::life::{Td, TdVcpu};
use super::platform::ProcessPlatform;
use rustix::io::Errno;
use twofold_tdx::Entered;

impl Td {
    /// TDH.VP.ENTER: the virtual processor is inside until the result is dropped. While the module
    /// is busy it is called again, until `stop` says that there is something else to do: `None`.
    ///
    /// # Errors
    /// `EIO` for a TD that can never be entered again.
    pub(crate) fn enter(
        &self,
        vcpu: TdVcpu,
        stop: impl Fn() -> bool,
    ) -> Result<Option<Entered<'_, ProcessPlatform>>, Errno> {
        loop {
            match self.module().vp_enter(vcpu.tdvpr) {
                Ok(entered) => return Ok(Some(entered)),
                Err(failure) if !failure.status.may_be_retried() => {
                    self.bug("it cannot be entered", Some(failure.status));
                    return Err(Errno::IO);
                }
                Err(_) if stop() => return Ok(None),
                Err(_) => rustix::thread::sched_yield(),
            }
        }
    }
}
