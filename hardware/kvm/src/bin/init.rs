//! The first and only process of the machine with the real KVM: loads it, has it trace what it does
//! to its tables, runs the program, and prints the trace to the second serial port.

// UNSAFETY: system calls that only the first process makes.
#![expect(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, ensure};

/// In the order in which they need each other.
const MODULES: [&str; 4] = ["irqbypass", "ccp", "kvm", "kvm-amd"];
const TRACING: &str = "/sys/kernel/tracing";
/// What is traced: everything of the MMU, and the faults that it is asked to resolve.
const EVENTS: [&str; 2] = ["kvmmmu", "kvm/kvm_page_fault"];
const OUTPUT: &str = "/dev/ttyS1";

fn main() {
    if let Err(error) = run() {
        println!("init: {error:#}");
    }
    let _ = io::stdout().flush();
    // SAFETY: no argument is an address.
    unsafe {
        libc::sync();
        libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF);
    }
}

fn run() -> Result<()> {
    mount(c"proc", c"/proc")?;
    mount(c"sysfs", c"/sys")?;
    mount(c"devtmpfs", c"/dev")?;
    mount(c"tracefs", c"/sys/kernel/tracing")?;
    for module in MODULES {
        load(module)?;
    }
    // Off by default on so small a machine.
    write("/sys/kernel/mm/transparent_hugepage/enabled", "madvise")?;
    set("buffer_size_kb", "16384")?;
    for event in EVENTS {
        set(&format!("events/{event}/enable"), "1")?;
    }
    let usual = transitions("usual")?;
    for (parameter, value) in [("nx_huge_pages", "Y"), ("eager_page_split", "N")] {
        write(&format!("/sys/module/kvm/parameters/{parameter}"), value)?;
    }
    let careful = transitions("careful")?;
    set("tracing_on", "0")?;
    let trace = fs::read(format!("{TRACING}/trace")).context("no trace")?;
    let mut output = OpenOptions::new().write(true).open(OUTPUT)?;
    output.write_all(&trace)?;
    output.flush()?;
    // SAFETY: waits until everything was sent.
    unsafe { libc::tcdrain(output.as_raw_fd()) };
    for status in [usual, careful] {
        ensure!(status.success(), "the program failed: {status}");
    }
    Ok(())
}

/// Runs a part of the program.
fn transitions(part: &str) -> Result<ExitStatus> {
    Command::new("/transitions")
        .args([part, &format!("{TRACING}/trace_marker")])
        .status()
        .context("cannot start the program")
}

fn mount(kind: &CStr, at: &CStr) -> Result<()> {
    let path = at.to_str()?;
    fs::create_dir_all(path)?;
    // SAFETY: strings that end, and no data.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("cannot mount {path}"));
    }
    Ok(())
}

fn load(module: &str) -> Result<()> {
    let path = format!("/modules/{module}.ko.xz");
    let file = File::open(&path).context(path)?;
    let parameters = CString::default();
    /// `MODULE_INIT_COMPRESSED_FILE`.
    const COMPRESSED: u32 = 4;
    // SAFETY: a file, and a string that ends.
    let result = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            parameters.as_ptr(),
            COMPRESSED,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error())
            .with_context(|| format!("the kernel refuses {module}"));
    }
    Ok(())
}

fn set(file: &str, value: &str) -> Result<()> {
    write(&format!("{TRACING}/{file}"), value)
}

fn write(path: &str, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("cannot write {value} to {path}"))
}
