//! What the preloaded library calls: KVM as system calls see it.
//!
//! Descriptors are real ones (memfds), so that the kernel does with them whatever it does with
//! files; this module knows what is behind them.

pub use crate::host_change::HostChange;
pub use crate::summary::{Summary, summary};
pub use crate::vcpu::{RunSignals, register_run_signals};
pub use rustix::io::Errno;

use crate::object::Object;
use crate::{
    descriptor, fd_table, fork, ioctl as table, module_file, pagemap, shared, td, vanishing, vcpu,
};
use rustix::mm::ProtFlags;
use std::ffi::{CStr, c_int};
use std::os::fd::RawFd;

/// ioctls that every descriptor has, which the kernel does on ours as well.
const FIONBIO: u64 = 0x5421;
const FIONCLEX: u64 = 0x5450;
const FIOCLEX: u64 = 0x5451;
const FIOASYNC: u64 = 0x5452;
const FIOQSIZE: u64 = 0x5460;

/// Page of a vCPU's mapping that shows the VM's coalesced ring.
const RING_PAGE: u64 = crate::capability::COALESCED_MMIO_PAGE_OFFSET as u64;
const PAGE: u64 = 4096;

/// Opens `/dev/kvm`. Of the flags, `O_CLOEXEC` counts.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub fn open(flags: c_int) -> Result<RawFd, Errno> {
    fork::prepare_process();
    let file = shared::memfd("kvm", 0)?;
    if flags & libc::O_CLOEXEC == 0 {
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
    }
    Ok(descriptor::install(file, Object::System))
}

/// Does an ioctl. `None`: the descriptor is not one of ours, or the request is one that the kernel
/// answers for any descriptor; make the real call.
///
/// Finding out costs two loads for a descriptor that is not ours. `KVM_RUN` makes no system call
/// by itself.
#[inline]
pub fn ioctl(fd: RawFd, request: u64, argument: usize) -> Option<Result<c_int, Errno>> {
    let file = fd_table::get(fd)?;
    // The kernel takes 32 bits of the request.
    let request = request & 0xffff_ffff;
    if matches!(request, FIONBIO | FIONCLEX | FIOCLEX | FIOASYNC | FIOQSIZE) {
        return None;
    }
    Some(table::dispatch(file.object()?, request, argument))
}

/// Whether the descriptor is one of ours.
#[inline]
pub fn is_ours(fd: RawFd) -> bool {
    fd_table::contains(fd)
}

/// Before the real `close`. Whether the descriptor was one of ours.
///
/// Its object goes when no other descriptor refers to it and no call uses it.
#[inline]
pub fn closing(fd: RawFd) -> bool {
    pagemap::forget_descriptor(fd);
    fd_table::remove(fd)
}

/// Before a real `close_range` or `closefrom`: [`closing`] for each of the descriptors from `first`
/// to `last`.
pub fn closing_range(first: u32, last: u32) {
    pagemap::forget_descriptors(first, last);
    fd_table::remove_range(first, last);
}

/// After a successful `dup`, `dup2`, `dup3` or `F_DUPFD`: `new` is what `old` is.
pub fn duplicated(old: RawFd, new: RawFd) {
    if old != new {
        pagemap::forget_descriptor(new);
        fd_table::duplicate(old, new);
    }
}

/// Before the real `mmap`: why KVM would refuse to map one of our descriptors. `ENODEV` for all but
/// vCPUs, `EINVAL` for a private or executable mapping of a dirty ring.
pub fn mmap_check(
    fd: RawFd,
    prot: c_int,
    flags: c_int,
    offset: i64,
    length: usize,
) -> Option<Errno> {
    match fd_table::get(fd)?.object()? {
        Object::Vcpu(vcpu) => vcpu.mapping_check(
            // A negative offset is refused by the kernel.
            u64::try_from(offset).ok()?,
            length,
            flags & libc::MAP_TYPE != libc::MAP_PRIVATE,
            prot & libc::PROT_EXEC != 0,
        ),
        Object::System | Object::Vm(_) | Object::Stats(_) | Object::GuestMemory(_) => {
            Some(Errno::NODEV)
        }
    }
}

/// After a successful real `mmap` of one of our descriptors at `address`: shows the coalesced ring,
/// which the vCPUs of a VM share, where the program expects it.
pub fn mapped(fd: RawFd, address: usize, length: usize, prot: c_int, offset: i64) {
    let Some(file) = fd_table::get(fd) else {
        return;
    };
    let Some(Object::Vcpu(vcpu)) = file.object() else {
        return;
    };
    let Ok(offset) = u64::try_from(offset) else {
        return;
    };
    let ring = RING_PAGE * PAGE;
    if offset > ring || offset.saturating_add(length as u64) <= ring {
        return;
    }
    let at = address + (ring - offset) as usize;
    let protection = ProtFlags::from_bits_truncate(prot as u32);
    if let Err(error) = vcpu.vm().buses().map_ring(at, protection) {
        tracing::warn!(%error, "the coalesced ring cannot be shown");
    }
}

/// Before a real read of a descriptor: refreshes a statistics file; `EINVAL` for our other
/// descriptors, which cannot be read. `None`: make the real call.
#[inline]
pub fn before_read(fd: RawFd) -> Option<Errno> {
    match fd_table::get(fd)?.object()? {
        Object::Stats(stats) => {
            stats.refresh();
            None
        }
        Object::System | Object::Vm(_) | Object::Vcpu(_) | Object::GuestMemory(_) => {
            Some(Errno::INVAL)
        }
    }
}

/// Before a real write to a descriptor: `EBADF` for statistics, which are open for reading only,
/// `EINVAL` for our other descriptors. `None`: make the real call.
#[inline]
pub fn before_write(fd: RawFd) -> Option<Errno> {
    match fd_table::get(fd)?.object()? {
        Object::Stats(_) => Some(Errno::BADF),
        Object::System | Object::Vm(_) | Object::Vcpu(_) | Object::GuestMemory(_) => {
            Some(Errno::INVAL)
        }
    }
}

/// Does a `fallocate` of a guest memory file. `None`: the descriptor is not one; make the real
/// call. Our other descriptors have no `fallocate`: `ENODEV`.
pub fn fallocate(fd: RawFd, mode: c_int, offset: i64, length: i64) -> Option<Result<(), Errno>> {
    Some(match fd_table::get(fd)?.object()? {
        Object::GuestMemory(file) if !file.vm().is_ours() => Err(Errno::IO),
        Object::GuestMemory(file) => file.fallocate(mode, offset, length),
        Object::System | Object::Vm(_) | Object::Vcpu(_) | Object::Stats(_) => Err(Errno::NODEV),
    })
}

/// Before a real `ftruncate`: `EINVAL` for our descriptors, none of which can be resized. `None`:
/// make the real call.
#[inline]
pub fn before_truncate(fd: RawFd) -> Option<Errno> {
    is_ours(fd).then_some(Errno::INVAL)
}

/// The measurement of the initial memory (MRTD) of the trust domain behind a VM's descriptor, once it
/// is finalised. KVM has no call for it; on hardware it is the guest that can prove it.
pub fn td_measurement(fd: RawFd) -> Option<[u8; 48]> {
    match fd_table::get(fd)?.object()? {
        Object::Vm(vm) => vm.td()?.measurement(),
        _ => None,
    }
}

/// Pages of any size that the TDX module has of this process: of trust domains that live, and of
/// none when there are none.
pub fn td_pages() -> usize {
    td::module().pages_in_use()
}

/// Before a call that changes the program's memory in the range: takes it away from every guest
/// until the guard is dropped. `None` when there is no VM, which costs one load to find out.
#[inline]
pub fn host_change(address: usize, length: usize) -> Option<HostChange> {
    HostChange::begin(address, length)
}

/// [`host_change`] of everything: a file that may be behind a slot shrinks or gets a hole.
pub fn host_change_all() -> Option<HostChange> {
    HostChange::begin(0, usize::MAX)
}

/// Whether this thread is inside `KVM_RUN`, which will then return `EINTR` soon (or has made up its
/// mind to return something else). Async-signal-safe.
pub fn interrupt_current_run() -> bool {
    vcpu::interrupt_current_run()
}

/// Says that `thread` may be cancelled at any moment, or no longer: its `KVM_RUN` can then be ended
/// by [`interrupt_run_of`]. Called by the thread itself.
pub fn set_cancellable(thread: usize, on: bool) {
    vcpu::set_cancellable(thread, on);
}

/// Whether this thread has said so: one load.
#[inline]
pub fn is_cancellable() -> bool {
    vcpu::is_cancellable()
}

/// `thread` is cancelled: its `KVM_RUN`, the present one or the next, returns `EINTR` soon if it
/// [may be](set_cancellable).
pub fn interrupt_run_of(thread: usize) {
    vcpu::interrupt_run_of(thread);
}

/// Where to go on after a SIGSEGV or SIGBUS at instruction `rip` that was an access to guest
/// memory. Async-signal-safe.
pub fn in_guest_access_fixup(rip: usize, _address: usize) -> Option<usize> {
    twofold_cpu::fixup(rip)
}

/// A handler of SIGSEGV and SIGBUS that asks [`in_guest_access_fixup`] is installed and stays: from
/// now on memory that may not be there is accessed without asking the kernel first.
pub fn faults_are_handled() {
    vanishing::set_survived();
}

/// In the child of a fork that ran no `pthread_atfork` handlers (a raw `clone`): the parent's VMs
/// answer `EIO`.
pub fn fork_child() {
    fork::adopt_child();
}

/// The content of a file under `/sys/module/kvm*` that programs read.
pub fn module_file(path: &CStr) -> Option<&'static [u8]> {
    module_file::content(path)
}
