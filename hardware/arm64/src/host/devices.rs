//! An ordinary guest whose clock and devices are the host's to play, and what the host may ask to be
//! forgotten of it.

use crate::calls::call;
use crate::clock::{nanoseconds_per_tick, ticks};
use crate::vm::{ENTRY, PAGE, Pages, Program, Vm, check};
use twofold_pkvm::hypercall::Call;
use twofold_pkvm::request::Request;
use twofold_pkvm::{Error, HostVcpu};

const DEVICE: u64 = 0x900_0000;
/// Half a minute after its counter was 0 the guest has surely run.
const SOON: u64 = 30_000_000_000;

/// The guest reads its counter, loads from and stores to a device that is not there.
pub(crate) fn emulated(pages: &mut Pages) {
    let vm = Vm::new(pages, false, 8);
    let text = pages.take();
    Program::Device.copy_to(text);
    assert_eq!(call(Call::VcpuLoad, &[vm.handle, 0]), Ok(0));
    assert_eq!(
        call(Call::ShareGuest, &[text / PAGE, ENTRY / PAGE, 1, 0b101]),
        Ok(0)
    );
    let start = ticks();
    assert_eq!(call(Call::TimerSetCntvoff, &[start]), Ok(0));
    let [its, ..] = vm.run_to_call(0x1000_0001);
    check!(
        its * nanoseconds_per_tick() < SOON && ticks() > start,
        "an ordinary guest's time began with the offset that the host set: {its} ticks; the host's own goes on"
    );
    assert_eq!(call(Call::TimerSetCntvoff, &[0]), Ok(0));
    flushes(&vm);
    assert_eq!(vm.run_to_abort(), DEVICE);
    ask(&vm, Request::Undefined);
    assert_eq!(call(Call::AdjustPc, &[vm.vcpu]), Err(Error::NotPermitted));
    vm.set_word(HostVcpu::DATA, 0x1122_3344);
    ask(&vm, Request::Skip);
    assert_eq!(call(Call::AdjustPc, &[vm.vcpu + 8]), Err(Error::Invalid));
    assert_eq!(call(Call::AdjustPc, &[vm.vcpu]), Ok(0));
    ask(&vm, Request::Skip);
    check!(
        call(Call::AdjustPc, &[vm.vcpu]) == Err(Error::NotPermitted),
        "the host plays a device: it supplies what the guest loads, and the guest goes on behind the load, once"
    );
    vm.set_word(HostVcpu::REQUEST, 0);
    assert_eq!(vm.run_to_abort(), DEVICE + 2);
    let stored = vm.word(HostVcpu::DATA);
    ask(&vm, Request::Skip);
    let [loaded, ..] = vm.run_to_call(0x1000_0002);
    check!(
        stored == 0x5678 && loaded == 0x1122_3344,
        "the host sees the half word {stored:#x} that the guest stores, and the guest saw {loaded:#x}"
    );
    assert_eq!(vm.run_to_abort(), DEVICE + 8);
    ask(&vm, Request::Abort);
    let [syndrome, address, _] = vm.run_to_call(0x1000_0003);
    check!(
        syndrome == 0x25 << 26 | 1 << 25 | 0x10 && address == DEVICE + 8,
        "where there is nothing the guest gets an external abort in its own vector, for {address:#x}"
    );
    assert_eq!(call(Call::VcpuPut, &[]), Ok(0));
    let frame = ENTRY / PAGE;
    assert_eq!(call(Call::UnshareGuest, &[vm.handle, frame, 1]), Ok(0));
    vm.end(&[]);
}

fn ask(vm: &Vm, request: Request) {
    vm.set_word(HostVcpu::REQUEST, request as u64);
}

/// TLB maintenance for a guest, as it is asked for and as it must not be.
fn flushes(vm: &Vm) {
    let handle = vm.handle;
    for (which, arguments) in [
        (Call::TlbFlushVmidIpa, [handle, ENTRY, 3]),
        (Call::TlbFlushVmidIpa, [handle, ENTRY, 2]),
        (Call::TlbFlushVmidIpa, [handle, ENTRY, 0]),
        (Call::TlbFlushVmidIpaNsh, [handle, ENTRY, 3]),
        (Call::TlbFlushVmidIpaNsh, [handle, ENTRY, 1]),
        (Call::TlbFlushVmidRange, [handle, ENTRY, 1]),
        (Call::TlbFlushVmidRange, [handle, 0, 1 << 24]),
        (Call::TlbFlushVmid, [handle, 0, 0]),
        (Call::PkvmTlbFlushVmid, [handle, 0, 0]),
        (Call::FlushCpuContext, [handle, 0, 0]),
        (Call::FlushVmContext, [0, 0, 0]),
    ] {
        assert_eq!(call(which, &arguments), Ok(0), "{}", which.name());
    }
    let mut refused = 0;
    for (which, arguments, error) in [
        (
            Call::TlbFlushVmidIpa,
            [handle, ENTRY + 8, 3],
            Error::Invalid,
        ),
        (Call::TlbFlushVmidIpa, [handle, ENTRY, 4], Error::Invalid),
        (Call::TlbFlushVmidIpa, [handle, 1 << 36, 3], Error::Invalid),
        (
            Call::TlbFlushVmidIpaNsh,
            [handle, u64::MAX, 3],
            Error::Invalid,
        ),
        (Call::TlbFlushVmidRange, [handle, ENTRY, 0], Error::Invalid),
        (
            Call::TlbFlushVmidRange,
            [handle, ENTRY, u64::MAX],
            Error::Invalid,
        ),
        (Call::TlbFlushVmid, [handle + 7, 0, 0], Error::NotFound),
        (Call::FlushCpuContext, [1, 0, 0], Error::Invalid),
    ] {
        assert_eq!(call(which, &arguments), Err(error), "{}", which.name());
        refused += 1;
    }
    check!(
        refused == 8,
        "TLB maintenance for it by page, block, range and whole, here and everywhere; {refused} senseless ones are refused"
    );
}
