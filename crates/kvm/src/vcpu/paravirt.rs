//! What KVM tells its guests in memory that they name by registers: the time (kvmclock), and how long
//! their vCPUs waited for a processor (steal time). `linux/kvm_para.h` and `pvclock-abi.h` have the
//! structures.
//!
//! What is written goes to wherever the slots have that memory now, and is marked dirty there.

use super::{Vcpu, VcpuState};
use crate::clock::Rate;
use crate::cpuid;
use crate::usercopy;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::time::SystemTime;
use twofold_arch::{Gpa, PAGE_SIZE};
use twofold_mmu::RegionFlags;

/// The registers: where the wall clock is to be written once, and where the time is kept.
pub(super) const OLD_WALL_CLOCK: u32 = 0x11;
pub(super) const OLD_SYSTEM_TIME: u32 = 0x12;
pub(super) const WALL_CLOCK: u32 = 0x4b56_4d00;
pub(super) const SYSTEM_TIME: u32 = 0x4b56_4d01;
pub(super) const STEAL_TIME: u32 = 0x4b56_4d03;

/// The memory that a register names is in use.
const ENABLED: u64 = 1;
/// Bits that the address of the steal time cannot have: it is a multiple of 64.
const STEAL_RESERVED: u64 = 0x3e;
/// The counters of all vCPUs show the same clock.
const STABLE: u8 = 1 << 0;
/// The program has stopped the guest: its watchdogs should not mind.
const STOPPED: u8 = 1 << 1;

/// What a vCPU's guest has asked for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Paravirt {
    wall_clock: u64,
    system_time: u64,
    steal_time: u64,
    /// What was written of the time: the clock's generation, the counter's offset and rate.
    shown: Option<(u32, u64, u64)>,
    /// Changes of the structure so far, two for each.
    version: u32,
    stopped: bool,
    /// How often the thread had given up its processor when the steal time was written, and how long
    /// it had waited for one.
    switches: i64,
    waited: u64,
    /// Registers and hypercalls are there only if CPUID names them.
    pub(super) enforced: bool,
}

impl Paravirt {
    /// INIT: the guest's time is not kept any more.
    pub(super) fn forget_clock(&mut self) {
        self.system_time = 0;
        self.shown = None;
    }

    /// Whether anything is kept in the guest's memory.
    #[inline]
    pub(super) fn is_used(&self) -> bool {
        (self.system_time | self.steal_time) & ENABLED != 0
    }
}

impl VcpuState {
    /// Whether the guest may use a feature of `KVM_CPUID_FEATURES`.
    pub(super) fn may_use(&self, feature: u32) -> bool {
        !self.paravirt.enforced
            || cpuid::find(&self.cpuid, cpuid::KVM_FEATURES, 0)
                .is_some_and(|leaf| leaf.eax & feature != 0)
    }

    /// The value of a register of KVM's own; `None` if it is none, or not there for this guest.
    pub(super) fn paravirt_msr(&self, index: u32) -> Option<u64> {
        let paravirt = &self.paravirt;
        let (value, feature) = match index {
            OLD_WALL_CLOCK => (paravirt.wall_clock, cpuid::feature::CLOCK),
            OLD_SYSTEM_TIME => (paravirt.system_time, cpuid::feature::CLOCK),
            WALL_CLOCK => (paravirt.wall_clock, cpuid::feature::CLOCK_2),
            SYSTEM_TIME => (paravirt.system_time, cpuid::feature::CLOCK_2),
            STEAL_TIME => (paravirt.steal_time, cpuid::feature::STEAL_TIME),
            _ => return None,
        };
        self.may_use(feature).then_some(value)
    }
}

impl Vcpu {
    /// Sets a register of KVM's own: whether it takes the value. `None` if it is none.
    pub(super) fn write_paravirt_msr(
        &self,
        state: &mut VcpuState,
        index: u32,
        value: u64,
    ) -> Option<bool> {
        if !matches!(
            index,
            OLD_WALL_CLOCK | OLD_SYSTEM_TIME | WALL_CLOCK | SYSTEM_TIME | STEAL_TIME
        ) {
            return None;
        }
        if state.paravirt_msr(index).is_none() {
            return Some(false);
        }
        match index {
            OLD_WALL_CLOCK | WALL_CLOCK => {
                state.paravirt.wall_clock = value;
                if value != 0 {
                    self.write_wall_clock(state, value);
                }
            }
            OLD_SYSTEM_TIME | SYSTEM_TIME => {
                state.paravirt.system_time = value;
                state.paravirt.shown = None;
            }
            _ if value & STEAL_RESERVED != 0 => return Some(false),
            _ => {
                state.paravirt.steal_time = value;
                state.paravirt.switches = 0;
            }
        }
        self.update_paravirt(state);
        Some(true)
    }

    /// Brings what the guest sees in memory up to date.
    pub(super) fn update_paravirt(&self, state: &mut VcpuState) {
        if state.paravirt.system_time & ENABLED != 0 {
            self.show_time(state);
        }
        if state.paravirt.steal_time & ENABLED != 0 {
            self.show_steal_time(state);
        }
    }

    /// Writes `struct pvclock_vcpu_time_info` if it would not be what is there already.
    fn show_time(&self, state: &mut VcpuState) {
        let clock = self.vm.clock();
        let msrs = state.cpu.msrs();
        let now = (clock.generation(), msrs.tsc_offset, msrs.tsc_multiplier);
        if state.paravirt.shown == Some(now) && !state.paravirt.stopped {
            return;
        }
        let reference = clock.reference();
        let scaled = (u128::from(reference.tsc) * u128::from(msrs.tsc_multiplier)) >> 48;
        let guest_tsc = (scaled as u64).wrapping_add(msrs.tsc_offset);
        let rate = Rate::of(state.tsc_khz);
        let stopped = std::mem::take(&mut state.paravirt.stopped);
        let flags = STABLE | if stopped { STOPPED } else { 0 };
        let version = state.paravirt.version | 1;
        let mut info = [0; 32];
        info[..4].copy_from_slice(&version.to_le_bytes());
        info[8..16].copy_from_slice(&guest_tsc.to_le_bytes());
        info[16..24].copy_from_slice(&reference.clock.to_le_bytes());
        info[24..28].copy_from_slice(&rate.multiplier.to_le_bytes());
        info[28] = rate.shift.to_le_bytes()[0];
        info[29] = flags;
        let address = state.paravirt.system_time & !ENABLED;
        // While the version is odd, the rest is not to be used.
        let version = version.wrapping_add(1);
        self.write_guest(state, address, &info[..4]);
        self.write_guest(state, address.wrapping_add(8), &info[8..]);
        self.write_guest(state, address, &version.to_le_bytes());
        state.paravirt.version = version;
        state.paravirt.shown = Some(now);
    }

    /// Writes `struct pvclock_wall_clock`: the time of day when the VM's clock was 0.
    fn write_wall_clock(&self, state: &mut VcpuState, address: u64) {
        let day = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let day = day.unwrap_or_default().as_nanos();
        let start = day.saturating_sub(self.vm.clock().now().clock.into());
        let seconds = (start / 1_000_000_000) as u32;
        let nanoseconds = (start % 1_000_000_000) as u32;
        let mut version = [0; 4];
        if !self.read_guest(state, address, &mut version) {
            return;
        }
        let version = u32::from_le_bytes(version) | 1;
        let mut time = [0; 8];
        time[..4].copy_from_slice(&seconds.to_le_bytes());
        time[4..].copy_from_slice(&nanoseconds.to_le_bytes());
        self.write_guest(state, address, &version.to_le_bytes());
        self.write_guest(state, address.wrapping_add(4), &time);
        self.write_guest(state, address, &version.wrapping_add(1).to_le_bytes());
    }

    /// Adds to `struct kvm_steal_time` how long the thread waited for a processor, if it has given
    /// up its own since.
    fn show_steal_time(&self, state: &mut VcpuState) {
        let switches = thread_switches();
        if switches == state.paravirt.switches {
            return;
        }
        let Ok(waited) = thread_waited() else {
            return;
        };
        let address = state.paravirt.steal_time & !ENABLED;
        let mut steal = [0; 12];
        if !self.read_guest(state, address, &mut steal) {
            return;
        }
        let (before, version) = steal.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rfold(0, |n, byte| n << 8 | u64::from(*byte));
        let before = number(before);
        let version = (number(version) as u32).wrapping_add(1) | 1;
        // It may be another thread than the last time.
        let more = waited.saturating_sub(state.paravirt.waited);
        let place = address.wrapping_add(8);
        self.write_guest(state, place, &version.to_le_bytes());
        self.write_guest(state, address, &before.wrapping_add(more).to_le_bytes());
        self.write_guest(state, place, &version.wrapping_add(1).to_le_bytes());
        // Not preempted.
        self.write_guest(state, address.wrapping_add(16), &[0]);
        state.paravirt.switches = switches;
        state.paravirt.waited = waited;
    }

    /// `KVM_KVMCLOCK_CTRL`: the guest is told that it was stopped.
    ///
    /// # Errors
    /// `EINVAL` if it keeps no time.
    pub fn note_stopped(&self) -> Result<(), Errno> {
        let mut state = self.state();
        if state.paravirt.system_time & ENABLED == 0 {
            return Err(Errno::INVAL);
        }
        state.paravirt.stopped = true;
        Ok(())
    }

    /// Writes to the guest's memory, as a device would, and marks it dirty. Nothing happens where
    /// there is no memory that can be written.
    fn write_guest(&self, state: &mut VcpuState, address: u64, data: &[u8]) {
        let _changing = self.vm.begin_guest_access();
        let tables = self.vm.tables();
        for (address, part) in pages(address, data.len()) {
            let gpa = Gpa::new(address);
            let slot = tables.lookup(&mut state.reader, gpa);
            let Some(slot) = slot.filter(|slot| !slot.flags.contains(RegionFlags::READONLY)) else {
                tracing::debug!(%gpa, "what the guest asked to be told has no memory");
                return;
            };
            let place = slot.hva_of(gpa.frame()).wrapping_add(gpa.page_offset());
            if usercopy::write_slice(place as usize, &data[part]).is_err() {
                return;
            }
            tables.mark_dirty(&mut state.reader, gpa);
        }
    }

    /// Reads the guest's memory. Whether it is there.
    fn read_guest(&self, state: &mut VcpuState, address: u64, data: &mut [u8]) -> bool {
        let _changing = self.vm.begin_guest_access();
        pages(address, data.len()).all(|(address, part)| {
            let gpa = Gpa::new(address);
            let Some(slot) = self.vm.tables().lookup(&mut state.reader, gpa) else {
                return false;
            };
            let place = slot.hva_of(gpa.frame()).wrapping_add(gpa.page_offset());
            match usercopy::read_slice::<u8>(place as usize, part.len()) {
                Ok(bytes) => {
                    data[part].copy_from_slice(&bytes);
                    true
                }
                Err(_) => false,
            }
        })
    }
}

/// The parts of a range of addresses, a page at a time: where each is, and what of the range it is.
fn pages(address: u64, length: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = address.wrapping_add(done as u64);
        let room = (PAGE_SIZE - at % PAGE_SIZE) as usize;
        let part = done..length.min(done + room);
        done = part.end;
        (!part.is_empty()).then_some((at, part))
    })
}

/// How often this thread has given up its processor.
fn thread_switches() -> i64 {
    // UNSAFETY: getrusage.
    #[expect(unsafe_code)]
    // SAFETY: the structure is filled in by the call, or stays zero.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage);
        usage
    };
    // Never 0, which says that nothing was written yet.
    usage.ru_nvcsw + usage.ru_nivcsw + 1
}

/// Nanoseconds that this thread has waited for a processor, as the kernel accounts for them.
fn thread_waited() -> Result<u64, Errno> {
    let file = rustix::fs::open(
        c"/proc/thread-self/schedstat",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut text = [0; 128];
    let length = rustix::io::read(&file, &mut text)?;
    let text = std::str::from_utf8(&text[..length]).map_err(|_| Errno::INVAL)?;
    let number = text.split_whitespace().nth(1).ok_or(Errno::INVAL)?;
    number.parse().map_err(|_| Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_crosses_a_page_has_two_parts() {
        let parts: Vec<_> = pages(0xffc, 8).collect();
        assert_eq!(parts, [(0xffc, 0..4), (0x1000, 4..8)]);
        assert_eq!(pages(0x1000, 4096).count(), 1);
        assert_eq!(pages(0, 0).count(), 0);
    }

    #[test]
    fn the_kernel_accounts_for_threads_that_wait() {
        assert!(thread_switches() > 0);
        let before = thread_waited().unwrap();
        std::thread::yield_now();
        assert!(thread_waited().unwrap() >= before);
    }
}
