//! What the host sets up before it gives the machine up.

use crate::calls::{call, raw};
use crate::nonsense;
use crate::vm::{PAGE, check};
use bare::say;
use twofold_pkvm::Error;
use twofold_pkvm::hypercall::{Call, NOT_SUPPORTED};

const SERIAL_PORT: u64 = 0x0900_0000;
/// Read and write a device.
const DEVICE: u64 = 0b1011;

fn is_offered(which: Call) -> bool {
    raw(which.function(), [0; 5])[0] != NOT_SUPPORTED
}

/// Uses the calls that are over once a processor has finalised. Says whether there is a GICv3.
pub(crate) fn set_up(hypervisor: u64) -> bool {
    assert_eq!(call(Call::Init, &[]), Ok(0));
    check!(
        !is_offered(Call::ReserveVm) && !is_offered(Call::DonateGuest),
        "calls about guests are not there before finalising"
    );
    let map = |address, size, access| call(Call::CreatePrivateMapping, &[address, size, access]);
    let Ok(place) = map(SERIAL_PORT, PAGE, DEVICE) else {
        panic!("the serial port is not mapped");
    };
    check!(
        map(hypervisor, PAGE, DEVICE) == Err(Error::NotPermitted)
            && map(SERIAL_PORT, PAGE, DEVICE | 0b100) == Err(Error::Invalid)
            && map(SERIAL_PORT, 0, DEVICE) == Err(Error::Invalid)
            && map(u64::MAX, PAGE, DEVICE) == Err(Error::Invalid)
            && map(SERIAL_PORT, 1 << 24, DEVICE) == Err(Error::NoMemory),
        "the hypervisor maps the serial port for itself, at {place:#x}; memory, code, nothing and too much are refused"
    );
    check!(
        call(Call::CpuSetVector, &[1]) == Ok(0)
            && call(Call::CpuSetVector, &[2]) == Err(Error::Invalid)
            && call(Call::CpuSetVector, &[0]) == Ok(0),
        "exceptions reach it through vectors that overwrite the branch history, and straight again; there are no hidden ones"
    );
    if is_offered(Call::EnableSsbs) {
        say!("host: speculative store bypass is safe at EL2");
    } else {
        say!("host: this processor has no SSBS: enable_ssbs is not supported");
    }
    let gic = is_offered(Call::VgicV3GetGicConfig);
    if gic {
        assert_eq!(call(Call::VgicV3InitLrs, &[]), Ok(0));
        let config = call(Call::VgicV3GetGicConfig, &[]).unwrap_or(0);
        check!(
            config >> 63 == 0,
            "interrupts of guests go through {} list registers, empty now",
            (config & 0x1f) + 1
        );
    }
    nonsense::before();
    gic
}

/// The same calls when they are over.
pub(crate) fn over() {
    let early = [
        Call::Init,
        Call::CreatePrivateMapping,
        Call::CpuSetVector,
        Call::EnableSsbs,
        Call::VgicV3InitLrs,
        Call::VgicV3GetGicConfig,
    ];
    check!(
        !early.into_iter().any(is_offered),
        "those calls are over: not supported any more"
    );
    check!(
        !is_offered(Call::VgicV5SaveApr) && !is_offered(Call::VgicV5RestoreVmcrApr),
        "nor those about a GICv5, which there is not"
    );
}
