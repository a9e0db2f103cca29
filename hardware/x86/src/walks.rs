//! Random tables for the processor alone: one line each about what it does with them.
//!
//! The words come from `twofold-walks`, and what is printed is compared by its program with what
//! `twofold-cpu` does. The MMU has no part in this.

use crate::guest;
use crate::instructions::interrupts;
use crate::println;
use crate::processor::{Exit, Features, Virtualization};
use crate::vm::Operation;
use twofold_arch::Hpa;
use twofold_walks::{
    CASES, Case, End, GPA, Kind, SUB_PAGE_TABLES, TABLES, TARGET, TARGET_VALUE, WRITTEN_VALUE,
    Walked,
};

/// The exit that a #VE stands for.
const EPT_VIOLATION: u32 = 48;

/// Exits before a case counts as stuck.
const EXITS: u32 = 100;

/// Walks them all.
pub fn run<V: Virtualization>() {
    for &kind in V::WALKS {
        guest::load_guest(Hpa::new(guest::MEMORY));
        // Seven tables and four of sub-page permissions, and what entries with a wrong size bit take
        // for one.
        guest::clear(TABLES, 0x7000);
        guest::clear(SUB_PAGE_TABLES, 0x4000);
        guest::clear(Hpa::new(TARGET.get() & !0x1f_ffff), 0x10_0000);
        for (place, value) in kind.own_words(Hpa::new(guest::MEMORY)) {
            guest::store(place, value);
        }
        let features = match kind {
            Kind::EptWithoutFlags => Features::empty(),
            Kind::EptWithExceptions => Features::ACCESSED_DIRTY | Features::EXCEPTIONS,
            Kind::EptWithSubPages => Features::ACCESSED_DIRTY | Features::SUB_PAGES,
            Kind::Ept | Kind::Npt => Features::ACCESSED_DIRTY,
        };
        if !V::available().contains(features) {
            continue;
        }
        let mut processor = V::new(features);
        processor.set_root(TABLES);
        if features.contains(Features::SUB_PAGES) {
            processor.set_sub_pages(SUB_PAGE_TABLES);
        }
        for number in 0..CASES {
            println!("{}", walk(&mut processor, kind, number));
        }
    }
}

fn walk<V: Virtualization>(processor: &mut V, kind: Kind, number: u64) -> Walked {
    let case = Case::new(kind, number);
    for (place, entry) in case.words() {
        guest::store(place, entry);
    }
    guest::store(TARGET, TARGET_VALUE);
    processor.restart();
    let mut exit = until_exit(processor);
    if exit == Exit::Request {
        let operation = match case.operation {
            twofold_walks::Operation::Read => Operation::Read(GPA.get()),
            twofold_walks::Operation::Write => Operation::Write(GPA.get(), WRITTEN_VALUE),
            twofold_walks::Operation::Fetch => Operation::Fetch(GPA.get()),
        };
        operation.put(processor.registers());
        exit = until_exit(processor);
    }
    let exception = processor.take_exception();
    let (end, gpa) = match exit {
        Exit::Request if processor.registers().rax == guest::REQUEST_VE => {
            // The guest's handler runs; the processor has filled in the page before.
            match exception {
                Some(page) if page.reason == EPT_VIOLATION && page.linear == GPA.get() => {
                    (End::Exception(page.qualification), page.gpa.get())
                }
                _ => (End::Strange(guest::REQUEST_VE), 0),
            }
        }
        Exit::Request if case.operation == twofold_walks::Operation::Read => {
            (End::Done(processor.registers().rbx), 0)
        }
        Exit::Request => (End::Done(guest::load(TARGET)), 0),
        Exit::Fault(fault) => {
            let end = if fault.misconfigured {
                End::Misconfiguration
            } else if kind == Kind::Npt {
                End::NestedFault(fault.raw)
            } else {
                End::Violation(fault.raw)
            };
            (end, fault.fault.gpa.get())
        }
        Exit::SubPages(event) => {
            let qualification = event.qualification.bits();
            (End::SubPages(qualification), event.gpa.get())
        }
        Exit::Other(number, _) => (End::Strange(number), 0),
        Exit::Interrupt | Exit::LogFull => (End::Strange(0), 0),
    };
    Walked {
        kind,
        number,
        end,
        gpa,
        entries: twofold_walks::places().map(guest::load),
    }
}

/// Enters the guest until it is left for a reason of its own.
fn until_exit<V: Virtualization>(processor: &mut V) -> Exit {
    for _ in 0..EXITS {
        interrupts(false);
        let exit = processor.enter(true);
        interrupts(true);
        if exit != Exit::Interrupt {
            return exit;
        }
    }
    Exit::Interrupt
}
