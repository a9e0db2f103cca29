//! Every interleaving of the calls that meet in the table of VMs, in a page and in a ring of events.

use super::setting::*;
use crate::error::Error;
use crate::page::State;
use crate::testing::{Accesses, Ram, become_processor};
use crate::trace::Event;
use crate::vm::Handle;
use loom::sync::Arc;
use loom::thread;
use std::sync::atomic::Ordering::SeqCst;
use twofold_arch::{Gfn, Hfn};

const PLACE: Place = Place(16);
/// A guest's call.
const MEM_SHARE: u64 = 0xc600_0003;

/// A hypervisor that threads can share, and what it stands on.
struct World {
    hyp: Option<Hyp<'static>>,
    ram: *mut Ram,
}

#[expect(unsafe_code, reason = "threads of a model need a lifetime without end")]
// SAFETY: the pointer is only used when the world ends.
unsafe impl Send for World {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above.
unsafe impl Sync for World {}

impl World {
    fn new() -> Self {
        let ram = Box::into_raw(Box::new(Ram::new(48, 12)));
        // SAFETY: freed in `drop`, after the hypervisor.
        #[expect(unsafe_code, reason = "as above")]
        let hyp = unsafe { &*ram }.boot();
        Self {
            hyp: Some(hyp),
            ram,
        }
    }

    fn hyp(&self) -> &Hyp<'static> {
        self.hyp.as_ref().unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.hyp = None;
        // SAFETY: from `Box::into_raw`, and nobody refers to it any more.
        #[expect(unsafe_code, reason = "as above")]
        drop(unsafe { Box::from_raw(self.ram) });
    }
}

fn explore(model: impl Fn() + Sync + Send + 'static) {
    loom::model(model);
}

fn on_processor<T: 'static>(
    world: &Arc<World>,
    number: usize,
    body: impl FnOnce(&Hyp<'static>) -> T + 'static,
) -> thread::JoinHandle<T> {
    let world = Arc::clone(world);
    thread::spawn(move || {
        become_processor(number);
        body(world.hyp())
    })
}

/// A protected VM, and the one page that its guest has.
fn start_with_a_page(hyp: &Hyp<'_>) -> (Handle, Hfn, Gfn) {
    let tables = [Ram::page(40), Ram::page(41)];
    let handle = start(hyp, PLACE, true, &tables);
    let (page, gfn) = (Ram::page(44), Gfn::new(3));
    with(hyp, handle, || hyp.donate_guest(page, gfn)).unwrap();
    (handle, page, gfn)
}

#[test]
fn a_load_beside_the_building_of_a_vm_finds_all_of_it_or_nothing() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let handle = reserve(hyp, PLACE, 1, true);
        fill_vcpu(hyp, PLACE, 0, &[]);
        let other = on_processor(&world, 1, move |hyp| {
            let loaded = hyp.vcpu_load(handle, 0);
            if loaded.is_ok() {
                hyp.with_loaded(|vm, vcpu| {
                    assert_eq!((vm.handle, vm.created_vcpus), (handle, 1));
                    assert_eq!(vcpu.inner.lock().registers.pc, 0x1000);
                    Ok(())
                })
                .unwrap();
                hyp.vcpu_put().unwrap();
            }
            loaded
        });
        hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root())
            .unwrap();
        hyp.init_vcpu(handle, PLACE.host_vcpu(0), PLACE.vcpu_area(0))
            .unwrap();
        assert!(matches!(
            other.join().unwrap(),
            Ok(()) | Err(Error::NotFound)
        ));
        end(hyp, PLACE, handle);
        hyp.audit().unwrap();
    });
}

#[test]
fn of_two_that_build_one_vm_one_succeeds_and_the_others_pages_come_back() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let handle = reserve(hyp, PLACE, 1, true);
        let other = on_processor(&world, 1, |hyp| {
            hyp.init_vm(PLACE.host_vm(), Ram::page(30), Ram::page(31))
        });
        let mine = hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root());
        let others = other.join().unwrap();
        let mut results = [mine, others];
        results.sort_by_key(Result::is_err);
        assert_eq!(results, [Ok(handle), Err(Error::Exists)]);
        let lost = if mine.is_ok() { 30 } else { PLACE.0 + 1 };
        let record = hyp.pages().record(Ram::page(lost)).unwrap();
        assert!(record.is_untouched());
        end(hyp, PLACE, handle);
        hyp.audit().unwrap();
    });
}

#[test]
fn a_load_and_a_teardown_exclude_each_other() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let handle = start(hyp, PLACE, true, &[]);
        let other = on_processor(&world, 1, move |hyp| {
            let loaded = hyp.vcpu_load(handle, 0);
            if loaded.is_ok() {
                // As long as it is loaded the VM is there.
                hyp.with_loaded(|vm, _| {
                    assert_eq!(vm.handle, handle);
                    Ok(())
                })
                .unwrap();
                hyp.vcpu_put().unwrap();
            }
            loaded
        });
        let ended = hyp
            .start_teardown_vm(handle)
            .and_then(|()| hyp.finalize_teardown_vm(handle));
        let loaded = other.join().unwrap();
        assert!(ended.is_ok() || loaded.is_ok());
        if ended.is_err() {
            hyp.start_teardown_vm(handle).unwrap();
            hyp.finalize_teardown_vm(handle).unwrap();
        }
        hyp.audit().unwrap();
    });
}

#[test]
fn a_vcpu_built_while_its_vm_ends_is_part_of_it_or_refused() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let handle = reserve(hyp, PLACE, 1, true);
        fill_vcpu(hyp, PLACE, 0, &[]);
        hyp.init_vm(PLACE.host_vm(), PLACE.area(), PLACE.root())
            .unwrap();
        let other = on_processor(&world, 1, move |hyp| {
            hyp.init_vcpu(handle, PLACE.host_vcpu(0), PLACE.vcpu_area(0))
        });
        hyp.start_teardown_vm(handle).unwrap();
        hyp.finalize_teardown_vm(handle).unwrap();
        let built = other.join().unwrap();
        assert!(matches!(
            built,
            Ok(()) | Err(Error::Invalid | Error::NotFound)
        ));
        // Either way the page came back, and nothing is pinned.
        let record = hyp.pages().record(PLACE.vcpu_area(0)).unwrap();
        assert!(record.is_untouched());
        hyp.host_unshare_hyp(PLACE.record_page()).unwrap();
        hyp.audit().unwrap();
    });
}

#[test]
fn a_page_that_two_give_away_goes_to_one() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let tables = [Ram::page(40), Ram::page(41)];
        let handle = start(hyp, PLACE, true, &tables);
        let page = Ram::page(44);
        let other = on_processor(&world, 1, move |hyp| hyp.host_share_hyp(page));
        let mine = with(hyp, handle, || hyp.donate_guest(page, Gfn::new(3)));
        let others = other.join().unwrap();
        let mut results = [mine, others];
        results.sort_by_key(Result::is_err);
        assert_eq!(results, [Ok(()), Err(Error::NotPermitted)]);
        hyp.audit().unwrap();
        end(hyp, PLACE, handle);
    });
}

#[test]
fn a_forced_reclaim_beside_an_orderly_one_wipes_the_page_once_and_for_all() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let (handle, page, gfn) = start_with_a_page(hyp);
        hyp.start_teardown_vm(handle).unwrap();
        let other = on_processor(&world, 1, move |hyp| hyp.force_reclaim_guest_page(page));
        let mine = hyp.reclaim_dying_guest_page(handle, gfn);
        let others = other.join().unwrap();
        // Poison counts as reclaimed.
        assert_eq!(mine, Ok(()));
        assert!(matches!(others, Ok(()) | Err(Error::Again)));
        assert!(hyp.platform().is_zero(page));
        let record = hyp.pages().record(page).unwrap();
        assert_eq!(record.host(), State::Owned);
        hyp.finalize_teardown_vm(handle).unwrap();
        hyp.audit().unwrap();
    });
}

#[test]
fn a_page_that_a_guest_shows_while_the_host_takes_it_is_shown_or_taken() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let (handle, page, gfn) = start_with_a_page(hyp);
        hyp.platform().word(page, 5).store(7, SeqCst);
        let other = on_processor(&world, 1, move |hyp| {
            guest_call(hyp, handle, [MEM_SHARE, gfn.address().get(), 0, 0])
        });
        let taken = hyp.force_reclaim_guest_page(page);
        let shown = other.join().unwrap();
        match taken {
            Ok(()) => assert_eq!(shown, Some(-3i64 as u64)),
            Err(error) => assert_eq!((error, shown), (Error::NotPermitted, Some(0))),
        }
        let found = hyp.platform().word(page, 5).load(SeqCst);
        assert_eq!(found, if taken.is_ok() { 0 } else { 7 });
        hyp.audit().unwrap();
        end(hyp, PLACE, handle);
    });
}

#[test]
fn the_end_of_a_vm_waits_for_the_last_page_to_be_reclaimed() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let (handle, page, gfn) = start_with_a_page(hyp);
        hyp.start_teardown_vm(handle).unwrap();
        let other = on_processor(&world, 1, move |hyp| {
            hyp.reclaim_dying_guest_page(handle, gfn)
        });
        let ended = hyp.finalize_teardown_vm(handle);
        assert_eq!(other.join().unwrap(), Ok(()));
        match ended {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, Error::Busy);
                hyp.finalize_teardown_vm(handle).unwrap();
            }
        }
        assert!(hyp.pages().record(page).unwrap().is_untouched());
        hyp.audit().unwrap();
    });
}

#[test]
fn of_two_that_end_a_vm_one_does() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let handle = start(hyp, PLACE, true, &[]);
        let both = move |hyp: &Hyp<'_>| {
            (
                hyp.start_teardown_vm(handle),
                hyp.finalize_teardown_vm(handle),
            )
        };
        let other = on_processor(&world, 1, both);
        let mine = both(hyp);
        let others = other.join().unwrap();
        for (a, b) in [(mine.0, others.0), (mine.1, others.1)] {
            assert!(
                a == Ok(()) && b == Err(Error::Invalid) || a == Err(Error::Invalid) && b == Ok(())
            );
        }
        assert!(returned(hyp, PLACE, 4).len() == 2);
        hyp.host_unshare_hyp(PLACE.record_page()).unwrap();
        hyp.audit().unwrap();
    });
}

#[test]
fn one_handle_goes_to_one_of_two() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let other = on_processor(&world, 1, |hyp| hyp.reserve_vm(PLACE.host_vm()));
        let mine = hyp.reserve_vm(PLACE.host_vm());
        let others = other.join().unwrap();
        let first = Handle::new(0x1000).unwrap();
        let mut results = [mine, others];
        results.sort_by_key(Result::is_err);
        assert_eq!(results, [Ok(first), Err(Error::Exists)]);
    });
}

#[test]
fn an_event_beside_unloading_goes_into_the_ring_or_nowhere() {
    explore(|| {
        let world = Arc::new(World::new());
        let hyp = world.hyp();
        let pages = PLACE.ring_pages();
        for page in [PLACE.record_page(), pages[0], pages[1]] {
            hyp.host_share_hyp(page).unwrap();
        }
        let words = [1, 2, pages[0].get(), pages[1].get()];
        hyp.host_writes(PLACE.ring_description(), &words);
        hyp.tracing_load(PLACE.ring_description(), 32).unwrap();
        hyp.tracing_enable_event(Event::Selftest as u64, true)
            .unwrap();
        hyp.tracing_enable(true).unwrap();
        // The same processor, so that both mean one ring.
        let other = on_processor(&world, 0, |hyp| hyp.trace(Event::Selftest, 1, 2));
        hyp.tracing_unload();
        for page in pages {
            hyp.host_unshare_hyp(page).unwrap();
            hyp.host_writes(page.address(), &[7; 512]);
        }
        other.join().unwrap();
        for page in pages {
            assert!((0..512).all(|index| word(hyp, page.address(), index) == 7));
        }
        hyp.audit().unwrap();
    });
}
