//! What the host may have done about the instruction at which a guest stopped.
//!
//! The host writes a [`Request`] into its record of the vCPU. It is carried out when the guest runs
//! again, or at once by `adjust_pc`. A protected guest's instruction is never passed over and none
//! of its registers changed: its host can only answer an access with an abort.

use crate::error::Error;
use crate::exception::{EXTERNAL_ABORT, LENGTH, at_el1, class, synchronous};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::shared::HostVcpu;
use crate::vm::{Registers, VcpuInner, Vm, system};
use twofold_arch::Hpa;

/// A word of the host's record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Request {
    /// The host has done what the instruction would do: the guest goes on behind it. What a read
    /// yields is in [`HostVcpu::DATA`].
    Skip = 1,
    /// The guest gets a synchronous external abort.
    Abort = 2,
    /// The guest's instruction is undefined.
    Undefined = 3,
}

impl Request {
    fn of_word(word: u64) -> Result<Option<Self>, Error> {
        match word {
            0 => Ok(None),
            1 => Ok(Some(Self::Skip)),
            2 => Ok(Some(Self::Abort)),
            3 => Ok(Some(Self::Undefined)),
            _ => Err(Error::Invalid),
        }
    }
}

/// An access whose syndrome tells everything about it (ISV).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Decoded {
    write: bool,
    register: usize,
    /// Bits of the data.
    bits: u32,
    signed: bool,
    /// Whether the register is x, not w.
    wide: bool,
}

impl Decoded {
    fn of_syndrome(syndrome: u64) -> Option<Self> {
        const VALID: u64 = 1 << 24;
        (syndrome & VALID != 0).then_some(Self {
            write: syndrome & 1 << 6 != 0,
            register: (syndrome >> 16 & 0x1f) as usize,
            bits: 8 << (syndrome >> 22 & 3),
            signed: syndrome & 1 << 21 != 0,
            wide: syndrome & 1 << 15 != 0,
        })
    }

    fn clamp(self, data: u64) -> u64 {
        data & (u64::MAX >> (64 - self.bits))
    }

    /// What the instruction writes to memory; register 31 is zero.
    fn written(self, registers: &Registers) -> u64 {
        self.clamp(registers.x.get(self.register).copied().unwrap_or(0))
    }

    /// Ends a read with what memory holds.
    fn read(self, registers: &mut Registers, data: u64) {
        let mut value = self.clamp(data);
        if self.signed {
            let unused = 64 - self.bits;
            value = ((value << unused) as i64 >> unused) as u64;
        }
        if !self.wide {
            value &= 0xffff_ffff;
        }
        if let Some(register) = registers.x.get_mut(self.register) {
            *register = value;
        }
    }
}

/// What a guest stopped at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stopped {
    /// Nothing that the host could do anything about.
    Nothing,
    /// An access to memory.
    Access {
        decoded: Option<Decoded>,
        /// Maintenance of a cache, which moves no data.
        maintenance: bool,
        far: u64,
    },
    /// The fetch of an instruction.
    Fetch { far: u64 },
    /// An instruction that nobody emulates.
    Unknown,
}

impl Stopped {
    /// At an abort.
    pub(crate) fn at_abort(syndrome: u64, far: u64) -> Self {
        match syndrome >> 26 & 0x3f {
            class::INSTRUCTION_ABORT => Self::Fetch { far },
            _ => Self::Access {
                decoded: Decoded::of_syndrome(syndrome),
                maintenance: syndrome & 1 << 8 != 0,
                far,
            },
        }
    }

    /// What the instruction would have written, if it is a store that is understood.
    pub(crate) fn written(self, registers: &Registers) -> Option<u64> {
        match self {
            Self::Access {
                decoded: Some(decoded),
                ..
            } if decoded.write => Some(decoded.written(registers)),
            _ => None,
        }
    }
}

/// The guest takes a synchronous exception to its EL1.
fn take(registers: &mut Registers, syndrome: u64) {
    let (pc, pstate) = synchronous(
        registers.pstate,
        registers.system[system::SCTLR],
        registers.system[system::VBAR],
    );
    registers.system[system::ESR] = syndrome;
    registers.system[system::ELR] = registers.pc;
    registers.system[system::SPSR] = registers.pstate;
    registers.pc = pc;
    registers.pstate = pstate;
}

fn abort(registers: &mut Registers, class: u64, far: u64) {
    let same_level = if at_el1(registers.pstate) {
        class::SAME_LEVEL
    } else {
        0
    };
    registers.system[system::FAR] = far;
    take(
        registers,
        (class + same_level) << 26 | LENGTH | EXTERNAL_ABORT,
    );
}

impl<P: Platform> Hypervisor<'_, P> {
    /// Carries out what the host's record asks, now instead of when the guest runs again.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `host_vcpu` is the record of the vCPU that this processor has
    /// loaded, and for a word that is no request; [`Error::NotPermitted`] for one that does not
    /// belong to what the guest stopped at.
    pub fn adjust_pc(&self, host_vcpu: Hpa) -> Result<(), Error> {
        self.with_named(host_vcpu, |vm, vcpu, record| {
            self.serve_request(vm, &mut vcpu.inner.lock(), record)
        })
    }

    /// Carries out what the host's record asks, if anything, and crosses it out.
    pub(crate) fn serve_request(
        &self,
        vm: &Vm,
        inner: &mut VcpuInner,
        record: HostVcpu,
    ) -> Result<(), Error> {
        let word = record.word(self.platform(), HostVcpu::REQUEST);
        let Some(request) = Request::of_word(word)? else {
            return Ok(());
        };
        let registers = &mut inner.registers;
        match (request, inner.stopped) {
            (
                Request::Skip,
                Stopped::Access {
                    decoded,
                    maintenance,
                    ..
                },
            ) if !vm.protected && (decoded.is_some() || maintenance) => {
                if let Some(decoded) = decoded
                    && !decoded.write
                    && !maintenance
                {
                    let data = record.word(self.platform(), HostVcpu::DATA);
                    decoded.read(registers, data);
                }
                registers.pc = registers.pc.wrapping_add(4);
            }
            (Request::Skip, Stopped::Unknown) if !vm.protected => {
                registers.pc = registers.pc.wrapping_add(4);
            }
            (Request::Abort, Stopped::Access { far, .. }) => {
                abort(registers, class::DATA_ABORT, far);
            }
            (Request::Abort, Stopped::Fetch { far }) => {
                abort(registers, class::INSTRUCTION_ABORT, far);
            }
            (Request::Undefined, Stopped::Unknown) => {
                take(registers, class::UNKNOWN << 26 | LENGTH);
            }
            _ => return Err(Error::NotPermitted),
        }
        inner.stopped = Stopped::Nothing;
        record.set_word(self.platform(), HostVcpu::REQUEST, 0);
        Ok(())
    }
}
