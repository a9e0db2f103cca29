//! Sub-page write protection: a processor that walks the tables knowing only `twofold-arch` is
//! allowed what the access maps say, on every path by which a leaf is made or changed.
//!
#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod calls;
#[path = "../common/mod.rs"]
mod common;
mod defects;
mod paths;
mod writes_noticed;

use common::guarded::{AT_ONCE, Guarded, Written};
use common::vm::Vm;
use twofold_arch::sppt::AccessMap;
use twofold_mmu::{Config, Ept};

/// Slots are zapped one by one, so that what happens to one is seen.
fn config() -> Config {
    Config {
        slot_zap_all: false,
        ..Config::default()
    }
}

fn vm() -> Vm<Ept> {
    Vm::guarded(config())
}

/// The guest-physical address of a sub-page of a frame.
const fn at(gfn: u64, sub_page: u64) -> u64 {
    gfn << 12 | sub_page << 7
}

fn maps(maps: &[u32]) -> Vec<AccessMap> {
    maps.iter().map(|map| AccessMap(*map)).collect()
}

#[test]
fn a_guest_writes_what_its_maps_allow_and_nothing_else() {
    let mut vm = vm();
    vm.slot(0, 0, 512, 0);
    vm.protect(5, 0x0000_00f0);
    for sub_page in 0..32 {
        let written = vm.write(at(5, sub_page) + 77);
        match sub_page {
            4 => assert_eq!(
                written,
                Written::Done {
                    faults: 1,
                    misses: 1
                }
            ),
            5..8 => assert_eq!(written, AT_ONCE),
            _ => assert_eq!(written, Written::Denied),
        }
    }
    assert!(vm.write(at(6, 0)).is_done());
    vm.is_sound();
}
