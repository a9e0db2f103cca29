//! A vCPU's state moved to another VM goes on as if nothing had happened: a guest that uses everything
//! is stopped at random points, all that KVM tells of its vCPU is put into a new VM, and the results
//! are those of a run that was left alone.
// UNSAFETY: the guest's code is assembly.
#![expect(unsafe_code)]
#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod vcpu;

use common::*;
use guest::{DATA, DATA_BYTES, MEMORY, WITH_AVX, WITH_DEBUG, port};
use kvm_bindings::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use vcpu::State;

/// Rounds of the guest's loop.
const ROUNDS: u64 = 60;

/// `struct kvm_cpuid2` with room.
#[derive(Clone, Copy)]
#[repr(C)]
struct Table {
    count: u32,
    padding: u32,
    entries: [kvm_cpuid_entry2; 256],
}

/// How a run is interrupted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stops {
    /// After so many instructions each.
    Instructions,
    /// After so many exits each, for a guest that needs the debug exceptions itself.
    Exits,
}

/// A VM with the guest, and what the program keeps of it.
struct Machine {
    run: Memory,
    vcpu: Fd,
    _vm: Fd,
    memory: Memory,
    outputs: u64,
    inputs: u64,
}

/// What a run leaves.
#[derive(PartialEq, Debug)]
struct Results {
    registers: (kvm_regs, [u32; 1024], kvm_debugregs),
    data: Vec<u8>,
    outputs: u64,
    inputs: u64,
}

impl Machine {
    /// A VM whose vCPU is as after reset.
    fn bare() -> Self {
        let vm = Fd::open().descriptor(KVM_CREATE_VM, 0);
        assert_eq!(vm.call(KVM_CREATE_IRQCHIP, 0), Ok(0));
        let memory = Memory::new(MEMORY);
        let slot = region(0, 0, MEMORY as u64, memory.address());
        assert_eq!(vm.set(KVM_SET_USER_MEMORY_REGION, slot), Ok(0));
        let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
        Self {
            run: Memory::of_vcpu(&vcpu),
            vcpu,
            _vm: vm,
            memory,
            outputs: 0,
            inputs: 0,
        }
    }

    /// With the guest at its beginning.
    fn new(with: u64) -> Self {
        let machine = Self::bare();
        guest::load(&|at, bytes| machine.memory.write_bytes(at, bytes));
        let mut table = Table {
            count: 256,
            padding: 0,
            entries: [kvm_cpuid_entry2::default(); 256],
        };
        assert_eq!(Fd::open().with(KVM_GET_SUPPORTED_CPUID, &mut table), Ok(0));
        let leaf = |function, index| {
            let wanted =
                |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
            *table.entries.iter().find(wanted).unwrap()
        };
        let has_avx = leaf(1, 0).ecx >> 28 & 1 != 0;
        assert_eq!(machine.vcpu.set(KVM_SET_CPUID2, table), Ok(0));
        let mut sregs: kvm_sregs = machine.vcpu.get(KVM_GET_SREGS);
        guest::enter_long_mode(&mut sregs);
        assert_eq!(machine.vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
        let mut xcrs: kvm_xcrs = machine.vcpu.get(KVM_GET_XCRS);
        xcrs.xcrs[0].value = u64::from(leaf(0xd, 0).eax);
        assert_eq!(machine.vcpu.set(KVM_SET_XCRS, xcrs), Ok(0));
        // The local APIC is enabled by software too.
        let mut lapic: kvm_lapic_state = machine.vcpu.get(KVM_GET_LAPIC);
        (lapic.regs[0xf0], lapic.regs[0xf1]) = (0xff_u8 as _, 1);
        assert_eq!(machine.vcpu.set(KVM_SET_LAPIC, lapic), Ok(0));
        let mut regs: kvm_regs = machine.vcpu.get(KVM_GET_REGS);
        let with = if has_avx { with | WITH_AVX } else { with };
        guest::start(&mut regs, ROUNDS, with);
        assert_eq!(machine.vcpu.set(KVM_SET_REGS, regs), Ok(0));
        machine
    }

    fn step(&self, on: bool) {
        let debug = kvm_guest_debug {
            control: if on {
                KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP
            } else {
                0
            },
            ..Default::default()
        };
        assert_eq!(self.vcpu.set(KVM_SET_GUEST_DEBUG, debug), Ok(0));
    }

    /// Runs to the next exit; answers the guest's ports. `false` at the end.
    fn advance(&mut self) -> bool {
        assert_eq!(self.vcpu.call(KVM_RUN, 0), Ok(0));
        let reason: u32 = self.run.read(8);
        if reason == KVM_EXIT_DEBUG {
            return true;
        }
        assert_eq!(
            reason,
            KVM_EXIT_IO,
            "{:x?}",
            self.vcpu.get::<kvm_regs>(KVM_GET_REGS)
        );
        let number: u16 = self.run.read(32 + 2);
        let at = self.run.read::<u64>(32 + 8) as usize;
        match number {
            port::OUT => {
                let value: u32 = self.run.read(at);
                self.outputs = self.outputs.rotate_left(7) ^ u64::from(value);
            }
            port::IN => {
                self.inputs += 1;
                self.run.write(at, (self.inputs * 11) as u8);
            }
            port::END => return false,
            other => panic!("port {other:#x}"),
        }
        true
    }

    /// Completes the instruction that the last exit was about, and no other.
    fn settle(&self) {
        self.run.write(1, 1_u8);
        // A single step may end here instead.
        let ended = self.vcpu.call(KVM_RUN, 0);
        let stepped = ended == Ok(0) && self.run.read::<u32>(8) == KVM_EXIT_DEBUG;
        assert!(ended == Err(Errno::INTR) || stepped, "{ended:?}");
        self.run.write(1, 0_u8);
    }

    /// The same machine in a new VM.
    fn moved(self) -> Self {
        self.settle();
        let state = State::of(&self.vcpu);
        let target = Self {
            outputs: self.outputs,
            inputs: self.inputs,
            ..Self::bare()
        };
        for at in (0..MEMORY).step_by(8) {
            let word: u64 = self.memory.read(at);
            if word != 0 {
                target.memory.write(at, word);
            }
        }
        drop(self);
        state.put(&target.vcpu);
        let found = State::of(&target.vcpu);
        assert_eq!(state.differences(&found), Vec::<String>::new());
        target
    }

    /// Runs to the end; each number says how far before the next move.
    fn finish(mut self, stops: Stops, distances: &[usize]) -> Results {
        for &distance in distances {
            self.step(stops == Stops::Instructions);
            let mut left = distance;
            while left > 0 {
                if !self.advance() {
                    return self.results();
                }
                left -= 1;
            }
            self.step(false);
            self = self.moved();
        }
        while self.advance() {}
        self.results()
    }

    fn results(self) -> Results {
        self.step(false);
        self.settle();
        let data = (0..DATA_BYTES).map(|at| self.memory.read::<u8>(DATA + at));
        Results {
            registers: State::of(&self.vcpu).results(),
            data: data.collect(),
            outputs: self.outputs,
            inputs: self.inputs,
        }
    }
}

/// The counters that the guest's handlers keep.
fn counters(results: &Results) -> [u64; 5] {
    std::array::from_fn(|i| {
        let at = 8 + 8 * i;
        u64::from_le_bytes(results.data[at..at + 8].try_into().unwrap())
    })
}

fn cases() -> u32 {
    let cases = std::env::var("TWOFOLD_SNAPSHOT_CASES").ok();
    cases.and_then(|cases| cases.parse().ok()).unwrap_or(50)
}

fn try_moves(with: u64, stops: Stops, farthest: usize) {
    let alone = Machine::new(with).finish(stops, &[]);
    let [undefined, software, interrupts, faults, steps] = counters(&alone);
    assert_eq!([undefined, software, interrupts], [ROUNDS; 3]);
    assert_eq!(faults, ROUNDS * 0x4000_0000);
    assert_eq!(steps != 0, with & WITH_DEBUG != 0);
    assert_eq!(alone.inputs, ROUNDS);
    let config = Config {
        cases: cases(),
        failure_persistence: None,
        max_shrink_iters: 100,
        ..Config::default()
    };
    let seed = TestRng::from_seed(RngAlgorithm::ChaCha, &[9; 32]);
    let distances = proptest::collection::vec(1..farthest, 1..12);
    let result = TestRunner::new_with_rng(config, seed).run(&distances, |distances| {
        assert_eq!(Machine::new(with).finish(stops, &distances), alone);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn a_vcpu_goes_on_in_another_vm_from_any_instruction() {
    try_moves(0, Stops::Instructions, 1500);
}

#[test]
fn a_guest_that_debugs_itself_goes_on_in_another_vm_from_any_exit() {
    try_moves(WITH_DEBUG, Stops::Exits, 20);
}
