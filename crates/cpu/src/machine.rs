//! What the vCPUs of one VM share: how its memory is reached, the lines to all vCPUs, and which
//! host pages code was decoded from.

use crate::barrier::heavy_barrier;
use crate::line::{Line, Request};
use crate::memory::code::CodePages;
use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError};
use twofold_arch::Hpa;

/// Which second-stage format the processors of a machine walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SecondStageKind {
    /// Intel's extended page tables.
    #[default]
    Ept,
    /// AMD's nested page tables.
    Npt,
}

/// What all processors of a machine have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MachineConfig {
    /// The second-stage format.
    pub second_stage: SecondStageKind,
    /// Physical address width in bits, 32 to 52: of the guest's page tables and of the
    /// second-stage tables alike. Address bits at or above it are reserved.
    pub maxphyaddr: u8,
    /// Added to a host-physical address to reach its byte in this process; wraps.
    pub hpa_offset: usize,
}

impl Default for MachineConfig {
    /// EPT with 51 bits, where host-physical addresses are host-virtual ones.
    fn default() -> Self {
        Self {
            second_stage: SecondStageKind::Ept,
            maxphyaddr: 51,
            hpa_offset: 0,
        }
    }
}

/// One virtual machine as its processors see it.
#[derive(Debug)]
pub struct Machine {
    config: MachineConfig,
    lines: RwLock<Vec<Arc<Line>>>,
    code: CodePages,
    /// Held by the one thread that runs while every vCPU is outside guest mode.
    exclusive: Mutex<()>,
}

impl Machine {
    /// A machine without processors.
    pub fn new(config: MachineConfig) -> Arc<Self> {
        Arc::new(Self {
            config,
            lines: RwLock::new(Vec::new()),
            code: CodePages::new(),
            exclusive: Mutex::new(()),
        })
    }

    /// What was given to [`Machine::new`].
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Where the byte at a host-physical address is in this process.
    #[inline(always)]
    pub(crate) fn host(&self, hpa: Hpa) -> usize {
        (hpa.get() as usize).wrapping_add(self.config.hpa_offset)
    }

    /// Pages that hold decoded code, and the count of stores into them.
    #[inline(always)]
    pub(crate) fn code(&self) -> &CodePages {
        &self.code
    }

    /// Makes every vCPU forget its cached translations. When it returns, no vCPU uses a
    /// translation, or a pointer into a second-stage table, that it obtained before the call.
    ///
    /// May be called from any thread outside guest mode, and by several at once. A vCPU that is
    /// not running is not waited for: it forgets when it is run next.
    pub fn flush_tlbs(&self) {
        self.request_all(Request::FLUSH_TLB);
    }

    /// Makes `run()` of every vCPU return `Exit::Kicked`. When it returns, no vCPU is still in
    /// the stretch of guest mode in which it was at the call.
    pub fn kick_all(&self) {
        self.request_all(Request::EXIT);
    }

    /// Makes every vCPU drop its permission to write without asking, so that the next store to
    /// each page looks at the code bitmap again.
    pub(crate) fn drop_writes(&self) {
        self.request_all(Request::DROP_WRITES);
    }

    fn request_all(&self, request: Request) {
        let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
        for line in lines.iter() {
            line.post(request);
        }
        heavy_barrier();
        for line in lines.iter() {
            wait_for(line, request);
        }
    }

    /// Runs `work` while no vCPU but the caller's own is in guest mode. The caller is in guest
    /// mode. `None`: another thread has that right now or the vCPUs are being counted; the caller
    /// leaves guest mode, [waits](Machine::wait_for_exclusive) and tries again.
    ///
    /// Nothing here waits for anything but other vCPUs to leave guest mode, and a vCPU that waits
    /// for that is never one that has to be waited for: so two cannot wait for each other.
    pub(crate) fn try_exclusively<R>(&self, own: &Line, work: impl FnOnce() -> R) -> Option<R> {
        let _only = match self.exclusive.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let lines = match self.lines.try_read() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let others = || {
            lines
                .iter()
                .filter(|line| !std::ptr::eq(&raw const ***line, own))
        };
        others().for_each(|line| line.post(Request::PAUSE));
        heavy_barrier();
        others().for_each(|line| wait_for(line, Request::PAUSE));
        let result = work();
        others().for_each(|line| line.clear(Request::PAUSE));
        Some(result)
    }

    /// Waits, outside guest mode, until nobody runs exclusively.
    pub(crate) fn wait_for_exclusive(&self) {
        drop(
            self.exclusive
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Adds a vCPU. Nothing has been cached by it yet.
    pub(crate) fn attach(&self, index: u32) -> Arc<Line> {
        let line = Arc::new(Line::new(index));
        self.lines
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::clone(&line));
        line
    }

    /// Takes a vCPU away that will not run again.
    pub(crate) fn detach(&self, line: &Arc<Line>) {
        self.lines
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|other| !Arc::ptr_eq(other, line));
    }
}

/// Waits until a vCPU has left the stretch of guest mode in which it is found.
fn wait_for(line: &Line, request: Request) {
    /// A vCPU looks at its requests once a block, well within this many pauses, if its thread
    /// has a CPU; if not, the thread that waits should give up its own.
    const SPINS: u32 = 256;
    let ticket = line.ticket(request);
    let mut spins = 0;
    while !line.has_passed(ticket) {
        if spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    /// Threads enter and leave guest mode and "use" a value that they cached; the main thread
    /// changes the value, flushes, and then nobody may use the old one.
    #[test]
    fn after_a_flush_no_vcpu_uses_an_older_translation() {
        const ROUNDS: u64 = 200;
        const VCPUS: u32 = 2;
        let machine = Machine::new(MachineConfig::default());
        let current = AtomicU64::new(1);
        let oldest_allowed = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for index in 0..VCPUS {
                let line = machine.attach(index);
                let (machine, current, oldest_allowed, stop) =
                    (&machine, &current, &oldest_allowed, &stop);
                scope.spawn(move || {
                    let mut cached = None;
                    while !stop.load(Ordering::Relaxed) {
                        line.enter();
                        for _ in 0..50 {
                            if line.asked() {
                                line.leave();
                                line.clear(Request::FLUSH_TLB);
                                cached = None;
                                line.enter();
                                continue;
                            }
                            // Used inside guest mode: the flusher cannot have returned before
                            // this load if the value is too old.
                            let used =
                                *cached.get_or_insert_with(|| current.load(Ordering::Relaxed));
                            let oldest = oldest_allowed.load(Ordering::Relaxed);
                            assert!(used >= oldest, "used {used}, allowed from {oldest}");
                        }
                        line.leave();
                    }
                    machine.detach(&line);
                });
            }
            for round in 2..ROUNDS {
                current.store(round, Ordering::Relaxed);
                machine.flush_tlbs();
                oldest_allowed.store(round, Ordering::Relaxed);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn exclusive_sections_of_several_vcpus_do_not_overlap() {
        const ROUNDS: u32 = 100;
        let machine = Machine::new(MachineConfig::default());
        let inside = AtomicBool::new(false);
        let total = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for index in 0..3 {
                let line = machine.attach(index);
                let (machine, inside, total) = (&machine, &inside, &total);
                scope.spawn(move || {
                    let pause = || {
                        line.leave();
                        machine.wait_for_exclusive();
                        line.enter();
                    };
                    line.enter();
                    let mut mine = 0;
                    while mine < ROUNDS {
                        while line.asked() {
                            pause();
                        }
                        assert!(
                            !inside.load(Ordering::SeqCst),
                            "in guest mode beside an owner"
                        );
                        let done = machine.try_exclusively(&line, || {
                            assert!(!inside.swap(true, Ordering::SeqCst));
                            total.fetch_add(1, Ordering::Relaxed);
                            inside.store(false, Ordering::SeqCst);
                        });
                        match done {
                            Some(()) => mine += 1,
                            None => pause(),
                        }
                    }
                    line.leave();
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 3 * u64::from(ROUNDS));
    }
}
