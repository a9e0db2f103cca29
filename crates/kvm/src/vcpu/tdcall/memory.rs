//! Emulated memory: the guest has decoded the instruction itself, after #VE, and asks KVM for one
//! access (`#VE.RequestMMIO`).

use super::super::exit::Answer;
use super::super::run::Next;
use super::super::{Vcpu, VcpuState};
use super::vmcall::{Call, CallStatus, R12, R13, R14, R15, VmcallAnswer};
use crate::bus::Space;
use kvm_bindings::KVM_EXIT_MMIO;

/// An access to emulated memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    /// Without the shared bit.
    gpa: u64,
    /// 1, 2, 4 or 8.
    size: u8,
    write: bool,
}

impl Access {
    /// Bytes in R12, direction in R13 (1 to write), address in R14. All of it has to be shared.
    fn parse(size: u64, direction: u64, address: u64, shared_bit: u32) -> Option<Self> {
        let is_shared = |address: u64| address >> shared_bit == 1;
        let (1 | 2 | 4 | 8, 0 | 1) = (size, direction) else {
            return None;
        };
        let last = address.checked_add(size - 1)?;
        (is_shared(address) && is_shared(last)).then_some(Self {
            gpa: address & !(1 << shared_bit),
            size: size as u8,
            write: direction == 1,
        })
    }
}

impl Vcpu {
    /// One access; data is in R15, or returned in R11. Devices of the VM's own come first.
    pub(super) fn td_memory(&self, state: &mut VcpuState, call: Call) -> Next {
        self.core.counters.mmio_exits.increment();
        let shared_bit = self.vm.td().and_then(|td| Some(td.params()?.shared_bit()));
        let access = shared_bit.and_then(|shared_bit| {
            Access::parse(call.get(R12), call.get(R13), call.get(R14), shared_bit)
        });
        let Some(Access { gpa, size, write }) = access else {
            call.finish(state, CallStatus::InvalidOperand);
            return Next::Enter;
        };
        let mut data = [0; 8];
        if write {
            let bytes = usize::from(size);
            data[..bytes].copy_from_slice(&call.get(R15).to_le_bytes()[..bytes]);
            call.finish(state, CallStatus::Success);
            if self.vm.buses().write(Space::Memory, gpa, &data[..bytes]) {
                return Next::Enter;
            }
        } else {
            let size = usize::from(size);
            state.answer = Answer::Vmcall(VmcallAnswer::Memory { size });
        }
        self.core.run.set_mmio(gpa, data, size.into(), write);
        Next::Return(KVM_EXIT_MMIO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_accesses_to_shared_memory_are_taken() {
        for shared_bit in [47, 51] {
            let shared = 1_u64 << shared_bit;
            let parse =
                |size, direction, address| Access::parse(size, direction, address, shared_bit);
            for size in 0..=16 {
                let taken = parse(size, 0, shared | 0x1000).is_some();
                assert_eq!(taken, matches!(size, 1 | 2 | 4 | 8), "{size}");
            }
            for direction in 0..4 {
                let taken = parse(4, direction, shared).map(|access| access.write);
                assert_eq!(
                    taken,
                    [Some(false), Some(true), None, None][direction as usize]
                );
            }
            assert_eq!(
                parse(8, 1, shared | 0xfec0_0004),
                Some(Access {
                    gpa: 0xfec0_0004,
                    size: 8,
                    write: true
                })
            );
            for address in [
                0x1000,
                shared - 4,
                2 * shared - 4,
                2 * shared,
                (2 * shared) | shared,
                u64::MAX - 3,
            ] {
                assert_eq!(parse(8, 0, address), None, "{address:#x}");
            }
        }
    }
}
