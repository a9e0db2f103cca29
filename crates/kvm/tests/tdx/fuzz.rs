//! Random sequences of commands, conversions, holes, pre-faults and runs: nothing crashes or hangs, and
//! every answer is one that KVM gives.
//!
//! `TWOFOLD_FUZZ_CASES` makes it run longer.

use super::storm::code;
use super::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

const ERRORS: &[Errno] = &[
    Errno::AGAIN,
    Errno::BUSY,
    Errno::FAULT,
    Errno::INTR,
    Errno::INVAL,
    Errno::IO,
    Errno::NOENT,
    Errno::OPNOTSUPP,
    Errno::TOOBIG,
];

#[derive(Clone, Debug)]
enum Step {
    /// Any command on the VM or on a vCPU, with any data.
    Command {
        vcpu: bool,
        id: u32,
        flags: u32,
        data: u64,
    },
    Add {
        page: u64,
        pages: u64,
        source: u64,
        flags: u32,
    },
    AddCode,
    Attributes {
        page: u64,
        pages: u64,
        private: bool,
    },
    Punch {
        page: u64,
        pages: u64,
    },
    Prefault {
        page: u64,
        pages: u64,
    },
    Finalize,
    Run,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..PAGES + 2, 0..PAGES);
    let data = prop_oneof![Just(0), Just(8), Just(u64::MAX), any::<u64>()];
    prop_oneof![
        (any::<bool>(), 0..8_u32, 0..4_u32, data).prop_map(|(vcpu, id, flags, data)| {
            Step::Command {
                vcpu,
                id,
                flags,
                data,
            }
        }),
        (range(), 0..4_u64, 0..2_u32).prop_map(|((page, pages), source, flags)| Step::Add {
            page,
            pages,
            source,
            flags,
        }),
        Just(Step::AddCode),
        (range(), any::<bool>()).prop_map(|((page, pages), private)| Step::Attributes {
            page,
            pages,
            private,
        }),
        range().prop_map(|(page, pages)| Step::Punch { page, pages }),
        range().prop_map(|(page, pages)| Step::Prefault { page, pages }),
        Just(Step::Finalize),
        Just(Step::Run),
    ]
}

fn take(td: &Td, source: &Memory, step: &Step) -> Result<i32, Errno> {
    match *step {
        Step::Command {
            vcpu,
            id,
            flags,
            data,
        } => command(if vcpu { &td.vcpu } else { &td.vm }, id, flags, data),
        Step::Add {
            page,
            pages,
            source: kind,
            flags,
        } => {
            let mut region = Region {
                source: [source.address(), 0, PAGE, source.address() + 1][kind as usize],
                gpa: DATA + page * PAGE,
                pages,
            };
            td.add(&mut region, flags)
        }
        Step::AddCode => td.add_page(RESET_PAGE, source),
        Step::Attributes {
            page,
            pages,
            private,
        } => {
            let request = kvm_memory_attributes {
                address: DATA + page * PAGE,
                size: pages * PAGE,
                attributes: if private { 8 } else { 0 },
                flags: 0,
            };
            td.vm.set(KVM_SET_MEMORY_ATTRIBUTES, request)
        }
        Step::Punch { page, pages } => {
            let (offset, length) = ((page * PAGE) as i64, (pages * PAGE) as i64);
            let result = abi::fallocate(td.data_file.0, KEEP_SIZE | PUNCH, offset, length);
            result.unwrap().map(|()| 0)
        }
        Step::Prefault { page, pages } => td.prefault(DATA + page * PAGE, pages * PAGE).0,
        Step::Finalize => td.finalize(),
        Step::Run => td.vcpu.call(KVM_RUN, 0),
    }
}

#[test]
fn no_sequence_of_calls_crashes_or_hangs_the_program() {
    let cases = std::env::var("TWOFOLD_FUZZ_CASES").ok();
    let config = Config {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(200),
        failure_persistence: None,
        max_shrink_iters: 500,
        ..Config::default()
    };
    let seed = TestRng::from_seed(RngAlgorithm::ChaCha, &[9; 32]);
    let source = Memory::new(((PAGES + 1) * PAGE) as usize);
    source.write_bytes(0xff0, &code(10));
    let sequences = proptest::collection::vec(step(), 1..40);
    TestRunner::new_with_rng(config, seed)
        .run(&sequences, |steps| {
            let td = Td::new();
            for step in &steps {
                if let Err(error) = take(&td, &source, step) {
                    prop_assert!(ERRORS.contains(&error), "{step:?} answered {error}");
                }
            }
            Ok(())
        })
        .unwrap();
}
