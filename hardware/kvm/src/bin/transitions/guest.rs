//! The guest: three instructions, of which the monitor has one executed at a time.

/// Where the code is.
pub const CODE: u64 = 0x1000;
/// Bytes of the memory around it, from guest-physical 0 on.
pub const LOW_SIZE: u64 = 0x4000;

/// What the guest does once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Read(u64),
    Write(u64, u32),
    Execute(u64),
}

impl Access {
    /// Where the guest starts for it. Each ends in a halt; what is executed is one.
    pub const fn entry(self) -> u64 {
        match self {
            Self::Read(_) => CODE,
            Self::Write(..) => CODE + 4,
            Self::Execute(gpa) => gpa,
        }
    }

    /// What it finds in `eax` and `ebx`.
    pub const fn registers(self) -> (u64, u64) {
        match self {
            Self::Read(gpa) => (0, gpa),
            Self::Write(gpa, value) => (value as u64, gpa),
            Self::Execute(_) => (0, 0),
        }
    }
}

/// `hlt`
pub const HALT: u8 = 0xf4;

/// The code at [`CODE`].
pub const IMAGE: [u8; 7] = [
    0x8b, 0x03, HALT, // mov eax, [ebx]
    0x90, // nop
    0x89, 0x03, HALT, // mov [ebx], eax
];
