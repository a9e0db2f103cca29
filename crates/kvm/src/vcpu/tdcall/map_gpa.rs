//! MapGPA: the guest wants a range of memory to be private, or shared (SPEC 5.10).
//!
//! The program is asked for one piece of 2 MiB at a time, by `KVM_EXIT_HYPERCALL`. Between two, an
//! interrupt or signal that waits ends the call, and the guest is told where to go on.

use super::super::exit::Answer;
use super::super::run::Next;
use super::super::{Vcpu, VcpuState};
use super::vmcall::{Call, CallStatus, R11, R12, R13, VmcallAnswer};
use kvm_bindings::KVM_EXIT_HYPERCALL;
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use twofold_arch::PAGE_SIZE;

/// Bytes that the program is asked for at a time.
const PIECE: u64 = 2 << 20;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED`: to private.
const ENCRYPTED: u64 = 1 << 4;

/// How far a conversion has come. Addresses have the shared bit if memory is to become shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct MapGpa {
    /// The piece that the program is asked for now.
    next: u64,
    end: u64,
    shared_bit: u32,
}

impl MapGpa {
    /// Start in R12, bytes in R13.
    fn parse(start: u64, bytes: u64, shared_bit: u32) -> Result<Self, CallStatus> {
        let end = start.checked_add(bytes);
        let end = end
            .filter(|end| *end > start)
            .ok_or(CallStatus::InvalidOperand)?;
        // Neither end may have a bit that addresses do not have, and both are of one kind.
        let half = |address: u64| address >> shared_bit;
        if half(start) > 1 || half(start) != half(end - 1) {
            return Err(CallStatus::InvalidOperand);
        }
        if !start.is_multiple_of(PAGE_SIZE) || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(CallStatus::AlignError);
        }
        Ok(Self {
            next: start,
            end,
            shared_bit,
        })
    }

    /// What the program is asked: address, pages, attributes.
    const fn arguments(&self) -> [u64; 3] {
        let shared = 1 << self.shared_bit;
        let left = self.end - self.next;
        let bytes = if left < PIECE { left } else { PIECE };
        let attributes = if self.next & shared == 0 {
            ENCRYPTED
        } else {
            0
        };
        [self.next & !shared, bytes / PAGE_SIZE, attributes]
    }

    /// After the piece has been done: what is left.
    fn after_piece(self) -> Option<Self> {
        let next = self.next.checked_add(PIECE)?;
        (next < self.end).then_some(Self { next, ..self })
    }
}

impl Vcpu {
    pub(super) fn td_map_gpa(&self, state: &mut VcpuState, mut call: Call) -> Next {
        let start = call.get(R12);
        let shared_bit = self.vm.td().and_then(|td| Some(td.params()?.shared_bit()));
        let request = match shared_bit.filter(|_| self.exits_for_map_gpa()) {
            Some(shared_bit) => MapGpa::parse(start, call.get(R13), shared_bit),
            None => Err(CallStatus::Unsupported),
        };
        match request {
            Ok(request) => Next::Return(self.ask_for_piece(state, request)),
            Err(status) => {
                call.set(R11, start);
                call.finish(state, status);
                Next::Enter
            }
        }
    }

    fn ask_for_piece(&self, state: &mut VcpuState, request: MapGpa) -> u32 {
        state.answer = Answer::Vmcall(VmcallAnswer::MapGpa(request));
        self.exit_for_map_gpa(request.arguments(), true);
        KVM_EXIT_HYPERCALL
    }

    /// The program has answered for a piece.
    pub(super) fn continue_map_gpa(
        &self,
        state: &mut VcpuState,
        mut call: Call,
        request: MapGpa,
    ) -> Option<u32> {
        /// The program wants to be asked again for this piece.
        const AGAIN: u64 = Errno::AGAIN.raw_os_error() as u64;
        let (status, next) = match self.core.run.hypercall_result() {
            0 => match request.after_piece() {
                Some(rest) if !self.has_event(state) => {
                    return Some(self.ask_for_piece(state, rest));
                }
                Some(rest) => (CallStatus::Retry, Some(rest.next)),
                None => (CallStatus::Success, None),
            },
            AGAIN => (CallStatus::Retry, Some(request.next)),
            _ => (CallStatus::InvalidOperand, Some(request.next)),
        };
        if let Some(next) = next {
            call.set(R11, next);
        }
        call.finish(state, status);
        None
    }

    /// Whether something waits that should not wait for the whole conversion.
    fn has_event(&self, state: &VcpuState) -> bool {
        state.has_interrupt(self.vm.has_external()) || self.core.signalled.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;

    #[test]
    fn a_request_of_five_megabytes_has_three_pieces() {
        for (shared_bit, start, attributes) in
            [(47, 0x10_1000, ENCRYPTED), (51, 1 << 51 | 0x10_1000, 0)]
        {
            let mut request = MapGpa::parse(start, 5 * M, shared_bit);
            let mut pieces = Vec::new();
            while let Ok(piece) = request {
                pieces.push(piece.arguments());
                request = piece.after_piece().ok_or(CallStatus::Success);
            }
            let at = |offset: u64| 0x10_1000 + offset;
            assert_eq!(
                pieces,
                [
                    [at(0), 512, attributes],
                    [at(2 * M), 512, attributes],
                    [at(4 * M), 256, attributes],
                ]
            );
        }
    }

    #[test]
    fn requests_are_refused_as_documented() {
        use CallStatus::{AlignError, InvalidOperand};
        for shared_bit in [47, 51] {
            let shared = 1 << shared_bit;
            for (start, bytes, status) in [
                (0x1000, 0, InvalidOperand),
                (u64::MAX - 0xfff, 0x2000, InvalidOperand),
                (shared - 0x1000, 0x2000, InvalidOperand),
                (2 * shared, 0x1000, InvalidOperand),
                (2 * shared - 0x1000, 0x2000, InvalidOperand),
                (0, 2 * shared, InvalidOperand),
                (0x1001, 0x1000, AlignError),
                (0x1000, 0x800, AlignError),
                (0x1001, 0xfff, AlignError),
                // What cannot be an address is worse than what is not aligned.
                ((2 * shared) | 1, 0x1000, InvalidOperand),
            ] {
                let parsed = MapGpa::parse(start, bytes, shared_bit);
                assert_eq!(parsed, Err(status), "{start:#x} {bytes:#x}");
            }
            for start in [0, shared - 0x1000, shared, 2 * shared - 0x1000] {
                assert!(MapGpa::parse(start, 0x1000, shared_bit).is_ok());
            }
        }
    }
}
