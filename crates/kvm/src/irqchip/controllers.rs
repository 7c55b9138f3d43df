//! All interrupt controllers of a VM, wired together.
//!
//! ```text
//!  GSI ──routes──┬─► Pic ───── INTR ─────► LINT0 of whichever local APIC listens
//!                ├─► Ioapic ── message ─┐
//!                └─► Msi ───── message ─┴► ApicBus ─► Lapic (IRR, wake)
//!
//!  EOI (vCPU) ─► Lapic ─► Ioapic or Pic ─► AckNotifier (PIT, irqfd resampling) ─► GSI again
//! ```
//!
//! Lock order: the IOAPIC's and the 8259s' mutexes are leaves. No notifier runs under them, since a
//! notifier drives lines. The path of an IPI and of an MSI takes neither.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::ArcSwap;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MSI_VALID_DEVID,
    kvm_irq_routing_entry, kvm_irqchip, kvm_msi,
};

use crate::errno::Errno;

use super::apic::{Effects, EndOfInterrupt, Lapic};
use super::delivery::{ApicBus, Delivered, Takers};
use super::ioapic::{self, EoiOutcome, Ioapic, LineStatus};
use super::lines::Source;
use super::message::{Level, Message, Msi, Trigger};
use super::pic::{self, Chip, Done, Listened, Pic, Port};
use super::policy::{ChipMode, Policy};
use super::routing::{Pin, Route, Routes};

/// Somebody who wants to know when an interrupt has ended.
pub trait AckNotifier: Send + Sync {
    /// The GSI it is about.
    fn gsi(&self) -> u32;
    /// The interrupt has had its EOI.
    fn acknowledged(&self, controllers: &Controllers);
    /// The GSI's pin was unmasked.
    fn unmasked(&self) {}
    /// The pin was unmasked while its line seemed high: asks who drives it to say so again.
    /// `false` where that is impossible.
    fn resample(&self) -> bool {
        false
    }
}

/// Who runs something 10 ms later: the IOAPIC's brake against interrupt storms.
pub trait Delay: Send + Sync {
    /// Calls [`Controllers::reinject_storm`] later.
    fn later(&self);
}

/// The controllers of a VM.
pub struct Controllers {
    policy: Arc<Policy>,
    apics: ApicBus,
    ioapic: Mutex<Ioapic>,
    pic: Mutex<Pic>,
    pic_output: AtomicBool,
    routes: ArcSwap<Routes>,
    reserved_pins: Mutex<usize>,
    notifiers: ArcSwap<Vec<Weak<dyn AckNotifier>>>,
    delay: Mutex<Option<Arc<dyn Delay>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Controllers {
    /// No controllers yet.
    pub fn new(policy: Arc<Policy>) -> Controllers {
        Controllers {
            apics: ApicBus::new(Arc::clone(&policy)),
            policy,
            ioapic: Mutex::default(),
            pic: Mutex::default(),
            pic_output: AtomicBool::new(false),
            routes: ArcSwap::default(),
            reserved_pins: Mutex::new(0),
            notifiers: ArcSwap::default(),
            delay: Mutex::new(None),
        }
    }

    /// VM-wide rules.
    pub fn policy(&self) -> &Arc<Policy> {
        &self.policy
    }

    /// The local APICs.
    pub fn apics(&self) -> &ApicBus {
        &self.apics
    }

    /// The present routing table.
    pub fn routes(&self) -> Arc<Routes> {
        self.routes.load_full()
    }

    /// Who runs things later.
    pub fn set_delay(&self, delay: Arc<dyn Delay>) {
        *lock(&self.delay) = Some(delay);
    }

    /// `KVM_CREATE_IRQCHIP`: the IOAPIC, the 8259s and the standard table.
    pub fn create_kernel(&self) {
        self.routes.store(Arc::new(Routes::standard()));
        self.policy.set_mode(ChipMode::Kernel);
    }

    /// `KVM_CAP_SPLIT_IRQCHIP`: the monitor's IOAPICs have this many pins.
    pub fn create_split(&self, reserved_pins: usize) {
        *lock(&self.reserved_pins) = reserved_pins;
        self.policy.set_mode(ChipMode::Split);
    }

    /// Drives a GSI. The answer is that of `KVM_IRQ_LINE_STATUS`: negative where the interrupt was
    /// ignored, 0 where it was coalesced, else how many CPUs it went to.
    pub fn set_gsi(&self, gsi: u32, source: Source, level: Level, status: LineStatus) -> Delivered {
        let routes = self.routes.load();
        let mut answer = -1;
        for route in routes.of(gsi) {
            let result = match *route {
                Route::Ioapic(pin) => lock(&self.ioapic).set_line(pin, source, level, status, self),
                Route::Pic(pin) => self.with_pic(|pic| (pic.set_line(pin, source, level), None)),
                Route::Msi(msi) if level == Level::Assert => self.send_msi(&msi).unwrap_or(-1),
                Route::Msi(_) => -1,
            };
            if result >= 0 {
                answer = result + answer.max(0);
            }
        }
        answer
    }

    /// Raises and lowers a GSI.
    pub fn pulse_gsi(&self, gsi: u32, source: Source) {
        self.set_gsi(gsi, source, Level::Assert, LineStatus::Ignored);
        self.set_gsi(gsi, source, Level::Deassert, LineStatus::Ignored);
    }

    /// A GSI's message, where it leads to just that: no line to lower afterwards.
    pub fn message_of(&self, gsi: u32) -> Option<Msi> {
        match self.routes.load().of(gsi) {
            [Route::Msi(msi)] => Some(*msi),
            _ => None,
        }
    }

    /// A device of the monitor's is about to interrupt: it may have written to guest memory past the
    /// vCPUs, code included, which they must see from here on. Not only the one that is interrupted:
    /// it may tell others through memory.
    pub fn device_has_written(&self) {
        self.apics.for_each(|lapic| lapic.wake().memory_written());
    }

    /// Sends an MSI.
    pub fn send_msi(&self, msi: &Msi) -> Result<Delivered, Errno> {
        let ids = self.policy.msi_ids();
        if !msi.is_valid(ids) {
            return Err(Errno::EINVAL);
        }
        Ok(self.apics.deliver(None, &Message::from_msi(msi, ids)))
    }

    /// `KVM_SIGNAL_MSI`.
    ///
    /// `kvm.ko` hands the count out as the ioctl's result, also where it is -1 because nobody was
    /// addressed: that is `EPERM` to the caller.
    pub fn signal_msi(&self, msi: &kvm_msi) -> Result<Delivered, Errno> {
        if self.policy.mode() == ChipMode::None || msi.flags & !KVM_MSI_VALID_DEVID != 0 {
            return Err(Errno::EINVAL);
        }
        self.device_has_written();
        match self.send_msi(&Msi::from(msi))? {
            -1 => Err(Errno::EPERM),
            count => Ok(count),
        }
    }

    /// `KVM_SET_GSI_ROUTING`.
    pub fn set_routing(&self, entries: &[kvm_irq_routing_entry]) -> Result<(), Errno> {
        if self.policy.mode() == ChipMode::None {
            return Err(Errno::EINVAL);
        }
        self.routes
            .store(Arc::new(Routes::new(entries, &self.policy)?));
        self.invalidate_eoi_interest();
        Ok(())
    }

    // ---- the 8259s

    /// Runs one operation on the 8259s, then whatever it leaves to do.
    fn with_pic<R>(&self, operate: impl FnOnce(&mut Pic) -> (R, Option<Done>)) -> R {
        let mut pic = lock(&self.pic);
        let (result, done) = operate(&mut pic);
        match done {
            Some(done) if done.ended != 0 => {
                drop(pic);
                for pin in (0..pic::PINS as u8).filter(|pin| done.ended & (1 << pin) != 0) {
                    self.notify_acknowledged(Pin::Pic(pin));
                }
                pic = lock(&self.pic);
            }
            _ => {}
        }
        if done.is_some_and(|done| done.update) {
            pic.update();
        }
        let output = pic.output();
        let rises = !self.pic_output.swap(output, Ordering::SeqCst) && output;
        drop(pic);
        if rises {
            self.wake_pic_listener();
        }
        result
    }

    fn wake_pic_listener(&self) {
        let mut woken = false;
        self.apics.for_each(|lapic| {
            if !woken && lapic.accepts_pic() {
                woken = true;
                lapic.wake().interrupt();
            }
        });
    }

    fn pic_listened(&self) -> Listened {
        let mut listened = Listened::No;
        self.apics.for_each(|lapic| {
            if lapic.accepts_pic() {
                listened = Listened::Yes;
            }
        });
        listened
    }

    fn pic_port(port: u16) -> (Chip, Port) {
        let chip = if port & 0x80 == 0 {
            Chip::Master
        } else {
            Chip::Slave
        };
        (
            chip,
            if port & 1 == 0 {
                Port::Command
            } else {
                Port::Data
            },
        )
    }

    /// Reads one of the 8259s' ports, or the ELCR's.
    pub fn read_pic(&self, port: u16) -> u8 {
        match port {
            0x4d0 => lock(&self.pic).elcr(Chip::Master),
            0x4d1 => lock(&self.pic).elcr(Chip::Slave),
            _ => {
                let (chip, port) = Self::pic_port(port);
                self.with_pic(|pic| {
                    let (value, done) = pic.read(chip, port);
                    (value, Some(done))
                })
            }
        }
    }

    /// Writes one of the 8259s' ports, or the ELCR's.
    pub fn write_pic(&self, port: u16, value: u8) {
        match port {
            0x4d0 => lock(&self.pic).set_elcr(Chip::Master, value),
            0x4d1 => lock(&self.pic).set_elcr(Chip::Slave, value),
            _ => {
                let (chip, port) = Self::pic_port(port);
                let listened = self.pic_listened();
                let opened = self.with_pic(|pic| {
                    let done = pic.write(chip, port, value, listened);
                    let opened =
                        |pin: &u8| done.mask_changed & (1 << pin) != 0 && !pic.is_masked(*pin);
                    (
                        (0..pic::PINS as u8).filter(opened).collect::<Vec<_>>(),
                        Some(done),
                    )
                });
                for pin in opened {
                    self.notify_unmasked(Pin::Pic(pin));
                }
            }
        }
    }

    // ---- the IOAPIC

    /// Reads the IOAPIC's register at `address`; `None` where it has been moved away.
    pub fn read_ioapic(&self, address: u64) -> Option<u32> {
        let ioapic = lock(&self.ioapic);
        address
            .checked_sub(ioapic.base())
            .filter(|at| *at < ioapic::LENGTH)?;
        // The low byte of the address counts, not the offset: that is how kvm.ko decodes.
        Some(ioapic.read(address as u32))
    }

    /// Writes the IOAPIC's register at `address`; `None` where it has been moved away.
    pub fn write_ioapic(&self, address: u64, value: u32) -> Option<()> {
        let written = {
            let mut ioapic = lock(&self.ioapic);
            address
                .checked_sub(ioapic.base())
                .filter(|at| *at < ioapic::LENGTH)?;
            ioapic.write(address as u32, value, self)
        };
        if let Some(pin) = written.entry {
            self.invalidate_eoi_interest();
            if written.mask == Some(false) {
                self.notify_unmasked(Pin::Ioapic(pin));
            }
        }
        Some(())
    }

    /// The IOAPIC's answer to an EOI.
    fn end_at_ioapic(&self, lapic: &Lapic, eoi: EndOfInterrupt) {
        lock(&self.ioapic).rtc_eoi(lapic.id(), eoi.vector);
        for pin in 0..ioapic::PINS as u8 {
            if lock(&self.ioapic).vector(pin) != eoi.vector {
                continue;
            }
            self.notify_acknowledged(Pin::Ioapic(pin));
            if eoi.trigger == Trigger::Edge || lapic.has_directed_eoi() {
                continue;
            }
            if lock(&self.ioapic).eoi(pin, self) == EoiOutcome::Storm
                && let Some(delay) = lock(&self.delay).clone()
            {
                delay.later();
            }
        }
    }

    /// Sends again what an interrupt storm has held back.
    pub fn reinject_storm(&self) {
        lock(&self.ioapic).reinject(self);
    }

    // ---- local APICs

    /// Carries out what a register access of `lapic` means to the others.
    pub fn apply(&self, lapic: &Lapic, effects: Effects) {
        if let Some(message) = effects.ipi {
            self.apics.deliver(Some(lapic), &message);
        }
        if let Some(eoi) = effects.eoi.filter(|eoi| lapic.wants_eoi(eoi.vector)) {
            match self.policy.mode() {
                ChipMode::Split => lapic.post_eoi_exit(eoi.vector),
                _ => self.end_at_ioapic(lapic, eoi),
            }
        }
        if effects.addressing_changed {
            self.apics.addressing_changed();
        }
    }

    /// `KVM_SET_LAPIC` replaced the state of `lapic`.
    pub fn lapic_restored(&self, lapic: &Lapic, effects: Effects) {
        self.apply(lapic, effects);
        if self.policy.has_kernel_ioapic() {
            lock(&self.ioapic).restore_rtc(self);
        }
    }

    /// Brings the set of EOIs that the IOAPIC wants up to date. To be called before an EOI.
    pub fn refresh_eoi_interest(&self, lapic: &Lapic) {
        if !lapic.is_eoi_interest_stale() || !lapic.is_hardware_enabled() {
            return;
        }
        lapic.set_eoi_interest(|set| match self.policy.mode() {
            ChipMode::None => {}
            ChipMode::Kernel => self.ioapic_interest(lapic, |vector| set.insert(vector)),
            ChipMode::Split => self.split_interest(lapic, |vector| set.insert(vector)),
        });
    }

    fn concerns(&self, lapic: &Lapic, message: &Message) -> bool {
        self.apics.matches(lapic, None, message) || lapic.has_pending_eoi(message.vector)
    }

    fn ioapic_interest(&self, lapic: &Lapic, mut insert: impl FnMut(u8)) {
        let ioapic = lock(&self.ioapic);
        if let Some(vector) = ioapic.rtc_vector(lapic.id()) {
            insert(vector);
        }
        for pin in 0..ioapic::PINS as u8 {
            if ioapic.is_level(pin) || pin == 8 || self.has_notifier(Pin::Ioapic(pin)) {
                let message = Message::from_redirection(ioapic.entry(pin));
                if self.concerns(lapic, &message) {
                    insert(message.vector);
                }
            }
        }
    }

    fn split_interest(&self, lapic: &Lapic, mut insert: impl FnMut(u8)) {
        let reserved = *lock(&self.reserved_pins);
        for msi in self.routes.load().messages_below(reserved) {
            let message = Message::from_msi(&msi, self.policy.msi_ids());
            if message.trigger == Trigger::Level && self.concerns(lapic, &message) {
                insert(message.vector);
            }
        }
    }

    fn invalidate_eoi_interest(&self) {
        self.apics.for_each(|lapic| lapic.invalidate_eoi_interest());
    }

    /// Whether there is an interrupt for this CPU now, from any controller.
    pub fn has_interrupt(&self, lapic: &Lapic) -> bool {
        self.has_external(lapic) || lapic.has_interrupt().is_some()
    }

    fn has_external(&self, lapic: &Lapic) -> bool {
        lapic.accepts_pic()
            && match self.policy.mode() {
                ChipMode::Split => lapic.has_external_vector(),
                _ => self.pic_output.load(Ordering::SeqCst),
            }
    }

    /// The acknowledge cycle: the vector that the CPU takes now.
    pub fn acknowledge(&self, lapic: &Lapic) -> Option<u8> {
        if self.has_external(lapic) {
            return match self.policy.mode() {
                ChipMode::Split => lapic.take_external_vector(),
                _ => Some(self.with_pic(|pic| {
                    let (vector, done) = pic.acknowledge();
                    (vector, Some(done))
                })),
            };
        }
        let vector = lapic.has_interrupt()?;
        lapic.acknowledge(vector);
        Some(vector)
    }

    // ---- notifiers

    /// Registers a notifier. It lives as long as its owner keeps it.
    pub fn add_notifier(&self, notifier: &Weak<dyn AckNotifier>) {
        self.notifiers.rcu(|list| {
            let mut list: Vec<_> = list
                .iter()
                .filter(|weak| weak.strong_count() != 0)
                .cloned()
                .collect();
            list.push(notifier.clone());
            list
        });
        self.invalidate_eoi_interest();
    }

    /// Forgets a notifier.
    pub fn remove_notifier(&self, notifier: &Weak<dyn AckNotifier>) {
        self.notifiers.rcu(|list| {
            list.iter()
                .filter(|weak| !weak.ptr_eq(notifier))
                .cloned()
                .collect::<Vec<_>>()
        });
        self.invalidate_eoi_interest();
    }

    fn notifiers_of(&self, pin: Pin) -> Vec<Arc<dyn AckNotifier>> {
        let notifiers = self.notifiers.load();
        if notifiers.is_empty() {
            return Vec::new();
        }
        let Some(gsi) = self.routes.load().gsi(pin) else {
            return Vec::new();
        };
        notifiers
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|n| n.gsi() == gsi)
            .collect()
    }

    fn has_notifier(&self, pin: Pin) -> bool {
        !self.notifiers_of(pin).is_empty()
    }

    fn notify_acknowledged(&self, pin: Pin) {
        self.notifiers_of(pin)
            .iter()
            .for_each(|notifier| notifier.acknowledged(self));
    }

    fn notify_unmasked(&self, pin: Pin) {
        self.notifiers_of(pin)
            .iter()
            .for_each(|notifier| notifier.unmasked());
    }

    // ---- state

    /// `KVM_GET_IRQCHIP`: `chip.chip_id` says which.
    pub fn state(&self, chip: &mut kvm_irqchip) -> Result<(), Errno> {
        if self.policy.mode() != ChipMode::Kernel {
            return Err(Errno::ENXIO);
        }
        // What of the union is not the chip's stays as the caller gave it, as in the kernel.
        match chip.chip_id {
            KVM_IRQCHIP_PIC_MASTER => chip.chip.pic = lock(&self.pic).state(Chip::Master),
            KVM_IRQCHIP_PIC_SLAVE => chip.chip.pic = lock(&self.pic).state(Chip::Slave),
            KVM_IRQCHIP_IOAPIC => chip.chip.ioapic = lock(&self.ioapic).state(),
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    /// `KVM_SET_IRQCHIP`.
    #[expect(unsafe_code, reason = "the state is a C union")]
    pub fn set_state(&self, chip: &kvm_irqchip) -> Result<(), Errno> {
        if self.policy.mode() != ChipMode::Kernel {
            return Err(Errno::ENXIO);
        }
        // SAFETY: both variants are plain integers, and the union is initialised in full, as it
        // comes from the caller's memory.
        let (pic, ioapic) = unsafe { (chip.chip.pic, chip.chip.ioapic) };
        match chip.chip_id {
            KVM_IRQCHIP_PIC_MASTER => self.set_pic(Chip::Master, &pic),
            KVM_IRQCHIP_PIC_SLAVE => self.set_pic(Chip::Slave, &pic),
            KVM_IRQCHIP_IOAPIC => {
                lock(&self.ioapic).set_state(&ioapic, self);
                self.invalidate_eoi_interest();
            }
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn set_pic(&self, chip: Chip, state: &kvm_bindings::kvm_pic_state) {
        self.with_pic(|pic| ((), Some(pic.set_state(chip, state))));
    }

    /// A source of lines is gone.
    pub fn release(&self, source: Source) {
        lock(&self.ioapic).release(source);
        lock(&self.pic).release(source);
    }
}

/// The union with a PIC's state in it, and zeroes behind.
impl ioapic::Bus for Controllers {
    fn deliver(&self, message: &Message, takers: Option<&mut Takers>) -> Delivered {
        self.apics.deliver_noting(None, message, takers)
    }

    fn resample(&self, pin: u8) -> bool {
        // Every resampler of the GSI is asked, so no short circuit.
        self.notifiers_of(Pin::Ioapic(pin))
            .iter()
            .filter(|notifier| notifier.resample())
            .count()
            > 0
    }

    fn pending_at(&self, message: &Message) -> Takers {
        let mut takers = Takers::default();
        self.apics.for_each(|lapic| {
            if self.apics.matches(lapic, None, message) && lapic.has_pending_eoi(message.vector) {
                takers.0.push((lapic.id(), message.vector));
            }
        });
        takers
    }
}
