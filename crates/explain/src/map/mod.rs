//! All of a guest's physical memory at once: what lies where, what of it the accelerator's tables
//! map, and what the host really holds.

mod svg;
mod terminal;

use addr::{Address, Frame, Gpa, Hfn, Hva, HvaRange, PageSize};
use memory::pagemap::{FrameNumber, PageEntry, PageState, Pagemap, PagemapError};
use mmu::{Mmu, PagingPath};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::hex;
use crate::view::SlotRange;

pub use svg::{html, svg};

/// Bytes of a range by what serves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tally {
    /// Mapped by 4 KiB entries of the second level.
    pub mapped_4k: u64,
    /// Mapped by 2 MiB entries.
    pub mapped_2m: u64,
    /// Mapped by 1 GiB entries.
    pub mapped_1g: u64,
    /// In the host's memory.
    pub resident: u64,
    /// Of these, in huge pages, as far as the host tells.
    pub huge: u64,
    /// Of these, of a file or of shared memory.
    pub shared: u64,
    /// In the host's swap space.
    pub swapped: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.mapped_4k += other.mapped_4k;
        self.mapped_2m += other.mapped_2m;
        self.mapped_1g += other.mapped_1g;
        self.resident += other.resident;
        self.huge += other.huge;
        self.shared += other.shared;
        self.swapped += other.swapped;
    }

    /// Bytes that the second level maps.
    pub fn mapped(&self) -> u64 {
        self.mapped_4k + self.mapped_2m + self.mapped_1g
    }
}

/// A range of guest physical memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegionMap {
    /// What the monitor calls it.
    pub name: String,
    /// `ram`, `rom` or `mmio`.
    pub kind: String,
    /// Its first address.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub gpa: Gpa,
    /// Its size.
    pub bytes: u64,
    /// The memory slot that serves it.
    pub slot: Option<u32>,
    /// Where it begins in the monitor.
    #[serde(with = "hex::option")]
    #[schema(value_type = Option<String>)]
    pub hva: Option<Hva>,
    /// All of it together.
    pub total: Tally,
    /// Bytes that one cell stands for; 0 where there are none.
    pub cell_bytes: u64,
    /// The same by equal parts, for pictures.
    pub cells: Vec<Tally>,
}

/// All of a guest's physical memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryMap {
    /// The machine's name.
    pub name: String,
    /// `nested`, `shadow` or `direct`; none where the kernel's KVM runs it.
    pub paging: Option<String>,
    /// Pages that the accelerator's tables map now, by size: 4 KiB, 2 MiB, 1 GiB.
    pub pages: Option<[u64; 3]>,
    /// Bytes of these tables.
    pub table_bytes: Option<u64>,
    /// The ranges, by address.
    pub regions: Vec<RegionMap>,
    /// What could not be seen, and why.
    pub unknown: Vec<String>,
}

/// A range to be mapped.
#[derive(Clone, Debug)]
pub struct Place {
    /// What the monitor calls it.
    pub name: String,
    /// `ram`, `rom` or `mmio`.
    pub kind: String,
    /// Its first address.
    pub gpa: Gpa,
    /// Its size.
    pub bytes: u64,
}

/// What a map is drawn from.
pub struct Survey<'a> {
    /// The machine's name.
    pub name: &'a str,
    /// What lies where.
    pub places: &'a [Place],
    /// The memory slots.
    pub slots: &'a [SlotRange],
    /// The MMU, where it is ours.
    pub mmu: Option<&'a Mmu>,
    /// The page tables of the monitor's process.
    pub pagemap: &'a Pagemap,
    /// Cells for each region, at most.
    pub cells: u64,
}

const PAGE: u64 = 4096;

impl Survey<'_> {
    /// Draws the map.
    pub fn map(&self) -> Result<MemoryMap, PagemapError> {
        let mut hidden = false;
        let regions: Result<Vec<_>, _> = self
            .places
            .iter()
            .map(|place| self.region(place, &mut hidden))
            .collect();
        let mut unknown = Vec::new();
        if hidden {
            let why = "huge pages: the host tells frame numbers to CAP_SYS_ADMIN alone";
            unknown.push(why.to_owned());
        }
        match self.mmu.map(Mmu::path) {
            None => {
                unknown.push("the second level: the kernel's KVM keeps it to itself".to_owned());
            }
            Some(PagingPath::Shadow) => unknown.push(
                "what the shadow tables map, by guest physical address: they are by guest virtual \
                 ones"
                    .to_owned(),
            ),
            Some(PagingPath::Nested | PagingPath::Direct) => {}
        }
        Ok(MemoryMap {
            name: self.name.to_owned(),
            paging: self.mmu.map(|mmu| crate::path_name(mmu.path()).to_owned()),
            pages: self.mmu.map(Mmu::pages),
            table_bytes: self.mmu.map(|mmu| mmu.table_bytes() as u64),
            regions: regions?,
            unknown,
        })
    }

    fn region(&self, place: &Place, hidden: &mut bool) -> Result<RegionMap, PagemapError> {
        let served = self.slots.iter().find_map(|slot| {
            let offset = slot.offset_of(place.gpa)?;
            Some((slot.slot, slot.hva.checked_add(offset)?))
        });
        let mut region = RegionMap {
            name: place.name.clone(),
            kind: place.kind.clone(),
            gpa: place.gpa,
            bytes: place.bytes,
            slot: served.map(|(slot, _)| slot),
            hva: served.map(|(_, hva)| hva),
            total: Tally::default(),
            cell_bytes: 0,
            cells: Vec::new(),
        };
        let Some((_, hva)) = served else {
            return Ok(region);
        };
        let cell = (place.bytes / self.cells.max(1))
            .next_multiple_of(PAGE)
            .max(PAGE);
        region.cell_bytes = cell;
        region.cells = vec![Tally::default(); place.bytes.div_ceil(cell) as usize];
        self.host(&mut region, hva, hidden)?;
        self.second_level(&mut region);
        let mut total = Tally::default();
        for cell in &region.cells {
            total.add(cell);
        }
        region.total = total;
        Ok(region)
    }

    /// What the host holds.
    fn host(
        &self,
        region: &mut RegionMap,
        hva: Hva,
        hidden: &mut bool,
    ) -> Result<(), PagemapError> {
        let Some(range) = HvaRange::new(hva, region.bytes) else {
            return Ok(());
        };
        let first = hva.frame().number();
        let mut huge = HugePages::new(self.pagemap, range);
        let cell = region.cell_bytes;
        self.pagemap.scan(range, |page, entry| {
            let at = (page.number() - first) * PAGE / cell;
            let Some(tally) = region.cells.get_mut(at as usize) else {
                return;
            };
            match entry.state {
                PageState::Absent => {}
                PageState::Swapped { .. } => tally.swapped += PAGE,
                PageState::Present(frame) => {
                    *hidden |= frame == FrameNumber::Hidden;
                    tally.resident += PAGE;
                    tally.huge += if huge.holds(page, entry) { PAGE } else { 0 };
                    tally.shared += if entry.file_or_shared { PAGE } else { 0 };
                }
            }
        })
    }

    /// What the second level maps.
    fn second_level(&self, region: &mut RegionMap) {
        let Some(mmu) = self.mmu.filter(|mmu| mmu.path() == PagingPath::Nested) else {
            return;
        };
        let mut offset = 0;
        while offset < region.bytes {
            let gpa = region.gpa.wrapping_add(offset);
            let Some(last) = mmu.second_level(0, gpa).last().copied() else {
                return;
            };
            let size = match last.level {
                1 => PageSize::Size4K,
                2 => PageSize::Size2M,
                _ => PageSize::Size1G,
            };
            let step = (size.bytes() - gpa.page_offset(size)).min(region.bytes - offset);
            if last.hva.is_some() {
                spread(region, offset, step, size);
            }
            offset += step;
        }
    }
}

/// Adds mapped bytes to the cells that hold them.
fn spread(region: &mut RegionMap, offset: u64, bytes: u64, size: PageSize) {
    let cell = region.cell_bytes;
    let mut at = offset;
    while at < offset + bytes {
        let step = (cell - at % cell).min(offset + bytes - at);
        if let Some(tally) = region.cells.get_mut((at / cell) as usize) {
            *match size {
                PageSize::Size4K => &mut tally.mapped_4k,
                PageSize::Size2M | PageSize::Size4M => &mut tally.mapped_2m,
                PageSize::Size1G => &mut tally.mapped_1g,
            } += step;
        }
        at += step;
    }
}

/// Which pages of a range are huge ones: by the kernel's word on the range, or else (before Linux
/// 6.7, as root) on each frame.
struct HugePages<'a> {
    pagemap: &'a Pagemap,
    /// What is left of the ranges that are huge, in order.
    ranges: Option<std::iter::Peekable<std::vec::IntoIter<HvaRange>>>,
    /// All frames of a huge page lie in one block of 2 MiB, so each is asked about once.
    last: Option<(u64, bool)>,
}

impl<'a> HugePages<'a> {
    fn new(pagemap: &'a Pagemap, range: HvaRange) -> Self {
        let ranges = pagemap.huge_ranges(range);
        Self {
            pagemap,
            ranges: ranges.map(|ranges| ranges.into_iter().peekable()),
            last: None,
        }
    }

    /// Whether this page is huge. Pages are asked about in ascending order.
    fn holds(&mut self, page: Hfn, entry: PageEntry) -> bool {
        let Some(ranges) = &mut self.ranges else {
            return self.holds_frame(entry);
        };
        let at = page.start();
        while ranges.next_if(|range| range.end() <= at).is_some() {}
        ranges.peek().is_some_and(|range| range.contains(at))
    }

    fn holds_frame(&mut self, entry: PageEntry) -> bool {
        const FRAMES: u64 = 512;
        let Some(frame) = entry.frame() else {
            return false;
        };
        let block = frame.number() / FRAMES;
        match self.last {
            Some((known, huge)) if known == block && huge => true,
            _ => {
                let huge = self.pagemap.is_huge_frame(frame);
                self.last = Some((block, huge));
                huge
            }
        }
    }
}
