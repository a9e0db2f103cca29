//! Two processors on the same memory, each on a thread of its own: what one may see of the other.

use crate::guest::Guest;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use twofold_cpu::{Cpu, Exit, Registers};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RSI: usize = 6;
const RDI: usize = 7;

/// Where the second processor's code is; the first one's is at 0x1000.
const SECOND: usize = 0x1_2000;
/// Bytes before the end of a page at which an operand lies in two.
const STRADDLE: u64 = 0x1_9ffc;

/// A guest in 64-bit mode with two processors.
struct Pair {
    guest: Guest,
    second: Cpu,
}

impl Pair {
    fn new(first: &[u8], second: &[u8]) -> Self {
        let mut guest = Guest::long(first);
        let mut other = guest.arena.another_processor(guest.cpu.machine(), 1);
        other.set_system_registers(&guest.cpu.system_registers());
        guest.write(SECOND, second);
        // What follows the page at 0x19000 is not behind it in host memory.
        guest.write_u64(0x8000 + 0x1a * 8, 0x1_c000 | 7);
        Self {
            guest,
            second: other,
        }
    }

    /// Runs both until they halt.
    fn run(&mut self, change: impl Fn(&mut [u64; 16], usize)) {
        let registers = |which: usize| {
            let mut gpr = [0; 16];
            gpr[4] = [0x1_0000, 0x1_1000][which];
            change(&mut gpr, which);
            Registers {
                gpr,
                rip: [0x1000, SECOND as u64][which],
                rflags: 2,
            }
        };
        let cpus = [&mut self.guest.cpu, &mut self.second];
        let lines = [Arc::clone(cpus[0].line()), Arc::clone(cpus[1].line())];
        thread::scope(|scope| {
            let running = cpus.into_iter().enumerate().map(|(which, cpu)| {
                cpu.set_registers(&registers(which));
                scope.spawn(move || assert_eq!(cpu.run(), Exit::Halt))
            });
            let running: Vec<_> = running.collect();
            let deadline = Instant::now() + Duration::from_secs(60);
            while running.iter().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(1));
            }
            // They have halted, or fail for not having.
            lines.iter().for_each(|line| line.kick());
        });
    }

    fn second_gpr(&self, register: usize) -> u64 {
        self.second.registers().gpr[register]
    }
}

#[test]
fn stores_are_seen_in_their_order() {
    // mov eax,1; l: mov [0x18000],eax; mov [0x19000],eax; inc eax; cmp eax,ecx; jbe l; hlt
    let writer =
        b"\xb8\x01\x00\x00\x00\x89\x04\x25\x00\x80\x01\x00\x89\x04\x25\x00\x90\x01\x00\xff\
        \xc0\x39\xc8\x76\xec\xf4";
    // l: mov eax,[0x19000]; mov ebx,[0x18000]; cmp ebx,eax; jb bad; cmp eax,ecx; jb l; xor edx,edx;
    // hlt; bad: mov edx,1; hlt
    let reader =
        b"\x8b\x04\x25\x00\x90\x01\x00\x8b\x1c\x25\x00\x80\x01\x00\x39\xc3\x72\x07\x39\xc8\
        \x72\xea\x31\xd2\xf4\xba\x01\x00\x00\x00\xf4";
    let mut pair = Pair::new(writer, reader);
    pair.run(|gpr, _| gpr[RCX] = 300_000);
    assert_eq!(pair.second_gpr(RDX), 0, "the flag came before the data");
    assert_eq!(pair.second_gpr(RAX), 300_000);
}

/// Each processor stores to its own place and then loads the other's, in step. How often neither saw
/// the other's store.
fn both_loads_first(fence: &[u8]) -> usize {
    const ROUNDS: u64 = 1000;
    const SEEN: [u64; 2] = [0x2_0000, 0x2_8000];
    // mov eax,1; l: mov [r8],eax; w: cmp [r9],eax; jb w; mov [rsi],eax
    let mut code = b"\xb8\x01\x00\x00\x00\x41\x89\x00\x41\x39\x01\x72\xfb\x89\x06".to_vec();
    code.extend(fence);
    // mov ebx,[rdi]; mov [r10+rax*4],ebx; inc eax; cmp eax,ecx; jbe l; hlt
    code.extend(b"\x8b\x1f\x41\x89\x1c\x82\xff\xc0\x39\xc8\x76");
    let back = 0xff - (code.len() - 5) as u8;
    code.extend([back, 0xf4]);
    let mut pair = Pair::new(&code, &code);
    pair.run(|gpr, which| {
        gpr[RCX] = ROUNDS;
        gpr[RSI] = [0x1_8000, 0x1_9000][which];
        gpr[RDI] = [0x1_9000, 0x1_8000][which];
        gpr[8] = [0x1_8800, 0x1_9800][which];
        gpr[9] = [0x1_9800, 0x1_8800][which];
        gpr[10] = SEEN[which];
    });
    let seen = |which: usize, round: u64| {
        pair.guest.read_u64((SEEN[which] + round * 4) as usize) & 0xffff_ffff
    };
    (1..=ROUNDS)
        .filter(|&round| seen(0, round) < round && seen(1, round) < round)
        .count()
}

#[test]
fn a_load_passes_an_older_store_only_without_a_fence() {
    // nop: it may.
    let without = both_loads_first(b"\x90");
    println!("neither saw the other's store: {without} times without a fence");
    for (name, fence) in [
        ("mfence", &b"\x0f\xae\xf0"[..]),
        ("lock or dword [rsp-8],0", b"\xf0\x83\x4c\x24\xf8\x00"),
        ("xchg [rsp-8],ebp", b"\x87\x6c\x24\xf8"),
    ] {
        assert_eq!(both_loads_first(fence), 0, "{name}");
    }
}

#[test]
fn locked_increments_add_up_wherever_they_lie() {
    const ROUNDS: u64 = 20_000;
    // l: lock inc qword [rdi]; dec ecx; jnz l; hlt
    let code = b"\xf0\x48\xff\x07\xff\xc9\x75\xf8\xf4";
    for (place, rounds) in [(0x1_8000, ROUNDS), (0x1_8003, 2000), (STRADDLE, 500)] {
        let mut pair = Pair::new(code, code);
        pair.run(|gpr, _| (gpr[RCX], gpr[RDI]) = (rounds, place));
        let value = if place == STRADDLE {
            let high = pair.guest.read_u64(0x1_c000) & 0xffff_ffff;
            pair.guest.read_u64(STRADDLE as usize) & 0xffff_ffff | high << 32
        } else {
            pair.guest.read_u64(place as usize)
        };
        assert_eq!(value, 2 * rounds, "{place:#x}");
    }
}

#[test]
fn an_operand_in_two_pages_and_its_halves_are_atomic_against_each_other() {
    const ROUNDS: u64 = 500;
    // mov rax,0x100000001; l: lock add [rdi],rax; dec ecx; jnz l; hlt
    let whole = b"\x48\xb8\x01\x00\x00\x00\x01\x00\x00\x00\xf0\x48\x01\x07\xff\xc9\x75\xf8\xf4";
    // l: lock inc dword [rdi]; lock inc dword [rdi+4]; dec ecx; jnz l; hlt
    let halves = b"\xf0\xff\x07\xf0\xff\x47\x04\xff\xc9\x75\xf5\xf4";
    let mut pair = Pair::new(whole, halves);
    pair.run(|gpr, _| (gpr[RCX], gpr[RDI]) = (ROUNDS, STRADDLE));
    let low = pair.guest.read_u64(STRADDLE as usize) & 0xffff_ffff;
    let high = pair.guest.read_u64(0x1_c000) & 0xffff_ffff;
    assert_eq!((low, high), (2 * ROUNDS, 2 * ROUNDS));
}

#[test]
fn a_locked_operation_in_two_pages_loses_no_plain_store_to_one_of_them() {
    const ROUNDS: u64 = 500;
    // l: lock add qword [rdi],0; dec ecx; jnz l; hlt
    let locked = b"\xf0\x48\x83\x07\x00\xff\xc9\x75\xf7\xf4";
    // xor edx,edx; l: mov [rdi+4],ecx; cmp [rdi+4],ecx; setne al; or dl,al; dec ecx; jnz l; hlt
    let stores = b"\x31\xd2\x89\x4f\x04\x39\x4f\x04\x0f\x95\xc0\x08\xc2\xff\xc9\x75\xf1\xf4";
    let mut pair = Pair::new(locked, stores);
    pair.run(|gpr, which| {
        (gpr[RCX], gpr[RDI]) = ([ROUNDS, 50 * ROUNDS][which], STRADDLE);
    });
    assert_eq!(pair.second_gpr(RDX), 0, "a store was lost");
}

#[test]
fn sixteen_bytes_are_exchanged_at_once() {
    const ROUNDS: u64 = 10_000;
    // xor r8d,r8d; l: mov rax,[rdi]; mov rdx,[rdi+8]; r: mov rbx,rax; mov rcx,rdx; inc rbx; inc rcx;
    // lock cmpxchg16b [rdi]; jnz r; cmp rax,rdx; setne al; or r8b,al; dec esi; jnz l; hlt
    let code =
        b"\x45\x31\xc0\x48\x8b\x07\x48\x8b\x57\x08\x48\x89\xc3\x48\x89\xd1\x48\xff\xc3\x48\xff\
        \xc1\xf0\x48\x0f\xc7\x0f\x75\xed\x48\x39\xd0\x0f\x95\xc0\x41\x08\xc0\xff\xce\x75\xd9\xf4";
    let mut pair = Pair::new(code, code);
    pair.run(|gpr, _| (gpr[RSI], gpr[RDI]) = (ROUNDS, 0x1_8000));
    let halves = [0x1_8000, 0x1_8008].map(|place| pair.guest.read_u64(place));
    assert_eq!(halves, [2 * ROUNDS; 2]);
    assert_eq!((pair.guest.gpr(8), pair.second_gpr(8)), (0, 0), "torn");
}

#[test]
fn code_that_the_other_processor_writes_runs_as_new_code() {
    const ROUNDS: u64 = 500;
    // l: call 0x14000; mov [0x18000],eax; cmp eax,ecx; jb l; hlt
    let runner = b"\xe8\xfb\x2f\x01\x00\x89\x04\x25\x00\x80\x01\x00\x39\xc8\x72\xf0\xf4";
    // mov eax,1; l: mov [0x14001],eax; w: cmp [0x18000],eax; jne w; inc eax; cmp eax,ecx; jbe l; hlt
    let writer =
        b"\xb8\x01\x00\x00\x00\x89\x04\x25\x01\x40\x01\x00\x39\x04\x25\x00\x80\x01\x00\x75\
        \xf7\xff\xc0\x39\xc8\x76\xea\xf4";
    let mut pair = Pair::new(runner, writer);
    // mov eax,0; ret
    pair.guest.write(0x1_4000, b"\xb8\x00\x00\x00\x00\xc3");
    pair.run(|gpr, _| gpr[RCX] = ROUNDS);
    assert_eq!(pair.guest.gpr(RAX), ROUNDS);
}
