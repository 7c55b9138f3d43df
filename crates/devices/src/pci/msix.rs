//! MSI-X: a table of messages, one for each vector (PCI Local Bus 3.0, 6.8.2).
//!
//! A message is a store of `data` to `address`, which the interrupt controller takes as an
//! interrupt. A vector that is masked when it fires stays pending, and fires when it is unmasked.

use std::sync::Arc;

use addr::Gpa;

/// Capability ID.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of one table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Offset of message control in the capability.
pub const CONTROL_OFFSET: u16 = 2;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
const VECTOR_MASKED: u32 = 1;

/// A message on its way to an interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where it is stored to.
    pub address: Gpa,
    /// What is stored.
    pub data: u32,
}

/// Who delivers messages.
pub trait MsiSink: Send + Sync {
    /// Delivers one, from any thread.
    fn signal(&self, message: MsiMessage);
}

#[derive(Clone, Copy)]
struct Entry {
    words: [u32; 4],
    pending: bool,
}

/// The table with its pending bits.
pub struct MsixTable {
    entries: Vec<Entry>,
    control: u16,
    sink: Arc<dyn MsiSink>,
}

impl MsixTable {
    /// A table of `vectors` masked vectors.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        let empty = Entry {
            words: [0, 0, 0, VECTOR_MASKED],
            pending: false,
        };
        Self {
            entries: vec![empty; usize::from(vectors)],
            control: 0,
            sink,
        }
    }

    /// The capability's body, for a table and a pending-bit array behind BAR 0, and the bits of it
    /// that software may write.
    pub fn capability(&self, table: u32, pending: u32) -> ([u8; 10], [u8; 10]) {
        let mut body = [0; 10];
        let size = self.entries.len() as u16 - 1;
        body[0..2].copy_from_slice(&size.to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..10].copy_from_slice(&pending.to_le_bytes());
        let mut writable = [0; 10];
        writable[0..2].copy_from_slice(&(FUNCTION_MASK | ENABLE).to_le_bytes());
        (body, writable)
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Message control was written.
    pub fn set_control(&mut self, control: u16) {
        self.control = control;
        for vector in 0..self.entries.len() {
            self.fire_if_pending(vector);
        }
    }

    /// Signals `vector`; one that does not exist is nobody's.
    pub fn signal(&mut self, vector: u16) {
        if let Some(entry) = self.entries.get_mut(usize::from(vector)) {
            entry.pending = true;
            self.fire_if_pending(usize::from(vector));
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset as usize + i;
            let entry = self.entries.get(at / ENTRY_SIZE as usize);
            *byte = entry.map_or(0, |e| e.words[at / 4 % 4].to_le_bytes()[at % 4]);
        }
    }

    /// Writes the table: aligned doublewords or quadwords, as the specification demands; other
    /// accesses are ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for (i, chunk) in data.chunks_exact(4).enumerate() {
            let at = offset as usize / 4 + i;
            let value = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            if let Some(entry) = self.entries.get_mut(at / 4) {
                entry.words[at % 4] = value;
                self.fire_if_pending(at / 4);
            }
        }
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize + i) * 8;
            let bits = self.entries.iter().skip(first).take(8);
            *byte = bits
                .rev()
                .fold(0, |byte, entry| byte << 1 | u8::from(entry.pending));
        }
    }

    fn fire_if_pending(&mut self, vector: usize) {
        let entry = &mut self.entries[vector];
        let open = self.control & (ENABLE | FUNCTION_MASK) == ENABLE
            && entry.words[3] & VECTOR_MASKED == 0;
        if entry.pending && open {
            entry.pending = false;
            let address = u64::from(entry.words[1]) << 32 | u64::from(entry.words[0]);
            self.sink.signal(MsiMessage {
                address: Gpa::new(address),
                data: entry.words[2],
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::MsiLog;

    fn table() -> (MsixTable, Arc<MsiLog>) {
        let log = Arc::new(MsiLog::default());
        (MsixTable::new(3, log.clone()), log)
    }

    fn program(table: &mut MsixTable, vector: u64) {
        table.write_table(vector * 16, &0xfee0_1000_u32.to_le_bytes());
        table.write_table(vector * 16 + 8, &(0x40 + vector as u32).to_le_bytes());
        table.write_table(vector * 16 + 12, &0_u32.to_le_bytes());
    }

    #[test]
    fn an_open_vector_sends_its_message() {
        let (mut table, log) = table();
        program(&mut table, 1);
        table.set_control(ENABLE);
        table.signal(1);
        let address = Gpa::new(0xfee0_1000);
        assert_eq!(
            log.take(),
            [MsiMessage {
                address,
                data: 0x41
            }]
        );
        table.signal(7);
        assert_eq!(log.take(), []);
    }

    #[test]
    fn a_masked_vector_waits_and_shows_in_the_pending_bits() {
        let (mut table, log) = table();
        program(&mut table, 2);
        table.set_control(ENABLE | FUNCTION_MASK);
        table.signal(2);
        let mut pending = [0];
        table.read_pending(0, &mut pending);
        assert_eq!((log.take(), pending), (vec![], [0b100]));
        table.set_control(ENABLE);
        assert_eq!(log.take().len(), 1);
        table.read_pending(0, &mut pending);
        assert_eq!(pending, [0]);
    }
}
