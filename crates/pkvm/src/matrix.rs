//! The rule book: for every state of a page, what each call answers.
//!
//! [`MATRIX`] is the table of SPEC 2.6 in full: each row a state, each column a call. [`run`] puts
//! a page into every state in turn, makes every call, and checks the answer, that a refused call
//! changed nothing, and that every page is in a legal joint state afterwards. It plays the host
//! with pages that the caller lends it, over whatever tables the hypervisor has: simulated memory
//! or the machine's own.

use crate::audit::Violation;
use crate::error::Error;
use crate::guest::{Access, GuestPage};
use crate::host_table::Owner;
use crate::hypervisor::Hypervisor;
use crate::page::{Pages, State};
use crate::platform::{Platform, write};
use crate::shared::HostVm;
use crate::vm::{Handle, Vcpu, Vm};
use core::fmt;
use twofold_arch::{Gfn, Hfn, Hpa};

/// A state that a page can be in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Case {
    /// The hypervisor's.
    Hyp,
    /// The host's.
    Host,
    /// The host's, lent to the hypervisor.
    LentToHyp,
    /// The same, and pinned.
    Pinned,
    /// The host's, lent to the secure world.
    LentToSecure,
    /// The host's, lent to an ordinary guest at frame A.
    LentToGuest,
    /// Given to a protected guest at frame A.
    Donated,
    /// Given to a protected guest at frame A, which lent it to the host.
    LentBack,
    /// Taken from a protected guest by force; it was at frame A.
    Reclaimed,
}

/// A call that changes a page's state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Move {
    /// host_donate_hyp
    DonateHyp,
    /// host_share_hyp
    ShareHyp,
    /// host_unshare_hyp
    UnshareHyp,
    /// pin_shared_mem
    Pin,
    /// host_share_ffa
    ShareSecure,
    /// host_unshare_ffa
    UnshareSecure,
    /// hyp_donate_host
    GiveBack,
    /// host_share_guest at frame A of the ordinary guest
    ShareGuestA,
    /// host_share_guest at frame B of the ordinary guest
    ShareGuestB,
    /// host_unshare_guest at frame A of the ordinary guest
    UnshareGuestA,
    /// host_donate_guest at frame A of the protected guest
    DonateGuestA,
    /// host_donate_guest at frame B of the protected guest
    DonateGuestB,
    /// guest_share_host at frame A of the protected guest
    GuestShareA,
    /// guest_unshare_host at frame A of the protected guest
    GuestUnshareA,
    /// force_reclaim_guest_page
    ForceReclaim,
    /// reclaim_dying_guest_page at frame A of the protected guest, which is not dying
    ReclaimA,
}

use Error::{Again, Busy, Invalid, NotFound as Missing, NotPermitted as No, Poisoned};

/// What a call answers.
pub type Answer = Result<(), Error>;
const YES: Answer = Ok(());
const fn no(error: Error) -> Answer {
    Err(error)
}

/// The calls, in the order of the columns of [`MATRIX`].
pub const MOVES: [Move; 16] = [
    Move::DonateHyp,
    Move::ShareHyp,
    Move::UnshareHyp,
    Move::Pin,
    Move::ShareSecure,
    Move::UnshareSecure,
    Move::GiveBack,
    Move::ShareGuestA,
    Move::ShareGuestB,
    Move::UnshareGuestA,
    Move::DonateGuestA,
    Move::DonateGuestB,
    Move::GuestShareA,
    Move::GuestUnshareA,
    Move::ForceReclaim,
    Move::ReclaimA,
];

/// For each state, the answer to each of [`MOVES`].
#[rustfmt::skip]
pub const MATRIX: [(Case, [Answer; 16]); 9] = {
    const N: Answer = no(No);
    const M: Answer = no(Missing);
    const I: Answer = no(Invalid);
    const A: Answer = no(Again);
    const B: Answer = no(Busy);
    const P: Answer = no(Poisoned);
    const Y: Answer = YES;
    [
        //                    donate share unsh. pin  ffa  un-  give share share unsh. don. don. g.   g.   force recl.
        //                    hyp    hyp   hyp             ffa  back g. A  g. B  g. A  g. A g. B sh.  un.        A
        (Case::Hyp,          [N,     N,    N,    N,   N,   N,   Y,   N,    N,    M,    N,   N,   M,   M,   N,    I]),
        (Case::Host,         [Y,     Y,    N,    N,   Y,   N,   N,   Y,    Y,    M,    Y,   Y,   M,   M,   A,    I]),
        (Case::LentToHyp,    [N,     N,    Y,    Y,   N,   N,   N,   N,    N,    M,    N,   N,   M,   M,   A,    I]),
        (Case::Pinned,       [N,     N,    B,    Y,   N,   N,   N,   N,    N,    M,    N,   N,   M,   M,   A,    I]),
        (Case::LentToSecure, [N,     N,    N,    N,   N,   Y,   N,   N,    N,    M,    N,   N,   M,   M,   A,    I]),
        (Case::LentToGuest,  [N,     N,    N,    N,   N,   N,   N,   N,    Y,    Y,    N,   N,   M,   M,   A,    I]),
        (Case::Donated,      [N,     N,    N,    N,   N,   N,   N,   N,    N,    M,    N,   N,   Y,   N,   Y,    I]),
        (Case::LentBack,     [N,     N,    N,    N,   N,   N,   N,   N,    N,    M,    N,   N,   N,   Y,   N,    I]),
        (Case::Reclaimed,    [Y,     Y,    N,    N,   Y,   N,   N,   Y,    Y,    M,    N,   Y,   P,   P,   A,    I]),
    ]
};

/// Pages that [`run`] needs, all of them the host's and untouched.
pub const SCRATCH_PAGES: u64 = 32;

/// What went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// A call answered something else.
    Answer {
        /// The state.
        case: Case,
        /// The call.
        call: Move,
        /// What it should have answered.
        expected: Answer,
        /// What it answered.
        found: Answer,
    },
    /// A refused call changed something.
    Changed {
        /// The state.
        case: Case,
        /// The call.
        call: Move,
    },
    /// A page is in no legal state.
    Violation(Violation),
    /// The setting could not be made or taken apart: which step, and the answer.
    Setting(&'static str, Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// How many calls were answered as they should, and how many of them refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Score {
    /// Calls that succeeded.
    pub granted: u32,
    /// Calls that were refused and changed nothing.
    pub refused: u32,
}

/// Everything about a page that a refused call must leave alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Picture {
    host: State,
    hyp: State,
    count: u16,
    shares: u32,
    owner: Option<Owner>,
    guests: [Result<GuestPage, Error>; 4],
}

struct Setting<'h, 'm, P> {
    hyp: &'h Hypervisor<'m, P>,
    ordinary: Handle,
    protected: Handle,
    /// The page that changes hands.
    page: Hfn,
    /// Frame A; B is the next. New ones for each call, since poison stays.
    a: Gfn,
}

fn step<T>(name: &'static str, result: Result<T, Error>) -> Result<T, Failure> {
    result.map_err(|error| Failure::Setting(name, error))
}

impl<P: Platform> Setting<'_, '_, P> {
    fn b(&self) -> Gfn {
        Gfn::new(self.a.get() + 1)
    }

    fn with<T>(&self, handle: Handle, body: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.hyp.vcpu_load(handle, 0)?;
        let result = body();
        self.hyp.vcpu_put()?;
        result
    }

    fn with_protected(&self, body: impl FnOnce(&Vm, &Vcpu) -> Answer) -> Answer {
        self.with(self.protected, || self.hyp.with_loaded(body))
    }

    fn make(&self, call: Move) -> Answer {
        let (hyp, page) = (self.hyp, self.page);
        let one = Pages::one(page);
        let share = |gfn| {
            self.with(self.ordinary, || {
                hyp.share_guest(one, gfn, Access::all().bits())
            })
        };
        let donate = |gfn| self.with(self.protected, || hyp.donate_guest(page, gfn));
        match call {
            Move::DonateHyp => hyp.host_donate_hyp(one),
            Move::ShareHyp => hyp.host_share_hyp(page),
            Move::UnshareHyp => hyp.host_unshare_hyp(page),
            Move::Pin => hyp.pin(page),
            Move::ShareSecure => hyp.host_share_ffa(one),
            Move::UnshareSecure => hyp.host_unshare_ffa(one),
            Move::GiveBack => hyp.hyp_donate_host(one),
            Move::ShareGuestA => share(self.a),
            Move::ShareGuestB => share(self.b()),
            Move::UnshareGuestA => hyp.unshare_guest(self.ordinary, self.a, 1),
            Move::DonateGuestA => donate(self.a),
            Move::DonateGuestB => donate(self.b()),
            Move::GuestShareA => self.with_protected(|vm, _| hyp.guest_share_host(vm, self.a)),
            Move::GuestUnshareA => self.with_protected(|vm, _| hyp.guest_unshare_host(vm, self.a)),
            Move::ForceReclaim => hyp.force_reclaim_guest_page(page),
            Move::ReclaimA => hyp.reclaim_dying_guest_page(self.protected, self.a),
        }
    }

    /// Brings a page of the host's into a state.
    fn enter(&self, case: Case) -> Result<(), Failure> {
        let steps: &[Move] = match case {
            Case::Hyp => &[Move::DonateHyp],
            Case::Host => &[],
            Case::LentToHyp => &[Move::ShareHyp],
            Case::Pinned => &[Move::ShareHyp, Move::Pin],
            Case::LentToSecure => &[Move::ShareSecure],
            Case::LentToGuest => &[Move::ShareGuestA],
            Case::Donated => &[Move::DonateGuestA],
            Case::LentBack => &[Move::DonateGuestA, Move::GuestShareA],
            Case::Reclaimed => &[Move::DonateGuestA, Move::ForceReclaim],
        };
        steps
            .iter()
            .try_for_each(|&call| step("enter a state", self.make(call)))
    }

    /// Makes the page the host's alone again, whatever it is.
    fn leave(&self) -> Result<(), Failure> {
        let hyp = self.hyp;
        let record = hyp
            .pages()
            .record(self.page)
            .ok_or(Failure::Setting("find the page", Error::Fault))?;
        match (record.host(), record.hyp()) {
            (State::Owned, _) => Ok(()),
            (_, State::Owned) => step("give back", self.make(Move::GiveBack)),
            (_, State::SharedBorrowed) => {
                while record.count() > 0 {
                    step("unpin", hyp.unpin(self.page))?;
                }
                step("unshare", self.make(Move::UnshareHyp))
            }
            (State::SharedOwned, _) if record.shares() == 0 => {
                step("unshare secure", self.make(Move::UnshareSecure))
            }
            (State::SharedOwned, _) => {
                for gfn in [self.a, self.b()] {
                    match hyp.unshare_guest(self.ordinary, gfn, 1) {
                        Ok(()) | Err(Error::NotFound) => {}
                        Err(error) => return Err(Failure::Setting("unshare guest", error)),
                    }
                }
                Ok(())
            }
            (State::SharedBorrowed, _) => {
                step("unshare from the guest", self.make(Move::GuestUnshareA))?;
                step("force", self.make(Move::ForceReclaim))
            }
            (State::NoPage, _) => step("force", self.make(Move::ForceReclaim)),
        }
    }

    fn picture(&self) -> Option<Picture> {
        let record = self.hyp.pages().record(self.page)?;
        let owner = self.hyp.host.lock().owner(&self.hyp.env(), self.page);
        let look = |handle, gfn| self.hyp.guest_page(handle, gfn);
        Some(Picture {
            host: record.host(),
            hyp: record.hyp(),
            count: record.count(),
            shares: record.shares(),
            owner,
            guests: [
                look(self.ordinary, self.a),
                look(self.ordinary, self.b()),
                look(self.protected, self.a),
                look(self.protected, self.b()),
            ],
        })
    }

    fn audit(&self) -> Result<(), Failure> {
        self.hyp.audit().map(|_| ()).map_err(Failure::Violation)
    }

    fn check(&mut self, case: Case, answers: &[Answer], score: &mut Score) -> Result<(), Failure> {
        for (&call, &expected) in MOVES.iter().zip(answers) {
            self.enter(case)?;
            let before = self.picture();
            let found = self.make(call);
            if found != expected {
                return Err(Failure::Answer {
                    case,
                    call,
                    expected,
                    found,
                });
            }
            let same = self.picture() == before;
            if same == found.is_ok() {
                return Err(Failure::Changed { case, call });
            }
            if found.is_ok() {
                score.granted += 1;
            } else {
                score.refused += 1;
            }
            self.audit()?;
            self.leave()?;
            self.audit()?;
            self.a = Gfn::new(self.a.get() + 2);
        }
        Ok(())
    }
}

/// The places of the host's records and pages in the scratch pages.
struct Layout {
    base: Hfn,
}

impl Layout {
    const fn page(&self, number: u64) -> Hfn {
        Hfn::new(self.base.get() + number)
    }

    fn host_vm(&self, number: u64) -> Hpa {
        Hpa::new(self.base.address().get() + number * 256)
    }

    fn host_vcpu(&self, number: u64) -> Hpa {
        Hpa::new(self.page(1).address().get() + number * 256)
    }
}

/// Plays the host with [`SCRATCH_PAGES`] pages from `scratch` on, and runs the whole matrix.
/// `report` hears of every row that has passed. This processor must have no vCPU loaded. The pages
/// are the host's again at the end.
///
/// # Errors
/// The first [`Failure`].
pub fn run<P: Platform>(
    hyp: &Hypervisor<'_, P>,
    scratch: Hfn,
    mut report: impl FnMut(Case, Score),
) -> Result<Score, Failure> {
    let layout = Layout { base: scratch };
    let platform = hyp.platform();
    // The host's records: pages 0 and 1, shared with the hypervisor and pinned while we write.
    for page in [layout.page(0), layout.page(1)] {
        step("share the records", hyp.host_share_hyp(page))?;
        step("pin the records", hyp.pin(page))?;
    }
    let set = |address: Hpa, word: usize, value: u64| {
        let index = address.page_offset() as usize / 8 + word;
        write(platform, address.frame(), index, value);
    };
    let mut handles = [None; 2];
    for (number, kind) in [(0, 0), (1, HostVm::PROTECTED)] {
        let (host_vm, host_vcpu) = (layout.host_vm(number), layout.host_vcpu(number));
        let handle = step("reserve", hyp.reserve_vm(host_vm))?;
        set(host_vm, 0, u64::from(handle.get()));
        set(host_vm, 1, 1);
        // 35 bits: a root of one page, and the deepest tables.
        set(host_vm, 2, kind | 35 << HostVm::IPA_SHIFT);
        for word in 3..HostVm::WORDS {
            set(host_vm, word, 0);
        }
        let first = 2 + 3 * number;
        let (area, root) = (layout.page(first), layout.page(first + 1));
        step("init_vm", hyp.init_vm(host_vm, area, root))?;
        for word in 0..5 {
            set(host_vcpu, word, 0);
        }
        // Pages for tables, linked by their first words while they still are the host's.
        let stock = 16 + 8 * number;
        for page in stock..stock + 8 {
            let next = if page + 1 < stock + 8 {
                layout.page(page + 1).address().get()
            } else {
                0
            };
            platform.map(layout.page(page));
            write(platform, layout.page(page), 0, next);
            platform.unmap(layout.page(page));
        }
        set(host_vcpu, 3, layout.page(stock).address().get());
        set(host_vcpu, 4, 8);
        let area = layout.page(first + 2);
        step("init_vcpu", hyp.init_vcpu(handle, host_vcpu, area))?;
        handles[number as usize] = Some(handle);
    }
    let [Some(ordinary), Some(protected)] = handles else {
        return Err(Failure::Setting("two VMs", Error::Invalid));
    };
    let mut setting = Setting {
        hyp,
        ordinary,
        protected,
        page: layout.page(8),
        a: Gfn::new(0x100),
    };
    let mut total = Score::default();
    for (case, answers) in &MATRIX {
        let mut score = Score::default();
        setting.check(*case, answers, &mut score)?;
        report(*case, score);
        total.granted += score.granted;
        total.refused += score.refused;
    }
    for handle in [ordinary, protected] {
        step("start_teardown", hyp.start_teardown_vm(handle))?;
        step("finalize_teardown", hyp.finalize_teardown_vm(handle))?;
    }
    for page in [layout.page(0), layout.page(1)] {
        step("unpin the records", hyp.unpin(page))?;
        step("unshare the records", hyp.host_unshare_hyp(page))?;
    }
    for number in 0..SCRATCH_PAGES {
        let record = hyp.pages().record(layout.page(number));
        if !record.is_some_and(|record| record.is_untouched()) {
            return Err(Failure::Setting("every page is back", Error::Busy));
        }
    }
    setting.audit()?;
    Ok(total)
}
