//! The life of a TD, from its key to the last page that comes back.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{World, info, refused};
use twofold_arch::{Gpa, Hpa};
use twofold_tdx::{Status, TDCX_PAGES, TDVPX_PAGES};

#[test]
fn a_key_belongs_to_one_td_at_a_time_and_must_be_a_private_one() {
    let world = World::empty();
    let module = &world.module;
    refused(module.mng_create(world.fresh(), 5), Status::OPERAND_INVALID);
    let first = world.fresh();
    module.mng_create(first, 40).unwrap();
    refused(module.mng_create(world.fresh(), 40), Status::HKID_NOT_FREE);
    refused(
        module.mng_create(first, 41),
        Status::PAGE_METADATA_INCORRECT,
    );
    module.mng_key_config(first).unwrap();
    module.mng_vp_flush_done(first).unwrap();
    module.mng_key_free_id(first).unwrap();
    module.mng_create(world.fresh(), 40).unwrap();
}

#[test]
fn a_td_is_initialised_once_with_all_its_control_pages() {
    let world = World::empty();
    let module = &world.module;
    let tdr = world.fresh();
    module.mng_create(tdr, 32).unwrap();
    refused(
        module.mng_add_cx(world.fresh(), tdr),
        Status::LIFECYCLE_STATE_INCORRECT,
    );
    module.mng_key_config(tdr).unwrap();
    refused(
        module.mng_key_config(tdr),
        Status::LIFECYCLE_STATE_INCORRECT,
    );
    for _ in 0..TDCX_PAGES {
        refused(
            module.mng_init(tdr, world.params(0)),
            Status::TDCX_NUM_INCORRECT,
        );
        module.mng_add_cx(world.fresh(), tdr).unwrap();
    }
    refused(
        module.mng_add_cx(world.fresh(), tdr),
        Status::TDCX_NUM_INCORRECT,
    );
    let nonsense = world.fresh();
    refused(module.mng_init(tdr, nonsense), Status::OPERAND_INVALID);
    refused(
        module.mng_init(tdr, Hpa::new(0x1000)),
        Status::OPERAND_INVALID,
    );
    module.mng_init(tdr, world.params(0)).unwrap();
    refused(
        module.mng_init(tdr, world.params(0)),
        Status::OP_STATE_INCORRECT,
    );
}

#[test]
fn a_virtual_processor_enters_once_it_is_initialised_and_the_td_measured() {
    let world = World::initialized(0, 1);
    let module = &world.module;
    let vcpu = world.vcpus[0];
    refused(module.vp_enter(vcpu).map(drop), Status::OP_STATE_INCORRECT);
    let unfinished = world.fresh();
    module.vp_create(unfinished, world.tdr).unwrap();
    refused(module.vp_init(unfinished, 0), Status::VCPU_STATE_INCORRECT);
    module.mr_finalize(world.tdr).unwrap();
    refused(
        module.vp_enter(unfinished).map(drop),
        Status::VCPU_STATE_INCORRECT,
    );
    let inside = module.vp_enter(vcpu).unwrap();
    refused(module.vp_enter(vcpu).map(drop), Status::OPERAND_BUSY);
    refused(module.vp_flush(vcpu), Status::OPERAND_BUSY);
    let info = inside.info().unwrap();
    assert_eq!((info.gpa_width, info.index, info.max_vcpus), (48, 0, 4));
    drop(inside);
    drop(module.vp_enter(vcpu).unwrap());
}

#[test]
fn the_number_of_virtual_processors_is_limited_by_the_parameters() {
    let world = World::initialized(0, 4);
    let fifth = world.module.vp_create(world.fresh(), world.tdr);
    refused(fifth, Status::OPERAND_INVALID);
    let page = world.fresh();
    let sixth = world.module.vp_add_cx(page, world.vcpus[0]);
    refused(sixth, Status::VCPU_STATE_INCORRECT);
    assert_eq!(world.module.metadata(page), None);
}

#[test]
fn every_page_comes_back_and_the_root_page_comes_last() {
    let world = World::initialized(0, 2);
    let module = &world.module;
    let before = world.machine().handed_out();
    world.tables(Gpa::new(0x20_0000), 1);
    world.tables(Gpa::new(0x5000), 0);
    module.mr_finalize(world.tdr).unwrap();
    let large = world.machine().large(0);
    module
        .page_aug(info(Gpa::new(0x20_0000), 1), world.tdr, large)
        .unwrap();
    module
        .page_aug(info(Gpa::new(0x5000), 0), world.tdr, world.fresh())
        .unwrap();
    drop(world.enter(0));
    refused(
        module.page_reclaim(large),
        Status::LIFECYCLE_STATE_INCORRECT,
    );
    refused(
        module.mng_vp_flush_done(world.tdr),
        Status::FLUSHVP_NOT_DONE,
    );
    for &vcpu in &world.vcpus {
        module.vp_flush(vcpu).unwrap();
    }
    refused(
        module.mng_key_free_id(world.tdr),
        Status::LIFECYCLE_STATE_INCORRECT,
    );
    module.mng_vp_flush_done(world.tdr).unwrap();
    refused(
        module.vp_enter(world.vcpus[0]).map(drop),
        Status::LIFECYCLE_STATE_INCORRECT,
    );
    module.mng_key_free_id(world.tdr).unwrap();
    refused(
        module.page_reclaim(world.tdr),
        Status::TD_ASSOCIATED_PAGES_EXIST,
    );
    assert!(before >= (TDCX_PAGES + 2 * TDVPX_PAGES) as u64);
    let mut reclaimed = 0;
    for page in world.machine().all_pages() {
        if page != world.tdr && module.metadata(page).is_some() {
            module.page_reclaim(page).unwrap();
            reclaimed += 1;
        }
    }
    // Control pages, virtual processors, three tables, and two pages of which one is large.
    assert_eq!(reclaimed, TDCX_PAGES + 2 * (1 + TDVPX_PAGES) + 3 + 2);
    module.page_reclaim(world.tdr).unwrap();
    refused(
        module.page_reclaim(world.tdr),
        Status::PAGE_METADATA_INCORRECT,
    );
    for page in world.machine().all_pages() {
        assert_eq!(module.metadata(page), None);
    }
}

#[test]
fn memory_outside_the_regions_never_becomes_private() {
    let world = World::initialized(0, 0);
    let outside = Hpa::new(0x1000);
    for status in [
        world
            .module
            .sept_add(info(Gpa::new(0), 3), world.tdr, outside),
        world.module.mng_create(outside, 50),
        world.module.vp_create(outside, world.tdr),
    ] {
        refused(status, Status::OPERAND_ADDR_RANGE_ERROR);
    }
    let unaligned = Hpa::new(common::BASE + 8);
    let status = world
        .module
        .sept_add(info(Gpa::new(0), 3), world.tdr, unaligned);
    refused(status, Status::OPERAND_INVALID);
}
