//! A KVM client in a few lines, over `abi` instead of system calls.
// UNSAFETY: maps memory and reads what was mapped.
#![allow(unsafe_code)]
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used
)]

pub mod td;

use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;
pub use twofold_kvm::Errno;
use twofold_kvm::abi;
pub use twofold_kvm::ioctl::number::*;

/// A descriptor that closes itself as the preloaded library would.
pub struct Fd(pub RawFd);

impl Fd {
    pub fn open() -> Self {
        Self(abi::open(libc::O_RDWR | libc::O_CLOEXEC).unwrap())
    }

    pub fn call(&self, request: u64, argument: usize) -> Result<i32, Errno> {
        abi::ioctl(self.0, request, argument).expect("the descriptor should be KVM's")
    }

    /// An ioctl that takes or fills a structure.
    pub fn with<T>(&self, request: u64, argument: &mut T) -> Result<i32, Errno> {
        self.call(request, ptr::from_mut(argument).addr())
    }

    pub fn get<T: Default>(&self, request: u64) -> T {
        let mut value = T::default();
        assert_eq!(self.with(request, &mut value), Ok(0));
        value
    }

    pub fn set<T>(&self, request: u64, mut value: T) -> Result<i32, Errno> {
        self.with(request, &mut value)
    }

    /// An ioctl that answers a descriptor.
    pub fn descriptor(&self, request: u64, argument: usize) -> Self {
        Self(self.call(request, argument).unwrap())
    }

    pub fn duplicate(&self) -> Self {
        let new = rustix::io::fcntl_dupfd_cloexec(self.borrow(), 0).unwrap();
        let new = std::os::fd::IntoRawFd::into_raw_fd(new);
        abi::duplicated(self.0, new);
        Self(new)
    }

    pub fn borrow(&self) -> BorrowedFd<'_> {
        // SAFETY: open until this is dropped.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }

    pub fn read_at(&self, length: usize, offset: usize) -> Vec<u8> {
        assert_eq!(abi::before_read(self.0), None);
        let mut bytes = vec![0; length];
        let read = rustix::io::pread(self.borrow(), &mut bytes, offset as u64).unwrap();
        bytes.truncate(read);
        bytes
    }

    /// A counter of a vCPU's statistics.
    pub fn counter(&self, name: &str) -> u64 {
        let stats = self.descriptor(KVM_GET_STATS_FD, 0);
        let bytes = stats.read_at(1 << 16, 0);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let (name_size, count, first, data) = (word(4), word(8), word(16), word(20));
        let descriptor = (0..count)
            .map(|number| first + number * (16 + name_size))
            .find(|at| bytes[at + 16..].starts_with(format!("{name}\0").as_bytes()))
            .unwrap();
        let at = data + word(descriptor + 8);
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        assert!(abi::closing(self.0));
        // SAFETY: ours, and not used again.
        unsafe { rustix::io::close(self.0) };
    }
}

/// Memory of the program, page aligned; as with a real program, guests lose it before it goes.
pub struct Memory {
    pub start: *mut u8,
    pub length: usize,
}

impl Memory {
    pub fn new(length: usize) -> Self {
        // SAFETY: a new mapping.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        Self {
            start: start.unwrap().cast(),
            length,
        }
    }

    /// A vCPU's shared pages.
    pub fn of_vcpu(vcpu: &Fd) -> Self {
        let length = 3 * 4096;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        assert_eq!(
            abi::mmap_check(vcpu.0, 3, libc::MAP_SHARED, 0, length),
            None
        );
        // SAFETY: a new mapping.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                vcpu.borrow(),
                0,
            )
        };
        let start: *mut u8 = start.unwrap().cast();
        abi::mapped(vcpu.0, start.addr(), length, 3, 0);
        Self { start, length }
    }

    pub fn address(&self) -> u64 {
        self.start.expose_provenance() as u64
    }

    pub fn read<T: Copy>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= self.length);
        // SAFETY: within the mapping; used with integers and structures of integers.
        unsafe { self.start.add(offset).cast::<T>().read_unaligned() }
    }

    pub fn write<T: Copy>(&self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= self.length);
        // SAFETY: within the mapping.
        unsafe { self.start.add(offset).cast::<T>().write_unaligned(value) }
    }

    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            self.write(offset + index, *byte);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let change = abi::host_change(self.start.addr(), self.length);
        // SAFETY: ours, and not used again.
        unsafe { rustix::mm::munmap(self.start.cast(), self.length) }.unwrap();
        drop(change);
    }
}

/// `struct kvm_userspace_memory_region`
pub fn region(
    slot: u32,
    gpa: u64,
    size: u64,
    hva: u64,
) -> kvm_bindings::kvm_userspace_memory_region {
    kvm_bindings::kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: hva,
    }
}

/// A VM with one vCPU in real mode, whose code is at 0x1000 of a slot that starts there.
pub struct Guest {
    pub vcpu: Fd,
    pub run: Memory,
    pub vm: Fd,
    pub memory: Memory,
    pub kvm: Fd,
}

pub const CODE: u64 = 0x1000;
pub const MEMORY_SIZE: u64 = 0x4000;

impl Guest {
    pub fn new(code: &[u8]) -> Self {
        Self::with_flags(code, 0)
    }

    pub fn with_flags(code: &[u8], flags: u32) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, 0);
        let memory = Memory::new(MEMORY_SIZE as usize);
        memory.write_bytes(0, code);
        let mut slot = region(0, CODE, MEMORY_SIZE, memory.address());
        slot.flags = flags;
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let run = Memory::of_vcpu(&vcpu);
        let guest = Self {
            vcpu,
            run,
            vm,
            memory,
            kvm,
        };
        guest.start();
        guest
    }

    /// Puts the vCPU at the start of the code, in a segment with base 0.
    pub fn start(&self) {
        let mut sregs: kvm_bindings::kvm_sregs = self.vcpu.get(KVM_GET_SREGS);
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        assert_eq!(self.vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
        self.set_regs(|regs| {
            regs.rip = CODE;
            regs.rflags = 2;
        });
    }

    pub fn regs(&self) -> kvm_bindings::kvm_regs {
        self.vcpu.get(KVM_GET_REGS)
    }

    pub fn set_regs(&self, change: impl FnOnce(&mut kvm_bindings::kvm_regs)) {
        let mut regs = self.regs();
        change(&mut regs);
        assert_eq!(self.vcpu.set(KVM_SET_REGS, regs), Ok(0));
    }

    pub fn run(&self) -> Result<u32, Errno> {
        self.vcpu.call(KVM_RUN, 0)?;
        Ok(self.exit_reason())
    }

    pub fn exit_reason(&self) -> u32 {
        self.run.read(8)
    }

    /// The structure of the exit, at the start of the union.
    pub fn exit<T: Copy>(&self, offset: usize) -> T {
        self.run.read(32 + offset)
    }

    pub fn set_immediate_exit(&self, value: bool) {
        self.run.write(1, u8::from(value));
    }
}
