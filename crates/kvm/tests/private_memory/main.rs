//! Private memory, guest memory files and pre-faulting, as a program uses them.
// UNSAFETY: handles a signal, and changes the program's own memory.
#![expect(unsafe_code)]
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

#[path = "../common/mod.rs"]
mod common;
mod conversion;
mod file;
mod prefault;

use common::*;
use kvm_bindings::*;
use rustix::mm::Advice;
use std::sync::atomic::{AtomicBool, Ordering};
use twofold_kvm::abi;

const PAGE: u64 = 4096;
/// Where the data is: two slots' worth of frames.
const DATA: u64 = 0x10_0000;
const PAGES: u64 = 16;
const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;

/// Three little programs of the guest, at these offsets.
#[rustfmt::skip]
const CODE_BYTES: &[u8] = &[
    0x89, 0x07, 0xf4,             // mov [bx], ax; hlt
    0x8b, 0x07, 0xf4,             // mov ax, [bx]; hlt
    0x0f, 0x01, 0xc1, 0xf4,       // vmcall; hlt
];
const WRITE: u64 = CODE;
const READ: u64 = CODE + 3;
const HYPERCALL: u64 = CODE + 6;

/// A software-protected VM whose data slot has a guest memory file.
struct Protected {
    vcpu: Fd,
    run: Memory,
    file: Option<Fd>,
    vm: Fd,
    shared: Memory,
    _code: Memory,
    kvm: Fd,
}

fn create_file(vm: &Fd, size: u64) -> Result<Fd, Errno> {
    let mut request = kvm_create_guest_memfd {
        size,
        ..Default::default()
    };
    let argument = (&raw mut request).addr();
    vm.call(KVM_CREATE_GUEST_MEMFD, argument).map(Fd)
}

fn slot(
    id: u32,
    gpa: u64,
    pages: u64,
    hva: u64,
    file: Option<(&Fd, u64)>,
) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot: id,
        flags: file.map_or(0, |_| KVM_MEM_GUEST_MEMFD),
        guest_phys_addr: gpa,
        memory_size: pages * PAGE,
        userspace_addr: hva,
        guest_memfd: file.map_or(0, |(file, _)| file.0 as u32),
        guest_memfd_offset: file.map_or(0, |(_, offset)| offset),
        ..Default::default()
    }
}

fn attributes(address: u64, size: u64, attributes: u32) -> kvm_memory_attributes {
    kvm_memory_attributes {
        address,
        size,
        attributes: attributes.into(),
        flags: 0,
    }
}

impl Protected {
    fn new() -> Self {
        Self::with_type(KVM_X86_SW_PROTECTED_VM)
    }

    fn with_type(kind: u32) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, kind as usize);
        let code = Memory::new(MEMORY_SIZE as usize);
        code.write_bytes(0, CODE_BYTES);
        let region = slot(0, CODE, MEMORY_SIZE / PAGE, code.address(), None);
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
        let shared = Memory::new((PAGES * PAGE) as usize);
        let file = create_file(&vm, PAGES * PAGE).unwrap();
        let bound = (kind == KVM_X86_SW_PROTECTED_VM).then_some((&file, 0));
        let region = slot(1, DATA, PAGES, shared.address(), bound);
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION2, region), Ok(0));
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        let run = Memory::of_vcpu(&vcpu);
        let mut sregs: kvm_sregs = vcpu.get(KVM_GET_SREGS);
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        sregs.ds.base = DATA;
        assert_eq!(vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
        Self {
            vcpu,
            run,
            file: Some(file),
            vm,
            shared,
            _code: code,
            kvm,
        }
    }

    fn set_private(&self, page: u64, pages: u64, private: bool) {
        let value = if private {
            KVM_MEMORY_ATTRIBUTE_PRIVATE
        } else {
            0
        };
        let request = attributes(DATA + page * PAGE, pages * PAGE, value);
        assert_eq!(self.vm.set(KVM_SET_MEMORY_ATTRIBUTES, request), Ok(0));
    }

    fn start(&self, rip: u64, rax: u64, rbx: u64) -> Result<i32, Errno> {
        let regs = kvm_regs {
            rip,
            rax,
            rbx,
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(self.vcpu.set(KVM_SET_REGS, regs), Ok(0));
        self.vcpu.call(KVM_RUN, 0)
    }

    fn exit_reason(&self) -> u32 {
        self.run.read(8)
    }

    /// Flags, address and size of the memory fault that the guest ended in.
    fn memory_fault(&self) -> (u64, u64, u64) {
        assert_eq!(self.exit_reason(), KVM_EXIT_MEMORY_FAULT);
        (self.run.read(32), self.run.read(40), self.run.read(48))
    }

    fn write(&self, page: u64, value: u16) {
        assert_eq!(self.start(WRITE, value.into(), page * PAGE), Ok(0));
        assert_eq!(self.exit_reason(), KVM_EXIT_HLT);
    }

    fn read(&self, page: u64) -> u16 {
        assert_eq!(self.start(READ, 0, page * PAGE), Ok(0));
        assert_eq!(self.exit_reason(), KVM_EXIT_HLT);
        let regs: kvm_regs = self.vcpu.get(KVM_GET_REGS);
        regs.rax as u16
    }

    fn prefault(&self, gpa: u64, size: u64) -> (Result<i32, Errno>, u64, u64) {
        let mut request = kvm_pre_fault_memory {
            gpa,
            size,
            ..Default::default()
        };
        let result = self.vcpu.with(KVM_PRE_FAULT_MEMORY, &mut request);
        (result, request.gpa, request.size)
    }

    fn fallocate(&self, mode: i32, offset: i64, length: i64) -> Result<(), Errno> {
        let file = self.file.as_ref().unwrap();
        abi::fallocate(file.0, mode, offset, length).unwrap()
    }
}
