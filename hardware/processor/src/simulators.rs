//! The image on Bochs and on QEMU.

use crate::image;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Seconds after which Bochs is stopped, for a whole image.
const SECONDS: &str = "120";
/// The same for QEMU, which is only asked what it makes of a difference: what it left until then
/// counts.
const QEMU_SECONDS: &str = "20";

/// Runs the image on Bochs, which finds `rom` at the reset vector.
///
/// # Errors
/// Bochs cannot be run, or leaves no memory behind.
pub fn bochs(image: &[u8], rom: &Path, configuration: &Path, work: &Path) -> Result<Vec<u8>> {
    let model = "tigerlake";
    fs::write(work.join("image.bin"), image)?;
    fs::copy(rom, work.join("rom.bin")).context("the ROM")?;
    let text = fs::read_to_string(configuration)
        .context("the configuration of Bochs")?
        .replace("@DIR@", &work.to_string_lossy())
        .replace("@MODEL@", model)
        // One processor; what the driver asks for and a model refuses is part of a case.
        .replace("count=2", "count=1")
        // Each refused case would be a line in the log.
        .replace("error: action=report", "error: action=ignore");
    fs::write(work.join("bochsrc"), text)?;
    let memory = work.join("memory");
    let _ = fs::remove_file(&memory);
    let length = image::MEMORY - image::OUTPUT as usize;
    fs::write(
        work.join("commands"),
        format!(
            "c\nwritemem \"{}\" {:#x} {length:#x}\nq\n",
            memory.display(),
            image::OUTPUT
        ),
    )?;
    let output = Command::new("timeout")
        .args([SECONDS, "bochs-bin", "-q", "-f"])
        .arg(work.join("bochsrc"))
        .arg("-rc")
        .arg(work.join("commands"))
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .output()
        .context("Bochs cannot be started")?;
    fs::write(work.join("bochs.out"), &output.stdout)?;
    fs::read(&memory).with_context(|| {
        let text = String::from_utf8_lossy(&output.stdout);
        let tail = text.lines().rev().take(12).collect::<Vec<_>>();
        format!(
            "Bochs left no memory behind; it ended with {} and these lines, the last first: {tail:#?}",
            output.status
        )
    })
}

/// The number of the last case that Bochs began when it ran an image that tells.
pub fn last_told(work: &Path) -> Option<usize> {
    let output = fs::read(work.join("bochs.out")).ok()?;
    String::from_utf8_lossy(&output)
        .lines()
        .filter(|line| line.len() == 8)
        .filter_map(|line| usize::from_str_radix(line, 16).ok())
        .next_back()
}

/// Runs the image on QEMU's own processor.
///
/// # Errors
/// QEMU cannot be run.
pub fn qemu(image: &[u8], work: &Path) -> Result<Vec<u8>> {
    let path = work.join("qemu.bin");
    fs::write(&path, image)?;
    let memory = work.join("qemu.memory");
    let _ = fs::remove_file(&memory);
    let size = image::MEMORY >> 20;
    let output = Command::new("timeout")
        .args([QEMU_SECONDS, "qemu-system-x86_64"])
        .args(["-machine", "pc,memory-backend=memory", "-accel", "tcg"])
        .args(["-cpu", "max", "-display", "none", "-nodefaults"])
        .args(["-no-reboot", "-debugcon", "stdio"])
        .args(["-global", "isa-debugcon.iobase=0xe9"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .args(["-m", &format!("{size}M")])
        .arg("-object")
        .arg(format!(
            "memory-backend-file,id=memory,size={size}M,share=on,mem-path={}",
            memory.display()
        ))
        .arg("-kernel")
        .arg(&path)
        .stdin(Stdio::null())
        .output()
        .context("QEMU cannot be started")?;
    let bytes = fs::read(&memory)
        .with_context(|| format!("QEMU: {}", String::from_utf8_lossy(&output.stderr)))?;
    ensure!(
        bytes.len() > image::OUTPUT as usize,
        "QEMU left {} bytes of memory behind",
        bytes.len()
    );
    Ok(bytes[image::OUTPUT as usize..].to_vec())
}
