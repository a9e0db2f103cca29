//! Small guests in real mode: what a client sees of each exit.

#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod common;

use common::*;
use kvm_bindings::*;

const IO: u32 = KVM_EXIT_IO;
const MMIO: u32 = KVM_EXIT_MMIO;
const HLT: u32 = KVM_EXIT_HLT;

#[rustfmt::skip]
const HELLO: &[u8] = &[
    0xba, 0xf8, 0x03,             // mov dx, 0x3f8
    0x00, 0xd8,                   // add al, bl
    0x04, b'0',                   // add al, '0'
    0xee,                         // out dx, al
    0xec,                         // in al, dx
    0xc6, 0x06, 0x00, 0x80, 0x00, // mov byte [0x8000], 0   (no memory there)
    0x8a, 0x16, 0x00, 0x80,       // mov dl, [0x8000]
    0xc6, 0x06, 0x00, 0x20, 0x00, // mov byte [0x2000], 0
    0xf4,                         // hlt
];

fn dirty_pages(guest: &Guest) -> Vec<usize> {
    let mut bitmap = [0_u64; 1];
    let mut log = kvm_dirty_log::default();
    log.__bindgen_anon_1.padding2 = bitmap.as_mut_ptr().addr() as u64;
    assert_eq!(guest.vm.set(KVM_GET_DIRTY_LOG, log), Ok(0));
    (0..64).filter(|bit| bitmap[0] >> bit & 1 == 1).collect()
}

#[test]
fn a_guest_talks_through_ports_and_emulated_memory() {
    let guest = Guest::with_flags(HELLO, KVM_MEM_LOG_DIRTY_PAGES);
    guest.set_regs(|regs| {
        regs.rax = 2;
        regs.rbx = 3;
    });
    assert_eq!(guest.run(), Ok(IO));
    assert_eq!(guest.exit::<[u8; 2]>(0), [1, 1], "out, one byte");
    assert_eq!((guest.exit::<u16>(2), guest.exit::<u32>(4)), (0x3f8, 1));
    assert_eq!(guest.exit::<u64>(8), 4096);
    assert_eq!(guest.run.read::<u8>(4096), b'5');

    assert_eq!(guest.run(), Ok(IO));
    assert_eq!(guest.exit::<[u8; 2]>(0), [0, 1], "in, one byte");
    assert_eq!(guest.regs().rip, 0x1008, "still at the instruction");
    guest.run.write(4096, 0x77_u8);

    assert_eq!(guest.run(), Ok(MMIO));
    assert_eq!(guest.regs().rax & 0xff, 0x77);
    assert_eq!(
        (
            guest.exit::<u64>(0),
            guest.exit::<u32>(16),
            guest.exit::<u8>(20)
        ),
        (0x8000, 1, 1)
    );
    assert_eq!(
        dirty_pages(&guest),
        [0],
        "the code's page, mapped writable by its fetch"
    );

    assert_eq!(guest.run(), Ok(MMIO));
    assert_eq!(
        (
            guest.exit::<u64>(0),
            guest.exit::<u32>(16),
            guest.exit::<u8>(20)
        ),
        (0x8000, 1, 0)
    );
    guest.run.write(32 + 8, 0x99_u8);
    assert_eq!(guest.run(), Ok(HLT));
    assert_eq!(guest.regs().rdx & 0xff, 0x99);
    assert_eq!(dirty_pages(&guest).last(), Some(&1), "the page at 0x2000");
    assert_eq!(guest.memory.read::<u8>(0x1000), 0);
}

#[test]
fn immediate_exit_completes_what_waits_and_returns_eintr() {
    let guest = Guest::new(&[0xec, 0xf4]); // in al, dx; hlt
    guest.set_immediate_exit(true);
    assert_eq!(guest.run(), Err(Errno::INTR));
    assert_eq!(guest.regs().rip, CODE);
    guest.set_immediate_exit(false);
    assert_eq!(guest.run(), Ok(IO));
    guest.run.write(4096, 0x5a_u8);
    guest.set_immediate_exit(true);
    assert_eq!(guest.run(), Err(Errno::INTR));
    assert_eq!(guest.regs().rip, CODE + 1);
    assert_eq!(guest.regs().rax & 0xff, 0x5a);
    guest.set_immediate_exit(false);
    assert_eq!(guest.run(), Ok(HLT));
    assert_eq!(guest.regs().rip, CODE + 2);
}

#[test]
fn code_that_the_program_writes_runs_as_new_code() {
    let guest = Guest::new(&[0xb0, 1, 0xf4]); // mov al, 1; hlt
    assert_eq!(guest.run(), Ok(HLT));
    assert_eq!(guest.regs().rax & 0xff, 1);
    guest.memory.write(1, 2_u8);
    guest.start();
    assert_eq!(guest.run(), Ok(HLT));
    assert_eq!(guest.regs().rax & 0xff, 2);
}

#[test]
fn a_deleted_slot_turns_into_emulated_memory() {
    // mov al, [0x3000]; hlt; mov al, [0x6000]; hlt
    let guest = Guest::new(&[0xa0, 0, 0x30, 0xf4, 0xa0, 0, 0x60, 0xf4]);
    let more = Memory::new(0x1000);
    more.write(0, 0x42_u8);
    assert_eq!(
        guest.vm.set(
            KVM_SET_USER_MEMORY_REGION,
            region(1, 0x6000, 0x1000, more.address())
        ),
        Ok(0)
    );
    assert_eq!(guest.run(), Ok(HLT));
    assert_eq!(guest.run(), Ok(HLT));
    assert_eq!(guest.regs().rax & 0xff, 0x42);
    assert_eq!(
        guest
            .vm
            .set(KVM_SET_USER_MEMORY_REGION, region(1, 0x6000, 0, 0)),
        Ok(0)
    );
    guest.set_regs(|regs| regs.rip = CODE + 4);
    assert_eq!(guest.run(), Ok(MMIO));
    assert_eq!(guest.exit::<u64>(0), 0x6000);
}

#[test]
fn memory_that_is_not_there_answers_efault() {
    let guest = Guest::new(&[0xa0, 0, 0x60, 0xf4]); // mov al, [0x6000]; hlt
    assert_eq!(
        guest
            .vm
            .set(KVM_SET_USER_MEMORY_REGION, region(1, 0x6000, 0x1000, 0)),
        Ok(0)
    );
    assert_eq!(guest.run(), Err(Errno::FAULT));
    assert_eq!(guest.regs().rip, CODE);
}

#[test]
fn a_guest_without_memory_is_an_internal_error() {
    let kvm = Fd::open();
    let vm = kvm.descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    let run = Memory::of_vcpu(&vcpu);
    assert_eq!(vcpu.call(KVM_RUN, 1), Err(Errno::INVAL));
    assert_eq!(vcpu.call(KVM_RUN, 0), Ok(0));
    assert_eq!(run.read::<u32>(8), KVM_EXIT_INTERNAL_ERROR);
    assert_eq!(run.read::<u32>(32), KVM_INTERNAL_ERROR_EMULATION);
}

#[test]
fn writes_to_a_coalesced_port_do_not_leave_the_guest() {
    let guest = Guest::new(&[0xe6, 0x2c, 0xf4, 0xe6, 0x2c, 0xf4]); // out 0x2c, al; hlt; twice
    let mut zone = kvm_coalesced_mmio_zone {
        addr: 0x2c,
        size: 1,
        ..Default::default()
    };
    zone.__bindgen_anon_1.pio = 1;
    assert_eq!(guest.vm.set(KVM_REGISTER_COALESCED_MMIO, zone), Ok(0));
    guest.set_regs(|regs| regs.rax = 0x39);
    assert_eq!(guest.run(), Ok(HLT));
    let ring = 2 * 4096;
    assert_eq!(
        (guest.run.read::<u32>(ring), guest.run.read::<u32>(ring + 4)),
        (0, 1)
    );
    assert_eq!(guest.run.read::<u64>(ring + 8), 0x2c);
    assert_eq!(guest.run.read::<u32>(ring + 16), 1);
    assert_eq!(guest.run.read::<u32>(ring + 20), 1);
    assert_eq!(guest.run.read::<u8>(ring + 24), 0x39);
    let other = guest.vm.descriptor(KVM_CREATE_VCPU, 1);
    let other_run = Memory::of_vcpu(&other);
    assert_eq!(
        other_run.read::<u64>(ring + 8),
        0x2c,
        "the ring is the VM's"
    );
    assert_eq!(guest.vm.set(KVM_UNREGISTER_COALESCED_MMIO, zone), Ok(0));
    assert_eq!(guest.run(), Ok(IO));
}

#[test]
fn an_ioeventfd_takes_its_writes() {
    let guest = Guest::new(&[0xe6, 0x2c, 0xf4]); // out 0x2c, al; hlt
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let event = kvm_ioeventfd {
        addr: 0x2c,
        len: 1,
        datamatch: 7,
        flags: 3,
        fd: std::os::fd::AsRawFd::as_raw_fd(&eventfd),
        ..Default::default()
    };
    assert_eq!(guest.vm.set(KVM_IOEVENTFD, event), Ok(0));
    guest.set_regs(|regs| regs.rax = 6);
    assert_eq!(guest.run(), Ok(IO));
    assert_eq!(guest.run(), Ok(HLT));
    guest.start();
    guest.set_regs(|regs| regs.rax = 7);
    assert_eq!(guest.run(), Ok(HLT));
    let mut count = [0; 8];
    assert_eq!(rustix::io::read(&eventfd, &mut count), Ok(8));
    assert_eq!(u64::from_ne_bytes(count), 1);
}

#[test]
fn registers_travel_through_the_run_page() {
    let guest = Guest::new(&[0xff, 0xc0, 0xf4]); // inc ax; hlt
    let (valid, dirty, sync) = (288, 296, 304);
    for bad in [1_u64 << 31, 8] {
        guest.run.write(valid, bad);
        assert_eq!(guest.run(), Err(Errno::INVAL));
        guest.run.write(valid, 0_u64);
        guest.run.write(dirty, bad);
        assert_eq!(guest.run(), Err(Errno::INVAL));
        guest.run.write(dirty, 0_u64);
    }
    let mut regs = guest.regs();
    regs.rax = 0x8000;
    guest.run.write(sync, regs);
    guest.run.write(valid, 7_u64);
    guest.run.write(dirty, 1_u64);
    assert_eq!(guest.run(), Ok(HLT));
    assert_eq!(guest.run.read::<u64>(dirty), 0);
    assert_eq!(guest.run.read::<kvm_regs>(sync), guest.regs());
    assert_eq!(guest.regs().rax, 0x8001);
}

#[test]
fn single_stepping_stops_after_each_instruction() {
    let guest = Guest::new(&[0x90, 0x90, 0xf4]);
    let debug = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    };
    assert_eq!(guest.vcpu.set(KVM_SET_GUEST_DEBUG, debug), Ok(0));
    for step in 1..=2 {
        assert_eq!(guest.run(), Ok(KVM_EXIT_DEBUG));
        assert_eq!(guest.exit::<u32>(0), 1);
        assert_eq!(guest.exit::<u64>(8), CODE + step);
        assert_eq!(guest.exit::<u64>(16) & 0xffff, 0x4ff0);
        assert_eq!(guest.exit::<u64>(24), 0x400);
    }
    assert_eq!(
        guest
            .vcpu
            .set(KVM_SET_GUEST_DEBUG, kvm_guest_debug::default()),
        Ok(0)
    );
    assert_eq!(guest.run(), Ok(HLT));
}

#[test]
fn addresses_translate_to_themselves_without_paging() {
    let guest = Guest::new(&[0xf4]);
    let translate = |linear_address| {
        let mut translation = kvm_translation {
            linear_address,
            ..Default::default()
        };
        assert_eq!(guest.vcpu.with(KVM_TRANSLATE, &mut translation), Ok(0));
        translation
    };
    let there = translate(0x10000);
    assert_eq!(
        (there.valid, there.physical_address, there.writeable),
        (1, 0x10000, 1)
    );
    assert_eq!(translate(u64::MAX).valid, 0);
}

#[test]
fn a_spinning_guest_can_be_interrupted_by_deleting_its_memory() {
    let guest = Guest::new(&[0xeb, 0xfe]); // jmp $
    let vcpu = &guest.vcpu;
    std::thread::scope(|scope| {
        let run = scope.spawn(|| vcpu.call(KVM_RUN, 0));
        std::thread::sleep(std::time::Duration::from_millis(50));
        let gone = region(0, CODE, 0, 0);
        assert_eq!(guest.vm.set(KVM_SET_USER_MEMORY_REGION, gone), Ok(0));
        assert_eq!(run.join().unwrap(), Ok(0));
    });
    assert_eq!(guest.exit_reason(), KVM_EXIT_INTERNAL_ERROR);
}

#[test]
fn statistics_count_what_happened() {
    let guest = Guest::new(HELLO);
    while guest.run() != Ok(HLT) {}
    let stats = guest.vcpu.descriptor(KVM_GET_STATS_FD, 0);
    let value = |wanted: &str| stat(&stats, wanted);
    assert_eq!(value("io_exits"), 2);
    assert_eq!(value("mmio_exits"), 2);
    assert_eq!(value("halt_exits"), 1);
    assert!(value("pf_fixed") >= 2);
    assert!(value("exits") >= 5);
    let stats = guest.vm.descriptor(KVM_GET_STATS_FD, 0);
    assert!(stat(&stats, "pages_4k") >= 2);
    let summary = twofold_kvm::summary();
    assert!(summary.instructions >= 9 && summary.vms >= 1);
    assert!(summary.to_string().contains("hlt"));
}

fn stat(stats: &Fd, wanted: &str) -> u64 {
    let header = stats.read_at(24, 0);
    let word = |index: usize| {
        u32::from_le_bytes(header[4 * index..4 * index + 4].try_into().unwrap()) as usize
    };
    let (count, descriptors, data) = (word(2), word(4), word(5));
    for index in 0..count {
        let name = stats.read_at(48, descriptors + index * 64 + 16);
        if String::from_utf8_lossy(&name).trim_end_matches('\0') == wanted {
            let value = stats.read_at(8, data + 8 * index);
            return u64::from_le_bytes(value.try_into().unwrap());
        }
    }
    panic!("no statistic {wanted}");
}
