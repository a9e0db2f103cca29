//! Two processors: how the second is started, and how each makes the other do something.
//!
//! There is one kind of interrupt. Whoever sends it waits until the other processor has taken it in
//! the hypervisor, that is, has left its guest; what the other is to do before it enters a guest
//! again has been noted before ([`flush_everywhere`]). The handler is a few instructions of
//! assembler on a stack of its own, because Rust's libraries are compiled with a red zone.

// UNSAFETY: the local APIC, descriptor tables, and the start of a processor.
#![expect(unsafe_code)]

use crate::instructions::{interrupts_allowed, out8};
use crate::{power, println};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Processors that the hypervisor uses.
pub const PROCESSORS: usize = 2;

/// The local APIC's registers.
const APIC: usize = 0xfee0_0000;
const APIC_ID: usize = 0x20;
const APIC_SPURIOUS: usize = 0xf0;
const APIC_ICR_LOW: usize = 0x300;
const APIC_ICR_HIGH: usize = 0x310;
const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;

/// The interrupt that processors send each other.
const VECTOR: u8 = 0xf0;
const SPURIOUS_VECTOR: u8 = 0xff;

/// Where the second processor starts: real-mode address, in the first MiB.
const START: usize = 0x8000;

global_asm!(include_str!("boot.s"));

global_asm!(
    r#"
.section .text
# Exceptions of the hypervisor itself: one entry each, 16 bytes apart.
.balign 16
.global exception_entries
exception_entries:
.set vector, 0
.rept 32
  .balign 16
  push vector
  jmp exception
  .set vector, vector + 1
.endr
exception:
  mov rdi, [rsp]
  mov rsi, [rsp + 8]
  mov rdx, [rsp + 16]
  mov rcx, cr2
  and rsp, -16
  call hypervisor_exception

# Another processor's interrupt: everything asked for so far is acknowledged. XCHG is the full
# barrier that `heavy_barrier` promises.
.balign 16
.global interrupt_entry
interrupt_entry:
  push rax
  push rcx
  push rdx
  mov eax, 0xfee00020
  mov ecx, [rax]
  shr ecx, 24
  and ecx, 1
  mov rax, [rip + INTERRUPTS_REQUESTED]
  lea rdx, [rip + INTERRUPTS_TAKEN]
  xchg [rdx + rcx * 8], rax
  mov eax, 0xfee000b0
  mov dword ptr [rax], 0
  pop rdx
  pop rcx
  pop rax
  iretq
.balign 16
.global spurious_entry
spurious_entry:
  iretq
"#
);

unsafe extern "C" {
    static exception_entries: u8;
    static interrupt_entry: u8;
    static spurious_entry: u8;
    static second_start: u8;
    static second_start_end: u8;
    static mut gdt: [u64; 7];
}

/// How often interrupts were asked for.
#[unsafe(no_mangle)]
static INTERRUPTS_REQUESTED: AtomicU64 = AtomicU64::new(0);
/// What each processor has seen of [`INTERRUPTS_REQUESTED`].
#[unsafe(no_mangle)]
static INTERRUPTS_TAKEN: [AtomicU64; PROCESSORS] = [const { AtomicU64::new(0) }; PROCESSORS];

/// Whether a processor must drop the translations of guests before it enters one.
static FLUSH: [AtomicBool; PROCESSORS] = [const { AtomicBool::new(false) }; PROCESSORS];
static SECOND_IS_UP: AtomicBool = AtomicBool::new(false);

#[repr(C, align(16))]
struct TaskState {
    words: UnsafeCell<[u32; 26]>,
    stack: UnsafeCell<[u8; 16384]>,
}

#[repr(C, align(4096))]
struct Idt(UnsafeCell<[[u64; 2]; 256]>);

// SAFETY: each processor writes its own part once, before it uses it; then only the processor reads.
unsafe impl Sync for TaskState {}
// SAFETY: written by the first processor before the second starts.
unsafe impl Sync for Idt {}

static TASK_STATES: [TaskState; PROCESSORS] = [const {
    TaskState {
        words: UnsafeCell::new([0; 26]),
        stack: UnsafeCell::new([0; 16384]),
    }
}; PROCESSORS];
static IDT: Idt = Idt(UnsafeCell::new([[0; 2]; 256]));

fn apic_read(register: usize) -> u32 {
    // SAFETY: the APIC is at its usual address, which is identity mapped.
    unsafe { ptr::read_volatile((APIC + register) as *const u32) }
}

fn apic_write(register: usize, value: u32) {
    // SAFETY: as for `apic_read`; the registers written here affect interrupts only.
    unsafe { ptr::write_volatile((APIC + register) as *mut u32, value) }
}

/// The number of the processor that asks, 0 or 1.
pub fn processor() -> usize {
    (apic_read(APIC_ID) >> 24) as usize % PROCESSORS
}

/// The selector and the base of a processor's task state segment.
pub fn task_segment(processor: usize) -> (u16, u64) {
    let selector = 0x18 + 16 * (processor % PROCESSORS) as u16;
    (
        selector,
        &raw const TASK_STATES[processor % PROCESSORS] as u64,
    )
}

/// Sets up exceptions and interrupts of the hypervisor on the processor that calls. Interrupts
/// stay forbidden.
fn init_processor() {
    let number = processor();
    let state = &TASK_STATES[number];
    let top = state.stack.get() as u64 + 16384;
    let (selector, base) = task_segment(number);
    // SAFETY: this processor's own state and descriptors, which nobody uses yet.
    unsafe {
        let words = state.words.get().cast::<u32>();
        // IST1, at byte 36.
        words.add(9).write(top as u32);
        words.add(10).write((top >> 32) as u32);
        // No I/O permission bitmap.
        words.add(25).write(104 << 16);
        let low = 0x67 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        let descriptor = (&raw mut gdt).cast::<u64>().add(usize::from(selector) / 8);
        descriptor.write(low);
        descriptor.add(1).write(base >> 32);
        let mut pointer = [0u8; 10];
        pointer[..2].copy_from_slice(&4095u16.to_le_bytes());
        pointer[2..].copy_from_slice(&(IDT.0.get() as u64).to_le_bytes());
        asm!("ltr {0:x}", "lidt [{1}]", in(reg) selector, in(reg) &pointer, options(nostack));
    }
    apic_write(APIC_LVT_LINT0, 1 << 16);
    apic_write(APIC_LVT_LINT1, 1 << 16);
    apic_write(APIC_SPURIOUS, 1 << 8 | u32::from(SPURIOUS_VECTOR));
}

/// Sets up the first processor.
pub fn init() {
    let gate = |handler: u64| {
        // Present, interrupt gate, code segment 8, IST1.
        let low =
            handler & 0xffff | 8 << 16 | 1 << 32 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
        [low, handler >> 32]
    };
    let idt = IDT.0.get().cast::<[u64; 2]>();
    // SAFETY: nothing uses the table yet; the handlers are above.
    unsafe {
        for vector in 0..32 {
            idt.add(vector).write(gate(
                &raw const exception_entries as u64 + 16 * vector as u64,
            ));
        }
        idt.add(usize::from(VECTOR))
            .write(gate(&raw const interrupt_entry as u64));
        idt.add(usize::from(SPURIOUS_VECTOR))
            .write(gate(&raw const spurious_entry as u64));
    }
    // The old interrupt controllers are not used.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    init_processor();
}

/// Starts the second processor and waits until it is ready. It calls `second_processor` in main.rs.
pub fn start_second() {
    // SAFETY: low memory belongs to nobody; the code is position-independent up to its own jumps.
    unsafe {
        let start = &raw const second_start;
        let size = &raw const second_start_end as usize - start as usize;
        ptr::copy_nonoverlapping(start, START as *mut u8, size);
    }
    let pause = |loops| (0..loops).for_each(|_| spin_loop());
    // "All but self": INIT, then two start-up interrupts as the manual asks.
    apic_write(APIC_ICR_HIGH, 0);
    apic_write(APIC_ICR_LOW, 0xc4500);
    pause(100_000);
    for _ in 0..2 {
        apic_write(APIC_ICR_LOW, 0xc4600 | (START >> 12) as u32);
        pause(20_000);
    }
    while !SECOND_IS_UP.load(Ordering::Acquire) {
        spin_loop();
    }
}

/// What the second processor does first.
pub fn init_second() {
    init_processor();
    SECOND_IS_UP.store(true, Ordering::Release);
}

/// Makes the other processor leave its guest and pass a full barrier; returns when it has.
///
/// # Panics
/// If interrupts are forbidden: two processors would wait for each other.
pub fn interrupt_everywhere() {
    assert!(
        interrupts_allowed(),
        "another processor is interrupted by one that does not listen"
    );
    if !SECOND_IS_UP.load(Ordering::Acquire) {
        return;
    }
    let ticket = INTERRUPTS_REQUESTED.fetch_add(1, Ordering::SeqCst) + 1;
    let other = 1 - processor();
    while apic_read(APIC_ICR_LOW) & 1 << 12 != 0 {
        spin_loop();
    }
    apic_write(APIC_ICR_HIGH, (other as u32) << 24);
    apic_write(APIC_ICR_LOW, 1 << 14 | u32::from(VECTOR));
    while INTERRUPTS_TAKEN[other].load(Ordering::SeqCst) < ticket {
        spin_loop();
    }
}

/// Makes both processors drop every translation of a guest before they enter one again; when this
/// returns, neither uses an older one.
pub fn flush_everywhere() {
    for flush in &FLUSH {
        flush.store(true, Ordering::SeqCst);
    }
    interrupt_everywhere();
}

/// Whether this processor has to drop the translations of guests now. To be asked with interrupts
/// forbidden, right before a guest is entered.
pub fn take_flush() -> bool {
    FLUSH[processor()].swap(false, Ordering::SeqCst)
}

#[unsafe(no_mangle)]
extern "C" fn hypervisor_exception(vector: u64, first: u64, second: u64, cr2: u64) -> ! {
    println!(
        "! exception {vector} in the hypervisor on processor {}: stack {first:#x} {second:#x}, \
         cr2 {cr2:#x}",
        processor()
    );
    power::off(false)
}
