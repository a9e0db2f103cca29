//! What the module has after each step of a TD's life.

use super::abi::{InitVm, MemoryRegion, TdxCommand, command};
use super::life::Td;
use super::platform;
use crate::abi;
use crate::fd_table;
use crate::ioctl::number::*;
use crate::object::Object;
use crate::sync::Mutex;
use crate::vm::Vm;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_TDX_VM,
    kvm_cpuid_entry2, kvm_create_guest_memfd, kvm_enable_cap, kvm_memory_attributes,
    kvm_pre_fault_memory, kvm_userspace_memory_region2,
};
use rustix::fd::{FromRawFd, OwnedFd};
use rustix::io::Errno;
use std::os::fd::RawFd;
use std::sync::{Arc, MutexGuard};
use twofold_arch::{Gfn, Level, PAGE_SHIFT, PAGE_SIZE};
use twofold_mmu::ExternalTables;
use twofold_tdx::{State, TDCX_PAGES, TDVPX_PAGES};

const DATA: u64 = 0x10_0000;
const PAGES: u64 = 80;

/// One test at a time: the module, whose pages are counted, is the process's.
static ALONE: Mutex<()> = Mutex::new(());

/// A descriptor that closes itself as the preloaded library would.
struct Fd(RawFd);

impl Fd {
    fn call<T>(&self, request: u64, argument: &mut T) -> Result<i32, Errno> {
        let argument = std::ptr::from_mut(argument).expose_provenance();
        abi::ioctl(self.0, request, argument).unwrap()
    }

    fn number(&self, request: u64, argument: usize) -> Result<i32, Errno> {
        abi::ioctl(self.0, request, argument).unwrap()
    }

    fn td(&self, id: u32, data: u64) -> Result<i32, Errno> {
        let mut request = TdxCommand {
            id,
            data,
            ..Default::default()
        };
        self.call(KVM_MEMORY_ENCRYPT_OP, &mut request)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        assert!(abi::closing(self.0));
        // UNSAFETY: owns a raw descriptor.
        #[expect(unsafe_code)]
        // SAFETY: ours, and not used again.
        drop(unsafe { OwnedFd::from_raw_fd(self.0) });
    }
}

/// A TD with one vCPU and a slot with two halves.
struct World {
    vcpu: Fd,
    file: Option<Fd>,
    shared: Box<[[u64; 512]]>,
    vm: Fd,
    _alone: MutexGuard<'static, ()>,
}

fn bytes<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).expose_provenance() as u64
}

impl World {
    fn new(width: u32) -> Self {
        let alone = ALONE.lock();
        assert_eq!(platform::module().pages_in_use(), 0, "left by another test");
        let kvm = Fd(abi::open(0).unwrap());
        let vm = Fd(kvm.number(KVM_CREATE_VM, KVM_X86_TDX_VM as usize).unwrap());
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        assert_eq!(vm.call(KVM_ENABLE_CAP, &mut cap), Ok(0));
        #[repr(C)]
        struct Request(InitVm, kvm_cpuid_entry2);
        let request = Request(
            InitVm {
                attributes: 0,
                xfam: 3,
                digests: [[0; 6]; 3],
                reserved: [0; 12],
                cpuid_count: 1,
                cpuid_padding: 0,
            },
            kvm_cpuid_entry2 {
                function: 0x8000_0008,
                eax: width << 16,
                ..Default::default()
            },
        );
        assert_eq!(vm.td(command::INIT_VM, bytes(&request)), Ok(0));
        let vcpu = Fd(vm.number(KVM_CREATE_VCPU, 0).unwrap());
        #[repr(C)]
        struct Table(u32, u32, kvm_cpuid_entry2);
        let mut table = Table(
            1,
            0,
            kvm_cpuid_entry2 {
                function: 1,
                ecx: 1 << 21,
                ..Default::default()
            },
        );
        assert_eq!(vcpu.call(KVM_SET_CPUID2, &mut table), Ok(0));
        assert_eq!(vcpu.td(command::INIT_VCPU, 0), Ok(0));
        let mut file = kvm_create_guest_memfd {
            size: PAGES * PAGE_SIZE,
            ..Default::default()
        };
        let file = Fd(vm.call(KVM_CREATE_GUEST_MEMFD, &mut file).unwrap());
        // Whole pages somewhere in it.
        let shared = vec![[0; 512]; PAGES as usize + 1].into_boxed_slice();
        let mut region = kvm_userspace_memory_region2 {
            slot: 0,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: DATA,
            memory_size: PAGES * PAGE_SIZE,
            userspace_addr: bytes(&shared[0]).next_multiple_of(PAGE_SIZE),
            guest_memfd: file.0 as u32,
            ..Default::default()
        };
        assert_eq!(vm.call(KVM_SET_USER_MEMORY_REGION2, &mut region), Ok(0));
        let world = Self {
            vcpu,
            file: Some(file),
            shared,
            vm,
            _alone: alone,
        };
        world.set_private(0, PAGES, true);
        world
    }

    fn runnable() -> Self {
        let world = Self::new(48);
        assert_eq!(world.vm.td(command::FINALIZE_VM, 0), Ok(0));
        world
    }

    fn with<R>(&self, look: impl FnOnce(&Arc<Vm>, &Td) -> R) -> R {
        let file = fd_table::get(self.vm.0).unwrap();
        match file.object() {
            Some(Object::Vm(vm)) => look(vm, vm.td().unwrap()),
            _ => unreachable!("a VM's descriptor"),
        }
    }

    fn set_private(&self, page: u64, pages: u64, private: bool) {
        let mut request = kvm_memory_attributes {
            address: DATA + page * PAGE_SIZE,
            size: pages * PAGE_SIZE,
            attributes: match private {
                true => KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
                false => 0,
            },
            flags: 0,
        };
        let result = self.vm.call(KVM_SET_MEMORY_ATTRIBUTES, &mut request);
        assert_eq!(result, Ok(0));
    }

    fn prefault(&self, page: u64, pages: u64) -> Result<i32, Errno> {
        let mut request = kvm_pre_fault_memory {
            gpa: DATA + page * PAGE_SIZE,
            size: pages * PAGE_SIZE,
            ..Default::default()
        };
        let result = self.vcpu.call(KVM_PRE_FAULT_MEMORY, &mut request);
        assert!(result.is_err() || request.size == 0);
        result
    }

    fn add(&self, page: u64) -> Result<i32, Errno> {
        let region = MemoryRegion {
            source_addr: bytes(&self.shared[0]).next_multiple_of(PAGE_SIZE),
            gpa: DATA + page * PAGE_SIZE,
            nr_pages: 1,
        };
        self.vcpu.td(command::INIT_MEM_REGION, bytes(&region))
    }

    /// The state of the Secure EPT entry for a page, or `None` where the walk ends before.
    fn state(&self, page: u64) -> Option<State> {
        self.with(|_, td| {
            let rcx = DATA + page * PAGE_SIZE;
            let read = td.module().sept_read(rcx, td.tdr().unwrap());
            read.ok().and_then(|(entry, _)| entry.state())
        })
    }

    /// Whether mirror and Secure EPT say the same of every page of the slot.
    fn assert_mirrored(&self, mapped: impl Fn(u64) -> bool) {
        self.with(|vm, td| {
            for page in 0..PAGES {
                let gfn = Gfn::new((DATA >> PAGE_SHIFT) + page);
                let leaf = td.leaf(gfn, Level::L4K).unwrap();
                assert_eq!(leaf.is_some(), mapped(page), "page {page}");
            }
            assert_eq!(vm.tables().bug(), None);
        });
    }
}

#[test]
fn row_34_prefault_gives_a_private_page_to_accept_and_maps_a_shared_one_in_the_shared_table() {
    let world = World::runnable();
    world.set_private(1, 1, false);
    assert_eq!(world.prefault(0, 3), Ok(0));
    assert_eq!(world.state(0), Some(State::Pending));
    assert_eq!(world.state(1), Some(State::Free), "not the module's");
    assert_eq!(world.state(2), Some(State::Pending));
    let small = world.with(|vm, _| vm.tables().stats().pages_4k);
    assert_eq!(small, 3, "one of them in the shared table");
    assert_eq!(world.prefault(0, 3), Ok(0), "again");
}

#[test]
fn every_page_that_the_module_had_comes_back() {
    for (width, tables) in [(48, 3), (52, 4)] {
        let world = World::new(width);
        let module = platform::module();
        let control = 1 + TDCX_PAGES + 1 + TDVPX_PAGES;
        assert_eq!(module.pages_in_use(), control);
        assert_eq!(world.add(0), Ok(0));
        assert_eq!(module.pages_in_use(), control + tables + 1);
        assert_eq!(world.vm.td(command::FINALIZE_VM, 0), Ok(0));
        assert_eq!(world.prefault(0, PAGES), Ok(0));
        assert_eq!(module.pages_in_use(), control + tables + PAGES as usize);
        drop(world);
        assert_eq!(module.pages_in_use(), 0);
    }
}

#[test]
fn a_td_that_was_never_finished_leaves_nothing_either() {
    let world = World::new(48);
    assert_eq!(world.add(0), Ok(0));
    drop(world);
    assert_eq!(platform::module().pages_in_use(), 0);
}

#[test]
fn what_becomes_shared_is_taken_from_the_td_and_nothing_else() {
    let world = World::runnable();
    assert_eq!(world.prefault(0, PAGES), Ok(0));
    world.set_private(3, 70, false);
    world.assert_mirrored(|page| !(3..73).contains(&page));
    assert_eq!(world.prefault(3, 70), Ok(0));
    world.assert_mirrored(|page| !(3..73).contains(&page));
    world.set_private(3, 70, true);
    world.assert_mirrored(|page| !(3..73).contains(&page));
    assert_eq!(world.prefault(0, PAGES), Ok(0));
    world.assert_mirrored(|_| true);
}

#[test]
fn a_hole_in_the_file_takes_private_pages_and_only_those() {
    let world = World::runnable();
    world.set_private(1, 1, false);
    assert_eq!(world.prefault(0, 4), Ok(0));
    let file = world.file.as_ref().unwrap();
    let mode = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
    let pages = |vm: &Arc<Vm>| vm.tables().stats().pages_4k;
    assert_eq!(world.with(|vm, _| pages(vm)), 4);
    let result = abi::fallocate(file.0, mode, 0, 3 * PAGE_SIZE as i64);
    assert_eq!(result, Some(Ok(())));
    world.assert_mirrored(|page| page == 3);
    assert_eq!(world.with(|vm, _| pages(vm)), 2, "page 1 stays, shared");
}

#[test]
fn a_file_that_is_closed_takes_its_pages_along() {
    let mut world = World::runnable();
    assert_eq!(world.prefault(0, PAGES), Ok(0));
    world.file = None;
    world.assert_mirrored(|_| false);
    assert_eq!(world.prefault(0, 1), Err(Errno::FAULT));
}

#[test]
fn memory_that_was_the_tds_is_zeroed_before_it_is_anybody_elses() {
    let mut world = World::new(48);
    world.shared.fill([0x5ec2_e700; 512]);
    assert_eq!(world.add(0), Ok(0));
    let page = world.with(|_, td| {
        let gfn = Gfn::new(DATA >> PAGE_SHIFT);
        td.leaf(gfn, Level::L4K).unwrap().unwrap()
    });
    let first_word = || {
        let mut word = [0; 8];
        let platform = platform::module();
        twofold_tdx::Platform::read_page(platform.platform(), page, 0, &mut word);
        u64::from_le_bytes(word)
    };
    assert_eq!(first_word(), 0x5ec2_e700);
    world.set_private(0, 1, false);
    assert_eq!(first_word(), 0);
}
