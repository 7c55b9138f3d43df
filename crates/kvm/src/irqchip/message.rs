//! What travels between interrupt controllers: one message on the APIC bus.
//!
//! An IPI, an IOAPIC pin and an MSI all become a [`Message`] (SDM 3A, 12.6.1 and 12.11).

use kvm_bindings::kvm_msi;

/// What the target does with the vector (the three bits 8 to 10 of ICR, MSI data, LVT and
/// redirection entries).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector is requested.
    Fixed,
    /// The same, at one of the targets.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Remote read on old hardware; KVM's "unhalt" of `KVM_HC_KICK_CPU`.
    RemoteRead,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    Startup,
    /// The vector comes from the 8259.
    ExtInt,
}

impl DeliveryMode {
    /// From the three bits, already shifted to bit 0.
    pub fn from_bits(bits: u32) -> DeliveryMode {
        match bits & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            3 => DeliveryMode::RemoteRead,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::Startup,
            _ => DeliveryMode::ExtInt,
        }
    }
}

/// How the destination is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationMode {
    /// An APIC ID.
    Physical,
    /// A set of bits to compare with each APIC's LDR.
    Logical,
}

/// Edge or level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The message is the event.
    Edge,
    /// The interrupt lasts until its EOI.
    Level,
}

/// Assert or de-assert; the second does nothing but for INIT, where it is ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// High.
    Assert,
    /// Low.
    Deassert,
}

/// A destination that needs no ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination field counts.
    None,
    /// The sender.
    Myself,
    /// Everyone.
    All,
    /// Everyone but the sender.
    AllButMyself,
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the manual's names")]
pub struct Message {
    pub vector: u8,
    pub delivery: DeliveryMode,
    pub mode: DestinationMode,
    pub level: Level,
    pub trigger: Trigger,
    pub shorthand: Shorthand,
    pub destination: u32,
    /// MSI's redirection hint: deliver to one of the targets, as lowest priority does.
    pub redirection_hint: bool,
}

fn trigger(level: bool) -> Trigger {
    if level { Trigger::Level } else { Trigger::Edge }
}

fn destination_mode(logical: bool) -> DestinationMode {
    if logical {
        DestinationMode::Logical
    } else {
        DestinationMode::Physical
    }
}

impl Message {
    /// A message that says only "this vector, to this one, physically, edge".
    pub fn fixed(vector: u8, destination: u32) -> Message {
        Message {
            vector,
            delivery: DeliveryMode::Fixed,
            mode: DestinationMode::Physical,
            level: Level::Assert,
            trigger: Trigger::Edge,
            shorthand: Shorthand::None,
            destination,
            redirection_hint: false,
        }
    }

    /// What a write of `icr` (its low half) sends to `destination`.
    pub fn from_icr(icr: u32, destination: u32) -> Message {
        Message {
            vector: icr as u8,
            delivery: DeliveryMode::from_bits(icr >> 8),
            mode: destination_mode(icr & (1 << 11) != 0),
            level: if icr & (1 << 14) != 0 {
                Level::Assert
            } else {
                Level::Deassert
            },
            trigger: trigger(icr & (1 << 15) != 0),
            shorthand: match (icr >> 18) & 3 {
                0 => Shorthand::None,
                1 => Shorthand::Myself,
                2 => Shorthand::All,
                _ => Shorthand::AllButMyself,
            },
            destination,
            redirection_hint: false,
        }
    }

    /// What an MSI says. With `ids` 32 bits wide, the upper address holds bits 8 to 31 of the
    /// destination (`KVM_X2APIC_API_USE_32BIT_IDS`).
    pub fn from_msi(msi: &Msi, ids: MsiIds) -> Message {
        let low = (msi.address_lo >> 12) & 0xff;
        Message {
            vector: msi.data as u8,
            delivery: DeliveryMode::from_bits(msi.data >> 8),
            mode: destination_mode(msi.address_lo & (1 << 2) != 0),
            level: Level::Assert,
            trigger: trigger(msi.data & (1 << 15) != 0),
            shorthand: Shorthand::None,
            destination: match ids {
                MsiIds::Eight => low,
                MsiIds::ThirtyTwo => low | (msi.address_hi & 0xffff_ff00),
            },
            redirection_hint: msi.address_lo & (1 << 3) != 0,
        }
    }

    /// What a redirection entry of the IOAPIC says.
    pub fn from_redirection(entry: u64) -> Message {
        Message {
            vector: entry as u8,
            delivery: DeliveryMode::from_bits((entry >> 8) as u32),
            mode: destination_mode(entry & (1 << 11) != 0),
            level: Level::Assert,
            trigger: trigger(entry & (1 << 15) != 0),
            shorthand: Shorthand::None,
            destination: (entry >> 56) as u32,
            redirection_hint: false,
        }
    }

    /// Whether only one of the targets gets it.
    pub fn is_lowest_priority(&self) -> bool {
        self.delivery == DeliveryMode::LowestPriority || self.redirection_hint
    }
}

/// How many bits of destination an MSI carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsiIds {
    /// The PCI format.
    Eight,
    /// With `KVM_X2APIC_API_USE_32BIT_IDS`.
    ThirtyTwo,
}

/// An MSI: address and data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Msi {
    pub address_lo: u32,
    pub address_hi: u32,
    pub data: u32,
}

impl Msi {
    /// Bits 0 to 7 of the upper address are reserved where it holds a part of the destination.
    pub fn is_valid(&self, ids: MsiIds) -> bool {
        ids == MsiIds::Eight || self.address_hi as u8 == 0
    }
}

impl From<&kvm_msi> for Msi {
    fn from(msi: &kvm_msi) -> Msi {
        Msi {
            address_lo: msi.address_lo,
            address_hi: msi.address_hi,
            data: msi.data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msi_with_32_bit_ids() {
        let msi = Msi {
            address_lo: 0xfeed_f00c,
            address_hi: 0x1234_5600,
            data: 0xc1a7,
        };
        let message = Message::from_msi(&msi, MsiIds::ThirtyTwo);
        assert_eq!(message.destination, 0x1234_56df);
        assert_eq!(message.vector, 0xa7);
        assert_eq!(message.delivery, DeliveryMode::LowestPriority);
        assert_eq!(message.mode, DestinationMode::Logical);
        assert_eq!(message.trigger, Trigger::Level);
        assert!(message.redirection_hint);
        assert_eq!(Message::from_msi(&msi, MsiIds::Eight).destination, 0xdf);
    }

    #[test]
    fn an_ipi_to_all_but_the_sender() {
        let message = Message::from_icr(0x000c_44fd, 7);
        assert_eq!(message.shorthand, Shorthand::AllButMyself);
        assert_eq!(message.delivery, DeliveryMode::Nmi);
        assert_eq!(message.level, Level::Assert);
    }
}
