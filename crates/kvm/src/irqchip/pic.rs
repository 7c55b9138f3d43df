//! The two 8259A interrupt controllers and the ELCR (Intel 8259A datasheet; PIIX for the ELCR).
//!
//! The state is `struct kvm_pic_state` itself, because the API reads and writes it whole. Pins 0 to
//! 7 are the master's, 8 to 15 the slave's, which hangs on the master's pin 2.
//!
//! An operation that ends an interrupt has two halves: first the registers change, then whoever
//! waits for the end is told, and may lower its line; only then [`Pic::update`] looks for the next
//! interrupt. Otherwise a line that falls at its EOI would be seen once too often. So operations
//! answer [`Done`], and the caller does the rest.

use kvm_bindings::kvm_pic_state;

use super::lines::{Line, Source};
use super::message::Level;

/// Pins of both chips.
pub const PINS: usize = 16;
const CASCADE: u8 = 2;
const SPURIOUS: u8 = 7;

/// What an operation leaves to its caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Done {
    /// Pins whose interrupt has ended, by bit.
    pub ended: u16,
    /// Call [`Pic::update`].
    pub update: bool,
    /// Pins whose mask has changed, by bit.
    pub mask_changed: u16,
}

impl Done {
    const UPDATE: Done = Done {
        ended: 0,
        update: true,
        mask_changed: 0,
    };
}

/// Which of the two chips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chip {
    /// Ports 0x20, 0x21.
    Master,
    /// Ports 0xa0, 0xa1.
    Slave,
}

/// Both chips.
#[derive(Clone, Debug)]
pub struct Pic {
    chips: [kvm_pic_state; 2],
    lines: [Line; PINS],
    output: bool,
}

impl Default for Pic {
    fn default() -> Pic {
        let chip = |elcr_mask| kvm_pic_state {
            elcr_mask,
            ..kvm_pic_state::default()
        };
        Pic {
            chips: [chip(0xf8), chip(0xde)],
            lines: Default::default(),
            output: false,
        }
    }
}

/// Drives a pin; answers as `KVM_IRQ_LINE_STATUS` does: -1 masked, 0 coalesced, 1 delivered.
fn set_pin(chip: &mut kvm_pic_state, pin: u8, level: Level) -> i32 {
    let bit = 1 << pin;
    let mut result = 1;
    match level {
        Level::Assert => {
            if chip.elcr & bit != 0 || chip.last_irr & bit == 0 {
                result = i32::from(chip.irr & bit == 0);
                chip.irr |= bit;
            }
            chip.last_irr |= bit;
        }
        Level::Deassert => {
            chip.last_irr &= !bit;
            if chip.elcr & bit != 0 {
                chip.irr &= !bit;
            }
        }
    }
    if chip.imr & bit != 0 { -1 } else { result }
}

/// The priority (0 is the highest) of the best pin in `pins`; 8 where there is none.
fn priority(chip: &kvm_pic_state, pins: u8) -> u8 {
    (0..8)
        .find(|at| pins & (1 << pin_at(chip, *at)) != 0)
        .unwrap_or(8)
}

fn pin_at(chip: &kvm_pic_state, priority: u8) -> u8 {
    priority.wrapping_add(chip.priority_add) & 7
}

impl Pic {
    fn index(chip: Chip) -> usize {
        match chip {
            Chip::Master => 0,
            Chip::Slave => 1,
        }
    }

    /// Whether INTR to the CPU is high.
    pub fn output(&self) -> bool {
        self.output
    }

    /// `KVM_GET_IRQCHIP`.
    pub fn state(&self, chip: Chip) -> kvm_pic_state {
        self.chips[Self::index(chip)]
    }

    /// `KVM_SET_IRQCHIP`.
    pub fn set_state(&mut self, chip: Chip, state: &kvm_pic_state) -> Done {
        self.chips[Self::index(chip)] = *state;
        Done::UPDATE
    }

    /// Drives a line from one source.
    pub fn set_line(&mut self, pin: u8, source: Source, level: Level) -> i32 {
        let level = self.lines[usize::from(pin)].drive(source, level);
        let result = set_pin(&mut self.chips[usize::from(pin >> 3)], pin & 7, level);
        self.update();
        result
    }

    /// A source is gone from all lines.
    pub fn release(&mut self, source: Source) {
        self.lines.iter_mut().for_each(|line| line.release(source));
    }

    /// The pin whose interrupt the chip wants served next.
    fn wanted(&self, chip: Chip) -> Option<u8> {
        let state = &self.chips[Self::index(chip)];
        let best = priority(state, state.irr & !state.imr);
        let mut in_service = state.isr;
        if state.special_fully_nested_mode != 0 && chip == Chip::Master {
            // The slave may interrupt its own service routine.
            in_service &= !(1 << CASCADE);
        }
        (best < priority(state, in_service)).then(|| pin_at(state, best))
    }

    /// Looks for the next interrupt, and drives INTR.
    pub fn update(&mut self) {
        if self.wanted(Chip::Slave).is_some() {
            set_pin(&mut self.chips[0], CASCADE, Level::Assert);
            set_pin(&mut self.chips[0], CASCADE, Level::Deassert);
        }
        self.output = self.wanted(Chip::Master).is_some();
    }

    fn end(&mut self, chip: Chip, pin: u8) -> u16 {
        self.chips[Self::index(chip)].isr &= !(1 << pin);
        match chip {
            Chip::Master => 1 << pin,
            Chip::Slave => 1 << (pin + 8),
        }
    }

    fn serve(&mut self, chip: Chip, pin: u8) -> u16 {
        let state = &mut self.chips[Self::index(chip)];
        state.isr |= 1 << pin;
        if state.elcr & (1 << pin) == 0 {
            state.irr &= !(1 << pin);
        }
        if state.auto_eoi == 0 {
            return 0;
        }
        if state.rotate_on_auto_eoi != 0 {
            state.priority_add = (pin + 1) & 7;
        }
        self.end(chip, pin)
    }

    /// The acknowledge cycle: the vector for the CPU.
    pub fn acknowledge(&mut self) -> (u8, Done) {
        self.output = false;
        let Some(pin) = self.wanted(Chip::Master) else {
            return (self.chips[0].irq_base.wrapping_add(SPURIOUS), Done::UPDATE);
        };
        let mut ended = self.serve(Chip::Master, pin);
        let mut vector = self.chips[0].irq_base.wrapping_add(pin);
        if pin == CASCADE {
            let slave_pin = self.wanted(Chip::Slave);
            ended |= slave_pin.map_or(0, |pin| self.serve(Chip::Slave, pin));
            vector = self.chips[1]
                .irq_base
                .wrapping_add(slave_pin.unwrap_or(SPURIOUS));
        }
        (
            vector,
            Done {
                ended,
                ..Done::UPDATE
            },
        )
    }

    /// Reads a port of a chip: `data_port` tells 0x21 and 0xa1 from 0x20 and 0xa0.
    pub fn read(&mut self, chip: Chip, port: Port) -> (u8, Done) {
        let state = &mut self.chips[Self::index(chip)];
        if state.poll != 0 {
            let answer = self.poll(chip);
            self.chips[Self::index(chip)].poll = 0;
            return answer;
        }
        let value = match port {
            Port::Data => state.imr,
            Port::Command if state.read_reg_select != 0 => state.isr,
            Port::Command => state.irr,
        };
        (value, Done::default())
    }

    fn poll(&mut self, chip: Chip) -> (u8, Done) {
        let Some(pin) = self.wanted(chip) else {
            return (SPURIOUS, Done::UPDATE);
        };
        if chip == Chip::Slave {
            self.chips[0].isr &= !(1 << CASCADE);
            self.chips[0].irr &= !(1 << CASCADE);
        }
        self.chips[Self::index(chip)].irr &= !(1 << pin);
        let ended = self.end(chip, pin);
        let update = chip == Chip::Slave || pin != CASCADE;
        (
            pin | 0x80,
            Done {
                ended,
                update,
                mask_changed: 0,
            },
        )
    }

    /// Writes a port of a chip. `listened` tells whether any CPU hears this controller.
    pub fn write(&mut self, chip: Chip, port: Port, value: u8, listened: Listened) -> Done {
        match port {
            Port::Data => self.write_data(chip, value),
            Port::Command if value & 0x10 != 0 => self.initialise(chip, value, listened),
            Port::Command if value & 0x08 != 0 => {
                self.write_ocw3(chip, value);
                Done::default()
            }
            Port::Command => self.write_ocw2(chip, value),
        }
    }

    /// ICW1.
    fn initialise(&mut self, chip: Chip, value: u8, listened: Listened) -> Done {
        let state = &mut self.chips[Self::index(chip)];
        let edges = state.irr & !state.elcr;
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
        let mut done = Done::default();
        if listened == Listened::Yes {
            for pin in (0..8).filter(|pin| edges & (1 << pin) != 0) {
                done.ended |= self.end(chip, pin);
            }
        }
        done
    }

    fn write_ocw3(&mut self, chip: Chip, value: u8) {
        let state = &mut self.chips[Self::index(chip)];
        if value & 0x04 != 0 {
            state.poll = 1;
        }
        if value & 0x02 != 0 {
            state.read_reg_select = value & 1;
        }
        if value & 0x40 != 0 {
            state.special_mask = (value >> 5) & 1;
        }
    }

    /// End of interrupt, and rotation of priorities.
    fn write_ocw2(&mut self, chip: Chip, value: u8) -> Done {
        let state = &mut self.chips[Self::index(chip)];
        let (command, named) = (value >> 5, value & 7);
        match command {
            0 | 4 => {
                state.rotate_on_auto_eoi = command >> 2;
                Done::default()
            }
            1 | 5 => {
                let best = priority(state, state.isr);
                if best == 8 {
                    return Done::default();
                }
                let pin = pin_at(state, best);
                if command == 5 {
                    state.priority_add = (pin + 1) & 7;
                }
                Done {
                    ended: self.end(chip, pin),
                    ..Done::UPDATE
                }
            }
            3 => Done {
                ended: self.end(chip, named),
                ..Done::UPDATE
            },
            6 => {
                state.priority_add = (named + 1) & 7;
                Done::UPDATE
            }
            7 => {
                state.priority_add = (named + 1) & 7;
                Done {
                    ended: self.end(chip, named),
                    ..Done::UPDATE
                }
            }
            _ => Done::default(),
        }
    }

    fn write_data(&mut self, chip: Chip, value: u8) -> Done {
        let state = &mut self.chips[Self::index(chip)];
        match state.init_state {
            0 => {
                let changed = u16::from(state.imr ^ value);
                state.imr = value;
                let shift = if chip == Chip::Slave { 8 } else { 0 };
                return Done {
                    mask_changed: changed << shift,
                    ..Done::UPDATE
                };
            }
            1 => {
                state.irq_base = value & 0xf8;
                state.init_state = 2;
            }
            2 => state.init_state = if state.init4 != 0 { 3 } else { 0 },
            3 => {
                state.special_fully_nested_mode = (value >> 4) & 1;
                state.auto_eoi = (value >> 1) & 1;
                state.init_state = 0;
            }
            _ => {}
        }
        Done::default()
    }

    /// Whether a pin is masked.
    pub fn is_masked(&self, pin: u8) -> bool {
        self.chips[usize::from(pin >> 3)].imr & (1 << (pin & 7)) != 0
    }

    /// Reads the ELCR: which pins are level-triggered.
    pub fn elcr(&self, chip: Chip) -> u8 {
        self.chips[Self::index(chip)].elcr
    }

    /// Writes the ELCR.
    pub fn set_elcr(&mut self, chip: Chip, value: u8) {
        let state = &mut self.chips[Self::index(chip)];
        state.elcr = value & state.elcr_mask;
    }
}

/// The two ports of a chip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// 0x20, 0xa0.
    Command,
    /// 0x21, 0xa1.
    Data,
}

/// Whether any CPU hears this controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listened {
    /// LINT0 of some local APIC is open for it.
    Yes,
    /// All of them are closed.
    No,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A controller as the BIOS and Linux set it up: vectors 0x30 and 0x38, all pins open.
    fn ready(icw4: u8) -> Pic {
        let mut pic = Pic::default();
        for (chip, base, cascade) in [(Chip::Master, 0x30, 4), (Chip::Slave, 0x38, 2)] {
            write(&mut pic, chip, Port::Command, 0x11);
            for value in [base, cascade, icw4, 0] {
                write(&mut pic, chip, Port::Data, value);
            }
        }
        pic
    }

    fn write(pic: &mut Pic, chip: Chip, port: Port, value: u8) -> u16 {
        let done = pic.write(chip, port, value, Listened::Yes);
        if done.update {
            pic.update();
        }
        done.ended
    }

    fn take(pic: &mut Pic) -> u8 {
        let (vector, done) = pic.acknowledge();
        if done.update {
            pic.update();
        }
        vector
    }

    fn raise(pic: &mut Pic, pin: u8) -> i32 {
        pic.set_line(pin, Source::Userspace, Level::Assert)
    }

    fn lower(pic: &mut Pic, pin: u8) {
        pic.set_line(pin, Source::Userspace, Level::Deassert);
    }

    #[test]
    fn the_slave_comes_through_pin_2() {
        let mut pic = ready(1);
        assert_eq!(raise(&mut pic, 12), 1);
        assert!(pic.output());
        assert_eq!(take(&mut pic), 0x3c);
        assert_eq!(
            (pic.state(Chip::Master).isr, pic.state(Chip::Slave).isr),
            (4, 0x10)
        );
        assert_eq!(write(&mut pic, Chip::Slave, Port::Command, 0x20), 1 << 12);
        assert_eq!(write(&mut pic, Chip::Master, Port::Command, 0x20), 1 << 2);
    }

    #[test]
    fn a_lower_pin_interrupts_a_higher_one_and_not_the_reverse() {
        let mut pic = ready(1);
        raise(&mut pic, 4);
        assert_eq!(take(&mut pic), 0x34);
        raise(&mut pic, 5);
        assert!(!pic.output());
        raise(&mut pic, 1);
        assert_eq!(take(&mut pic), 0x31);
    }

    #[test]
    fn edges_are_coalesced_and_levels_stay() {
        let mut pic = ready(1);
        assert_eq!(raise(&mut pic, 5), 1);
        lower(&mut pic, 5);
        assert_eq!(raise(&mut pic, 5), 0);
        pic.set_elcr(Chip::Master, 0xff);
        assert_eq!(
            pic.elcr(Chip::Master),
            0xf8,
            "pins 0 to 2 are edges, always"
        );
        raise(&mut pic, 6);
        take(&mut pic);
        take(&mut pic);
        assert_ne!(
            pic.state(Chip::Master).irr & 0x40,
            0,
            "a level stays requested"
        );
        lower(&mut pic, 6);
        assert_eq!(pic.state(Chip::Master).irr & 0x40, 0);
    }

    #[test]
    fn nothing_there_is_spurious() {
        let mut pic = ready(1);
        assert_eq!(take(&mut pic), 0x37);
        assert_eq!(pic.state(Chip::Master).isr, 0);
    }

    #[test]
    fn masked_pins_wait() {
        let mut pic = ready(1);
        let done = pic.write(Chip::Master, Port::Data, 0x08, Listened::Yes);
        assert_eq!(done.mask_changed, 0x08);
        assert_eq!(raise(&mut pic, 3), -1);
        assert!(!pic.output());
        write(&mut pic, Chip::Master, Port::Data, 0);
        assert_eq!(take(&mut pic), 0x33);
    }

    #[test]
    fn automatic_eoi_rotates_where_told() {
        let mut pic = ready(3);
        write(&mut pic, Chip::Master, Port::Command, 0x80);
        raise(&mut pic, 3);
        take(&mut pic);
        assert_eq!(pic.state(Chip::Master).isr, 0);
        raise(&mut pic, 1);
        raise(&mut pic, 4);
        assert_eq!(take(&mut pic), 0x34, "after 3, the highest priority is 4");
    }

    #[test]
    fn polling_ends_the_interrupt() {
        let mut pic = ready(1);
        write(&mut pic, Chip::Slave, Port::Command, 0x0c);
        let (value, done) = pic.read(Chip::Slave, Port::Command);
        assert_eq!((value, done.ended), (0x07, 0));
        raise(&mut pic, 9);
        write(&mut pic, Chip::Slave, Port::Command, 0x0c);
        let (value, done) = pic.read(Chip::Slave, Port::Command);
        assert_eq!((value, done.ended), (0x81, 1 << 9));
    }

    #[test]
    fn special_fully_nested_mode_lets_the_slave_nest() {
        let mut pic = ready(0x11);
        raise(&mut pic, 12);
        assert_eq!(take(&mut pic), 0x3c);
        raise(&mut pic, 8);
        assert_eq!(take(&mut pic), 0x38);
    }

    #[test]
    fn initialisation_ends_pending_edges() {
        let mut pic = ready(1);
        raise(&mut pic, 5);
        let done = pic.write(Chip::Master, Port::Command, 0x11, Listened::Yes);
        assert_eq!(done.ended, 1 << 5);
        assert_eq!(pic.state(Chip::Master).irr, 0);
    }
}
