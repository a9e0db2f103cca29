//! One line of a trace.

/// What a line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The program: what it is about to do, or what came of it.
    Said(String),
    /// A vCPU asks for a page.
    Fault {
        /// Where.
        gpa: u64,
        /// The fault's [error code](error).
        error: u64,
    },
    /// An entry has changed.
    Changed {
        /// The first frame that it covers.
        gfn: u64,
        /// Its level; 1 is the last.
        level: u8,
        /// Its value before.
        old: u64,
        /// Its value now.
        new: u64,
    },
    /// The leaf for an address has changed.
    Restored {
        /// The address.
        gpa: u64,
        /// Its value before.
        old: u64,
        /// Its value now.
        new: u64,
    },
}

/// Bits of a fault's error code (APM volume 2, "Nested Page Faults").
pub mod error {
    /// A translation is there, and forbids the access.
    pub const PRESENT: u64 = 1 << 0;
    /// A write.
    pub const WRITE: u64 = 1 << 1;
    /// As all accesses through nested tables are.
    pub const USER: u64 = 1 << 2;
    /// A reserved bit is set.
    pub const RESERVED: u64 = 1 << 3;
    /// A fetch of an instruction.
    pub const FETCH: u64 = 1 << 4;
    /// The guest's own access.
    pub const FINAL: u64 = 1 << 32;
    /// An access to the guest's page tables.
    pub const TABLE: u64 = 1 << 33;
}

/// A line that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unreadable(pub String);

/// Reads a line of the kernel's trace; `None` if it is about something else.
///
/// # Errors
/// It is about entries and cannot be read, or lines were lost.
pub fn from_kernel(line: &str) -> Result<Option<Event>, Unreadable> {
    let event = if let Some((_, text)) = line.split_once("tracing_mark_write: ") {
        Some(Event::Said(text.trim_end().to_owned()))
    } else if let Some((_, text)) = line.split_once("kvm_page_fault: ") {
        kernel_fault(text)
    } else if let Some((_, text)) = line.split_once("kvm_tdp_mmu_spte_changed: ") {
        kernel_change(text)
    } else if let Some((_, text)) = line.split_once("fast_page_fault: ") {
        match number_after(text, "fixed ") {
            Some(0) => return Ok(None),
            _ => kernel_restored(text),
        }
    } else if line.contains("LOST") {
        None
    } else {
        return Ok(None);
    };
    event.map(Some).ok_or_else(|| Unreadable(line.to_owned()))
}

fn kernel_fault(text: &str) -> Option<Event> {
    Some(Event::Fault {
        gpa: number_after(text, "address ")?,
        error: number_after(text, "error_code ")?,
    })
}

fn kernel_change(text: &str) -> Option<Event> {
    Some(Event::Changed {
        gfn: number_after(text, "gfn ")?,
        level: number_after(text, "level ")? as u8,
        old: number_after(text, "old_spte ")?,
        new: number_after(text, "new_spte ")?,
    })
}

fn kernel_restored(text: &str) -> Option<Event> {
    Some(Event::Restored {
        gpa: number_after(text, "gva ")?,
        old: number_after(text, " old ")?,
        new: number_after(text, " new ")?,
    })
}

/// Reads a line of what the program and Twofold have written; `None` if it is about something else.
///
/// # Errors
/// It is about entries and cannot be read.
pub fn from_twofold(line: &str) -> Result<Option<Event>, Unreadable> {
    let Some((_, text)) = line.split_once("TRACE twofold_mmu: ") else {
        return Ok(Some(Event::Said(line.to_owned())));
    };
    let event = if text.starts_with("entry changed") {
        changed(text)
    } else if text.starts_with("fault vcpu") {
        fault(text)
    } else {
        return Ok(None);
    };
    event.map(Some).ok_or_else(|| Unreadable(line.to_owned()))
}

fn changed(text: &str) -> Option<Event> {
    Some(Event::Changed {
        gfn: number_after(text, "gfn=")?,
        level: number_after(text, "level=")? as u8,
        old: number_after(text, "old=")?,
        new: number_after(text, "new=")?,
    })
}

fn fault(text: &str) -> Option<Event> {
    let (_, names) = text.split_once("error=Pferr(")?;
    let mut error = 0;
    for name in names.trim_end().trim_end_matches(')').split(" | ") {
        error |= match name {
            "PRESENT" => error::PRESENT,
            "WRITE" => error::WRITE,
            "USER" => error::USER,
            "RSVD" => error::RESERVED,
            "FETCH" => error::FETCH,
            "GUEST_FINAL" => error::FINAL,
            "GUEST_PAGE" => error::TABLE,
            _ => return None,
        };
    }
    Some(Event::Fault {
        gpa: number_after(text, "gpa=")?,
        error,
    })
}

/// The hexadecimal number after a name.
fn number_after(text: &str, name: &str) -> Option<u64> {
    let (_, number) = text.split_once(name)?;
    let number = number.strip_prefix("0x").unwrap_or(number);
    let end = number
        .find(|digit: char| !digit.is_ascii_hexdigit())
        .unwrap_or(number.len());
    u64::from_str_radix(&number[..end], 16).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may fail")]

    use super::*;

    #[test]
    fn the_kernels_lines_are_read() {
        let line = "  x-1 [000] .....     4.4: ";
        let read = |text: &str| from_kernel(&format!("{line}{text}"));
        assert_eq!(
            read("tracing_mark_write: guest: read 0x1000"),
            Ok(Some(Event::Said("guest: read 0x1000".to_owned())))
        );
        assert_eq!(
            read(
                "kvm_page_fault: vcpu 0 rip 0x1000 address 0x0000000010001000 error_code 0x100000014"
            ),
            Ok(Some(Event::Fault {
                gpa: 0x1000_1000,
                error: error::FINAL | error::USER | error::FETCH
            }))
        );
        assert_eq!(
            read(
                "kvm_tdp_mmu_spte_changed: as id 0 gfn 10001 level 1 old_spte 8000000000000000 new_spte 24f2e67"
            ),
            Ok(Some(Event::Changed {
                gfn: 0x1_0001,
                level: 1,
                old: 1 << 63,
                new: 0x24f_2e67
            }))
        );
        let fast = "fast_page_fault: vcpu 0 gva 10001000 error_code P|W|U|0x100000000 sptep \
            00000000fb6f4840 old 0x24f2e65 new 24f2e67 spurious 0 fixed";
        assert_eq!(
            read(&format!("{fast} 1")),
            Ok(Some(Event::Restored {
                gpa: 0x1000_1000,
                old: 0x24f_2e65,
                new: 0x24f_2e67
            }))
        );
        assert_eq!(read(&format!("{fast} 0")), Ok(None));
        assert_eq!(
            read("kvm_mmu_spte_requested: gfn 1 pfn 24f6 level 1"),
            Ok(None)
        );
    }

    #[test]
    fn twofolds_lines_and_the_programs_are_read() {
        let read = |text: &str| from_twofold(&format!("TRACE twofold_mmu: {text}"));
        assert_eq!(
            from_twofold("call: end the VM"),
            Ok(Some(Event::Said("call: end the VM".to_owned())))
        );
        assert_eq!(
            read("fault vcpu=0 gpa=0x1000 error=Pferr(PRESENT | WRITE | USER | GUEST_FINAL)"),
            Ok(Some(Event::Fault {
                gpa: 0x1000,
                error: error::PRESENT | error::WRITE | error::USER | error::FINAL
            }))
        );
        assert_eq!(
            read("entry changed gfn=0x1 level=2 old=0x8000000000000000 new=0x7fb45e803827"),
            Ok(Some(Event::Changed {
                gfn: 1,
                level: 2,
                old: 1 << 63,
                new: 0x7fb4_5e80_3827
            }))
        );
        assert_eq!(read("fault ended vcpu=0 outcome=Ok(Spurious)"), Ok(None));
    }

    #[test]
    fn lines_that_are_damaged_or_lost_are_errors() {
        for line in [
            "kvm_tdp_mmu_spte_changed: as id 0 gfn 1 level 1 old_spte 80",
            "kvm_page_fault: vcpu 0 rip 0x1000",
            "CPU:0 [LOST 17 EVENTS]",
        ] {
            assert!(from_kernel(line).is_err(), "{line}");
        }
        for line in [
            "TRACE twofold_mmu: entry changed gfn=0x1 level=2 old=0x80",
            "TRACE twofold_mmu: fault vcpu=0 gpa=0x1000 error=Pferr(NEW)",
        ] {
            assert!(from_twofold(line).is_err(), "{line}");
        }
    }
}
