//! The guest's side: a virtual processor inside, and what it may ask for (SPEC 5.8).

// UNSAFETY: walks a Secure EPT as a guest inside.
#![expect(unsafe_code)]

use crate::legality::{ACCEPTABLE, Function};
use crate::measurement::DIGEST;
use crate::module::{Module, PageInfo};
use crate::platform::{Platform, Point};
use crate::sept::{SeptEntry, Side, State};
use crate::status::{Operand, Status};
use crate::td::SEPT_VE_DISABLE;
use crate::vcpu::Vcpu;
use alloc::sync::Arc;
use twofold_arch::{Gpa, Hpa, PAGE_SIZE};

/// A virtual processor that is inside its TD. Dropped, it leaves.
#[must_use = "the virtual processor leaves when this is dropped"]
pub struct Entered<'m, P: Platform> {
    module: &'m Module<P>,
    vcpu: Arc<Vcpu>,
    epoch: u64,
    must_flush: bool,
}

impl<P: Platform> Drop for Entered<'_, P> {
    fn drop(&mut self) {
        self.vcpu.td.epochs.leave(self.epoch);
        self.vcpu.leave();
    }
}

/// What became of TDG.MEM.PAGE.ACCEPT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accept {
    /// RAX is this: success, or what the guest did wrong.
    Returned(Status),
    /// An interrupt came; the guest executes the instruction again, which goes on where it was.
    Again,
    /// There is nothing to accept: the guest leaves with an EPT violation whose extended
    /// qualification is "accept" (1).
    Exit {
        /// The address that was to be accepted.
        gpa: Gpa,
        /// The level that was asked for.
        wanted: u8,
        /// The level at which the walk ended, and what was there.
        found: (SeptEntry, u8),
    },
}

/// What an EPT violation at a private address means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// The page is there now: the guest tries again.
    Present,
    /// The page waits to be accepted, and the guest wants to hear of it: #VE.
    Ve,
    /// The page waits to be accepted, and the guest does not want to hear of it: it leaves with
    /// the extended qualification "pending" (6).
    PendingExit,
    /// The host has to give the page: the guest leaves.
    Exit,
}

/// TDG.VP.INFO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VpInfo {
    /// Bits in a guest-physical address: 48 or 52. The highest is the shared bit.
    pub gpa_width: u8,
    /// ATTRIBUTES.
    pub attributes: u64,
    /// Virtual processors that the TD has.
    pub vcpus: u32,
    /// Virtual processors that it may have.
    pub max_vcpus: u32,
    /// The number of this one.
    pub index: u32,
}

impl<'m, P: Platform> Entered<'m, P> {
    pub(crate) fn new(module: &'m Module<P>, vcpu: Arc<Vcpu>, epoch: u64) -> Self {
        let must_flush = vcpu.enter_epoch(epoch);
        Self {
            module,
            vcpu,
            epoch,
            must_flush,
        }
    }

    pub(crate) fn still_allowed(&self) -> Result<(), Status> {
        let allowed = self.vcpu.td.allows(Function::VpEnter).map(|_| ());
        if allowed.is_err() {
            self.vcpu.disassociate();
        }
        allowed
    }

    /// Whether the processor has to drop the TD's translations before it runs: the epoch has changed
    /// since this virtual processor was inside last.
    pub const fn must_flush(&self) -> bool {
        self.must_flush
    }

    /// What TDH.VP.INIT put into the guest's RCX and R8.
    pub fn initial(&self) -> u64 {
        use twofold_table::sync::atomic::Ordering;
        self.vcpu.initial.load(Ordering::SeqCst)
    }

    /// The virtual processor's root page.
    pub fn tdvpr(&self) -> Hpa {
        self.vcpu.tdvpr
    }

    /// TDG.VP.INFO.
    pub fn info(&self) -> Option<VpInfo> {
        use twofold_table::sync::atomic::Ordering;
        let td = &self.vcpu.td;
        let params = td.running.get()?.params;
        Some(VpInfo {
            gpa_width: params.shared_bit() as u8 + 1,
            attributes: params.attributes,
            vcpus: td.vcpus.load(Ordering::SeqCst) as u32,
            max_vcpus: u32::from(params.max_vcpus),
            index: self.vcpu.index,
        })
    }

    /// MRTD, the measurement of the TD's initial memory (a metadata field that TDG.VM.RD reads).
    pub fn measurement(&self) -> Option<[u8; DIGEST]> {
        self.vcpu.td.digest.get().copied()
    }

    /// TDG.MEM.PAGE.ACCEPT of the page whose address and level are in `rcx`: makes a page that waits
    /// the guest's, filled with zeros.
    pub fn accept(&self, rcx: u64) -> Accept {
        let td = &self.vcpu.td;
        let invalid = Accept::Returned(Status::OPERAND_INVALID.with(Operand::Rcx));
        let Some(running) = td.running.get() else {
            return invalid;
        };
        let info = match PageInfo::parse(rcx, &(0..=1)) {
            Ok(info) if running.params.is_private(info.gpa) => info,
            _ => return invalid,
        };
        // SAFETY: a table goes only after it was blocked and every virtual processor that was
        // inside then has left; we are inside.
        let walked = unsafe { running.sept.walk(&self.module.pages, info.gpa, info.level) };
        let found = (walked.entry(), walked.level());
        let exit = |found| Accept::Exit {
            gpa: info.gpa,
            wanted: info.level,
            found,
        };
        if walked.level() != info.level {
            let accessible = walked
                .entry()
                .state()
                .is_some_and(State::is_guest_accessible);
            return if accessible {
                let level = u32::from(walked.level());
                Accept::Returned(Status::PAGE_ALREADY_ACCEPTED.with_detail(level))
            } else {
                exit(found)
            };
        }
        if self.module.platform().injects_busy(Point::SeptEntry) {
            return Accept::Returned(Status::OPERAND_BUSY.with(Operand::SeptEntry));
        }
        let locked = match walked.lock(Side::Guest) {
            Ok(locked) => locked,
            Err(status) => return Accept::Returned(status),
        };
        let entry = locked.entry();
        match locked.state() {
            State::Free | State::Removed => exit((entry, info.level)),
            state if !state.is_leaf() => {
                let level = u32::from(info.level);
                Accept::Returned(Status::PAGE_SIZE_MISMATCH.with_detail(level))
            }
            state if state.is_guest_accessible() => {
                let level = u32::from(info.level);
                Accept::Returned(Status::PAGE_ALREADY_ACCEPTED.with_detail(level))
            }
            state if ACCEPTABLE.contains(&state) => {
                let (entry, done) = self.zero(entry, info.level);
                let accepted = match state {
                    State::PendingExportedDirty => State::ExportedDirty,
                    _ => State::Mapped,
                };
                locked.publish(if done {
                    entry.with_state(accepted)
                } else {
                    entry
                });
                if done {
                    Accept::Returned(Status::SUCCESS)
                } else {
                    Accept::Again
                }
            }
            _ => exit((entry, info.level)),
        }
    }

    /// Fills a page with zeros, from where an interrupt ended that last time until the end or the
    /// next interrupt. Returns the entry with the new count, and whether all is done.
    fn zero(&self, entry: SeptEntry, level: u8) -> (SeptEntry, bool) {
        let platform = self.module.platform();
        let page = entry.page(level);
        let pieces = if level == 0 { 1 } else { 512 };
        let first = entry.accepted_pieces(level);
        for piece in first..pieces {
            platform.zero_page(Hpa::new(page.get() + u64::from(piece) * PAGE_SIZE));
            let done = piece + 1;
            if done < pieces && platform.is_interrupted() {
                return (entry.with_accepted_pieces(done), false);
            }
        }
        (entry.cleaned(level), true)
    }

    /// What an EPT violation at the private address `gpa` means for this guest.
    pub fn violation(&self, gpa: Gpa) -> Violation {
        let Some(running) = self.vcpu.td.running.get() else {
            return Violation::Exit;
        };
        if !running.params.is_private(gpa) {
            return Violation::Exit;
        }
        // SAFETY: as in `accept`.
        let walked = unsafe { running.sept.walk(&self.module.pages, gpa, 0) };
        match walked.entry().state() {
            Some(State::Mapped | State::ExportedDirty) => Violation::Present,
            Some(state) if ACCEPTABLE.contains(&state) => {
                if running.params.attributes & SEPT_VE_DISABLE == 0 {
                    Violation::Ve
                } else {
                    Violation::PendingExit
                }
            }
            _ => Violation::Exit,
        }
    }
}
