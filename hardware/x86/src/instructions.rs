//! Instructions that the language has no name for.

// UNSAFETY: each function is one instruction.
#![expect(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

/// Writes a byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the ports used are the console, the interrupt controllers' masks and the machines'
    // power switches; none of them writes memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Writes four bytes to a port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

/// Reads a model-specific register.
///
/// # Safety
/// The register must exist.
pub unsafe fn rdmsr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller says that the register exists.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must exist and allow the value, and Rust code must be able to run with it.
pub unsafe fn wrmsr(register: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack));
    }
}

/// CPUID, as `[eax, ebx, ecx, edx]`.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = __cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// Width of physical addresses in bits.
pub fn physical_address_bits() -> u8 {
    cpuid(0x8000_0008, 0)[0] as u8
}

/// CR0, CR3 and CR4.
pub fn control_registers() -> [u64; 3] {
    let (cr0, cr3, cr4): (u64, u64, u64);
    // SAFETY: reads only.
    unsafe {
        asm!("mov {}, cr0", "mov {}, cr3", "mov {}, cr4", out(reg) cr0, out(reg) cr3, out(reg) cr4,
            options(nomem, nostack));
    }
    [cr0, cr3, cr4]
}

/// Base and limit of the GDT and of the IDT.
pub fn descriptor_tables() -> [(u64, u16); 2] {
    let table = |bytes: [u8; 10]| {
        let [a, b, base @ ..] = bytes;
        (u64::from_le_bytes(base), u16::from_le_bytes([a, b]))
    };
    let (mut gdt, mut idt) = ([0u8; 10], [0u8; 10]);
    // SAFETY: each instruction writes the 10 bytes that it is given.
    unsafe {
        asm!("sgdt [{}]", "sidt [{}]", in(reg) &mut gdt, in(reg) &mut idt, options(nostack));
    }
    [table(gdt), table(idt)]
}

/// Allows or forbids interrupts on this processor.
///
/// Interrupts are handled in assembler, on a stack of their own (see [`smp`](crate::smp)), and
/// touch nothing that Rust code uses; so this is safe at any time.
pub fn interrupts(allowed: bool) {
    // SAFETY: see above.
    unsafe {
        if allowed {
            asm!("sti", options(nostack));
        } else {
            asm!("cli", options(nostack));
        }
    }
}

/// Whether interrupts are allowed on this processor.
pub fn interrupts_allowed() -> bool {
    let flags: u64;
    // SAFETY: reads the flags by way of the stack.
    unsafe { asm!("pushfq", "pop {}", out(reg) flags) }
    flags & 1 << 9 != 0
}
