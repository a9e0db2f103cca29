//! Where an interrupt line of the program's goes: to pins of the interrupt controllers, or to local
//! APICs as a message (`KVM_SET_GSI_ROUTING`).

use super::ioapic::PINS;
use super::message::{Delivery, Destination, Message};
use crate::capability::MAX_IRQ_ROUTES;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MSI_VALID_DEVID, kvm_irq_routing_entry,
};
use rustix::io::Errno;
use std::collections::BTreeMap;

/// Lines of one PIC.
const PIC_LINES: u32 = 8;

/// One place that a line goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Route {
    /// A line of the pair of PICs, 0 to 15.
    Pic(u8),
    IoApic(u8),
    Message(Message),
}

/// Where each line goes.
#[derive(Clone, Debug, Default)]
pub(super) struct Routes(BTreeMap<u32, Vec<Route>>);

impl Routes {
    /// A PC's: line n is pin n of the I/O APIC, and the first 16 are also lines of the PICs.
    pub(super) fn pc() -> Self {
        let routes = (0..PINS).map(|pin| {
            let mut routes = vec![Route::IoApic(pin)];
            if pin < 16 {
                routes.push(Route::Pic(pin));
            }
            (pin.into(), routes)
        });
        Self(routes.collect())
    }

    /// The program's. `has_pins` if there are controllers with pins; `wide_ids` if messages name
    /// APICs with 32 bits.
    ///
    /// # Errors
    /// `EINVAL` for a line, a kind, a controller or a pin that there is not, for flags, and for a line
    /// that has two pins of one controller.
    pub(super) fn from_user(
        entries: &[kvm_irq_routing_entry],
        has_pins: bool,
        wide_ids: bool,
    ) -> Result<Self, Errno> {
        let mut routes: BTreeMap<u32, Vec<Route>> = BTreeMap::new();
        for entry in entries {
            if entry.gsi >= MAX_IRQ_ROUTES {
                return Err(Errno::INVAL);
            }
            let route = route(entry, has_pins, wide_ids)?;
            let line = routes.entry(entry.gsi).or_default();
            let is_message = matches!(route, Route::Message(_));
            let collides = line.iter().any(|other| match (other, &route) {
                (Route::Message(_), _) => true,
                (Route::Pic(one), Route::Pic(two)) => one / 8 == two / 8,
                (Route::IoApic(_), Route::IoApic(_)) => true,
                _ => is_message,
            });
            if collides {
                return Err(Errno::INVAL);
            }
            line.push(route);
        }
        Ok(Self(routes))
    }

    /// Where a line goes.
    pub(super) fn of(&self, line: u32) -> &[Route] {
        self.0.get(&line).map_or(&[], Vec::as_slice)
    }

    /// The lines that go to a pin of a controller.
    pub(super) fn lines_to(&self, wanted: impl Fn(&Route) -> bool) -> impl Iterator<Item = u32> {
        let lines = self.0.iter();
        lines.filter_map(move |(line, routes)| routes.iter().any(&wanted).then_some(*line))
    }

    /// The level-triggered vectors of the first `pins` lines, which stand for the pins of the
    /// program's I/O APIC, as bits.
    pub(super) fn level_vectors(&self, pins: u32) -> [u64; 4] {
        let mut vectors = [0; 4];
        for route in self.0.range(..pins).flat_map(|(_, routes)| routes) {
            if let Route::Message(message) = route
                && message.level
            {
                vectors[usize::from(message.vector / 64)] |= 1 << (message.vector % 64);
            }
        }
        vectors
    }
}

fn route(entry: &kvm_irq_routing_entry, has_pins: bool, wide_ids: bool) -> Result<Route, Errno> {
    match entry.type_ {
        KVM_IRQ_ROUTING_IRQCHIP if has_pins && entry.flags == 0 => {
            // UNSAFETY: reads a union.
            #[expect(unsafe_code)]
            // SAFETY: its members consist of integers.
            let to = unsafe { entry.u.irqchip };
            match to.irqchip {
                KVM_IRQCHIP_PIC_MASTER if to.pin < PIC_LINES => Ok(Route::Pic(to.pin as u8)),
                KVM_IRQCHIP_PIC_SLAVE if to.pin < PIC_LINES => {
                    Ok(Route::Pic((to.pin + PIC_LINES) as u8))
                }
                KVM_IRQCHIP_IOAPIC if to.pin < PINS.into() => Ok(Route::IoApic(to.pin as u8)),
                _ => Err(Errno::INVAL),
            }
        }
        KVM_IRQ_ROUTING_MSI if entry.flags & !KVM_MSI_VALID_DEVID == 0 => {
            // UNSAFETY: reads a union.
            #[expect(unsafe_code)]
            // SAFETY: as above.
            let msi = unsafe { entry.u.msi };
            if wide_ids && msi.address_hi & 0xff != 0 {
                return Err(Errno::INVAL);
            }
            let message = message(msi.address_lo, msi.address_hi, msi.data, wide_ids);
            Ok(Route::Message(message))
        }
        _ => Err(Errno::INVAL),
    }
}

/// What an MSI says (SDM Vol. 3, "Message Signalled Interrupts"). With wide ids the upper half of the
/// address has bits 31:8 of the APIC's.
pub(super) fn message(address: u32, address_high: u32, data: u32, wide_ids: bool) -> Message {
    const REDIRECTION_HINT: u32 = 1 << 3;
    const LOGICAL: u32 = 1 << 2;
    const LEVEL: u32 = 1 << 15;
    let high = if wide_ids {
        address_high & 0xffff_ff00
    } else {
        0
    };
    let id = address >> 12 & 0xff | high;
    let delivery = Delivery::from_bits(data >> 8);
    Message {
        vector: data as u8,
        delivery: match delivery {
            Delivery::Fixed if address & REDIRECTION_HINT != 0 => Delivery::LowestPriority,
            other => other,
        },
        destination: if address & LOGICAL != 0 {
            Destination::Logical(id)
        } else {
            Destination::Physical(id)
        },
        level: data & LEVEL != 0,
        assert: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{
        kvm_irq_routing_entry__bindgen_ty_1 as Union, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
    };

    fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
        kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: Union {
                irqchip: kvm_irq_routing_irqchip { irqchip, pin },
            },
            ..Default::default()
        }
    }

    fn msi(gsi: u32, address_lo: u32, address_hi: u32, data: u32) -> kvm_irq_routing_entry {
        kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: Union {
                msi: kvm_irq_routing_msi {
                    address_lo,
                    address_hi,
                    data,
                    ..Default::default()
                },
            },
            ..Default::default()
        }
    }

    #[test]
    fn lines_go_to_pins_and_messages() {
        let entries = [
            pin(0, KVM_IRQCHIP_IOAPIC, 2),
            pin(0, KVM_IRQCHIP_PIC_MASTER, 0),
            pin(12, KVM_IRQCHIP_PIC_SLAVE, 4),
            msi(24, 0xfee0_3004, 0, 0xc055),
        ];
        let routes = Routes::from_user(&entries, true, false).unwrap();
        assert_eq!(routes.of(0), [Route::IoApic(2), Route::Pic(0)]);
        assert_eq!(routes.of(12), [Route::Pic(12)]);
        assert_eq!(routes.of(13), []);
        let [Route::Message(message)] = routes.of(24) else {
            panic!("{:?}", routes.of(24));
        };
        assert_eq!(message.destination, Destination::Logical(3));
        assert!(message.level && message.vector == 0x55);
        assert_eq!(routes.level_vectors(25), [0, 1 << 0x15, 0, 0]);
        assert_eq!(routes.level_vectors(24), [0; 4]);
        let lines: Vec<_> = routes.lines_to(|to| *to == Route::IoApic(2)).collect();
        assert_eq!(lines, [0]);
    }

    #[test]
    fn what_there_is_not_and_what_collides_is_refused() {
        let refused = |entries: &[_], has_pins| {
            Routes::from_user(entries, has_pins, false).err() == Some(Errno::INVAL)
        };
        assert!(refused(&[pin(0, KVM_IRQCHIP_IOAPIC, 24)], true));
        assert!(refused(&[pin(0, KVM_IRQCHIP_PIC_MASTER, 8)], true));
        assert!(refused(&[pin(0, 3, 0)], true));
        assert!(refused(&[pin(0, KVM_IRQCHIP_IOAPIC, 1)], false));
        assert!(refused(&[pin(MAX_IRQ_ROUTES, KVM_IRQCHIP_IOAPIC, 1)], true));
        let one = pin(3, KVM_IRQCHIP_IOAPIC, 1);
        assert!(refused(&[one, pin(3, KVM_IRQCHIP_IOAPIC, 2)], true));
        assert!(refused(&[one, msi(3, 0, 0, 0)], true));
        assert!(refused(&[msi(3, 0, 0, 0), one], true));
    }

    #[test]
    fn wide_ids_are_in_the_upper_address() {
        let wide = message(0xfee2_5000, 0x0000_0300, 0x41, true);
        assert_eq!(wide.destination, Destination::Physical(0x325));
        let narrow = message(0xfee2_5000, 0x0000_0300, 0x41, false);
        assert_eq!(narrow.destination, Destination::Physical(0x25));
        let entries = [msi(0, 0xfee0_0000, 1, 0)];
        assert!(Routes::from_user(&entries, true, true).is_err());
    }

    #[test]
    fn the_pcs_lines_are_pins_of_the_same_number() {
        let routes = Routes::pc();
        assert_eq!(routes.of(5), [Route::IoApic(5), Route::Pic(5)]);
        assert_eq!(routes.of(20), [Route::IoApic(20)]);
        assert_eq!(routes.of(24), []);
    }
}
