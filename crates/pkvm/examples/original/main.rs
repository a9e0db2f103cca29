//! Reads the host's stage 2 of the original protected hypervisor from a running machine model, and
//! decodes it with this project's codec.
//!
//! `original ADDRESS` connects to QEMU's debugger port, waits until the kernel has installed the
//! table, and fails if an entry has a bit that the codec does not know, maps an address elsewhere
//! than to itself, or if VTCR_EL2 or the root's geometry are not what this project computes. See
//! `hardware/arm64/original.sh`.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use twofold_arch::Hpa;
use twofold_arch::stage2::{
    Geometry, Granule, Layout, MemoryType, PA_RANGES, Stage2Caps, Stage2Entry, Stage2Flags,
    VTCR_HA, VTCR_VS, decode, vtcr,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// QEMU's debugger, which speaks GDB's remote protocol.
struct Debugger(TcpStream);

impl Debugger {
    fn ask(&mut self, command: &str) -> Result<String> {
        let sum = command.bytes().fold(0u8, u8::wrapping_add);
        write!(self.0, "${command}#{sum:02x}")?;
        let mut answer = Vec::new();
        let mut byte = [0];
        // Acknowledgements come before the answer.
        while byte != *b"$" {
            self.0.read_exact(&mut byte)?;
        }
        loop {
            self.0.read_exact(&mut byte)?;
            match byte {
                [b'#'] => break,
                // The next byte is escaped.
                [b'}'] => {
                    self.0.read_exact(&mut byte)?;
                    answer.push(byte[0] ^ 0x20);
                }
                [byte] => answer.push(byte),
            }
        }
        self.0.read_exact(&mut [0; 2])?;
        self.0.write_all(b"+")?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// A description of registers, all of it.
    fn description(&mut self, name: &str) -> Result<String> {
        let mut text = String::new();
        loop {
            let offset = text.len();
            let part = self.ask(&format!("qXfer:features:read:{name}:{offset:x},800"))?;
            text += part.get(1..).unwrap_or_default();
            if !part.starts_with('m') {
                return Ok(text);
            }
        }
    }

    /// The number of a system register.
    fn number(&mut self, name: &str) -> Result<u32> {
        let text = self.description("system-registers.xml")?;
        let at = text
            .find(&format!("\"{name}\""))
            .ok_or(format!("the debugger does not know {name}"))?;
        let tail = &text[at..];
        let start = tail.find("regnum=\"").ok_or("no number")? + 8;
        let digits: String = tail[start..]
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        Ok(digits.parse()?)
    }

    fn register(&mut self, number: u32) -> Result<u64> {
        word(&self.ask(&format!("p{number:x}"))?)
    }

    /// A table of 512 words at a physical address.
    fn table(&mut self, address: u64) -> Result<Vec<u64>> {
        let mut words = Vec::new();
        for part in 0..8 {
            let text = self.ask(&format!("m{:x},200", address + part * 0x200))?;
            if text.len() != 0x400 {
                return Err(format!("{address:#x} cannot be read: {text}").into());
            }
            for at in (0..text.len()).step_by(16) {
                words.push(word(&text[at..at + 16])?);
            }
        }
        Ok(words)
    }

    /// Lets the machine run for a while.
    fn run_for(&mut self, time: Duration) -> Result<()> {
        self.0.write_all(b"$c#63")?;
        std::thread::sleep(time);
        // An interrupt is one byte, answered by why the machine stopped.
        self.0.write_all(&[3])?;
        let mut byte = [0];
        while byte != *b"#" {
            self.0.read_exact(&mut byte)?;
        }
        self.0.read_exact(&mut [0; 2])?;
        self.0.write_all(b"+")?;
        Ok(())
    }
}

/// A word as the debugger sends it: bytes in order, in hexadecimal.
fn word(text: &str) -> Result<u64> {
    let value = u64::from_str_radix(text, 16).map_err(|_| format!("not a word: {text}"))?;
    Ok(value.swap_bytes())
}

#[derive(Default)]
struct Found {
    leaves: BTreeMap<(i8, &'static str), u64>,
    tables: u64,
    empty: u64,
    annotated: BTreeMap<u64, u64>,
    software: BTreeMap<u64, u64>,
    complaints: Vec<String>,
}

struct Walk {
    debugger: Debugger,
    layout: Layout,
    pa_bits: u32,
    found: Found,
}

impl Walk {
    /// Everything in a table whose first entry is for `address`.
    fn table(&mut self, table: u64, level: i8, address: u64) -> Result<()> {
        let size = 1u64 << self.layout.granule.level_shift(level);
        for (index, entry) in self.debugger.table(table)?.into_iter().enumerate() {
            let address = address + index as u64 * size;
            self.entry(entry, level, address)?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: u64, level: i8, address: u64) -> Result<()> {
        let ends = Stage2Flags::VALID | Stage2Flags::TABLE_OR_PAGE;
        let mask = self.layout.address_mask() | ends.bits();
        match decode(entry, level, self.layout, self.pa_bits) {
            Stage2Entry::Invalid if entry == 0 => self.found.empty += 1,
            Stage2Entry::Invalid => *self.found.annotated.entry(entry).or_default() += 1,
            Stage2Entry::Table { hpa } => {
                self.found.tables += 1;
                if entry & !mask != 0 {
                    self.complain(entry, level, address, "a table with unknown bits");
                }
                self.table(hpa.get(), level + 1, address)?;
            }
            Stage2Entry::Leaf { hpa, flags } => {
                let known =
                    Stage2Flags::all() - Stage2Flags::CONTIGUOUS - Stage2Flags::DIRTY_MODIFIER;
                if entry & !(mask | known.bits()) != 0 {
                    self.complain(entry, level, address, "a leaf with unknown bits");
                }
                if hpa != Hpa::new(address) {
                    self.complain(entry, level, address, "not mapped to itself");
                }
                let kind = match MemoryType::of(entry) {
                    Some(MemoryType::Normal) => "memory",
                    Some(MemoryType::Device) => "device",
                    Some(MemoryType::NormalNonCacheable) => "not cacheable",
                    None => "?",
                };
                if kind == "?" || !flags.contains(Stage2Flags::ACCESSED) {
                    self.complain(entry, level, address, "unknown kind of memory, or no AF");
                }
                *self.found.leaves.entry((level, kind)).or_default() += 1;
                let state = flags.bits() >> 55 & 0xf;
                *self.found.software.entry(state).or_default() += 1;
            }
            Stage2Entry::Reserved => self.complain(entry, level, address, "reserved"),
            Stage2Entry::AddressSize { .. } => {
                self.complain(entry, level, address, "beyond the machine's addresses");
            }
        }
        Ok(())
    }

    fn complain(&mut self, entry: u64, level: i8, address: u64, what: &str) {
        let text = format!("{entry:#018x} at level {level} for {address:#x}: {what}");
        self.found.complaints.push(text);
    }
}

fn main() -> Result<()> {
    let address = std::env::args()
        .nth(1)
        .ok_or("usage: original ADDRESS:PORT of QEMU's debugger")?;
    let stream = TcpStream::connect(&address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut debugger = Debugger(stream);
    debugger.ask("qSupported:xmlRegisters=aarch64")?;
    debugger.description("target.xml")?;
    let [root, control, configuration] =
        ["VTTBR_EL2", "VTCR_EL2", "HCR_EL2"].map(|name| debugger.number(name));
    let (root, control, configuration) = (root?, control?, configuration?);
    // The host's stage 2 is on, and has seen some use.
    let mut tries = 0;
    while debugger.register(configuration)? & 1 == 0 {
        tries += 1;
        if tries > 60 {
            return Err("the kernel does not turn its host's stage 2 on".into());
        }
        debugger.run_for(Duration::from_millis(500))?;
    }
    debugger.run_for(Duration::from_secs(3))?;
    let (vttbr, theirs) = (debugger.register(root)?, debugger.register(control)?);
    debugger.ask("Qqemu.PhyMemMode:1")?;
    let layout = Layout::new(Granule::K4, false);
    let geometry = Geometry::new(layout, 64 - (theirs & 0x3f) as u32)
        .map_err(|error| format!("VTCR_EL2 {theirs:#x}: {error:?}"))?;
    let caps = Stage2Caps {
        pa_bits: PA_RANGES[(theirs >> 16 & 7).min(6) as usize],
        vmid16: theirs & VTCR_VS != 0,
        hardware_access_flag: theirs & VTCR_HA != 0,
        hardware_dirty: false,
    };
    let ours = vtcr(geometry, caps);
    println!("VTTBR_EL2 {vttbr:#x}, VTCR_EL2 {theirs:#x}: {geometry:?}");
    let mut walk = Walk {
        debugger,
        layout,
        pa_bits: caps.pa_bits,
        found: Found::default(),
    };
    if ours != theirs {
        let text = format!("VTCR_EL2 is {theirs:#x}, and {ours:#x} by our arithmetic");
        walk.found.complaints.push(text);
    }
    let page = vttbr & ((1 << 48) - 2);
    for number in 0..u64::from(geometry.root_pages) {
        let covered = 1u64 << layout.granule.level_shift(geometry.start_level - 1);
        walk.table(page + number * 4096, geometry.start_level, number * covered)?;
    }
    let found = walk.found;
    for ((level, kind), count) in &found.leaves {
        println!("level {level}, {kind}: {count} leaves");
    }
    println!("{} tables, {} empty entries", found.tables, found.empty);
    for (entry, count) in &found.annotated {
        println!("annotation {entry:#x}: {count} pages");
    }
    println!(
        "software bits of leaves, and how many have them: {:?}",
        found.software
    );
    for complaint in &found.complaints {
        println!("COMPLAINT: {complaint}");
    }
    if !found.complaints.is_empty() || found.leaves.is_empty() || found.annotated.is_empty() {
        return Err("the original's table is not what this project's codec expects".into());
    }
    println!("every entry is understood");
    Ok(())
}
