//! All that KVM tells of a vCPU, read from one and written to another.

use crate::common::*;
use kvm_bindings::*;

/// IA32_TIME_STAMP_COUNTER: it goes on.
const TSC: u32 = 0x10;
/// Room in lists.
const ENTRIES: usize = 256;

/// A structure of KVM's with a count and entries.
#[derive(Clone, Copy)]
#[repr(C)]
struct List<T> {
    count: u32,
    padding: u32,
    entries: [T; ENTRIES],
}

impl<T: Copy + Default> Default for List<T> {
    fn default() -> Self {
        Self {
            count: ENTRIES as u32,
            padding: 0,
            entries: [T::default(); ENTRIES],
        }
    }
}

/// `struct kvm_msr_list`, whose entries begin behind the count.
#[repr(C)]
struct Indices {
    count: u32,
    indices: [u32; ENTRIES],
}

impl Default for Indices {
    fn default() -> Self {
        Self {
            count: ENTRIES as u32,
            indices: [0; ENTRIES],
        }
    }
}

/// `struct kvm_xsave`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Area([u32; 1024]);

impl Default for Area {
    fn default() -> Self {
        Self([0; 1024])
    }
}

/// The state of a vCPU.
pub(crate) struct State {
    cpuid: List<kvm_cpuid_entry2>,
    sregs: kvm_sregs2,
    xcrs: kvm_xcrs,
    xsave: Area,
    fpu: kvm_fpu,
    msrs: List<kvm_msr_entry>,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    debug: kvm_debugregs,
    regs: kvm_regs,
    events: kvm_vcpu_events,
    tsc_khz: i32,
}

impl State {
    pub(crate) fn of(vcpu: &Fd) -> Self {
        let listed: Indices = Fd::open().get(KVM_GET_MSR_INDEX_LIST);
        let mut msrs = List::<kvm_msr_entry> {
            count: listed.count,
            ..List::default()
        };
        for (entry, index) in msrs.entries.iter_mut().zip(listed.indices) {
            entry.index = index;
        }
        let read = vcpu.with(KVM_GET_MSRS, &mut msrs);
        assert_eq!(read, Ok(listed.count as i32), "every listed MSR is read");
        Self {
            cpuid: vcpu.get(KVM_GET_CPUID2),
            sregs: vcpu.get(KVM_GET_SREGS2),
            xcrs: vcpu.get(KVM_GET_XCRS),
            xsave: vcpu.get(KVM_GET_XSAVE2),
            fpu: vcpu.get(KVM_GET_FPU),
            msrs,
            lapic: vcpu.get(KVM_GET_LAPIC),
            mp_state: vcpu.get(KVM_GET_MP_STATE),
            debug: vcpu.get(KVM_GET_DEBUGREGS),
            regs: vcpu.get(KVM_GET_REGS),
            events: vcpu.get(KVM_GET_VCPU_EVENTS),
            tsc_khz: vcpu.call(KVM_GET_TSC_KHZ, 0).unwrap(),
        }
    }

    pub(crate) fn put(&self, vcpu: &Fd) {
        assert_eq!(vcpu.call(KVM_SET_TSC_KHZ, self.tsc_khz as usize), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_CPUID2, self.cpuid), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_SREGS2, self.sregs), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_XCRS, self.xcrs), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_FPU, self.fpu), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_XSAVE, self.xsave), Ok(0));
        let count = self.msrs.count as i32;
        assert_eq!(vcpu.set(KVM_SET_MSRS, self.msrs), Ok(count));
        assert_eq!(vcpu.set(KVM_SET_LAPIC, self.lapic), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_MP_STATE, self.mp_state), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_DEBUGREGS, self.debug), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_REGS, self.regs), Ok(0));
        assert_eq!(vcpu.set(KVM_SET_VCPU_EVENTS, self.events), Ok(0));
    }

    /// What differs between two states, the time apart.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        fn look<T: PartialEq + std::fmt::Debug>(
            found: &mut Vec<String>,
            name: &str,
            ours: &T,
            theirs: &T,
        ) {
            if ours != theirs {
                found.push(format!("{name}: {ours:x?}, then {theirs:x?}"));
            }
        }
        let mut found = Vec::new();
        let entries = |list: &List<kvm_cpuid_entry2>| {
            let words = |entry: &kvm_cpuid_entry2| {
                let kvm_cpuid_entry2 {
                    function,
                    index,
                    flags,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..
                } = *entry;
                [function, index, flags, eax, ebx, ecx, edx]
            };
            let entries = &list.entries[..list.count as usize];
            entries.iter().map(words).collect::<Vec<_>>()
        };
        look(
            &mut found,
            "cpuid",
            &entries(&self.cpuid),
            &entries(&other.cpuid),
        );
        look(&mut found, "sregs", &self.sregs, &other.sregs);
        look(
            &mut found,
            "xcr0",
            &self.xcrs.xcrs[0].value,
            &other.xcrs.xcrs[0].value,
        );
        look(&mut found, "xsave", &self.xsave.0, &other.xsave.0);
        look(&mut found, "fpu", &self.fpu, &other.fpu);
        look(&mut found, "lapic", &self.lapic.regs, &other.lapic.regs);
        look(&mut found, "mp state", &self.mp_state, &other.mp_state);
        look(&mut found, "debug", &self.debug, &other.debug);
        look(&mut found, "regs", &self.regs, &other.regs);
        look(&mut found, "events", &self.events, &other.events);
        look(&mut found, "tsc khz", &self.tsc_khz, &other.tsc_khz);
        for (ours, theirs) in self.msrs.entries.iter().zip(&other.msrs.entries) {
            if ours.index != TSC {
                let name = format!("msr {:#x}", ours.index);
                look(&mut found, &name, &ours.data, &theirs.data);
            }
        }
        found
    }

    /// The registers that a guest computes with.
    pub(crate) fn results(&self) -> (kvm_regs, [u32; 1024], kvm_debugregs) {
        (self.regs, self.xsave.0, self.debug)
    }
}
