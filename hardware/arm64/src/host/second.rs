//! The second processor: it does what the first asks, so that a translation that only it holds, or
//! a call at the same moment, can be tried.

use crate::calls::call;
use crate::probe;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};
use twofold_pkvm::hypercall::Call;

static REQUEST: AtomicU64 = AtomicU64::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static ANSWER: AtomicU64 = AtomicU64::new(0);

const READY: u64 = 1;
const READ: u64 = 2;
const LOAD: u64 = 3;
const PUT: u64 = 4;
const CHURN: u64 = 5;
const RUN: u64 = 6;
const DONE: u64 = 7;

/// What the second processor does for ever.
pub(crate) fn work() -> ! {
    loop {
        REQUEST.store(READY, SeqCst);
        let (request, argument) = loop {
            match REQUEST.load(SeqCst) {
                READY | DONE => core::hint::spin_loop(),
                request => break (request, ADDRESS.load(SeqCst)),
            }
        };
        let answer = match request {
            READ => u64::from(probe::read(argument).is_some()),
            LOAD => encode(call(Call::VcpuLoad, &[argument, 0])),
            PUT => encode(call(Call::VcpuPut, &[])),
            RUN => encode(run(argument)),
            _ => churn(argument),
        };
        ANSWER.store(answer, SeqCst);
        REQUEST.store(DONE, SeqCst);
        while REQUEST.load(SeqCst) == DONE {
            core::hint::spin_loop();
        }
    }
}

fn encode(result: Result<u64, twofold_pkvm::Error>) -> u64 {
    match result {
        Ok(value) => value,
        Err(error) => error.code() as u64,
    }
}

/// Runs vCPU 0 of a VM once.
fn run(handle: u64) -> Result<u64, twofold_pkvm::Error> {
    call(Call::VcpuLoad, &[handle, 0])?;
    let reason = call(Call::VcpuRun, &[]);
    call(Call::VcpuPut, &[])?;
    reason
}

/// Lends a page and takes it back, many times; how often both were answered as they should.
fn churn(page: u64) -> u64 {
    (0..2000)
        .filter(|_| {
            call(Call::ShareHyp, &[page]) == Ok(0) && call(Call::UnshareHyp, &[page]) == Ok(0)
        })
        .count() as u64
}

fn wait_for(state: u64) {
    while REQUEST.load(SeqCst) != state {
        core::hint::spin_loop();
    }
}

fn begin(request: u64, argument: u64) {
    wait_for(READY);
    ADDRESS.store(argument, SeqCst);
    REQUEST.store(request, SeqCst);
}

fn end() -> u64 {
    wait_for(DONE);
    let answer = ANSWER.load(SeqCst);
    REQUEST.store(0, SeqCst);
    answer
}

/// Whether the second processor can read an address.
pub(crate) fn reads(address: u64) -> bool {
    begin(READ, address);
    end() != 0
}

/// The second processor loads vCPU 0 of a VM.
pub(crate) fn loads(handle: u64) -> i64 {
    begin(LOAD, handle);
    end() as i64
}

/// The second processor puts its vCPU.
pub(crate) fn puts() -> i64 {
    begin(PUT, 0);
    end() as i64
}

/// The second processor lends and takes back a page meanwhile; what `body` does runs beside it.
/// How often it succeeded.
pub(crate) fn churns(page: u64, body: impl FnOnce()) -> u64 {
    begin(CHURN, page);
    body();
    end()
}

/// The second processor runs vCPU 0 of a VM; what `body` does happens meanwhile. Why it stopped.
pub(crate) fn runs(handle: u64, body: impl FnOnce()) -> i64 {
    begin(RUN, handle);
    body();
    end() as i64
}
