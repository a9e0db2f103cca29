//! What is done to the MMU, and the frames, slots and roots it is done with.

use proptest::prelude::*;
use twofold_arch::Level;
use twofold_mmu::{Config, ManualProtect, RootRole};

/// The guest frames that are looked at: ends of tables of every size, in slots and beside them.
pub(crate) const FRAMES: [u64; 18] = [
    0, 1, 2, 5, 0x1ff, 0x200, 0x201, 0x3ff, 0x400, 0x401, 0x5ff, 0x3_ffff, 0x4_0000, 0x4_0201,
    0x7_ffff, 0x7ff_ffff, 0x800_0000, 0x800_0001,
];

/// Slots: first frame, pages. Some overlap, so that not all can exist.
pub(crate) const PLACES: [(u64, u64); 11] = [
    (0, 4),
    (2, 6),
    (508, 8),
    (0, 0x400),
    (0x200, 0x400),
    (0x1f0, 0x420),
    (0, 0x4_0200),
    (0x3_fe00, 0x400),
    (0x4_0000, 0x4_0000),
    (0x7ff_fff0, 0x20),
    (0x800_0000, 0x200),
];

/// How far host pages are from guest frames: congruent for 1G pages, for 2M pages, for none.
pub(crate) const DISTANCES: [u64; 3] = [0x10_0000, 0x100_0200, 0x200_0004];

/// How far a slot moves.
pub(crate) const MOVES: [i64; 5] = [1, -1, 0x200, -0x200, 0x4_0000];

const fn role(level: Level, smm: bool, guest_mode: bool) -> RootRole {
    RootRole {
        level,
        smm,
        guest_mode,
        mirror: false,
    }
}

/// The roots that are loaded. Their entries are not shared, whatever they have in common.
pub(crate) const ROLES: [RootRole; 6] = [
    role(Level::L512G, false, false),
    role(Level::L256T, false, false),
    role(Level::L512G, true, false),
    role(Level::L512G, false, true),
    role(Level::L256T, true, false),
    role(Level::L256T, false, true),
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// Why the host refuses a page once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    Again,
    Interrupted,
    Poisoned,
}

/// Where host memory changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Extent {
    /// One page is replaced by another; it is not part of a larger one any more.
    Page {
        frame_now: u64,
        present: bool,
        writable: bool,
    },
    /// The 2M around it are one piece again.
    Large,
    /// The same for 1G.
    Huge,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Create {
        as_id: u16,
        id: u16,
        place: usize,
        distance: usize,
        flags: u32,
    },
    Delete {
        as_id: u16,
        id: u16,
    },
    Move {
        as_id: u16,
        id: u16,
        by: usize,
    },
    /// Logging begins, or ends.
    Flip {
        as_id: u16,
        id: u16,
    },
    /// The guest makes an access, and its fault is resolved. `anyway` asks for a resolution of a
    /// fault that another processor has resolved.
    Access {
        /// Whose translations are used.
        cpu: usize,
        role: usize,
        frame: usize,
        access: Access,
        anyway: bool,
    },
    /// The frame is mapped before it is used.
    Prefault {
        role: usize,
        frame: usize,
    },
    HostChange {
        as_id: u16,
        frame: usize,
        extent: Extent,
    },
    HostChangeAll,
    ZapAll,
    GetDirty {
        as_id: u16,
        id: u16,
    },
    ClearDirty {
        as_id: u16,
        id: u16,
        /// In units of 64 pages.
        first: u64,
        words: usize,
        mask: u64,
    },
    HarvestRing {
        most: usize,
    },
    ResetRing,
    HostWrite {
        as_id: u16,
        frame: usize,
    },
    Age {
        as_id: u16,
        frame: usize,
        clear: bool,
    },
    Recover {
        as_id: u16,
        id: u16,
    },
    NxHugePages {
        on: bool,
    },
    RecoverNx,
    /// A processor lets go of its root and loads it again.
    Reload {
        role: usize,
    },
    /// The program sets access maps from so many frames before this one on.
    SetAccess {
        as_id: u16,
        frame: usize,
        before: u64,
        maps: Vec<u32>,
        /// And the guest writes to this one.
        write: bool,
    },
    /// The hypervisor has this many table pages left.
    Budget {
        pages: i64,
    },
    /// The host refuses the next page.
    Refuse(Refusal),
}

pub(crate) fn ops() -> impl Strategy<Value = Op> {
    // Mostly in one place, so that operations meet each other.
    let as_id = || prop_oneof![8 => Just(0u16), 1 => Just(1u16)];
    let id = || prop_oneof![3 => Just(0u16), 1 => 0u16..4];
    let frame = || prop_oneof![2 => 1..4usize, 4 => 4..11usize, 2 => 0..FRAMES.len()];
    let place = || prop_oneof![3 => 3..6usize, 2 => 0..PLACES.len()];
    let distance = || prop_oneof![4 => Just(0usize), 1 => 0..DISTANCES.len()];
    let slot = move || (as_id(), id());
    let access = prop::sample::select(vec![Access::Read, Access::Write, Access::Fetch]);
    let refusal = prop::sample::select(vec![
        Refusal::Again,
        Refusal::Interrupted,
        Refusal::Poisoned,
    ]);
    let extent = prop_oneof![
        3 => (1u64..4, prop::bool::weighted(0.8), prop::bool::weighted(0.7)).prop_map(
            |(frame_now, present, writable)| Extent::Page { frame_now, present, writable }
        ),
        2 => Just(Extent::Large),
        1 => Just(Extent::Huge),
    ];
    let role = prop_oneof![4 => Just(0usize), 2 => 0..ROLES.len()];
    let any_role = prop_oneof![3 => Just(0usize), 1 => 0..ROLES.len()];
    let mask = prop_oneof![
        Just(u64::MAX),
        any::<u64>(),
        (0u32..64).prop_map(|bit| 1 << bit)
    ];
    let guarded = prop_oneof![3 => 5..8usize, 1 => 0..FRAMES.len()];
    let before = prop_oneof![3 => Just(0u64), 1 => 1u64..3];
    // Guests write at the beginning of pages, which most maps allow.
    let map = prop_oneof![
        2 => Just(u32::MAX),
        1 => Just(0),
        4 => any::<u32>().prop_map(|map| map | 1)
    ];
    prop_oneof![
        8 => (slot(), place(), distance(), prop_oneof![3 => 0u32..2, 1 => 2u32..4]).prop_map(
            |((as_id, id), place, distance, flags)| Op::Create { as_id, id, place, distance, flags }
        ),
        2 => slot().prop_map(|(as_id, id)| Op::Delete { as_id, id }),
        2 => (slot(), 0..MOVES.len()).prop_map(|((as_id, id), by)| Op::Move { as_id, id, by }),
        8 => slot().prop_map(|(as_id, id)| Op::Flip { as_id, id }),
        40 => (0..2usize, role, frame(), access, prop::bool::weighted(0.2)).prop_map(
            |(cpu, role, frame, access, anyway)| Op::Access { cpu, role, frame, access, anyway }
        ),
        5 => (any_role, frame()).prop_map(|(role, frame)| Op::Prefault { role, frame }),
        6 => (as_id(), frame(), extent)
            .prop_map(|(as_id, frame, extent)| Op::HostChange { as_id, frame, extent }),
        1 => Just(Op::HostChangeAll),
        1 => Just(Op::ZapAll),
        5 => slot().prop_map(|(as_id, id)| Op::GetDirty { as_id, id }),
        5 => (slot(), 0u64..9, 1usize..4, mask).prop_map(
            |((as_id, id), first, words, mask)| Op::ClearDirty { as_id, id, first, words, mask }
        ),
        3 => (1usize..20).prop_map(|most| Op::HarvestRing { most }),
        2 => Just(Op::ResetRing),
        2 => (as_id(), frame()).prop_map(|(as_id, frame)| Op::HostWrite { as_id, frame }),
        5 => (as_id(), frame(), prop::bool::weighted(0.7))
            .prop_map(|(as_id, frame, clear)| Op::Age { as_id, frame, clear }),
        3 => slot().prop_map(|(as_id, id)| Op::Recover { as_id, id }),
        1 => any::<bool>().prop_map(|on| Op::NxHugePages { on }),
        2 => Just(Op::RecoverNx),
        2 => (0..ROLES.len()).prop_map(|role| Op::Reload { role }),
        16 => (as_id(), guarded, before, prop::collection::vec(map, 1..4), any::<bool>()).prop_map(
            |(as_id, frame, before, maps, write)| Op::SetAccess { as_id, frame, before, maps, write }
        ),
        2 => prop_oneof![1 => 0i64..6, 2 => Just(crate::common::PLENTY)]
            .prop_map(|pages| Op::Budget { pages }),
        1 => refusal.prop_map(Op::Refuse),
    ]
}

/// How writes are recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Recorder {
    Bitmap(ManualProtect),
    Ring,
}

/// What stays the same during one sequence of operations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) recorder: Recorder,
    /// The largest pages of the host.
    pub(crate) level: Level,
    /// The host says how large a page is only when it is asked.
    pub(crate) must_ask: bool,
    /// Host-physical less host-virtual address of table pages.
    pub(crate) offset: u64,
    /// Sub-pages can be protected, if the processor knows such.
    pub(crate) sub_pages: bool,
}

pub(crate) fn setups() -> impl Strategy<Value = Setup> {
    let recorder = prop_oneof![
        3 => Just(Recorder::Bitmap(ManualProtect::empty())),
        2 => Just(Recorder::Bitmap(ManualProtect::ENABLE)),
        2 => Just(Recorder::Bitmap(ManualProtect::all())),
        2 => Just(Recorder::Ring),
    ];
    let level = prop_oneof![3 => Just(Level::L4K), 4 => Just(Level::L2M), 1 => Just(Level::L1G)];
    let flags = prop::array::uniform5(any::<bool>());
    let sometimes = prop::bool::weighted(0.3);
    let mostly = prop::bool::weighted(0.8);
    let offset = prop::sample::select(vec![0, 0x1_2340_0000_0000]);
    (recorder, level, flags, sometimes, mostly, offset).prop_map(
        |(recorder, level, flags, nx_huge_pages, sub_pages, offset)| {
            let [slot_zap_all, accessed_dirty, pml, eager_split, must_ask] = flags;
            Setup {
                config: Config {
                    slot_zap_all,
                    accessed_dirty,
                    pml,
                    // A gigabyte of small leaves takes its time.
                    eager_split: eager_split && level != Level::L1G,
                    nx_huge_pages,
                    ..Config::default()
                },
                recorder,
                level,
                must_ask,
                offset,
                sub_pages,
            }
        },
    )
}
