//! Where the local APIC's registers are, and their bits (SDM Vol. 3, "Local APIC Register Address
//! Map").

/// Offsets in the APIC's page, as `KVM_GET_LAPIC` shows it.
pub(super) const ID: usize = 0x20;
pub(super) const VERSION: usize = 0x30;
pub(super) const TASK_PRIORITY: usize = 0x80;
pub(super) const PROCESSOR_PRIORITY: usize = 0xa0;
pub(super) const END_OF_INTERRUPT: usize = 0xb0;
pub(super) const LOGICAL_DESTINATION: usize = 0xd0;
pub(super) const DESTINATION_FORMAT: usize = 0xe0;
pub(super) const SPURIOUS_VECTOR: usize = 0xf0;
/// Eight registers each, 16 bytes apart.
pub(super) const IN_SERVICE: usize = 0x100;
pub(super) const TRIGGER_MODE: usize = 0x180;
pub(super) const REQUESTED: usize = 0x200;
pub(super) const ERROR_STATUS: usize = 0x280;
/// Corrected machine checks; there with MCG_CAP.CMCI_P only.
pub(super) const LOCAL_MACHINE_CHECK: usize = 0x2f0;
pub(super) const COMMAND: usize = 0x300;
pub(super) const COMMAND_HIGH: usize = 0x310;
pub(super) const LOCAL_TIMER: usize = 0x320;
pub(super) const LOCAL_THERMAL: usize = 0x330;
pub(super) const LOCAL_COUNTER: usize = 0x340;
pub(super) const LOCAL_LINE_0: usize = 0x350;
pub(super) const LOCAL_LINE_1: usize = 0x360;
pub(super) const LOCAL_ERROR: usize = 0x370;
pub(super) const INITIAL_COUNT: usize = 0x380;
pub(super) const CURRENT_COUNT: usize = 0x390;
pub(super) const DIVIDE: usize = 0x3e0;
/// x2APIC only.
pub(super) const SELF_INTERRUPT: usize = 0x3f0;

/// The version, without the number of local vectors.
pub(super) const VERSION_NUMBER: u32 = 0x14;
/// A local vector is masked.
pub(super) const MASKED: u32 = 1 << 16;
/// The spurious vector register's bit that turns the APIC on.
pub(super) const SOFTWARE_ENABLED: u32 = 1 << 8;
/// The delivery mode of a local vector or a command.
pub(super) const MODE: u32 = 7 << 8;
/// The delivery mode "from the PICs".
pub(super) const MODE_EXTERNAL: u32 = 7 << 8;

/// What can be written to a local vector: the vector, delivery status and mask; the delivery mode;
/// polarity, remote IRR and trigger; the timer's mode.
const VECTOR_BITS: u32 = MASKED | 1 << 12 | 0xff;
const LINE_BITS: u32 = VECTOR_BITS | MODE | 7 << 13;
const TIMER_BITS: u32 = VECTOR_BITS | super::timer::MODE;

/// The bits of a local vector that can be written; `None` if there is none at this offset.
pub(super) fn local_vector_bits(at: usize) -> Option<u32> {
    Some(match at {
        LOCAL_TIMER => TIMER_BITS,
        LOCAL_LINE_0 | LOCAL_LINE_1 => LINE_BITS,
        LOCAL_THERMAL | LOCAL_COUNTER | LOCAL_MACHINE_CHECK => VECTOR_BITS | MODE,
        LOCAL_ERROR => VECTOR_BITS,
        _ => return None,
    })
}

/// Fields of the interrupt command.
pub(super) mod command {
    pub(in super::super) const BUSY: u32 = 1 << 12;
    /// Reserved in x2APIC mode: bits 31:20, 17:16 and 13.
    pub(in super::super) const RESERVED: u32 = 0xfff0_0000 | 3 << 16 | 1 << 13;
}
