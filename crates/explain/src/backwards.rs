//! The way back: from a place in memory to the guest's mappings that lead there.

use addr::{Gpa, Gva};
use mmu::{Regime, Rights};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use x86::paging::{PagingMode, Pte};

use crate::chain::SlotSide;
use crate::hex;
use crate::view::GuestView;
use crate::walk::rights_words;

/// A page of the guest's that holds the place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestMapping {
    /// The guest virtual address of the byte asked about.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub gva: Gva,
    /// The page's size in bytes.
    pub page_bytes: u64,
    /// What all entries on the way grant.
    pub rights: Vec<String>,
}

/// Who leads to a place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Backwards {
    /// The memory slots that show it.
    pub slots: Vec<SlotSide>,
    /// The guest's mappings of it, from the tables that were searched.
    pub mappings: Vec<GuestMapping>,
    /// Tables that were read.
    pub tables: u64,
    /// Whether all tables below this CR3 were read, and all mappings are listed.
    pub complete: bool,
}

/// Tables that one search reads at most: those of 64 GiB mapped by 4 KiB pages.
const MOST_TABLES: u64 = 40_000;
/// Mappings that one search lists at most.
const MOST_MAPPINGS: usize = 32;

/// Finds the mappings of `targets` below the root of `regime`.
pub(crate) fn search(view: &GuestView<'_>, regime: &Regime, targets: &[Gpa]) -> Backwards {
    let mut search = Search {
        view,
        regime,
        targets,
        found: Backwards {
            complete: true,
            ..Backwards::default()
        },
    };
    let mode = regime.mode();
    if mode == PagingMode::Off {
        search
            .found
            .mappings
            .extend(targets.iter().map(|gpa| GuestMapping {
                gva: Gva::new(gpa.raw()),
                page_bytes: 4096,
                rights: rights_words(Rights::all()),
            }));
        return search.found;
    }
    for (index, top) in regime.tops().into_iter().enumerate() {
        let Some(top) = top else { continue };
        let (level, base) = match mode {
            PagingMode::Pae => (2, (index as u64) << 30),
            _ => (mode.levels(), 0),
        };
        search.table(top, level, base, Rights::all());
    }
    search.found
}

struct Search<'a, 'v> {
    view: &'a GuestView<'v>,
    regime: &'a Regime,
    targets: &'a [Gpa],
    found: Backwards,
}

impl Search<'_, '_> {
    fn table(&mut self, table: Gpa, level: u8, base: u64, rights: Rights) {
        if self.found.tables >= MOST_TABLES {
            self.found.complete = false;
            return;
        }
        self.found.tables += 1;
        let mode = self.regime.mode();
        let mut bytes = [0; 4096];
        if self.view.read(table, &mut bytes).is_err() {
            return;
        }
        let width = mode.entry_bytes() as usize;
        for (index, entry) in bytes.chunks_exact(width).enumerate() {
            let mut word = [0; 8];
            word[..width].copy_from_slice(entry);
            let pte = u64::from_le_bytes(word);
            if pte & Pte::P.bits() != 0 {
                let linear = base | (index as u64) << mode.level_shift(level);
                self.entry(pte, level, linear, rights & Rights::of_entry(pte));
            }
        }
    }

    fn entry(&mut self, pte: u64, level: u8, linear: u64, rights: Rights) {
        if self.regime.reserved_set(level, pte) != 0 {
            return;
        }
        let Some(size) = self.regime.page_size(level, pte) else {
            let below = Gpa::new(pte & self.regime.table_mask());
            if level > 1 {
                self.table(below, level - 1, linear, rights);
            }
            return;
        };
        let page = self.regime.page_address(pte, size);
        for target in self.targets {
            let Some(offset) = target.raw().checked_sub(page) else {
                continue;
            };
            if offset >= size.bytes() {
                continue;
            }
            if self.found.mappings.len() >= MOST_MAPPINGS {
                self.found.complete = false;
                return;
            }
            self.found.mappings.push(GuestMapping {
                gva: canonical(self.regime.mode(), linear + offset),
                page_bytes: size.bytes(),
                rights: rights_words(rights),
            });
        }
    }
}

/// The address that programs use for what the tables translate.
fn canonical(mode: PagingMode, linear: u64) -> Gva {
    if !mode.is_long() {
        return Gva::new(linear);
    }
    let unused = 64 - mode.linear_bits();
    Gva::new(((linear << unused) as i64 >> unused) as u64)
}
