//! What guest code became, for golden files and profiles.

use addr::{Gva, Hva};

use super::frame::View;
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

/// What the TLB holds for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlbEntry {
    /// Where its byte lies in the monitor.
    pub hva: Hva,
    /// Reads go through without asking.
    pub read: bool,
    /// Writes go through without asking.
    pub write: bool,
}

impl Vcpu {
    /// What the inline TLB of this privilege holds for an address.
    pub fn tlb(&mut self, gva: Gva, privilege: mmu::Privilege) -> Option<TlbEntry> {
        let view = match privilege {
            mmu::Privilege::User => View::User,
            mmu::Privilege::SupervisorAcSet => View::SupervisorAcSet,
            mmu::Privilege::Supervisor | mmu::Privilege::Implicit => View::Supervisor,
        };
        let (hva, rights) = self.view().tlb().peek(view, gva)?;
        Some(TlbEntry {
            hva,
            read: rights.read,
            write: rights.write,
        })
    }

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
