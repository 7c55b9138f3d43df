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

/// Bits for the entries of three tables, one for each view; `WORDS` words of 64 entries each.
///
/// At most one of an entry's two bits is set.
#[derive(Clone, Debug)]
pub(crate) struct Filled<const WORDS: usize> {
    local: [[u64; WORDS]; 3],
    global: [[u64; WORDS]; 3],
}

impl<const WORDS: usize> Default for Filled<WORDS> {
    fn default() -> Self {
        Self {
            local: [[0; WORDS]; 3],
            global: [[0; WORDS]; 3],
        }
    }
}

/// Hands each set bit to `each` and clears it.
fn drain<const WORDS: usize>(bits: &mut [[u64; WORDS]; 3], mut each: impl FnMut(View, usize)) {
    for (view, words) in View::ALL.into_iter().zip(bits) {
        for (index, word) in words.iter_mut().enumerate() {
            let mut left = std::mem::take(word);
            while left != 0 {
                each(view, index * 64 + left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
    }
}

impl<const WORDS: usize> Filled<WORDS> {
    /// An entry was made.
    pub(crate) fn mark(&mut self, view: View, at: usize, scope: Scope) {
        let (word, bit) = (at / 64, 1 << (at % 64));
        let (set, clear) = match scope {
            Scope::Local => (&mut self.local, &mut self.global),
            Scope::Global => (&mut self.global, &mut self.local),
        };
        set[view as usize][word] |= bit;
        clear[view as usize][word] &= !bit;
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
}
