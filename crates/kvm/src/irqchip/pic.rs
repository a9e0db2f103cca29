//! The pair of 8259A interrupt controllers of a PC: two times eight lines, the second behind line 2 of
//! the first ("8259A Programmable Interrupt Controller", and the edge and level registers of the PIIX).

use kvm_bindings::kvm_pic_state;

/// The line of the first controller that the second is connected to.
const CASCADE: u8 = 2;
/// The line that a controller answers with when its interrupt has gone before it was acknowledged.
const SPURIOUS: u8 = 7;
/// Priorities, from 0: one more means "nothing".
const NO_PRIORITY: u8 = 8;
/// Lines that may be level-triggered: not the timer, the keyboard, the cascade, the clock and the
/// coprocessor.
const LEVEL_LINES: [u8; 2] = [0xf8, 0xde];

/// Commands, in bits 7:5 of OCW2.
mod command {
    pub(super) const ROTATE_AT_AUTO_END_OFF: u8 = 0;
    pub(super) const END: u8 = 1;
    pub(super) const END_LINE: u8 = 3;
    pub(super) const ROTATE_AT_AUTO_END_ON: u8 = 4;
    pub(super) const END_AND_ROTATE: u8 = 5;
    pub(super) const SET_PRIORITY: u8 = 6;
    pub(super) const END_LINE_AND_ROTATE: u8 = 7;
}

/// One controller. Its fields are those that `KVM_GET_IRQCHIP` shows.
#[derive(Clone, Copy, Debug)]
struct Chip {
    state: kvm_pic_state,
    is_second: bool,
}

/// The pair.
#[derive(Debug)]
pub(super) struct Pics {
    chips: [Chip; 2],
    /// Lines whose interrupts have ended since [`Pics::take_ended`].
    ended: u16,
}

impl Default for Pics {
    fn default() -> Self {
        let chip = |is_second: bool| Chip {
            state: kvm_pic_state {
                elcr_mask: LEVEL_LINES[usize::from(is_second)],
                ..kvm_pic_state::default()
            },
            is_second,
        };
        Self {
            chips: [chip(false), chip(true)],
            ended: 0,
        }
    }
}

impl Chip {
    /// Sets a line. Whether that is a new request; `None` if the line is masked.
    fn set_line(&mut self, line: u8, level: bool) -> Option<bool> {
        let (state, mask) = (&mut self.state, 1 << line);
        let mut new = false;
        if level {
            if state.elcr & mask != 0 || state.last_irr & mask == 0 {
                new = state.irr & mask == 0;
                state.irr |= mask;
            }
            state.last_irr |= mask;
        } else {
            if state.elcr & mask != 0 {
                state.irr &= !mask;
            }
            state.last_irr &= !mask;
        }
        (state.imr & mask == 0).then_some(new)
    }

    /// The highest priority among lines: 0 to 7, or [`NO_PRIORITY`].
    fn priority(&self, lines: u8) -> u8 {
        let first = u32::from(self.state.priority_add & 7);
        lines.rotate_right(first).trailing_zeros() as u8
    }

    fn line_of(&self, priority: u8) -> u8 {
        priority.wrapping_add(self.state.priority_add) & 7
    }

    /// The line that interrupts: of those that ask the one with the highest priority, if that is
    /// above what is in service.
    fn pending(&self) -> Option<u8> {
        let state = &self.state;
        let asked = self.priority(state.irr & !state.imr);
        let mut service = state.isr;
        if state.special_mask != 0 {
            service &= !state.imr;
        }
        if state.special_fully_nested_mode != 0 && !self.is_second {
            service &= !(1 << CASCADE);
        }
        (asked < self.priority(service)).then(|| self.line_of(asked))
    }

    /// The processor takes the interrupt of a line. Whether it has ended by that.
    fn acknowledge(&mut self, line: u8) -> bool {
        let state = &mut self.state;
        let mask = 1 << line;
        state.isr |= mask;
        if state.elcr & mask == 0 {
            state.irr &= !mask;
        }
        let ends = state.auto_eoi != 0;
        if ends {
            if state.rotate_on_auto_eoi != 0 {
                state.priority_add = (line + 1) & 7;
            }
            state.isr &= !mask;
        }
        ends
    }

    /// OCW2. The line whose interrupt has ended.
    fn command(&mut self, value: u8) -> Option<u8> {
        let named = value & 7;
        let end = |chip: &mut Self, line: u8| {
            chip.state.isr &= !(1 << line);
            line
        };
        match value >> 5 {
            command @ (command::ROTATE_AT_AUTO_END_OFF | command::ROTATE_AT_AUTO_END_ON) => {
                self.state.rotate_on_auto_eoi = u8::from(command == command::ROTATE_AT_AUTO_END_ON);
                None
            }
            command @ (command::END | command::END_AND_ROTATE) => {
                let priority = self.priority(self.state.isr);
                if priority == NO_PRIORITY {
                    return None;
                }
                let line = self.line_of(priority);
                if command == command::END_AND_ROTATE {
                    self.state.priority_add = (line + 1) & 7;
                }
                Some(end(self, line))
            }
            command::END_LINE => Some(end(self, named)),
            command::SET_PRIORITY => {
                self.state.priority_add = (named + 1) & 7;
                None
            }
            command::END_LINE_AND_ROTATE => {
                self.state.priority_add = (named + 1) & 7;
                Some(end(self, named))
            }
            _ => None,
        }
    }

    /// ICW1: the controller expects its other words, and forgets edges and masks.
    fn initialize(&mut self, value: u8) {
        let state = &mut self.state;
        state.init4 = value & 1;
        state.last_irr = 0;
        state.irr &= state.elcr;
        state.imr = 0;
        state.priority_add = 0;
        state.special_mask = 0;
        state.read_reg_select = 0;
        if state.init4 == 0 {
            state.special_fully_nested_mode = 0;
            state.auto_eoi = 0;
        }
        state.init_state = 1;
    }

    /// A write of the first port. The line whose interrupt has ended.
    fn write_command(&mut self, value: u8) -> Option<u8> {
        let state = &mut self.state;
        if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 8 != 0 {
            state.poll = u8::from(value & 4 != 0);
            if value & 2 != 0 {
                state.read_reg_select = value & 1;
            }
            if value & 0x40 != 0 {
                state.special_mask = value >> 5 & 1;
            }
        } else {
            return self.command(value);
        }
        None
    }

    /// A write of the second port: the mask, or the rest of an initialisation.
    fn write_data(&mut self, value: u8) {
        let state = &mut self.state;
        match state.init_state {
            1 => {
                state.irq_base = value & 0xf8;
                state.init_state = 2;
            }
            2 => state.init_state = if state.init4 != 0 { 3 } else { 0 },
            3 => {
                state.special_fully_nested_mode = value >> 4 & 1;
                state.auto_eoi = value >> 1 & 1;
                state.init_state = 0;
            }
            _ => state.imr = value,
        }
    }
}

impl Pics {
    /// What `KVM_GET_IRQCHIP` shows of the first or the second controller.
    pub(super) fn state(&self, second: bool) -> kvm_pic_state {
        self.chips[usize::from(second)].state
    }

    /// `KVM_SET_IRQCHIP`
    pub(super) fn set_state(&mut self, second: bool, state: &kvm_pic_state) {
        self.chips[usize::from(second)].state = kvm_pic_state {
            priority_add: state.priority_add & 7,
            ..*state
        };
        self.update();
    }

    /// Sets one of the 16 lines. Whether that is a new request; `None` if the line is masked.
    pub(super) fn set_line(&mut self, line: u8, level: bool) -> Option<bool> {
        let chip = &mut self.chips[usize::from(line >> 3 & 1)];
        let result = chip.set_line(line & 7, level);
        self.update();
        result
    }

    /// Brings the second controller's output to the first.
    fn update(&mut self) {
        let [first, second] = &mut self.chips;
        if second.pending().is_some() {
            first.set_line(CASCADE, true);
            first.set_line(CASCADE, false);
        }
    }

    /// Whether the processor should acknowledge an interrupt.
    pub(super) fn output(&self) -> bool {
        self.chips[0].pending().is_some()
    }

    /// The processor acknowledges an interrupt: its vector.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let [first, second] = &mut self.chips;
        let vector = match first.pending() {
            Some(CASCADE) => {
                let line = second.pending().inspect(|line| {
                    if second.acknowledge(*line) {
                        self.ended |= 1 << (line + 8);
                    }
                });
                first.acknowledge(CASCADE);
                second.state.irq_base.wrapping_add(line.unwrap_or(SPURIOUS))
            }
            Some(line) => {
                if first.acknowledge(line) {
                    self.ended |= 1 << line;
                }
                first.state.irq_base.wrapping_add(line)
            }
            None => first.state.irq_base.wrapping_add(SPURIOUS),
        };
        self.update();
        vector
    }

    /// A write of a port of the controllers.
    pub(super) fn write(&mut self, port: u16, value: u8) {
        let second = matches!(port, 0xa0 | 0xa1 | 0x4d1);
        let chip = &mut self.chips[usize::from(second)];
        match port {
            0x20 | 0xa0 => {
                if let Some(line) = chip.write_command(value) {
                    self.ended |= 1 << (line + if second { 8 } else { 0 });
                }
            }
            0x21 | 0xa1 => chip.write_data(value),
            _ => chip.state.elcr = value & chip.state.elcr_mask,
        }
        self.update();
    }

    /// A read of a port of the controllers.
    pub(super) fn read(&mut self, port: u16) -> u8 {
        let second = matches!(port, 0xa0 | 0xa1 | 0x4d1);
        let chip = &mut self.chips[usize::from(second)];
        match port {
            0x4d0 | 0x4d1 => chip.state.elcr,
            _ if chip.state.poll != 0 => {
                chip.state.poll = 0;
                self.poll(second)
            }
            0x21 | 0xa1 => chip.state.imr,
            _ if chip.state.read_reg_select != 0 => chip.state.isr,
            _ => chip.state.irr,
        }
    }

    /// A poll acknowledges and ends an interrupt at once.
    fn poll(&mut self, second: bool) -> u8 {
        let [first, other] = &mut self.chips;
        let chip = if second { other } else { &mut *first };
        let Some(line) = chip.pending() else {
            self.update();
            return SPURIOUS;
        };
        chip.state.irr &= !(1 << line);
        chip.state.isr &= !(1 << line);
        if second {
            first.state.irr &= !(1 << CASCADE);
            first.state.isr &= !(1 << CASCADE);
        }
        self.ended |= 1 << (line + if second { 8 } else { 0 });
        self.update();
        line
    }

    /// Takes the lines whose interrupts have ended, as bits.
    pub(super) fn take_ended(&mut self) -> u16 {
        std::mem::take(&mut self.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialised as PCs are: vectors from 0x20 and 0x28, nothing masked.
    fn pics() -> Pics {
        let mut pics = Pics::default();
        for (command, data, vector, cascade) in [(0x20, 0x21, 0x20, 4), (0xa0, 0xa1, 0x28, 2)] {
            pics.write(command, 0x11);
            pics.write(data, vector);
            pics.write(data, cascade);
            pics.write(data, 1);
        }
        pics
    }

    #[test]
    fn the_lowest_line_comes_first_and_others_wait_for_its_end() {
        let mut pics = pics();
        pics.set_line(4, true);
        pics.set_line(1, true);
        assert_eq!(pics.acknowledge(), 0x21);
        assert!(!pics.output(), "line 4 is below what is in service");
        pics.write(0x20, 0x20);
        assert_eq!(pics.take_ended(), 1 << 1);
        assert!(pics.output());
        assert_eq!(pics.acknowledge(), 0x24);
        pics.set_line(1, false);
        pics.set_line(1, true);
        assert_eq!(pics.acknowledge(), 0x21, "a higher line interrupts it");
    }

    #[test]
    fn an_edge_asks_once_and_a_level_as_long_as_it_is_there() {
        let mut pics = pics();
        pics.set_line(3, true);
        pics.set_line(3, true);
        assert_eq!(pics.acknowledge(), 0x23);
        pics.write(0x20, 0x63);
        assert!(!pics.output());
        pics.write(0x4d0, 0xff);
        assert_eq!(pics.read(0x4d0), 0xf8, "some lines are edges by nature");
        pics.set_line(5, true);
        assert_eq!(pics.acknowledge(), 0x25);
        pics.write(0x20, 0x65);
        assert!(pics.output());
        pics.set_line(5, false);
        assert!(!pics.output());
    }

    #[test]
    fn the_second_controller_comes_through_line_2_of_the_first() {
        let mut pics = pics();
        pics.set_line(12, true);
        assert!(pics.output());
        assert_eq!(pics.acknowledge(), 0x2c);
        assert_eq!((pics.state(false).isr, pics.state(true).isr), (4, 0x10));
        pics.set_line(9, true);
        assert!(!pics.output(), "line 2 is in service");
        pics.write(0xa0, 0x20);
        pics.write(0x20, 0x20);
        assert_eq!(pics.take_ended(), 1 << 12 | 1 << 2);
        assert_eq!(pics.acknowledge(), 0x29);
    }

    #[test]
    fn the_nested_mode_lets_the_second_controller_interrupt_itself() {
        let mut pics = pics();
        pics.write(0x20, 0x11);
        for value in [0x20, 4, 0x11] {
            pics.write(0x21, value);
        }
        pics.set_line(12, true);
        pics.acknowledge();
        pics.set_line(9, true);
        assert_eq!(pics.acknowledge(), 0x29);
    }

    #[test]
    fn masked_lines_wait_and_an_interrupt_that_went_is_spurious() {
        let mut pics = pics();
        pics.write(0x21, 1 << 6);
        assert_eq!(pics.set_line(6, true), None);
        assert!(!pics.output());
        assert_eq!(pics.acknowledge(), 0x27);
        pics.write(0x21, 0);
        assert_eq!(pics.acknowledge(), 0x26);
    }

    #[test]
    fn interrupts_end_by_themselves_and_rotate_if_told_to() {
        let mut pics = pics();
        pics.write(0x20, 0x11);
        for value in [0x20, 4, 3] {
            pics.write(0x21, value);
        }
        pics.write(0x20, 0x80);
        pics.set_line(0, true);
        pics.set_line(1, true);
        assert_eq!(pics.acknowledge(), 0x20);
        assert_eq!(pics.take_ended(), 1);
        pics.set_line(0, false);
        pics.set_line(0, true);
        assert_eq!(pics.acknowledge(), 0x21, "line 0 has become the last");
    }

    #[test]
    fn a_poll_takes_and_ends_an_interrupt() {
        let mut pics = pics();
        pics.set_line(4, true);
        pics.write(0x20, 0x0c);
        assert_eq!(pics.read(0x20), 4);
        assert!(!pics.output());
        pics.write(0x20, 0x0b);
        assert_eq!(pics.read(0x20), 0, "nothing is in service");
    }
}
