//! Random maps, writes and everything that is done beside them, against a model of a few lines: no
//! denied write ever succeeds, no permitted one fails, and the dirty log has all that was written.

use super::*;
use proptest::prelude::*;
use proptest::sample::select;
use rustix::mm::Advice;
use twofold_kvm::abi;

#[derive(Clone, Copy, Debug)]
enum Step {
    Store {
        address: u64,
        bytes: u64,
    },
    Fill {
        address: u64,
        bytes: u64,
    },
    Protect {
        page: u64,
        pages: usize,
        map: u32,
    },
    Log(bool),
    Collect,
    /// The system takes the page, and gives zeros for it.
    Replace(u64),
    Read(u64),
    Prefault,
    Recreate,
}

struct Model {
    guarded: Guarded,
    maps: [u32; PAGES as usize],
    memory: Vec<u8>,
    /// Pages written since the log was collected, while it is on.
    written: Option<u64>,
}

impl Model {
    fn allowed(&self, byte: u64) -> bool {
        self.maps[(byte >> 12) as usize] >> (byte >> 7 & 31) & 1 != 0
    }

    /// Writes pieces one after the other, with an instruction of so many bytes.
    fn write(&mut self, pieces: &[(u64, u64)], value: u8, end: End, length: u8) {
        for &(first, bytes) in pieces {
            if let Some(byte) = (first..first + bytes).find(|byte| !self.allowed(*byte)) {
                assert_eq!(end, denied(DATA + byte, length));
                return;
            }
            for byte in first..first + bytes {
                self.memory[byte as usize] = value;
                if let Some(written) = &mut self.written {
                    *written |= 1 << (byte >> 12);
                }
            }
        }
        assert_eq!(end, End::Halt);
    }

    fn collect(&mut self) {
        if let Some(written) = &mut self.written {
            let found = dirty::log(&self.guarded.vm);
            assert_eq!(*written & !found, 0, "written and not in the log");
            *written = 0;
        }
    }

    fn step(&mut self, step: Step, number: u64) {
        let value = number as u8 | 1;
        let splat = u64::from(value) * 0x0101_0101_0101_0101;
        match step {
            Step::Store { address, bytes } => {
                let code: &[u8] = match bytes {
                    1 => &[0x88, 0x07],
                    2 => &[0x66, 0x89, 0x07],
                    4 => &[0x89, 0x07],
                    _ => &[0x48, 0x89, 0x07],
                };
                let end = self.guarded.execute(code, |regs| {
                    (regs.rdi, regs.rax) = (DATA + address, splat);
                });
                self.write(&[(address, bytes)], value, end, code.len() as u8);
            }
            Step::Fill { address, bytes } => {
                let end = self.guarded.execute(&[0xf3, 0xaa], |regs| {
                    (regs.rdi, regs.rcx, regs.rax) = (DATA + address, bytes, splat);
                });
                let pieces: Vec<_> = (address..address + bytes).map(|byte| (byte, 1)).collect();
                self.write(&pieces, value, end, 2);
            }
            Step::Protect { page, pages, map } => {
                let pages = pages.min((PAGES - page) as usize);
                self.guarded.protect(page, &vec![map; pages]);
                self.maps[page as usize..][..pages].fill(map);
            }
            Step::Log(on) => {
                self.collect();
                let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
                self.guarded.set_slot(flags);
                self.written = on.then(|| self.written.unwrap_or(0));
            }
            Step::Collect => self.collect(),
            Step::Replace(page) => {
                let at = (page * PAGE) as usize;
                let start = self.guarded.data.start;
                let change = abi::host_change(start.addr() + at, PAGE as usize);
                // SAFETY: the test's own memory, which guests have lost.
                let gone = unsafe {
                    let place = start.add(at).cast();
                    rustix::mm::madvise(place, PAGE as usize, Advice::LinuxDontNeed)
                };
                gone.unwrap();
                drop(change);
                self.memory[at..at + PAGE as usize].fill(0);
            }
            Step::Read(address) => {
                let expected = &self.memory[address as usize..][..8];
                let found = self.guarded.load(DATA + address);
                assert_eq!(found.to_le_bytes(), expected);
            }
            Step::Prefault => {
                let mut request = kvm_pre_fault_memory {
                    gpa: DATA,
                    size: PAGES * PAGE,
                    ..Default::default()
                };
                let result = self.guarded.vcpu.with(KVM_PRE_FAULT_MEMORY, &mut request);
                assert_eq!(result, Ok(0));
            }
            Step::Recreate => {
                self.collect();
                let none = region(1, DATA, 0, self.guarded.data.address());
                let vm = &self.guarded.vm;
                assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION, none), Ok(0));
                self.guarded.set_slot(0);
                self.maps = [KVM_SUBPAGE_FULL_ACCESS; PAGES as usize];
                self.written = None;
            }
        }
        let found = self.guarded.maps(0, PAGES as usize);
        assert_eq!(found, self.maps);
    }
}

fn address(room: u64) -> impl Strategy<Value = u64> {
    let end = PAGES * PAGE - room;
    prop_oneof![
        0..end,
        (1..end / 128, 0..12_u64).prop_map(|(piece, before)| piece * 128 - before),
    ]
}

fn map() -> impl Strategy<Value = u32> {
    prop_oneof![
        any::<u32>(),
        (0..32_u32).prop_map(|bit| 1 << bit),
        (0..32_u32).prop_map(|bit| !(1 << bit)),
        select(vec![0, u32::MAX]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (address(8), select(vec![1, 2, 4, 8]))
            .prop_map(|(address, bytes)| Step::Store { address, bytes }),
        5 => (address(4096), 1..=4096_u64)
            .prop_map(|(address, bytes)| Step::Fill { address, bytes }),
        8 => (0..PAGES, 1..5_usize, map())
            .prop_map(|(page, pages, map)| Step::Protect { page, pages, map }),
        2 => any::<bool>().prop_map(Step::Log),
        3 => Just(Step::Collect),
        2 => (0..PAGES).prop_map(Step::Replace),
        3 => address(8).prop_map(Step::Read),
        1 => Just(Step::Prefault),
        1 => Just(Step::Recreate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("TWOFOLD_SUB_PAGE_CASES")
            .ok()
            .and_then(|cases| cases.parse().ok())
            .unwrap_or(24),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn row_10_no_denied_write_succeeds_and_the_log_has_every_permitted_one(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut model = Model {
            guarded: Guarded::new(),
            maps: [KVM_SUBPAGE_FULL_ACCESS; PAGES as usize],
            memory: vec![0; (PAGES * PAGE) as usize],
            written: None,
        };
        for (number, step) in steps.into_iter().enumerate() {
            model.step(step, number as u64);
        }
        model.collect();
    }
}
