//! The GSI routing table (api.rst, 4.52): which pin of which controller, or which MSI, a GSI means.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MSI_VALID_DEVID, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};

use crate::errno::Errno;

use super::message::{Msi, MsiIds};
use super::policy::{ChipMode, Policy};
use super::{ioapic, pic};

/// The most GSIs that there can be (`KVM_CAP_IRQ_ROUTING`).
pub const MAX_ROUTES: usize = 4096;

/// One end of a GSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A pin of the two 8259s, 0 to 15.
    Pic(u8),
    /// A pin of the IOAPIC.
    Ioapic(u8),
    /// A message.
    Msi(Msi),
}

/// A pin that can have a GSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// Of the two 8259s, 0 to 15.
    Pic(u8),
    /// Of the IOAPIC.
    Ioapic(u8),
}

/// The table. Immutable: `KVM_SET_GSI_ROUTING` publishes another one.
#[derive(Clone, Debug)]
pub struct Routes {
    /// By GSI, in the order in which the entries were given.
    gsis: Vec<Vec<Route>>,
    pic_gsis: [Option<u32>; pic::PINS],
    ioapic_gsis: [Option<u32>; ioapic::PINS],
}

impl Default for Routes {
    fn default() -> Routes {
        Routes::with_gsis(1)
    }
}

impl Routes {
    fn with_gsis(count: usize) -> Routes {
        Routes {
            gsis: vec![Vec::new(); count],
            pic_gsis: [None; pic::PINS],
            ioapic_gsis: [None; ioapic::PINS],
        }
    }

    /// The table after `KVM_CREATE_IRQCHIP`: GSI n is pin n, of the IOAPIC and, below 16, of the
    /// 8259s as well.
    pub fn standard() -> Routes {
        let mut routes = Routes::with_gsis(ioapic::PINS);
        for pin in 0..ioapic::PINS as u8 {
            routes.insert(u32::from(pin), Route::Ioapic(pin));
            if usize::from(pin) < pic::PINS {
                routes.insert(u32::from(pin), Route::Pic(pin));
            }
        }
        routes
    }

    fn insert(&mut self, gsi: u32, route: Route) {
        match route {
            Route::Pic(pin) => self.pic_gsis[usize::from(pin)] = Some(gsi),
            Route::Ioapic(pin) => self.ioapic_gsis[usize::from(pin)] = Some(gsi),
            Route::Msi(_) => {}
        }
        self.gsis[gsi as usize].push(route);
    }

    /// The table of `KVM_SET_GSI_ROUTING`.
    pub fn new(entries: &[kvm_irq_routing_entry], policy: &Policy) -> Result<Routes, Errno> {
        if entries.len() > MAX_ROUTES || entries.iter().any(|e| e.gsi as usize >= MAX_ROUTES) {
            return Err(Errno::EINVAL);
        }
        let highest = entries.iter().map(|entry| entry.gsi).max().unwrap_or(0);
        let mut routes = Routes::with_gsis(highest as usize + 1);
        for entry in entries {
            let route = parse(entry, policy)?;
            if !routes.admits(entry.gsi, route) {
                return Err(Errno::EINVAL);
            }
            routes.insert(entry.gsi, route);
        }
        Ok(routes)
    }

    /// A GSI leads to one message, or to one pin of each chip.
    fn admits(&self, gsi: u32, new: Route) -> bool {
        self.of(gsi)
            .iter()
            .all(|old| match (chip(*old), chip(new)) {
                (Some(old), Some(new)) => old != new,
                _ => false,
            })
    }

    /// Where a GSI leads.
    pub fn of(&self, gsi: u32) -> &[Route] {
        self.gsis.get(gsi as usize).map_or(&[], Vec::as_slice)
    }

    /// The GSI of a pin: the last one that was routed to it.
    pub fn gsi(&self, pin: Pin) -> Option<u32> {
        match pin {
            Pin::Pic(pin) => self.pic_gsis[usize::from(pin)],
            Pin::Ioapic(pin) => self.ioapic_gsis[usize::from(pin)],
        }
    }

    /// The messages of the GSIs below `count`.
    pub fn messages_below(&self, count: usize) -> impl Iterator<Item = Msi> {
        self.gsis
            .iter()
            .take(count)
            .flatten()
            .filter_map(|route| match route {
                Route::Msi(msi) => Some(*msi),
                _ => None,
            })
    }
}

/// The three chips: master, slave, IOAPIC.
fn chip(route: Route) -> Option<u8> {
    match route {
        Route::Pic(pin) => Some(pin >> 3),
        Route::Ioapic(_) => Some(2),
        Route::Msi(_) => None,
    }
}

fn parse(entry: &kvm_irq_routing_entry, policy: &Policy) -> Result<Route, Errno> {
    let allowed = if entry.type_ == KVM_IRQ_ROUTING_MSI {
        KVM_MSI_VALID_DEVID
    } else {
        0
    };
    if entry.flags & !allowed != 0 {
        return Err(Errno::EINVAL);
    }
    match entry.type_ {
        KVM_IRQ_ROUTING_IRQCHIP if policy.mode() != ChipMode::Split => parse_pin(irqchip(entry)),
        KVM_IRQ_ROUTING_MSI => parse_msi(msi(entry), policy.msi_ids()),
        _ => Err(Errno::EINVAL),
    }
}

#[expect(unsafe_code, reason = "the entry is a C union")]
fn irqchip(entry: &kvm_irq_routing_entry) -> kvm_irq_routing_irqchip {
    // SAFETY: every variant of the union is plain integers, and the type says which it is.
    unsafe { entry.u.irqchip }
}

#[expect(unsafe_code, reason = "the entry is a C union")]
fn msi(entry: &kvm_irq_routing_entry) -> kvm_irq_routing_msi {
    // SAFETY: as above.
    unsafe { entry.u.msi }
}

fn parse_pin(named: kvm_irq_routing_irqchip) -> Result<Route, Errno> {
    let pin = u8::try_from(named.pin).map_err(|_| Errno::EINVAL)?;
    match named.irqchip {
        KVM_IRQCHIP_PIC_MASTER if pin < 8 => Ok(Route::Pic(pin)),
        KVM_IRQCHIP_PIC_SLAVE if pin < 8 => Ok(Route::Pic(pin + 8)),
        KVM_IRQCHIP_IOAPIC if usize::from(pin) < ioapic::PINS => Ok(Route::Ioapic(pin)),
        _ => Err(Errno::EINVAL),
    }
}

fn parse_msi(named: kvm_irq_routing_msi, ids: MsiIds) -> Result<Route, Errno> {
    let msi = Msi {
        address_lo: named.address_lo,
        address_hi: named.address_hi,
        data: named.data,
    };
    if msi.is_valid(ids) {
        Ok(Route::Msi(msi))
    } else {
        Err(Errno::EINVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_irq_routing_entry__bindgen_ty_1 as Target;

    fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
        let u = Target {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        };
        kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u,
            ..Default::default()
        }
    }

    fn message(gsi: u32, address_hi: u32) -> kvm_irq_routing_entry {
        let u = Target {
            msi: kvm_irq_routing_msi {
                address_hi,
                ..Default::default()
            },
        };
        kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u,
            ..Default::default()
        }
    }

    fn build(entries: &[kvm_irq_routing_entry]) -> Result<Routes, Errno> {
        let policy = Policy::default();
        policy.set_mode(ChipMode::Kernel);
        Routes::new(entries, &policy)
    }

    #[test]
    fn the_standard_table() {
        let routes = Routes::standard();
        assert_eq!(routes.of(9), [Route::Ioapic(9), Route::Pic(9)]);
        assert_eq!(routes.of(20), [Route::Ioapic(20)]);
        assert_eq!(routes.of(24), []);
        assert_eq!(routes.gsi(Pin::Pic(15)), Some(15));
    }

    #[test]
    fn what_a_gsi_can_mean() {
        assert!(build(&[pin(5, 0, 5), pin(5, 2, 7)]).is_ok());
        assert!(
            build(&[pin(5, 2, 5), pin(5, 2, 7)]).is_err(),
            "one pin a chip"
        );
        assert!(
            build(&[pin(5, 2, 5), message(5, 0)]).is_err(),
            "a pin or a message"
        );
        assert!(
            build(&[message(5, 0), message(5, 0)]).is_err(),
            "one message"
        );
        for (chip, beyond) in [(0, 8), (1, 8), (2, 24), (3, 0)] {
            assert!(build(&[pin(0, chip, beyond)]).is_err(), "chip {chip}");
        }
        assert!(build(&[message(4095, 0)]).is_ok());
        assert!(build(&[message(4096, 0)]).is_err());
    }

    #[test]
    fn flags_and_reserved_bits() {
        let flagged = |mut entry: kvm_irq_routing_entry, flags| {
            entry.flags = flags;
            build(&[entry]).is_ok()
        };
        assert!(flagged(message(1, 0), KVM_MSI_VALID_DEVID));
        assert!(!flagged(message(1, 0), 2));
        assert!(!flagged(pin(1, 0, 1), KVM_MSI_VALID_DEVID));
        let policy = Policy::default();
        policy.enable_x2apic_api(1).unwrap();
        assert!(Routes::new(&[message(1, 1)], &policy).is_err());
        policy.set_mode(ChipMode::Split);
        assert!(
            Routes::new(&[pin(1, 2, 1)], &policy).is_err(),
            "the monitor has the chips"
        );
    }
}
