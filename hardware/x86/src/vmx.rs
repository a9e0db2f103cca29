//! Intel: VMX with extended page tables (SDM volume 3C).

// UNSAFETY: enters guests and owns the pages that the processor reads for that.
#![expect(unsafe_code)]

use crate::guest;
use crate::instructions::{control_registers, descriptor_tables, rdmsr, wrmsr};
use crate::processor::{
    Exit, Features, Registers, SecondStageFault, SubPageEvent, Virtualization,
    VirtualizationException,
};
use crate::smp;
use alloc::boxed::Box;
use core::arch::asm;
use core::cell::UnsafeCell;
use twofold_arch::ept::{EptVpidCap, Eptp, Qualification};
use twofold_arch::sppt::SppQualification;
use twofold_arch::{Gpa, Hpa, Level, Pferr};
use twofold_mmu::{Ept, Fault};
use twofold_walks::Kind;

/// Model-specific registers.
mod msr {
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const EFER: u32 = 0xc000_0080;
    pub const BASIC: u32 = 0x480;
    pub const PIN_BASED: u32 = 0x481;
    pub const PROCESSOR_BASED: u32 = 0x482;
    pub const EXIT: u32 = 0x483;
    pub const ENTRY: u32 = 0x484;
    pub const CR0_FIXED_0: u32 = 0x486;
    pub const CR0_FIXED_1: u32 = 0x487;
    pub const CR4_FIXED_0: u32 = 0x488;
    pub const CR4_FIXED_1: u32 = 0x489;
    pub const SECONDARY: u32 = 0x48b;
    pub const EPT_VPID_CAP: u32 = 0x48c;
    /// How far the registers of the "true" controls are from the older ones.
    pub const TRUE_CONTROLS: u32 = 0x48d - PIN_BASED;
}

/// VMCS field encodings (SDM volume 3D, appendix B).
mod field {
    pub const GUEST_PML_INDEX: u64 = 0x0812;
    pub const PML_ADDRESS: u64 = 0x200e;
    pub const EPT_POINTER: u64 = 0x201a;
    pub const EXCEPTION_INFORMATION: u64 = 0x202a;
    pub const SUB_PAGE_TABLE: u64 = 0x2030;
    pub const GUEST_PHYSICAL_ADDRESS: u64 = 0x2400;
    pub const LINK_POINTER: u64 = 0x2800;
    pub const GUEST_EFER: u64 = 0x2806;
    pub const PIN_BASED: u64 = 0x4000;
    pub const PROCESSOR_BASED: u64 = 0x4002;
    pub const EXCEPTION_BITMAP: u64 = 0x4004;
    pub const EXIT: u64 = 0x400c;
    pub const ENTRY: u64 = 0x4012;
    pub const ENTRY_EVENT: u64 = 0x4016;
    pub const ENTRY_ERROR_CODE: u64 = 0x4018;
    pub const SECONDARY: u64 = 0x401e;
    pub const INSTRUCTION_ERROR: u64 = 0x4400;
    pub const EXIT_REASON: u64 = 0x4402;
    pub const INTERRUPTED_EVENT: u64 = 0x4408;
    pub const INTERRUPTED_ERROR_CODE: u64 = 0x440a;
    pub const INSTRUCTION_LENGTH: u64 = 0x440c;
    pub const QUALIFICATION: u64 = 0x6400;
    pub const GUEST_CR0: u64 = 0x6800;
    pub const GUEST_CR3: u64 = 0x6802;
    pub const GUEST_CR4: u64 = 0x6804;
    pub const GUEST_GDTR_BASE: u64 = 0x6816;
    pub const GUEST_IDTR_BASE: u64 = 0x6818;
    pub const GUEST_DR7: u64 = 0x681a;
    pub const GUEST_RSP: u64 = 0x681c;
    pub const GUEST_RIP: u64 = 0x681e;
    pub const GUEST_RFLAGS: u64 = 0x6820;
    pub const GUEST_GDTR_LIMIT: u64 = 0x4810;
    pub const GUEST_IDTR_LIMIT: u64 = 0x4812;
    pub const HOST_EFER: u64 = 0x2c02;
    pub const HOST_CR0: u64 = 0x6c00;
    pub const HOST_CR3: u64 = 0x6c02;
    pub const HOST_CR4: u64 = 0x6c04;
    pub const HOST_TR_BASE: u64 = 0x6c0a;
    pub const HOST_GDTR_BASE: u64 = 0x6c0c;
    pub const HOST_IDTR_BASE: u64 = 0x6c0e;
    /// ES; CS, SS, DS, FS, GS, LDTR and TR follow in steps of 2, in each of the five groups.
    pub const GUEST_SELECTOR: u64 = 0x800;
    pub const GUEST_LIMIT: u64 = 0x4800;
    pub const GUEST_ACCESS: u64 = 0x4814;
    pub const GUEST_BASE: u64 = 0x6806;
    pub const HOST_SELECTOR: u64 = 0xc00;
}

/// Which segment register, in the order of the VMCS.
const CS: u64 = 1;
const LDTR: u64 = 6;
const TR: u64 = 7;

const PIN_INTERRUPT_EXITING: u32 = 1;
const PROCESSOR_SECONDARY: u32 = 1 << 31;
const SECONDARY_EPT: u32 = 1 << 1;
const SECONDARY_PML: u32 = 1 << 17;
const SECONDARY_EXCEPTIONS: u32 = 1 << 18;
const SECONDARY_SUB_PAGES: u32 = 1 << 23;
/// Exit: the hypervisor is 64-bit code; EFER is loaded.
const EXIT_CONTROLS: u32 = 1 << 9 | 1 << 21;
/// Entry: the guest is 64-bit code; EFER is loaded.
const ENTRY_CONTROLS: u32 = 1 << 9 | 1 << 15;

const EXIT_INTERRUPT: u64 = 1;
const EXIT_CPUID: u64 = 10;
const EXIT_EPT_VIOLATION: u64 = 48;
const EXIT_EPT_MISCONFIGURATION: u64 = 49;
const EXIT_LOG_FULL: u64 = 62;
const EXIT_SUB_PAGES: u64 = 66;

/// What an interrupted event and one to be delivered have in common: vector, kind, whether there is an
/// error code, whether there is anything.
const EVENT_BITS: u64 = EVENT_VALID | 0xfff;
const EVENT_VALID: u64 = 1 << 31;

/// The log is written from its last entry to its first.
const LOG_FIRST: u64 = 511;

const CR4_VMXE: u64 = 1 << 13;

unsafe extern "C" {
    fn vmx_enter(registers: *mut Registers, launched: u64) -> u64;
}

/// A VMXON region, a VMCS, a log of writes, or an information page: written by the processor behind the
/// compiler's back.
#[repr(C, align(4096))]
struct Page(UnsafeCell<[u64; 512]>);

impl Page {
    fn new(first_word: u64) -> Box<Self> {
        let mut words = [0; 512];
        words[0] = first_word;
        Box::new(Self(UnsafeCell::new(words)))
    }

    /// A page that begins with the number that VMXON regions and VMCSs begin with.
    fn with_revision() -> Box<Self> {
        // SAFETY: the processor has VMX.
        Self::new(unsafe { rdmsr(msr::BASIC) } & 0x7fff_ffff)
    }

    fn address(&self) -> u64 {
        self.0.get() as u64
    }

    fn load(&self, word: usize) -> u64 {
        // SAFETY: within the page, which the processor may write.
        unsafe { self.0.get().cast::<u64>().add(word % 512).read_volatile() }
    }

    fn store(&self, word: usize, value: u64) {
        // SAFETY: as for `load`.
        unsafe {
            self.0
                .get()
                .cast::<u64>()
                .add(word % 512)
                .write_volatile(value)
        }
    }
}

/// Writes a field of the current VMCS.
fn write(field: u64, value: u64) {
    let failed: u8;
    // SAFETY: a VMCS is current whenever this is called; the processor checks the values when the
    // guest is entered.
    unsafe {
        asm!("vmwrite {}, {}", "setbe {}", in(reg) field, in(reg) value, out(reg_byte) failed,
            options(nostack));
    }
    assert!(failed == 0, "the processor has no VMCS field {field:#x}");
}

/// Reads a field of the current VMCS.
fn read(field: u64) -> u64 {
    let value;
    // SAFETY: as for `write`.
    unsafe { asm!("vmread {}, {}", out(reg) value, in(reg) field, options(nostack)) };
    value
}

/// The value of controls: what is wanted, and what the processor insists on.
///
/// # Panics
/// If the processor does not have one.
fn controls(register: u32, wanted: u32) -> u64 {
    // SAFETY: the capability registers exist on a processor with VMX.
    let (true_controls, allowed) = unsafe {
        let true_controls = rdmsr(msr::BASIC) >> 55 & 1 == 1 && register != msr::SECONDARY;
        let offset = if true_controls { msr::TRUE_CONTROLS } else { 0 };
        (true_controls, rdmsr(register + offset))
    };
    let value = (wanted | allowed as u32) & (allowed >> 32) as u32;
    assert!(
        wanted & !value == 0,
        "controls {wanted:#x} of {register:#x} (true: {true_controls}): allowed {allowed:#x}"
    );
    u64::from(value)
}

/// Drops every translation made through any EPT pointer.
fn invalidate_everything() {
    const ALL_CONTEXTS: u64 = 2;
    let descriptor = [0u64; 2];
    // SAFETY: invalidates only.
    unsafe {
        asm!("invept {}, [{}]", in(reg) ALL_CONTEXTS, in(reg) &descriptor, options(nostack));
    }
}

/// A virtual processor.
pub struct Vmx {
    vmcs: Box<Page>,
    registers: Registers,
    launched: bool,
    features: Features,
    log: Box<Page>,
    information: Box<Page>,
}

// SAFETY: the pages belong to this value alone; the processor that uses them is the one that made it.
unsafe impl Send for Vmx {}

impl Vmx {
    fn make_current(&self) {
        let address = self.vmcs.address();
        // SAFETY: a VMCS of this processor, cleared before its first use.
        unsafe { asm!("vmptrld [{}]", in(reg) &address, options(nostack)) };
    }

    fn write_host_state() {
        let [cr0, cr3, cr4] = control_registers();
        let [(gdt, _), (idt, _)] = descriptor_tables();
        let (task, task_base) = smp::task_segment(smp::processor());
        for segment in 0..=TR {
            let selector = match segment {
                CS => 0x08,
                TR => task,
                _ => 0x10,
            };
            if segment != LDTR {
                // TR is the seventh selector here: LDTR has none.
                let place = if segment == TR { LDTR } else { segment };
                write(field::HOST_SELECTOR + 2 * place, u64::from(selector));
            }
        }
        // SAFETY: EFER exists.
        write(field::HOST_EFER, unsafe { rdmsr(msr::EFER) });
        write(field::HOST_CR0, cr0);
        write(field::HOST_CR3, cr3);
        write(field::HOST_CR4, cr4);
        write(field::HOST_TR_BASE, task_base);
        write(field::HOST_GDTR_BASE, gdt);
        write(field::HOST_IDTR_BASE, idt);
    }

    fn write_guest_state() {
        let [cr0, _, cr4] = control_registers();
        // SAFETY: EFER exists.
        write(field::GUEST_EFER, unsafe { rdmsr(msr::EFER) });
        write(field::GUEST_CR0, cr0);
        write(field::GUEST_CR3, guest::TABLES);
        write(field::GUEST_CR4, cr4);
        write(field::GUEST_GDTR_BASE, guest::GDT);
        write(field::GUEST_GDTR_LIMIT, u64::from(guest::GDT_LIMIT));
        write(field::GUEST_IDTR_BASE, guest::IDT);
        write(field::GUEST_IDTR_LIMIT, u64::from(guest::IDT_LIMIT));
        write(field::GUEST_DR7, 0x400);
        write(field::LINK_POINTER, u64::MAX);
    }

    fn fault(misconfigured: bool) -> Exit {
        let raw = if misconfigured {
            0
        } else {
            read(field::QUALIFICATION)
        };
        let error = if misconfigured {
            Pferr::RSVD
        } else {
            Qualification::from_bits_truncate(raw).to_pferr()
        };
        Exit::Fault(SecondStageFault {
            fault: Fault {
                gpa: Gpa::new(read(field::GUEST_PHYSICAL_ADDRESS)),
                error,
            },
            misconfigured,
            raw,
        })
    }
}

impl Virtualization for Vmx {
    type Format = Ept;
    const NAME: &'static str = "Intel VMX, extended page tables";
    const MISCONFIGURES: bool = true;
    const WALKS: &'static [Kind] = &[
        Kind::Ept,
        Kind::EptWithoutFlags,
        Kind::EptWithExceptions,
        Kind::EptWithSubPages,
    ];

    fn enable() {
        let [cr0, _, cr4] = control_registers();
        let region = Box::leak(Page::with_revision()).address();
        let ok: u8;
        // SAFETY: the processor has VMX; the registers get what it says they must have; the page
        // is given to the processor for good.
        unsafe {
            if rdmsr(msr::FEATURE_CONTROL) & 1 == 0 {
                wrmsr(msr::FEATURE_CONTROL, 0b101);
            }
            let cr0 = (cr0 | rdmsr(msr::CR0_FIXED_0)) & rdmsr(msr::CR0_FIXED_1);
            let cr4 = (cr4 | CR4_VMXE | rdmsr(msr::CR4_FIXED_0)) & rdmsr(msr::CR4_FIXED_1);
            asm!("mov cr0, {}", "mov cr4, {}", in(reg) cr0, in(reg) cr4, options(nostack));
            asm!("vmxon [{}]", "seta {}", in(reg) &region, out(reg_byte) ok, options(nostack));
        }
        assert!(ok == 1, "VMXON failed");
    }

    fn available() -> Features {
        // SAFETY: the registers exist on a processor with VMX and EPT.
        let (secondary, capabilities) =
            unsafe { (rdmsr(msr::SECONDARY) >> 32, rdmsr(msr::EPT_VPID_CAP)) };
        let has = |control: u32| secondary & u64::from(control) != 0;
        let capabilities = EptVpidCap::from_bits_truncate(capabilities);
        let mut features = Features::empty();
        features.set(
            Features::ACCESSED_DIRTY,
            capabilities.contains(EptVpidCap::ACCESSED_DIRTY),
        );
        features.set(Features::WRITE_LOG, has(SECONDARY_PML));
        features.set(Features::EXCEPTIONS, has(SECONDARY_EXCEPTIONS));
        features.set(Features::SUB_PAGES, has(SECONDARY_SUB_PAGES));
        features
    }

    fn new(features: Features) -> Self {
        let new = Self {
            vmcs: Page::with_revision(),
            registers: Registers::default(),
            launched: false,
            features,
            log: Page::new(0),
            information: Page::new(0),
        };
        let address = new.vmcs.address();
        // SAFETY: a fresh page for the processor to use as a VMCS.
        unsafe { asm!("vmclear [{}]", in(reg) &address, options(nostack)) };
        new.make_current();
        let pin = controls(msr::PIN_BASED, PIN_INTERRUPT_EXITING);
        write(field::PIN_BASED, pin);
        let processor = controls(msr::PROCESSOR_BASED, PROCESSOR_SECONDARY);
        write(field::PROCESSOR_BASED, processor);
        let mut secondary = SECONDARY_EPT;
        if features.contains(Features::WRITE_LOG) {
            secondary |= SECONDARY_PML;
            write(field::PML_ADDRESS, new.log.address());
            write(field::GUEST_PML_INDEX, LOG_FIRST);
        }
        if features.contains(Features::EXCEPTIONS) {
            secondary |= SECONDARY_EXCEPTIONS;
            write(field::EXCEPTION_INFORMATION, new.information.address());
        }
        if features.contains(Features::SUB_PAGES) {
            secondary |= SECONDARY_SUB_PAGES;
        }
        write(field::SECONDARY, controls(msr::SECONDARY, secondary));
        write(field::EXIT, controls(msr::EXIT, EXIT_CONTROLS));
        write(field::ENTRY, controls(msr::ENTRY, ENTRY_CONTROLS));
        // Every exception leaves the guest but #VE, which is for the guest.
        write(field::EXCEPTION_BITMAP, 0xffff_ffff & !(1 << 20));
        Self::write_host_state();
        Self::write_guest_state();
        let mut new = new;
        new.restart();
        new.set_user(false);
        new
    }

    fn set_root(&mut self, root: Hpa) {
        self.make_current();
        let pointer = Eptp::new(
            root,
            Level::L512G,
            self.features.contains(Features::ACCESSED_DIRTY),
        );
        write(field::EPT_POINTER, pointer.encode());
    }

    fn set_sub_pages(&mut self, table: Hpa) {
        self.make_current();
        write(field::SUB_PAGE_TABLE, table.get());
    }

    fn registers(&mut self) -> &mut Registers {
        &mut self.registers
    }

    fn skip(&mut self, length: u64) {
        self.make_current();
        write(field::GUEST_RIP, read(field::GUEST_RIP) + length);
    }

    fn restart(&mut self) {
        self.make_current();
        write(field::GUEST_RSP, guest::STACK_TOP);
        write(field::GUEST_RIP, guest::CODE);
        write(field::GUEST_RFLAGS, guest::FLAGS);
    }

    fn set_user(&mut self, user: bool) {
        self.make_current();
        let level: u16 = if user { 3 } else { 0 };
        for segment in 0..=TR {
            let (selector, limit, access) = match segment {
                CS => (guest::CODE_SEGMENT | level, u32::MAX, 0xa09b | level << 5),
                // Not usable, and a task state segment that nothing uses.
                LDTR => (0, 0, 0),
                TR => (0x18, 0x67, 0x8b),
                _ => (guest::DATA_SEGMENT | level, u32::MAX, 0xc093 | level << 5),
            };
            let access = if segment == LDTR {
                0x1_0000
            } else {
                u64::from(access)
            };
            write(field::GUEST_SELECTOR + 2 * segment, u64::from(selector));
            write(field::GUEST_LIMIT + 2 * segment, u64::from(limit));
            write(field::GUEST_ACCESS + 2 * segment, access);
            write(field::GUEST_BASE + 2 * segment, 0);
        }
    }

    fn take_write_log(&mut self) -> impl Iterator<Item = Gpa> {
        let next = if self.features.contains(Features::WRITE_LOG) {
            self.make_current();
            // 16 bits: after the last entry was written it wraps to 0xffff.
            let next = read(field::GUEST_PML_INDEX) as u16;
            write(field::GUEST_PML_INDEX, LOG_FIRST);
            next
        } else {
            LOG_FIRST as u16
        };
        (usize::from(next.wrapping_add(1))..512).map(|entry| Gpa::new(self.log.load(entry)))
    }

    fn take_exception(&mut self) -> Option<VirtualizationException> {
        let page = &self.information;
        let first = page.load(0);
        let found = (first != 0).then(|| VirtualizationException {
            reason: first as u32,
            qualification: page.load(1),
            linear: page.load(2),
            gpa: Gpa::new(page.load(3)),
        });
        // The upper half keeps the processor from delivering another.
        page.store(0, 0);
        found
    }

    fn enter(&mut self, flush: bool) -> Exit {
        self.make_current();
        if flush {
            invalidate_everything();
        }
        // SAFETY: virtualization is on and the VMCS is complete; the guest reaches only memory that
        // its second-stage tables map.
        let failed = unsafe { vmx_enter(&mut self.registers, u64::from(self.launched)) };
        assert!(
            failed == 0,
            "the guest could not be entered: VM-instruction error {}",
            read(field::INSTRUCTION_ERROR)
        );
        self.launched = true;
        // An exception was being delivered and its frame or its gate could not be reached: it is
        // delivered when that is put right.
        let event = read(field::INTERRUPTED_EVENT);
        if event & EVENT_VALID != 0 {
            write(field::ENTRY_EVENT, event & EVENT_BITS);
            write(field::ENTRY_ERROR_CODE, read(field::INTERRUPTED_ERROR_CODE));
        }
        match read(field::EXIT_REASON) {
            EXIT_INTERRUPT => Exit::Interrupt,
            EXIT_CPUID => {
                let length = read(field::INSTRUCTION_LENGTH);
                write(field::GUEST_RIP, read(field::GUEST_RIP) + length);
                Exit::Request
            }
            EXIT_EPT_VIOLATION => Self::fault(false),
            EXIT_EPT_MISCONFIGURATION => Self::fault(true),
            EXIT_LOG_FULL => Exit::LogFull,
            EXIT_SUB_PAGES => Exit::SubPages(SubPageEvent {
                gpa: Gpa::new(read(field::GUEST_PHYSICAL_ADDRESS)),
                qualification: SppQualification::from_bits_truncate(read(field::QUALIFICATION)),
            }),
            reason => Exit::Other(reason, read(field::QUALIFICATION)),
        }
    }
}

impl Drop for Vmx {
    fn drop(&mut self) {
        let address = self.vmcs.address();
        // SAFETY: the processor forgets the page before it is freed.
        unsafe { asm!("vmclear [{}]", in(reg) &address, options(nostack)) };
    }
}
