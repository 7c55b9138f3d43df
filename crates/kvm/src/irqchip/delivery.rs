//! How a message finds its local APICs (SDM 3A, 12.6.2).
//!
//! [`ApicBus`] holds every local APIC of the VM and a [`Map`] from addresses to them, both published
//! for readers without a lock: an IPI is two pointer loads, an index, and an atomic OR in the
//! target. The map exists only while addresses are unambiguous; where two APICs share one, every
//! APIC is asked instead, which is slower and always right. Both ways are kvm.ko's, quirks included.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};

use super::apic::Lapic;
use super::apic::registers::{DFR_CLUSTER, DFR_FLAT, reg};
use super::map::Map;
use super::message::{DeliveryMode, DestinationMode, Message, Shorthand};
use super::policy::Policy;

/// The physical broadcast of xAPIC mode.
pub(super) const XAPIC_BROADCAST: u32 = 0xff;
/// The broadcast of x2APIC mode.
pub(super) const X2APIC_BROADCAST: u32 = 0xffff_ffff;

/// Who took a message, and as which vector: the IOAPIC's account of the RTC's interrupt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Takers(pub Vec<(u32, u8)>);

/// How many APICs took a message; negative where nobody was addressed (KVM's convention, which
/// reaches the API through `KVM_IRQ_LINE_STATUS` and `KVM_SIGNAL_MSI`).
pub type Delivered = i32;

/// The local APICs of a VM.
pub struct ApicBus {
    policy: Arc<Policy>,
    apics: ArcSwap<Vec<Arc<Lapic>>>,
    map: ArcSwapOption<Map>,
    stale: AtomicBool,
    rebuilding: Mutex<()>,
}

impl ApicBus {
    /// A bus without APICs.
    pub fn new(policy: Arc<Policy>) -> ApicBus {
        ApicBus {
            policy,
            apics: ArcSwap::default(),
            map: ArcSwapOption::empty(),
            stale: AtomicBool::new(true),
            rebuilding: Mutex::new(()),
        }
    }

    /// All APICs, in the order of their vCPUs' creation.
    pub fn apics(&self) -> Arc<Vec<Arc<Lapic>>> {
        self.apics.load_full()
    }

    /// Calls `visit` for every APIC, without touching a reference count.
    pub fn for_each(&self, mut visit: impl FnMut(&Arc<Lapic>)) {
        for lapic in self.apics.load().iter() {
            visit(lapic);
        }
    }

    /// Adds the APIC of a new vCPU.
    pub fn add(&self, lapic: &Arc<Lapic>) {
        self.apics.rcu(|apics| {
            let mut apics = Vec::clone(apics);
            apics.push(Arc::clone(lapic));
            apics
        });
        self.addressing_changed();
    }

    /// Removes the APIC of a vCPU whose creation failed later on.
    pub fn remove(&self, id: u32) {
        self.apics.rcu(|apics| {
            apics
                .iter()
                .filter(|lapic| lapic.id() != id)
                .cloned()
                .collect::<Vec<_>>()
        });
        self.addressing_changed();
    }

    /// An ID, a mode or an enable bit has changed: builds the map anew.
    pub fn addressing_changed(&self) {
        self.stale.store(true, Ordering::SeqCst);
        let _one = self
            .rebuilding
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Whoever comes second finds the work done, and what it changed included.
        while self.stale.swap(false, Ordering::SeqCst) {
            let apics = self.apics.load();
            self.map
                .store(Map::build(&apics, self.policy.has_32bit_ids()).map(Arc::new));
        }
        for lapic in self.apics.load().iter() {
            lapic.invalidate_eoi_interest();
        }
    }

    /// The APIC with this physical address, where addresses are unambiguous.
    pub fn at_physical(&self, id: u32) -> Option<Arc<Lapic>> {
        self.map.load().as_ref()?.physical(id).cloned()
    }

    /// Delivers a message to the APICs at the physical addresses `first` + n, for every bit n in
    /// `set`. `None` where addresses are ambiguous.
    pub fn deliver_to_set(&self, first: u32, set: u64, message: &Message) -> Option<Delivered> {
        let map = self.map.load();
        let map = map.as_ref()?;
        let members = (0..64).filter(|n| set & (1 << n) != 0);
        let found = members.filter_map(|n| map.physical(first.checked_add(n)?));
        Some(
            found
                .map(|lapic| Delivered::from(lapic.accept(message)))
                .sum(),
        )
    }

    /// Delivers a message. `source` is the sender of an IPI, `None` for a device's message.
    pub fn deliver(&self, source: Option<&Lapic>, message: &Message) -> Delivered {
        self.deliver_noting(source, message, None)
    }

    /// The same, and notes who took it.
    pub fn deliver_noting(
        &self,
        source: Option<&Lapic>,
        message: &Message,
        mut takers: Option<&mut Takers>,
    ) -> Delivered {
        let mut accept = |lapic: &Lapic, message: &Message| -> Delivered {
            if !lapic.accept(message) {
                return 0;
            }
            let is_vector = matches!(
                message.delivery,
                DeliveryMode::Fixed | DeliveryMode::LowestPriority
            );
            if let Some(Takers(list)) = takers.as_deref_mut().filter(|_| is_vector) {
                list.push((lapic.id(), message.vector));
            }
            1
        };
        if message.shorthand == Shorthand::Myself {
            return source.map_or(0, |lapic| accept(lapic, message));
        }
        if message.shorthand == Shorthand::None
            && let Some(map) = &*self.map.load()
            && !self.is_broadcast(source, message, map)
            && let Some(targets) = map.targets(message)
        {
            return targets.map(|lapic| accept(lapic, message)).sum();
        }
        self.ask_everyone(source, message, &mut accept)
    }

    fn is_broadcast(&self, source: Option<&Lapic>, message: &Message, map: &Map) -> bool {
        if self.policy.has_broadcast_quirk() {
            let x2apic = source.is_some_and(Lapic::is_x2apic);
            message.destination
                == if x2apic {
                    X2APIC_BROADCAST
                } else {
                    XAPIC_BROADCAST
                }
        } else {
            message.destination == X2APIC_BROADCAST
                || (message.destination == XAPIC_BROADCAST && !map.is_x2apic())
        }
    }

    fn ask_everyone(
        &self,
        source: Option<&Lapic>,
        message: &Message,
        accept: &mut dyn FnMut(&Lapic, &Message) -> Delivered,
    ) -> Delivered {
        let mut message = *message;
        if message.mode == DestinationMode::Physical
            && message.destination == XAPIC_BROADCAST
            && message.is_lowest_priority()
        {
            // A broadcast has no lowest priority. (The redirection hint of an MSI still has.)
            message.delivery = DeliveryMode::Fixed;
        }
        let apics = self.apics.load();
        let matching = apics
            .iter()
            .filter(|lapic| lapic.is_hardware_enabled() && self.matches(lapic, source, &message));
        if message.is_lowest_priority() {
            let candidates: Vec<_> = matching
                .filter(|lapic| lapic.is_software_enabled())
                .collect();
            return match candidates.len() {
                0 => -1,
                n => accept(candidates[usize::from(message.vector) % n], &message),
            };
        }
        matching.fold(-1, |sum, lapic| sum.max(0) + accept(lapic, &message))
    }

    /// Whether the APIC is among the message's targets, whatever else may be.
    pub fn matches(&self, target: &Lapic, source: Option<&Lapic>, message: &Message) -> bool {
        let is_source = source.is_some_and(|source| std::ptr::eq(source, target));
        match message.shorthand {
            Shorthand::Myself => is_source,
            Shorthand::All => true,
            Shorthand::AllButMyself => !is_source,
            Shorthand::None => {
                let address = self.translate(target, source, message.destination);
                match message.mode {
                    DestinationMode::Physical => matches_physical(target, address),
                    DestinationMode::Logical => matches_logical(target, address),
                }
            }
        }
    }

    /// A device's broadcast reaches x2APIC targets, too, unless the monitor declined that.
    fn translate(&self, target: &Lapic, source: Option<&Lapic>, destination: u32) -> u32 {
        let widen = self.policy.has_broadcast_quirk()
            && source.is_none()
            && destination == XAPIC_BROADCAST
            && target.is_x2apic();
        if widen { X2APIC_BROADCAST } else { destination }
    }
}

fn is_broadcast_for(target: &Lapic, address: u32) -> bool {
    address
        == if target.is_x2apic() {
            X2APIC_BROADCAST
        } else {
            XAPIC_BROADCAST
        }
}

fn matches_physical(target: &Lapic, address: u32) -> bool {
    // An ID that does not fit xAPIC mode reaches an APIC in xAPIC mode, too: a hot-plugged vCPU
    // starts in that mode.
    is_broadcast_for(target, address)
        || if target.is_x2apic() || address > 0xff {
            address == target.id()
        } else {
            address == target.xapic_id()
        }
}

fn matches_logical(target: &Lapic, address: u32) -> bool {
    if is_broadcast_for(target, address) {
        return true;
    }
    let ldr = target.register(reg::LDR);
    if target.is_x2apic() {
        return ldr >> 16 == address >> 16 && ldr & address & 0xffff != 0;
    }
    let id = ldr >> 24;
    match target.register(reg::DFR) {
        DFR_FLAT => id & address != 0,
        DFR_CLUSTER => id >> 4 == address >> 4 && id & address & 0xf != 0,
        _ => false,
    }
}
