//! Looks into a protected hypervisor that runs on QEMU's machine model, through the debugger's port.
//!
//! `original ADDRESS:PORT [--table] [--count] [NAME=NUMBER...]` waits until a host runs below its
//! stage 2. With `--count` it counts the instructions that EL2 takes for faults of the host and for
//! the calls that are named, with the numbers that this hypervisor has for them. With `--table` it reads the host's
//! stage 2 and decodes it with this project's codec; it fails if an entry has a bit that the codec
//! does not know or maps an address elsewhere than to itself, or if VTCR_EL2 or the root's geometry
//! are not what this project computes. See `hardware/arm64/original.sh`.

mod debugger;
mod figures;
mod table;

use debugger::Debugger;
use figures::Call;
use std::error::Error;
use std::time::Duration;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments
        .next()
        .ok_or("usage: original ADDRESS:PORT [--table] [--count] [NAME=NUMBER...]")?;
    let (options, calls): (Vec<String>, Vec<String>) =
        arguments.partition(|argument| argument.starts_with("--"));
    let calls: Vec<Call> = calls
        .iter()
        .map(|call| Call::parse(call))
        .collect::<Result<_>>()?;
    let wanted = |name: &str| options.iter().any(|option| option == name);
    let mut debugger = Debugger::connect(&address)?;
    let configuration = debugger.number("HCR_EL2")?;
    let mut tries = 0;
    while debugger.register(configuration)? & 1 == 0 {
        tries += 1;
        if tries > 2000 {
            return Err("the host's stage 2 is not turned on".into());
        }
        debugger.run_for(Duration::from_millis(20))?;
    }
    if wanted("--count") {
        figures::count(&mut debugger, &calls)?;
    }
    if wanted("--table") {
        // It has seen some use then.
        debugger.run_for(Duration::from_secs(3))?;
        table::decode_all(debugger)?;
    }
    Ok(())
}
