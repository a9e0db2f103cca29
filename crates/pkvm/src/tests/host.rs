//! The host's stage 2.

use crate::host_table::HostFault;
use crate::page::Pages;
use crate::testing::{Accesses, Ram};
use proptest::prelude::*;
use twofold_arch::Hpa;

const GIB: u64 = 1 << 30;

#[test]
fn memory_is_mapped_in_blocks_where_nothing_stands_in_the_way() {
    // 1 GiB of address space holds 64 MiB of memory.
    let ram = Ram::new(16384, 64);
    let hyp = ram.boot();
    // The hypervisor's own pages are in the first block: only pages there.
    let first = Hpa::new(Ram::page(64).address().get());
    assert_eq!(hyp.host_fault(first), HostFault::Mapped { bytes: 4096 });
    assert_eq!(hyp.host_fault(first), HostFault::Spurious);
    let second = Ram::page(1000).address();
    assert_eq!(hyp.host_fault(second), HostFault::Mapped { bytes: 2 << 20 });
    assert_eq!(hyp.host_fault(Ram::page(3).address()), HostFault::Denied);
    // A device far from memory is mapped in the largest block, one beside it in smaller ones.
    assert_eq!(
        hyp.host_fault(Hpa::new(0x900_0000)),
        HostFault::Mapped { bytes: GIB }
    );
    let beside = Hpa::new((16384 + 0x4_0000) << 12);
    assert_eq!(hyp.host_fault(beside), HostFault::Mapped { bytes: 2 << 20 });
    assert_eq!(hyp.host_fault(Hpa::new(1 << 36)), HostFault::Denied);
    assert_eq!(hyp.host_fault(Hpa::new(u64::MAX)), HostFault::Denied);
    // Giving one page of a block away splits it and leaves the others mapped.
    assert!(hyp.host_reaches(Ram::page(1001)));
    hyp.host_donate_hyp(Pages::one(Ram::page(1000))).unwrap();
    assert!(!hyp.host_reaches(Ram::page(1000)));
    assert_eq!(
        hyp.host_fault(Ram::page(1001).address()),
        HostFault::Spurious
    );
    hyp.audit().unwrap();
}

#[test]
fn when_devices_have_used_the_pool_up_they_are_unmapped_and_memory_still_works() {
    // Each 512 GiB of devices needs a table; the pool has room for a few.
    let ram = Ram::new(2048, 16).with_address_bits(48);
    let hyp = ram.boot();
    let devices = (1..100).map(|number| Hpa::new(number * 512 * GIB));
    for device in devices.clone() {
        assert_eq!(hyp.host_fault(device), HostFault::Mapped { bytes: GIB });
    }
    let (_, recycled) = hyp.host_pool();
    assert!(recycled > 3, "{recycled}");
    // Memory is reached, given away and taken back, whatever devices have left of the pool.
    for number in [100, 600, 1100, 1600] {
        for device in devices.clone().take(20) {
            assert_ne!(hyp.host_fault(device), HostFault::Denied);
        }
        let page = Ram::page(number);
        assert!(hyp.host_reaches(page));
        hyp.host_donate_hyp(Pages::one(page)).unwrap();
        assert!(!hyp.host_reaches(page));
        assert!(hyp.host_reaches(Ram::page(number + 1)));
    }
    // Devices are mapped anew.
    let device = Hpa::new(512 * GIB);
    let again = hyp.host_fault(device);
    assert!(matches!(
        again,
        HostFault::Mapped { .. } | HostFault::Spurious
    ));
    hyp.audit().unwrap();
}

#[test]
#[should_panic(expected = "NoMemory")]
fn a_pool_that_is_too_small_for_all_memory_is_refused_at_the_start() {
    // 16 MiB of memory need eight tables of pages, two above them, the root, and a path of three.
    let _ = Ram::new(4096, 12).with_address_bits(48).boot();
}

#[test]
fn a_pool_that_is_just_large_enough_serves_every_page() {
    let ram = Ram::new(4096, 14).with_address_bits(48);
    let hyp = ram.boot();
    for number in (14..4096).step_by(61) {
        for device in 1..8 {
            assert_ne!(
                hyp.host_fault(Hpa::new(device * 512 * GIB)),
                HostFault::Denied
            );
        }
        hyp.host_donate_hyp(Pages::one(Ram::page(number))).unwrap();
    }
    assert!(hyp.host_pool().1 > 0);
    for number in (14..4096).step_by(61) {
        hyp.hyp_donate_host(Pages::one(Ram::page(number))).unwrap();
    }
    hyp.audit().unwrap();
}

#[test]
fn a_page_that_the_hypervisor_gives_back_tells_nothing() {
    let ram = Ram::new(256, 64);
    let hyp = ram.boot();
    let page = Ram::page(100);
    hyp.host_donate_hyp(Pages::one(page)).unwrap();
    hyp.platform()
        .word(page, 17)
        .store(0x5ec2e7, std::sync::atomic::Ordering::SeqCst);
    hyp.hyp_donate_host(Pages::one(page)).unwrap();
    assert!(hyp.host_reaches(page) && hyp.platform().is_zero(page));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_mixture_of_touching_and_giving_keeps_the_host_to_its_own(
        steps in proptest::collection::vec((0u64..1024, 1u64..40, 0u8..3), 1..40)
    ) {
        let ram = Ram::new(1024, 64);
        let hyp = ram.boot();
        let mut given = [false; 1024];
        given[..64].fill(true);
        for (first, count, kind) in steps {
            let pages = Pages { start: Ram::page(first), count };
            let range = first as usize..(first + count).min(1024) as usize;
            let inside = first + count <= 1024;
            match kind {
                0 => {
                    let legal = inside && !given[range.clone()].contains(&true);
                    prop_assert_eq!(hyp.host_donate_hyp(pages).is_ok(), legal);
                    if legal {
                        given[range].fill(true);
                    }
                }
                1 => {
                    let legal = inside && first >= 64 && !given[range.clone()].contains(&false);
                    if first >= 64 {
                        prop_assert_eq!(hyp.hyp_donate_host(pages).is_ok(), legal);
                        if legal {
                            given[range].fill(false);
                        }
                    }
                }
                _ => {
                    for number in range {
                        let reaches = hyp.host_reaches(Ram::page(number as u64));
                        prop_assert_eq!(reaches, !given[number]);
                    }
                }
            }
        }
        hyp.audit().unwrap();
    }
}
