//! Interrupt messages: what local APICs send each other, and what an MSI and an I/O APIC's pin
//! become; and which local APICs they are for (SDM Vol. 3, "Determining IPI Destination").

use crate::vcpu::{Ask, VcpuCore};
use crate::vm::Vm;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How an interrupt is delivered: bits 10:8 of an interrupt command, of an MSI's data, and of a
/// redirection entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Delivery {
    Fixed,
    LowestPriority,
    SystemManagement,
    /// Reserved (an old remote read).
    Reserved,
    NonMaskable,
    Init,
    StartUp,
    /// The vector is asked of the PICs.
    External,
}

impl Delivery {
    /// From the three bits.
    pub(crate) fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::SystemManagement,
            3 => Self::Reserved,
            4 => Self::NonMaskable,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::External,
        }
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Destination {
    /// The local APIC with this id.
    Physical(u32),
    /// Those whose logical id matches.
    Logical(u32),
    /// Its sender.
    Myself,
    All,
    AllButMyself,
}

/// An interrupt on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Message {
    pub(crate) vector: u8,
    pub(crate) delivery: Delivery,
    pub(crate) destination: Destination,
    /// Level-triggered: the end of the interrupt is told to the I/O APICs.
    pub(crate) level: bool,
    /// Asserted; an INIT that is not is for processors of the last century.
    pub(crate) assert: bool,
}

/// How a local APIC is addressed, as it has published it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Address {
    /// The id: 32 bits in x2APIC mode, else 8.
    pub(crate) id: u32,
    /// The logical id: 32 bits in x2APIC mode, else 8.
    pub(crate) logical: u32,
    pub(crate) mode: AddressMode,
}

bitflags::bitflags! {
    /// The modes of a local APIC that matter to senders.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub(crate) struct AddressMode: u32 {
        /// IA32_APIC_BASE enables it.
        const PRESENT = 1 << 0;
        const X2APIC = 1 << 1;
        /// The spurious vector register enables it.
        const ENABLED = 1 << 2;
        /// Logical ids are clusters' (only outside x2APIC mode).
        const CLUSTER = 1 << 3;
        /// It takes interrupts of the PICs.
        const EXTERNAL = 1 << 4;
    }
}

impl Address {
    /// Whether a physical destination names this APIC.
    fn is(&self, id: u32) -> bool {
        if self.mode.contains(AddressMode::X2APIC) {
            id == u32::MAX || id == self.id
        } else {
            id == 0xff || id == self.id
        }
    }

    /// Whether a logical destination does.
    fn is_logical(&self, id: u32) -> bool {
        if self.mode.contains(AddressMode::X2APIC) {
            return id == u32::MAX
                || id >> 16 == self.logical >> 16 && id & self.logical & 0xffff != 0;
        }
        if id == 0xff {
            return true;
        }
        if self.mode.contains(AddressMode::CLUSTER) {
            id >> 4 == self.logical >> 4 && id & self.logical & 0xf != 0
        } else {
            id & self.logical != 0
        }
    }
}

impl Message {
    /// What an interrupt command sends (SDM Vol. 3, "Interrupt Command Register").
    pub(crate) fn of_command(command: u32, destination: u32) -> Self {
        const LOGICAL: u32 = 1 << 11;
        const ASSERT: u32 = 1 << 14;
        const LEVEL: u32 = 1 << 15;
        Self {
            vector: command as u8,
            delivery: Delivery::from_bits(command >> 8),
            destination: match command >> 18 & 3 {
                1 => Destination::Myself,
                2 => Destination::All,
                3 => Destination::AllButMyself,
                _ if command & LOGICAL != 0 => Destination::Logical(destination),
                _ => Destination::Physical(destination),
            },
            level: command & LEVEL != 0,
            assert: command & ASSERT != 0,
        }
    }

    /// Whether the message is for an APIC; `own` if that is its sender, and `from_bus` if it comes in
    /// the old format of a bus.
    fn is_for(&self, address: &Address, own: bool, from_bus: bool) -> bool {
        // In the old format a bus has no other way of naming everybody.
        let wide = |id: u32| match id {
            0xff if from_bus && address.mode.contains(AddressMode::X2APIC) => u32::MAX,
            _ => id,
        };
        match self.destination {
            Destination::Physical(id) => address.is(wide(id)),
            Destination::Logical(id) => address.is_logical(wide(id)),
            Destination::Myself => own,
            Destination::All => true,
            Destination::AllButMyself => !own,
        }
    }

    /// Hands the message to a vCPU. Whether that takes it.
    fn give(&self, core: &VcpuCore, address: &Address, own: bool) -> bool {
        let ask = match self.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                if !address.mode.contains(AddressMode::ENABLED) {
                    return false;
                }
                core.inbox.put_interrupt(self.vector, self.level);
                Ask::INTERRUPT
            }
            Delivery::NonMaskable => Ask::NMI,
            Delivery::Init if !self.level || self.assert => {
                core.inbox.withdraw(Ask::START);
                Ask::INIT
            }
            Delivery::StartUp => {
                core.inbox.put_start_vector(self.vector);
                Ask::START
            }
            Delivery::Init
            | Delivery::SystemManagement
            | Delivery::Reserved
            | Delivery::External => return false,
        };
        if own {
            // Its own thread looks before it enters the guest again.
            core.inbox.ask(ask);
        } else {
            core.notify(ask);
        }
        true
    }
}

impl Vm {
    /// Delivers a message to the local APICs that it is for. `source` is the vCPU that sent it, if
    /// one did, and it is that vCPU's own thread that asks. How many took it.
    pub(crate) fn deliver(&self, message: &Message, source: Option<&VcpuCore>) -> u32 {
        let members = self.members.read();
        let widens = source.is_none() && !self.plain_broadcasts();
        let is_own = |core: &Arc<VcpuCore>| {
            source.is_some_and(|source| std::ptr::eq(source, Arc::as_ptr(core)))
        };
        let mut receivers = members.iter().filter_map(|core| {
            let address = core.inbox.address();
            let own = is_own(core);
            (address.mode.contains(AddressMode::PRESENT) && message.is_for(&address, own, widens))
                .then_some((core, address, own))
        });
        if message.delivery != Delivery::LowestPriority {
            return receivers
                .filter(|(core, address, own)| message.give(core, address, *own))
                .count() as u32;
        }
        // The lowest of equal priorities: each in turn.
        let first = receivers.find(|(_, address, _)| address.mode.contains(AddressMode::ENABLED));
        let chosen = receivers.fold(first, |best, next| match &best {
            Some(found)
                if next.1.mode.contains(AddressMode::ENABLED)
                    && next.0.inbox.taken() < found.0.inbox.taken() =>
            {
                Some(next)
            }
            _ => best,
        });
        match chosen {
            Some((core, address, own)) => {
                core.inbox.count_taken();
                message.give(core, &address, own).into()
            }
            None => 0,
        }
    }

    /// Delivers a message of a vCPU to the local APICs whose ids are wanted. How many took it.
    pub(crate) fn deliver_to(
        &self,
        message: &Message,
        wanted: impl Fn(u32) -> bool,
        source: &VcpuCore,
    ) -> u32 {
        let members = self.members.read();
        let takes = |core: &&Arc<VcpuCore>| {
            let address = core.inbox.address();
            let own = std::ptr::eq(source, Arc::as_ptr(core));
            address.mode.contains(AddressMode::PRESENT)
                && wanted(address.id)
                && message.give(core, &address, own)
        };
        members.iter().filter(takes).count() as u32
    }

    /// Has the vCPU whose local APIC has this id go on, if it halts, now or next.
    pub(crate) fn unhalt(&self, id: u32) {
        let members = self.members.read();
        if let Some(core) = members.iter().find(|core| core.inbox.address().id == id) {
            core.notify(Ask::UNHALT);
        }
    }

    /// Has the vCPUs that take the PICs' interrupts look at them.
    pub(crate) fn notify_external(&self) {
        for core in self.members.read().iter() {
            let mode = core.inbox.address().mode;
            if mode.contains(AddressMode::EXTERNAL) {
                core.notify(Ask::EXTERNAL);
            }
        }
    }

    /// Whether the PICs have an interrupt for whoever takes it.
    #[inline]
    pub(crate) fn has_external(&self) -> bool {
        self.pic_output.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(destination: Destination) -> Message {
        Message {
            vector: 0x40,
            delivery: Delivery::Fixed,
            destination,
            level: false,
            assert: true,
        }
    }

    fn address(id: u32, logical: u32, mode: AddressMode) -> Address {
        Address { id, logical, mode }
    }

    #[test]
    fn physical_destinations_are_ids_or_everybody_in_the_format_of_the_mode() {
        let old = address(3, 0, AddressMode::PRESENT);
        let new = address(3, 0, AddressMode::PRESENT | AddressMode::X2APIC);
        let hits = |to, address: &Address, from_bus| {
            message(Destination::Physical(to)).is_for(address, false, from_bus)
        };
        assert!(hits(3, &old, false) && hits(3, &new, false));
        assert!(!hits(4, &old, false) && !hits(4, &new, false));
        assert!(hits(0xff, &old, false));
        assert!(!hits(0xff, &new, false), "0xff is an id in x2APIC mode");
        assert!(hits(u32::MAX, &new, false));
        assert!(hits(0xff, &new, true), "but a bus means everybody by it");
    }

    #[test]
    fn flat_logical_ids_are_bits_and_clusters_have_four_members() {
        let hits =
            |to, address: &Address| message(Destination::Logical(to)).is_for(address, false, false);
        let flat = address(1, 0b10, AddressMode::PRESENT);
        assert!(hits(0b11, &flat) && !hits(0b101, &flat));
        let mode = AddressMode::PRESENT | AddressMode::CLUSTER;
        let cluster = address(1, 0x21, mode);
        assert!(hits(0x23, &cluster) && !hits(0x22, &cluster) && !hits(0x13, &cluster));
        assert!(hits(0xff, &cluster));
    }

    #[test]
    fn logical_ids_of_x2apic_mode_are_sixteen_members_of_a_cluster() {
        let mode = AddressMode::PRESENT | AddressMode::X2APIC;
        // The id 0x25 is member 5 of cluster 2.
        let apic = address(0x25, 2 << 16 | 1 << 5, mode);
        let hits = |to| message(Destination::Logical(to)).is_for(&apic, false, false);
        assert!(hits(2 << 16 | 0x20) && hits(2 << 16 | 0xffff) && hits(u32::MAX));
        assert!(!hits(2 << 16 | 0x10) && !hits(1 << 16 | 0x20));
    }

    #[test]
    fn shorthands_name_the_sender_or_the_others() {
        let apic = address(0, 0, AddressMode::PRESENT);
        for own in [false, true] {
            let is_for = |destination| message(destination).is_for(&apic, own, false);
            assert_eq!(is_for(Destination::Myself), own);
            assert_eq!(is_for(Destination::AllButMyself), !own);
            assert!(is_for(Destination::All));
        }
    }
}
