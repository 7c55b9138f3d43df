//! The root bus: 32 slots, two ways into configuration space, one window for memory BARs.

use std::sync::{Arc, Mutex, RwLock};

use addr::{Address, Gpa, GpaRange};
use thiserror::Error;

use super::{Bar, ConfigSpace, Identity, PciDevice};
use crate::{
    bus::Device,
    lock,
    power::{PowerSink, RESET_PORT, reset_port_write},
};

/// First of the eight configuration ports.
pub const CONFIG_PORT: u16 = 0xcf8;
/// Number of configuration ports.
pub const CONFIG_PORTS: u16 = 8;
/// Bytes of ECAM for the one bus there is.
pub const ECAM_SIZE: u64 = 1 << 20;
const SLOTS: usize = 32;
const ENABLE: u32 = 1 << 31;

/// A device that can't be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PciError {
    /// All slots are taken.
    #[error("the PCI bus has no free slot: {SLOTS} devices are the limit")]
    NoSlot,
    /// The memory window is full.
    #[error("no room for a BAR of {size:#x} bytes in the PCI memory window")]
    NoRoom {
        /// What it needs.
        size: u64,
    },
}

struct Decoded {
    bar: Bar,
    device: Arc<dyn PciDevice>,
}

/// The bus.
pub struct PciRoot {
    slots: RwLock<Vec<Arc<dyn PciDevice>>>,
    /// Every BAR that is decoded now, rebuilt when one may have moved.
    decoded: RwLock<Vec<Decoded>>,
    /// The last value written to 0xCF8.
    address: Mutex<u32>,
    window: GpaRange,
    next_free: Mutex<Gpa>,
    power: Arc<dyn PowerSink>,
}

impl PciRoot {
    /// A bus with a host bridge in slot 0, whose BARs are placed in `window`.
    pub fn new(window: GpaRange, power: Arc<dyn PowerSink>) -> Self {
        Self {
            slots: RwLock::new(vec![Arc::new(HostBridge::default())]),
            decoded: RwLock::default(),
            address: Mutex::default(),
            window,
            next_free: Mutex::new(window.start()),
            power,
        }
    }

    /// Puts `device` in the next free slot, gives its BARs addresses, and tells the slot.
    pub fn add(&self, device: Arc<dyn PciDevice>) -> Result<usize, PciError> {
        let slot = self.devices().len();
        if slot == SLOTS {
            return Err(PciError::NoSlot);
        }
        for (index, size) in device.bar_sizes() {
            device.place(index, self.allocate(size)?);
        }
        if let Ok(mut slots) = self.slots.write() {
            slots.push(device);
        }
        self.find_decoded();
        Ok(slot)
    }

    /// The device behind ports 0xCF8 to 0xCFF.
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(ConfigPorts(self.clone()))
    }

    /// The device behind the ECAM window.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(Ecam(self.clone()))
    }

    /// The device behind the memory window.
    pub fn memory_window(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(MemoryWindow(self.clone()))
    }

    fn allocate(&self, size: u64) -> Result<Gpa, PciError> {
        let mut next = lock(&self.next_free);
        let start = Gpa::new(next.raw().next_multiple_of(size));
        let range = GpaRange::new(start, size).filter(|r| self.window.contains_range(*r));
        *next = range.ok_or(PciError::NoRoom { size })?.end();
        Ok(start)
    }

    fn devices(&self) -> Vec<Arc<dyn PciDevice>> {
        self.slots
            .read()
            .map(|slots| slots.clone())
            .unwrap_or_default()
    }

    fn function(&self, bus: u64, device_function: u64) -> Option<Arc<dyn PciDevice>> {
        let (slot, function) = (device_function / 8, device_function % 8);
        if bus != 0 || function != 0 {
            return None;
        }
        self.slots.read().ok()?.get(slot as usize).cloned()
    }

    fn read_config(&self, bus: u64, device_function: u64, offset: u16, data: &mut [u8]) {
        match self.function(bus, device_function) {
            Some(device) => device.read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, bus: u64, device_function: u64, offset: u16, data: &[u8]) {
        let Some(device) = self.function(bus, device_function) else {
            return;
        };
        device.write_config(offset, data);
        let moves_bars = (0x04..0x06).contains(&offset) || (0x10..0x28).contains(&offset);
        if moves_bars {
            self.find_decoded();
        }
    }

    fn find_decoded(&self) {
        let devices = self.devices();
        let all = devices.into_iter().flat_map(|device| {
            let bars = device.decoded();
            bars.into_iter().map(move |bar| Decoded {
                bar,
                device: device.clone(),
            })
        });
        let all = all.collect();
        if let Ok(mut decoded) = self.decoded.write() {
            *decoded = all;
        }
    }

    /// The device, BAR and offset that decode `at`.
    fn decode(&self, at: Gpa) -> Option<(Arc<dyn PciDevice>, usize, u64)> {
        let decoded = self.decoded.read().ok()?;
        decoded.iter().find_map(|d| {
            let offset = d.bar.range.offset_of(at)?;
            Some((d.device.clone(), d.bar.index, offset))
        })
    }
}

struct ConfigPorts(Arc<PciRoot>);

impl ConfigPorts {
    const DATA: u64 = 4;

    /// Bus, device and function, and register of an access to the data port, if enabled.
    fn target(&self, offset: u64, len: usize) -> Option<(u64, u64, u16)> {
        let address = *lock(&self.0.address);
        let byte = offset.checked_sub(Self::DATA)?;
        let inside = byte + len as u64 <= 4;
        (address & ENABLE != 0 && inside).then(|| {
            let bus = u64::from(address >> 16 & 0xff);
            let device_function = u64::from(address >> 8 & 0xff);
            (bus, device_function, (address & 0xfc) as u16 + byte as u16)
        })
    }
}

impl Device for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, 4) = (offset, data.len()) {
            data.copy_from_slice(&lock(&self.0.address).to_le_bytes());
        } else if let Some((bus, function, register)) = self.target(offset, data.len()) {
            self.0.read_config(bus, function, register, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) {
            *lock(&self.0.address) = u32::from_le_bytes(value);
        } else if let (Some([value]), true) = (
            data.first_chunk::<1>().filter(|_| data.len() == 1),
            offset == u64::from(RESET_PORT - CONFIG_PORT),
        ) {
            reset_port_write(*value, &*self.0.power);
        } else if let Some((bus, function, register)) = self.target(offset, data.len()) {
            self.0.write_config(bus, function, register, data);
        }
    }
}

struct Ecam(Arc<PciRoot>);

impl Ecam {
    fn target(offset: u64, len: usize) -> Option<(u64, u64, u16)> {
        let register = (offset & 0xfff) as u16;
        let inside = len <= 4 && usize::from(register % 4) + len <= 4;
        inside.then_some((offset >> 20, offset >> 12 & 0xff, register))
    }
}

impl Device for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset, data.len()) {
            Some((bus, function, register)) => self.0.read_config(bus, function, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bus, function, register)) = Self::target(offset, data.len()) {
            self.0.write_config(bus, function, register, data);
        }
    }
}

struct MemoryWindow(Arc<PciRoot>);

impl MemoryWindow {
    fn decode(&self, offset: u64) -> Option<(Arc<dyn PciDevice>, usize, u64)> {
        let at = self.0.window.start().checked_add(offset)?;
        self.0.decode(at)
    }
}

impl Device for MemoryWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.decode(offset) {
            Some((device, bar, offset)) => device.read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, bar, offset)) = self.decode(offset) {
            device.write_bar(bar, offset, data);
        }
    }
}

/// A bridge between the CPU and the bus, which has nothing to configure.
struct HostBridge(ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        Self(ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        }))
    }
}

impl PciDevice for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&self, _: u16, _: &[u8]) {}
    fn decoded(&self) -> Vec<Bar> {
        Vec::new()
    }
    fn place(&self, _: usize, _: Gpa) {}
    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        Vec::new()
    }
    fn read_bar(&self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{power::PowerEvent, virtio::testing::PowerLog};

    fn root() -> (Arc<PciRoot>, Arc<PowerLog>) {
        let log = Arc::new(PowerLog::default());
        let window = GpaRange::new(Gpa::new(0xc000_0000), 0x1000_0000).unwrap();
        (Arc::new(PciRoot::new(window, log.clone())), log)
    }

    fn read(device: &dyn Device, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_host_bridge_shows_by_ports_and_by_ecam() {
        let (root, _) = root();
        let (ports, ecam) = (root.config_ports(), root.ecam());
        ports.write(0, &ENABLE.to_le_bytes());
        assert_eq!(read(&*ports, 4), 0x0008_1b36);
        assert_eq!(read(&*ecam, 0), 0x0008_1b36);
        let mut class = [0; 2];
        ports.write(0, &(ENABLE | 8).to_le_bytes());
        ports.read(6, &mut class);
        assert_eq!(class, [0x00, 0x06]);
    }

    #[test]
    fn empty_slots_other_functions_and_disabled_accesses_read_as_ones() {
        let (root, _) = root();
        let (ports, ecam) = (root.config_ports(), root.ecam());
        assert_eq!(read(&*ports, 4), u32::MAX, "not enabled");
        ports.write(0, &(ENABLE | 1 << 11).to_le_bytes());
        assert_eq!(read(&*ports, 4), u32::MAX, "slot 1 is empty");
        assert_eq!(read(&*ecam, 1 << 12), u32::MAX, "function 1");
        assert_eq!(read(&*ecam, 1 << 20), u32::MAX, "bus 1");
    }

    #[test]
    fn the_reset_port_lies_among_the_configuration_ports() {
        let (root, log) = root();
        root.config_ports().write(1, &[0x02]);
        assert_eq!(log.events(), []);
        root.config_ports().write(1, &[crate::power::RESET_VALUE]);
        assert_eq!(log.events(), [PowerEvent::Reset]);
    }
}
