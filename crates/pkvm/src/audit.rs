//! Is every page in one of the states that make sense together (SPEC 2.2)?

use crate::host_table::Owner;
use crate::hypervisor::Hypervisor;
use crate::page::State;
use crate::platform::Platform;
use core::fmt;
use twofold_arch::{Gfn, Hfn};
use twofold_table::stage2::Stage2K4;
use twofold_table::{Entry, Format};

/// A page that is not in a legal joint state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// The records and the host's entry do not belong together.
    Record {
        /// The page.
        page: Hfn,
        /// The host's state.
        host: State,
        /// The hypervisor's state.
        hyp: State,
        /// How many guest pages borrow it.
        shares: u32,
        /// Who has it, by the host's table.
        owner: Option<Owner>,
    },
    /// The host's table maps the page elsewhere.
    NotItself(Hfn),
    /// A guest's page is not in the state that the page's record says.
    Guest {
        /// The VM's number.
        handle: u32,
        /// The guest's frame.
        gfn: Gfn,
        /// The page.
        page: Hfn,
        /// The guest's state.
        state: State,
    },
    /// The guests together have not as many pages as the records say.
    Count {
        /// Pages lent to guests, with multiplicity, and pages that are guests'; by the records.
        records: (u64, u64),
        /// The same, by the guests' tables.
        guests: (u64, u64),
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// How many pages are in which state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Census {
    /// The host's alone.
    pub host: u64,
    /// The host's, lent to the hypervisor.
    pub lent_to_hyp: u64,
    /// The host's, lent to the secure world.
    pub lent_to_secure: u64,
    /// The host's, lent to guests.
    pub lent_to_guests: u64,
    /// The hypervisor's.
    pub hyp: u64,
    /// Guests'.
    pub guests: u64,
    /// Guests', lent to the host.
    pub lent_to_host: u64,
}

impl<P: Platform> Hypervisor<'_, P> {
    /// Checks every page of memory and every guest's table.
    ///
    /// # Errors
    /// The first [`Violation`].
    pub fn audit(&self) -> Result<Census, Violation> {
        let vms = self.vms.lock();
        let host = self.host.lock();
        let env = self.env();
        let mut census = Census::default();
        let mut shares = 0;
        for (page, record) in self.pages.iter() {
            let entry = host.look(&env, page);
            let owner = entry.and_then(|seen| Owner::of_entry(seen.value()));
            let kind = entry.map(|seen| seen.entry::<Stage2K4>());
            if let (Some(seen), Some(Entry::Leaf)) = (entry, kind) {
                let base = Stage2K4::leaf_address(seen.value(), seen.place().height());
                if base.get() != seen.place().gpa().get() {
                    return Err(Violation::NotItself(page));
                }
            }
            let mapped = kind == Some(Entry::Leaf);
            let state = (record.host(), record.hyp(), record.shares(), owner);
            let counter = match state {
                (State::Owned, State::NoPage, 0, None) if record.count() == 0 => &mut census.host,
                (State::SharedOwned, State::SharedBorrowed, 0, None) => &mut census.lent_to_hyp,
                (State::SharedOwned, State::NoPage, 0, None) => &mut census.lent_to_secure,
                (State::SharedOwned, State::NoPage, _, None) => &mut census.lent_to_guests,
                (State::NoPage, State::Owned, 0, Some(Owner::Hyp)) => &mut census.hyp,
                (State::NoPage, State::NoPage, 0, Some(Owner::Guest { .. })) => &mut census.guests,
                (State::SharedBorrowed, State::NoPage, 0, None) if mapped => {
                    &mut census.lent_to_host
                }
                _ => {
                    return Err(Violation::Record {
                        page,
                        host: record.host(),
                        hyp: record.hyp(),
                        shares: record.shares(),
                        owner,
                    });
                }
            };
            *counter += 1;
            shares += u64::from(record.shares());
        }
        let mut guests = (0, 0);
        let mut wrong = None;
        for vm in vms.vms() {
            let handle = vm.handle.get();
            vm.guest
                .lock()
                .for_each_page(&self.storage, |gfn, page, state| {
                    let record = self.pages.record(page);
                    let host_state = record.map(|record| record.host());
                    let right = match state {
                        State::Owned => {
                            guests.1 += 1;
                            let expected = Owner::Guest {
                                handle: handle as u16,
                                gfn: gfn.get(),
                            };
                            host_state == Some(State::NoPage)
                                && host.owner(&env, page) == Some(expected)
                        }
                        State::SharedOwned => {
                            guests.1 += 1;
                            host_state == Some(State::SharedBorrowed)
                        }
                        State::SharedBorrowed => {
                            guests.0 += 1;
                            record.is_some_and(|record| record.shares() > 0)
                        }
                        State::NoPage => false,
                    };
                    if !right {
                        wrong = Some(Violation::Guest {
                            handle,
                            gfn,
                            page,
                            state,
                        });
                    }
                });
        }
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        let records = (shares, census.guests + census.lent_to_host);
        if records != guests {
            return Err(Violation::Count { records, guests });
        }
        Ok(census)
    }
}
