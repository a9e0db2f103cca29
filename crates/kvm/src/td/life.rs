//! A TD's life: its pages, its key, its virtual processors, and its end.

use super::platform::{self, TdxModule};
use crate::fork;
use crate::sync::Mutex;
use crate::table_pool::TablePool;
use kvm_bindings::kvm_cpuid_entry2;
use rustix::io::Errno;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use twofold_arch::Hpa;
use twofold_cpu::Machine;
use twofold_tdx::measurement::DIGEST;
use twofold_tdx::{Failure, Platform, Status, TDCX_PAGES, TDVPX_PAGES, TdParams};

/// How often a function that finds a lock taken is called before KVM gives up.
pub(super) const RETRIES: u32 = 10_000;

/// How far a TD has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// `INIT_VM` is still to come.
    Uninitialized,
    /// Its initial memory can be added.
    Initialized,
    /// It is measured and may run.
    Runnable,
}

/// What KVM knows about a TD.
pub(crate) struct Td {
    module: Arc<TdxModule>,
    machine: Arc<Machine>,
    generation: u32,
    stage: AtomicU8,
    /// Something went wrong that should be impossible; nothing works any more.
    bugged: AtomicBool,
    built: OnceLock<Built>,
    /// Every page that the module was given for control structures.
    control: Mutex<Vec<Hpa>>,
    /// The virtual processors that the module knows.
    vcpus: Mutex<Vec<Hpa>>,
    /// The key is gone, or there was none.
    released: AtomicBool,
    /// Virtual processors that are inside, or about to be.
    pub(super) inside: AtomicU32,
    /// How many keep virtual processors out.
    pub(super) held: AtomicU32,
    /// Adding initial memory and ending it exclude each other (KVM's `slots_lock`).
    pub(super) building: Mutex<()>,
    /// After what the module may still read of it.
    pages: TablePool,
}

/// What `INIT_VM` decides.
struct Built {
    tdr: Hpa,
    params: TdParams,
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// A virtual processor of a TD, as the module knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TdVcpu {
    /// Its root page, which is its name.
    pub(crate) tdvpr: Hpa,
    /// The page where the processor leaves information about a #VE.
    pub(crate) ve_info: Hpa,
    /// Its number in the TD.
    pub(crate) index: u32,
}

/// Calls a function of the module until it is not told to call again.
pub(super) fn insist<R>(mut call: impl FnMut() -> Result<R, Failure>) -> Result<R, Failure> {
    for _ in 1..RETRIES {
        match call() {
            Err(failure) if failure.status.may_be_retried() => std::hint::spin_loop(),
            result => return result,
        }
    }
    call()
}

impl Td {
    /// A TD of which there is nothing yet.
    pub(crate) fn new(machine: Arc<Machine>) -> Self {
        Self {
            module: platform::module(),
            machine,
            generation: fork::generation(),
            stage: AtomicU8::new(Stage::Uninitialized as u8),
            bugged: AtomicBool::new(false),
            built: OnceLock::new(),
            control: Mutex::default(),
            vcpus: Mutex::default(),
            released: AtomicBool::new(true),
            inside: AtomicU32::new(0),
            held: AtomicU32::new(0),
            building: Mutex::default(),
            pages: TablePool::default(),
        }
    }

    /// The module that has the TD.
    pub(crate) fn module(&self) -> &TdxModule {
        &self.module
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(crate) fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Uninitialized,
            1 => Stage::Initialized,
            _ => Stage::Runnable,
        }
    }

    pub(super) fn set_stage(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Release);
    }

    /// Whether the TD has a key: it was initialised and is not being taken apart.
    pub(crate) fn has_key(&self) -> bool {
        !self.released.load(Ordering::Acquire)
    }

    /// The TD's root page, by which the module knows it.
    ///
    /// # Errors
    /// `EINVAL` before `INIT_VM`.
    pub(crate) fn tdr(&self) -> Result<Hpa, Errno> {
        self.built.get().map(|built| built.tdr).ok_or(Errno::INVAL)
    }

    /// The measurement of its initial memory (MRTD), once it is finalised.
    pub(crate) fn measurement(&self) -> Option<[u8; DIGEST]> {
        self.module.measurement(self.tdr().ok()?)
    }

    /// What `INIT_VM` decided, or `None` before it.
    pub(crate) fn params(&self) -> Option<TdParams> {
        self.built.get().map(|built| built.params)
    }

    /// The bit that makes an address shared, as a number of bytes; `None` before `INIT_VM`.
    #[inline]
    pub(crate) fn shared_bit(&self) -> Option<u64> {
        Some(1 << self.params()?.shared_bit())
    }

    /// What CPUID says in the TD. Leaves that are not here raise #VE.
    pub(crate) fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        self.built.get().map_or(&[], |built| &built.cpuid)
    }

    /// Nothing works any more, for this reason: every ioctl answers `EIO`.
    #[cold]
    pub(crate) fn bug(&self, reason: &str, status: Option<Status>) {
        if !self.bugged.swap(true, Ordering::AcqRel) {
            tracing::error!(reason, ?status, "the TD cannot go on");
        }
    }

    pub(crate) fn is_bugged(&self) -> bool {
        self.bugged.load(Ordering::Acquire)
    }

    /// A page for the module.
    pub(super) fn take_page(&self) -> Result<Hpa, Errno> {
        let page = self.pages.take().ok_or(Errno::NOMEM)?;
        Ok(Hpa::new(page.as_ptr().expose_provenance() as u64))
    }

    fn give_page_back(&self, page: Hpa) {
        let pointer = std::ptr::with_exposed_provenance_mut(page.get() as usize);
        if let Some(pointer) = NonNull::new(pointer) {
            self.pages.give_back(pointer);
        }
    }

    /// Gives the module a page for a control structure, by `add`. The page is noted, to be reclaimed
    /// in the end, if the module took it.
    fn add_control_page(
        &self,
        add: impl Fn(Hpa) -> Result<(), Failure>,
    ) -> Result<Hpa, ControlError> {
        let page = self.take_page().map_err(ControlError::Host)?;
        match insist(|| add(page)) {
            Ok(()) => {
                self.control.lock().push(page);
                Ok(page)
            }
            Err(failure) => {
                self.give_page_back(page);
                Err(ControlError::Module(failure.status))
            }
        }
    }

    /// Creates the TD: its key, its control pages, its parameters. If that fails, everything has
    /// been given back, unless the module does not let go of it: then nothing works any more.
    pub(super) fn create(
        &self,
        params: &ParamsPage,
        cpuid: Vec<kvm_cpuid_entry2>,
    ) -> Result<(), ControlError> {
        let module = &*self.module;
        let tdr = self.create_root()?;
        self.released.store(false, Ordering::Release);
        let rest = || {
            insist(|| module.mng_key_config(tdr))?;
            for _ in 0..TDCX_PAGES {
                self.add_control_page(|page| module.mng_add_cx(page, tdr))?;
            }
            insist(|| module.mng_init(tdr, params.address()))?;
            module
                .params(tdr)
                .ok_or(ControlError::Module(Status::OP_STATE_INCORRECT))
        };
        match rest() {
            Ok(params) => {
                let _ = self.built.set(Built { tdr, params, cpuid });
                Ok(())
            }
            Err(error) => {
                self.release_key_of(tdr);
                self.reclaim();
                Err(error)
            }
        }
    }

    /// The root page, with the first key that is free.
    fn create_root(&self) -> Result<Hpa, ControlError> {
        for key in platform::keys() {
            match self.add_control_page(|page| self.module.mng_create(page, key)) {
                Err(ControlError::Module(status)) if status.is(Status::HKID_NOT_FREE) => {}
                result => return result,
            }
        }
        Err(ControlError::Host(Errno::NOSPC))
    }

    /// Creates a virtual processor whose guest finds `initial` in RCX.
    pub(super) fn create_vcpu(&self, initial: u64) -> Result<TdVcpu, ControlError> {
        let (module, tdr) = (&*self.module, self.tdr().map_err(ControlError::Host)?);
        let tdvpr = self.add_control_page(|page| module.vp_create(page, tdr))?;
        let index = {
            let mut vcpus = self.vcpus.lock();
            vcpus.push(tdvpr);
            vcpus.len() as u32 - 1
        };
        let mut last = tdvpr;
        for _ in 0..TDVPX_PAGES {
            last = self.add_control_page(|page| module.vp_add_cx(page, tdvpr))?;
        }
        // Nothing waits to be taken from it.
        module.platform().zero_page(last);
        insist(|| module.vp_init(tdvpr, initial))?;
        Ok(TdVcpu {
            tdvpr,
            ve_info: last,
            index,
        })
    }

    /// Whether the TD was created by this process, rather than by the one that forked it.
    pub(super) fn is_ours(&self) -> bool {
        self.generation == fork::generation()
    }

    /// Takes the TD's key away: no virtual processor enters again, and its pages can be reclaimed.
    pub(crate) fn release_key(&self) {
        if let Ok(tdr) = self.tdr()
            && self.is_ours()
        {
            self.release_key_of(tdr);
        }
    }

    fn release_key_of(&self, tdr: Hpa) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        let module = &*self.module;
        let release = || {
            for &vcpu in self.vcpus.lock().iter() {
                insist(|| module.vp_flush(vcpu))?;
            }
            insist(|| module.mng_vp_flush_done(tdr))?;
            insist(|| module.mng_key_free_id(tdr))
        };
        if let Err(failure) = release() {
            self.bug("its key cannot be released", Some(failure.status));
        }
    }

    /// Takes every control page back, the root page last.
    fn reclaim(&self) {
        let mut pages = std::mem::take(&mut *self.control.lock());
        self.vcpus.lock().clear();
        while let Some(page) = pages.pop() {
            match insist(|| self.module.page_reclaim(page)) {
                Ok(_) => self.give_page_back(page),
                Err(failure) => {
                    // The pool must not be unmapped under the module.
                    self.bug("a page cannot be reclaimed", Some(failure.status));
                    self.control.lock().push(page);
                }
            }
        }
    }
}

impl Drop for Td {
    fn drop(&mut self) {
        if self.is_ours() {
            self.release_key();
            self.reclaim();
        }
        if !self.is_ours() || !self.control.lock().is_empty() {
            // The module may know these pages still: they are never used for anything else.
            std::mem::forget(std::mem::take(&mut self.pages));
        }
    }
}

/// Why the module did not take a control page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ControlError {
    /// There is no page to give, or no key.
    Host(Errno),
    /// It refused.
    Module(Status),
}

impl From<Failure> for ControlError {
    fn from(failure: Failure) -> Self {
        Self::Module(failure.status)
    }
}

/// A page with the parameters of a TD, for the module to read.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(super) struct ParamsPage(pub(super) [u8; twofold_tdx::TD_PARAMS_BYTES]);

impl ParamsPage {
    fn address(&self) -> Hpa {
        Hpa::new((&raw const *self).expose_provenance() as u64)
    }
}
