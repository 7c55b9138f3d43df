//! Random numbers and random damage, the same for the same seed.

use fastrand::Rng;

/// Draws what nobody expects.
pub(crate) struct Garbage(Rng);

impl Garbage {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Rng::with_seed(seed))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0.u64(..)
    }

    /// Below `end`, which is not zero.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0.usize(..end)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.fill(&mut bytes);
        bytes
    }

    /// The same image cut short, with other bytes in it, or with numbers that programmers forget.
    pub(crate) fn broken(&mut self, image: &[u8]) -> Vec<u8> {
        let mut image = image.to_vec();
        for _ in 0..=self.below(4) {
            self.damage(&mut image);
        }
        image
    }

    fn damage(&mut self, image: &mut Vec<u8>) {
        const HEADERS: usize = 0x300;
        let len = image.len();
        if len < 16 {
            return;
        }
        // Headers are where damage tells.
        let at = match self.below(4) {
            0 => self.below(len - 8),
            _ => self.below(HEADERS.min(len - 8)),
        };
        match self.below(6) {
            0 => image.truncate(self.below(len)),
            1 => image[at] ^= 1 << self.below(8),
            2 => image[at] = self.0.u8(..),
            3 => {
                let edge: u32 = [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff][self.below(5)];
                image[at..at + 4].copy_from_slice(&edge.to_le_bytes());
            }
            4 => {
                let edge = [0, u64::MAX, 1 << 63, 0xffff_f000, 1 << 40][self.below(5)];
                image[at..at + 8].copy_from_slice(&edge.to_le_bytes());
            }
            _ => {
                let count = 1 + self.below(64.min(len - at));
                let other = self.bytes(count);
                image[at..at + count].copy_from_slice(&other);
            }
        }
    }
}
