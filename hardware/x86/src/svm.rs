//! AMD: SVM with nested paging (APM volume 2, chapter "Secure Virtual Machine").

// UNSAFETY: enters guests and owns the pages that the processor reads for that.
#![expect(unsafe_code)]

use crate::guest;
use crate::instructions::{control_registers, rdmsr, wrmsr};
use crate::processor::{
    Exit, Features, Registers, SecondStageFault, Virtualization, VirtualizationException,
};
use crate::smp::PROCESSORS;
use alloc::boxed::Box;
use core::cell::UnsafeCell;
use twofold_arch::{Gpa, Hpa, Pferr};
use twofold_mmu::{Fault, Npt};
use twofold_walks::Kind;

const EFER: u32 = 0xc000_0080;
const EFER_SVME: u64 = 1 << 12;
const VM_HSAVE_PA: u32 = 0xc001_0117;

/// Fields of a VMCB, by offset in bytes (APM volume 2, appendix B).
mod field {
    pub const INTERCEPTED_EXCEPTIONS: usize = 0x008;
    pub const INTERCEPTS: usize = 0x00c;
    pub const INTERCEPTS_SVM: usize = 0x010;
    pub const ASID: usize = 0x058;
    pub const TLB_CONTROL: usize = 0x05c;
    pub const INTERRUPT_CONTROL: usize = 0x060;
    pub const EXIT_CODE: usize = 0x070;
    pub const EXIT_INFO_1: usize = 0x078;
    pub const EXIT_INFO_2: usize = 0x080;
    pub const NESTED_CONTROL: usize = 0x090;
    pub const NESTED_CR3: usize = 0x0b0;
    pub const ES: usize = 0x400;
    pub const CS: usize = 0x410;
    pub const GDTR: usize = 0x460;
    pub const IDTR: usize = 0x480;
    pub const CPL: usize = 0x4cb;
    pub const EFER: usize = 0x4d0;
    pub const CR4: usize = 0x548;
    pub const CR3: usize = 0x550;
    pub const CR0: usize = 0x558;
    pub const DR7: usize = 0x560;
    pub const DR6: usize = 0x568;
    pub const RFLAGS: usize = 0x570;
    pub const RIP: usize = 0x578;
    pub const RSP: usize = 0x5d8;
    pub const RAX: usize = 0x5f8;
    pub const PAT: usize = 0x668;
}

/// Intercepted: physical interrupts, CPUID, and shutdown.
const INTERCEPTS: u32 = 1 | 1 << 18 | 1 << 31;
/// Intercepted: VMRUN, which must be, and VMMCALL.
const INTERCEPTS_SVM: u32 = 0b11;
/// The hypervisor's IF decides about physical interrupts, not the guest's.
const VIRTUAL_INTERRUPT_MASKING: u32 = 1 << 24;
const NESTED_PAGING: u64 = 1;
const FLUSH_EVERYTHING: u32 = 1;

const EXIT_INTERRUPT: u64 = 0x60;
const EXIT_CPUID: u64 = 0x72;
const EXIT_NESTED_PAGE_FAULT: u64 = 0x400;
const CPUID_LENGTH: u64 = 2;

unsafe extern "C" {
    fn svm_enter(registers: *mut Registers, vmcb: *mut Page);
}

#[repr(C, align(4096))]
struct Page([u8; 4096]);

struct SavedState(UnsafeCell<Page>);

// SAFETY: only the processor writes there.
unsafe impl Sync for SavedState {}

/// Where each processor keeps the hypervisor's state while it runs a guest.
static SAVED: [SavedState; PROCESSORS] =
    [const { SavedState(UnsafeCell::new(Page([0; 4096]))) }; PROCESSORS];

/// A virtual processor.
pub struct Svm {
    vmcb: Box<Page>,
    registers: Registers,
}

impl Svm {
    fn set<const N: usize>(&mut self, field: usize, bytes: [u8; N]) {
        self.vmcb.0[field..field + N].copy_from_slice(&bytes);
    }

    fn get(&self, field: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.vmcb.0[field..field + 8]);
        u64::from_le_bytes(bytes)
    }

    fn set_segment(&mut self, field: usize, selector: u16, attributes: u16) {
        self.set(field, selector.to_le_bytes());
        self.set(field + 2, attributes.to_le_bytes());
        self.set(field + 4, u32::MAX.to_le_bytes());
    }
}

impl Virtualization for Svm {
    type Format = Npt;
    const NAME: &'static str = "AMD SVM, nested paging";
    const MISCONFIGURES: bool = false;
    const WALKS: &'static [Kind] = &[Kind::Npt];

    fn enable() {
        let saved = SAVED[crate::smp::processor()].0.get() as u64;
        // SAFETY: the processor has SVM, and the page for its state is this processor's alone.
        unsafe {
            wrmsr(EFER, rdmsr(EFER) | EFER_SVME);
            wrmsr(VM_HSAVE_PA, saved);
        }
    }

    fn available() -> Features {
        Features::ACCESSED_DIRTY
    }

    fn new(_features: Features) -> Self {
        let mut new = Self {
            vmcb: Box::new(Page([0; 4096])),
            registers: Registers::default(),
        };
        let [cr0, _, cr4] = control_registers();
        // SAFETY: EFER exists.
        let efer = unsafe { rdmsr(EFER) };
        // The guest handles none.
        new.set(field::INTERCEPTED_EXCEPTIONS, u32::MAX.to_le_bytes());
        new.set(field::INTERCEPTS, INTERCEPTS.to_le_bytes());
        new.set(field::INTERCEPTS_SVM, INTERCEPTS_SVM.to_le_bytes());
        new.set(field::ASID, 1u32.to_le_bytes());
        new.set(
            field::INTERRUPT_CONTROL,
            VIRTUAL_INTERRUPT_MASKING.to_le_bytes(),
        );
        new.set(field::NESTED_CONTROL, NESTED_PAGING.to_le_bytes());
        new.set(field::GDTR + 4, u32::from(guest::GDT_LIMIT).to_le_bytes());
        new.set(field::GDTR + 8, guest::GDT.to_le_bytes());
        new.set(field::IDTR + 4, u32::from(guest::IDT_LIMIT).to_le_bytes());
        new.set(field::IDTR + 8, guest::IDT.to_le_bytes());
        new.set(field::EFER, efer.to_le_bytes());
        new.set(field::CR0, cr0.to_le_bytes());
        new.set(field::CR3, guest::TABLES.to_le_bytes());
        new.set(field::CR4, cr4.to_le_bytes());
        new.set(field::DR6, 0xffff_0ff0u64.to_le_bytes());
        new.set(field::DR7, 0x400u64.to_le_bytes());
        new.set(field::PAT, 0x0007_0406_0007_0406u64.to_le_bytes());
        new.restart();
        new.set_user(false);
        new
    }

    fn set_root(&mut self, root: Hpa) {
        self.set(field::NESTED_CR3, root.get().to_le_bytes());
    }

    fn set_sub_pages(&mut self, _table: Hpa) {
        // Never available.
    }

    fn registers(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn skip(&mut self, length: u64) {
        let rip = self.get(field::RIP) + length;
        self.set(field::RIP, rip.to_le_bytes());
    }

    fn restart(&mut self) {
        self.set(field::RIP, guest::CODE.to_le_bytes());
        self.set(field::RSP, guest::STACK_TOP.to_le_bytes());
        self.set(field::RFLAGS, guest::FLAGS.to_le_bytes());
    }

    fn set_user(&mut self, user: bool) {
        let level = if user { 3 } else { 0 };
        for segment in 0..6 {
            self.set_segment(
                field::ES + 16 * segment,
                guest::DATA_SEGMENT | level,
                0xc93 | level << 5,
            );
        }
        self.set_segment(field::CS, guest::CODE_SEGMENT | level, 0xa9b | level << 5);
        self.set(field::CPL, [level as u8]);
    }

    fn take_write_log(&mut self) -> impl Iterator<Item = Gpa> {
        core::iter::empty()
    }

    fn take_exception(&mut self) -> Option<VirtualizationException> {
        None
    }

    fn enter(&mut self, flush: bool) -> Exit {
        let control = if flush { FLUSH_EVERYTHING } else { 0 };
        self.set(field::TLB_CONTROL, control.to_le_bytes());
        self.set(field::RAX, self.registers.rax.to_le_bytes());
        // SAFETY: virtualization is on; the VMCB is complete; the guest reaches only memory that
        // its second-stage tables map.
        unsafe { svm_enter(&mut self.registers, &mut *self.vmcb) };
        self.registers.rax = self.get(field::RAX);
        match self.get(field::EXIT_CODE) {
            EXIT_INTERRUPT => Exit::Interrupt,
            EXIT_CPUID => {
                self.skip(CPUID_LENGTH);
                Exit::Request
            }
            EXIT_NESTED_PAGE_FAULT => {
                let raw = self.get(field::EXIT_INFO_1);
                Exit::Fault(SecondStageFault {
                    fault: Fault {
                        gpa: Gpa::new(self.get(field::EXIT_INFO_2)),
                        error: Pferr::from_bits_truncate(raw),
                    },
                    misconfigured: false,
                    raw,
                })
            }
            code => Exit::Other(code, self.get(field::EXIT_INFO_1)),
        }
    }
}
