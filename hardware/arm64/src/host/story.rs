//! What happens, in order.

// UNSAFETY: entry points by name, and the guests' code as bytes.
#![expect(unsafe_code)]

use crate::calls::{audit, call, power_off, raw, start_second};
use crate::{probe, second};
use bare::say;
use core::arch::global_asm;
use twofold_pkvm::hypercall::{Call, FUNCTION_BASE, NOT_SUPPORTED};
use twofold_pkvm::run::{Reason, WRITE_TO_NOTHING};
use twofold_pkvm::{Error, HostVcpu, HostVm};

global_asm!(include_str!("guest.s"));

unsafe extern "C" {
    fn second_entry();
    static protected_guest: u8;
    static protected_guest_end: u8;
    static ordinary_guest: u8;
    static ordinary_guest_end: u8;
    static spinning_guest: u8;
    static spinning_guest_end: u8;
}

const PAGE: u64 = 4096;
/// Memory that the host hands out, page by page.
const FREE: u64 = 0x4500_0000;
/// Blocks of memory that are touched only to measure the first touch.
const UNTOUCHED: u64 = 0x4680_0000;
const BLOCK: u64 = 2 << 20;
/// Nanoseconds to wait for what must come: the machine may be busy.
const PATIENCE: u64 = 60_000_000_000;
/// Where guests begin.
const ENTRY: u64 = 0x8_0000;

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("host: {info}");
    power_off(1)
}

#[unsafe(no_mangle)]
extern "C" fn rust_unexpected(syndrome: u64, pc: u64, address: u64) -> ! {
    panic!("exception at EL1: syndrome {syndrome:#x} at {pc:#x}, address {address:#x}");
}

/// Pages that have not been handed out yet.
struct Pages(u64);

impl Pages {
    fn take(&mut self) -> u64 {
        let page = self.0;
        self.0 += PAGE;
        page
    }

    /// A stack of pages for tables: the first's address.
    fn stack(&mut self, count: u64) -> u64 {
        let mut head = 0;
        for _ in 0..count {
            let page = self.take();
            set(page, head);
            head = page;
        }
        head
    }
}

fn get(address: u64) -> u64 {
    match probe::read(address) {
        Some(value) => value,
        None => panic!("{address:#x} should be readable"),
    }
}

fn set(address: u64, value: u64) {
    assert!(
        probe::write(address, value),
        "{address:#x} should be writable"
    );
}

/// Something that must be so; says it.
macro_rules! check {
    ($condition:expr, $($text:tt)*) => {{
        assert!($condition, "this should hold: {}", format_args!($($text)*));
        say!("host: {}", format_args!($($text)*));
    }};
}

/// Finalises this processor; the first one tells the story.
#[unsafe(no_mangle)]
extern "C" fn rust_main(processor: u64, hypervisor: u64) -> ! {
    if processor == 1 {
        assert_eq!(call(Call::ProtFinalize, &[]), Ok(0));
        second::work();
    }
    say!("host: running at EL1, below the hypervisor's stage 2");
    check!(
        raw(Call::ReserveVm.function(), [0; 5])[0] == NOT_SUPPORTED,
        "calls about guests are not there before finalising"
    );
    assert_eq!(call(Call::ProtFinalize, &[]), Ok(0));
    check!(
        call(Call::ProtFinalize, &[]) == Err(Error::NotPermitted),
        "finalising twice is refused"
    );
    check!(
        probe::read(hypervisor).is_none(),
        "reading the hypervisor at {hypervisor:#x} is answered with an abort, syndrome {:#x}",
        probe::syndrome()
    );
    check!(!probe::write(hypervisor + 0x1000, 0), "writing it too");
    check!(
        !probe::forbidden(),
        "an instruction that the hypervisor keeps for itself is undefined"
    );
    let entry = second_entry as *const () as u64;
    let two = start_second(entry) == 0;
    if two {
        check!(
            start_second(entry) == -4,
            "the second processor starts, once"
        );
    } else {
        say!("host: this machine has one processor; what takes two is NOT tried");
    }
    let mut pages = Pages(FREE);
    protected(&mut pages, two);
    ordinary(&mut pages);
    if two {
        two_processors(&mut pages);
        while_it_runs(&mut pages);
    }
    figures(&mut pages);
    nonsense(&mut pages);
    let Some([guests, own, served, denied]) = audit() else {
        panic!("a page is in no legal state");
    };
    check!(
        guests == 0,
        "in the end guests have 0 pages, the hypervisor {own}; {served} faults were served, {denied} answered with an abort"
    );
    say!("PASS");
    power_off(0)
}

/// A VM as the host sees it.
struct Vm {
    handle: u64,
    record: u64,
    vcpu: u64,
}

impl Vm {
    fn new(pages: &mut Pages, protected: bool, tables: u64) -> Self {
        let record = pages.take();
        let vcpu = record + 512;
        assert_eq!(call(Call::ShareHyp, &[record / PAGE]), Ok(0));
        let handle = match call(Call::ReserveVm, &[record]) {
            Ok(handle) => handle,
            Err(error) => panic!("no handle: {error}"),
        };
        for word in 0..HostVm::WORDS as u64 {
            set(record + word * 8, 0);
        }
        set(record, handle);
        set(record + 8, 1);
        let kind = if protected { HostVm::PROTECTED } else { 0 };
        // 36 bits: a root of one page.
        set(record + 16, kind | 36 << HostVm::IPA_SHIFT);
        let (area, root) = (pages.take(), pages.take());
        assert_eq!(
            call(Call::InitVm, &[record, area / PAGE, root / PAGE]),
            Ok(handle)
        );
        assert!(
            probe::read(area).is_none(),
            "the VM's record is out of reach"
        );
        set(vcpu, 0);
        set(vcpu + 8, ENTRY);
        set(vcpu + 16, 0);
        set(vcpu + 24, pages.stack(tables));
        set(vcpu + 32, tables);
        let area = pages.take();
        assert_eq!(call(Call::InitVcpu, &[handle, vcpu, area / PAGE]), Ok(0));
        Self {
            handle,
            record,
            vcpu,
        }
    }

    fn word(&self, number: usize) -> u64 {
        get(self.vcpu + number as u64 * 8)
    }

    fn run(&self) -> u64 {
        match call(Call::VcpuRun, &[]) {
            Ok(reason) => reason,
            Err(error) => panic!("the vCPU does not run: {error}"),
        }
    }

    /// Runs to an abort and says where it was.
    fn run_to_abort(&self) -> u64 {
        let reason = self.run();
        assert_eq!(
            reason,
            Reason::Abort as u64,
            "syndrome {:#x}",
            self.word(HostVcpu::SYNDROME)
        );
        self.word(HostVcpu::ADDRESS)
    }

    /// Runs to a call with this function and says its arguments.
    fn run_to_call(&self, function: u64) -> [u64; 3] {
        let reason = self.run();
        assert_eq!(
            reason,
            Reason::Call as u64,
            "syndrome {:#x} at {:#x}",
            self.word(HostVcpu::SYNDROME),
            self.word(HostVcpu::ADDRESS)
        );
        assert_eq!(self.word(HostVcpu::CALL), function);
        [1, 2, 3].map(|number| self.word(HostVcpu::CALL + number))
    }

    /// Ends the VM and counts the pages that came back, all of them empty but for the link.
    fn end(self, frames: &[u64]) -> u64 {
        assert_eq!(call(Call::StartTeardownVm, &[self.handle]), Ok(0));
        for frame in frames {
            assert_eq!(
                call(Call::ReclaimDyingGuestPage, &[self.handle, *frame]),
                Ok(0)
            );
        }
        assert_eq!(call(Call::FinalizeTeardownVm, &[self.handle]), Ok(0));
        let mut count = 0;
        for stack in [4, 6] {
            let mut page = get(self.record + stack * 8);
            let expected = get(self.record + stack * 8 + 8);
            let mut found = 0;
            while page != 0 {
                for word in 1..512 {
                    assert_eq!(get(page + word * 8), 0, "{page:#x} tells something");
                }
                found += 1;
                page = get(page);
            }
            assert_eq!(found, expected);
            count += found;
        }
        assert_eq!(call(Call::UnshareHyp, &[self.record / PAGE]), Ok(0));
        count
    }
}

/// Copies a guest's code to a page.
fn code(page: u64, from: &'static u8, to: &'static u8) {
    let (from, to) = (
        core::ptr::from_ref(from) as u64,
        core::ptr::from_ref(to) as u64,
    );
    assert!(to - from < PAGE);
    for offset in (0..to - from).step_by(8) {
        set(page + offset, get(from + offset));
    }
}

fn protected(pages: &mut Pages, two: bool) {
    let vm = Vm::new(pages, true, 8);
    say!("host: a protected VM, handle {:#x}", vm.handle);
    let text = pages.take();
    // SAFETY: symbols of the guest's code; only their addresses are used.
    unsafe { code(text, &protected_guest, &protected_guest_end) };
    check!(
        call(Call::DonateGuest, &[text / PAGE, ENTRY / PAGE]) == Err(Error::Invalid),
        "no vCPU is loaded: a page cannot be given"
    );
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    check!(
        call(Call::VcpuLoad, &[vm.handle, 0]) == Err(Error::Busy),
        "this processor has one vCPU and cannot load a second"
    );
    if two {
        check!(
            second::loads(vm.handle) == Error::Busy.code(),
            "nor can the other processor load the same"
        );
    }
    assert_eq!(vm.run_to_abort(), ENTRY);
    assert_eq!(call(Call::DonateGuest, &[text / PAGE, ENTRY / PAGE]), Ok(0));
    check!(
        probe::read(text).is_none(),
        "the guest's code, donated, can no longer be read"
    );
    let secret = pages.take();
    check!(
        vm.run_to_abort() == 0x9_0000,
        "the guest runs, and wants a page at 0x90000"
    );
    assert_eq!(call(Call::DonateGuest, &[secret / PAGE, 0x90]), Ok(0));
    let shown = pages.take();
    let wanted = vm.run_to_abort();
    check!(
        wanted == 0xa_0000 && vm.word(HostVcpu::SYNDROME) == WRITE_TO_NOTHING,
        "it shares 0xa0000, which is not there: the host sees a write fault and gives a page"
    );
    assert_eq!(call(Call::DonateGuest, &[shown / PAGE, 0xa0]), Ok(0));
    let [features, shared, _] = vm.run_to_call(0x1000_0001);
    check!(
        features == 0b11101 && shared == 0,
        "the guest's MEM_SHARE has succeeded"
    );
    check!(
        get(shown) == 0x6f_6c6c_6548,
        "the host reads what it shows: Hello"
    );
    check!(
        probe::read(secret).is_none() && !probe::write(secret, 0),
        "and not its secret"
    );
    refusals(&vm, text, shown);
    set(vm.vcpu + HostVcpu::CALL as u64 * 8, 42);
    let [unshared, intact, answer] = vm.run_to_call(0x1000_0002);
    check!(
        unshared == 0 && probe::read(shown).is_none(),
        "after MEM_UNSHARE the host reads nothing there"
    );
    check!(
        intact == 1 && answer == 42,
        "the guest still has its secret, and got the host's answer"
    );
    assert_eq!(call(Call::ForceReclaimGuestPage, &[secret / PAGE]), Ok(0));
    check!(
        get(secret) == 0,
        "the host takes the page by force and finds it empty"
    );
    assert_eq!(vm.run_to_abort(), 0x9_0000);
    check!(
        call(Call::VcpuInPoisonFault, &[]) == Ok(1),
        "the guest's next access never comes back: the page is poisoned"
    );
    let other = pages.take();
    check!(
        call(Call::DonateGuest, &[other / PAGE, 0x90]) == Err(Error::NotPermitted),
        "and no other page can take its place"
    );
    check!(
        call(Call::StartTeardownVm, &[vm.handle]) == Err(Error::Invalid),
        "while a vCPU is loaded the VM cannot end"
    );
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    let back = vm.end(&[ENTRY / PAGE, 0xa0]);
    check!(
        get(text) == 0 && get(shown) == 0,
        "the VM is gone: {back} pages of tables and records came back empty, and so did its memory"
    );
}

/// Everything that must not work on a guest's pages.
fn refusals(vm: &Vm, text: u64, shown: u64) {
    let mut refused = 0;
    for page in [text / PAGE, shown / PAGE] {
        for (which, arguments) in [
            (Call::ShareHyp, [page, 0, 0, 0]),
            (Call::UnshareHyp, [page, 0, 0, 0]),
            (Call::DonateGuest, [page, 0xd0, 0, 0]),
            (Call::ShareGuest, [page, 0xd0, 1, 7]),
            (Call::ShareFfa, [page, 1, 0, 0]),
            (Call::UnshareFfa, [page, 1, 0, 0]),
        ] {
            assert_eq!(
                call(which, &arguments),
                Err(Error::NotPermitted),
                "{}",
                which.name()
            );
            refused += 1;
        }
    }
    for (which, expected) in [
        (Call::WrprotectGuest, Error::NotPermitted),
        (Call::UnshareGuest, Error::NotPermitted),
        (Call::ReclaimDyingGuestPage, Error::Invalid),
        (Call::FinalizeTeardownVm, Error::Invalid),
        (Call::UnreserveVm, Error::Invalid),
    ] {
        assert_eq!(
            call(which, &[vm.handle, ENTRY / PAGE, 1, 0]),
            Err(expected),
            "{}",
            which.name()
        );
        refused += 1;
    }
    check!(
        call(Call::ForceReclaimGuestPage, &[shown / PAGE]) == Err(Error::NotPermitted),
        "{} other attempts on the guest's pages are refused, a shared page cannot be taken either",
        refused
    );
}

fn ordinary(pages: &mut Pages) {
    let vm = Vm::new(pages, false, 8);
    let text = pages.take();
    // SAFETY: symbols of the guest's code; only their addresses are used.
    unsafe { code(text, &ordinary_guest, &ordinary_guest_end) };
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    let share =
        |page: u64, gfn: u64, access: u64| call(Call::ShareGuest, &[page / PAGE, gfn, 1, access]);
    assert_eq!(share(text, ENTRY / PAGE, 0b101), Ok(0));
    let (both, small) = (pages.take(), pages.take());
    for gfn in [0x90, 0xb0] {
        assert_eq!(vm.run_to_abort(), gfn * PAGE);
        assert_eq!(share(both, gfn, 0b011), Ok(0));
    }
    let [seen, ..] = vm.run_to_call(0x1000_0001);
    check!(
        seen == 0x77 && get(both) == 0x77,
        "an ordinary guest borrows one page at two addresses, and the host still reads it"
    );
    assert_eq!(vm.run_to_abort(), 0xc_0000);
    assert_eq!(share(small, 0xc0, 0b001), Ok(0));
    assert_eq!(vm.run_to_abort(), 0xc_0000);
    let syndrome = vm.word(HostVcpu::SYNDROME);
    check!(
        syndrome & 0x3c == 0xc && get(small) == 0,
        "its write to a page that it may only read is a permission fault"
    );
    assert_eq!(call(Call::RelaxPermsGuest, &[0xc0, 0b011]), Ok(0));
    let [seen, ..] = vm.run_to_call(0x1000_0002);
    check!(seen == 0x77 && get(small) == 0x77, "until the host relents");
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    check!(
        call(Call::UnshareGuest, &[vm.handle, 0x90, 512]) == Err(Error::TooBig),
        "taking back a block where a page was lent is refused"
    );
    for gfn in [ENTRY / PAGE, 0x90, 0xb0, 0xc0] {
        assert_eq!(call(Call::UnshareGuest, &[vm.handle, gfn, 1]), Ok(0));
    }
    let back = vm.end(&[]);
    say!("host: the ordinary VM is gone, {back} pages came back");
}

/// Translations that only the other processor holds, and calls at the same moment.
fn two_processors(pages: &mut Pages) {
    let vm = Vm::new(pages, true, 8);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    let rounds = 64;
    let first = pages.0;
    for round in 0..rounds {
        let page = pages.take();
        assert!(second::reads(page), "before");
        assert_eq!(
            call(Call::DonateGuest, &[page / PAGE, 0x200 + round]),
            Ok(0)
        );
        assert!(
            !second::reads(page),
            "the other processor still reads a donated page"
        );
        assert_eq!(call(Call::ForceReclaimGuestPage, &[page / PAGE]), Ok(0));
        assert!(second::reads(page), "after");
    }
    check!(
        pages.0 == first + rounds * PAGE,
        "{rounds} pages that the other processor had in its TLB were given away; it could not read one of them"
    );
    let (page, mine) = (pages.take() / PAGE, pages.take() / PAGE);
    let mut won = 0;
    let theirs = second::churns(page, || {
        for round in 0..200 {
            let gfn = 0x400 + round;
            if call(Call::DonateGuest, &[mine, gfn]) == Ok(0)
                && call(Call::ForceReclaimGuestPage, &[mine]) == Ok(0)
            {
                won += 1;
            }
        }
    });
    check!(
        theirs == 2000 && won == 200,
        "both processors change different pages at once: {theirs} and {won} rounds, none lost"
    );
    let mut got = 0;
    let theirs = second::churns(page, || {
        for round in 0..200 {
            // The very page that the other lends and takes back.
            let gfn = 0x800 + round;
            match call(Call::DonateGuest, &[page, gfn]) {
                Ok(_) => {
                    got += 1;
                    assert_eq!(call(Call::ForceReclaimGuestPage, &[page]), Ok(0));
                }
                Err(error) => assert_eq!(error, Error::NotPermitted),
            }
        }
    });
    // What the other side lost half way through it has left lent.
    let _ = call(Call::UnshareHyp, &[page]);
    assert!(audit().is_some(), "a page is in no legal state");
    check!(
        theirs <= 2000,
        "and one page at once: {got} donations and {theirs} rounds of lending, every page in a legal state"
    );
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    assert_eq!(second::loads(vm.handle), 0);
    check!(
        call(Call::StartTeardownVm, &[vm.handle]) == Err(Error::Invalid),
        "a VM whose vCPU the other processor has loaded cannot end"
    );
    assert_eq!(second::puts(), 0);
    vm.end(&[]);
}

/// A guest that runs on the other processor loses a page.
fn while_it_runs(pages: &mut Pages) {
    let vm = Vm::new(pages, true, 8);
    let (text, secret, shown) = (pages.take(), pages.take(), pages.take());
    // SAFETY: symbols of the guest's code; only their addresses are used.
    unsafe { code(text, &spinning_guest, &spinning_guest_end) };
    set(shown, 0);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    for (page, gfn) in [(text, ENTRY / PAGE), (secret, 0x90), (shown, 0xa0)] {
        assert_eq!(call(Call::DonateGuest, &[page / PAGE, gfn]), Ok(0));
    }
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    let reason = second::runs(vm.handle, || {
        // Nothing can be read there until the guest has shared it.
        let start = ticks();
        while probe::read(shown).unwrap_or(0) < 1000 {
            let waited = (ticks() - start) * nanoseconds_per_tick();
            assert!(waited < PATIENCE, "the guest does not run");
        }
        assert_eq!(call(Call::ForceReclaimGuestPage, &[secret / PAGE]), Ok(0));
        let after = get(shown);
        for _ in 0..100_000 {
            core::hint::spin_loop();
        }
        // It may have been between the read and the count.
        assert!(
            get(shown) <= after + 1,
            "the guest still reads the page that was taken from it"
        );
    });
    check!(
        reason == Reason::Abort as i64 && vm.word(HostVcpu::ADDRESS) == 0x9_0000,
        "a guest that was running on the other processor stopped at the page that was taken"
    );
    vm.end(&[ENTRY / PAGE, 0xa0]);
}

/// Numbers that mean nothing.
fn nonsense(pages: &mut Pages) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let spare = pages.take() / PAGE;
    let mut supported = 0;
    for round in 0..4000u64 {
        let function = if round % 4 == 0 {
            random()
        } else {
            FUNCTION_BASE + random() % 96
        };
        if function == 0xc600_ff00 {
            continue;
        }
        // Few numbers, so that some calls mean something; never the host's own pages.
        let number = |random: u64| match random % 5 {
            0 => random,
            1 => spare + random % 7,
            2 => 0x1000 + random % 3,
            3 => random % 600,
            _ => 1 << (random % 64),
        };
        let mut arguments = [0; 5].map(|_: u64| number(random()));
        // A page of the program itself is the host's to give away, and would be its end.
        let program = 0x4400_0000 / PAGE..(FREE / PAGE).min(spare);
        if program.contains(&arguments[0]) {
            arguments[0] = spare;
        }
        if raw(function, arguments)[0] == 0 {
            supported += 1;
        }
    }
    let _ = call(Call::VcpuPut, &[]);
    for handle in 0x1000..0x1000 + 255 {
        let _ = call(Call::UnreserveVm, &[handle]);
    }
    check!(
        audit().is_some(),
        "4000 calls with numbers that mean nothing, {supported} of them known: every page is in a legal state"
    );
}

/// What operations cost, in ticks of the machine's counter.
fn figures(pages: &mut Pages) {
    let vm = Vm::new(pages, true, 8);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    let page = pages.take() / PAGE;
    // The tables exist after this one.
    assert_eq!(call(Call::DonateGuest, &[page, 0x3ff]), Ok(0));
    assert_eq!(call(Call::ForceReclaimGuestPage, &[page]), Ok(0));
    let measure = |what: &str, rounds: u64, body: &mut dyn FnMut(u64)| {
        let start = ticks();
        for round in 0..rounds {
            body(round);
        }
        let each = (ticks() - start) * nanoseconds_per_tick() / rounds;
        say!("figure: {what}: {each} ns");
    };
    measure("a call that is answered at once", 200, &mut |_| {
        let _ = call(Call::UnreserveVm, &[0]);
    });
    measure("share_hyp and unshare_hyp", 200, &mut |_| {
        let _ = call(Call::ShareHyp, &[page]);
        let _ = call(Call::UnshareHyp, &[page]);
    });
    measure(
        "donate_guest and force_reclaim, page wiped",
        200,
        &mut |round| {
            let _ = call(Call::DonateGuest, &[page, 0x200 + round]);
            let _ = call(Call::ForceReclaimGuestPage, &[page]);
        },
    );
    // Memory that nobody has touched yet: each block of 2 MiB is one fault.
    measure(
        "a fault of the host's stage 2, a block mapped",
        10,
        &mut |round| {
            let _ = probe::read(UNTOUCHED + round * BLOCK);
        },
    );
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    vm.end(&[]);
}

fn ticks() -> u64 {
    let value: u64;
    // SAFETY: reads the counter.
    unsafe { core::arch::asm!("isb", "mrs {}, cntvct_el0", out(reg) value, options(nostack)) };
    value
}

fn nanoseconds_per_tick() -> u64 {
    let frequency: u64;
    // SAFETY: reads the counter's frequency.
    unsafe { core::arch::asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nostack)) };
    1_000_000_000 / frequency.max(1)
}
