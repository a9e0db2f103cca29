//! What the hypervisor tells of itself: events, in rings of pages that the host shares.
//!
//! Each processor has a ring. One page of it is the reader's, and only the host uses it; the others
//! are written in turn, and when all are full the oldest is written again and what was in it is
//! counted as lost. [`tracing_swap_reader`](Hypervisor::tracing_swap_reader) exchanges the reader's
//! page for the oldest. The pages are pinned as long as they are loaded. Where the next event goes is
//! known to the hypervisor alone: whatever the host writes into the pages changes nothing but what it
//! reads there itself.
//!
//! Events are about the host. Of a guest they say when the host let it run and why the host got the
//! processor back, which the host knows.
//!
//! | word of a page | what |
//! |---|---|
//! | 0 | events in the page |
//! | 1 | events that were lost before the first of them |
//! | 4 + 4n | event n: its time in nanoseconds |
//! | 5 + 4n | its number, see [`Event`] |
//! | 6 + 4n, 7 + 4n | what it is about |

use crate::error::Error;
use crate::hypervisor::Hypervisor;
use crate::lock::Lock;
use crate::platform::{MAX_PROCESSORS, Platform, WORDS, read, split, write};
#[cfg(not(loom))]
use core::sync::atomic::AtomicU64;
use core::sync::atomic::{Ordering, fence};
#[cfg(loom)]
use loom::sync::atomic::AtomicU64;
use twofold_arch::{Hfn, Hpa};

/// The most pages of a ring.
pub const MAX_PAGES: usize = 8;
/// The fewest: the reader's, and one to write.
pub const MIN_PAGES: usize = 2;
/// Words before the first event of a page.
pub const HEADER_WORDS: usize = 4;
/// Words of an event.
pub const EVENT_WORDS: usize = 4;
/// Events in a page.
pub const EVENTS: usize = (WORDS - HEADER_WORDS) / EVENT_WORDS;
// They are counted in bytes.
const _: () = assert!(EVENTS <= u8::MAX as usize);

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Event {
    /// EL2 begins: a [`Cause`]; for [`Cause::Guest`] also the
    /// [`Reason`](crate::run::Reason) for which a guest stopped.
    HypEnter = 0,
    /// EL2 ends: the [`Cause`] for which it had begun, or [`Cause::Guest`] if a guest runs now.
    HypExit = 1,
    /// A call of the host: the function, the result in x1.
    HostHcall = 2,
    /// The host's stage 2 stopped an access: the address; 0 if it is mapped now, 1 if it was
    /// already, 2 if the host got an abort.
    HostMemAbort = 3,
    /// What `tracing_write_event` was called with.
    Selftest = 4,
}

impl Event {
    /// Every event.
    pub const ALL: [Self; 5] = [
        Self::HypEnter,
        Self::HypExit,
        Self::HostHcall,
        Self::HostMemAbort,
        Self::Selftest,
    ];

    fn of_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|event| *event as u64 == number)
    }

    const fn bit(self) -> u64 {
        1 << self as u16
    }
}

/// Why EL2 runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Cause {
    /// The host's call.
    Hypercall = 0,
    /// An abort of the host.
    HostAbort = 1,
    /// A guest.
    Guest = 2,
}

/// How the counter becomes nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Clock {
    multiplier: u32,
    shift: u32,
    epoch_nanoseconds: u64,
    epoch_counter: u64,
}

impl Clock {
    const fn new() -> Self {
        Self {
            multiplier: 1,
            shift: 0,
            epoch_nanoseconds: 0,
            epoch_counter: 0,
        }
    }

    fn nanoseconds(&self, counter: u64) -> u64 {
        let passed = u128::from(counter.wrapping_sub(self.epoch_counter));
        let passed = (passed * u128::from(self.multiplier)) >> self.shift;
        self.epoch_nanoseconds.wrapping_add(passed as u64)
    }
}

/// The ring of one processor.
#[derive(Debug)]
struct Ring {
    /// The pages, in the order of the host's description.
    pages: [Hfn; MAX_PAGES],
    /// How many: 0 if nothing is loaded.
    count: usize,
    /// Events in each page.
    filled: [u8; MAX_PAGES],
    /// Which page is written in which turn; one fewer than pages.
    turns: [u8; MAX_PAGES],
    /// The turn of the oldest page that may have events.
    oldest: usize,
    /// The turn of the page that is written.
    current: usize,
    /// The page that is the reader's.
    reader: usize,
    /// Events that were written over since the reader last took a page.
    lost: u64,
    clock: Clock,
}

impl Ring {
    const fn new() -> Self {
        Self {
            pages: [Hfn::new(0); MAX_PAGES],
            count: 0,
            filled: [0; MAX_PAGES],
            turns: [0; MAX_PAGES],
            oldest: 0,
            current: 0,
            reader: 0,
            lost: 0,
            clock: Clock::new(),
        }
    }

    fn is_loaded(&self) -> bool {
        self.count >= MIN_PAGES
    }

    /// The page that is written in a turn.
    fn page_of(&self, turn: usize) -> usize {
        usize::from(self.turns[turn])
    }

    fn after(&self, turn: usize) -> usize {
        (turn + 1) % (self.count - 1)
    }

    fn clear<P: Platform>(&mut self, platform: &P, page: usize) {
        self.filled[page] = 0;
        write(platform, self.pages[page], 0, 0);
        write(platform, self.pages[page], 1, 0);
    }

    /// Begins with empty pages.
    fn restart<P: Platform>(&mut self, platform: &P) {
        for page in 0..self.count {
            self.clear(platform, page);
        }
        self.turns = core::array::from_fn(|turn| turn as u8);
        self.reader = self.count - 1;
        (self.oldest, self.current, self.lost) = (0, 0, 0);
    }

    fn write<P: Platform>(&mut self, platform: &P, event: Event, arguments: [u64; 2]) {
        if !self.is_loaded() {
            return;
        }
        if usize::from(self.filled[self.page_of(self.current)]) == EVENTS {
            let next = self.after(self.current);
            if next == self.oldest {
                let page = self.page_of(next);
                self.lost += u64::from(self.filled[page]);
                self.clear(platform, page);
                self.oldest = self.after(next);
            }
            self.current = next;
        }
        let page = self.page_of(self.current);
        let number = usize::from(self.filled[page]);
        let time = self.clock.nanoseconds(platform.counter());
        let [a, b] = arguments;
        let first = HEADER_WORDS + number * EVENT_WORDS;
        for (index, value) in [time, event as u64, a, b].into_iter().enumerate() {
            write(platform, self.pages[page], first + index, value);
        }
        // Whoever sees the count sees the event.
        fence(Ordering::Release);
        self.filled[page] += 1;
        write(platform, self.pages[page], 0, number as u64 + 1);
    }

    /// Which page the reader has now.
    fn swap<P: Platform>(&mut self, platform: &P) -> Result<usize, Error> {
        if !self.is_loaded() {
            return Err(Error::NoDevice);
        }
        let taken = self.page_of(self.oldest);
        if self.filled[taken] == 0 {
            return Err(Error::Again);
        }
        let returned = core::mem::replace(&mut self.reader, taken);
        self.clear(platform, returned);
        self.turns[self.oldest] = returned as u8;
        if self.oldest != self.current {
            self.oldest = self.after(self.oldest);
        }
        let lost = core::mem::take(&mut self.lost);
        write(platform, self.pages[taken], 1, lost);
        Ok(taken)
    }
}

/// What is loaded and wanted.
#[derive(Debug)]
struct Control {
    /// Processors with a ring: 0 if nothing is loaded.
    processors: usize,
    on: bool,
    /// The events that are wanted.
    wanted: u64,
}

/// The rings of all processors.
pub(crate) struct Tracing {
    /// The events that are written at the moment: all that costs anything while there are none.
    active: AtomicU64,
    control: Lock<Control>,
    rings: [Lock<Ring>; MAX_PROCESSORS],
}

impl Tracing {
    pub(crate) fn new() -> Self {
        Self {
            active: AtomicU64::new(0),
            control: Lock::new(Control {
                processors: 0,
                on: false,
                wanted: 0,
            }),
            rings: core::array::from_fn(|_| Lock::new(Ring::new())),
        }
    }

    fn activate(&self, control: &Control) {
        let active = if control.on { control.wanted } else { 0 };
        self.active.store(active, Ordering::Relaxed);
    }

    fn ring(&self, processor: u64) -> Result<&Lock<Ring>, Error> {
        let processor = usize::try_from(processor).map_err(|_| Error::Invalid)?;
        self.rings.get(processor).ok_or(Error::Invalid)
    }
}

/// The host's description of the rings, read once.
struct Description {
    processors: usize,
    /// Of each ring.
    pages: usize,
    frames: [u64; MAX_PROCESSORS * MAX_PAGES],
}

impl Description {
    fn frames(&self) -> &[u64] {
        &self.frames[..self.processors * self.pages]
    }
}

impl<P: Platform> Hypervisor<'_, P> {
    /// Writes an event, if it is wanted, into this processor's ring.
    pub(crate) fn trace(&self, event: Event, a: u64, b: u64) {
        if self.tracing.active.load(Ordering::Relaxed) & event.bit() != 0 {
            self.write_event(event, a, b);
        }
    }

    #[cold]
    fn write_event(&self, event: Event, a: u64, b: u64) {
        if let Some(ring) = self.tracing.rings.get(self.platform().processor()) {
            ring.lock().write(self.platform(), event, [a, b]);
        }
    }

    /// Takes rings from the host. At `address`, in a page that is shared with the hypervisor, the
    /// host describes them in `size` bytes: the number of processors, the pages of each ring (2 to
    /// 8), and the frame number of every page, one ring after the other. These are shared with the
    /// hypervisor too and stay pinned until [`tracing_unload`](Self::tracing_unload).
    ///
    /// # Errors
    /// [`Error::Invalid`] if something is loaded, and for numbers that make no sense, a size that
    /// does not go with them or a page that is named twice; [`Error::NotPermitted`] for a page that
    /// is not shared. Nothing is pinned then.
    pub fn tracing_load(&self, address: Hpa, size: u64) -> Result<(), Error> {
        let mut control = self.tracing.control.lock();
        if control.processors != 0 {
            return Err(Error::Invalid);
        }
        let description = self.describe(address, size)?;
        let frames = description.frames();
        for (number, frame) in frames.iter().enumerate() {
            let result = if frames[..number].contains(frame) {
                Err(Error::Invalid)
            } else {
                self.pin(Hfn::new(*frame))
            };
            if result.is_err() {
                self.unpin_all(frames[..number].iter().map(|&frame| Hfn::new(frame)));
                return result;
            }
        }
        let rings = frames.chunks(description.pages);
        for (ring, frames) in self.tracing.rings.iter().zip(rings) {
            let mut ring = ring.lock();
            for (page, frame) in ring.pages.iter_mut().zip(frames) {
                *page = Hfn::new(*frame);
            }
            ring.count = frames.len();
            ring.restart(self.platform());
        }
        control.processors = description.processors;
        Ok(())
    }

    fn describe(&self, address: Hpa, size: u64) -> Result<Description, Error> {
        let (page, first) = split(address.get()).ok_or(Error::Invalid)?;
        self.pin(page)?;
        let word = |number: usize| read(self.platform(), page, first + number);
        let result = (|| {
            let (processors, pages) = (word(0), word(1));
            if !(1..=MAX_PROCESSORS as u64).contains(&processors)
                || !(MIN_PAGES as u64..=MAX_PAGES as u64).contains(&pages)
            {
                return Err(Error::Invalid);
            }
            let words = 2 + processors * pages;
            if size != words * 8 || first as u64 + words > WORDS as u64 {
                return Err(Error::Invalid);
            }
            let mut description = Description {
                processors: processors as usize,
                pages: pages as usize,
                frames: [0; MAX_PROCESSORS * MAX_PAGES],
            };
            let count = description.processors * description.pages;
            for (number, frame) in description.frames[..count].iter_mut().enumerate() {
                *frame = word(2 + number);
            }
            Ok(description)
        })();
        self.unpin(page)?;
        result
    }

    fn unpin_all(&self, pages: impl Iterator<Item = Hfn>) {
        for page in pages {
            let result = self.unpin(page);
            debug_assert_eq!(result, Ok(()), "page {page} was pinned");
        }
    }

    /// Gives the rings back; nothing is written any more.
    pub fn tracing_unload(&self) {
        let mut control = self.tracing.control.lock();
        control.on = false;
        self.tracing.activate(&control);
        for ring in &self.tracing.rings[..control.processors] {
            let mut ring = ring.lock();
            let count = core::mem::take(&mut ring.count);
            let pages = ring.pages;
            // Whoever writes an event looks at the count under the ring's lock.
            drop(ring);
            self.unpin_all(pages.into_iter().take(count));
        }
        control.processors = 0;
    }

    /// Begins or ends writing events.
    ///
    /// # Errors
    /// [`Error::Invalid`] to begin with nothing loaded.
    pub fn tracing_enable(&self, on: bool) -> Result<(), Error> {
        let mut control = self.tracing.control.lock();
        if on && control.processors == 0 {
            return Err(Error::Invalid);
        }
        control.on = on;
        self.tracing.activate(&control);
        Ok(())
    }

    /// Says whether an event is wanted. At first none is.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such event.
    pub fn tracing_enable_event(&self, number: u64, wanted: bool) -> Result<(), Error> {
        let event = Event::of_number(number).ok_or(Error::Invalid)?;
        let mut control = self.tracing.control.lock();
        if wanted {
            control.wanted |= event.bit();
        } else {
            control.wanted &= !event.bit();
        }
        self.tracing.activate(&control);
        Ok(())
    }

    /// Gives the reader the oldest page of a processor's ring and says which of the ring's pages it
    /// is. The page that it had before is written again.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such processor, [`Error::NoDevice`] if it has no ring,
    /// [`Error::Again`] if nothing was written.
    pub fn tracing_swap_reader(&self, processor: u64) -> Result<usize, Error> {
        self.tracing.ring(processor)?.lock().swap(self.platform())
    }

    /// Forgets every event of a processor's ring.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such processor, [`Error::NoDevice`] if it has no ring.
    pub fn tracing_reset(&self, processor: u64) -> Result<(), Error> {
        let mut ring = self.tracing.ring(processor)?.lock();
        if !ring.is_loaded() {
            return Err(Error::NoDevice);
        }
        ring.restart(self.platform());
        Ok(())
    }

    /// Says how the counter becomes nanoseconds: (counter - epoch) * multiplier >> shift, after the
    /// epoch.
    ///
    /// # Errors
    /// [`Error::Invalid`] for numbers of more than 32 bits and shifts of more than 63.
    pub fn tracing_update_clock(
        &self,
        multiplier: u64,
        shift: u64,
        epoch_nanoseconds: u64,
        epoch_counter: u64,
    ) -> Result<(), Error> {
        let clock = Clock {
            multiplier: u32::try_from(multiplier).map_err(|_| Error::Invalid)?,
            shift: u32::try_from(shift).map_err(|_| Error::Invalid)?,
            epoch_nanoseconds,
            epoch_counter,
        };
        if clock.shift > 63 {
            return Err(Error::Invalid);
        }
        for ring in &self.tracing.rings {
            ring.lock().clock = clock;
        }
        Ok(())
    }
}
