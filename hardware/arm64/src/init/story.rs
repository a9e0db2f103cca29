//! What the program does.

// UNSAFETY: the entry point by name.
#![expect(unsafe_code)]

use crate::linux::{
    Console, close, control, in_child, make_device, make_folder, map, open, power_off, read_word,
};
// The library has `memcpy` and its kin.
use bare as _;
use core::fmt::Write as _;

/// The hypervisor's first page, by its linker script.
const HYPERVISOR: u64 = 0x4040_0000;
/// A page that nobody uses and everyone may read: the first of memory.
const FREE: u64 = 0x4000_0000;
const SIGBUS: u64 = 7;
const SIGSEGV: u64 = 11;

#[panic_handler]
fn panicked(_: &core::panic::PanicInfo<'_>) -> ! {
    power_off()
}

#[unsafe(no_mangle)]
extern "C" fn rust_init() -> ! {
    make_folder(c"/dev");
    make_device(c"/dev/console", 5, 1);
    make_device(c"/dev/mem", 1, 1);
    let mut console = Console(open(c"/dev/console"));
    let _ = writeln!(console, "init: Linux runs at EL1, below the hypervisor");
    virtual_machines(&mut console);
    let touch = |address: u64| {
        in_child(|| {
            let memory = open(c"/dev/mem");
            if memory < 0 {
                return 1;
            }
            let page = map(memory, address);
            if (-4095..0).contains(&page) {
                return 2;
            }
            core::hint::black_box(read_word(page as u64));
            0
        })
    };
    let (free, hypervisor) = (touch(FREE), touch(HYPERVISOR));
    let _ = writeln!(
        console,
        "init: reading {FREE:#x} through /dev/mem: status {free:#x}"
    );
    let _ = writeln!(
        console,
        "init: reading {HYPERVISOR:#x}, the hypervisor's: status {hypervisor:#x}"
    );
    let signal = hypervisor & 0x7f;
    if free == 0 && (signal == SIGBUS || signal == SIGSEGV) {
        let _ = writeln!(console, "init: the first can be read, the second cannot");
        let _ = writeln!(console, "PASS");
    }
    power_off()
}

/// Creates and ends virtual machines where this kernel is a hypervisor itself, as the original is:
/// it shares its record of each with its own EL2 and takes it back (`original.sh` counts that).
fn virtual_machines(console: &mut Console) {
    const CREATE_VM: u64 = 0xae01;
    make_device(c"/dev/kvm", 10, 232);
    let kvm = open(c"/dev/kvm");
    if kvm < 0 {
        return;
    }
    let created = (0..32)
        .filter(|_| {
            let vm = control(kvm, CREATE_VM, 0);
            close(vm);
            vm >= 0
        })
        .count();
    let _ = writeln!(console, "init: {created} virtual machines came and went");
}
