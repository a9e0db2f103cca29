//! Measures the interpreter: millions of guest instructions a second on small loops.
//!
//! `cargo run --release -p twofold-cpu --example speed`
#![allow(unsafe_code)]
// UNSAFETY: reads the thread's clock.

#[path = "../tests/support/mod.rs"]
mod support;

use support::{Arena, code64, flat_data};
use twofold_cpu::{Cpu, Exit, Registers, SystemRegisters};

/// Bytes of guest memory, mapped by two 2 MiB pages in both stages.
const MEMORY: u64 = 4 << 20;
const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STACK: u64 = 0x1f_0000;

fn main() {
    let exits = 1_000_000;
    let (_, nanoseconds) = measure_exits(exits);
    println!(
        "{:8} {:6.1} ns from one port write to the next",
        "exits",
        nanoseconds / exits as f64
    );
    // The loops count down r15 and end in HLT.
    let kernels: [(&str, &[u8]); 7] = [
        // 1: dec r15; jnz 1b
        ("tight", b"\x49\xff\xcf\x75\xfb\xf4"),
        // 1: lea rax,[rax+rbx*4+7]; xor rcx,rax; add rbx,rcx; shl rdx,3; sub rdx,rax;
        //    and rsi,rdx; or rdi,rbx; imul r8,rcx; dec r15; jnz 1b
        (
            "integer",
            b"\x48\x8d\x44\x98\x07\x48\x31\xc1\x48\x01\xcb\x48\xc1\xe2\x03\x48\x29\xc2\
              \x48\x21\xd6\x48\x09\xdf\x4c\x0f\xaf\xc1\x49\xff\xcf\x75\xdf\xf4",
        ),
        // 1: mov rax,[r14]; add rax,1; mov [r14],rax; mov ecx,[r14+8]; mov [r14+r13*4+16],ecx;
        //    dec r15; jnz 1b
        (
            "memory",
            b"\x49\x8b\x06\x48\x83\xc0\x01\x49\x89\x06\x41\x8b\x4e\x08\x43\x89\x4c\xae\x10\
              \x49\xff\xcf\x75\xe8\xf4",
        ),
        // 1: call 2f; test r15d,1; je 3f; inc rax; 3: dec r15; jnz 1b; hlt; 2: push rbp;
        //    mov rbp,rsp; pop rbp; ret
        (
            "calls",
            b"\xe8\x12\x00\x00\x00\x41\xf7\xc7\x01\x00\x00\x00\x74\x03\x48\xff\xc0\x49\xff\xcf\
              \x75\xea\xf4\x55\x48\x89\xe5\x5d\xc3",
        ),
        // 1: movsd xmm0,[r14]; addsd xmm0,xmm1; mulsd xmm0,xmm2; movsd [r14],xmm0; dec r15; jnz 1b
        (
            "sse2",
            b"\xf2\x41\x0f\x10\x06\xf2\x0f\x58\xc1\xf2\x0f\x59\xc2\xf2\x41\x0f\x11\x06\
              \x49\xff\xcf\x75\xe9\xf4",
        ),
        // 1: mov rcx,4096; mov rdi,r14; mov rsi,r14; rep movsb; dec r15; jnz 1b
        (
            "string",
            b"\x48\xc7\xc1\x00\x10\x00\x00\x4c\x89\xf7\x4c\x89\xf6\xf3\xa4\x49\xff\xcf\x75\xec\xf4",
        ),
        // 1: fld qword [r14]; fadd qword [r14+8]; fmul qword [r14+16]; fstp qword [r14]; dec r15;
        //    jnz 1b
        (
            "x87",
            b"\x41\xdd\x06\x41\xdc\x46\x08\x41\xdc\x4e\x10\x41\xdd\x1e\x49\xff\xcf\x75\xed\xf4",
        ),
    ];
    for (name, code) in kernels {
        let rounds = match name {
            "string" => 100_000,
            "x87" => 500_000,
            _ => 10_000_000,
        };
        // The best of three.
        let (instructions, nanoseconds) = (0..3)
            .map(|_| measure(code, rounds))
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap_or_default();
        println!(
            "{name:8} {:8.1} M instructions/s, {:6.2} ns a round",
            instructions as f64 * 1e3 / nanoseconds,
            nanoseconds / rounds as f64
        );
    }
}

/// CPU time of this thread: what others do on a shared machine counts less.
fn thread_nanoseconds() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes to a local.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A processor at the first byte of `code` in 64-bit mode, and the memory behind it.
fn prepare(code: &[u8], rounds: u64) -> (Cpu, Arena) {
    let mut arena = Arena::large(MEMORY as usize);
    // The guest's tables at 0x1000.
    arena.write_u64(0x1000, 0x2003);
    arena.write_u64(0x2000, 0x3003);
    for page in 0..MEMORY >> 21 {
        arena.write_u64(0x3000 + page as usize * 8, page << 21 | 0x83);
    }
    arena.write(CODE as usize, code);
    let mut cpu = arena.processor(51);
    let data = flat_data(0x10, 0);
    cpu.set_system_registers(&SystemRegisters {
        cs: code64(8, 0),
        ds: data,
        es: data,
        ss: data,
        cr0: 0x8000_0033,
        cr3: 0x1000,
        cr4: 0x620,
        efer: 0xd00,
        ..SystemRegisters::reset()
    });
    let mut registers = Registers {
        rip: CODE,
        rflags: 2,
        ..Registers::default()
    };
    registers.gpr[4] = STACK;
    registers.gpr[14] = DATA;
    registers.gpr[15] = rounds;
    cpu.set_registers(&registers);
    (cpu, arena)
}

fn measure(code: &[u8], rounds: u64) -> (u64, f64) {
    let (mut cpu, arena) = prepare(code, rounds);
    let before = cpu.counters().instructions;
    let start = thread_nanoseconds();
    let exit = cpu.run();
    let elapsed = thread_nanoseconds() - start;
    assert!(
        matches!(exit, Exit::Halt),
        "{exit:?} at {:#x}",
        cpu.registers().rip
    );
    drop(arena);
    (cpu.counters().instructions - before, elapsed as f64)
}

fn measure_exits(exits: u64) -> (u64, f64) {
    // 1: out 0x80,al; jmp 1b
    let (mut cpu, arena) = prepare(b"\xe6\x80\xeb\xfc", 0);
    let start = thread_nanoseconds();
    for _ in 0..exits {
        assert!(matches!(cpu.run(), Exit::Io { port: 0x80, .. }));
    }
    let elapsed = thread_nanoseconds() - start;
    drop(arena);
    (exits, elapsed as f64)
}
