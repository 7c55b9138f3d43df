//! What tests of devices use: recorders for what a device sends out, and a driver.
//!
//! The driver does what a guest's driver does, through the same registers: negotiates, sets queues
//! up in guest memory, makes buffers available, notifies, and reads the used ring.

use std::{
    io::{self, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{FEATURE_VERSION_1, VirtioDevice, pci::VirtioPci};
use crate::{
    IrqLine, lock,
    pci::{
        PciDevice,
        msix::{MsiMessage, MsiSink},
    },
    power::{PowerEvent, PowerSink},
};

/// Counts edges.
#[derive(Default)]
pub(crate) struct IrqCount(AtomicUsize);

impl IrqCount {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl IrqLine for IrqCount {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Keeps messages.
#[derive(Default)]
pub(crate) struct MsiLog(Mutex<Vec<MsiMessage>>);

impl MsiLog {
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl MsiSink for MsiLog {
    fn signal(&self, message: MsiMessage) {
        lock(&self.0).push(message);
    }
}

/// Keeps power events.
#[derive(Default)]
pub(crate) struct PowerLog(Mutex<Vec<PowerEvent>>);

impl PowerLog {
    pub(crate) fn events(&self) -> Vec<PowerEvent> {
        lock(&self.0).clone()
    }
}

impl PowerSink for PowerLog {
    fn request(&self, event: PowerEvent) {
        lock(&self.0).push(event);
    }
}

/// Keeps output.
#[derive(Clone, Default)]
pub(crate) struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        lock(&self.0).clone()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A buffer of a chain.
pub(crate) enum Buffer {
    /// The device reads this.
    Out(Vec<u8>),
    /// The device writes up to this many bytes.
    In(usize),
}

const QUEUE_SIZE: u16 = 16;
const QUEUE_STRIDE: u64 = 0x1_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x3000;
const RAM: usize = 1 << 20;

/// A driver with its device.
pub(crate) struct Driver {
    pub(crate) device: Arc<VirtioPci>,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) msi: Arc<MsiLog>,
    next: Vec<(u16, u16)>,
}

impl Driver {
    /// Brings `device` up as a driver does.
    pub(crate) fn start(device: Box<dyn VirtioDevice>) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let msi = Arc::new(MsiLog::default());
        let queues = device.queue_sizes().len();
        let device = VirtioPci::new(device, memory.clone(), msi.clone()).unwrap();
        let driver = Self {
            device: Arc::new(device),
            memory,
            msi,
            next: vec![(0, 0); queues],
        };
        driver.enable_msix();
        driver.negotiate();
        (0..queues as u16).for_each(|queue| driver.enable_queue(queue));
        driver.write(0x14, &[0xf]);
        assert_eq!(driver.status(), 0xf);
        driver
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        self.device.write_bar(0, offset, data);
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read_bar(0, offset, &mut data);
        data
    }

    pub(crate) fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    fn enable_msix(&self) {
        for vector in 0..=self.next.len() as u64 {
            self.write(0x4000 + vector * 16, &0xfee0_0000_u32.to_le_bytes());
            self.write(0x4008 + vector * 16, &(vector as u32).to_le_bytes());
            self.write(0x400c + vector * 16, &0_u32.to_le_bytes());
        }
        let mut at = 0x34;
        loop {
            let mut link = [0; 2];
            self.device.read_config(at, &mut link[..1]);
            at = u16::from(link[0]);
            assert_ne!(at, 0, "no MSI-X capability");
            self.device.read_config(at, &mut link);
            if link[0] == crate::pci::msix::CAPABILITY {
                break self.device.write_config(at + 2, &[0, 0x80]);
            }
            at += 1;
        }
    }

    fn negotiate(&self) {
        self.write(0x14, &[0x3]);
        let offered = [0_u32, 1].map(|select| {
            self.write(0x00, &select.to_le_bytes());
            u32::from_le_bytes(self.read(0x04))
        });
        assert_ne!(u64::from(offered[1]) << 32 & FEATURE_VERSION_1, 0);
        for (select, features) in [0_u32, 1].iter().zip(offered) {
            self.write(0x08, &select.to_le_bytes());
            self.write(0x0c, &features.to_le_bytes());
        }
        self.write(0x14, &[0xb]);
        assert_eq!(self.status(), 0xb, "FEATURES_OK");
    }

    fn enable_queue(&self, queue: u16) {
        let base = u64::from(queue) * QUEUE_STRIDE;
        self.write(0x16, &queue.to_le_bytes());
        self.write(0x18, &QUEUE_SIZE.to_le_bytes());
        self.write(0x1a, &(queue + 1).to_le_bytes());
        self.write(0x20, &base.to_le_bytes());
        self.write(0x28, &(base + AVAIL).to_le_bytes());
        self.write(0x30, &(base + USED).to_le_bytes());
        self.write(0x1c, &1_u16.to_le_bytes());
    }

    /// Makes `buffers` available on `queue` as one chain, without a notification.
    pub(crate) fn offer(&mut self, queue: u16, buffers: &[Buffer]) {
        let base = u64::from(queue) * QUEUE_STRIDE;
        let (available, _) = self.next[usize::from(queue)];
        let head = available * 4 % QUEUE_SIZE;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = head + i as u16;
            let at = base + BUFFERS + u64::from(index) * 0x800;
            let (len, mut flags) = match buffer {
                Buffer::Out(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
                    (bytes.len(), 0_u16)
                }
                Buffer::In(len) => (*len, 2),
            };
            flags |= u16::from(i + 1 < buffers.len());
            let descriptor = GuestAddress(base + u64::from(index) * 16);
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend((len as u32).to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((index + 1).to_le_bytes());
            self.memory.write_slice(&bytes, descriptor).unwrap();
        }
        let slot = base + AVAIL + 4 + u64::from(available % QUEUE_SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        let available = available + 1;
        self.next[usize::from(queue)].0 = available;
        let index = GuestAddress(base + AVAIL + 2);
        self.memory.write_obj(available, index).unwrap();
    }

    /// Notifies `queue`.
    pub(crate) fn notify(&self, queue: u16) {
        self.write(0x3000 + u64::from(queue) * 4, &queue.to_le_bytes());
    }

    /// The next used chain of `queue`: the bytes in its device-written buffers, cut to the length
    /// that the device reported.
    pub(crate) fn used(&mut self, queue: u16) -> Option<Vec<u8>> {
        let (mut bytes, len) = self.used_whole(queue)?;
        bytes.truncate(len);
        Some(bytes)
    }

    /// All bytes in its device-written buffers, and the length that the device reported.
    pub(crate) fn used_whole(&mut self, queue: u16) -> Option<(Vec<u8>, usize)> {
        let base = u64::from(queue) * QUEUE_STRIDE;
        let seen = self.next[usize::from(queue)].1;
        let index: u16 = self.memory.read_obj(GuestAddress(base + USED + 2)).unwrap();
        if index == seen {
            return None;
        }
        self.next[usize::from(queue)].1 = seen + 1;
        let slot = base + USED + 4 + u64::from(seen % QUEUE_SIZE) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        // With event indices: "interrupt me at the next one".
        let event = base + AVAIL + 4 + u64::from(QUEUE_SIZE) * 2;
        self.memory
            .write_obj(seen + 1, GuestAddress(event))
            .unwrap();
        Some((self.writable_bytes(base, u64::from(head)), len as usize))
    }

    fn writable_bytes(&self, base: u64, head: u64) -> Vec<u8> {
        let mut all = Vec::new();
        let mut index = head;
        loop {
            let at = base + index * 16;
            let address: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(at + 8)).unwrap();
            let flags: u16 = self.memory.read_obj(GuestAddress(at + 12)).unwrap();
            if flags & 2 != 0 {
                let mut bytes = vec![0; len as usize];
                self.memory
                    .read_slice(&mut bytes, GuestAddress(address))
                    .unwrap();
                all.extend(bytes);
            }
            if flags & 1 == 0 {
                return all;
            }
            index += 1;
        }
    }
}
