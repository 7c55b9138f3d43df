//! The I/O ports: who answers where. (Who answers at a guest physical address, the machine's
//! address space says.)
//!
//! A bus is built once and then only read, so vCPUs use it without a lock. What moves at run time
//! (PCI base address registers) is one window, behind which [`crate::pci`] decides.

use std::sync::Arc;

use thiserror::Error;

/// What sits behind a range of a bus.
pub trait Device: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the range. The range may end before
    /// the access does.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes, likewise.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that can't be added.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BusError {
    /// Somebody is there already.
    #[error("{start:#x}+{len:#x} overlaps the range of another device at {other:#x}")]
    Overlap {
        /// Start of the range to add.
        start: u64,
        /// Its length.
        len: u64,
        /// Start of the range that is in the way.
        other: u64,
    },
    /// No byte, or bytes behind the end of the address space.
    #[error("{start:#x}+{len:#x} is no range of this bus")]
    Range {
        /// Start of the range to add.
        start: u64,
        /// Its length.
        len: u64,
    },
}

/// Ranges in ascending order; none overlaps another.
#[derive(Default)]
struct Ranges(Vec<(u64, u64, Arc<dyn Device>)>);

impl Ranges {
    fn add(&mut self, start: u64, len: u64, device: Arc<dyn Device>) -> Result<(), BusError> {
        let end = start.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or(BusError::Range { start, len })?;
        let at = self.0.partition_point(|(other, ..)| *other < start);
        let before = at.checked_sub(1).map(|i| &self.0[i]);
        let conflict = before
            .filter(|(other, len, _)| other + len > start)
            .or_else(|| self.0.get(at).filter(|(other, ..)| *other < end));
        if let Some((other, ..)) = conflict {
            let other = *other;
            return Err(BusError::Overlap { start, len, other });
        }
        self.0.insert(at, (start, len, device));
        Ok(())
    }

    fn find(&self, at: u64) -> Option<(u64, &dyn Device)> {
        let index = self.0.partition_point(|(start, ..)| *start <= at);
        let (start, len, device) = &self.0[index.checked_sub(1)?];
        let offset = at - start;
        (offset < *len).then_some((offset, &**device))
    }

    fn read(&self, at: u64, data: &mut [u8]) {
        match self.find(at) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, at: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(at) {
            device.write(offset, data);
        }
    }
}

/// The 64 Ki I/O ports.
#[derive(Default)]
pub struct PortBus(Ranges);

impl PortBus {
    /// Puts `device` at `len` ports from `first`.
    pub fn add(&mut self, first: u16, len: u16, device: Arc<dyn Device>) -> Result<(), BusError> {
        self.0.add(u64::from(first), u64::from(len), device)
    }

    /// `IN`. Ports that nobody answers read as ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        self.0.read(u64::from(port), data);
    }

    /// `OUT`. Writes that nobody takes are lost.
    pub fn write(&self, port: u16, data: &[u8]) {
        self.0.write(u64::from(port), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl Device for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn read(bus: &PortBus, port: u16) -> u8 {
        let mut data = [0];
        bus.read(port, &mut data);
        data[0]
    }

    #[test]
    fn each_port_reaches_its_device_and_the_others_read_as_ones() {
        let mut bus = PortBus::default();
        bus.add(0x60, 1, Arc::new(Echo(10))).unwrap();
        bus.add(0x3f8, 8, Arc::new(Echo(20))).unwrap();
        bus.add(0x64, 1, Arc::new(Echo(30))).unwrap();
        assert_eq!(read(&bus, 0x60), 10);
        assert_eq!(read(&bus, 0x61), 0xff);
        assert_eq!(read(&bus, 0x64), 30);
        assert_eq!(read(&bus, 0x3ff), 27);
        assert_eq!(read(&bus, 0x400), 0xff);
        assert_eq!(read(&bus, 0), 0xff);
    }

    #[test]
    fn ranges_never_overlap() {
        let mut bus = PortBus::default();
        bus.add(0x10, 0x10, Arc::new(Echo(0))).unwrap();
        for (first, len) in [(0x10, 1), (0x1f, 4), (0x8, 9), (0x0, 0x100)] {
            let refused = bus.add(first, len, Arc::new(Echo(0)));
            assert!(matches!(
                refused,
                Err(BusError::Overlap { other: 0x10, .. })
            ));
        }
        bus.add(0x20, 1, Arc::new(Echo(0))).unwrap();
        let refused = bus.add(0x30, 0, Arc::new(Echo(0)));
        assert!(matches!(refused, Err(BusError::Range { .. })));
    }
}
