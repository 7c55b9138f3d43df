//! The buses on which devices "in the kernel" hear port and memory accesses.
//!
//! A range takes an access that lies within it entirely; several may claim the same one, and are
//! asked in order of their addresses until one takes it. A range of length 0 (an ioeventfd that
//! ignores the length) takes any access that begins at its address. Readers take no lock.

use std::sync::Arc;
use std::sync::Mutex;

use arc_swap::ArcSwap;
use cpu::Handled;

use crate::errno::Errno;

/// Devices other than ioeventfds on one bus.
const MOST_DEVICES: usize = 1000;

/// A device on a bus. Called in vCPU threads, several at a time.
pub trait IoDevice: Send + Sync {
    /// Reads.
    fn read(&self, _address: u64, _data: &mut [u8]) -> Handled {
        Handled::No
    }
    /// Writes.
    fn write(&self, _address: u64, _data: &[u8]) -> Handled {
        Handled::No
    }
}

/// Whether a device counts against the bus's limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// It does.
    Yes,
    /// An ioeventfd: descriptors are limited otherwise.
    No,
}

#[derive(Clone)]
struct Range {
    start: u64,
    length: u64,
    counted: Counted,
    device: Arc<dyn IoDevice>,
}

impl Range {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.length)
    }

    fn takes(&self, address: u64, length: usize) -> bool {
        if self.length == 0 {
            return address == self.start;
        }
        address >= self.start && address.saturating_add(length as u64) <= self.end()
    }
}

#[derive(Clone, Default)]
struct Table {
    ranges: Vec<Range>,
    /// For each range, how far the ranges up to it reach: a lookup stops where nothing can follow.
    reach: Vec<u64>,
}

impl Table {
    fn new(mut ranges: Vec<Range>) -> Table {
        ranges.sort_by_key(|range| range.start);
        let reach = ranges
            .iter()
            .scan(0, |reach, range| {
                *reach = range.end().max(range.start.saturating_add(1)).max(*reach);
                Some(*reach)
            })
            .collect();
        Table { ranges, reach }
    }

    fn takers(&self, address: u64, length: usize) -> impl Iterator<Item = &Arc<dyn IoDevice>> {
        let first = self.reach.partition_point(|reach| *reach <= address);
        self.ranges[first..]
            .iter()
            .take_while(move |range| range.start <= address)
            .filter(move |range| range.takes(address, length))
            .map(|range| &range.device)
    }
}

/// One bus.
#[derive(Default)]
pub struct IoBus {
    table: ArcSwap<Table>,
    changing: Mutex<()>,
}

impl IoBus {
    /// Adds a device.
    pub fn add(
        &self,
        start: u64,
        length: u64,
        counted: Counted,
        device: Arc<dyn IoDevice>,
    ) -> Result<(), Errno> {
        let _one = self.changing.lock();
        let mut ranges = self.table.load().ranges.clone();
        let devices = ranges
            .iter()
            .filter(|range| range.counted == Counted::Yes)
            .count();
        if devices > MOST_DEVICES - 1 {
            return Err(Errno::ENOSPC);
        }
        ranges.push(Range {
            start,
            length,
            counted,
            device,
        });
        self.table.store(Arc::new(Table::new(ranges)));
        Ok(())
    }

    /// Removes a device.
    pub fn remove(&self, device: &Arc<dyn IoDevice>) {
        let _one = self.changing.lock();
        let mut ranges = self.table.load().ranges.clone();
        ranges.retain(|range| !Arc::ptr_eq(&range.device, device));
        self.table.store(Arc::new(Table::new(ranges)));
    }

    /// Reads.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Handled {
        let table = self.table.load();
        for device in table.takers(address, data.len()) {
            if device.read(address, data) == Handled::Yes {
                return Handled::Yes;
            }
        }
        Handled::No
    }

    /// Writes.
    pub fn write(&self, address: u64, data: &[u8]) -> Handled {
        let table = self.table.load();
        for device in table.takers(address, data.len()) {
            if device.write(address, data) == Handled::Yes {
                return Handled::Yes;
            }
        }
        Handled::No
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Named(u8, Handled);

    impl IoDevice for Named {
        fn read(&self, _address: u64, data: &mut [u8]) -> Handled {
            if self.1 == Handled::Yes {
                data[0] = self.0;
            }
            self.1
        }
    }

    fn add(bus: &IoBus, start: u64, length: u64, name: u8, handled: Handled) -> Arc<dyn IoDevice> {
        let device: Arc<dyn IoDevice> = Arc::new(Named(name, handled));
        bus.add(start, length, Counted::Yes, Arc::clone(&device))
            .unwrap();
        device
    }

    fn read(bus: &IoBus, address: u64, length: usize) -> Option<u8> {
        let mut data = [0; 8];
        let handled = bus.read(address, &mut data[..length]);
        (handled == Handled::Yes).then_some(data[0])
    }

    #[test]
    fn a_range_takes_what_lies_within_it() {
        let bus = IoBus::default();
        add(&bus, 0x20, 2, 1, Handled::Yes);
        add(&bus, 0x1000, 0, 2, Handled::Yes);
        let found: Vec<_> = [(0x1f, 1), (0x20, 1), (0x20, 2), (0x21, 2), (0x22, 1)]
            .iter()
            .map(|(address, length)| read(&bus, *address, *length))
            .collect();
        assert_eq!(found, [None, Some(1), Some(1), None, None]);
        assert_eq!(read(&bus, 0x1000, 8), Some(2));
        assert_eq!(read(&bus, 0x1001, 1), None);
    }

    #[test]
    fn the_next_one_is_asked_where_one_declines() {
        let bus = IoBus::default();
        add(&bus, 0, 0x1_0000, 1, Handled::Yes);
        let inner = add(&bus, 0x100, 4, 2, Handled::No);
        assert_eq!(read(&bus, 0x100, 4), Some(1));
        add(&bus, 0x80, 0x100, 3, Handled::No);
        assert_eq!(read(&bus, 0x102, 1), Some(1));
        bus.remove(&inner);
        assert_eq!(read(&bus, 0x100, 4), Some(1));
    }

    #[test]
    fn a_bus_can_be_full() {
        let bus = IoBus::default();
        for address in 0..1000 {
            add(&bus, address, 1, 0, Handled::Yes);
        }
        let more = |counted| bus.add(0, 1, counted, Arc::new(Named(0, Handled::Yes)));
        assert_eq!(more(Counted::Yes), Err(Errno::ENOSPC));
    }
}
