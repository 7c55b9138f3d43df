//! Virtio over PCI (virtio 1.2, 4.1), modern only.
//!
//! Everything lies behind BAR 0:
//!
//! | offset | what                                          |
//! |--------|-----------------------------------------------|
//! | 0x0000 | common configuration                          |
//! | 0x1000 | ISR status                                    |
//! | 0x2000 | device configuration                          |
//! | 0x3000 | notification, 4 bytes for each queue          |
//! | 0x4000 | MSI-X table                                   |
//! | 0x6000 | MSI-X pending bits                            |
//!
//! Interrupts are MSI-X only: there is no `INTx` pin.

use std::sync::{Arc, Mutex, Weak};

use addr::Gpa;
use vm_memory::GuestMemoryMmap;

use super::{DeviceType, Service, VirtioDevice, common::Common, queue::Queues};
use crate::{
    lock,
    pci::{
        Bar, ConfigSpace, Identity, PciDevice,
        msix::{self, MsiSink, MsixTable},
    },
};

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;
const BAR: usize = 0;
const BAR_SIZE: u32 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x6000;
const NOTIFY_MULTIPLIER: u32 = 4;

/// `cfg_type` of each capability.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciAccess = 5,
}

struct State {
    config: ConfigSpace,
    common: Common,
    msix: MsixTable,
    device: Box<dyn VirtioDevice>,
    isr: u8,
    /// Offsets in configuration space.
    msix_capability: u16,
    access_capability: u16,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    state: Mutex<State>,
    memory: GuestMemoryMmap,
}

impl VirtioPci {
    /// Puts `device` behind a PCI function that reaches guest memory and interrupts by `msi`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryMmap,
        msi: Arc<dyn MsiSink>,
    ) -> Result<Self, virtio_queue::Error> {
        let queues = device.queue_sizes().len() as u16;
        let msix = MsixTable::new(queues + 1, msi);
        let mut config = ConfigSpace::new(identity(device.device_type()));
        config.add_bar(BAR, BAR_SIZE);
        for (structure, at, len) in [
            (Structure::Common, COMMON, 0x1000),
            (Structure::Isr, ISR, 0x1000),
            (Structure::Device, DEVICE, 0x1000),
        ] {
            config.add_capability(VENDOR_CAPABILITY, &describe(structure, at, len, &[]), &[]);
        }
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        let notify = describe(Structure::Notify, NOTIFY, 0x1000, &multiplier);
        config.add_capability(VENDOR_CAPABILITY, &notify, &[]);
        let access = describe(Structure::PciAccess, 0, 0, &[0; 4]);
        let mut writable = [0xff; 18];
        writable[..2].fill(0);
        let access_capability = config.add_capability(VENDOR_CAPABILITY, &access, &writable);
        let (body, writable) = msix.capability(MSIX_TABLE as u32, MSIX_PENDING as u32);
        let msix_capability = config.add_capability(msix::CAPABILITY, &body, &writable);
        Ok(Self {
            state: Mutex::new(State {
                common: Common::new(device.queue_sizes(), device.features())?,
                config,
                msix,
                device,
                isr: 0,
                msix_capability,
                access_capability,
            }),
            memory,
        })
    }

    /// Tells the device how to have its queues serviced. The reference is weak, because the device
    /// lives inside what it refers to.
    pub fn connect(&self, service: &Weak<dyn Service>) {
        lock(&self.state).device.connect(service.clone());
    }

    /// The window into BAR 0 that configuration space offers (4.1.4.9): its target, if valid.
    fn access_target(state: &State) -> Option<(u64, usize)> {
        let at = usize::from(state.access_capability);
        let bar = state.config.get_u32(at + 4) & 0xff;
        let offset = u64::from(state.config.get_u32(at + 8));
        let len = state.config.get_u32(at + 12) as usize;
        (bar == BAR as u32 && matches!(len, 1 | 2 | 4)).then_some((offset, len))
    }

    fn is_access_data(state: &State, offset: u16) -> bool {
        let data = state.access_capability + 16;
        (data..data + 4).contains(&offset)
    }
}

fn identity(device: DeviceType) -> Identity {
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device as u16,
        revision: 1,
        class: device.pci_class(),
        subsystem_vendor: VENDOR,
        subsystem: DEVICE_BASE + device as u16,
    }
}

/// `struct virtio_pci_cap` without the two bytes that every capability has.
fn describe(structure: Structure, offset: u64, len: u32, rest: &[u8]) -> Vec<u8> {
    let mut body = vec![16 + rest.len() as u8, structure as u8, BAR as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(rest);
    body
}

impl State {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset & !0xfff {
            COMMON => self.common.read(offset, self.msix.vectors(), data),
            ISR => {
                if let (ISR, Some(byte)) = (offset, data.first_mut()) {
                    *byte = std::mem::take(&mut self.isr);
                }
            }
            DEVICE => {
                let config = self.device.config();
                let from = config.get((offset - DEVICE) as usize..).unwrap_or_default();
                let len = from.len().min(data.len());
                data[..len].copy_from_slice(&from[..len]);
            }
            MSIX_TABLE | 0x5000 => self.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PENDING => self.msix.read_pending(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn write(&mut self, memory: &GuestMemoryMmap, offset: u64, data: &[u8]) {
        match offset & !0xfff {
            COMMON => self.write_common(memory, offset, data),
            DEVICE => self.device.write_config(offset - DEVICE, data),
            NOTIFY => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                self.service(memory, queue as usize);
            }
            MSIX_TABLE | 0x5000 => self.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    fn write_common(&mut self, memory: &GuestMemoryMmap, offset: u64, data: &[u8]) {
        use super::common::Change;
        match self.common.write(memory, offset, self.msix.vectors(), data) {
            Change::None => {}
            Change::Reset => {
                self.device.reset();
                self.isr = 0;
            }
            Change::Ready => self.device.activate(self.common.driver_features()),
            Change::Broken => self.needs_reset(),
        }
    }

    fn service(&mut self, memory: &GuestMemoryMmap, queue: usize) {
        if !self.common.is_running() {
            return;
        }
        let mut queues = Queues::new(self.common.queues_mut(), memory);
        let outcome = self.device.service(queue, &mut queues);
        let interrupts = queues.interrupts();
        if let Err(error) = outcome {
            tracing::warn!(%error, device = ?self.device.device_type(), "driver broke the protocol");
            self.needs_reset();
        }
        for queue in (0..64).filter(|queue| interrupts >> queue & 1 != 0) {
            self.isr |= 1;
            self.msix.signal(self.common.queue_vector(queue));
        }
    }

    fn needs_reset(&mut self) {
        self.common.set_needs_reset();
        self.isr |= 2;
        self.msix.signal(self.common.config_vector());
    }
}

impl Service for VirtioPci {
    fn service(&self, queue: usize) {
        lock(&self.state).service(&self.memory, queue);
    }
}

impl PciDevice for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut state = lock(&self.state);
        match Self::access_target(&state) {
            Some((at, len)) if Self::is_access_data(&state, offset) && data.len() >= len => {
                data.fill(0);
                state.read(at, &mut data[..len]);
            }
            _ => state.config.read(offset, data),
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut state = lock(&self.state);
        state.config.write(offset, data);
        let control = state.msix_capability + msix::CONTROL_OFFSET;
        if (control & !3..control + 2).contains(&offset) {
            let value = state.config.get_u16(usize::from(control));
            state.msix.set_control(value);
        }
        if let Some((at, len)) = Self::access_target(&state)
            && Self::is_access_data(&state, offset)
            && data.len() >= len
        {
            state.write(&self.memory, at, &data[..len]);
        }
    }

    fn decoded(&self) -> Vec<Bar> {
        lock(&self.state).config.decoded()
    }

    fn place(&self, index: usize, at: Gpa) {
        lock(&self.state).config.place(index, at);
    }

    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        lock(&self.state).config.bar_sizes()
    }

    fn read_bar(&self, _: usize, offset: u64, data: &mut [u8]) {
        lock(&self.state).read(offset, data);
    }

    fn write_bar(&self, _: usize, offset: u64, data: &[u8]) {
        lock(&self.state).write(&self.memory, offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::{
        rng::Rng,
        testing::{Buffer, Driver},
    };
    use proptest::prelude::*;

    fn driver() -> Driver {
        Driver::start(Box::new(Rng::new().unwrap()))
    }

    #[test]
    fn reset_forgets_the_driver() {
        let mut driver = driver();
        driver.write(0x14, &[0]);
        assert_eq!(driver.status(), 0);
        driver.offer(0, &[Buffer::In(8)]);
        driver.notify(0);
        assert_eq!(driver.used(0), None);
        assert_eq!(driver.read::<2>(0x1c), [0, 0], "the queue is disabled");
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let driver = driver();
        driver.write(0x14, &[0]);
        driver.write(0x14, &[0x3]);
        for select in [0_u32, 1] {
            driver.write(0x08, &select.to_le_bytes());
            driver.write(0x0c, &u32::MAX.to_le_bytes());
        }
        driver.write(0x14, &[0xb]);
        assert_eq!(driver.status(), 0x3);
    }

    #[test]
    fn queues_outside_memory_need_a_reset() {
        let driver = driver();
        driver.write(0x14, &[0]);
        driver.write(0x14, &[0x3]);
        driver.write(0x08, &1_u32.to_le_bytes());
        driver.write(0x0c, &1_u32.to_le_bytes());
        driver.write(0x14, &[0xb]);
        driver.write(0x20, &(1_u64 << 40).to_le_bytes());
        driver.write(0x1c, &1_u16.to_le_bytes());
        driver.write(0x14, &[0xf]);
        assert_eq!(driver.status() & 64, 64);
    }

    #[test]
    fn the_window_in_configuration_space_reaches_the_bar() {
        let driver = driver();
        let at = lock(&driver.device.state).access_capability;
        driver.device.write_config(at + 8, &0x14_u32.to_le_bytes());
        driver.device.write_config(at + 12, &1_u32.to_le_bytes());
        let mut status = [0];
        driver.device.read_config(at + 16, &mut status);
        assert_eq!(status, [0xf]);
        driver.device.write_config(at + 16, &[0]);
        assert_eq!(driver.status(), 0);
    }

    #[derive(Clone, Debug)]
    enum Poke {
        Bar(u64, Vec<u8>),
        BarRead(u64, usize),
        Config(u16, Vec<u8>),
        Memory(u64, Vec<u8>),
    }

    fn poke() -> impl Strategy<Value = Poke> {
        let bytes = |most| proptest::collection::vec(any::<u8>(), 1..=most);
        let near = prop_oneof![
            3 => 0_u64..0x40,
            1 => 0x2000_u64..0x2020,
            2 => 0x3000_u64..0x3010,
            1 => 0x4000_u64..0x4040,
            1 => 0_u64..0x8000,
        ];
        let near2 = near.clone();
        prop_oneof![
            4 => (near, bytes(8)).prop_map(|(at, data)| Poke::Bar(at, data)),
            1 => (near2, 1..=8_usize).prop_map(|(at, len)| Poke::BarRead(at, len)),
            1 => (0_u16..256, bytes(4)).prop_map(|(at, data)| Poke::Config(at, data)),
            2 => (0_u64..0x4000, bytes(16)).prop_map(|(at, data)| Poke::Memory(at, data)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever a guest writes to registers, rings and descriptors: no panic, no hang.
        #[test]
        fn a_hostile_driver_breaks_only_its_own_device(pokes in proptest::collection::vec(poke(), 0..300)) {
            let driver = driver();
            for poke in pokes {
                match poke {
                    Poke::Bar(at, data) => driver.write(at, &data),
                    Poke::BarRead(at, len) => {
                        let mut data = vec![0; len];
                        driver.device.read_bar(0, at, &mut data);
                    }
                    Poke::Config(at, data) => {
                        let len = data.len().min(4 - usize::from(at % 4));
                        driver.device.write_config(at, &data[..len]);
                    }
                    Poke::Memory(at, data) => {
                        use vm_memory::{Bytes, GuestAddress};
                        driver.memory.write_slice(&data, GuestAddress(at)).unwrap();
                    }
                }
                driver.notify(0);
            }
            driver.write(0x14, &[0]);
            prop_assert_eq!(driver.status(), 0);
        }
    }
}
