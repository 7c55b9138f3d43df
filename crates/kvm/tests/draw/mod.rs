//! Draws among choices. A seed gives the same sequence in every run.

use fastrand::Rng;

pub(crate) trait Draw {
    /// One of these, all alike.
    fn pick<T: Copy>(&mut self, choices: &[T]) -> T;
    /// Often one of the usual values, at times anything.
    fn mostly<T: Copy>(&mut self, choices: &[T], other: impl FnOnce(u64) -> T) -> T;
}

impl Draw for Rng {
    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.usize(..choices.len())]
    }

    fn mostly<T: Copy>(&mut self, choices: &[T], other: impl FnOnce(u64) -> T) -> T {
        if self.u8(..12) == 0 {
            other(self.u64(..))
        } else {
            self.pick(choices)
        }
    }
}
