//! Interrupt controllers of ours, as a program and small guests in real mode see them: who wakes a
//! halted vCPU, how one starts another, and what is kept in the guest's memory.

#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod common;

use common::*;
use kvm_bindings::*;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const MEMORY: usize = 0x1_0000;
/// Where the handler of [`VECTOR`] is; it counts in the byte at [`COUNT`].
const HANDLER: usize = 0x1800;
const COUNT: usize = 0x3000;
const VECTOR: u8 = 0x45;
/// The program's own port.
const DONE: &[u8] = &[0xe6, 0x80]; // out 0x80, al
const WAIT: &[u8] = &[0xfb, 0xf4]; // sti; hlt
const HIGH: u64 = 0xfee0_0000;

/// A write of a register of the local APIC, whose page ES begins with.
fn apic(register: u16, value: u32) -> Vec<u8> {
    // mov dword es:[register], value
    let mut code = vec![0x66, 0x26, 0xc7, 0x06];
    code.extend(register.to_le_bytes());
    code.extend(value.to_le_bytes());
    code
}

/// A write of a port.
fn out(port: u8, value: u8) -> [u8; 4] {
    [0xb0, value, 0xe6, port] // mov al, value; out port, al
}

/// A VM with controllers and memory from 0.
struct Machine {
    vm: Fd,
    memory: Memory,
    _kvm: Fd,
}

fn set_line(vm: &Fd, irq: u32, level: u32) {
    let mut line = kvm_irq_level {
        level,
        ..Default::default()
    };
    line.__bindgen_anon_1.irq = irq;
    assert_eq!(vm.set(KVM_IRQ_LINE, line), Ok(0));
}

/// One of its vCPUs.
struct Cpu {
    fd: Fd,
    run: Memory,
}

impl Machine {
    /// With `KVM_CREATE_IRQCHIP`, and a handler for [`VECTOR`] that ends the interrupt with `end`.
    fn new(end: &[u8]) -> Self {
        Self::with(|vm| assert_eq!(vm.call(KVM_CREATE_IRQCHIP, 0), Ok(0)), end)
    }

    /// With local APICs alone.
    fn split(end: &[u8]) -> Self {
        let split = |vm: &Fd| {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_SPLIT_IRQCHIP,
                ..Default::default()
            };
            cap.args[0] = 24;
            assert_eq!(vm.set(KVM_ENABLE_CAP, cap), Ok(0));
        };
        Self::with(split, end)
    }

    fn with(controllers: impl FnOnce(&Fd), end: &[u8]) -> Self {
        let kvm = Fd::open();
        let vm = kvm.descriptor(KVM_CREATE_VM, 0);
        let memory = Memory::new(MEMORY);
        let slot = region(0, 0, MEMORY as u64, memory.address());
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
        controllers(&vm);
        let [low, high] = (COUNT as u16).to_le_bytes();
        // inc byte [COUNT]; end; iret
        let handler = [&[0xfe, 0x06, low, high], end, &[0xcf]].concat();
        memory.write_bytes(HANDLER, &handler);
        memory.write(4 * usize::from(VECTOR), HANDLER as u32);
        Self {
            vm,
            memory,
            _kvm: kvm,
        }
    }

    /// A vCPU at its code, which is put at a place in memory.
    fn cpu(&self, id: usize, place: u16, code: &[&[u8]]) -> Cpu {
        self.memory.write_bytes(place.into(), &code.concat());
        let fd = self.vm.descriptor(KVM_CREATE_VCPU, id);
        let run = Memory::of_vcpu(&fd);
        let cpu = Cpu { fd, run };
        let mut sregs: kvm_sregs = cpu.fd.get(KVM_GET_SREGS);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        sregs.es.base = HIGH;
        assert_eq!(cpu.fd.set(KVM_SET_SREGS, sregs), Ok(0));
        let regs = kvm_regs {
            rip: place.into(),
            rsp: 0x8000 - 0x100 * id as u64,
            rflags: 2,
            ..Default::default()
        };
        assert_eq!(cpu.fd.set(KVM_SET_REGS, regs), Ok(0));
        cpu
    }

    fn count(&self) -> u8 {
        self.memory.read(COUNT)
    }

    /// Writes a register of the I/O APIC, by a vCPU's own KVM_SET_IRQCHIP.
    fn redirect(&self, pin: usize, entry: u64) {
        let mut chip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        assert_eq!(self.vm.with(KVM_GET_IRQCHIP, &mut chip), Ok(0));
        #[expect(unsafe_code)]
        // SAFETY: both members of the unions consist of integers.
        // UNSAFETY: writes a union.
        unsafe {
            chip.chip.ioapic.redirtbl[pin].bits = entry;
        }
        assert_eq!(self.vm.set(KVM_SET_IRQCHIP, chip), Ok(0));
    }

    fn irqfd(&self, gsi: u32, resample: Option<&OwnedFd>) -> OwnedFd {
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let irqfd = kvm_irqfd {
            fd: event.as_raw_fd() as u32,
            gsi,
            flags: resample.map_or(0, |_| KVM_IRQFD_FLAG_RESAMPLE),
            resamplefd: resample.map_or(0, |fd| fd.as_raw_fd() as u32),
            ..Default::default()
        };
        assert_eq!(self.vm.set(KVM_IRQFD, irqfd), Ok(0));
        event
    }
}

impl Cpu {
    fn run(&self) -> Result<u32, Errno> {
        self.fd.call(KVM_RUN, 0)?;
        Ok(self.run.read(8))
    }

    /// Runs while something happens in another thread a little later.
    fn run_while(&self, meanwhile: impl FnOnce() + Send) -> Result<u32, Errno> {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                meanwhile();
            });
            self.run()
        })
    }

    fn state(&self) -> u32 {
        self.fd.get::<kvm_mp_state>(KVM_GET_MP_STATE).mp_state
    }
}

/// Says to the PICs where their vectors begin, and to let line 5 through, at [`VECTOR`].
fn set_up_pics() -> Vec<u8> {
    let words = [
        (0x20, 0x11),
        (0x21, VECTOR - 5),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xdf),
    ];
    words
        .iter()
        .flat_map(|(port, value)| out(*port, *value))
        .collect()
}

#[test]
fn a_line_of_the_pics_wakes_a_halted_vcpu() {
    let machine = Machine::new(&out(0x20, 0x20));
    let code = [&set_up_pics()[..], DONE, WAIT, DONE, WAIT, DONE];
    let cpu = machine.cpu(0, 0x1000, &code);
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    for count in 1..=2 {
        let vm = &machine.vm;
        let result = cpu.run_while(|| {
            set_line(vm, 5, 1);
            set_line(vm, 5, 0);
        });
        assert_eq!(result, Ok(KVM_EXIT_IO));
        assert_eq!(machine.count(), count);
    }
}

#[test]
fn the_interval_timer_interrupts_at_its_rate() {
    let machine = Machine::new(&out(0x20, 0x20));
    let config = kvm_pit_config::default();
    assert_eq!(machine.vm.set(KVM_CREATE_PIT2, config), Ok(0));
    machine
        .memory
        .write(4 * usize::from(VECTOR - 5), HANDLER as u32);
    // Line 0 at the first vector of eight; a rate of 5 ms: 5966 ticks.
    let pics = [
        (0x20, 0x11),
        (0x21, VECTOR - 5),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
    ];
    let pics: Vec<u8> = pics
        .iter()
        .flat_map(|(port, value)| out(*port, *value))
        .collect();
    let timer = [(0x43, 0x34), (0x40, 0x4e), (0x40, 0x17)];
    let timer: Vec<u8> = timer
        .iter()
        .flat_map(|(port, value)| out(*port, *value))
        .collect();
    let cpu = machine.cpu(0, 0x1000, &[&pics, &timer, WAIT, WAIT, WAIT, WAIT, DONE]);
    let start = Instant::now();
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    assert!(machine.count() >= 4);
    assert!(
        start.elapsed() >= Duration::from_millis(19),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn the_local_timer_interrupts_a_running_and_a_halted_vcpu() {
    let machine = Machine::new(&apic(0xb0, 0));
    let timer = [
        apic(0xf0, 0x1ff),
        apic(0x320, VECTOR.into()),
        apic(0x3e0, 0xb),
        apic(0x380, 3_000_000),
    ];
    let [low, high] = (COUNT as u16).to_le_bytes();
    // sti; again: cmp byte [COUNT], 0; je again
    let spin = [0xfb, 0x80, 0x3e, low, high, 0, 0x74, 0xf9];
    let again = apic(0x380, 3_000_000);
    let cpu = machine.cpu(
        0,
        0x1000,
        &[&timer.concat(), &spin, DONE, &again, WAIT, DONE],
    );
    for count in 1..=2 {
        let start = Instant::now();
        assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
        assert_eq!(machine.count(), count);
        assert!(start.elapsed() >= Duration::from_millis(3));
    }
}

#[test]
fn a_signal_ends_the_wait_and_the_vcpu_stays_halted() {
    extern "C" fn interrupt(_: libc::c_int) {
        twofold_kvm::abi::interrupt_current_run();
    }
    #[expect(unsafe_code)]
    // SAFETY: the handler is async-signal-safe.
    // UNSAFETY: handles signals.
    let thread = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = interrupt as *const () as usize;
        // Restarted calls are to see it too.
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        libc::pthread_self()
    };
    let machine = Machine::new(&out(0x20, 0x20));
    let cpu = machine.cpu(0, 0x1000, &[&set_up_pics(), WAIT, DONE]);
    let signal = || {
        #[expect(unsafe_code)]
        // SAFETY: the thread waits for this one.
        // UNSAFETY: names a thread.
        let result = unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
        assert_eq!(result, 0);
    };
    for _ in 0..2 {
        assert_eq!(cpu.run_while(signal), Err(Errno::INTR));
        assert_eq!(cpu.run.read::<u32>(8), KVM_EXIT_INTR);
        assert_eq!(cpu.state(), KVM_MP_STATE_HALTED);
    }
    set_line(&machine.vm, 5, 1);
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    assert_eq!(cpu.state(), KVM_MP_STATE_RUNNABLE);
}

#[test]
fn an_nmi_of_another_vcpu_wakes_one_that_takes_no_interrupts() {
    let machine = Machine::new(&[]);
    machine.memory.write(4 * 2, HANDLER as u32);
    // cli; hlt
    let sleeper = machine.cpu(0, 0x1000, &[&[0xfa, 0xf4], DONE]);
    let nmi = [apic(0xf0, 0x1ff), apic(0x310, 0), apic(0x300, 0x4400)];
    let sender = machine.cpu(1, 0x1400, &[&nmi.concat(), DONE]);
    let runnable = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    assert_eq!(sender.fd.set(KVM_SET_MP_STATE, runnable), Ok(0));
    let sends = &sender.fd;
    let woken = sleeper.run_while(|| assert_eq!(sends.call(KVM_RUN, 0), Ok(0)));
    assert_eq!(woken, Ok(KVM_EXIT_IO));
    assert_eq!(machine.count(), 1);
}

#[test]
fn a_vcpu_starts_another_by_init_and_start_up() {
    let machine = Machine::new(&[]);
    let send = [
        apic(0xf0, 0x1ff),
        apic(0x310, 1 << 24),
        apic(0x300, 0x4500),
        apic(0x300, 0x4602),
    ];
    let first = machine.cpu(0, 0x1000, &[&send.concat(), DONE]);
    let second = machine.cpu(1, 0x2000, &[DONE]);
    assert_eq!(second.state(), KVM_MP_STATE_UNINITIALIZED);
    let starts = &first.fd;
    let started = second.run_while(|| assert_eq!(starts.call(KVM_RUN, 0), Ok(0)));
    assert_eq!(started, Err(Errno::AGAIN), "as with the kernel's");
    assert_eq!(second.run(), Ok(KVM_EXIT_IO));
    let (regs, sregs): (kvm_regs, kvm_sregs) =
        (second.fd.get(KVM_GET_REGS), second.fd.get(KVM_GET_SREGS));
    assert_eq!((sregs.cs.selector, sregs.cs.base), (0x200, 0x2000));
    assert!(regs.rip <= 2);
    assert_eq!(second.state(), KVM_MP_STATE_RUNNABLE);
}

#[test]
fn a_lowest_priority_message_reaches_one_of_those_it_names() {
    let machine = Machine::new(&apic(0xb0, 0));
    let logical = |id: u32| [apic(0xf0, 0x1ff), apic(0xd0, id << 24)].concat();
    let one = machine.cpu(0, 0x1000, &[&logical(1), DONE, WAIT, DONE]);
    let two = machine.cpu(1, 0x1400, &[&logical(2), DONE, WAIT, DONE]);
    let runnable = kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    };
    assert_eq!(two.fd.set(KVM_SET_MP_STATE, runnable), Ok(0));
    assert_eq!((one.run(), two.run()), (Ok(KVM_EXIT_IO), Ok(KVM_EXIT_IO)));
    // To both logical ids, lowest priority; then fixed.
    let mut msi = kvm_msi {
        address_lo: 0xfee0_3004,
        data: 0x100 | u32::from(VECTOR),
        ..Default::default()
    };
    assert_eq!(machine.vm.set(KVM_SIGNAL_MSI, msi), Ok(1));
    assert_eq!(machine.vm.set(KVM_SIGNAL_MSI, msi), Ok(1));
    assert_eq!((one.run(), two.run()), (Ok(KVM_EXIT_IO), Ok(KVM_EXIT_IO)));
    assert_eq!(machine.count(), 2, "each took one");
    msi.data = VECTOR.into();
    assert_eq!(machine.vm.set(KVM_SIGNAL_MSI, msi), Ok(2));
    msi.address_lo = 0xfee0_4004;
    let nobody = machine.vm.set(KVM_SIGNAL_MSI, msi);
    assert_eq!(nobody, Err(Errno::PERM));
}

#[test]
fn the_ioapic_holds_a_level_back_until_its_interrupt_has_ended() {
    let machine = Machine::new(&apic(0xb0, 0));
    // The PICs have the line too.
    let no_pics = [out(0x21, 0xff), out(0xa1, 0xff)].concat();
    let enable = [no_pics, apic(0xf0, 0x1ff)].concat();
    let cpu = machine.cpu(0, 0x1000, &[&enable, DONE, WAIT, DONE, WAIT, DONE]);
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    machine.redirect(9, 1 << 15 | u64::from(VECTOR));
    let resample = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let event = machine.irqfd(9, Some(&resample));
    let raise = || {
        rustix::io::write(&event, &1_u64.to_ne_bytes()).unwrap();
    };
    for count in 1..=2 {
        assert_eq!(cpu.run_while(raise), Ok(KVM_EXIT_IO));
        assert_eq!(machine.count(), count, "once for each time it was raised");
        let mut told = [0; 8];
        assert_eq!(rustix::io::read(&resample, &mut told), Ok(8));
    }
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    assert_eq!(machine.vm.with(KVM_GET_IRQCHIP, &mut chip), Ok(0));
    #[expect(unsafe_code)]
    // SAFETY: its members consist of integers.
    // UNSAFETY: reads a union.
    let (irr, entry) = unsafe { (chip.chip.ioapic.irr, chip.chip.ioapic.redirtbl[9].bits) };
    assert_eq!((irr, entry), (0, 1 << 15 | u64::from(VECTOR)));
}

#[test]
fn a_split_controller_tells_the_program_of_the_end_of_a_level() {
    let machine = Machine::split(&apic(0xb0, 0));
    let cpu = machine.cpu(0, 0x1000, &[&apic(0xf0, 0x1ff), DONE, WAIT, DONE]);
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    let mut routing = [0_u8; 8 + size_of::<kvm_irq_routing_entry>()];
    let mut entry = kvm_irq_routing_entry {
        gsi: 9,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: 0xfee0_0000,
        data: 0xc000 | u32::from(VECTOR),
        ..Default::default()
    };
    routing[0] = 1;
    #[expect(unsafe_code)]
    // SAFETY: there is room for the entry behind the header of 8 bytes.
    // UNSAFETY: writes at an address.
    unsafe {
        routing
            .as_mut_ptr()
            .add(8)
            .cast::<kvm_irq_routing_entry>()
            .write_unaligned(entry);
    }
    let address = routing.as_ptr().expose_provenance();
    assert_eq!(machine.vm.call(KVM_SET_GSI_ROUTING, address), Ok(0));
    let event = machine.irqfd(9, None);
    let result = cpu.run_while(|| {
        rustix::io::write(&event, &1_u64.to_ne_bytes()).unwrap();
    });
    assert_eq!(result, Ok(KVM_EXIT_IOAPIC_EOI));
    assert_eq!(cpu.run.read::<u8>(32), VECTOR);
    let regs: kvm_regs = cpu.fd.get(KVM_GET_REGS);
    // inc, then the write: the instruction is done.
    assert_eq!(regs.rip, (HANDLER + 4 + 10) as u64);
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    assert_eq!(machine.count(), 1);
}

#[test]
fn the_guests_clock_is_kvms_and_its_page_becomes_dirty() {
    let machine = Machine::new(&[]);
    let mut slot = region(0, 0, MEMORY as u64, machine.memory.address());
    slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
    assert_eq!(machine.vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
    let cpu = machine.cpu(0, 0x1000, &[DONE, DONE]);
    #[repr(C)]
    struct Msrs {
        header: [u32; 2],
        entry: kvm_msr_entry,
    }
    let set = |index, data| {
        cpu.fd.set(
            KVM_SET_MSRS,
            Msrs {
                header: [1, 0],
                entry: kvm_msr_entry {
                    index,
                    data,
                    ..Default::default()
                },
            },
        )
    };
    assert_eq!(set(0x4b56_4d01, 0x5001), Ok(1));
    assert_eq!(set(0x4b56_4d00, 0x6000), Ok(1));
    assert_eq!(set(0x4b56_4d03, 0x7003), Ok(0), "reserved bits");
    assert_eq!(set(0x4b56_4d03, 0x7041), Ok(1));
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    let word = |at: usize| machine.memory.read::<u64>(at);
    let version = machine.memory.read::<u32>(0x5000);
    assert!(version != 0 && version.is_multiple_of(2), "{version}");
    assert_eq!(machine.memory.read::<u8>(0x501d), 1, "stable");
    assert_eq!(machine.memory.read::<u32>(0x7048) % 2, 0);
    // The day on which the VM's clock was 0 is today.
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let day = u64::from(machine.memory.read::<u32>(0x6004));
    assert!(now.as_secs().abs_diff(day) < 60, "{day}");
    let clock = kvm_clock_data {
        clock: 1 << 40,
        ..Default::default()
    };
    assert_eq!(machine.vm.set(KVM_SET_CLOCK, clock), Ok(0));
    assert_eq!(cpu.fd.call(KVM_KVMCLOCK_CTRL, 0), Ok(0));
    assert_eq!(cpu.run(), Ok(KVM_EXIT_IO));
    assert_eq!(word(0x5010), 1 << 40);
    assert_eq!(machine.memory.read::<u32>(0x5000), version + 2);
    assert_eq!(machine.memory.read::<u8>(0x501d), 3, "and it was stopped");
    let mut bitmap = [0_u64; 1];
    let mut log = kvm_dirty_log::default();
    log.__bindgen_anon_1.padding2 = bitmap.as_mut_ptr().addr() as u64;
    assert_eq!(machine.vm.set(KVM_GET_DIRTY_LOG, log), Ok(0));
    for page in [5, 6, 7] {
        assert_eq!(bitmap[0] >> page & 1, 1, "page {page}");
    }
}
