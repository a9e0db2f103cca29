//! The hypervisor: its parts, and how it begins.

use crate::error::Error;
use crate::host_table::{Env, Host, HostFault, Owner};
use crate::lock::Lock;
use crate::page::{PageMap, Pages, State};
use crate::place::Placed;
use crate::platform::{MAX_PROCESSORS, Platform};
use crate::pool::{Pool, Reach};
use crate::trace::{Cause, Event, Tracing};
use crate::vm::{Vcpu, Vm, VmTable};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use twofold_arch::stage2::{Geometry, Granule, Layout, Stage2Caps};
use twofold_arch::{Hfn, Hpa};
use twofold_table::RawPages;

/// What the hypervisor starts with.
#[derive(Clone, Copy, Debug)]
pub struct Config<'m> {
    /// All memory, with a record for each page.
    pub pages: PageMap<'m>,
    /// What the processors' stage 2 can do.
    pub caps: Stage2Caps,
    /// The hypervisor's own pages: code, data, stacks, the records, and the pool. The host never
    /// gets them.
    pub own: Pages,
    /// The part of them that is free: zeroed pages for the host's tables.
    pub pool: Pages,
}

/// A vCPU that a processor has loaded.
#[derive(Clone, Copy)]
pub(crate) struct Loaded {
    pub(crate) vm: Placed<Vm>,
    pub(crate) vcpu: Placed<Vcpu>,
}

/// The hypervisor.
pub struct Hypervisor<'m, P> {
    pub(crate) storage: RawPages<P>,
    pub(crate) pages: PageMap<'m>,
    pub(crate) caps: Stage2Caps,
    pub(crate) vms: Lock<VmTable>,
    pub(crate) host: Lock<Host>,
    /// The hypervisor's own states and pins.
    pub(crate) hyp: Lock<()>,
    /// What each processor has loaded. Only the processor itself changes its own.
    pub(crate) loaded: [Lock<Option<Loaded>>; MAX_PROCESSORS],
    /// Processors that run below the host's stage 2.
    pub(crate) deprivileged: [AtomicBool; MAX_PROCESSORS],
    pub(crate) finalised: AtomicBool,
    /// What the virtual counters of ordinary guests are behind, on each processor.
    pub(crate) counter_offsets: [AtomicU64; MAX_PROCESSORS],
    pub(crate) tracing: Tracing,
}

impl<'m, P: Platform> Hypervisor<'m, P> {
    /// Takes the machine: the hypervisor's pages are its own from now on, everything else is the
    /// host's, which runs below [`host_root`](Self::host_root) once every processor has loaded it.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the pages are not memory or the pool is not among the hypervisor's;
    /// [`Error::NoMemory`] if the pool is too small for the host's tables.
    pub fn new(platform: P, config: Config<'m>) -> Result<Self, Error> {
        let Config {
            pages,
            caps,
            own,
            pool,
        } = config;
        let storage = RawPages(platform);
        let records = pages.range(own)?;
        pages.range(pool)?;
        let end = |pages: Pages| pages.start.get() + pages.count;
        if pool.start < own.start || end(pool) > end(own) {
            return Err(Error::Invalid);
        }
        for record in records {
            record.set_host(State::NoPage);
            record.set_hyp(State::Owned);
        }
        let layout = Layout::new(Granule::K4, false);
        let bits = caps.pa_bits.min(layout.address_bits());
        let geometry = Geometry::new(layout, bits).map_err(|_| Error::Invalid)?;
        let env = Env {
            storage: &storage,
            pages: &pages,
        };
        let reach = Reach {
            platform: &storage.0,
            pages: &pages,
        };
        let pool = Pool::new(reach, pool.start, Hfn::new(end(pool)));
        let mut host = Host::new(&env, geometry, pool).ok_or(Error::NoMemory)?;
        host.reserve(&env, own)?;
        host.give_away(&env, own, Owner::Hyp)?;
        Ok(Self {
            storage,
            pages,
            caps,
            vms: Lock::new(VmTable::new()),
            host: Lock::new(host),
            hyp: Lock::new(()),
            loaded: core::array::from_fn(|_| Lock::new(None)),
            deprivileged: [const { AtomicBool::new(false) }; MAX_PROCESSORS],
            finalised: AtomicBool::new(false),
            counter_offsets: [const { AtomicU64::new(0) }; MAX_PROCESSORS],
            tracing: Tracing::new(),
        })
    }

    /// The machine.
    pub const fn platform(&self) -> &P {
        &self.storage.0
    }

    /// The records of all memory.
    pub const fn pages(&self) -> &PageMap<'m> {
        &self.pages
    }

    /// What the processors' stage 2 can do.
    pub const fn caps(&self) -> Stage2Caps {
        self.caps
    }

    /// The geometry of the host's table.
    pub fn host_geometry(&self) -> Result<Geometry, Error> {
        let layout = Layout::new(Granule::K4, false);
        Geometry::new(layout, self.caps.pa_bits.min(layout.address_bits()))
            .map_err(|_| Error::Invalid)
    }

    /// The root of the host's table, for VTTBR_EL2.
    pub fn host_root(&self) -> Hpa {
        self.host.lock().root().page.hpa()
    }

    /// Free pages of the host's pool, and how often its device mappings were given up.
    pub fn host_pool(&self) -> (u64, u64) {
        let host = self.host.lock();
        (host.free_pages(), host.recycled())
    }

    pub(crate) fn env(&self) -> Env<'_, 'm, P> {
        Env {
            storage: &self.storage,
            pages: &self.pages,
        }
    }

    /// An access of the host was stopped by its stage 2.
    pub fn host_fault(&self, address: Hpa) -> HostFault {
        self.trace(Event::HypEnter, Cause::HostAbort as u64, 0);
        let fault = self.host.lock().fault(&self.env(), address);
        let outcome = match fault {
            HostFault::Mapped { .. } => 0,
            HostFault::Spurious => 1,
            HostFault::Denied => 2,
        };
        self.trace(Event::HostMemAbort, address.get(), outcome);
        self.trace(Event::HypExit, Cause::HostAbort as u64, 0);
        fault
    }

    /// This processor now runs below the host's stage 2; once one does, the calls that set the
    /// hypervisor up are over.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] on a processor that already does.
    pub fn finalise(&self) -> Result<(), Error> {
        let this = self
            .deprivileged
            .get(self.platform().processor())
            .ok_or(Error::Invalid)?;
        if this.swap(true, Ordering::AcqRel) {
            return Err(Error::NotPermitted);
        }
        self.finalised.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether the calls that set the hypervisor up are over.
    pub fn is_finalised(&self) -> bool {
        self.finalised.load(Ordering::Acquire)
    }
}
