//! A set of guest frames, as ranges: which are private (`KVM_SET_MEMORY_ATTRIBUTES`).

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges of frame numbers that don't touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameSet {
    /// From the first frame to the first behind.
    ranges: BTreeMap<u64, u64>,
}

impl FrameSet {
    /// Whether a frame is in the set.
    pub fn contains(&self, frame: u64) -> bool {
        let before = self.ranges.range(..=frame).next_back();
        before.is_some_and(|(_, end)| frame < *end)
    }

    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        // Those that overlap or touch become one with it.
        while let Some((first, last)) = self.last_before(end + 1).filter(|(_, last)| *last >= start)
        {
            self.ranges.remove(&first);
            start = start.min(first);
            end = end.max(last);
        }
        self.ranges.insert(start, end);
    }

    /// Takes a range away.
    pub fn remove(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((first, last)) = self
            .last_before(range.end)
            .filter(|(_, last)| *last > range.start)
        {
            self.ranges.remove(&first);
            if last > range.end {
                self.ranges.insert(range.end, last);
            }
            if first < range.start {
                self.ranges.insert(first, range.start);
            }
        }
    }

    /// The last range that begins before a frame.
    fn last_before(&self, frame: u64) -> Option<(u64, u64)> {
        let (first, last) = self.ranges.range(..frame).next_back()?;
        Some((*first, *last))
    }

    /// A range in pieces, in order: each lies wholly inside the set, or wholly outside.
    pub fn split(&self, range: Range<u64>) -> Vec<(Range<u64>, Inside)> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let covering = self.last_before(at + 1).filter(|(_, last)| *last > at);
            let (end, inside) = if let Some((_, last)) = covering {
                (last, Inside::Yes)
            } else {
                let next = self.ranges.range(at..).next();
                (next.map_or(range.end, |(first, _)| *first), Inside::No)
            };
            let end = end.min(range.end);
            pieces.push((at..end, inside));
            at = end;
        }
        pieces
    }
}

/// Whether a piece lies in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inside {
    /// All of it.
    Yes,
    /// Nothing of it.
    No,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_and_part() {
        let mut set = FrameSet::default();
        set.insert(10..20);
        set.insert(30..40);
        set.insert(20..30);
        assert_eq!(set.ranges, BTreeMap::from([(10, 40)]));
        set.remove(&(15..35));
        assert_eq!(set.ranges, BTreeMap::from([(10, 15), (35, 40)]));
        set.remove(&(0..100));
        assert_eq!(set, FrameSet::default());
    }

    #[test]
    fn a_range_is_split_at_every_border() {
        let mut set = FrameSet::default();
        set.insert(2..4);
        set.insert(6..8);
        let pieces = set.split(3..10);
        let expected = [
            (3..4, Inside::Yes),
            (4..6, Inside::No),
            (6..8, Inside::Yes),
            (8..10, Inside::No),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    fn it_agrees_with_a_row_of_flags() {
        let mut set = FrameSet::default();
        let mut flags = [false; 64];
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..5000 {
            let (a, b) = (random.usize(..65), random.usize(..65));
            let range = a.min(b)..a.max(b);
            let add = random.bool();
            flags[range.clone()].fill(add);
            let frames = range.start as u64..range.end as u64;
            if add {
                set.insert(frames);
            } else {
                set.remove(&frames);
            }
            for (frame, flag) in flags.iter().enumerate() {
                assert_eq!(set.contains(frame as u64), *flag, "{frame} of {set:?}");
            }
            let pieces = set.split(0..64);
            assert_eq!(pieces.first().map(|p| p.0.start), Some(0));
            assert!(pieces.windows(2).all(|p| p[0].1 != p[1].1));
        }
    }
}
