//! The chips of a PC's board that share a lock: the PICs and the I/O APIC, with who holds up which of
//! their pins, and the form in which programs save and restore them.

use super::Source;
use super::ioapic::{IoApic, PINS, entry};
use super::message::Message;
use super::pic::Pics;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip,
};
use rustix::io::Errno;

/// The PICs and the I/O APIC.
#[derive(Debug, Default)]
pub(super) struct Chips {
    pics: Pics,
    ioapic: IoApic,
    /// Who holds a pin up, as bits.
    pic_sources: [u8; 16],
    ioapic_sources: [u8; PINS as usize],
}

/// Notes that a source holds a pin up, or no longer. Whether anybody does.
fn hold(sources: &mut u8, source: Source, level: bool) -> bool {
    let bit = 1 << source as u8;
    *sources = if level {
        *sources | bit
    } else {
        *sources & !bit
    };
    *sources != 0
}

impl Chips {
    /// `KVM_GET_IRQCHIP`: `EINVAL` for an unknown one.
    pub(super) fn state(&self, id: u32) -> Result<kvm_irqchip, Errno> {
        // The bytes behind a member of the union are the program's to see; so they are zero.
        let mut state = kvm_irqchip {
            chip_id: id,
            ..kvm_irqchip::default()
        };
        match id {
            KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE => {
                state.chip.pic = self.pics.state(id == KVM_IRQCHIP_PIC_SLAVE);
            }
            KVM_IRQCHIP_IOAPIC => {
                let entries = self.ioapic.entries;
                state.chip.ioapic = kvm_ioapic_state {
                    base_address: super::ioapic::ADDRESS,
                    ioregsel: self.ioapic.select,
                    id: self.ioapic.id,
                    irr: self.ioapic.irr,
                    pad: 0,
                    redirtbl: entries.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
                };
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(state)
    }

    /// `KVM_SET_IRQCHIP`, with the same error. Messages that are owed then are sent.
    pub(super) fn set_state(
        &mut self,
        state: &kvm_irqchip,
        deliver: impl FnMut(&Message) -> bool,
    ) -> Result<(), Errno> {
        match state.chip_id {
            id @ (KVM_IRQCHIP_PIC_MASTER | KVM_IRQCHIP_PIC_SLAVE) => {
                // UNSAFETY: reads a union.
                #[expect(unsafe_code)]
                // SAFETY: any bytes are a value of its members, and all of them were copied in.
                let pic = unsafe { state.chip.pic };
                self.pics.set_state(id == KVM_IRQCHIP_PIC_SLAVE, &pic);
            }
            KVM_IRQCHIP_IOAPIC => {
                // UNSAFETY: reads a union.
                #[expect(unsafe_code)]
                // SAFETY: as above.
                let ioapic = unsafe { state.chip.ioapic };
                self.ioapic.select = ioapic.ioregsel & 0xff;
                self.ioapic.id = ioapic.id & 0xf;
                self.ioapic.irr = ioapic.irr & ((1 << PINS) - 1);
                for (to, from) in self.ioapic.entries.iter_mut().zip(ioapic.redirtbl) {
                    // UNSAFETY: reads a union.
                    #[expect(unsafe_code)]
                    // SAFETY: as above.
                    let bits = unsafe { from.bits };
                    *to = bits & !entry::STATUS;
                }
                self.ioapic.restart(deliver);
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    /// Sets a line of the PICs. Whether that is a new request; `None` if the line is masked.
    pub(super) fn set_pic_line(&mut self, source: Source, line: u8, level: bool) -> Option<bool> {
        let sources = self.pic_sources.get_mut(usize::from(line))?;
        let level = hold(sources, source, level);
        self.pics.set_line(line, level)
    }

    /// Sets a pin of the I/O APIC. Whether that changed anything.
    pub(super) fn set_pin(
        &mut self,
        source: Source,
        pin: u8,
        level: bool,
        deliver: impl FnMut(&Message) -> bool,
    ) -> bool {
        let Some(sources) = self.ioapic_sources.get_mut(usize::from(pin)) else {
            return false;
        };
        let level = hold(sources, source, level);
        self.ioapic.set_pin(pin, level, deliver)
    }

    /// A vCPU acknowledges an interrupt of the PICs, if there still is one: its vector.
    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        self.pics.output().then(|| self.pics.acknowledge())
    }

    pub(super) fn pic_output(&self) -> bool {
        self.pics.output()
    }

    pub(super) fn take_ended_lines(&mut self) -> u16 {
        self.pics.take_ended()
    }

    pub(super) fn read_pic(&mut self, port: u16) -> u8 {
        self.pics.read(port)
    }

    pub(super) fn write_pic(&mut self, port: u16, value: u8) {
        self.pics.write(port, value);
    }

    pub(super) fn read_ioapic(&self, offset: u64) -> u32 {
        self.ioapic.read(offset)
    }

    pub(super) fn write_ioapic(
        &mut self,
        offset: u64,
        value: u32,
        deliver: impl FnMut(&Message) -> bool,
    ) {
        self.ioapic.write(offset, value, deliver);
    }

    /// The I/O APIC's pins whose level-triggered interrupt has ended, as bits.
    pub(super) fn end(&mut self, vector: u8) -> u32 {
        self.ioapic.end(vector)
    }

    pub(super) fn serve_again(&mut self, pins: u32, deliver: impl FnMut(&Message) -> bool) {
        self.ioapic.serve_again(pins, deliver);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_up_while_anybody_holds_it_up() {
        let mut chips = Chips::default();
        chips.write_pic(0x4d1, 0x08);
        assert_eq!(chips.set_pic_line(Source::Program, 11, true), Some(true));
        assert_eq!(chips.set_pic_line(Source::Resampled, 11, true), Some(false));
        chips.set_pic_line(Source::Program, 11, false);
        assert!(chips.pic_output());
        chips.set_pic_line(Source::Resampled, 11, false);
        chips.acknowledge();
        assert_eq!(chips.state(KVM_IRQCHIP_PIC_SLAVE).unwrap().chip_id, 1);
    }

    #[test]
    fn what_get_shows_set_takes() {
        let mut chips = Chips::default();
        chips.write_ioapic(0, 0x10 + 6, |_| true);
        chips.write_ioapic(0x10, 0x1_0033, |_| true);
        chips.write_pic(0x21, 0xfb);
        let mut others = Chips::default();
        for id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_IOAPIC] {
            let state = chips.state(id).unwrap();
            others.set_state(&state, |_| true).unwrap();
        }
        assert_eq!(others.read_pic(0x21), 0xfb);
        assert_eq!(others.read_ioapic(0x10), 0x1_0033);
        assert_eq!(chips.state(3).err(), Some(Errno::INVAL));
    }
}
