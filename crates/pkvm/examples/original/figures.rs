//! How many instructions a protected hypervisor takes for what it does.
//!
//! A breakpoint stops each entry to EL2 from a lower level, and another where it goes on there. QEMU
//! tells how many instructions it has executed, since it records the run (`-icount rr=record`). What
//! the host executes around it is not counted.

use crate::Result;
use crate::debugger::Debugger;
use std::collections::BTreeMap;

/// Where a synchronous exception of a lower level enters, behind VBAR_EL2.
const SYNCHRONOUS: u64 = 0x400;
/// The debugger's number of the program counter.
const PC: u32 = 32;
/// How often each operation is counted.
const SAMPLES: usize = 9;
const FUNCTION_BASE: u64 = 0xc600_0000;

const FAULT: &str = "a fault of the host's stage 2";

/// A call by its name, with the number that this hypervisor has for it.
pub(crate) struct Call {
    name: String,
    number: u64,
}

impl Call {
    /// From `name=number`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (name, number) = text
            .split_once('=')
            .ok_or(format!("{text}: a call is named as name=number"))?;
        Ok(Self {
            name: name.into(),
            number: number.parse()?,
        })
    }
}

/// Counts faults of the host and each of the calls until all were seen often enough, and prints the
/// medians.
///
/// # Errors
/// If the connection fails, or nothing more happens.
pub(crate) fn count(debugger: &mut Debugger, calls: &[Call]) -> Result<()> {
    let [vectors, syndrome, link] =
        ["VBAR_EL2", "ESR_EL2", "ELR_EL2"].map(|name| debugger.number(name));
    let (vectors, syndrome, link) = (vectors?, syndrome?, link?);
    let entry = debugger.register(vectors)? + SYNCHRONOUS;
    debugger.set_breakpoint(entry)?;
    let mut counts: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    let mut missing = 1 + calls.len();
    let mut at_entry = false;
    while missing > 0 {
        if !at_entry {
            debugger.resume()?;
        }
        at_entry = false;
        let what = match debugger.register(syndrome)? >> 26 & 0x3f {
            0x16 => {
                let function = debugger.register(0)?;
                let mut calls = calls.iter();
                calls
                    .find(|call| FUNCTION_BASE + call.number == function)
                    .map(|call| call.name.as_str())
            }
            0x20 | 0x24 => Some(FAULT),
            _ => None,
        };
        let Some(what) = what else { continue };
        let counts = counts.entry(what).or_default();
        if counts.len() == SAMPLES {
            continue;
        }
        let back = debugger.register(link)?;
        let before = instructions(debugger)?;
        debugger.set_breakpoint(back)?;
        debugger.resume()?;
        // A host that is denied something goes on elsewhere; it comes back with its next entry.
        at_entry = debugger.register(PC)? == entry;
        if !at_entry {
            counts.push(instructions(debugger)? - before);
        }
        debugger.clear_breakpoint(back)?;
        if counts.len() == SAMPLES {
            counts.sort_unstable();
            let (least, median) = (counts[0], counts[SAMPLES / 2]);
            println!("{what}: {median} instructions at EL2, at least {least}");
            missing -= 1;
        }
    }
    debugger.clear_breakpoint(entry)
}

/// Instructions that the machine has executed.
fn instructions(debugger: &mut Debugger) -> Result<u64> {
    let text = debugger.monitor("info replay")?;
    let count = text.rsplit("instruction count = ").next();
    let digits = count.unwrap_or_default().trim();
    digits
        .parse()
        .map_err(|_| format!("QEMU does not count instructions: {text}").into())
}
