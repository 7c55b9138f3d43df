//! The local APIC's register page (SDM 3A, 12.4.1): offsets, fields, and the page itself.
//!
//! The page is an array of atomics: other threads set bits of IRR and TMR while the vCPU's own
//! thread reads and writes everything else. It keeps all 1 KiB that `KVM_SET_LAPIC` brings, also
//! the bytes between the registers, because `KVM_GET_LAPIC` gives them back.

use std::sync::atomic::{AtomicU32, Ordering};

/// Offsets of registers.
#[allow(missing_docs, reason = "the SDM's names")]
pub mod reg {
    pub const ID: u32 = 0x20;
    pub const LVR: u32 = 0x30;
    pub const TASKPRI: u32 = 0x80;
    pub const ARBPRI: u32 = 0x90;
    pub const PROCPRI: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SPIV: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const LVTCMCI: u32 = 0x2f0;
    pub const ICR: u32 = 0x300;
    pub const ICR2: u32 = 0x310;
    pub const LVTT: u32 = 0x320;
    pub const LVTTHMR: u32 = 0x330;
    pub const LVTPC: u32 = 0x340;
    pub const LVT0: u32 = 0x350;
    pub const LVT1: u32 = 0x360;
    pub const LVTERR: u32 = 0x370;
    pub const TMICT: u32 = 0x380;
    pub const TMCCT: u32 = 0x390;
    pub const TDCR: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Bits of an LVT entry.
#[allow(missing_docs, reason = "the SDM's names")]
pub mod lvt {
    pub const VECTOR: u32 = 0xff;
    pub const MODE: u32 = 0x700;
    pub const MODE_NMI: u32 = 0x400;
    pub const MODE_EXTINT: u32 = 0x700;
    pub const SEND_PENDING: u32 = 1 << 12;
    pub const POLARITY: u32 = 1 << 13;
    pub const REMOTE_IRR: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
    pub const MASKED: u32 = 1 << 16;
    pub const TIMER_ONESHOT: u32 = 0;
    pub const TIMER_PERIODIC: u32 = 1 << 17;
    pub const TIMER_TSC_DEADLINE: u32 = 2 << 17;
}

/// APIC software enable, in the spurious-vector register.
pub const SPIV_ENABLED: u32 = 1 << 8;
/// Suppression of EOI broadcasts, in the spurious-vector register.
pub const SPIV_DIRECTED_EOI: u32 = 1 << 12;
/// The version register says that [`SPIV_DIRECTED_EOI`] exists.
pub const LVR_DIRECTED_EOI: u32 = 1 << 24;
/// The delivery status of the ICR: always idle here.
pub const ICR_BUSY: u32 = 1 << 12;
/// The flat model in the destination format register.
pub const DFR_FLAT: u32 = 0xffff_ffff;
/// The cluster model in the destination format register.
pub const DFR_CLUSTER: u32 = 0x0fff_ffff;
/// The most LVT entries that there can be (with CMCI).
pub const MAX_LVT_ENTRIES: u8 = 7;

/// The register of LVT entry `index` (0 timer, 1 thermal, 2 performance, 3 LINT0, 4 LINT1,
/// 5 error, 6 CMCI).
pub fn lvt_register(index: u8) -> u32 {
    match index {
        6 => reg::LVTCMCI,
        _ => reg::LVTT + 0x10 * u32::from(index),
    }
}

/// The inverse of [`lvt_register`].
pub fn lvt_index(register: u32) -> Option<u8> {
    match register {
        reg::LVTCMCI => Some(6),
        reg::LVTT..=reg::LVTERR => Some(((register - reg::LVTT) >> 4) as u8),
        _ => None,
    }
}

/// The bits of LVT entry `index` that can be written (the timer's mode bits come on top).
pub fn lvt_writable(index: u8) -> u32 {
    let plain = lvt::MASKED | lvt::SEND_PENDING | lvt::VECTOR;
    match index {
        1 | 2 | 6 => plain | lvt::MODE,
        3 | 4 => plain | lvt::MODE | lvt::POLARITY | lvt::REMOTE_IRR | lvt::LEVEL,
        _ => plain,
    }
}

/// The logical ID that x2APIC mode derives from an ID (SDM 3A, 12.12.10.2).
pub fn x2apic_ldr(id: u32) -> u32 {
    ((id >> 4) << 16) | (1 << (id & 0xf))
}

/// The divisor that the divide configuration register selects.
pub fn divisor(tdcr: u32) -> u32 {
    let code = (tdcr & 0x3) | ((tdcr & 0x8) >> 1);
    1 << ((code + 1) & 7)
}

/// The size of the page as `KVM_GET_LAPIC` shows it.
pub const PAGE_BYTES: usize = 1024;

/// The register page.
#[derive(Debug)]
pub struct RegisterPage([AtomicU32; PAGE_BYTES / 4]);

impl Default for RegisterPage {
    fn default() -> RegisterPage {
        RegisterPage([const { AtomicU32::new(0) }; PAGE_BYTES / 4])
    }
}

impl RegisterPage {
    fn word(&self, offset: u32) -> &AtomicU32 {
        &self.0[offset as usize / 4]
    }

    /// Reads the register at `offset` (below 1 KiB).
    pub fn get(&self, offset: u32) -> u32 {
        self.word(offset).load(Ordering::Relaxed)
    }

    /// Writes the register at `offset` (below 1 KiB).
    pub fn set(&self, offset: u32, value: u32) {
        self.word(offset).store(value, Ordering::Relaxed);
    }

    fn vector_word(&self, bitmap: u32, vector: u8) -> (&AtomicU32, u32) {
        (
            self.word(bitmap + 0x10 * u32::from(vector / 32)),
            1 << (vector % 32),
        )
    }

    /// Whether the vector's bit is set in the bitmap (`reg::ISR`, `reg::TMR` or `reg::IRR`).
    pub fn test(&self, bitmap: u32, vector: u8) -> bool {
        let (word, bit) = self.vector_word(bitmap, vector);
        word.load(Ordering::Relaxed) & bit != 0
    }

    /// Sets the vector's bit. What the poster wrote before is visible to who sees the bit.
    pub fn set_vector(&self, bitmap: u32, vector: u8) {
        let (word, bit) = self.vector_word(bitmap, vector);
        word.fetch_or(bit, Ordering::SeqCst);
    }

    /// Clears the vector's bit.
    pub fn clear_vector(&self, bitmap: u32, vector: u8) {
        let (word, bit) = self.vector_word(bitmap, vector);
        word.fetch_and(!bit, Ordering::SeqCst);
    }

    /// The highest vector in the bitmap.
    pub fn highest(&self, bitmap: u32) -> Option<u8> {
        (0..8u8).rev().find_map(|i| {
            let bits = self
                .word(bitmap + 0x10 * u32::from(i))
                .load(Ordering::SeqCst);
            (bits != 0).then(|| 32 * i + (31 - bits.leading_zeros() as u8))
        })
    }

    /// Copies the page out.
    pub fn save(&self) -> [u8; PAGE_BYTES] {
        let mut bytes = [0; PAGE_BYTES];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(&self.0) {
            chunk.copy_from_slice(&word.load(Ordering::SeqCst).to_le_bytes());
        }
        bytes
    }

    /// Replaces the whole page.
    pub fn restore(&self, bytes: &[u8; PAGE_BYTES]) {
        let (chunks, _) = bytes.as_chunks::<4>();
        for (chunk, word) in chunks.iter().zip(&self.0) {
            word.store(u32::from_le_bytes(*chunk), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divide_configuration_as_the_manual_lists_it() {
        let listed = [
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (10, 128),
            (11, 1),
        ];
        for (tdcr, by) in listed {
            assert_eq!(divisor(tdcr), by, "TDCR {tdcr}");
        }
    }

    #[test]
    fn highest_vector_over_all_words() {
        let page = RegisterPage::default();
        assert_eq!(page.highest(reg::IRR), None);
        for vector in [16, 31, 32, 200, 255] {
            page.set_vector(reg::IRR, vector);
            assert_eq!(page.highest(reg::IRR), Some(vector));
        }
        page.clear_vector(reg::IRR, 255);
        assert_eq!(page.highest(reg::IRR), Some(200));
        assert_eq!(page.highest(reg::ISR), None);
    }

    #[test]
    fn lvt_entries_and_their_registers() {
        for index in 0..MAX_LVT_ENTRIES {
            assert_eq!(lvt_index(lvt_register(index)), Some(index));
        }
        assert_eq!(lvt_index(reg::TMICT), None);
    }
}
