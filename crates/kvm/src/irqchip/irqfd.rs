//! Interrupts from eventfds (`KVM_IRQFD`): a thread waits for them and raises their lines. Lines that
//! stay up until the guest has served them (`KVM_IRQFD_FLAG_RESAMPLE`) tell a second eventfd when
//! that is.

use super::{Model, Source};
use crate::eventfd::{EventFd, Identity, identity};
use crate::service_thread;
use crate::sync::Mutex;
use crate::vm::Vm;
use kvm_bindings::{KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd};
use rustix::event::{EventfdFlags, PollFlags, eventfd, poll};
use rustix::io::Errno;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

/// One attached eventfd.
#[derive(Debug)]
struct IrqFd {
    event: EventFd,
    line: u32,
    resample: Option<EventFd>,
}

/// The eventfds of a VM.
#[derive(Debug, Default)]
pub(crate) struct IrqFds {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    attached: Mutex<Vec<Arc<IrqFd>>>,
    /// Wakes the thread when that has changed.
    changed: OnceLock<EventFd>,
    ends: AtomicBool,
}

impl Shared {
    fn wake(&self) {
        if let Some(changed) = self.changed.get() {
            // Its count is never full: it is 1 or 2.
            let _ = changed.signal();
        }
    }

    /// Waits until eventfds are signalled: those that are.
    fn wait(&self) -> Result<Vec<Arc<IrqFd>>, Errno> {
        let changed = self.changed.get().ok_or(Errno::BADF)?;
        let attached = self.attached.lock().clone();
        let mut polled: Vec<_> = attached.iter().map(|irqfd| irqfd.event.poll()).collect();
        polled.push(changed.poll());
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let is_ready: Vec<_> = polled
            .iter()
            .map(|entry| entry.revents().contains(PollFlags::IN))
            .collect();
        drop(polled);
        if is_ready.last() == Some(&true) {
            changed.take();
        }
        let signalled = attached.into_iter().zip(is_ready);
        Ok(signalled
            .filter_map(|(irqfd, ready)| ready.then_some(irqfd))
            .collect())
    }
}

impl Drop for IrqFds {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        self.shared.wake();
    }
}

impl IrqFds {
    /// Starts the thread if it does not run yet.
    fn start(&self, vm: &Arc<Vm>) -> Result<(), Errno> {
        if self.shared.changed.get().is_some() {
            return Ok(());
        }
        let own = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let own = EventFd::from_user(own.as_raw_fd())?;
        if self.shared.changed.set(own).is_err() {
            return Ok(());
        }
        let (vm, shared) = (Arc::downgrade(vm), Arc::clone(&self.shared));
        let thread = service_thread::start("kvm-irqfd", move || serve(&vm, &shared));
        thread
            .map(|_| ())
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
    }

    fn attach(&self, irqfd: IrqFd) -> Result<(), Errno> {
        let mut attached = self.shared.attached.lock();
        let identity = irqfd.event.identity();
        if attached
            .iter()
            .any(|other| other.event.identity() == identity)
        {
            return Err(Errno::BUSY);
        }
        attached.push(Arc::new(irqfd));
        drop(attached);
        self.shared.wake();
        Ok(())
    }

    fn detach(&self, identity: Identity, line: u32) {
        self.shared
            .attached
            .lock()
            .retain(|irqfd| irqfd.event.identity() != identity || irqfd.line != line);
        self.shared.wake();
    }

    /// Those on a line that wait for the guest to have served it.
    fn resampled(&self, line: u32) -> Vec<Arc<IrqFd>> {
        let attached = self.shared.attached.lock();
        let waits = |irqfd: &&Arc<IrqFd>| irqfd.line == line && irqfd.resample.is_some();
        attached.iter().filter(waits).cloned().collect()
    }
}

fn serve(vm: &Weak<Vm>, shared: &Shared) {
    while !shared.ends.load(Ordering::SeqCst) {
        let signalled = match shared.wait() {
            Ok(signalled) => signalled,
            Err(error) => {
                tracing::error!(%error, "interrupts from eventfds are lost");
                return;
            }
        };
        // The last reference may be dropped here: then the thread has been told to end.
        let Some(vm) = vm.upgrade() else {
            return;
        };
        for irqfd in signalled {
            irqfd.event.take();
            let source = match irqfd.resample {
                Some(_) => Source::Resampled,
                None => Source::Program,
            };
            vm.set_line(source, irqfd.line, true);
            if irqfd.resample.is_none() {
                vm.set_line(source, irqfd.line, false);
            }
        }
    }
}

impl Vm {
    /// `KVM_IRQFD`
    ///
    /// # Errors
    /// `EINVAL` for unknown flags, without an in-kernel interrupt controller, and with resampling
    /// without an in-kernel I/O APIC; `EBADF` or `EINVAL` for what is no eventfd; `EBUSY` for one
    /// that is attached already; detaching one that is not there is no error.
    pub fn irqfd(self: &Arc<Self>, request: &kvm_irqfd) -> Result<(), Errno> {
        if request.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return Err(Errno::INVAL);
        }
        let irqfds = &self.controllers.irqfds;
        let fd = request.fd as i32;
        if request.flags & KVM_IRQFD_FLAG_DEASSIGN != 0 {
            irqfds.detach(identity(fd)?, request.gsi);
            return Ok(());
        }
        let resamples = request.flags & KVM_IRQFD_FLAG_RESAMPLE != 0;
        match self.irqchip_model() {
            Model::None => return Err(Errno::INVAL),
            Model::Split if resamples => return Err(Errno::INVAL),
            Model::Split | Model::Kernel => {}
        }
        let irqfd = IrqFd {
            event: EventFd::from_user(fd)?,
            line: request.gsi,
            resample: match resamples {
                true => Some(EventFd::from_user(request.resamplefd as i32)?),
                false => None,
            },
        };
        irqfds.start(self)?;
        irqfds.attach(irqfd)
    }

    /// The guest has served a line: those that hold it up let it go, and look whether to raise it
    /// again.
    pub(super) fn resample(&self, line: u32) {
        let irqfds = self.controllers.irqfds.resampled(line);
        if irqfds.is_empty() {
            return;
        }
        self.set_line(Source::Resampled, line, false);
        for resample in irqfds.iter().filter_map(|irqfd| irqfd.resample.as_ref()) {
            if let Err(error) = resample.signal() {
                tracing::warn!(%error, line, "an eventfd is not told of the end of an interrupt");
            }
        }
    }
}
