//! The I/O APIC: 24 pins, each with a redirection entry (82093AA datasheet).
//!
//! A pin's life, as kvm.ko has it:
//!
//! ```text
//!   edge:   line rises ─► IRR bit, message                (a second rise while the first is
//!           line falls ─► IRR bit clears                   undelivered is coalesced: answer 0)
//!   level:  line high  ─► IRR bit, message, remote IRR    (nothing more until the EOI)
//!           EOI        ─► remote IRR clears; still high? message again
//! ```
//!
//! Messages leave through [`Bus`], so the state machine is tested without APICs. The RTC's pin (8)
//! keeps account of who has not yet sent an EOI, because monitors want to know whether a tick was
//! coalesced (`KVM_IRQ_LINE_STATUS`).

use kvm_bindings::{kvm_ioapic_state, kvm_ioapic_state__bindgen_ty_1};

use super::delivery::{Delivered, Takers};
use super::lines::{Line, Source};
use super::message::{Level, Message};

/// Pins.
pub const PINS: usize = 24;
/// Where its registers are after reset, and how many bytes.
pub const BASE: u64 = 0xfec0_0000;
/// Bytes of registers.
pub const LENGTH: u64 = 0x100;

const RTC_PIN: u8 = 8;
const VERSION: u32 = 0x11;
const REG_SELECT: u32 = 0x00;
const REG_WINDOW: u32 = 0x10;
/// EOIs in a row that find the line still high, before the next one must wait.
const STORM: u32 = 10_000;

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const DELIVERY_STATUS: u64 = 1 << 12;
const READ_ONLY: u64 = REMOTE_IRR | DELIVERY_STATUS;

/// What the IOAPIC needs from the machine.
pub trait Bus {
    /// Sends a message to the local APICs; notes who took it, if asked.
    fn deliver(&self, message: &Message, takers: Option<&mut Takers>) -> Delivered;
    /// Level-triggered pin `pin` was unmasked while its line seemed high: asks those who drive it
    /// to say so again (irqfd resampling). `false` where nobody can be asked.
    fn resample(&self, pin: u8) -> bool;
    /// Whether any APIC in the message's targets still has its vector requested or in service:
    /// those that do, by ID.
    fn pending_at(&self, message: &Message) -> Takers;
}

/// Whether the caller of an edge wants to know if the RTC's tick was coalesced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineStatus {
    /// `KVM_IRQ_LINE_STATUS`.
    Wanted,
    /// `KVM_IRQ_LINE` and everything else.
    Ignored,
}

/// What a write of a redirection entry changed for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// A redirection entry was written: local APICs must ask again which EOIs count.
    pub entry: Option<u8>,
    /// The entry's mask has changed to this.
    pub mask: Option<bool>,
}

/// Whether an EOI found the line high too often in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EoiOutcome {
    /// Done.
    Done,
    /// Call [`Ioapic::reinject`] in about 10 ms.
    Storm,
}

/// The state machine.
#[derive(Clone, Debug)]
pub struct Ioapic {
    base: u64,
    select: u32,
    id: u32,
    irr: u32,
    /// Edge interrupts in `irr` that have left already.
    delivered: u32,
    padding: u32,
    entries: [u64; PINS],
    lines: [Line; PINS],
    eois_in_a_row: [u32; PINS],
    /// Who took the RTC's last tick and owes an EOI.
    rtc_takers: Takers,
    /// How many owe one: more than the takers where the tick is no plain interrupt.
    rtc_owed: Delivered,
}

impl Default for Ioapic {
    fn default() -> Ioapic {
        Ioapic {
            base: BASE,
            select: 0,
            id: 0,
            irr: 0,
            delivered: 0,
            padding: 0,
            entries: [MASKED; PINS],
            lines: [Line::default(); PINS],
            eois_in_a_row: [0; PINS],
            rtc_takers: Takers::default(),
            rtc_owed: 0,
        }
    }
}

impl Ioapic {
    /// Where its registers are. `KVM_SET_IRQCHIP` can move them; the bus does not follow, so
    /// accesses outside fall through to the monitor.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The redirection entry of a pin.
    pub fn entry(&self, pin: u8) -> u64 {
        self.entries[usize::from(pin)]
    }

    /// Whether the pin is level-triggered.
    pub fn is_level(&self, pin: u8) -> bool {
        self.entry(pin) & LEVEL != 0
    }

    /// The vector of a pin.
    pub fn vector(&self, pin: u8) -> u8 {
        self.entry(pin) as u8
    }

    /// Drives a line from one source.
    pub fn set_line(
        &mut self,
        pin: u8,
        source: Source,
        level: Level,
        status: LineStatus,
        bus: &dyn Bus,
    ) -> Delivered {
        let level = self.lines[usize::from(pin)].drive(source, level);
        self.set_pin(pin, level, status, bus)
    }

    /// A source is gone from all lines.
    pub fn release(&mut self, source: Source) {
        self.lines.iter_mut().for_each(|line| line.release(source));
    }

    fn set_pin(&mut self, pin: u8, level: Level, status: LineStatus, bus: &dyn Bus) -> Delivered {
        let bit = 1 << pin;
        if level == Level::Deassert {
            self.irr &= !bit;
            return 1;
        }
        if pin == RTC_PIN && status == LineStatus::Wanted && self.rtc_owed > 0 {
            return 0;
        }
        let was_high = self.irr & bit != 0;
        self.irr |= bit;
        if !self.is_level(pin) {
            self.delivered &= !bit;
            if was_high {
                return 0;
            }
        }
        self.service(pin, status, bus)
    }

    /// Sends what the pin's entry says.
    fn service(&mut self, pin: u8, status: LineStatus, bus: &dyn Bus) -> Delivered {
        let entry = self.entry(pin);
        if entry & MASKED != 0 || entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR {
            return -1;
        }
        if entry & LEVEL == 0 {
            self.delivered |= 1 << pin;
        }
        let message = Message::from_redirection(entry);
        let result = if pin == RTC_PIN && status == LineStatus::Wanted {
            let result = bus.deliver(&message, Some(&mut self.rtc_takers));
            self.rtc_owed = result.max(0);
            result
        } else {
            bus.deliver(&message, None)
        };
        if result != 0 && entry & LEVEL != 0 {
            self.entries[usize::from(pin)] |= REMOTE_IRR;
        }
        result
    }

    /// An EOI of the RTC's interrupt from the APIC `id`.
    pub fn rtc_eoi(&mut self, id: u32, vector: u8) {
        let before = self.rtc_takers.0.len();
        self.rtc_takers.0.retain(|taker| *taker != (id, vector));
        self.rtc_owed -= (before - self.rtc_takers.0.len()) as Delivered;
    }

    /// The RTC's vectors that wait for an EOI of the APIC `id`.
    pub fn rtc_vector(&self, id: u32) -> Option<u8> {
        self.rtc_takers
            .0
            .iter()
            .find(|taker| taker.0 == id)
            .map(|taker| taker.1)
    }

    /// A local APIC's state was replaced: who still owes an EOI for the RTC?
    pub fn restore_rtc(&mut self, bus: &dyn Bus) {
        self.rtc_takers = bus.pending_at(&Message::from_redirection(self.entry(RTC_PIN)));
        self.rtc_owed = self.rtc_takers.0.len() as Delivered;
    }

    /// An EOI of level-triggered pin `pin`.
    pub fn eoi(&mut self, pin: u8, bus: &dyn Bus) -> EoiOutcome {
        let at = usize::from(pin);
        self.entries[at] &= !REMOTE_IRR;
        if self.entries[at] & MASKED != 0 || self.irr & (1 << pin) == 0 {
            self.eois_in_a_row[at] = 0;
            return EoiOutcome::Done;
        }
        self.eois_in_a_row[at] += 1;
        if self.eois_in_a_row[at] == STORM {
            // A guest that does not quiet its device would never get on otherwise.
            self.eois_in_a_row[at] = 0;
            return EoiOutcome::Storm;
        }
        self.service(pin, LineStatus::Ignored, bus);
        EoiOutcome::Done
    }

    /// Sends again whatever is level-triggered, high and not in service.
    pub fn reinject(&mut self, bus: &dyn Bus) {
        for pin in 0..PINS as u8 {
            let waits = self.irr & (1 << pin) != 0 && self.entry(pin) & REMOTE_IRR == 0;
            if self.is_level(pin) && waits {
                self.service(pin, LineStatus::Ignored, bus);
            }
        }
    }

    /// Reads the register at `offset`.
    pub fn read(&self, offset: u32) -> u32 {
        match offset & 0xff {
            REG_SELECT => self.select,
            REG_WINDOW => self.read_selected(),
            _ => 0,
        }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            1 => ((PINS as u32 - 1) << 16) | VERSION,
            0 | 2 => (self.id & 0xf) << 24,
            select => {
                let pin = (select.wrapping_sub(0x10) >> 1) as usize;
                let entry = self.entries.get(pin).copied().unwrap_or(u64::MAX);
                if select & 1 != 0 {
                    (entry >> 32) as u32
                } else {
                    entry as u32
                }
            }
        }
    }

    /// Writes the register at `offset`.
    pub fn write(&mut self, offset: u32, value: u32, bus: &dyn Bus) -> Written {
        match offset & 0xff {
            REG_SELECT => {
                self.select = value & 0xff;
                Written::default()
            }
            REG_WINDOW => self.write_selected(value, bus),
            _ => Written::default(),
        }
    }

    fn write_selected(&mut self, value: u32, bus: &dyn Bus) -> Written {
        match self.select {
            0 => {
                self.id = (value >> 24) & 0xf;
                Written::default()
            }
            1 | 2 => Written::default(),
            select => match u8::try_from(select.wrapping_sub(0x10) >> 1) {
                Ok(pin) if usize::from(pin) < PINS => self.write_entry(pin, value, bus),
                _ => Written::default(),
            },
        }
    }

    fn write_entry(&mut self, pin: u8, value: u32, bus: &dyn Bus) -> Written {
        let old = self.entry(pin);
        let new = if self.select & 1 != 0 {
            (old & 0xffff_ffff) | (u64::from(value) << 32)
        } else {
            (old & !0xffff_ffff) | u64::from(value)
        };
        let mut entry = (new & !READ_ONLY) | (old & READ_ONLY);
        if entry & LEVEL == 0 {
            // Systems without an EOI register at the IOAPIC make an EOI this way.
            entry &= !REMOTE_IRR;
        }
        self.entries[usize::from(pin)] = entry;
        let high = self.irr & (1 << pin) != 0;
        if high && entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL {
            self.service_unmasked(pin, bus);
        }
        let mask_changed = (old ^ entry) & MASKED != 0;
        Written {
            entry: Some(pin),
            mask: mask_changed.then_some(entry & MASKED != 0),
        }
    }

    /// The line may have fallen while the pin was masked: whoever can be asked is asked, instead
    /// of sending an interrupt that nobody wants any more.
    fn service_unmasked(&mut self, pin: u8, bus: &dyn Bus) {
        if bus.resample(pin) {
            self.irr &= !(1 << pin);
        } else {
            self.service(pin, LineStatus::Ignored, bus);
        }
    }

    /// `KVM_GET_IRQCHIP`.
    pub fn state(&self) -> kvm_ioapic_state {
        let mut state = kvm_ioapic_state {
            base_address: self.base,
            ioregsel: self.select,
            id: self.id,
            irr: self.irr & !self.delivered,
            pad: self.padding,
            ..kvm_ioapic_state::default()
        };
        for (slot, entry) in state.redirtbl.iter_mut().zip(self.entries) {
            *slot = kvm_ioapic_state__bindgen_ty_1 { bits: entry };
        }
        state
    }

    /// `KVM_SET_IRQCHIP`: lines that are high are raised again.
    #[expect(unsafe_code, reason = "the entry is a C union")]
    pub fn set_state(&mut self, state: &kvm_ioapic_state, bus: &dyn Bus) {
        self.base = state.base_address;
        self.select = state.ioregsel;
        self.id = state.id;
        self.padding = state.pad;
        for (entry, slot) in self.entries.iter_mut().zip(&state.redirtbl) {
            // SAFETY: both variants of the union are 8 bytes of plain integers.
            *entry = unsafe { slot.bits };
        }
        self.irr = 0;
        self.delivered = 0;
        self.rtc_takers = Takers::default();
        self.rtc_owed = 0;
        for pin in (0..PINS as u8).filter(|pin| state.irr & (1 << pin) != 0) {
            self.set_pin(pin, Level::Assert, LineStatus::Wanted, bus);
        }
        self.restore_rtc(bus);
    }
}
