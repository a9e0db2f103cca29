//! The thread that keeps the time of a VM's interrupt controllers: it asks running vCPUs to look at
//! the timers of their local APICs, and has the PIT's output follow its count.
//!
//! A vCPU that sleeps keeps the time by itself. The thread is started when the first timer is set,
//! and ends with the VM.

use crate::vcpu::{Ask, NEVER};
use crate::vm::Vm;
use rustix::thread::{Timespec, futex};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// Nanoseconds of a clock that never goes back, since this process first asked.
pub(crate) fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX - 1)
}

/// The thread of one VM.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    shared: Arc<Shared>,
    started: OnceLock<()>,
}

#[derive(Debug)]
struct Shared {
    /// When the thread will look next, or [`NEVER`].
    target: AtomicU64,
    /// Moves when it has to look earlier.
    bell: AtomicU32,
    ends: AtomicBool,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            target: AtomicU64::new(NEVER),
            bell: AtomicU32::new(0),
            ends: AtomicBool::new(false),
        }
    }
}

impl Shared {
    fn ring(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        // It fails only for memory that is not there.
        let _ = futex::wake(&self.bell, futex::Flags::PRIVATE, 1);
    }
}

impl Timers {
    /// An alarm has been set for `at` nanoseconds, where the thread will find it.
    #[inline]
    pub(crate) fn note(&self, vm: &Arc<Vm>, at: u64) {
        if at == NEVER {
            return;
        }
        if self.started.get().is_none() {
            self.started.get_or_init(|| start(vm, &self.shared));
        }
        // The thread says what it waits for and then looks again; so one of both sees the other's.
        if at < self.shared.target.load(Ordering::SeqCst) {
            self.shared.ring();
        }
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        self.shared.ring();
    }
}

fn start(vm: &Arc<Vm>, shared: &Arc<Shared>) {
    let (vm, shared) = (Arc::downgrade(vm), Arc::clone(shared));
    let thread = crate::service_thread::start("kvm-timers", move || keep_time(&vm, &shared));
    if let Err(error) = thread {
        tracing::error!(%error, "no thread for the guest's timers: they are late");
    }
}

fn keep_time(vm: &Weak<Vm>, shared: &Shared) {
    crate::service_thread::be_punctual();
    loop {
        let bell = shared.bell.load(Ordering::SeqCst);
        if shared.ends.load(Ordering::SeqCst) {
            return;
        }
        // The last reference may be dropped here: then the thread has been told to end.
        let Some(vm) = vm.upgrade() else {
            return;
        };
        let mut target = vm.serve_timers();
        shared.target.store(target, Ordering::SeqCst);
        // What was set before that was seen is found now.
        let earlier = vm.serve_timers();
        if earlier < target {
            target = earlier;
            shared.target.store(target, Ordering::SeqCst);
        }
        drop(vm);
        let timeout = (target != NEVER).then(|| Duration::from_nanos(target.saturating_sub(now())));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        // Whatever it answers, the thread looks again.
        let _ = futex::wait(&shared.bell, futex::Flags::PRIVATE, bell, timeout.as_ref());
    }
}

impl Vm {
    /// Does what is due. When something is due next, or [`NEVER`].
    fn serve_timers(&self) -> u64 {
        let now = now();
        let mut next = self.serve_pit(now).unwrap_or(NEVER);
        for core in self.members.read().iter() {
            let at = core.inbox.alarm();
            if at > now {
                next = next.min(at);
            } else if core.inbox.take_alarm(at) {
                core.notify(Ask::ALARM);
            }
        }
        next
    }
}
