//! The ioctl table: from numbers and user pointers to the methods of [`Kvm`](crate::Kvm),
//! [`Vm`](crate::Vm) and [`Vcpu`](crate::Vcpu).

pub mod number;
mod system;
mod tables;
mod vcpu;
mod vm;

use crate::object::Object;
use crate::sync::ProcessMutex;
use rustix::io::Errno;

/// What a successful ioctl returns: a count, a descriptor, or 0.
pub(crate) type Reply = Result<i32, Errno>;

/// Does the ioctl `request` on an object.
#[inline]
pub(crate) fn dispatch(object: &Object, request: u64, argument: usize) -> Reply {
    match object {
        Object::Vcpu(object) => vcpu::ioctl(object, request, argument),
        Object::Vm(object) => vm::ioctl(object, request, argument),
        Object::System => system::ioctl(request, argument),
        Object::Stats(_) | Object::GuestMemory(_) => Err(Errno::NOTTY),
    }
}

/// The answer to an ioctl that is not there: `ENOTTY`, and a log line the first time.
#[cold]
fn unknown(object: &str, request: u64) -> Errno {
    static SEEN: ProcessMutex<Vec<u64>> = ProcessMutex::new(Vec::new());
    let first = SEEN.with(|seen| {
        let first = !seen.contains(&request) && seen.len() < 256;
        if first {
            seen.push(request);
        }
        first
    });
    if first {
        let name = number::name(request).unwrap_or("a number that KVM does not define");
        let request = format_args!("{request:#x}");
        tracing::warn!(object, %request, name, "an ioctl that is not implemented answers ENOTTY");
    }
    Errno::NOTTY
}
