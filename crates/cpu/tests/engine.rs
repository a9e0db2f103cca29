//! Running small guests through the public interface: exits, completion, events, stepping.
#![allow(unsafe_code, missing_docs)]
// UNSAFETY: builds a guest's memory.

use std::sync::Arc;
use twofold_arch::ept::Eptp;
use twofold_arch::{Gpa, Hpa, Level};
use twofold_cpu::{
    Cpu, DebugControl, Exception, Exit, Machine, MachineConfig, Registers, SecondStage,
    SecondStageFault, Segment, SystemRegisters, TableRegister,
};

/// Guest-physical memory: 256 KiB from 0.
const MEMORY: usize = 0x4_0000;
const TABLES: usize = 0x4000;
const HPA: u64 = 0x55_0000_0000;

struct Guest {
    cpu: Cpu,
    arena: *mut u8,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the processor is not running.
        unsafe { libc::munmap(self.arena.cast(), TABLES + MEMORY) };
    }
}

impl Guest {
    fn new() -> Self {
        // SAFETY: the kernel chooses the address.
        let arena = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                TABLES + MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(arena, libc::MAP_FAILED);
        let machine = Machine::new(MachineConfig {
            hpa_offset: (arena as usize).wrapping_sub(HPA as usize),
            ..MachineConfig::default()
        });
        let mut cpu = Cpu::new(Arc::clone(&machine), 0);
        let pointer = Eptp::new(Hpa::new(HPA), Level::L512G, true);
        let mut guest = {
            cpu.set_second_stage(SecondStage::Ept(pointer));
            Self { cpu, arena: arena.cast() }
        };
        for level in 0..3u64 {
            guest.put_table(level as usize * 0x1000, (HPA + (level + 1) * 0x1000) | 7);
        }
        for page in 0..MEMORY / 0x1000 {
            guest.map(page as u64, true);
        }
        guest
    }

    fn put_table(&mut self, offset: usize, value: u64) {
        // SAFETY: within the arena.
        unsafe { self.arena.add(offset).cast::<u64>().write(value) }
    }

    /// Maps a frame of the guest in the second stage, or takes it away.
    fn map(&mut self, frame: u64, present: bool) {
        let hpa = HPA + TABLES as u64 + frame * 0x1000;
        self.put_table(0x3000 + frame as usize * 8, if present { hpa | 7 | 6 << 3 } else { 0 });
    }

    fn write(&mut self, gpa: usize, bytes: &[u8]) {
        assert!(gpa + bytes.len() <= MEMORY);
        // SAFETY: within the arena.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.arena.add(TABLES + gpa),
                bytes.len(),
            );
        }
    }

    fn write_u64(&mut self, gpa: usize, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    fn read_u64(&self, gpa: usize) -> u64 {
        assert!(gpa + 8 <= MEMORY);
        // SAFETY: within the arena.
        unsafe { self.arena.add(TABLES + gpa).cast::<u64>().read_unaligned() }
    }

    /// Real mode with all segments at 0.
    fn real(code: &[u8]) -> Self {
        let mut guest = Self::new();
        let mut system = SystemRegisters::reset();
        system.cs.base = 0;
        system.cs.selector = 0;
        guest.cpu.set_system_registers(&system);
        guest.write(0x1000, code);
        guest.set(0x1000, |_| {});
        guest
    }

    /// 64-bit mode at CPL 0 with memory mapped one to one, an IDT at 0x6000 whose handlers are one
    /// HLT each at 0x7000 + vector, a GDT at 0x5000 and a TSS at 0x5800.
    fn long(code: &[u8]) -> Self {
        let mut guest = Self::new();
        guest.write_u64(0x2000, 0x3007);
        guest.write_u64(0x3000, 0x4007);
        // The first 2 MiB by 4 KiB pages at 0x8000.
        guest.write_u64(0x4000, 0x8007);
        for page in 0..512 {
            guest.write_u64(0x8000 + page * 8, (page as u64) << 12 | 7);
        }
        for vector in 0..256usize {
            let handler = 0x7000 + vector as u64;
            let dpl = if vector == 0x80 { 3u64 } else { 0 };
            let low = handler & 0xffff | 8 << 16 | (0x8e00 | dpl << 13) << 32;
            guest.write_u64(0x6000 + vector * 16, low);
            guest.write_u64(0x6008 + vector * 16, 0);
        }
        guest.write(0x7000, &[0xf4; 256]);
        guest.write_u64(0x5008, 0x00af_9b00_0000_ffff);
        guest.write_u64(0x5010, 0x00cf_9300_0000_ffff);
        guest.write_u64(0x5018, 0x00cf_f300_0000_ffff);
        guest.write_u64(0x5020, 0x00af_fb00_0000_ffff);
        guest.write_u64(0x5804, 0x1_f000);
        let data = Segment {
            selector: 0x10,
            limit: u32::MAX,
            kind: 3,
            code_or_data: true,
            present: true,
            granular: true,
            ..Segment::default()
        };
        guest.cpu.set_system_registers(&SystemRegisters {
            cs: Segment { selector: 8, kind: 11, long: true, ..data },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment { base: 0x5800, limit: 0x67, kind: 11, present: true, ..Segment::default() },
            gdt: TableRegister { base: 0x5000, limit: 0x27 },
            idt: TableRegister { base: 0x6000, limit: 0xfff },
            cr0: 0x8005_0033,
            cr3: 0x2000,
            cr4: 0x620,
            efer: 0xd01,
            ..SystemRegisters::reset()
        });
        guest.write(0x1000, code);
        guest.set(0x1000, |registers| registers.gpr[4] = 0x1_0000);
        guest
    }

    /// The same at CPL 3.
    fn user(code: &[u8]) -> Self {
        let mut guest = Self::long(code);
        let mut system = guest.cpu.system_registers();
        system.cs.selector = 0x23;
        system.cs.dpl = 3;
        system.ss.selector = 0x1b;
        system.ss.dpl = 3;
        guest.cpu.set_system_registers(&system);
        guest
    }

    fn set(&mut self, rip: u64, change: impl Fn(&mut Registers)) {
        let mut registers = Registers { rip, rflags: 2, ..Registers::default() };
        change(&mut registers);
        self.cpu.set_registers(&registers);
    }

    fn gpr(&self, register: usize) -> u64 {
        self.cpu.registers().gpr[register]
    }
}

#[test]
fn real_mode_adds_prints_and_halts() {
    // add al,bl; mov dx,0x3f8; add al,'0'; out dx,al; hlt
    let mut guest = Guest::real(b"\x00\xd8\xba\xf8\x03\x04\x30\xee\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[0] = 2;
        registers.gpr[3] = 3;
    });
    assert_eq!(guest.cpu.run(), Exit::Io { port: 0x3f8, size: 1, write: true, count: 1 });
    assert_eq!(guest.cpu.io_data(), b"5");
    assert_eq!(guest.cpu.registers().rip, 0x1007);
    assert!(guest.cpu.has_pending_completion());
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x1009);
}

#[test]
fn a_port_read_is_completed_before_a_kick_is_answered() {
    // in al,dx; inc rbx; hlt
    let mut guest = Guest::long(b"\xec\x48\xff\xc3\xf4");
    assert_eq!(guest.cpu.run(), Exit::Io { port: 0, size: 1, write: false, count: 1 });
    assert_eq!(guest.cpu.registers().rip, 0x1000);
    guest.cpu.complete_io_in(&[0xab]);
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    assert_eq!(guest.cpu.registers().rip, 0x1001);
    assert_eq!(guest.gpr(0), 0xab);
    assert_eq!(guest.gpr(3), 0);
    guest.cpu.line().cancel_kick();
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(3), 1);
}

#[test]
fn a_port_read_is_not_completed_if_rip_was_moved() {
    let mut guest = Guest::long(b"\xec\xf4\x90\xf4");
    assert!(matches!(guest.cpu.run(), Exit::Io { .. }));
    guest.cpu.complete_io_in(&[0xab]);
    guest.set(0x1002, |_| {});
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x1004);
    assert_eq!(guest.gpr(0), 0);
}

#[test]
fn string_input_stores_as_many_items_as_the_registers_say_on_reentry() {
    // cld; rep insb; hlt
    let mut guest = Guest::long(b"\xfc\xf3\x6c\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 3;
        registers.gpr[2] = 0x80;
        registers.gpr[7] = 0x1_0ffe;
    });
    // Two bytes to the end of the page.
    assert_eq!(guest.cpu.run(), Exit::Io { port: 0x80, size: 1, write: false, count: 2 });
    assert_eq!(guest.gpr(1), 3);
    guest.cpu.complete_io_in(&[1, 2]);
    assert_eq!(guest.cpu.run(), Exit::Io { port: 0x80, size: 1, write: false, count: 1 });
    assert_eq!((guest.gpr(1), guest.gpr(7)), (1, 0x1_1000));
    guest.cpu.complete_io_in(&[3]);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.read_u64(0x1_0ffe) & 0xff_ffff, 0x03_0201);
    // The program makes it one.
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 2;
        registers.gpr[7] = 0x1_0000;
    });
    assert!(matches!(guest.cpu.run(), Exit::Io { count: 2, .. }));
    guest.cpu.complete_io_in(&[7, 8]);
    let mut registers = guest.cpu.registers();
    registers.gpr[1] = 1;
    guest.cpu.set_registers(&registers);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(1), guest.gpr(7)), (0, 0x1_0001));
}

#[test]
fn string_output_reads_its_batch_first_and_advances_on_reentry() {
    // rep outsw; hlt
    let mut guest = Guest::long(b"\x66\xf3\x6f\xf4");
    guest.write(0x1_0000, b"abcdef");
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 3;
        registers.gpr[2] = 0x99;
        registers.gpr[6] = 0x1_0000;
    });
    assert_eq!(guest.cpu.run(), Exit::Io { port: 0x99, size: 2, write: true, count: 3 });
    assert_eq!(guest.cpu.io_data(), b"abcdef");
    assert_eq!(guest.gpr(1), 3);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(1), guest.gpr(6)), (0, 0x1_0006));
}

/// Runs until the exit is about emulated memory, allowing each page that is asked for.
fn run_with_mmio(guest: &mut Guest) -> Exit {
    loop {
        match guest.cpu.run() {
            Exit::SecondStage(
                SecondStageFault::EptViolation { gpa, .. }
                | SecondStageFault::EptMisconfiguration { gpa },
            ) => guest.cpu.allow_mmio(gpa),
            exit => return exit,
        }
    }
}

#[test]
fn emulated_memory_is_read_and_written_around_the_hypervisor() {
    // mov rax,[rbx]; add rax,1; mov [rbx+8],rax; add dword [rbx],5; hlt
    let mut guest = Guest::long(b"\x48\x8b\x03\x48\x83\xc0\x01\x48\x89\x43\x08\x83\x03\x05\xf4");
    guest.map(0x30, false);
    guest.set(0x1000, |registers| registers.gpr[3] = 0x3_0010);
    assert_eq!(run_with_mmio(&mut guest), Exit::MmioRead { gpa: Gpa::new(0x3_0010), len: 8 });
    assert_eq!(guest.cpu.registers().rip, 0x1000);
    guest.cpu.complete_mmio_read(&41u64.to_le_bytes());
    let data = 42u64.to_le_bytes();
    assert_eq!(
        run_with_mmio(&mut guest),
        Exit::MmioWrite { gpa: Gpa::new(0x3_0018), len: 8, data }
    );
    assert_eq!(guest.cpu.registers().rip, 0x100b);
    assert_eq!(run_with_mmio(&mut guest), Exit::MmioRead { gpa: Gpa::new(0x3_0010), len: 4 });
    guest.cpu.complete_mmio_read(&7u32.to_le_bytes());
    match run_with_mmio(&mut guest) {
        Exit::MmioWrite { gpa, len: 4, data } => {
            assert_eq!(gpa, Gpa::new(0x3_0010));
            assert_eq!(data[..4], 12u32.to_le_bytes());
        }
        exit => panic!("{exit:?}"),
    }
    assert_eq!(run_with_mmio(&mut guest), Exit::Halt);
}

#[test]
fn a_read_of_emulated_memory_completes_before_a_kick_is_answered() {
    let mut guest = Guest::long(b"\x48\x8b\x03\x48\xff\xc0\xf4");
    guest.map(0x30, false);
    guest.set(0x1000, |registers| registers.gpr[3] = 0x3_0010);
    assert!(matches!(run_with_mmio(&mut guest), Exit::MmioRead { .. }));
    guest.cpu.complete_mmio_read(&41u64.to_le_bytes());
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    assert_eq!(guest.gpr(0), 41);
    assert_eq!(guest.cpu.registers().rip, 0x1003);
}

#[test]
fn a_page_fault_pushes_its_error_code_and_sets_cr2() {
    // mov [0x300000],rax (not mapped)
    let mut guest = Guest::long(b"\x48\x89\x04\x25\x00\x00\x30\x00\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let registers = guest.cpu.registers();
    assert_eq!(registers.rip, 0x700f);
    assert_eq!(registers.gpr[4], 0xffd0);
    assert_eq!(guest.cpu.system_registers().cr2, 0x30_0000);
    // Error code, RIP, CS, RFLAGS, RSP, SS.
    assert_eq!(guest.read_u64(0xffd0), 2);
    assert_eq!(guest.read_u64(0xffd8), 0x1000);
    assert_eq!(guest.read_u64(0xffe0), 8);
    assert_eq!(guest.read_u64(0xfff0), 0x1_0000);
    assert_eq!(guest.read_u64(0xfff8), 0x10);
}

#[test]
fn an_exception_in_user_code_switches_to_the_stack_of_the_tss_and_returns() {
    // ud2; hlt-in-user is #GP, so: ud2 then int 0x80
    let mut guest = Guest::user(b"\x0f\x0b\xcd\x80");
    guest.write(0x7006, b"\x83\x04\x24\x02\x48\xcf");
    guest.write(0x7000 + 6, b"\x48\x83\x04\x24\x02\x48\xcf");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let registers = guest.cpu.registers();
    assert_eq!(registers.rip, 0x7081);
    assert_eq!(registers.gpr[4], 0x1_f000 - 40);
    let system = guest.cpu.system_registers();
    assert_eq!((system.cs.selector, system.ss.selector, system.ss.dpl), (8, 0, 0));
    assert_eq!(guest.read_u64(0x1_f000 - 40), 0x1004);
    assert_eq!(guest.read_u64(0x1_f000 - 32), 0x23);
    assert_eq!(guest.read_u64(0x1_f000 - 8), 0x1b);
}

#[test]
fn without_an_idt_an_exception_is_a_shutdown() {
    let mut guest = Guest::long(b"\x0f\x0b");
    let mut system = guest.cpu.system_registers();
    system.idt.limit = 0;
    guest.cpu.set_system_registers(&system);
    assert_eq!(guest.cpu.run(), Exit::Shutdown);
    assert_eq!(guest.cpu.registers().rip, 0x1000);
}

#[test]
fn a_fault_while_delivering_a_page_fault_is_a_double_fault() {
    let mut guest = Guest::long(b"\x48\x8b\x04\x25\x00\x00\x30\x00\xf4");
    // The gate of #PF is not present.
    guest.write_u64(0x6000 + 14 * 16, 0);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7009);
    assert_eq!(guest.read_u64(guest.gpr(4) as usize), 0);
}

#[test]
fn single_steps_leave_after_each_instruction() {
    // mov eax,1; inc eax; nop; hlt
    let mut guest = Guest::long(b"\xb8\x01\x00\x00\x00\xff\xc0\x90\xf4");
    guest
        .cpu
        .set_debug_control(&DebugControl { single_step: true, ..DebugControl::default() });
    for pc in [0x1005, 0x1007, 0x1008] {
        match guest.cpu.run() {
            Exit::Debug { exception: 1, pc: found, dr6, dr7: 0x400 } => {
                assert_eq!(found, pc);
                assert_eq!(dr6 & 0xffff, 0x4ff0);
            }
            exit => panic!("{exit:?}"),
        }
        assert_eq!(guest.cpu.registers().rip, pc);
    }
    guest.cpu.set_debug_control(&DebugControl::default());
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 2);
}

#[test]
fn the_trap_flag_raises_a_debug_exception_after_the_next_instruction() {
    // pushf; or word [rsp],0x100; popf; nop; nop
    let mut guest = Guest::long(b"\x9c\x66\x81\x0c\x24\x00\x01\x9d\x90\x90\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    let registers = guest.cpu.registers();
    assert_eq!(registers.rip, 0x7002);
    assert_eq!(guest.read_u64(registers.gpr[4] as usize), 0x1009);
    assert_eq!(guest.cpu.debug_registers().dr6 & 0x4000, 0x4000);
    assert_eq!(registers.rflags & 0x100, 0);
}

#[test]
fn an_interrupt_waits_for_the_instruction_after_sti() {
    // cli; sti; inc rax; inc rax; hlt
    let mut guest = Guest::long(b"\xfa\xfb\x48\xff\xc0\x48\xff\xc0\xf4");
    guest.cpu.request_interrupt_window(true);
    assert!(!guest.cpu.interrupt_window_open());
    assert_eq!(guest.cpu.run(), Exit::InterruptWindow);
    assert_eq!(guest.cpu.registers().rip, 0x1005);
    assert_eq!(guest.gpr(0), 1);
    assert!(guest.cpu.interrupt_window_open());
    guest.cpu.request_interrupt_window(false);
    guest.cpu.inject_interrupt(0x40);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7041);
    assert_eq!(guest.read_u64(guest.gpr(4) as usize), 0x1005);
}

#[test]
fn a_second_nmi_waits_for_iret() {
    // nop; hlt; handler: inc rax; iretq
    let mut guest = Guest::long(b"\x90\xf4");
    guest.write(0x7002, b"\x48\xff\xc0\x48\x83\xf8\x02\x74\x02\xf4\x90\x48\xcf");
    guest.cpu.inject_nmi();
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(0), guest.cpu.registers().rip), (1, 0x700c));
    guest.cpu.inject_nmi();
    assert!(guest.cpu.events().nmi_masked);
    // nop; iretq of the first; the second is delivered at once and returns to where the first did.
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(0), guest.cpu.registers().rip), (2, 0x1002));
    assert!(!guest.cpu.events().nmi_masked);
}

#[test]
fn a_queued_exception_is_delivered_first() {
    let mut guest = Guest::long(b"\x90\xf4");
    guest.cpu.queue_exception(Exception { vector: 6, error_code: None, payload: None });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7007);
}

#[test]
fn an_instruction_that_is_not_known_leaves_with_its_bytes() {
    // nop; vmxon [rax]
    let mut guest = Guest::long(b"\x90\xf3\x0f\xc7\x30\xf4");
    match guest.cpu.run() {
        Exit::Unknown(unknown) => {
            assert_eq!(unknown.bytes[..usize::from(unknown.len)], *b"\xf3\x0f\xc7\x30");
            assert_eq!(format!("{:?}", unknown.mnemonic), "Vmxon");
        }
        exit => panic!("{exit:?}"),
    }
    assert_eq!(guest.cpu.registers().rip, 0x1001);
}

#[test]
fn code_that_changes_itself_runs_as_new_code_at_once() {
    // mov byte [rip+1],0xff; mov eax,0x11 -> the immediate's first byte changes; hlt
    let mut guest = Guest::long(b"\xc6\x05\x01\x00\x00\x00\xff\xb8\x11\x00\x00\x00\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0xff);
}

#[test]
fn code_that_the_program_changes_runs_as_new_code_from_the_next_run() {
    let mut guest = Guest::long(b"\xb8\x11\x00\x00\x00\xf4");
    assert_eq!(guest.cpu.run(), Exit::Halt);
    guest.write(0x1001, &[0x22]);
    guest.set(0x1000, |_| {});
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0x22);
}

#[test]
fn an_instruction_across_two_pages_is_executed_and_noticed_when_it_changes() {
    let mut guest = Guest::long(b"");
    for value in [0x1234u32, 0x5678] {
        let mut code = vec![0xb8];
        code.extend_from_slice(&value.to_le_bytes());
        code.push(0xf4);
        guest.write(0x1_4ffe, &code);
        guest.set(0x1_4ffe, |_| {});
        assert_eq!(guest.cpu.run(), Exit::Halt);
        assert_eq!(guest.gpr(0), u64::from(value));
    }
}

#[test]
fn a_store_across_pages_that_faults_on_the_second_changes_nothing() {
    // mov [0x14ffc],rax
    let mut guest = Guest::long(b"\x48\x89\x04\x25\xfc\x4f\x01\x00\xf4");
    guest.write_u64(0x8000 + 0x15 * 8, 0);
    guest.set(0x1000, |registers| {
        registers.gpr[0] = u64::MAX;
        registers.gpr[4] = 0x1_0000;
    });
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x700f);
    assert_eq!(guest.cpu.system_registers().cr2, 0x1_5000);
    assert_eq!(guest.read_u64(0x1_4ff8), 0);
}

#[test]
fn syscall_and_sysret_go_to_the_kernel_and_back() {
    // user: syscall; int 0x80. kernel at 0x1100: mov rax,cs; sysretq
    let mut guest = Guest::user(b"\x0f\x05\xcd\x80");
    guest.write(0x1100, b"\x48\x8c\xc8\x48\x0f\x07");
    let mut msrs = guest.cpu.msrs();
    msrs.star = 0x13 << 48 | 8 << 32;
    msrs.lstar = 0x1100;
    msrs.sfmask = 0x200;
    guest.cpu.set_msrs(&msrs);
    guest.write_u64(0x5018, 0x00cf_f300_0000_ffff);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x7081);
    assert_eq!(guest.gpr(0), 8);
    assert_eq!(guest.gpr(1), 0x1002);
}

#[test]
fn msrs_of_the_hypervisor_are_asked_for() {
    // rdmsr; wrmsr; hlt
    let mut guest = Guest::long(b"\x0f\x32\x0f\x30\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[1] = 0x1b;
        registers.gpr[4] = 0x1_0000;
    });
    assert_eq!(guest.cpu.run(), Exit::Rdmsr { index: 0x1b });
    guest.cpu.complete_rdmsr(Some(0x1_fee0_0900));
    assert_eq!(guest.cpu.run(), Exit::Wrmsr { index: 0x1b, value: 0x1_fee0_0900 });
    guest.cpu.complete_wrmsr(false);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.cpu.registers().rip, 0x700e);
}

#[test]
fn repeated_strings_stop_for_a_kick_and_go_on() {
    // rep stosb over 64 KiB; hlt
    let mut guest = Guest::long(b"\xf3\xaa\xf4");
    guest.set(0x1000, |registers| {
        registers.gpr[0] = 0x5a;
        registers.gpr[1] = 0x1_0000;
        registers.gpr[7] = 0x2_0000;
    });
    guest.cpu.line().kick();
    assert_eq!(guest.cpu.run(), Exit::Kicked);
    guest.cpu.line().cancel_kick();
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!((guest.gpr(1), guest.gpr(7)), (0, 0x3_0000));
    assert_eq!(guest.read_u64(0x2_fff8), 0x5a5a_5a5a_5a5a_5a5a);
}

#[test]
fn real_mode_interrupts_go_through_the_vector_table() {
    // int 0x21; hlt
    let mut guest = Guest::real(b"\xcd\x21\xf4");
    // handler at 0:0x2000: mov ax,0x55; iret
    guest.write(0x21 * 4, &[0x00, 0x20, 0x00, 0x00]);
    guest.write(0x2000, b"\xb8\x55\x00\xcf");
    guest.set(0x1000, |registers| registers.gpr[4] = 0x4000);
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(0), 0x55);
    assert_eq!(guest.cpu.registers().rip, 0x1003);
    assert_eq!(guest.gpr(4), 0x4000);
}

#[test]
fn protected_mode_is_reached_from_real_mode() {
    // lgdt [0x500]; mov eax,cr0; or al,1; mov cr0,eax; jmp 8:0x1100
    let mut guest =
        Guest::real(b"\x0f\x01\x16\x00\x05\x0f\x20\xc0\x0c\x01\x0f\x22\xc0\xea\x00\x11\x08\x00");
    guest.write(0x500, &[0x17, 0, 0x00, 0x05, 0, 0]);
    guest.write_u64(0x508, 0x00cf_9b00_0000_ffff);
    guest.write_u64(0x510, 0x00cf_9300_0000_ffff);
    // 32-bit: mov ax,0x10; mov ds,ax; mov ss,ax; mov esp,0x10000; push 0x12345678; pop ebx; hlt
    guest.write(
        0x1100,
        b"\x66\xb8\x10\x00\x8e\xd8\x8e\xd0\xbc\x00\x00\x01\x00\x68\x78\x56\x34\x12\x5b\xf4",
    );
    assert_eq!(guest.cpu.run(), Exit::Halt);
    assert_eq!(guest.gpr(3), 0x1234_5678);
    assert_eq!(guest.gpr(4), 0x1_0000);
    assert!(guest.cpu.system_registers().cs.big);
}
