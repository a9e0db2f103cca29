//! QEMU's debugger port.

use crate::Result;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// QEMU's debugger, which speaks GDB's remote protocol.
pub(crate) struct Debugger(TcpStream);

impl Debugger {
    /// Connects to the debugger's port, for which QEMU may take a moment.
    pub(crate) fn connect(address: &str) -> Result<Self> {
        let mut tries = 0;
        let stream = loop {
            match TcpStream::connect(address) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused && tries < 100 => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(200));
                }
                connected => break connected?,
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_nodelay(true)?;
        let mut debugger = Self(stream);
        debugger.ask("qSupported:xmlRegisters=aarch64")?;
        debugger.description("target.xml")?;
        Ok(debugger)
    }

    /// The answer to a command.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String> {
        let sum = command.bytes().fold(0u8, u8::wrapping_add);
        let packet = format!("${command}#{sum:02x}");
        self.0.write_all(packet.as_bytes())?;
        self.receive()
    }

    /// The next packet.
    fn receive(&mut self) -> Result<String> {
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

    /// What QEMU's own monitor says to a command.
    pub(crate) fn monitor(&mut self, command: &str) -> Result<String> {
        let digits: String = command.bytes().map(|byte| format!("{byte:02x}")).collect();
        let mut answer = self.ask(&format!("qRcmd,{digits}"))?;
        let mut text = String::new();
        while let Some(digits) = answer.strip_prefix('O').filter(|_| answer != "OK") {
            for at in (0..digits.len()).step_by(2) {
                let byte = digits.get(at..at + 2).ok_or("half a byte")?;
                text.push(char::from(u8::from_str_radix(byte, 16)?));
            }
            answer = self.receive()?;
        }
        Ok(text)
    }

    /// A description of registers, all of it.
    pub(crate) fn description(&mut self, name: &str) -> Result<String> {
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
    pub(crate) fn number(&mut self, name: &str) -> Result<u32> {
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

    /// The value of a register by its number.
    pub(crate) fn register(&mut self, number: u32) -> Result<u64> {
        word(&self.ask(&format!("p{number:x}"))?)
    }

    /// Lets the machine run to the next breakpoint, beyond one that it stands at.
    pub(crate) fn resume(&mut self) -> Result<()> {
        self.ask("s")?;
        self.ask("c")?;
        Ok(())
    }

    /// Stops the machine where it would execute an instruction.
    pub(crate) fn set_breakpoint(&mut self, address: u64) -> Result<()> {
        self.accepted(&format!("Z1,{address:x},4"))
    }

    /// No longer.
    pub(crate) fn clear_breakpoint(&mut self, address: u64) -> Result<()> {
        self.accepted(&format!("z1,{address:x},4"))
    }

    fn accepted(&mut self, command: &str) -> Result<()> {
        match self.ask(command)?.as_str() {
            "OK" => Ok(()),
            answer => Err(format!("the debugger answers {command} with {answer:?}").into()),
        }
    }

    /// A table of 512 words at a physical address.
    pub(crate) fn table(&mut self, address: u64) -> Result<Vec<u64>> {
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
    pub(crate) fn run_for(&mut self, time: Duration) -> Result<()> {
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

/// A word as the debugger sends it: up to eight bytes in order, in hexadecimal.
fn word(text: &str) -> Result<u64> {
    let value = u64::from_str_radix(text, 16).map_err(|_| format!("not a word: {text}"))?;
    let unused = 64 - 4 * text.len().min(16) as u32;
    Ok(value.swap_bytes() >> unused)
}
