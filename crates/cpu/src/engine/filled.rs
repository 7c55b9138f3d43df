//! Which entries of a direct-mapped table are in use, and for whom: one bit each.
//!
//! A flush touches what was filled and nothing else, and a change of the address space leaves the
//! global entries alone.

use super::frame::View;

/// Whose translation it is (SDM 3A, 5.10.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The present address space's.
    Local,
    /// Every address space's.
    Global,
}

/// Bits for the entries of a table; `WORDS` words of 64 entries each.
///
/// A summary says which words may have bits set, so that to look through few entries of a large table
/// takes no longer than through those of a small one: bit `n` stands for the `n`th group of words. It
/// is set wherever one of them is not zero.
#[derive(Clone, Debug)]
struct Bits<const WORDS: usize> {
    summary: u64,
    words: [u64; WORDS],
}

impl<const WORDS: usize> Bits<WORDS> {
    /// Words that share a bit of the summary.
    const GROUP: usize = WORDS.div_ceil(64);
    const EMPTY: Self = Self {
        summary: 0,
        words: [0; WORDS],
    };

    fn set(&mut self, at: usize) {
        self.words[at / 64] |= 1 << (at % 64);
        self.summary |= 1 << (at / 64 / Self::GROUP);
    }

    fn clear(&mut self, at: usize) {
        self.words[at / 64] &= !(1 << (at % 64));
    }

    /// Hands each set bit to `each` and clears it.
    fn drain(&mut self, mut each: impl FnMut(usize)) {
        let mut groups = std::mem::take(&mut self.summary);
        while groups != 0 {
            let first = groups.trailing_zeros() as usize * Self::GROUP;
            groups &= groups - 1;
            let words = &mut self.words[first..WORDS.min(first + Self::GROUP)];
            for (index, word) in (first..).zip(words) {
                let mut left = std::mem::take(word);
                while left != 0 {
                    each(index * 64 + left.trailing_zeros() as usize);
                    left &= left - 1;
                }
            }
        }
    }
}

/// Bits for the entries of three tables, one for each view.
///
/// At most one of an entry's two bits is set.
#[derive(Clone, Debug)]
pub(crate) struct Filled<const WORDS: usize> {
    local: [Bits<WORDS>; 3],
    global: [Bits<WORDS>; 3],
}

impl<const WORDS: usize> Default for Filled<WORDS> {
    fn default() -> Self {
        Self {
            local: [Bits::EMPTY; 3],
            global: [Bits::EMPTY; 3],
        }
    }
}

/// Hands each set bit to `each` and clears it.
fn drain<const WORDS: usize>(bits: &mut [Bits<WORDS>; 3], mut each: impl FnMut(View, usize)) {
    for (view, bits) in View::ALL.into_iter().zip(bits) {
        bits.drain(|at| each(view, at));
    }
}

impl<const WORDS: usize> Filled<WORDS> {
    /// An entry was made.
    pub(crate) fn mark(&mut self, view: View, at: usize, scope: Scope) {
        let (set, clear) = match scope {
            Scope::Local => (&mut self.local, &mut self.global),
            Scope::Global => (&mut self.global, &mut self.local),
        };
        set[view as usize].set(at);
        clear[view as usize].clear(at);
    }

    /// Hands out the entries of the present address space; they count as empty from then on.
    pub(crate) fn drain_local(&mut self, each: impl FnMut(View, usize)) {
        drain(&mut self.local, each);
    }

    /// The same for all entries.
    pub(crate) fn drain_all(&mut self, mut each: impl FnMut(View, usize)) {
        drain(&mut self.local, &mut each);
        drain(&mut self.global, each);
    }

    /// The same for all entries of one view.
    pub(crate) fn drain_of(&mut self, view: View, mut each: impl FnMut(usize)) {
        self.local[view as usize].drain(&mut each);
        self.global[view as usize].drain(each);
    }

    /// Some entries that stand side by side, which stay. Both numbers are multiples of 64.
    pub(crate) fn for_each_in(
        &self,
        start: usize,
        count: usize,
        mut each: impl FnMut(View, usize),
    ) {
        let words = start / 64..(start + count) / 64;
        for view in View::ALL {
            let [local, global] = [&self.local, &self.global]
                .map(|bits| bits[view as usize].words[words.clone()].iter());
            for (index, (local, global)) in words.clone().zip(local.zip(global)) {
                let mut left = local | global;
                while left != 0 {
                    each(view, index * 64 + left.trailing_zeros() as usize);
                    left &= left - 1;
                }
            }
        }
    }

    /// All entries, which stay.
    pub(crate) fn for_each(&self, mut each: impl FnMut(View, usize)) {
        drain(&mut self.local.clone(), &mut each);
        drain(&mut self.global.clone(), each);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_of_its_last_owner() {
        let mut filled = Filled::<2>::default();
        filled.mark(View::User, 5, Scope::Local);
        filled.mark(View::Supervisor, 127, Scope::Local);
        filled.mark(View::User, 5, Scope::Global);
        let mut seen = Vec::new();
        filled.drain_local(|view, at| seen.push((view, at)));
        assert_eq!(seen, [(View::Supervisor, 127)]);
        let mut all = Vec::new();
        filled.for_each(|view, at| all.push((view, at)));
        filled.drain_all(|view, at| all.push((view, at)));
        assert_eq!(all, [(View::User, 5), (View::User, 5)]);
        filled.for_each(|_, _| panic!("empty"));
    }

    #[test]
    fn every_entry_of_a_large_table_is_found() {
        let mut filled = Filled::<200>::default();
        let entries: Vec<_> = (0..200 * 64).step_by(61).collect();
        for &at in &entries {
            filled.mark(View::SupervisorAcSet, at, Scope::Global);
        }
        let mut seen = Vec::new();
        filled.drain_all(|view, at| seen.push((view, at)));
        let expected: Vec<_> = entries
            .iter()
            .map(|at| (View::SupervisorAcSet, *at))
            .collect();
        assert_eq!(seen, expected);
        filled.for_each(|_, _| panic!("empty"));
    }
}
