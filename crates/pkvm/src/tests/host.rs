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
    // A pool so small that device tables fill it.
    let ram = Ram::new(2048, 16);
    let hyp = ram.boot();
    // Beside memory devices cannot have large blocks: each 2 MiB below the next 1 GiB needs only
    // the table that exists, but the pages around the end of memory need more.
    let mut donated = 0;
    for number in 0..3 {
        hyp.host_donate_hyp(Pages::one(Ram::page(512 + number * 512 % 1536)))
            .unwrap();
        donated += 1;
        for gib in 0..64 {
            let address = gib * GIB + 0x20_0000;
            if address >> 30 != 1 {
                assert_ne!(hyp.host_fault(Hpa::new(address)), HostFault::Denied);
            }
        }
    }
    assert_eq!(donated, 3);
    hyp.audit().unwrap();
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
