//! From the first instruction in Rust to the host, and what the host makes of it.

// UNSAFETY: entry points by name, firmware calls, and the statics that the boot code lays out.
#![expect(unsafe_code)]

use super::enter::{HCR_HOST, TIMER_HOST, enter, enter_guest};
use super::gic;
use super::machine::{Machine, RAM_PAGES, RAM_START};
use super::registers::{read, write};
use bare::say;
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use twofold_arch::stage2::{Stage2Caps, vtcr, vttbr};
use twofold_arch::{Hfn, Hpa};
use twofold_pkvm::exception::{EXTERNAL_ABORT, LENGTH, at_el1, class, synchronous};
use twofold_pkvm::hypercall::REGISTERS;
use twofold_pkvm::matrix;
use twofold_pkvm::platform::Platform;
use twofold_pkvm::run::Exit;
use twofold_pkvm::{Config, HostFault, Hypervisor, PageMap, PageRecord, Pages, Region, Registers};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    static __own_start: u8;
    static __own_end: u8;
    static __pool_start: u8;
    fn second_start();
}

/// Where the host begins: it is loaded as a program of its own.
const HOST_ENTRY: u64 = 0x4400_0000;
/// Where a Linux kernel and its device tree are, if the host is one.
const LINUX: u64 = 0x4800_0000;
const LINUX_DEVICE_TREE: u64 = 0x47e0_0000;
/// Pages for the matrix, which are the host's later.
const MATRIX_PAGES: u64 = 0x4600_0000;
/// What is known of every page.
static RECORDS: [PageRecord; RAM_PAGES as usize] =
    [const { PageRecord::new() }; RAM_PAGES as usize];
static REGIONS: [Region; 1] = [Region {
    start: Hfn::new(RAM_START >> 12),
    pages: RAM_PAGES,
    no_map: false,
}];

struct Shared(UnsafeCell<MaybeUninit<Hypervisor<'static, Machine>>>);
// SAFETY: written once before `READY` and only read afterwards.
unsafe impl Sync for Shared {}

static HYPERVISOR: Shared = Shared(UnsafeCell::new(MaybeUninit::uninit()));
static READY: AtomicBool = AtomicBool::new(false);
/// Faults of the host: served, and answered with an abort.
static SERVED: AtomicU64 = AtomicU64::new(0);
static DENIED: AtomicU64 = AtomicU64::new(0);

/// Where the host wants its second processor, and with what in x0.
static SECOND_ENTRY: AtomicU64 = AtomicU64::new(0);
static SECOND_ARGUMENT: AtomicU64 = AtomicU64::new(0);
static SECOND_STARTED: AtomicBool = AtomicBool::new(false);
static LINUX_HOST: AtomicBool = AtomicBool::new(false);

const PSCI_SYSTEM_OFF: u64 = 0x8400_0008;
const PSCI_VERSION: u64 = 0x8400_0000;
const PSCI_MIGRATE_INFO_TYPE: u64 = 0x8400_0006;
const PSCI_FEATURES: u64 = 0x8400_000a;
const PSCI_CPU_ON: u64 = 0xc400_0003;

/// A call of this image's own: the audit. x1 = pages of guests, x2 = the hypervisor's, x3 = faults
/// served, x4 = aborts given to the host; x0 = 0 if every page is in a legal state.
const AUDIT: u64 = 0xc600_ff00;

fn hypervisor() -> &'static Hypervisor<'static, Machine> {
    while !READY.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    // SAFETY: written before `READY` was set.
    unsafe { (*HYPERVISOR.0.get()).assume_init_ref() }
}

fn firmware(function: u64, a: u64, b: u64, c: u64) -> u64 {
    let result;
    // SAFETY: PSCI calls of the machine's firmware, as the SMCCC says.
    unsafe {
        asm!("smc #0", inout("x0") function => result, inout("x1") a => _, inout("x2") b => _,
            inout("x3") c => _, options(nostack));
    }
    result
}

/// Ends the run; the status reaches the shell.
fn power_off(status: u64) -> ! {
    let block = [0x20026, status];
    // SAFETY: semihosting's exit, which the machine is started with.
    unsafe { asm!("hlt #0xf000", in("x0") 0x20, in("x1") block.as_ptr(), options(nostack)) };
    firmware(PSCI_SYSTEM_OFF, 0, 0, 0);
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("el2: {info}");
    power_off(1)
}

/// An exception at EL2 itself.
#[unsafe(no_mangle)]
extern "C" fn rust_own_exception(syndrome: u64, pc: u64, address: u64) -> ! {
    panic!("exception at EL2: syndrome {syndrome:#x} at {pc:#x}, address {address:#x}");
}

fn address_of(symbol: &'static u8) -> u64 {
    core::ptr::from_ref(symbol) as u64
}

fn take_the_machine() {
    // SAFETY: symbols of the linker script; only their addresses are taken.
    let (start, end, pool) = unsafe {
        (
            address_of(&__own_start),
            address_of(&__own_end),
            address_of(&__pool_start),
        )
    };
    let pages = |from: u64, to: u64| Pages {
        start: Hpa::new(from).frame(),
        count: (to - from) >> 12,
    };
    let caps = Stage2Caps::from_id_registers(read!("id_aa64mmfr0_el1"), read!("id_aa64mmfr1_el1"));
    // The tables are those of 48-bit addresses.
    let caps = Stage2Caps {
        pa_bits: caps.pa_bits.min(48),
        ..caps
    };
    let Ok(map) = PageMap::new(&REGIONS, &RECORDS, caps.pa_bits) else {
        panic!("memory is not what was expected");
    };
    let config = Config {
        pages: map,
        caps,
        own: pages(start, end),
        pool: pages(pool, end),
    };
    let hypervisor = match Hypervisor::new(Machine, config) {
        Ok(hypervisor) => hypervisor,
        Err(error) => panic!("the machine could not be taken: {error}"),
    };
    say!(
        "el2: up, its own translation on; {} address bits",
        caps.pa_bits
    );
    say!(
        "el2: {start:#x} to {end:#x} is mine, {} of {RAM_PAGES} pages",
        (end - start) >> 12
    );
    let outcome = matrix::run(
        &hypervisor,
        Hpa::new(MATRIX_PAGES).frame(),
        |case, score| {
            say!(
                "el2: matrix, {case:?}: {} calls granted, {} refused",
                score.granted,
                score.refused
            );
        },
    );
    match outcome {
        Ok(score) => say!(
            "el2: the ownership matrix holds on this machine's tables, {} answers",
            score.granted + score.refused
        ),
        Err(failure) => panic!("the ownership matrix does not hold: {failure}"),
    }
    // SAFETY: nobody reads before `READY`.
    unsafe { (*HYPERVISOR.0.get()).write(hypervisor) };
    READY.store(true, Ordering::Release);
}

/// The first instruction in Rust, on each processor.
#[unsafe(no_mangle)]
extern "C" fn rust_main(processor: u64) -> ! {
    if processor == 0 {
        take_the_machine();
    }
    let hypervisor = hypervisor();
    let Ok(geometry) = hypervisor.host_geometry() else {
        panic!("no geometry for the host");
    };
    write!("vtcr_el2", vtcr(geometry, hypervisor.caps()));
    write!("vttbr_el2", vttbr(hypervisor.host_root(), 0));
    write!("cnthctl_el2", TIMER_HOST);
    gic::take();
    write!("cntvoff_el2", 0);
    write!("sctlr_el1", 0x30d0_0800);
    write!("cpacr_el1", 3 << 20);
    write!("hcr_el2", HCR_HOST);
    // SAFETY: nothing is cached that anyone relies on.
    unsafe {
        asm!(
            "dsb sy",
            "tlbi vmalls12e1is",
            "dsb sy",
            "isb",
            options(nostack)
        )
    };
    let mut host = if processor == 0 && is_linux() {
        LINUX_HOST.store(true, Ordering::Relaxed);
        say!("el2: the host is a Linux kernel");
        Registers::entry(LINUX, LINUX_DEVICE_TREE)
    } else if processor == 0 {
        // SAFETY: the symbol's address is all that is used.
        Registers::entry(HOST_ENTRY, unsafe { address_of(&__own_start) })
    } else {
        let entry = SECOND_ENTRY.load(Ordering::Acquire);
        Registers::entry(entry, SECOND_ARGUMENT.load(Ordering::Acquire))
    };
    loop {
        let exit = enter(&mut host);
        serve(hypervisor, &mut host, exit);
    }
}

/// Whether a Linux kernel was loaded: its header has a mark.
fn is_linux() -> bool {
    let page = Hpa::new(LINUX).frame();
    Machine.map(page);
    // SAFETY: memory of the machine, mapped above, and nobody writes there yet.
    let mark = unsafe { ((LINUX + 56) as *const u32).read_volatile() };
    Machine.unmap(page);
    mark == u32::from_le_bytes(*b"ARM\x64")
}

fn serve(hypervisor: &Hypervisor<'static, Machine>, host: &mut Registers, exit: Exit) {
    let Exit::Exception {
        syndrome,
        far,
        hpfar,
    } = exit
    else {
        panic!("an interrupt came to EL2 from the host");
    };
    match syndrome >> 26 & 0x3f {
        class::HVC => {
            if host.x[0] == AUDIT {
                return audit(hypervisor, host);
            }
            let mut x: [u64; REGISTERS] = core::array::from_fn(|index| host.x[index]);
            hypervisor.hypercall(&mut x, &mut enter_guest);
            host.x[..REGISTERS].copy_from_slice(&x);
        }
        class::SMC => {
            host.pc += 4;
            host.x[0] = match host.x[0] {
                // The status is 0 for whoever knows nothing of it.
                PSCI_SYSTEM_OFF => power_off(host.x[1]),
                PSCI_CPU_ON => start_second(host),
                // What only tells something may be asked.
                PSCI_VERSION | PSCI_FEATURES | PSCI_MIGRATE_INFO_TYPE => {
                    firmware(host.x[0], host.x[1], host.x[2], host.x[3])
                }
                _ => u64::MAX,
            };
        }
        class::INSTRUCTION_ABORT | class::DATA_ABORT => {
            let address = (hpfar >> 4 & ((1 << 40) - 1)) << 12 | far & 0xfff;
            match hypervisor.host_fault(Hpa::new(address)) {
                HostFault::Mapped { .. } | HostFault::Spurious => {
                    SERVED.fetch_add(1, Ordering::Relaxed);
                }
                HostFault::Denied => {
                    DENIED.fetch_add(1, Ordering::Relaxed);
                    inject(host, syndrome, far);
                }
            }
        }
        // Anything else that comes here is something that this processor can do and the host may not.
        _ => inject_undefined(host),
    }
}

/// The firmware would start a processor at EL2 for whoever asks. So the host's request is kept here:
/// the processor starts with the hypervisor, and drops to the host's entry below its stage 2.
fn start_second(host: &Registers) -> u64 {
    const INVALID_PARAMETERS: u64 = -2i64 as u64;
    const ALREADY_ON: u64 = -4i64 as u64;
    if host.x[1] != 1 {
        return INVALID_PARAMETERS;
    }
    if SECOND_STARTED.swap(true, Ordering::AcqRel) {
        return ALREADY_ON;
    }
    SECOND_ENTRY.store(host.x[2], Ordering::Release);
    SECOND_ARGUMENT.store(host.x[3], Ordering::Release);
    firmware(PSCI_CPU_ON, 1, second_start as *const () as u64, 1)
}

/// Gives the host the abort as if its own translation had caused it: the same syndrome, marked as a
/// fault of a walk, which its own tables never cause. A kernel that does not know the mark (Debian's
/// 6.1) takes it for a fault that it has served already and tries again for ever, so Linux gets
/// what every kernel understands: an external abort.
fn inject(host: &mut Registers, syndrome: u64, far: u64) {
    const MARK: u64 = 1 << 7;
    const STATUS: u64 = 0x3f;
    let own_class = if at_el1(host.pstate) {
        class::SAME_LEVEL << 26
    } else {
        0
    };
    let syndrome = if LINUX_HOST.load(Ordering::Relaxed) {
        syndrome & !(MARK | STATUS) | EXTERNAL_ABORT
    } else {
        syndrome | MARK
    };
    write!("far_el1", far);
    take_exception(host, syndrome + own_class);
}

/// The host's instruction is undefined.
fn inject_undefined(host: &mut Registers) {
    take_exception(host, class::UNKNOWN << 26 | LENGTH);
}

/// The host takes an exception; EL1's registers are in the processor.
fn take_exception(host: &mut Registers, syndrome: u64) {
    write!("esr_el1", syndrome);
    write!("elr_el1", host.pc);
    write!("spsr_el1", host.pstate);
    (host.pc, host.pstate) = synchronous(host.pstate, read!("sctlr_el1"), read!("vbar_el1"));
}

fn audit(hypervisor: &Hypervisor<'static, Machine>, host: &mut Registers) {
    match hypervisor.audit() {
        Ok(census) => {
            host.x[0] = 0;
            host.x[1] = census.guests + census.lent_to_host;
            host.x[2] = census.hyp;
            host.x[3] = SERVED.load(Ordering::Relaxed);
            host.x[4] = DENIED.load(Ordering::Relaxed);
        }
        Err(violation) => {
            say!("el2: {violation}");
            host.x[0] = 1;
        }
    }
}
