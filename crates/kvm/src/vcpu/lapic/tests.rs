use super::*;
use crate::irqchip;
use crate::vcpu::Ask;
use std::time::Duration;
use twofold_cpu::{Machine, MachineConfig};

/// An APIC with the processor that it belongs to.
struct Apic {
    lapic: Lapic,
    cpu: Cpu,
    inbox: Arc<Inbox>,
}

impl Apic {
    /// Enabled, of vCPU 5, with a bus clock of 1 GHz.
    fn new(mode: u64) -> Self {
        let inbox = Arc::new(Inbox::default());
        let mut apic = Self {
            lapic: Lapic::new(5, base::ENABLED, 1, Arc::clone(&inbox)),
            cpu: Cpu::new(Machine::new(MachineConfig::default()), 0),
            inbox,
        };
        let mut msrs = apic.cpu.msrs();
        msrs.tsc_multiplier = crate::tsc::HOST_RATE;
        apic.cpu.set_msrs(&msrs);
        apic.lapic.set_base(base::ENABLED | mode);
        apic.lapic
            .write(register::SPURIOUS_VECTOR, 0x1ff, &mut apic.cpu);
        apic
    }

    fn x2apic() -> Self {
        Self::new(base::X2APIC)
    }

    fn write(&mut self, index: u32, value: u64) -> Result<Effect, Refused> {
        self.lapic.write_msr(index, value, &mut self.cpu)
    }

    fn set(&mut self, index: u32, value: u64) {
        self.write(index, value).unwrap();
    }

    fn read(&self, index: u32) -> Option<u64> {
        self.lapic.read_msr(index, self.cpu.cr8())
    }

    /// Waits until the timer has fired; how long that took.
    fn wait_for(&mut self, vector: u8) -> Duration {
        let start = irqchip::now();
        loop {
            self.lapic.settle_timer(&self.cpu);
            if self.lapic.pending(0) == Some(vector) {
                self.lapic.accept(vector);
                self.set(0x80b, 0);
                return Duration::from_nanos(irqchip::now() - start);
            }
            let at = self.lapic.alarm(&self.cpu).expect("the timer runs");
            let left = Duration::from_nanos(at.saturating_sub(irqchip::now()));
            assert!(left < Duration::from_secs(1), "{left:?}");
            std::thread::sleep(left);
        }
    }
}

#[test]
fn interrupts_to_oneself_are_taken_by_priority_until_their_end() {
    let mut apic = Apic::x2apic();
    for vector in [0x41, 0x62, 0x43] {
        apic.set(0x83f, vector);
    }
    assert_eq!(apic.lapic.pending(0), Some(0x62));
    assert_eq!(apic.lapic.pending(6), None, "CR8 holds it back");
    assert_eq!(apic.lapic.wants_cr8_below(6), Some(6));
    apic.lapic.accept(0x62);
    assert_eq!(apic.lapic.pending(0), None, "lower classes wait");
    assert_eq!(apic.lapic.wants_cr8_below(6), None, "and not for CR8 alone");
    assert_eq!(apic.read(0x80a), Some(0x60));
    let ended = Effect::Ended(Ended {
        vector: 0x62,
        level: false,
    });
    assert_eq!(apic.write(0x80b, 0), Ok(ended));
    assert_eq!(apic.lapic.pending(0), Some(0x43));
    apic.lapic.accept(0x43);
    apic.set(0x80b, 0);
    assert_eq!(apic.lapic.pending(0), Some(0x41));
}

#[test]
fn commands_to_others_are_messages_and_oneself_by_shorthand_is_reached_at_once() {
    let mut apic = Apic::x2apic();
    apic.set(0x830, 0x4_40aa);
    assert_eq!(apic.lapic.pending(0), Some(0xaa));
    assert_eq!(apic.read(0x830), Some(0x4_40aa));
    let send = |destination| {
        Ok(Effect::Send(Message {
            vector: 0xbb,
            delivery: Delivery::Fixed,
            destination,
            level: false,
            assert: true,
        }))
    };
    let command = 6 << 32 | 0x40bb;
    assert_eq!(apic.write(0x830, command), send(Destination::Physical(6)));
    let logical = command | 0x800;
    assert_eq!(apic.write(0x830, logical), send(Destination::Logical(6)));
    let others = 0xc_40bb;
    assert_eq!(apic.write(0x830, others), send(Destination::AllButMyself));
    assert_eq!(apic.write(0x830, 1 << 20), Err(Refused));
}

#[test]
fn level_triggered_interrupts_say_so_at_their_end() {
    let mut apic = Apic::x2apic();
    apic.inbox.put_interrupt(0x51, true);
    apic.inbox.ask(Ask::INTERRUPT);
    apic.lapic.collect();
    assert_eq!(apic.lapic.pending(0), Some(0x51));
    apic.lapic.accept(0x51);
    let level = Effect::Ended(Ended {
        vector: 0x51,
        level: true,
    });
    assert_eq!(apic.write(0x80b, 0), Ok(level));
    assert_eq!(apic.write(0x80b, 0), Ok(Effect::None), "nothing in service");
}

#[test]
fn the_task_priority_is_cr8() {
    let mut apic = Apic::x2apic();
    apic.set(0x808, 0x35);
    assert_eq!(apic.cpu.cr8(), 3);
    assert_eq!(apic.read(0x808), Some(0x35));
    apic.cpu.set_cr8(4);
    assert_eq!(apic.read(0x808), Some(0x45));
}

#[test]
fn the_id_is_shown_in_the_format_of_the_mode() {
    let mut apic = Apic::x2apic();
    assert_eq!(apic.read(0x802), Some(5));
    assert_eq!(apic.inbox.address().id, 5);
    apic.lapic.set_base(base::ENABLED);
    assert_eq!(apic.lapic.get(register::ID), 5 << 24);
    assert_eq!(apic.inbox.address().id, 5);
}

#[test]
fn registers_that_are_not_there_fault() {
    let mut apic = Apic::x2apic();
    assert_eq!(apic.read(0x80e), None, "no destination format");
    assert_eq!(apic.read(0x831), None);
    assert_eq!(apic.read(0x82f), None, "no local vector for machine checks");
    apic.lapic.set_machine_checks(true);
    assert_eq!(apic.read(0x82f), Some(1 << 16));
    assert_eq!(apic.read(0x803), Some(0x6_0014));
    for (index, value) in [(0x802, 0), (0x80b, 1), (0x83f, 0x100), (0x832, 1 << 32)] {
        assert_eq!(apic.write(index, value), Err(Refused), "{index:#x}");
    }
}

#[test]
fn the_page_takes_aligned_words_and_shows_smaller_parts() {
    let mut apic = Apic::new(0);
    apic.lapic
        .write_memory(0xd0, &0x0200_0000_u32.to_le_bytes(), &mut apic.cpu);
    assert_eq!(apic.inbox.address().logical, 2);
    assert_eq!(apic.lapic.read_memory(0xd3, 1, 0)[0], 2);
    assert_eq!(apic.lapic.read_memory(0xd2, 4, 0), [0; 4], "it straddles");
    apic.lapic.write_memory(0xd0, &[0; 2], &mut apic.cpu);
    apic.lapic.write_memory(0xd4, &[0; 4], &mut apic.cpu);
    assert_eq!(apic.inbox.address().logical, 2);
    let (high, low) = (3_u32 << 24, 0x40f0_u32);
    apic.lapic
        .write_memory(0x310, &high.to_le_bytes(), &mut apic.cpu);
    let effect = apic
        .lapic
        .write_memory(0x300, &low.to_le_bytes(), &mut apic.cpu);
    assert!(matches!(
        effect,
        Effect::Send(Message {
            destination: Destination::Physical(3),
            vector: 0xf0,
            ..
        })
    ));
}

#[test]
fn an_apic_that_is_off_takes_nothing_and_masks_its_local_vectors() {
    let mut apic = Apic::x2apic();
    apic.set(0x832, 0x40);
    assert!(apic.inbox.address().mode.contains(AddressMode::ENABLED));
    apic.set(0x80f, 0xff);
    assert!(!apic.inbox.address().mode.contains(AddressMode::ENABLED));
    assert_eq!(apic.read(0x832), Some(1 << 16 | 0x40));
    apic.set(0x83f, 0x55);
    assert_eq!(apic.lapic.pending(0), None);
    apic.set(0x832, 0x41);
    assert_eq!(apic.read(0x832), Some(1 << 16 | 0x41), "it stays masked");
}

#[test]
fn a_one_shot_timer_fires_once_after_its_count_times_its_divisor() {
    let mut apic = Apic::x2apic();
    apic.set(0x832, 0x40);
    apic.set(0x83e, 0b1000);
    // Divided by 32 at 1 GHz: 2 ms.
    apic.set(0x838, 62_500);
    let count = apic.read(0x839).unwrap();
    assert!((1..=62_500).contains(&count), "{count}");
    let took = apic.wait_for(0x40);
    assert!(took > Duration::from_micros(1500), "{took:?}");
    assert_eq!(apic.read(0x839), Some(0));
    assert_eq!(apic.lapic.alarm(&apic.cpu), None);
}

#[test]
fn a_new_divisor_changes_the_pace_of_what_is_left() {
    let mut apic = Apic::x2apic();
    apic.set(0x832, 0x40);
    apic.set(0x83e, 0b1011);
    apic.set(0x838, 1_000_000_000);
    let before = apic.lapic.alarm(&apic.cpu).unwrap();
    apic.set(0x83e, 0b0001);
    let after = apic.lapic.alarm(&apic.cpu).unwrap();
    let third = after - before;
    assert!((2_900_000_000..=3_000_000_000).contains(&third), "{third}");
}

#[test]
fn a_periodic_timer_fires_again_and_forgets_periods_that_nobody_saw() {
    let mut apic = Apic::x2apic();
    apic.set(0x832, 1 << 17 | 0x41);
    apic.set(0x83e, 0b1011);
    apic.set(0x838, 1_000_000);
    apic.wait_for(0x41);
    apic.wait_for(0x41);
    std::thread::sleep(Duration::from_millis(5));
    apic.wait_for(0x41);
    apic.lapic.settle_timer(&apic.cpu);
    let next = apic.lapic.alarm(&apic.cpu).unwrap();
    assert!(next > irqchip::now() - 1_000_000, "no periods are owed");
}

#[test]
fn a_deadline_is_a_time_of_the_guests_counter_and_is_gone_when_it_has_passed() {
    let mut apic = Apic::x2apic();
    apic.lapic.set_deadline(1, &apic.cpu);
    assert_eq!(apic.lapic.deadline(), 0, "not in another mode");
    apic.set(0x832, 2 << 17 | 0x42);
    let ticks = u64::from(crate::tsc::khz()) * 2;
    let deadline = apic.cpu.tsc() + ticks;
    apic.lapic.set_deadline(deadline, &apic.cpu);
    assert_eq!(apic.lapic.deadline(), deadline);
    apic.wait_for(0x42);
    assert!(apic.cpu.tsc() >= deadline);
    assert_eq!(apic.lapic.deadline(), 0);
    apic.lapic.set_deadline(1, &apic.cpu);
    assert_eq!(apic.lapic.pending(0), Some(0x42), "a time that has passed");
}

#[test]
fn switching_to_a_deadline_stops_the_count_and_a_masked_timer_wakes_nobody() {
    let mut apic = Apic::x2apic();
    apic.set(0x832, 0x40);
    apic.set(0x838, 1_000_000);
    apic.set(0x832, 2 << 17 | 0x40);
    assert_eq!(apic.read(0x838), Some(0));
    assert_eq!(apic.lapic.alarm(&apic.cpu), None);
    apic.set(0x832, 0x40);
    apic.set(0x838, 1_000_000);
    assert!(apic.lapic.alarm(&apic.cpu).is_some());
    apic.set(0x832, 1 << 16 | 0x40);
    assert_eq!(apic.lapic.alarm(&apic.cpu), None);
}

#[test]
fn what_get_shows_set_takes_and_the_count_goes_on() {
    let mut apic = Apic::x2apic();
    apic.set(0x832, 0x40);
    apic.set(0x83e, 0b1011);
    apic.set(0x838, 500_000_000);
    apic.set(0x83f, 0x77);
    apic.cpu.set_cr8(8);
    let shown = apic.lapic.state(8, true);
    let mut other = Apic::x2apic();
    assert_eq!(other.lapic.set_state(&shown, true), Ok(8));
    assert_eq!(other.lapic.pending(0), Some(0x77));
    let left = other.lapic.alarm(&other.cpu).unwrap() - irqchip::now();
    assert!((300_000_000..=500_000_000).contains(&left), "{left}");
    let again = other.lapic.state(8, true);
    assert_eq!(word(&again, 0x320), 0x40);
    assert_eq!(word(&again, 0x20), 5);
    let narrow = other.lapic.state(8, false);
    assert_eq!(word(&narrow, 0x20), 5 << 24);
    let mut foreign = shown;
    put(&mut foreign, 0x20, 6);
    assert_eq!(other.lapic.set_state(&foreign, true), Err(Refused));
    assert_eq!(other.lapic.set_state(&foreign, false), Ok(8));
    assert_eq!(other.read(0x802), Some(5));
}
