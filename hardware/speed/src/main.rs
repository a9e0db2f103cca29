//! The kernels of `make bench` on a bare machine: QEMU's, or one of a KVM program.
//!
//! A byte on port 0xe9 announces each beginning and each end; whoever runs the machine takes the
//! time. Then the address of [`thread`] goes to port 0xe8, for who wants to run it on several
//! processors, and the machine is switched off.
//!
//! Guest-physical memory: this image from 1 MiB on, the kernels' own memory at 24 MiB, the memory that
//! is strided over at 256 MiB (mapped as 4 KiB pages at linear 3 GiB), and from 512 MiB on what is
//! copied.
#![no_std]
#![no_main]
// UNSAFETY: this is the machine's own program: it writes page tables and ports, and runs machine code
// on memory that the layout above sets aside.
#![expect(unsafe_code)]

mod power {
    //! How a run ends.

    /// QEMU's isa-debug-exit: the status is twice the value plus one.
    pub(crate) fn off(success: bool) -> ! {
        super::out32(0xf4, if success { 16 } else { 17 });
        loop {
            core::hint::spin_loop();
        }
    }
}
#[path = "../../x86/src/runtime.rs"]
mod runtime;

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;
use twofold_kernels::{
    COPIES, COPY_BYTES, KERNELS, MEMORY_BYTES, STRIDE_BYTES, STRIDE_STEPS, TIGHT_ROUNDS, copy,
    page_stride, tight,
};

global_asm!(include_str!("../../x86/src/boot.s"));

const MEMORY: usize = 24 << 20;
const STRIDE: usize = 256 << 20;
const STRIDE_LINEAR: usize = 3 << 30;
const COPY_FROM: usize = 512 << 20;
const COPY_TO: usize = COPY_FROM + COPY_BYTES;

const PAGE: usize = 4096;
const PRESENT_WRITABLE: u64 = 3;

/// Tables of 4 KiB pages for the memory that is strided over.
#[repr(C, align(4096))]
struct StrideTables([[u64; 512]; STRIDE_BYTES / PAGE / 512]);

static mut STRIDE_TABLES: StrideTables = StrideTables([[0; 512]; STRIDE_BYTES / PAGE / 512]);

unsafe extern "C" {
    static boot_pml4: [u64; 512];
}

fn out32(port: u16, value: u32) {
    // SAFETY: writes to a port of the machine.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

/// Tells whoever runs the machine what happens now.
fn announce(mark: u8) {
    // SAFETY: writes to a port of the machine.
    unsafe { asm!("out 0xe9, al", in("al") mark) }
}

fn announced(number: &mut u8, work: impl FnOnce()) {
    announce(b'A' + 2 * *number);
    work();
    announce(b'B' + 2 * *number);
    *number += 1;
}

fn map_stride() {
    // SAFETY: one processor, and the boot code's tables map the first 4 GiB as they are: the last of
    // its four directories gives way to ours.
    unsafe {
        let tables = &raw mut STRIDE_TABLES;
        let directory = (boot_pml4[0] & !0xfff) as *mut u64;
        let directory = (directory.add(STRIDE_LINEAR >> 30).read() & !0xfff) as *mut u64;
        for (number, table) in (*tables).0.iter_mut().enumerate() {
            for (index, entry) in table.iter_mut().enumerate() {
                let page = STRIDE + (number * 512 + index) * PAGE;
                *entry = page as u64 | PRESENT_WRITABLE;
            }
            directory
                .add(number)
                .write(&raw const *table as u64 | PRESENT_WRITABLE);
        }
        let cr3 = &raw const boot_pml4;
        asm!("mov cr3, {}", in(reg) cr3, options(nostack));
    }
}

/// Where the boot code jumps.
#[unsafe(no_mangle)]
extern "C" fn first_processor() -> ! {
    map_stride();
    let memory = MEMORY as *mut u8;
    let mut number = 0;
    for (_, kernel, rounds) in KERNELS {
        // SAFETY: the layout sets the memory aside.
        announced(&mut number, || unsafe { kernel(rounds, memory) });
    }
    // SAFETY: as above.
    announced(&mut number, || unsafe { tight(TIGHT_ROUNDS, memory) });
    // Once over all of it before it counts, as memory of the host that is there.
    // SAFETY: as above; mapped by `map_stride`.
    unsafe { page_stride(2 * (STRIDE_BYTES / PAGE) as u64, STRIDE_LINEAR as *mut u8) };
    // SAFETY: as above.
    announced(&mut number, || unsafe {
        page_stride(STRIDE_STEPS, STRIDE_LINEAR as *mut u8);
    });
    let copy_all = || {
        // SAFETY: the layout sets both ranges aside.
        unsafe { copy(COPY_TO as *mut u8, COPY_FROM as *const u8, COPY_BYTES) }
    };
    copy_all();
    announced(&mut number, || (0..COPIES).for_each(|_| copy_all()));
    out32(0xe8, thread as *const () as u32);
    power::off(true)
}

/// One kernel after the other on this processor's part of the memory: those whose bit is set in
/// `which`.
extern "sysv64" fn thread(processor: usize, which: usize) -> ! {
    announce(b'+');
    let chosen = KERNELS.iter().enumerate();
    for (_, &(_, kernel, rounds)) in chosen.filter(|(number, _)| which >> number & 1 != 0) {
        // SAFETY: each processor has its own.
        unsafe { kernel(rounds, (MEMORY + processor * MEMORY_BYTES) as *mut u8) };
    }
    announce(b'-');
    power::off(true)
}

/// There is none until [`thread`] is started from outside.
#[unsafe(no_mangle)]
extern "C" fn second_processor() -> ! {
    power::off(false)
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    power::off(false)
}
