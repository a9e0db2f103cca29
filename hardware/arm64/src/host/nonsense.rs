//! Numbers that mean nothing.

use crate::calls::{audit, call, raw};
use crate::story::FREE;
use crate::vm::{PAGE, Pages, check};
use twofold_pkvm::hypercall::{Call, FUNCTION_BASE};

/// The call of this image's own that must not be hit.
const AUDIT: u64 = 0xc600_ff00;

/// Random numbers, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Few numbers, so that some calls mean something; `spare` is a page that may be lost.
    fn number(&mut self, spare: u64) -> u64 {
        let random = self.next();
        match random % 5 {
            0 => random,
            1 => spare + random % 7,
            2 => 0x1000 + random % 3,
            3 => random % 600,
            _ => 1 << (random % 64),
        }
    }
}

/// Makes `count` calls; how many were known. `allowed` says which may be made at all.
fn call_at_random(count: u64, spare: u64, allowed: impl Fn(u64) -> bool) -> u64 {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut known = 0;
    for round in 0..count {
        let function = match round % 4 {
            0 => random.next(),
            _ => FUNCTION_BASE + random.next() % 96,
        };
        if function == AUDIT || !allowed(function) {
            continue;
        }
        let mut arguments = [0; 5].map(|_: u64| random.number(spare));
        // A page of the program itself is the host's to give away, and would be its end.
        let program = 0x4400_0000 / PAGE..(FREE / PAGE).min(spare);
        if program.contains(&arguments[0]) {
            arguments[0] = spare;
        }
        known += u64::from(raw(function, arguments)[0] == 0);
    }
    known
}

/// Before anything is finalised; finalising itself is left out.
pub(crate) fn before() {
    let known = call_at_random(1000, FREE / PAGE, |function| {
        function != Call::ProtFinalize.function()
    });
    check!(
        audit().is_some(),
        "1000 calls with numbers that mean nothing, {known} of them known: every page is in a legal state"
    );
}

/// In the end.
pub(crate) fn afterwards(pages: &mut Pages) {
    let spare = pages.take() / PAGE;
    let known = call_at_random(4000, spare, |_| true);
    let _ = call(Call::VcpuPut, &[]);
    let _ = call(Call::TracingUnload, &[]);
    for handle in 0x1000..0x1000 + 255 {
        let _ = call(Call::UnreserveVm, &[handle]);
    }
    check!(
        audit().is_some(),
        "4000 calls with numbers that mean nothing, {known} of them known: every page is in a legal state"
    );
}
