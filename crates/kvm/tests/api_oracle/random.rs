//! Xorshift: a seed gives the same sequence in every run.

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 20) % limit
    }

    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Often one of the usual values, at times anything.
    pub(crate) fn mostly<T: Copy>(&mut self, choices: &[T], other: impl FnOnce(u64) -> T) -> T {
        if self.below(12) == 0 {
            other(self.next())
        } else {
            self.pick(choices)
        }
    }
}
