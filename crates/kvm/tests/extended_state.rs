//! x87, SSE, AVX and PKRU as a program saves them and puts them back.

#![expect(clippy::unwrap_used)] // Helpers outside #[test] functions.

mod common;

use common::*;
use kvm_bindings::*;

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
const PKRU: u64 = 1 << 9;

/// Words of `struct kvm_xsave` as this test places things: byte offsets divided by four.
const MXCSR: usize = 24 / 4;
const XMM: usize = 160 / 4;
const XSTATE_BV: usize = 512 / 4;
const XCOMP_BV: usize = 520 / 4;
const YMM_HIGH: usize = 576 / 4;

fn vcpu() -> (Fd, Fd) {
    let vm = Fd::open().descriptor(KVM_CREATE_VM, 0);
    let vcpu = vm.descriptor(KVM_CREATE_VCPU, 0);
    (vm, vcpu)
}

/// `struct kvm_xsave`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Area {
    region: [u32; 1024],
}

impl Default for Area {
    fn default() -> Self {
        Self { region: [0; 1024] }
    }
}

/// `struct kvm_cpuid2` with room for every entry.
#[derive(Clone, Copy)]
#[repr(C)]
struct Table {
    count: u32,
    padding: u32,
    entries: [kvm_cpuid_entry2; 256],
}

impl Table {
    /// What a call answers.
    fn of(fd: &Fd, request: u64) -> Self {
        let mut table = Self {
            count: 256,
            padding: 0,
            entries: [kvm_cpuid_entry2::default(); 256],
        };
        assert_eq!(fd.with(request, &mut table), Ok(0));
        table
    }

    fn find(&mut self, function: u32, index: u32) -> Option<&mut kvm_cpuid_entry2> {
        let wanted =
            |entry: &&mut kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
        self.entries.iter_mut().find(wanted)
    }

    fn leaf(&mut self, function: u32, index: u32) -> &mut kvm_cpuid_entry2 {
        self.find(function, index).unwrap()
    }
}

fn supported() -> Table {
    Table::of(&Fd::open(), KVM_GET_SUPPORTED_CPUID)
}

/// The word that holds PKRU: behind the upper halves of the YMM registers where the host has no
/// protection keys, which are then not offered, but there for a program that wants them.
fn pkru() -> usize {
    let place = supported().find(0xd, 9).map_or(832, |leaf| leaf.ebx);
    place as usize / 4
}

/// State components that a guest may have.
fn components() -> u64 {
    let mut components = 0_u64;
    let attribute = kvm_device_attr {
        attr: KVM_X86_XCOMP_GUEST_SUPP.into(),
        addr: (&raw mut components).addr() as u64,
        ..Default::default()
    };
    assert_eq!(Fd::open().set(KVM_GET_DEVICE_ATTR, attribute), Ok(0));
    components
}

fn area(vcpu: &Fd) -> Area {
    vcpu.get(KVM_GET_XSAVE)
}

/// A state with something of everything.
fn sample(vcpu: &Fd) -> Area {
    let mut state = area(vcpu);
    state.region[MXCSR] = 0x3f80;
    state.region[XMM + 4 * 15] = 0x1515;
    if components() & AVX != 0 {
        state.region[YMM_HIGH + 4 * 15] = 0xf0f0;
    }
    state.region[pkru()] = 0x5554;
    state
}

#[test]
fn a_saved_state_is_the_same_on_another_virtual_machine() {
    let (_first, source) = vcpu();
    let state = sample(&source);
    assert_eq!(u64::from(state.region[XSTATE_BV]), components() | PKRU);
    assert_eq!(source.set(KVM_SET_XSAVE, state), Ok(0));
    let saved = source.get::<Area>(KVM_GET_XSAVE2);
    assert_eq!(saved.region, state.region);
    let (_second, target) = vcpu();
    assert_ne!(area(&target).region, saved.region);
    assert_eq!(target.set(KVM_SET_XSAVE, saved), Ok(0));
    assert_eq!(area(&target).region, saved.region);
    let size = Fd::open().call(KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2 as usize);
    assert_eq!(size, Ok(4096));
}

#[test]
fn what_is_not_in_an_area_is_initialised_but_for_pkru() {
    let (_vm, vcpu) = vcpu();
    let state = sample(&vcpu);
    assert_eq!(vcpu.set(KVM_SET_XSAVE, state), Ok(0));
    let mut partial = state;
    partial.region[XSTATE_BV] = X87 as u32;
    assert_eq!(vcpu.set(KVM_SET_XSAVE, partial), Ok(0));
    let now = area(&vcpu);
    assert_eq!(now.region[XMM + 4 * 15], 0);
    assert_eq!(now.region[YMM_HIGH + 4 * 15], 0);
    assert_eq!(now.region[pkru()], 0x5554);
}

#[test]
fn the_fxsave_part_alone_leaves_the_upper_halves() {
    let (_vm, vcpu) = vcpu();
    let state = sample(&vcpu);
    assert_eq!(vcpu.set(KVM_SET_XSAVE, state), Ok(0));
    let fpu: kvm_fpu = vcpu.get(KVM_GET_FPU);
    assert_eq!(fpu.xmm[15][..2], [0x15, 0x15]);
    assert_eq!(vcpu.set(KVM_SET_FPU, fpu), Ok(0));
    assert_eq!(area(&vcpu).region, state.region);
}

#[test]
fn areas_that_no_processor_writes_are_refused() {
    let (_vm, vcpu) = vcpu();
    let good = area(&vcpu);
    let refused = |word: usize, bit: u32| {
        let mut bad = good;
        bad.region[word] |= bit;
        assert_eq!(vcpu.set(KVM_SET_XSAVE, bad), Err(Errno::INVAL), "{word}");
    };
    refused(XSTATE_BV, 1 << 5);
    refused(XSTATE_BV + 1, 1);
    refused(XCOMP_BV + 1, 1 << 31);
    refused(XCOMP_BV + 2, 1);
    refused(MXCSR, 1 << 16);
    assert_eq!(vcpu.set(KVM_SET_XSAVE, good), Ok(0));
}

#[test]
fn xcr0_takes_what_the_vcpus_table_names() {
    let (_vm, vcpu) = vcpu();
    let mut table = supported();
    table.leaf(0xd, 0).eax = (X87 | SSE) as u32;
    let set = |value| {
        let mut xcrs: kvm_xcrs = vcpu.get(KVM_GET_XCRS);
        xcrs.xcrs[0].value = value;
        vcpu.set(KVM_SET_XCRS, xcrs)
    };
    assert_eq!(set(components()), Ok(0));
    assert_eq!(set(X87 | AVX), Err(Errno::INVAL));
    assert_eq!(set(SSE), Err(Errno::INVAL));
    assert_eq!(vcpu.set(KVM_SET_CPUID2, table), Ok(0));
    assert_eq!(set(X87 | PKRU), Err(Errno::INVAL));
    assert_eq!(set(X87 | SSE), Ok(0));
    let xcrs: kvm_xcrs = vcpu.get(KVM_GET_XCRS);
    assert_eq!((xcrs.nr_xcrs, xcrs.xcrs[0].value), (1, X87 | SSE));
}

#[test]
fn protection_keys_can_be_had_where_they_are_not_offered() {
    const PKU: u32 = 1 << 3;
    const CR4_PKE: u64 = 1 << 22;
    let (_vm, vcpu) = vcpu();
    let mut table = supported();
    table.leaf(7, 0).ecx |= PKU;
    table.leaf(0xd, 0).eax |= PKRU as u32;
    assert_eq!(vcpu.set(KVM_SET_CPUID2, table), Ok(0));
    let mut xcrs: kvm_xcrs = vcpu.get(KVM_GET_XCRS);
    xcrs.xcrs[0].value = components() | PKRU;
    assert_eq!(vcpu.set(KVM_SET_XCRS, xcrs), Ok(0));
    let mut sregs: kvm_sregs = vcpu.get(KVM_GET_SREGS);
    sregs.cr4 |= CR4_PKE;
    assert_eq!(vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
}

#[test]
fn a_vcpus_table_shows_what_the_guest_sees_now() {
    const OSXSAVE: u32 = 1 << 27;
    const CR4_OSXSAVE: u64 = 1 << 18;
    let (_vm, vcpu) = vcpu();
    assert_eq!(vcpu.set(KVM_SET_CPUID2, supported()), Ok(0));
    let current = |function| *Table::of(&vcpu, KVM_GET_CPUID2).leaf(function, 0);
    assert_eq!(current(1).ecx & OSXSAVE, 0);
    assert_eq!(current(0xd).ebx, 576, "after reset");
    let mut sregs: kvm_sregs = vcpu.get(KVM_GET_SREGS);
    sregs.cr4 |= CR4_OSXSAVE;
    assert_eq!(vcpu.set(KVM_SET_SREGS, sregs), Ok(0));
    let mut xcrs: kvm_xcrs = vcpu.get(KVM_GET_XCRS);
    xcrs.xcrs[0].value = components();
    assert_eq!(vcpu.set(KVM_SET_XCRS, xcrs), Ok(0));
    assert_ne!(current(1).ecx & OSXSAVE, 0);
    let state = current(0xd);
    assert_eq!(state.ebx, state.ecx, "everything is enabled");
}

#[test]
fn the_system_has_one_attribute() {
    let kvm = Fd::open();
    let known = kvm_device_attr {
        attr: KVM_X86_XCOMP_GUEST_SUPP.into(),
        ..Default::default()
    };
    assert_eq!(kvm.set(KVM_HAS_DEVICE_ATTR, known), Ok(0));
    for unknown in [
        kvm_device_attr { attr: 7, ..known },
        kvm_device_attr { group: 1, ..known },
    ] {
        assert_eq!(kvm.set(KVM_HAS_DEVICE_ATTR, unknown), Err(Errno::NXIO));
    }
    assert_eq!(components() & (X87 | SSE), X87 | SSE);
    assert_eq!(components() as u32, supported().leaf(0xd, 0).eax);
}
