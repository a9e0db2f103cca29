//! The TD, as the hypervisor sees it: the real module behind the MMU's hooks, and guests that use
//! what they have found as long as they are inside.

use super::memory::{BASE, Machine, Memory, PAGE, PAGES, give_way, switch_point};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use twofold_arch::ept::{self, EptCaps, EptEntry};
use twofold_arch::{Gfn, Hpa, Level};
use twofold_mmu::{ExternalError, ExternalTables, Unknown};
use twofold_tdx::{
    Accept, Entered, Failure, Module, PageType, SeptEntry, State, TDCX_PAGES, TDVPX_PAGES,
};

/// A virtual processor that is inside, and which of its runs this is.
struct Inside {
    entered: Entered<'static, Machine>,
    run: u64,
}

/// Where a virtual processor is.
enum Place {
    Outside,
    /// On its way in or out.
    Moving,
    Inside(Arc<Inside>),
}

/// The TD, as the hypervisor sees it: the MMU's hooks.
pub struct Td {
    /// Before the module, which they refer to.
    processors: Mutex<Vec<Place>>,
    /// Translations of each virtual processor.
    tlbs: Mutex<Vec<BTreeMap<u64, Hpa>>>,
    runs: AtomicU64,
    pub module: Module<Machine>,
    pub memory: Arc<Memory>,
    pub tdr: Hpa,
    vcpus: Vec<Hpa>,
    held: AtomicBool,
    /// How often processors were held.
    pub holds: AtomicU64,
    pub tracks: AtomicU64,
    /// The hypervisor has a bug: nobody is made to leave.
    pub forgets_to_kick: AtomicBool,
    running: AtomicBool,
}

fn info(gfn: Gfn, level: Level) -> u64 {
    gfn.address().get() | u64::from(level.number() - 1)
}

fn external(failure: Failure) -> ExternalError {
    match failure.status.may_be_retried() {
        true => ExternalError::Busy,
        // Among others what only an error in the order of calls could lead to.
        false => ExternalError::Refused(failure.status.raw()),
    }
}

/// Calls until it is not busy.
fn insist<T>(call: impl Fn() -> Result<T, Failure>) -> T {
    loop {
        match call() {
            Ok(value) => return value,
            Err(failure) => assert!(failure.status.may_be_retried(), "{failure:?}"),
        }
    }
}

impl Td {
    pub fn new(memory: &Arc<Memory>, wide: bool, attributes: u64, vcpus: u64) -> Arc<Self> {
        let module = Module::new(Machine(Arc::clone(memory)), 32..=63);
        let tdr = memory.take();
        module.mng_create(tdr, 32).unwrap();
        module.mng_key_config(tdr).unwrap();
        for _ in 0..TDCX_PAGES {
            module.mng_add_cx(memory.take(), tdr).unwrap();
        }
        let params = memory.take();
        memory.write_params(params, wide, attributes);
        module.mng_init(tdr, params).unwrap();
        memory.give_back(params);
        let vcpus: Vec<_> = (0..vcpus)
            .map(|number| {
                let tdvpr = memory.take();
                module.vp_create(tdvpr, tdr).unwrap();
                for _ in 0..TDVPX_PAGES {
                    module.vp_add_cx(memory.take(), tdvpr).unwrap();
                }
                module.vp_init(tdvpr, number).unwrap();
                tdvpr
            })
            .collect();
        Arc::new(Self {
            processors: Mutex::new(vcpus.iter().map(|_| Place::Outside).collect()),
            tlbs: Mutex::new(vcpus.iter().map(|_| BTreeMap::new()).collect()),
            runs: AtomicU64::new(0),
            module,
            memory: Arc::clone(memory),
            tdr,
            vcpus,
            held: AtomicBool::new(false),
            holds: AtomicU64::new(0),
            tracks: AtomicU64::new(0),
            forgets_to_kick: AtomicBool::new(false),
            running: AtomicBool::new(false),
        })
    }

    /// TDH.MR.FINALIZE.
    pub fn finalize(&self) {
        insist(|| self.module.mr_finalize(self.tdr));
        self.running.store(true, Ordering::SeqCst);
    }

    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// The virtual processor goes inside. `false` if it is not let in now.
    pub fn enter(&self, vcpu: usize) -> bool {
        switch_point();
        {
            let mut processors = self.processors.lock().unwrap();
            if self.held.load(Ordering::SeqCst) || !matches!(processors[vcpu], Place::Outside) {
                return false;
            }
            // From here on who kicks waits for it.
            processors[vcpu] = Place::Moving;
        }
        let entered = self.module.vp_enter(self.vcpus[vcpu]);
        let place = match entered {
            Err(_) => Place::Outside,
            Ok(entered) => {
                if entered.must_flush() {
                    self.tlbs.lock().unwrap()[vcpu].clear();
                }
                // SAFETY: the module is in the same value, behind `Arc`, and dropped after it.
                let entered = unsafe {
                    std::mem::transmute::<Entered<'_, Machine>, Entered<'static, Machine>>(entered)
                };
                Place::Inside(Arc::new(Inside {
                    entered,
                    run: self.runs.fetch_add(1, Ordering::SeqCst),
                }))
            }
        };
        let is_inside = matches!(place, Place::Inside(_));
        self.processors.lock().unwrap()[vcpu] = place;
        is_inside
    }

    /// The virtual processor leaves, if it is inside or on its way. It is outside when this returns.
    pub fn leave(&self, vcpu: usize) {
        loop {
            let place = {
                let mut processors = self.processors.lock().unwrap();
                match processors[vcpu] {
                    Place::Outside => return,
                    _ => std::mem::replace(&mut processors[vcpu], Place::Moving),
                }
            };
            let Place::Inside(mut left) = place else {
                give_way();
                continue;
            };
            // In the middle of something that the module does for it.
            while Arc::get_mut(&mut left).is_none() {
                give_way();
            }
            drop(left);
            self.processors.lock().unwrap()[vcpu] = Place::Outside;
            return;
        }
    }

    fn inside(&self, vcpu: usize) -> Option<Arc<Inside>> {
        match &self.processors.lock().unwrap()[vcpu] {
            Place::Inside(inside) => Some(Arc::clone(inside)),
            Place::Outside | Place::Moving => None,
        }
    }

    /// Which run the virtual processor is in, if it is inside.
    fn run_of(&self, vcpu: usize) -> Option<u64> {
        self.inside(vcpu).map(|inside| inside.run)
    }

    fn kick(&self) {
        for vcpu in 0..self.vcpus.len() {
            switch_point();
            self.leave(vcpu);
        }
    }

    /// TDG.MEM.PAGE.ACCEPT by a virtual processor that is inside.
    pub fn accept(&self, vcpu: usize, gfn: u64) -> Option<Accept> {
        let inside = self.inside(vcpu)?;
        Some(inside.entered.accept(info(Gfn::new(gfn), Level::L4K)))
    }

    /// The guest uses private memory: through a translation that it has, or one that it finds now.
    /// The page must be the TD's, and stays so until the processor leaves. `None` if it is not
    /// inside; whether there was a translation.
    pub fn use_private(&self, vcpu: usize, gfn: u64) -> Option<bool> {
        loop {
            let run = self.run_of(vcpu)?;
            let known = self.tlbs.lock().unwrap()[vcpu].get(&gfn).copied();
            let page = match known {
                Some(page) => page,
                None => {
                    let (mut table, level) = self.module.sept_root(self.tdr).unwrap();
                    let mut level = Level::from_number(level).unwrap();
                    let found = loop {
                        switch_point();
                        if self.run_of(vcpu) != Some(run) {
                            return None;
                        }
                        let entry = self.memory.entry(table, level.index(Gfn::new(gfn)));
                        match ept::decode(entry, level, EptCaps::full(51)) {
                            EptEntry::NotPresent { .. } => break None,
                            EptEntry::Table { hpa, .. } => {
                                table = hpa;
                                level = level.below().unwrap();
                            }
                            EptEntry::Leaf { hpa, .. } => break Some(hpa),
                            EptEntry::Misconfig(_) => panic!("{entry:#x} is misconfigured"),
                        }
                    };
                    let Some(page) = found else {
                        return Some(false);
                    };
                    page
                }
            };
            // One step with the use: who kicks waits until it is over.
            if self.run_of(vcpu) == Some(run) {
                self.tlbs.lock().unwrap()[vcpu].insert(gfn, page);
                assert!(
                    self.memory.page_of(gfn) == Some(page) && !self.memory.is_free(page),
                    "the guest uses a page of gfn {gfn:#x} that the host has"
                );
                let owner = self.module.metadata(page).map(|page| page.owner);
                assert_eq!(owner, Some(self.tdr), "the guest uses a page that went");
                return Some(true);
            }
        }
    }

    /// The leaf that the Secure EPT has for `gfn`, as a look from outside finds it.
    fn leaf_entry(&self, gfn: u64) -> Option<SeptEntry> {
        let (mut table, mut level) = self.module.sept_root(self.tdr)?;
        loop {
            let index = Level::from_number(level).unwrap().index(Gfn::new(gfn));
            let entry = SeptEntry::from_raw(self.memory.entry(table, index));
            match entry.state().unwrap() {
                State::Free => return None,
                State::NonLeafMapped => {
                    table = entry.page(level - 1);
                    level -= 1;
                }
                _ => {
                    assert_eq!(level, 1, "{entry:?}");
                    return Some(entry);
                }
            }
        }
    }

    /// [`leaf_entry`](Self::leaf_entry) while nobody changes it: its page and state.
    pub fn secure(&self, gfn: u64) -> Option<(Hpa, State)> {
        let entry = self.leaf_entry(gfn)?;
        assert!(!entry.is_locked(), "a lock was left behind");
        Some((entry.page(0), entry.state().unwrap()))
    }

    /// Pages that belong to the TD, by kind.
    pub fn owned(&self, kind: PageType) -> BTreeSet<u64> {
        (0..PAGES)
            .map(|index| BASE + index * PAGE)
            .filter(|&page| {
                let metadata = self.module.metadata(Hpa::new(page));
                metadata.is_some_and(|page| page.kind == kind)
            })
            .collect()
    }

    pub fn reclaim(&self, page: Hpa) {
        insist(|| self.module.page_reclaim(page));
    }
}

impl ExternalTables for Td {
    fn link_table(&self, gfn: Gfn, level: Level, page: Hpa) -> Result<(), ExternalError> {
        self.module
            .sept_add(info(gfn, level), self.tdr, page)
            .map_err(external)
    }

    fn map_leaf(
        &self,
        gfn: Gfn,
        level: Level,
        hpa: Hpa,
        source: Option<u64>,
    ) -> Result<(), ExternalError> {
        let rcx = info(gfn, level);
        match source {
            Some(source) => self.module.page_add(rcx, self.tdr, hpa, Hpa::new(source)),
            None => self.module.page_aug(rcx, self.tdr, hpa),
        }
        .map_err(external)
    }

    fn block_leaf(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        if !self.is_running() {
            return Ok(());
        }
        self.module
            .range_block(info(gfn, level), self.tdr)
            .map_err(external)
    }

    fn track(&self) -> Result<(), ExternalError> {
        if !self.is_running() {
            return Ok(());
        }
        self.tracks.fetch_add(1, Ordering::SeqCst);
        self.module.track(self.tdr).map_err(external)?;
        if !self.forgets_to_kick.load(Ordering::SeqCst) {
            self.kick();
        }
        Ok(())
    }

    fn remove_leaf(&self, gfn: Gfn, level: Level, hpa: Hpa) -> Result<(), ExternalError> {
        let page = self
            .module
            .page_remove(info(gfn, level), self.tdr)
            .map_err(external)?;
        assert_eq!(page, hpa, "the mirror had another page");
        Ok(())
    }

    fn hold_vcpus(&self) {
        assert!(!self.held.swap(true, Ordering::SeqCst), "held already");
        self.holds.fetch_add(1, Ordering::SeqCst);
        self.kick();
    }

    fn release_vcpus(&self) {
        assert!(self.held.swap(false, Ordering::SeqCst), "not held");
    }

    fn end(&self) {
        self.kick();
        for &tdvpr in &self.vcpus {
            insist(|| self.module.vp_flush(tdvpr));
        }
        insist(|| self.module.mng_vp_flush_done(self.tdr));
        insist(|| self.module.mng_key_free_id(self.tdr));
    }

    fn reclaim_leaf(&self, hpa: Hpa, _level: Level) {
        self.reclaim(hpa);
    }

    fn reclaim_table(&self, page: Hpa) {
        self.reclaim(page);
    }

    fn leaf(&self, gfn: Gfn, level: Level) -> Result<Option<Hpa>, Unknown> {
        if level != Level::L4K {
            return Err(Unknown);
        }
        Ok(self.leaf_entry(gfn.get()).map(|entry| entry.page(0)))
    }
}
