//! What guest code became, for golden files and profiles.

use addr::Gva;

use super::vcpu::Vcpu;

/// One translated block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The block's first instruction.
    pub rip: Gva,
    /// Where the host code runs.
    pub host: u64,
    /// The host code, with its cold part behind.
    pub code: Vec<u8>,
    /// For each guest instruction: offset of its host code, and its own offset from `rip`.
    pub marks: Vec<(usize, u64)>,
}

impl Vcpu {
    /// All that is translated now, in the order in which it was.
    pub fn translations(&self) -> Vec<Translation> {
        let blocks = &self.blocks.blocks;
        let ends = blocks.iter().skip(1).map(|next| next.marks as usize);
        let ends = ends.chain([self.tables.marks.len()]);
        let translation = |(block, end): (&super::blocks::Block, usize)| {
            let marks = self.tables.marks.get(block.marks as usize..end);
            Translation {
                rip: Gva::new(block.rip),
                host: self.cache.base() + u64::from(block.plain),
                code: self.cache.code(block.plain, block.end).to_vec(),
                marks: marks
                    .unwrap_or_default()
                    .iter()
                    .map(|mark| {
                        (
                            mark.host.saturating_sub(block.plain) as usize,
                            mark.guest.into(),
                        )
                    })
                    .collect(),
            }
        };
        blocks.iter().zip(ends).map(translation).collect()
    }
}
