//! The image on `twofold-cpu`.

use crate::image;
use crate::support::{Arena, flat_data};
use anyhow::{Result, bail};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use twofold_cpu::{Exit, Registers, Segment, SystemRegisters};

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
}

/// A case that takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(3);

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
    let mut last_output = 0;
    let result = loop {
        let exit = cpu.run();
        let output = arena.memory(u64::from(saved), 4).to_vec();
        let _ = output;
        let how = match exit {
            Exit::Io { .. } => continue,
            Exit::Halt if cpu.registers().rip > u64::from(image::BASE) => break Ok(()),
            Exit::Halt => left::HALT,
            Exit::Unknown(_) => left::UNKNOWN,
            Exit::Shutdown => left::SHUTDOWN,
            Exit::Kicked => {
                // Twice in the same case?
                let case = arena.memory(u64::from(saved) - 236, 8)[4..].to_vec();
                let case = u32::from_le_bytes(case.try_into().unwrap_or_default()) + 1;
                if last_output != case {
                    last_output = case;
                    continue;
                }
                left::HANGS
            }
            exit => break Err(format!("{exit:?} at {:#x}", cpu.registers().rip)),
        };
        if cpu.registers().rip > u64::from(image::BASE) {
            break Err(format!("{exit:?} at {:#x}", cpu.registers().rip));
        }
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
        cr0: 0x11,
        ..SystemRegisters::reset()
    }
}
