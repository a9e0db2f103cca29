//! The buddy pool.

use crate::page::{PageMap, PageRecord, Region};
use crate::pool::{Pool, Reach};
use crate::testing::{BASE, PA_BITS, Ram};
use proptest::prelude::*;
use std::sync::atomic::Ordering::SeqCst;
use twofold_arch::Hfn;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn blocks_are_aligned_empty_and_apart_and_all_come_back(
        steps in proptest::collection::vec((0usize..5, any::<bool>(), any::<prop::sample::Index>()), 1..80)
    ) {
        // The machine's own pool is not used: its memory is a second one, all mapped.
        let ram = Ram::new(256, 256);
        let hyp = ram.boot();
        let platform = hyp.platform();
        let regions = [Region { start: Hfn::new(BASE), pages: 256, no_map: false }];
        let records: Vec<_> = (0..256).map(|_| PageRecord::new()).collect();
        let pages = PageMap::new(&regions, &records, PA_BITS).unwrap();
        let reach = Reach { platform, pages: &pages };
        let mut pool = Pool::new(reach, Hfn::new(BASE + 3), Hfn::new(BASE + 203));
        prop_assert_eq!(pool.free_pages(), 200);
        let mut held: Vec<(Hfn, usize)> = Vec::new();
        for (order, give, index) in steps {
            if give && !held.is_empty() {
                let (page, _) = held.swap_remove(index.index(held.len()));
                pool.free(reach, page);
                continue;
            }
            let Some(page) = pool.allocate(reach, order) else {
                continue;
            };
            prop_assert!(page.is_aligned(1 << order));
            let range = page.get()..page.get() + (1 << order);
            prop_assert!(range.start >= BASE + 3 && range.end <= BASE + 203);
            for &(other, order) in &held {
                let other = other.get()..other.get() + (1 << order);
                prop_assert!(range.end <= other.start || other.end <= range.start);
            }
            for number in range {
                prop_assert!(platform.is_zero(Hfn::new(number)), "page {number:#x} is not empty");
                platform.word(Hfn::new(number), 7).store(1, SeqCst);
            }
            held.push((page, order));
        }
        let total: u64 = held.iter().map(|&(_, order)| 1 << order).sum();
        prop_assert_eq!(pool.free_pages() + total, 200);
        for (page, _) in held {
            pool.free(reach, page);
        }
        prop_assert_eq!(pool.free_pages(), 200);
        // Everything has merged again: the largest block that fits is there.
        prop_assert!(pool.allocate(reach, 6).is_some());
    }
}

#[test]
fn the_pages_of_a_split_block_come_back_one_by_one() {
    let ram = Ram::new(64, 64);
    let hyp = ram.boot();
    let regions = [Region {
        start: Hfn::new(BASE),
        pages: 64,
        no_map: false,
    }];
    let records: Vec<_> = (0..64).map(|_| PageRecord::new()).collect();
    let pages = PageMap::new(&regions, &records, PA_BITS).unwrap();
    let reach = Reach {
        platform: hyp.platform(),
        pages: &pages,
    };
    let mut pool = Pool::new(reach, Hfn::new(BASE), Hfn::new(BASE + 64));
    let block = pool.allocate(reach, 3).unwrap();
    pool.split(reach, block);
    for offset in [5, 0, 7, 1, 3, 2, 6, 4] {
        pool.free(reach, Hfn::new(block.get() + offset));
    }
    assert_eq!(pool.free_pages(), 64);
    assert!(pool.allocate(reach, 6).is_some(), "merged");
}
