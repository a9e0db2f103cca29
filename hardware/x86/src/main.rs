//! A small bare-metal hypervisor whose MMU is `twofold-mmu`, used as it is.
//!
//! It runs on an Intel processor with EPT or an AMD processor with nested paging, shows what the
//! MMU promises to a hypervisor as one line for each [scenario](scenarios), and switches the machine
//! off. It has no code that knows what is in a second-stage table. ([`walks`] puts random words into
//! memory and has the processor take them for tables; the MMU has no part in that.)
//!
//! To see how the MMU is embedded read [`host`] (what the MMU asks for), then [`vm`] (how it is
//! used), then [`smp`] (how a flush reaches the other processor).
#![no_std]
#![no_main]

extern crate alloc;

pub mod guest;
pub mod heap;
pub mod host;
pub mod instructions;
pub mod power;
pub mod processor;
pub mod runtime;
pub mod scenarios;
pub mod second;
pub mod serial;
pub mod smp;
pub mod svm;
pub mod vm;
pub mod vmx;
pub mod walks;

use crate::instructions::{cpuid, interrupts, physical_address_bits};
use crate::processor::Virtualization;
use core::panic::PanicInfo;

/// Whether the processor is Intel's kind; otherwise it is AMD's.
fn has_vmx() -> bool {
    cpuid(1, 0)[2] & 1 << 5 != 0
}

fn has_svm() -> bool {
    cpuid(0x8000_0000, 0)[0] >= 0x8000_0001 && cpuid(0x8000_0001, 0)[2] & 1 << 2 != 0
}

fn run<V: Virtualization>() -> !
where
    vm::Vm<V>: Send + Sync,
{
    println!(
        "{}; physical addresses of {} bits",
        V::NAME,
        physical_address_bits()
    );
    V::enable();
    smp::start_second();
    interrupts(true);
    let shown = scenarios::run::<V>();
    walks::run::<V>();
    power::off(shown)
}

// UNSAFETY: boot.s calls these by name.
#[expect(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn first_processor() -> ! {
    heap::init();
    smp::init();
    if has_vmx() {
        run::<vmx::Vmx>()
    } else if has_svm() {
        run::<svm::Svm>()
    } else {
        println!("this processor has neither VMX nor SVM");
        power::off(false)
    }
}

// UNSAFETY: boot.s calls this by name.
#[expect(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn second_processor() -> ! {
    if has_vmx() {
        vmx::Vmx::enable();
    } else {
        svm::Svm::enable();
    }
    smp::init_second();
    interrupts(true);
    second::work()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("! {info}");
    power::off(false)
}
