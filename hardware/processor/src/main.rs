//! The same machine code on `twofold-cpu`, on Bochs and on QEMU: what the host's processor cannot
//! judge because it runs 64-bit user code only.
//!
//! One [image] holds a driver and a table of cases: a state of the processor, memory, a few
//! instructions. The driver enters each, catches the exception that ends it, and writes down
//! everything it can find. The image runs unmodified on each machine, and what it wrote is compared.
#![allow(missing_docs, unreachable_pub)]

mod case;
mod image;
mod initial;
mod layout;
mod simulators;
#[path = "../../../crates/cpu/tests/support/mod.rs"]
mod support;
mod twofold;

use anyhow::{Context, Result};
use std::path::PathBuf;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let mut next = |what| arguments.next().context(what);
    let driver = std::fs::read(next("the assembled driver")?)?;
    let rom = next("the ROM")?;
    let configuration = next("the configuration of Bochs")?;
    let work = next("a folder to work in")?;
    // add bx, cx
    let cases = vec![case::Case::real("add").with_code(&[0x01, 0xcb])];
    let image = image::build(&driver, &cases, true)?;
    let ours = image::records(&twofold::run(&driver, &image)?, cases.len())?;
    println!("{ours:#x?}");
    let theirs = simulators::bochs(&image, &rom, &configuration, &work)?;
    let theirs = image::records(&theirs, cases.len())?;
    println!("{}", ours == theirs);
    println!("{theirs:#x?}");
    let theirs = simulators::qemu(&image, &work)?;
    let theirs = image::records(&theirs, cases.len())?;
    println!("{}", ours == theirs);
    Ok(())
}
