//! A machine made of ordinary memory, for tests.
//!
//! Physical addresses are offset, so that nothing comes to depend on an identity. Touching a page
//! that EL2 has not mapped is a failed test. The host's and guests' accesses go through a walk that
//! shares no code with the tables' writer, and through a TLB that forgets only what it is told to
//! forget, so that a missing invalidation is seen.

#![expect(unsafe_code, reason = "plays physical memory")]
#![cfg_attr(loom, allow(dead_code, reason = "the models use less of it"))]

use crate::guest::Access;
use crate::hypervisor::{Config, Hypervisor};
use crate::interrupts::{Interface, VirtualGic};
use crate::page::{PageMap, PageRecord, Pages, Region};
use crate::platform::{Platform, Vectors, Vmid};
use crate::run::Stage2;
use std::alloc::{Layout as Allocation, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use twofold_arch::stage2::{Granule, Layout, Stage2Caps, Stage2Entry, Stage2Flags, decode};
use twofold_arch::{Gpa, Hfn, Hpa, PAGE_SIZE};
use twofold_table::PageAccess;

#[cfg(loom)]
loom::thread_local! { static PROCESSOR: std::cell::Cell<usize> = std::cell::Cell::new(0); }
#[cfg(not(loom))]
std::thread_local! { static PROCESSOR: std::cell::Cell<usize> = const { std::cell::Cell::new(0) }; }

/// This thread plays the processor with this number from now on.
pub(crate) fn become_processor(number: usize) {
    PROCESSOR.with(|cell| cell.set(number));
}

/// The first page of memory.
pub(crate) const BASE: u64 = 0x4_0000;
/// Bits of a physical address.
pub(crate) const PA_BITS: u32 = 36;

/// What owns the memory of a simulated machine.
pub(crate) struct Ram {
    pages: u64,
    memory: NonNull<u64>,
    regions: [Region; 1],
    records: Vec<PageRecord>,
    own: u64,
    pa_bits: u32,
    /// Whether processors have what not every processor has.
    features: bool,
}

// SAFETY: the memory is reached through atomics, or by the one who owns a page.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.memory.as_ptr().cast(), Self::allocation(self.pages)) };
    }
}

impl Ram {
    fn allocation(pages: u64) -> Allocation {
        let size = (pages * PAGE_SIZE) as usize;
        Allocation::from_size_align(size, PAGE_SIZE as usize).unwrap()
    }

    /// Memory of `pages` pages, the first `own` of which are the hypervisor's pool.
    pub(crate) fn new(pages: u64, own: u64) -> Self {
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(Self::allocation(pages)) };
        Self {
            pages,
            memory: NonNull::new(memory.cast()).unwrap(),
            regions: [Region {
                start: Hfn::new(BASE),
                pages,
                no_map: false,
            }],
            records: (0..pages).map(|_| PageRecord::new()).collect(),
            own,
            pa_bits: PA_BITS,
            features: true,
        }
    }

    /// The same with other physical addresses.
    pub(crate) fn with_address_bits(mut self, pa_bits: u32) -> Self {
        self.pa_bits = pa_bits;
        self
    }

    /// The same with processors that have nothing beside stage 2.
    pub(crate) fn without_features(mut self) -> Self {
        self.features = false;
        self
    }

    pub(crate) fn boot(&self) -> Hypervisor<'_, Machine<'_>> {
        let own = Pages {
            start: Hfn::new(BASE),
            count: self.own,
        };
        let machine = Machine {
            ram: self,
            mapped: (0..self.pages)
                .map(|page| AtomicBool::new(page < self.own))
                .collect(),
            tlb: Mutex::new(BTreeMap::new()),
            wiped: AtomicU64::new(0),
            counter: AtomicU64::new(1000),
            devices: Mutex::default(),
            vectors: Mutex::default(),
            ssbs: self.features.then(|| AtomicU64::new(0)),
            gic: self.features.then(Gic::default),
        };
        let config = Config {
            pages: PageMap::new(&self.regions, &self.records, self.pa_bits).unwrap(),
            caps: Stage2Caps {
                pa_bits: self.pa_bits,
                vmid16: false,
                hardware_access_flag: false,
                hardware_dirty: false,
            },
            own,
            pool: own,
        };
        Hypervisor::new(machine, config).unwrap()
    }

    /// A page by its number from the start of memory.
    pub(crate) fn page(number: u64) -> Hfn {
        Hfn::new(BASE + number)
    }
}

/// What a TLB holds: where an address is, and what may be done there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Translation {
    pub(crate) page: Hfn,
    pub(crate) flags: Stage2Flags,
}

/// The machine over some memory.
pub(crate) struct Machine<'r> {
    ram: &'r Ram,
    mapped: Vec<AtomicBool>,
    /// By processor.
    tlb: Mutex<BTreeMap<(usize, Vmid, u64), Translation>>,
    wiped: AtomicU64,
    counter: AtomicU64,
    pub(crate) devices: Mutex<Vec<(Pages, Access)>>,
    pub(crate) vectors: Mutex<BTreeMap<usize, Vectors>>,
    /// How often it was enabled, if there is such a thing.
    pub(crate) ssbs: Option<AtomicU64>,
    pub(crate) gic: Option<Gic>,
}

// SAFETY: pages are valid memory as long as the machine; unmapped ones are refused.
unsafe impl PageAccess for Machine<'_> {
    fn table_ptr(&self, page: Hpa) -> NonNull<u64> {
        let number = self.number(page.frame());
        assert!(
            self.mapped[number].load(SeqCst),
            "EL2 touches page {page}, which it has not mapped"
        );
        self.raw(page.frame())
    }
}

// SAFETY: as above; processors are numbered by whoever starts them.
unsafe impl Platform for Machine<'_> {
    fn invalidate(&self, vmid: Vmid, range: Range<Gpa>) {
        let frames = frames(&range);
        let mut tlb = self.tlb.lock().unwrap();
        tlb.retain(|&(_, owner, frame), _| owner != vmid || !frames.contains(&frame));
    }

    fn invalidate_all(&self, vmid: Vmid) {
        let mut tlb = self.tlb.lock().unwrap();
        tlb.retain(|&(_, owner, _), _| owner != vmid);
    }

    fn invalidate_here(&self, vmid: Vmid, range: Range<Gpa>) {
        let here = self.processor();
        let frames = frames(&range);
        self.tlb
            .lock()
            .unwrap()
            .retain(|&(processor, owner, frame), _| {
                processor != here || owner != vmid || !frames.contains(&frame)
            });
    }

    fn forget_context(&self, vmid: Vmid) {
        let here = self.processor();
        let mut tlb = self.tlb.lock().unwrap();
        tlb.retain(|&(processor, owner, _), _| processor != here || owner != vmid);
    }

    fn invalidate_everything(&self) {
        self.tlb.lock().unwrap().clear();
    }

    fn map(&self, page: Hfn) {
        self.mapped[self.number(page)].store(true, SeqCst);
    }

    fn unmap(&self, page: Hfn) {
        self.mapped[self.number(page)].store(false, SeqCst);
    }

    fn wipe(&self, page: Hfn) {
        for index in 0..512 {
            self.word(page, index).store(0, SeqCst);
        }
        self.wiped.fetch_add(1, SeqCst);
    }

    fn sync_instructions(&self, _page: Hfn) {}

    fn processor(&self) -> usize {
        PROCESSOR.with(std::cell::Cell::get)
    }

    fn counter(&self) -> u64 {
        self.counter.fetch_add(1, SeqCst)
    }

    fn map_device(&self, pages: Pages, access: Access) -> Option<u64> {
        let mut devices = self.devices.lock().unwrap();
        let taken: u64 = devices.iter().map(|(pages, _)| pages.count).sum();
        if taken + pages.count > DEVICE_PAGES {
            return None;
        }
        devices.push((pages, access));
        Some(DEVICES + taken * PAGE_SIZE)
    }

    fn set_vectors(&self, vectors: Vectors) -> bool {
        self.vectors
            .lock()
            .unwrap()
            .insert(self.processor(), vectors);
        true
    }

    fn has_ssbs(&self) -> bool {
        self.ssbs.is_some()
    }

    fn enable_ssbs(&self) {
        if let Some(ssbs) = &self.ssbs {
            ssbs.fetch_add(1, SeqCst);
        }
    }

    fn virtual_gic(&self) -> Option<&dyn VirtualGic> {
        self.gic.as_ref().map(|gic| gic as &dyn VirtualGic)
    }
}

fn frames(range: &Range<Gpa>) -> Range<u64> {
    range.start.get() / PAGE_SIZE..range.end.get().div_ceil(PAGE_SIZE)
}

/// Where EL2 maps devices, and how many pages it has for them.
pub(crate) const DEVICES: u64 = 1 << 40;
pub(crate) const DEVICE_PAGES: u64 = 16;

/// The virtual side of every processor's GICv3.
#[derive(Default)]
pub(crate) struct Gic {
    interfaces: Mutex<BTreeMap<usize, Interface>>,
    /// How often list registers were emptied.
    pub(crate) cleared: AtomicU64,
}

/// ICH_VTR_EL2 of the simulated machine: four list registers.
pub(crate) const VTR: u64 = 0x9000_0003;

impl VirtualGic for Gic {
    fn config(&self) -> u64 {
        VTR
    }

    fn list_registers(&self) -> usize {
        4
    }

    fn clear(&self) {
        self.cleared.fetch_add(1, SeqCst);
    }

    fn load(&self, interface: &Interface) {
        let here = PROCESSOR.with(std::cell::Cell::get);
        self.interfaces.lock().unwrap().insert(here, *interface);
    }

    fn save(&self) -> Interface {
        let here = PROCESSOR.with(std::cell::Cell::get);
        let interfaces = self.interfaces.lock().unwrap();
        interfaces.get(&here).copied().unwrap_or_default()
    }
}

impl Machine<'_> {
    fn number(&self, page: Hfn) -> usize {
        let number = page.get().wrapping_sub(BASE);
        assert!(number < self.ram.pages, "page {page} is not memory");
        number as usize
    }

    fn raw(&self, page: Hfn) -> NonNull<u64> {
        // SAFETY: the page is inside the allocation.
        unsafe { self.ram.memory.add(self.number(page) * 512) }
    }

    /// A word of physical memory, whoever may see it.
    pub(crate) fn word(&self, page: Hfn, index: usize) -> &AtomicU64 {
        // SAFETY: inside the page; every access is atomic.
        unsafe { AtomicU64::from_ptr(self.raw(page).add(index % 512).as_ptr()) }
    }

    pub(crate) fn is_zero(&self, page: Hfn) -> bool {
        (0..512).all(|index| self.word(page, index).load(SeqCst) == 0)
    }

    pub(crate) fn is_mapped(&self, page: Hfn) -> bool {
        self.mapped[self.number(page)].load(SeqCst)
    }

    pub(crate) fn wiped(&self) -> u64 {
        self.wiped.load(SeqCst)
    }

    /// Translates as a processor does: from the TLB, or by a walk that fills it.
    pub(crate) fn translate(
        &self,
        vmid: Vmid,
        root: Hpa,
        geometry: twofold_arch::stage2::Geometry,
        address: u64,
    ) -> Option<Translation> {
        let (here, frame) = (self.processor(), address / PAGE_SIZE);
        let mut tlb = self.tlb.lock().unwrap();
        if let Some(&found) = tlb.get(&(here, vmid, frame)) {
            return Some(found);
        }
        if address >> geometry.ipa_bits != 0 {
            return None;
        }
        let layout = Layout::new(Granule::K4, false);
        let mut level = geometry.start_level;
        // The root's tables stand side by side: the index is simply larger.
        let mut table = root.get();
        let mut index = address >> layout.granule.level_shift(level);
        loop {
            let entry = Hpa::new(table + index * 8);
            let value = self
                .word(entry.frame(), entry.page_offset() as usize / 8)
                .load(SeqCst);
            match decode(value, level, layout, self.ram.pa_bits) {
                Stage2Entry::Table { hpa } => {
                    table = hpa.get();
                    level += 1;
                    index = address >> layout.granule.level_shift(level) & 511;
                }
                Stage2Entry::Leaf { hpa, flags } => {
                    let offset = address & ((1 << layout.granule.level_shift(level)) - 1);
                    let found = Translation {
                        page: Hpa::new(hpa.get() + offset).frame(),
                        flags,
                    };
                    tlb.insert((here, vmid, frame), found);
                    return Some(found);
                }
                _ => return None,
            }
        }
    }
}

/// The host's and guests' sides of a simulated machine.
pub(crate) trait Accesses {
    /// The host touches a page: whether it reaches it, after the faults that are served.
    fn host_reaches(&self, page: Hfn) -> bool;
    /// A guest with this stage 2 looks an address up.
    fn guest_reaches(&self, stage2: Stage2, address: u64) -> Option<Translation>;
    /// The host writes words, which must be its own or lent to it.
    fn host_writes(&self, address: Hpa, words: &[u64]);
}

impl Accesses for Hypervisor<'_, Machine<'_>> {
    fn host_reaches(&self, page: Hfn) -> bool {
        use crate::host_table::HostFault;
        let geometry = self.host_geometry().unwrap();
        let root = self.host_root();
        for _ in 0..3 {
            let address = page.address().get();
            match self
                .platform()
                .translate(Vmid::HOST, root, geometry, address)
            {
                Some(found) => {
                    assert_eq!(found.page, page, "the host's addresses are themselves");
                    return true;
                }
                None => {
                    if self.host_fault(page.address()) == HostFault::Denied {
                        return false;
                    }
                }
            }
        }
        panic!("the host's fault at page {page} is not served");
    }

    fn guest_reaches(&self, stage2: Stage2, address: u64) -> Option<Translation> {
        let bits = 64 - (stage2.vtcr & 0x3f) as u32;
        let geometry = self.guest_geometry(bits).unwrap();
        assert_eq!(geometry.sl0(), stage2.vtcr >> 6 & 3);
        let vmid = Vmid((stage2.vttbr >> 48) as u16);
        let root = Hpa::new(stage2.vttbr & 0xffff_ffff_fffe);
        self.platform().translate(vmid, root, geometry, address)
    }

    fn host_writes(&self, address: Hpa, words: &[u64]) {
        assert!(
            self.host_reaches(address.frame()),
            "not the host's: {address}"
        );
        for (number, &word) in words.iter().enumerate() {
            let index = address.page_offset() as usize / 8 + number;
            self.platform()
                .word(address.frame(), index)
                .store(word, SeqCst);
        }
    }
}
