//! Which calls are there when, and those before finalising.

use super::setting::*;
use crate::error::Error;
use crate::guest::Access;
use crate::hypercall::{Call, FUNCTION_BASE, NOT_SUPPORTED, REGISTERS};
use crate::platform::Vectors;
use crate::run::Exit;
use crate::testing::{DEVICE_PAGES, DEVICES, PA_BITS, Ram, VTR, become_processor};
use std::sync::atomic::Ordering::SeqCst;
use twofold_arch::PAGE_SIZE;

const DEVICE: u64 = 0x900_0000;
const READ_DEVICE: u64 = 0b1001;
const WRITE_DEVICE: u64 = 0b1011;

fn call(hyp: &Hyp<'_>, call: Call, arguments: &[u64]) -> (u64, i64) {
    let mut x = [0; REGISTERS];
    x[0] = call.function();
    x[1..=arguments.len()].copy_from_slice(arguments);
    hyp.hypercall(&mut x, &mut |_, _| Exit::Interrupt);
    assert_eq!(x[2..], [0; 4]);
    (x[0], x[1] as i64)
}

/// By upstream's list (SPEC 2.8): before finalising only; always; afterwards only.
const EARLY: &[&str] = &[
    "pkvm_init",
    "create_private_mapping",
    "cpu_set_vector",
    "enable_ssbs",
    "vgic_v3_init_lrs",
    "vgic_v3_get_gic_config",
];
const ALWAYS: &[&str] = &[
    "prot_finalize",
    "adjust_pc",
    "vcpu_run",
    "flush_vm_context",
    "tlb_flush_vmid_ipa",
    "tlb_flush_vmid_ipa_nsh",
    "tlb_flush_vmid",
    "tlb_flush_vmid_range",
    "flush_cpu_context",
    "timer_set_cntvoff",
    "tracing_load",
    "tracing_unload",
    "tracing_enable",
    "tracing_swap_reader",
    "tracing_update_clock",
    "tracing_reset",
    "tracing_enable_event",
    "tracing_write_event",
    "vgic_v3_save_aprs",
    "vgic_v3_restore_vmcr_aprs",
];
const NEVER: &[&str] = &["vgic_v5_save_apr", "vgic_v5_restore_vmcr_apr"];

#[test]
fn each_call_is_there_in_its_band_and_nowhere_else() {
    for &which in Call::ALL {
        let name = which.name();
        let (before, after) = match name {
            name if EARLY.contains(&name) => (true, false),
            name if ALWAYS.contains(&name) => (true, true),
            name if NEVER.contains(&name) => (false, false),
            _ => (false, true),
        };
        let ram = Ram::new(256, 64);
        let hyp = ram.boot();
        let is_there = |hyp: &Hyp<'_>| call(hyp, which, &[]).0 != NOT_SUPPORTED;
        if which != Call::ProtFinalize {
            assert_eq!(is_there(&hyp), before, "{name} before finalising");
            hyp.finalise().unwrap();
        }
        assert_eq!(is_there(&hyp), after, "{name} afterwards");
        // On a processor that has not finalised yet, too.
        become_processor(1);
        assert_eq!(is_there(&hyp), after, "{name} on another processor");
        become_processor(0);
        hyp.audit().unwrap();
    }
    let listed = EARLY.len() + ALWAYS.len() + NEVER.len();
    let later = Call::ALL.len() - listed;
    assert_eq!(later, 23, "the calls about guests");
}

#[test]
fn a_function_number_may_carry_the_hint_about_sve() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    for (function, expected) in [
        (FUNCTION_BASE, 0),
        (FUNCTION_BASE | 1 << 16, 0),
        (FUNCTION_BASE | 1 << 17, NOT_SUPPORTED),
        (FUNCTION_BASE | 1 << 32, NOT_SUPPORTED),
    ] {
        let mut x = [function, 0, 0, 0, 0, 0];
        hyp.hypercall(&mut x, &mut |_, _| Exit::Interrupt);
        assert_eq!(x[0], expected, "{function:#x}");
    }
}

#[test]
fn what_the_processors_do_not_have_is_not_supported() {
    let ram = Ram::new(256, 64).without_features();
    let hyp = ram.boot();
    for which in [
        Call::EnableSsbs,
        Call::VgicV3InitLrs,
        Call::VgicV3GetGicConfig,
        Call::VgicV3SaveAprs,
        Call::VgicV3RestoreVmcrAprs,
        Call::VgicV5SaveApr,
        Call::VgicV5RestoreVmcrApr,
    ] {
        assert_eq!(call(&hyp, which, &[0]).0, NOT_SUPPORTED, "{}", which.name());
    }
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    assert_eq!(call(&hyp, Call::VgicV3GetGicConfig, &[]), (0, VTR as i64));
    let platform = hyp.platform();
    assert_eq!(call(&hyp, Call::VgicV3InitLrs, &[]), (0, 0));
    assert_eq!(platform.gic.as_ref().unwrap().cleared.load(SeqCst), 1);
    assert_eq!(call(&hyp, Call::EnableSsbs, &[]), (0, 0));
    assert_eq!(platform.ssbs.as_ref().unwrap().load(SeqCst), 1);
}

#[test]
fn the_hypervisor_maps_devices_for_itself_and_no_memory() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let map = |address: u64, size: u64, access: u64| {
        call(&hyp, Call::CreatePrivateMapping, &[address, size, access]).1
    };
    let first = DEVICES as i64;
    assert_eq!(map(DEVICE, 8, READ_DEVICE), first);
    // Across the end of a page, and not from its beginning.
    assert_eq!(map(DEVICE + 0xffc, 8, WRITE_DEVICE), first + 0x1ffc);
    assert_eq!(
        *hyp.platform().devices.lock().unwrap(),
        [
            (pages(DEVICE, 1), Access::READ),
            (pages(DEVICE, 2), Access::READ | Access::WRITE)
        ]
    );
    let (memory, own) = (Ram::page(100).address().get(), Ram::page(1).address().get());
    let [no, invalid, full] =
        [Error::NotPermitted, Error::Invalid, Error::NoMemory].map(Error::code);
    assert_eq!(map(memory, 8, READ_DEVICE), no);
    assert_eq!(map(own, PAGE_SIZE, WRITE_DEVICE), no, "the hypervisor's");
    let before = Ram::page(0).address().get() - PAGE_SIZE;
    assert_eq!(
        map(before, PAGE_SIZE + 1, READ_DEVICE),
        no,
        "reaches into it"
    );
    for access in [
        0, 0b0001, 0b0011, 0b1000, 0b1010, 0b1101, 0b1111, 0b1_1001, !0,
    ] {
        assert_eq!(map(DEVICE, 8, access), invalid, "{access:#b}");
    }
    for (address, size) in [
        (DEVICE, 0),
        (DEVICE, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (1 << PA_BITS, 1),
        ((1 << PA_BITS) - 1, 2),
    ] {
        assert_eq!(
            map(address, size, READ_DEVICE),
            invalid,
            "{address:#x} {size:#x}"
        );
    }
    let left = DEVICE_PAGES - 3;
    assert_eq!(map(DEVICE, (left + 1) * PAGE_SIZE, READ_DEVICE), full);
    assert_eq!(map(DEVICE, left * PAGE_SIZE, READ_DEVICE), first + 0x3000);
    assert_eq!(map(DEVICE, 1, READ_DEVICE), full);
    hyp.audit().unwrap();
}

fn pages(address: u64, count: u64) -> crate::page::Pages {
    crate::page::Pages {
        start: twofold_arch::Hpa::new(address).frame(),
        count,
    }
}

#[test]
fn each_processor_chooses_how_its_exceptions_reach_the_hypervisor() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    assert_eq!(call(&hyp, Call::CpuSetVector, &[1]), (0, 0));
    become_processor(1);
    assert_eq!(call(&hyp, Call::CpuSetVector, &[0]), (0, 0));
    for slot in [2, 3, 4, 1 << 32, u64::MAX] {
        let refused = (0, Error::Invalid.code());
        assert_eq!(call(&hyp, Call::CpuSetVector, &[slot]), refused, "{slot}");
    }
    become_processor(0);
    let chosen: Vec<_> = hyp
        .platform()
        .vectors
        .lock()
        .unwrap()
        .clone()
        .into_iter()
        .collect();
    assert_eq!(chosen, [(0, Vectors::Hardened), (1, Vectors::Direct)]);
}
