//! The 8254 interval timer of a PC: three counters of 1.193182 MHz, of which the first interrupts,
//! the last makes the speaker sound and is read back at port 0x61 ("8254 Programmable Interval
//! Timer").
//!
//! Nothing counts: what a counter shows, and its output, follow from the time since it was loaded.

use kvm_bindings::{
    KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_channel_state, kvm_pit_state2,
};

/// Ticks of a second.
const FREQUENCY: u64 = 1_193_182;
const SECOND: u64 = 1_000_000_000;
/// Shortest period in nanoseconds of what interrupts, so that a guest cannot keep the host busy
/// (KVM's `min_timer_period_us`).
const SHORTEST_PERIOD: u64 = 200_000;

/// The ports: three counters and the command.
pub(super) const FIRST_PORT: u16 = 0x40;
const COMMAND_PORT: u16 = 0x43;
/// The gate of the last counter, the speaker, and their state.
pub(super) const SPEAKER_PORT: u16 = 0x61;

/// How a counter's 16 bits are read and written.
mod access {
    pub(super) const HIGH: u8 = 2;
    pub(super) const BOTH: u8 = 3;
    /// The state of a counter whose low byte is done.
    pub(super) const BOTH_HIGH: u8 = 4;
}

/// The timer.
#[derive(Clone, Debug)]
pub(super) struct Pit {
    channels: [kvm_pit_channel_state; 3],
    speaker_on: bool,
    /// The HPET takes the place of the first counter: it interrupts nobody.
    replaced: bool,
    /// Whether there is the port of the speaker.
    has_speaker: bool,
    /// When the first counter interrupts next, in nanoseconds.
    next: Option<u64>,
}

impl Pit {
    /// After reset, at `now` nanoseconds.
    pub(super) fn new(has_speaker: bool, now: u64) -> Self {
        let mut pit = Self {
            channels: std::array::from_fn(|index| kvm_pit_channel_state {
                mode: 0xff,
                gate: u8::from(index != 2),
                ..kvm_pit_channel_state::default()
            }),
            speaker_on: false,
            replaced: false,
            has_speaker,
            next: None,
        };
        for channel in &mut pit.channels {
            channel.count = 0x1_0000;
            channel.count_load_time = now as i64;
        }
        pit
    }

    /// What `KVM_GET_PIT2` shows.
    pub(super) fn state(&self) -> kvm_pit_state2 {
        let flag = |on, flag| if on { flag } else { 0 };
        kvm_pit_state2 {
            channels: self.channels,
            flags: flag(self.replaced, KVM_PIT_FLAGS_HPET_LEGACY)
                | flag(self.speaker_on, KVM_PIT_FLAGS_SPEAKER_DATA_ON),
            ..kvm_pit_state2::default()
        }
    }

    /// `KVM_SET_PIT2`: the first counter begins anew.
    pub(super) fn set_state(&mut self, state: &kvm_pit_state2, now: u64) {
        self.channels = state.channels;
        for channel in &mut self.channels {
            channel.count = match channel.count {
                count @ 1..=0x1_0000 => count,
                _ => 0x1_0000,
            };
        }
        self.replaced = state.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        self.speaker_on = state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
        self.channels[0].count_load_time = now as i64;
        self.start(now);
    }

    /// Whether a port is the timer's.
    pub(super) fn owns(&self, port: u16) -> bool {
        matches!(port, FIRST_PORT..=COMMAND_PORT) || self.has_speaker && port == SPEAKER_PORT
    }

    /// When the first counter interrupts next, in nanoseconds.
    pub(super) fn next(&self) -> Option<u64> {
        self.next
    }

    /// Whether the first counter has interrupted until `now`; periods that nobody was there for count
    /// once.
    pub(super) fn expire(&mut self, now: u64) -> bool {
        let Some(due) = self.next.filter(|due| *due <= now) else {
            return false;
        };
        let period = self.period();
        self.next = period.map(|period| due + ((now - due) / period + 1) * period);
        true
    }

    /// Nanoseconds between interrupts of the first counter, if its mode is periodic.
    fn period(&self) -> Option<u64> {
        let channel = &self.channels[0];
        matches!(channel.mode, 2 | 3)
            .then(|| (u64::from(channel.count) * SECOND / FREQUENCY).max(SHORTEST_PERIOD))
    }

    /// The first counter was loaded.
    fn start(&mut self, now: u64) {
        let channel = &self.channels[0];
        let wait = match channel.mode {
            _ if self.replaced => None,
            0 | 1 | 4 => Some(u64::from(channel.count) * SECOND / FREQUENCY),
            _ => self.period(),
        };
        self.next = wait.map(|wait| now + wait);
    }

    fn load(&mut self, index: usize, value: u32, now: u64) {
        let channel = &mut self.channels[index];
        channel.count = if value == 0 { 0x1_0000 } else { value };
        channel.count_load_time = now as i64;
        if index == 0 {
            self.start(now);
        }
    }

    /// A write of a port.
    pub(super) fn write(&mut self, port: u16, value: u8, now: u64) {
        match port {
            SPEAKER_PORT => {
                self.speaker_on = value & 2 != 0;
                self.set_gate(value & 1, now);
            }
            COMMAND_PORT => self.command(value, now),
            _ => self.write_counter(usize::from(port & 3), value, now),
        }
    }

    /// The gate of the last counter: a rising edge starts most modes again.
    fn set_gate(&mut self, gate: u8, now: u64) {
        let channel = &mut self.channels[2];
        if matches!(channel.mode, 1 | 2 | 3 | 5) && channel.gate < gate {
            channel.count_load_time = now as i64;
        }
        channel.gate = gate;
    }

    fn command(&mut self, value: u8, now: u64) {
        let index = usize::from(value >> 6);
        if index == 3 {
            // Read-back: which counters, and what of them not.
            for index in (0..3).filter(|index| value & 2 << index != 0) {
                if value & 0x20 == 0 {
                    self.latch_count(index, now);
                }
                if value & 0x10 == 0 {
                    self.latch_status(index, now);
                }
            }
            return;
        }
        let access = value >> 4 & 3;
        if access == 0 {
            self.latch_count(index, now);
            return;
        }
        let channel = &mut self.channels[index];
        channel.rw_mode = access;
        channel.read_state = access;
        channel.write_state = access;
        // Modes 2 and 3 have two numbers each.
        channel.mode = match value >> 1 & 7 {
            mode @ 0..=5 => mode,
            mode => mode - 4,
        };
        channel.bcd = value & 1;
        if index == 0 && channel.mode == 0xff {
            self.next = None;
        }
    }

    fn write_counter(&mut self, index: usize, value: u8, now: u64) {
        let channel = &mut self.channels[index];
        match channel.write_state {
            access::HIGH => self.load(index, u32::from(value) << 8, now),
            access::BOTH => {
                channel.write_latch = value;
                channel.write_state = access::BOTH_HIGH;
            }
            access::BOTH_HIGH => {
                channel.write_state = access::BOTH;
                let low = channel.write_latch;
                self.load(index, u32::from(value) << 8 | u32::from(low), now);
            }
            _ => self.load(index, value.into(), now),
        }
    }

    /// A read of a port.
    pub(super) fn read(&mut self, port: u16, now: u64) -> u8 {
        match port {
            SPEAKER_PORT => {
                // The refresh of memory toggles about every 15 µs.
                let refresh = (now >> 14 & 1) as u8;
                u8::from(self.speaker_on) << 1
                    | self.channels[2].gate & 1
                    | u8::from(self.output(2, now)) << 5
                    | refresh << 4
            }
            COMMAND_PORT => 0,
            _ => self.read_counter(usize::from(port & 3), now),
        }
    }

    fn read_counter(&mut self, index: usize, now: u64) -> u8 {
        let count = self.count(index, now);
        let channel = &mut self.channels[index];
        if channel.status_latched != 0 {
            channel.status_latched = 0;
            return channel.status;
        }
        let [low, high] = channel.latched_count.to_le_bytes();
        match channel.count_latched {
            0 => {}
            access::BOTH => {
                channel.count_latched = access::HIGH;
                return low;
            }
            state => {
                channel.count_latched = 0;
                return if state == access::HIGH { high } else { low };
            }
        }
        let [low, high] = count.to_le_bytes();
        match channel.read_state {
            access::HIGH => high,
            access::BOTH => {
                channel.read_state = access::BOTH_HIGH;
                low
            }
            access::BOTH_HIGH => {
                channel.read_state = access::BOTH;
                high
            }
            _ => low,
        }
    }

    fn latch_count(&mut self, index: usize, now: u64) {
        let count = self.count(index, now);
        let channel = &mut self.channels[index];
        if channel.count_latched == 0 {
            channel.latched_count = count;
            channel.count_latched = channel.rw_mode;
        }
    }

    fn latch_status(&mut self, index: usize, now: u64) {
        let output = self.output(index, now);
        let channel = &mut self.channels[index];
        if channel.status_latched == 0 {
            channel.status = u8::from(output) << 7
                | channel.rw_mode << 4
                | (channel.mode & 7) << 1
                | channel.bcd;
            channel.status_latched = 1;
        }
    }

    /// Ticks since a counter was loaded.
    fn ticks(&self, index: usize, now: u64) -> u64 {
        let elapsed = (now as i64).saturating_sub(self.channels[index].count_load_time);
        let ticks = u128::from(elapsed.max(0) as u64) * u128::from(FREQUENCY);
        u64::try_from(ticks / u128::from(SECOND)).unwrap_or(u64::MAX)
    }

    /// What a counter shows.
    fn count(&self, index: usize, now: u64) -> u16 {
        let channel = &self.channels[index];
        let (ticks, start) = (self.ticks(index, now), u64::from(channel.count.max(1)));
        let count = match channel.mode {
            2 => start - ticks % start,
            // It counts by two, twice for each period.
            3 => start - ticks.wrapping_mul(2) % start,
            _ => start.wrapping_sub(ticks),
        };
        count as u16
    }

    /// A counter's output.
    fn output(&self, index: usize, now: u64) -> bool {
        let channel = &self.channels[index];
        let (ticks, start) = (self.ticks(index, now), u64::from(channel.count.max(1)));
        match channel.mode {
            1 => ticks < start,
            2 => ticks % start == 0 && ticks != 0,
            3 => ticks % start < start.div_ceil(2),
            4 | 5 => ticks == start,
            _ => ticks >= start,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    /// Counter `index` in `mode`, loaded with `count` at time 0.
    fn pit(index: u8, mode: u8, count: u16) -> Pit {
        let mut pit = Pit::new(true, 0);
        pit.write(COMMAND_PORT, index << 6 | 0x30 | mode << 1, 0);
        for byte in count.to_le_bytes() {
            pit.write(FIRST_PORT + u16::from(index), byte, 0);
        }
        pit
    }

    fn read(pit: &mut Pit, index: u16, now: u64) -> u16 {
        let low = pit.read(FIRST_PORT + index, now);
        u16::from_le_bytes([low, pit.read(FIRST_PORT + index, now)])
    }

    #[test]
    fn a_rate_generator_interrupts_again_and_again() {
        let mut pit = pit(0, 2, 11_932);
        assert_eq!(pit.next(), Some(10_000_150));
        assert!(!pit.expire(9 * MILLISECOND));
        assert!(pit.expire(11 * MILLISECOND));
        assert!(!pit.expire(12 * MILLISECOND));
        assert!(pit.expire(61 * MILLISECOND), "six periods count once");
        assert!(!pit.expire(69 * MILLISECOND));
    }

    #[test]
    fn terminal_count_interrupts_once() {
        let mut pit = pit(0, 0, 1193);
        assert!(pit.expire(2 * MILLISECOND));
        assert_eq!(pit.next(), None);
        assert_eq!(read(&mut pit, 0, 0), 1193);
        assert_eq!(
            read(&mut pit, 0, 2 * MILLISECOND),
            1193_u16.wrapping_sub(2386)
        );
    }

    #[test]
    fn a_latched_count_is_read_before_the_current_one() {
        let mut pit = pit(2, 0, 50_000);
        pit.write(COMMAND_PORT, 0x80, MILLISECOND);
        assert_eq!(read(&mut pit, 2, 9 * MILLISECOND), 50_000 - 1193);
        assert_eq!(read(&mut pit, 2, 2 * MILLISECOND), 50_000 - 2386);
    }

    #[test]
    fn read_back_shows_mode_and_output() {
        let mut pit = pit(2, 0, 1193);
        let mut status = |now| {
            pit.write(COMMAND_PORT, 0xe8, now);
            pit.read(FIRST_PORT + 2, now)
        };
        assert_eq!(status(0), 0x30);
        assert_eq!(status(2 * MILLISECOND), 0xb0);
    }

    #[test]
    fn the_speakers_port_shows_the_last_counters_output_and_sets_its_gate() {
        let mut pit = pit(2, 1, 1193);
        pit.write(SPEAKER_PORT, 1, 5 * MILLISECOND);
        assert_eq!(pit.read(SPEAKER_PORT, 5 * MILLISECOND) & 0x23, 0x21);
        assert_eq!(pit.read(SPEAKER_PORT, 7 * MILLISECOND) & 0x23, 0x01);
        pit.write(SPEAKER_PORT, 2, 8 * MILLISECOND);
        assert_eq!(pit.read(SPEAKER_PORT, 8 * MILLISECOND) & 3, 2);
    }

    #[test]
    fn a_square_wave_is_high_for_half_its_period() {
        let mut pit = pit(2, 3, 2386);
        let mut output = |now| pit.read(SPEAKER_PORT, now) & 0x20 != 0;
        assert!(output(MILLISECOND / 2));
        assert!(!output(MILLISECOND * 3 / 2));
        assert!(output(MILLISECOND * 5 / 2));
        assert_eq!(pit.count(2, MILLISECOND / 2), 2386 - 2 * 596);
    }

    #[test]
    fn what_get_shows_set_takes() {
        let shown = pit(0, 2, 11_932).state();
        let mut other = Pit::new(false, 0);
        other.set_state(&shown, MILLISECOND);
        assert_eq!(other.next(), Some(11_000_150));
        assert_eq!(other.state().channels[0].mode, 2);
        assert!(!other.owns(SPEAKER_PORT) && other.owns(0x43));
        let mut replaced = shown;
        replaced.flags = KVM_PIT_FLAGS_HPET_LEGACY;
        other.set_state(&replaced, 0);
        assert_eq!(other.next(), None);
    }
}
