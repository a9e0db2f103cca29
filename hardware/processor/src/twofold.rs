//! The image on `twofold-cpu`.

use crate::image;
use crate::support::{Arena, flat_data};
use anyhow::{Result, bail};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use twofold_cpu::{Exit, Registers, Segment, SystemRegisters, TableRegister};

/// Vectors that stand for the ways in which a processor leaves a case without an exception.
pub mod left {
    /// It asks for emulation: Twofold does not do this.
    pub const UNKNOWN: u32 = 0x100;
    /// Triple fault.
    pub const SHUTDOWN: u32 = 0x101;
    /// HLT.
    pub const HALT: u32 = 0x102;
    /// It did not come back in time.
    pub const HANGS: u32 = 0x103;
    /// For another reason: an access where no memory is, for instance.
    pub const OTHERWISE: u32 = 0x104;

    /// What such a vector stands for, in words.
    pub fn name(vector: u32) -> Option<&'static str> {
        Some(match vector {
            UNKNOWN => "emulation error",
            SHUTDOWN => "shutdown",
            HALT => "halt",
            HANGS => "no end",
            OTHERWISE => "no memory there",
            _ => return None,
        })
    }
}

/// A case that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(1);

/// Runs the image, and gives what is in memory from [`image::OUTPUT`] on.
///
/// # Errors
/// The processor leaves the driver itself in a way that it must not.
pub fn run(driver: &[u8], image: &[u8]) -> Result<Vec<u8>> {
    let [saved, home, ..] = image::addresses(driver)?;
    let mut arena = Arena::large(image::MEMORY);
    arena.write(image::BASE as usize, image);
    let mut cpu = arena.processor(46);
    let entry = u64::from(u32::from_le_bytes(
        image[0x20..0x24].try_into().unwrap_or_default(),
    ));
    cpu.set_system_registers(&flat());
    cpu.set_registers(&Registers {
        rip: entry,
        rflags: 2,
        ..Registers::default()
    });
    let line = Arc::clone(cpu.line());
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let watch = thread::spawn(move || {
        while finished.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            line.kick();
        }
    });
    // Cases that are over for another reason than an exception, and that have been kicked once.
    let (mut ended, mut slow) = (None, None);
    let result = loop {
        let exit = cpu.run();
        let how = match exit {
            Exit::Io { .. } => continue,
            Exit::Halt if cpu.registers().rip > u64::from(image::BASE) => break Ok(()),
            Exit::Halt => left::HALT,
            Exit::Unknown(_) => left::UNKNOWN,
            Exit::Shutdown => left::SHUTDOWN,
            Exit::Kicked => {
                // Twice in the same case?
                cpu.line().cancel_kick();
                let case = current(&mut arena, saved);
                if slow != Some(case) {
                    slow = Some(case);
                    continue;
                }
                left::HANGS
            }
            _ => left::OTHERWISE,
        };
        if ended == Some(current(&mut arena, saved)) {
            break Err(format!("{exit:?} at {:#x}", cpu.registers().rip));
        }
        ended = Some(current(&mut arena, saved));
        // The case is over; what the processor had come to is not looked at.
        let saved = saved as usize;
        arena.write(saved + 4, &how.to_le_bytes());
        cpu.set_system_registers(&flat());
        cpu.set_registers(&Registers {
            rip: home.into(),
            rflags: 2,
            ..Registers::default()
        });
    };
    drop(done);
    let _ = watch.join();
    if let Err(problem) = result {
        bail!("twofold-cpu left the driver with {problem}");
    }
    Ok(arena
        .memory(image::OUTPUT.into(), image::MEMORY - image::OUTPUT as usize)
        .to_vec())
}

/// The number of the case that runs.
fn current(arena: &mut Arena, saved: u32) -> u32 {
    let context = u64::from(saved).next_multiple_of(8) - image::CONTEXT_BYTES as u64;
    let mut number = [0; 4];
    number.copy_from_slice(arena.memory((context & !7) + 4, 4));
    u32::from_le_bytes(number)
}

/// 32-bit mode with flat segments, as a boot loader leaves it. The selectors are the driver's.
fn flat() -> SystemRegisters {
    let data = flat_data(0x10, 0);
    SystemRegisters {
        cs: Segment {
            selector: 8,
            kind: 11,
            ..data
        },
        ds: data,
        es: data,
        ss: data,
        fs: data,
        gs: data,
        // Where the driver puts its own.
        gdt: TableRegister {
            base: 0x1000,
            limit: 0x2f,
        },
        cr0: 0x11,
        ..SystemRegisters::reset()
    }
}
