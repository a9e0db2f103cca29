//! What the debug registers ask for: breakpoints on instructions, data and ports, and general
//! detect (SDM Vol. 3, "Debug Registers").
//!
//! Nothing of this is on the path of a guest without breakpoints. While one on data is armed the
//! translation cache holds no entry for the pages it touches, so that every access there goes the
//! slow way and is looked at. While one on instructions is armed, blocks have one instruction and
//! its address is looked at between blocks.

use crate::core_state::Core;
use crate::state::cr4;
use crate::trap::{Exception, Exit, Trap, vector};

/// Bits of DR6.
pub(crate) mod dr6 {
    /// Debug register access detected.
    pub(crate) const BD: u64 = 1 << 13;
    /// Single step.
    pub(crate) const BS: u64 = 1 << 14;
    /// Bits 0 to 3: which breakpoint matched.
    pub(crate) const MATCHED: u64 = 0xf;
    /// Bits that MOV can change: bits 0 to 3, BD, BS and BT.
    pub(crate) const WRITABLE: u64 = 0xe00f;
    /// Bits that read as one: reserved ones, and those of features that are not there.
    pub(crate) const ONES: u64 = 0xffff_0ff0;
}

/// Bits of DR7.
pub(crate) mod dr7 {
    /// General detect enable.
    pub(crate) const GD: u64 = 1 << 13;
    /// Bits that MOV can change.
    pub(crate) const WRITABLE: u64 = 0xffff_2bff;
    /// The bit that reads as one.
    pub(crate) const ONES: u64 = 1 << 10;
}

/// What a breakpoint waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Execute,
    Write,
    Port,
    ReadWrite,
}

/// An armed breakpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Point {
    kind: Kind,
    first: u64,
    last: u64,
}

impl Point {
    fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

/// The breakpoints in force, and what has matched.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Breakpoints {
    points: [Option<Point>; 4],
    /// One waits for an instruction.
    pub(crate) on_code: bool,
    /// One waits for a data access.
    pub(crate) on_data: bool,
    /// Bits of DR6 for the debug trap that follows the current instruction.
    pub(crate) pending: u64,
    /// Bits of DR6 for when the port access in progress completes.
    pub(crate) port_access: u64,
}

impl Breakpoints {
    /// What the registers ask for.
    fn new(addresses: [u64; 4], control: u64, on_ports: bool) -> Self {
        let mut breakpoints = Self::default();
        for (i, (point, address)) in breakpoints.points.iter_mut().zip(addresses).enumerate() {
            if control >> (2 * i) & 3 == 0 {
                continue;
            }
            let bytes = [1u64, 2, 8, 4][(control >> (18 + 4 * i) & 3) as usize];
            let kind = match control >> (16 + 4 * i) & 3 {
                0 => Kind::Execute,
                1 => Kind::Write,
                2 if on_ports => Kind::Port,
                // Undefined without CR4.DE.
                2 => continue,
                _ => Kind::ReadWrite,
            };
            let first = if kind == Kind::Execute {
                address
            } else {
                address & !(bytes - 1)
            };
            let last = if kind == Kind::Execute {
                address
            } else {
                first | (bytes - 1)
            };
            *point = Some(Point { kind, first, last });
            breakpoints.on_code |= kind == Kind::Execute;
            breakpoints.on_data |= matches!(kind, Kind::Write | Kind::ReadWrite);
        }
        breakpoints
    }

    /// DR6's bits for the armed breakpoints of the given kinds that touch `first..=last`.
    fn matching(&self, first: u64, last: u64, wanted: impl Fn(Kind) -> bool) -> u64 {
        let mut bits = 0;
        for (i, point) in self.points.iter().enumerate() {
            if point.is_some_and(|point| wanted(point.kind) && point.overlaps(first, last)) {
                bits |= 1 << i;
            }
        }
        bits
    }

    fn on_access(&self, first: u64, last: u64, write: bool) -> u64 {
        self.matching(first, last, |kind| match kind {
            Kind::ReadWrite => true,
            Kind::Write => write,
            Kind::Execute | Kind::Port => false,
        })
    }

    /// Whether no access of this kind to the page that holds `linear` may go unseen.
    pub(crate) fn watches_page(&self, linear: u64, write: bool) -> bool {
        const PAGE: u64 = twofold_arch::PAGE_SIZE - 1;
        self.on_data && self.on_access(linear & !PAGE, linear | PAGE, write) != 0
    }
}

impl Core {
    /// Looks anew at the debug registers. Called after every change of them, of CR4.DE, and of what
    /// the hypervisor wants to see.
    pub(crate) fn update_breakpoints(&mut self) {
        let (addresses, control) = self
            .debug_control
            .hardware_breakpoints
            .unwrap_or((self.debug.db, self.debug.dr7));
        let before = self.breakpoints;
        let on_ports = self.cr4 & cr4::DE != 0;
        self.breakpoints = Breakpoints {
            pending: before.pending,
            port_access: before.port_access,
            ..Breakpoints::new(addresses, control, on_ports)
        };
        let armed = before.on_data || self.breakpoints.on_data;
        if armed && before.points != self.breakpoints.points {
            self.flush_tlb();
        }
        self.attention = true;
        self.update_mode();
    }

    /// The DR7 in force.
    pub(crate) fn effective_dr7(&self) -> u64 {
        self.debug_control
            .hardware_breakpoints
            .map_or(self.debug.dr7, |(_, dr7)| dr7)
    }

    /// Notes that data is accessed: a match becomes a trap after the instruction.
    #[inline(always)]
    pub(crate) fn note_access(&mut self, linear: u64, size: u64, write: bool) {
        if self.breakpoints.on_data {
            self.match_access(linear, size, write);
        }
    }

    #[cold]
    fn match_access(&mut self, linear: u64, size: u64, write: bool) {
        let last = linear.saturating_add(size - 1);
        let bits = self.breakpoints.on_access(linear, last, write);
        if bits != 0 {
            self.breakpoints.pending |= bits;
            self.attention = true;
            self.stop = true;
        }
    }

    /// Notes that ports are accessed: a match becomes a trap once the access is complete.
    pub(crate) fn note_port_access(&mut self, port: u16, size: u64) {
        let first = u64::from(port);
        self.breakpoints.port_access = self
            .breakpoints
            .matching(first, first + size - 1, |kind| kind == Kind::Port);
    }

    /// The port access in progress is complete.
    pub(crate) fn port_access_done(&mut self) {
        let bits = std::mem::take(&mut self.breakpoints.port_access);
        if bits != 0 {
            self.breakpoints.pending |= bits;
            self.attention = true;
            self.stop = true;
        }
    }

    /// DR6's bits for breakpoints on the instruction at RIP.
    pub(crate) fn matches_instruction(&self) -> u64 {
        let linear = self.code_linear(self.rip);
        self.breakpoints
            .matching(linear, linear, |kind| kind == Kind::Execute)
    }

    /// Whether debug exceptions are the hypervisor's to see, not the guest's.
    pub(crate) fn debugged_from_outside(&self) -> bool {
        self.debug_control.single_step || self.debug_control.hardware_breakpoints.is_some()
    }

    /// The exit that tells the hypervisor of a debug exception at `ip`.
    pub(crate) fn debug_exit(&self, ip: u64, bits: u64) -> Exit {
        Exit::Debug {
            exception: vector::DB,
            pc: self.code_linear(ip),
            dr6: dr6::ONES | bits,
            dr7: self.effective_dr7(),
        }
    }

    /// The debug exception of an instruction at `ip` that touches a debug register while general
    /// detect is on.
    pub(crate) fn general_detect(&mut self, ip: u64) -> Result<(), Trap> {
        if self.effective_dr7() & dr7::GD == 0 {
            return Ok(());
        }
        Err(if self.debugged_from_outside() {
            self.leave(self.debug_exit(ip, dr6::BD))
        } else {
            self.raise(debug_exception(dr6::BD))
        })
    }

    /// The debug trap that is due after an instruction, if one is. MOV SS and POP SS put it off.
    pub(crate) fn debug_trap(&mut self) -> Option<Exit> {
        let bits = self.breakpoints.pending;
        if bits == 0 || self.events.exception.is_some() {
            return None;
        }
        if self.events.mov_ss_shadow && !self.debug_control.single_step {
            return None;
        }
        self.breakpoints.pending = 0;
        if self.debugged_from_outside() {
            return Some(self.debug_exit(self.rip, bits));
        }
        self.events.exception = Some(debug_exception(bits));
        None
    }
}

/// #DB with bits of DR6.
pub(crate) fn debug_exception(bits: u64) -> Exception {
    Exception {
        vector: vector::DB,
        error_code: None,
        payload: Some(bits),
    }
}
