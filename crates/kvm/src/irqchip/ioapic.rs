//! The I/O APIC: 24 pins that become messages (Intel's "82093AA I/O Advanced Programmable Interrupt
//! Controller").

use super::message::{Delivery, Destination, Message};

/// Pins.
pub(super) const PINS: u8 = 24;
/// Its page, and the bytes of it that are registers.
pub(super) const ADDRESS: u64 = 0xfec0_0000;
pub(super) const LENGTH: u64 = 0x100;

/// Offsets of the two registers by which all others are reached.
const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;

/// Registers by their number.
const ID: u32 = 0;
const VERSION: u32 = 1;
const ARBITRATION: u32 = 2;
const FIRST_ENTRY: u32 = 0x10;
const VERSION_NUMBER: u32 = 0x11;

/// Bits of a redirection entry.
pub(super) mod entry {
    pub(in super::super) const LOGICAL: u64 = 1 << 11;
    pub(in super::super) const STATUS: u64 = 1 << 12;
    pub(in super::super) const REMOTE_IRR: u64 = 1 << 14;
    pub(in super::super) const LEVEL: u64 = 1 << 15;
    pub(in super::super) const MASKED: u64 = 1 << 16;
    /// What a guest cannot write.
    pub(in super::super) const READ_ONLY: u64 = STATUS | REMOTE_IRR;
}

/// The I/O APIC's state.
#[derive(Clone, Debug)]
pub(super) struct IoApic {
    pub(super) select: u32,
    pub(super) id: u32,
    /// Pins that are asserted, or whose edge has not been delivered.
    pub(super) irr: u32,
    pub(super) entries: [u64; PINS as usize],
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            select: 0,
            id: 0,
            irr: 0,
            entries: [entry::MASKED; PINS as usize],
        }
    }
}

impl IoApic {
    /// Sets a pin. Whether that is news; `deliver` takes the message that it becomes and answers
    /// whether anybody did.
    pub(super) fn set_pin(
        &mut self,
        pin: u8,
        level: bool,
        deliver: impl FnMut(&Message) -> bool,
    ) -> bool {
        let mask = 1 << pin;
        if !level {
            self.irr &= !mask;
            return true;
        }
        let is_level = self.entries[usize::from(pin)] & entry::LEVEL != 0;
        let known = self.irr & mask != 0;
        self.irr |= mask;
        if known && !is_level {
            return false;
        }
        self.serve(pin, deliver)
    }

    /// Sends the message of an asserted pin, unless it is masked or its last one has not ended.
    fn serve(&mut self, pin: u8, mut deliver: impl FnMut(&Message) -> bool) -> bool {
        let entry = &mut self.entries[usize::from(pin)];
        let is_level = *entry & entry::LEVEL != 0;
        if *entry & entry::MASKED != 0 || is_level && *entry & entry::REMOTE_IRR != 0 {
            return false;
        }
        let delivered = deliver(&message(*entry));
        if is_level && delivered {
            *entry |= entry::REMOTE_IRR;
        }
        delivered
    }

    /// A local APIC has ended a level-triggered interrupt: the pins that sent it, as bits. Those that
    /// are still asserted after `before` was told of them send it again.
    pub(super) fn end(&mut self, vector: u8) -> u32 {
        let mut pins = 0;
        for (pin, entry) in self.entries.iter_mut().enumerate() {
            if *entry as u8 == vector
                && *entry & entry::LEVEL != 0
                && *entry & entry::REMOTE_IRR != 0
            {
                *entry &= !entry::REMOTE_IRR;
                pins |= 1 << pin;
            }
        }
        pins
    }

    /// Sends the messages of those of `pins` that are still asserted.
    pub(super) fn serve_again(&mut self, pins: u32, mut deliver: impl FnMut(&Message) -> bool) {
        for pin in bits(pins & self.irr) {
            if self.entries[usize::from(pin)] & entry::LEVEL != 0 {
                self.serve(pin, &mut deliver);
            }
        }
    }

    /// Sends every message that is owed: the state was replaced.
    pub(super) fn restart(&mut self, mut deliver: impl FnMut(&Message) -> bool) {
        for pin in bits(self.irr) {
            self.serve(pin, &mut deliver);
        }
    }

    /// A read of up to 4 bytes at an offset in the page.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset & !0xf {
            SELECT => self.select,
            WINDOW => self.read_register(),
            _ => 0,
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            VERSION => u32::from(PINS - 1) << 16 | VERSION_NUMBER,
            ID | ARBITRATION => (self.id & 0xf) << 24,
            number => {
                let index = number.wrapping_sub(FIRST_ENTRY);
                let entry = self.entries.get((index / 2) as usize);
                let entry = entry.copied().unwrap_or(u64::MAX);
                (entry >> (32 * (index & 1))) as u32
            }
        }
    }

    /// A write at an offset in the page.
    pub(super) fn write(&mut self, offset: u64, value: u32, deliver: impl FnMut(&Message) -> bool) {
        match offset & !0xf {
            SELECT => self.select = value & 0xff,
            WINDOW if self.select == ID => self.id = value >> 24 & 0xf,
            WINDOW => self.write_entry(value, deliver),
            _ => {}
        }
    }

    fn write_entry(&mut self, value: u32, deliver: impl FnMut(&Message) -> bool) {
        let index = self.select.wrapping_sub(FIRST_ENTRY);
        let Some(entry) = self.entries.get_mut((index / 2) as usize) else {
            return;
        };
        let shift = 32 * (index & 1);
        let replaced = 0xffff_ffff << shift;
        let written = u64::from(value) << shift & !entry::READ_ONLY;
        *entry = *entry & (!replaced | entry::READ_ONLY) | written;
        if *entry & entry::LEVEL == 0 {
            *entry &= !entry::REMOTE_IRR;
        }
        let is_level = *entry & entry::LEVEL != 0;
        let pin = (index / 2) as u8;
        if is_level && self.irr & 1 << pin != 0 {
            self.serve(pin, deliver);
        }
    }

    /// Vectors that a level-triggered pin sends, as bits.
    #[cfg(test)]
    fn vector_of(&self, pin: usize) -> u8 {
        self.entries[pin] as u8
    }
}

/// The pins that are set in a word.
fn bits(pins: u32) -> impl Iterator<Item = u8> {
    (0..PINS).filter(move |pin| pins & 1 << pin != 0)
}

/// The message of a redirection entry.
pub(super) fn message(entry: u64) -> Message {
    let id = (entry >> 56) as u32;
    Message {
        vector: entry as u8,
        delivery: Delivery::from_bits((entry >> 8) as u32),
        destination: if entry & entry::LOGICAL != 0 {
            Destination::Logical(id)
        } else {
            Destination::Physical(id)
        },
        level: entry & entry::LEVEL != 0,
        assert: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With pin 5 on vector 0x45 of APIC 1, and these bits of the entry besides.
    fn ioapic(bits: u64) -> IoApic {
        let mut ioapic = IoApic::default();
        set_entry(&mut ioapic, 5, 0x45 | bits | 1 << 56);
        ioapic
    }

    fn set_entry(ioapic: &mut IoApic, pin: u32, entry: u64) {
        for half in [1, 0] {
            ioapic.write(SELECT, FIRST_ENTRY + 2 * pin + half, |_| true);
            ioapic.write(WINDOW, (entry >> (32 * half)) as u32, |_| true);
        }
    }

    #[test]
    fn an_edge_is_delivered_once_until_the_pin_has_been_low() {
        let mut ioapic = ioapic(0);
        let mut sent = Vec::new();
        let mut set = |ioapic: &mut IoApic, level| {
            ioapic.set_pin(5, level, |message| {
                sent.push(*message);
                true
            })
        };
        assert!(set(&mut ioapic, true));
        assert!(!set(&mut ioapic, true));
        set(&mut ioapic, false);
        assert!(set(&mut ioapic, true));
        assert_eq!(sent.len(), 2);
        assert_eq!(sent[0].destination, Destination::Physical(1));
        assert_eq!(ioapic.vector_of(5), 0x45);
    }

    #[test]
    fn a_level_is_delivered_again_at_its_end_while_it_is_asserted() {
        let mut ioapic = ioapic(entry::LEVEL);
        assert!(ioapic.set_pin(5, true, |message| message.level));
        assert_ne!(ioapic.entries[5] & entry::REMOTE_IRR, 0);
        let again = ioapic.set_pin(5, true, |_| panic!("it has not ended"));
        assert!(!again);
        assert_eq!(ioapic.end(0x44), 0);
        assert_eq!(ioapic.end(0x45), 1 << 5);
        let mut count = 0;
        ioapic.serve_again(1 << 5, |_| {
            count += 1;
            true
        });
        assert_eq!(count, 1);
        ioapic.set_pin(5, false, |_| true);
        assert_eq!(ioapic.end(0x45), 1 << 5);
        ioapic.serve_again(1 << 5, |_| panic!("it is not asserted"));
    }

    #[test]
    fn unmasking_a_level_delivers_it_and_a_masked_edge_is_lost() {
        let mut ioapic = ioapic(entry::MASKED);
        assert!(!ioapic.set_pin(5, true, |_| panic!("masked")));
        set_entry(&mut ioapic, 5, 0x45);
        assert_eq!(ioapic.entries[5], 0x45);
        set_entry(&mut ioapic, 5, 0x45 | entry::LEVEL | entry::MASKED);
        ioapic.write(SELECT, FIRST_ENTRY + 10, |_| true);
        let mut sent = 0;
        ioapic.write(WINDOW, 0x45 | entry::LEVEL as u32, |_| {
            sent += 1;
            true
        });
        assert_eq!(sent, 1);
    }

    #[test]
    fn status_bits_are_the_controllers_and_an_edge_has_no_remote_irr() {
        let mut ioapic = ioapic(entry::LEVEL);
        ioapic.set_pin(5, true, |_| true);
        set_entry(
            &mut ioapic,
            5,
            0x46 | entry::LEVEL | entry::STATUS | entry::MASKED,
        );
        assert_eq!(
            ioapic.entries[5],
            0x46 | entry::LEVEL | entry::REMOTE_IRR | entry::MASKED
        );
        set_entry(&mut ioapic, 5, 0x46 | entry::MASKED);
        assert_eq!(ioapic.entries[5] & entry::REMOTE_IRR, 0);
    }

    #[test]
    fn id_and_version_are_what_drivers_expect() {
        let mut ioapic = IoApic::default();
        ioapic.write(WINDOW, 0x0700_0000, |_| true);
        assert_eq!(ioapic.read(WINDOW), 0x0700_0000);
        ioapic.write(SELECT, VERSION, |_| true);
        assert_eq!(ioapic.read(WINDOW), 0x17_0011);
        ioapic.write(SELECT, 0x40, |_| true);
        assert_eq!(ioapic.read(WINDOW), u32::MAX);
    }
}
