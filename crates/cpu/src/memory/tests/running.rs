//! Several processors at once, and processors that run.

use super::*;

#[test]
fn locked_changes_of_two_processors_add_up_even_across_scattered_pages() {
    const ROUNDS: u64 = 2000;
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let _ = host.paged(&machine);
    host.put(11, 0x21, 0x30 << 12 | 7);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (machine, host) = (&machine, &host);
            scope.spawn(move || {
                let mut cpu = host.cpu(machine);
                let core = &mut cpu.core;
                core.cr0 = cr0::PG | cr0::PE;
                core.cr3 = 8 << 12;
                core.cr4 = cr4::PAE;
                core.efer = efer::LME | efer::LMA;
                core.flush_all();
                core.line.enter();
                for round in 0..ROUNDS {
                    if core.line.asked() {
                        core.serve_requests();
                    }
                    core.rmw::<u64>(0x22_001, true, |x| x + 1).unwrap();
                    if round % 16 == 0 {
                        core.rmw::<u32>(0x20_ffe, true, |x| x + 1).unwrap();
                    }
                }
                core.line.leave();
            });
        }
    });
    let mut cpu = host.paged(&machine);
    host.put(11, 0x21, 0x30 << 12 | 7);
    assert_eq!(cpu.core.load::<u64>(0x22_001), Ok(2 * ROUNDS));
    assert_eq!(cpu.core.load::<u32>(0x20_ffe), Ok((2 * ROUNDS / 16) as u32));
}

impl Host {
    /// A processor in 64-bit code at CPL 0, about to execute `code` in frame 24.
    fn running(&self, machine: &Arc<Machine>, index: u32, code: &[u8]) -> Cpu {
        let mut cpu = self.paged(machine);
        drop(std::mem::replace(&mut cpu, {
            let mut cpu = Cpu::new(Arc::clone(machine), index);
            let root = Hpa::new(self.hpa(0));
            cpu.set_second_stage(SecondStage::Ept(Eptp::new(root, Level::L512G, true)));
            cpu
        }));
        for (i, chunk) in code.chunks(8).enumerate() {
            let mut word = [0xf4; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.put(24, i, u64::from_le_bytes(word));
        }
        let flat = crate::Segment {
            limit: u32::MAX,
            kind: 3,
            code_or_data: true,
            present: true,
            big: true,
            granular: true,
            ..crate::Segment::default()
        };
        cpu.set_system_registers(&crate::SystemRegisters {
            cs: crate::Segment {
                kind: 11,
                long: true,
                big: false,
                ..flat
            },
            ds: flat,
            es: flat,
            fs: flat,
            gs: flat,
            ss: flat,
            cr0: cr0::PG | cr0::PE | cr0::WP | cr0::ET | cr0::NE,
            cr3: 8 << 12,
            cr4: cr4::PAE,
            efer: efer::LME | efer::LMA | efer::NXE,
            ..crate::SystemRegisters::default()
        });
        cpu.set_registers(&crate::Registers {
            rip: 24 << 12,
            rflags: 2,
            gpr: [0; 16],
        });
        cpu
    }
}

/// `inc qword [0x20000]` for ever.
const COUNT_FOR_EVER: [u8; 10] = [0x48, 0xff, 0x04, 0x25, 0, 0, 2, 0, 0xeb, 0xf6];

#[test]
fn after_a_flush_running_guests_write_only_where_the_tables_say() {
    const ROUNDS: usize = 200;
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    let mut cpus: Vec<Cpu> = (0..2)
        .map(|index| host.running(&machine, index, &COUNT_FOR_EVER))
        .collect();
    let lines: Vec<_> = cpus.iter().map(|cpu| Arc::clone(cpu.line())).collect();
    std::thread::scope(|scope| {
        for cpu in &mut cpus {
            scope.spawn(|| assert_eq!(cpu.run(), Exit::Kicked));
        }
        while !lines.iter().all(|line| line.in_guest()) {
            std::thread::yield_now();
        }
        let mut moved = 0;
        for round in 0..ROUNDS {
            let (old, new) = if round % 2 == 0 {
                (0x20, 0x30)
            } else {
                (0x30, 0x20)
            };
            host.put(3, 0x20, host.hpa(new) | host.leaf());
            machine.flush_tlbs();
            let value = host.get(old, 0);
            for _ in 0..50 {
                std::hint::spin_loop();
                assert_eq!(
                    host.get(old, 0),
                    value,
                    "a store went to the page that was taken"
                );
            }
            moved += u64::from(host.get(new, 0) != 0);
        }
        machine.kick_all();
        assert!(moved > 0, "the guests did not run");
    });
    assert!(cpus.iter().all(|cpu| cpu.counters().tlb_flushes > 1));
}

#[test]
fn memory_that_vanishes_under_a_running_guest_is_reported_with_the_state_before() {
    access::tests::install_handler();
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    // mov rax, 5; inc qword [0x20000]; hlt
    let code = [0xb8, 5, 0, 0, 0, 0x48, 0xff, 0x04, 0x25, 0, 0, 2, 0, 0xf4];
    let mut cpu = host.running(&machine, 0, &code);
    // SAFETY: the kernel chooses the address; only the guest uses the page.
    #[expect(unsafe_code)]
    // UNSAFETY: a page that can be taken away.
    let page = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            4096,
            rustix::mm::ProtFlags::empty(),
            rustix::mm::MapFlags::PRIVATE,
        )
    }
    .unwrap() as usize;
    let hpa = (page as u64).wrapping_sub(machine.config().hpa_offset as u64);
    assert!(
        hpa < 1 << 46,
        "the test's offset keeps addresses within MAXPHYADDR"
    );
    host.put(3, 0x20, hpa | host.leaf());
    assert_eq!(cpu.run(), Exit::HostFault { hva: page as u64 });
    let registers = cpu.registers();
    assert_eq!((registers.rip, registers.gpr[0]), ((24 << 12) + 5, 5));
    // The program maps something else there: the instruction goes on.
    host.put(3, 0x20, host.hpa(0x20) | host.leaf());
    machine.flush_tlbs();
    assert_eq!(cpu.run(), Exit::Halt);
    assert_eq!(host.get(0x20, 0), 1);
    #[expect(unsafe_code)]
    // UNSAFETY: a page that can be taken away.
    // SAFETY: the tables do not lead to the page any more.
    unsafe {
        rustix::mm::munmap(page as *mut _, 4096).unwrap();
    }
}

#[test]
fn code_that_another_processor_changes_runs_as_new_code() {
    const ROUNDS: u64 = 300;
    let host = Host::new(SecondStageKind::Ept);
    let machine = host.machine();
    // 1: call 0x19000; mov [0x20000], rax; jmp 1b
    let reader = [
        0xe8, 0xfb, 0x0f, 0, 0, 0x48, 0x89, 0x04, 0x25, 0, 0, 2, 0, 0xeb, 0xf1,
    ];
    let mut runner = host.running(&machine, 0, &reader);
    runner.set_registers(&crate::Registers {
        rip: 24 << 12,
        rflags: 2,
        gpr: [0, 0, 0, 0, 0x23_000, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    });
    // mov eax, 0; ret
    host.put(25, 0, 0xc300_0000_00b8);
    let line = Arc::clone(runner.line());
    let mut writer = host.cpu(&machine);
    let core = &mut writer.core;
    core.cr0 = cr0::PG | cr0::PE;
    core.cr3 = 8 << 12;
    core.cr4 = cr4::PAE;
    core.efer = efer::LME | efer::LMA;
    core.flush_all();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(runner.run(), Exit::Kicked));
        while !line.in_guest() {
            std::thread::yield_now();
        }
        let mut late = None;
        for round in 1..=ROUNDS {
            // As another processor's guest would: a store to the operand of the instruction, and
            // nothing else. (The processor need not be in guest mode all the time.)
            core.line.enter();
            if core.line.asked() {
                core.serve_requests();
            }
            core.store(0x19_001, round as u32).unwrap();
            core.line.leave();
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while host.get(0x20, 0) != round {
                if std::time::Instant::now() > deadline {
                    late = Some(round);
                    break;
                }
                std::thread::yield_now();
            }
            if late.is_some() {
                break;
            }
        }
        line.kick();
        assert_eq!(late, None, "the old code went on");
    });
    // The first round may have come before the code was decoded at all.
    assert!(runner.counters().changed >= ROUNDS - 1);
}
