//! The guest: where things are in its physical memory, and how it is put there.
//!
//! Its own page tables map every linear address to the guest-physical address of the same value, up
//! to the width of physical addresses, so that scenarios can name guest-physical addresses. They are
//! the guest's own affair: nothing here is a second-stage table.

// UNSAFETY: reads and writes the memory that guests run in.
#![expect(unsafe_code)]

use core::arch::global_asm;
use core::ptr;
use twofold_arch::Hpa;

/// Memory for guests: from 32 MiB (2 MiB aligned), above the image.
pub const MEMORY: u64 = 0x0200_0000;
/// Bytes of it.
pub const MEMORY_SIZE: u64 = 0x0400_0000;

/// Guest-physical addresses of what every guest has, in its first slot.
pub const CODE: u64 = 0x0;
/// Top of the guest's stack.
pub const STACK_TOP: u64 = 0x2000;
/// Page tables: two pages.
pub const TABLES: u64 = 0x2000;
/// The descriptor table.
pub const GDT: u64 = 0x4000;
/// Last byte of the descriptor table.
pub const GDT_LIMIT: u16 = 5 * 8 - 1;
/// The interrupt descriptor table.
pub const IDT: u64 = 0x5000;
/// Last byte of the interrupt descriptor table.
pub const IDT_LIMIT: u16 = 32 * 16 - 1;
/// Where a guest that runs in the background reports.
pub const REPORT: u64 = 0x6000;
/// One more page of page tables, for linear addresses above 512 GiB.
const UPPER_TABLE: u64 = 0x7000;
/// Bytes of the first slot.
pub const SIZE: u64 = 0x10000;

/// The guest's flags: interrupts are allowed, though it never gets one. (With the flag clear in guest
/// and hypervisor alike, Bochs 2.7 does not notice that interrupts leave the guest.)
pub const FLAGS: u64 = 1 << 9 | 2;

/// Guest code segment, without the privilege level.
pub const CODE_SEGMENT: u16 = 0x08;
/// Guest data segment, without the privilege level.
pub const DATA_SEGMENT: u16 = 0x10;

/// What the guest asks for, in rax: to be told what to do next is 0, this reports a #VE.
pub const REQUEST_VE: u64 = 0x7e;

const VE_VECTOR: u64 = 20;

global_asm!(include_str!("guest.s"));

unsafe extern "C" {
    static guest_code: u8;
    static guest_code_ve: u8;
    static guest_code_end: u8;
}

fn checked(hpa: Hpa, bytes: u64) -> *mut u8 {
    let end = hpa.get().checked_add(bytes);
    assert!(
        hpa.get() >= MEMORY && end.is_some_and(|end| end <= MEMORY + MEMORY_SIZE),
        "{hpa} is not guests' memory"
    );
    hpa.get() as *mut u8
}

/// Reads a word of guests' memory.
pub fn load(hpa: Hpa) -> u64 {
    // SAFETY: guests' memory is identity mapped and no Rust object is in it; volatile, because the
    // guest may write at the same time.
    unsafe { ptr::read_volatile(checked(hpa, 8).cast()) }
}

/// Writes a word of guests' memory.
pub fn store(hpa: Hpa, value: u64) {
    // SAFETY: as for `load`.
    unsafe { ptr::write_volatile(checked(hpa, 8).cast(), value) }
}

/// Fills guests' memory with zeros.
pub fn clear(hpa: Hpa, bytes: u64) {
    // SAFETY: as for `load`; no guest runs on it yet.
    unsafe { ptr::write_bytes(checked(hpa, bytes), 0, bytes as usize) }
}

/// Puts a `ret` where the guest will call.
pub fn store_return(hpa: Hpa) {
    store(hpa, 0xc3);
}

/// Puts a fresh guest into the [`SIZE`] bytes at `hpa`.
pub fn load_guest(hpa: Hpa) {
    clear(hpa, SIZE);
    let at = |gpa: u64| Hpa::new(hpa.get() + gpa);
    // SAFETY: the code is read-only data of the image; the memory is as for `store`.
    let ve_offset = unsafe {
        let start = &raw const guest_code;
        let size = &raw const guest_code_end as u64 - start as u64;
        assert!(size <= 4096, "the guest's code is larger than its page");
        ptr::copy_nonoverlapping(start, checked(at(CODE), size), size as usize);
        &raw const guest_code_ve as u64 - start as u64
    };
    // Present, writable, user, accessed, dirty; 1 GiB pages for the first 1 TiB.
    const POINTER: u64 = 0x27;
    const GIANT_PAGE: u64 = 0xe7;
    store(at(TABLES), (TABLES + 0x1000) | POINTER);
    store(at(TABLES + 8), UPPER_TABLE | POINTER);
    for number in 0..512 {
        let place = 8 * number;
        store(at(TABLES + 0x1000 + place), number << 30 | GIANT_PAGE);
        store(at(UPPER_TABLE + place), (512 + number) << 30 | GIANT_PAGE);
    }
    let code = |level: u64| 0x00af_9b00_0000_ffff | level << 45;
    let data = |level: u64| 0x00cf_9300_0000_ffff | level << 45;
    for (number, descriptor) in [0, code(0), data(0), data(3), code(3)]
        .into_iter()
        .enumerate()
    {
        store(at(GDT + 8 * number as u64), descriptor);
    }
    // An interrupt gate for #VE; the handler's address is below 64 KiB.
    let gate = at(IDT + 16 * VE_VECTOR);
    store(
        gate,
        (CODE + ve_offset) | u64::from(CODE_SEGMENT) << 16 | 0x8e << 40,
    );
}
