//! The TLBs beside a naive model, over random fills, switches and invalidations: what is found was
//! filled for the present address space, or is global, and nothing has invalidated it since.

use std::collections::HashMap;

use addr::{Gva, Hva, PageSize};
use fastrand::Rng;

use super::filled::Scope;
use super::frame::{InlineTlb, TLB_ENTRIES, View, XTLB_ENTRIES};
use super::tlb::{Extent, Rights, Tlb, TlbBook};

/// Page tables 1 and 2 with PCIDs 1 and 2, and table 3 with PCID 1 again.
const SPACES: [u64; 3] = [0x1001, 0x2002, 0x3001];
const PAGES: u64 = 12;

/// What may be found: by owner (`None`: all), view and page, where it leads and whether it may be
/// written.
type Model = HashMap<(Option<u64>, u8, u64), (u64, bool)>;

/// Pages of which some share an entry.
fn page_address(page: u64) -> u64 {
    ((page % 4) + (page / 4) * TLB_ENTRIES as u64) << 12
}

fn fill(tlb: &mut Tlb<'_>, model: &mut Model, random: &mut Rng, cr3: u64) {
    let view = View::ALL[random.usize(..3)];
    let page = random.u64(..PAGES);
    let leads = random.u64(..1 << 20) << 12;
    let write = random.bool();
    let (scope, owner) = if random.u64(..3) == 0 {
        (Scope::Global, None)
    } else {
        (Scope::Local, Some(cr3))
    };
    let extent = Extent {
        size: PageSize::Size4K,
        scope,
    };
    let rights = Rights { read: true, write };
    let gva = Gva::new(page_address(page));
    tlb.fill(view, gva, Hva::new(leads), extent, rights);
    model.remove(&(None, view as u8, page));
    model.remove(&(Some(cr3), view as u8, page));
    model.insert((owner, view as u8, page), (leads, write));
}

fn invalidate(tlb: &mut Tlb<'_>, model: &mut Model, random: &mut Rng, cr3: u64) {
    match random.u64(..24) {
        0 => {
            tlb.flush();
            model.clear();
        }
        1 => {
            tlb.flush_all_local();
            model.retain(|(owner, ..), _| owner.is_none());
        }
        2..5 => {
            tlb.flush_local();
            model.retain(|(owner, ..), _| *owner != Some(cr3));
        }
        5..8 => {
            let pcid = 1 + random.u64(..2);
            tlb.flush_aside(pcid as u16);
            model.retain(|(owner, ..), _| owner.is_none_or(|o| o == cr3 || o & 0xfff != pcid));
        }
        8 => {
            tlb.flush_writes();
            for (_, write) in model.values_mut() {
                *write = false;
            }
        }
        _ => {
            let page = random.u64(..PAGES);
            tlb.flush_page(Gva::new(page_address(page)));
            model.retain(|(owner, _, p), _| *p != page || owner.is_some_and(|o| o != cr3));
        }
    }
}

/// How many entries are found; all of them must be the model's.
fn compare(tlb: &Tlb<'_>, model: &Model, cr3: u64) -> u64 {
    let mut found = 0;
    for view in View::ALL {
        for page in 0..PAGES {
            for writes in [false, true] {
                let gva = Gva::new(page_address(page));
                let Some(hva) = tlb.find(view, gva, 1, writes) else {
                    continue;
                };
                let allowed = [None, Some(cr3)].into_iter().any(|owner| {
                    model
                        .get(&(owner, view as u8, page))
                        .is_some_and(|(leads, write)| *leads == hva.raw() && (*write || !writes))
                });
                assert!(allowed, "{view:?} {gva:?} in {cr3:#x} leads to {hva:?}");
                found += 1;
            }
        }
    }
    found
}

fn empty() -> (Box<[InlineTlb; 3]>, Box<[[u32; XTLB_ENTRIES]; 3]>) {
    // Zeroed on the heap, because three of them are more than a stack should hold.
    let mut data: Box<[InlineTlb; 3]> = zeroed();
    for table in data.iter_mut() {
        table.read.fill(1);
        table.write.fill(1);
    }
    (data, Box::new([[0; XTLB_ENTRIES]; 3]))
}

#[expect(unsafe_code, reason = "tables of integers, made on the heap")]
fn zeroed() -> Box<[InlineTlb; 3]> {
    // SAFETY: integers alone, of which zero is a value.
    unsafe { Box::new_zeroed().assume_init() }
}

#[test]
fn nothing_stale_is_found() {
    let (mut data, mut code) = empty();
    let mut book = TlbBook::default();
    let mut tlb = Tlb {
        data: &mut data,
        code: &mut code,
        book: &mut book,
    };
    let mut random = Rng::with_seed(0x2545_f491_4f6c_dd1d);
    let (mut model, mut cr3, mut found) = (Model::new(), SPACES[0], 0);
    for _ in 0..40_000 {
        match random.u64(..10) {
            0..6 => fill(&mut tlb, &mut model, &mut random, cr3),
            6..8 => {
                let to = SPACES[random.usize(..3)];
                if to != cr3 {
                    tlb.switch(cr3, to);
                    cr3 = to;
                }
            }
            _ => invalidate(&mut tlb, &mut model, &mut random, cr3),
        }
        found += compare(&tlb, &model, cr3);
    }
    assert!(found > 100_000, "only {found} entries were ever found");
}

#[test]
fn an_address_space_finds_its_entries_again() {
    let (mut data, mut code) = empty();
    let mut book = TlbBook::default();
    let mut tlb = Tlb {
        data: &mut data,
        code: &mut code,
        book: &mut book,
    };
    let extent = |scope| Extent {
        size: PageSize::Size4K,
        scope,
    };
    let rights = Rights {
        read: true,
        write: true,
    };
    let (own, global) = (Gva::new(0x5000), Gva::new(0x7000));
    tlb.fill(
        View::User,
        own,
        Hva::new(0x9000),
        extent(Scope::Local),
        rights,
    );
    tlb.fill_code(View::User, own, 7, extent(Scope::Local));
    tlb.fill(
        View::User,
        global,
        Hva::new(0xb000),
        extent(Scope::Global),
        rights,
    );
    tlb.switch(SPACES[0], SPACES[1]);
    assert_eq!(tlb.find(View::User, own, 8, false), None);
    assert_eq!(tlb.code[View::User as usize][5], 0);
    assert_eq!(
        tlb.find(View::User, global, 8, true),
        Some(Hva::new(0xb000))
    );
    tlb.switch(SPACES[1], SPACES[0]);
    assert_eq!(tlb.find(View::User, own, 8, true), Some(Hva::new(0x9000)));
    assert_eq!(tlb.code[View::User as usize][5], 7);
}

#[test]
fn a_large_page_goes_with_all_of_its_pieces() {
    let (mut data, mut code) = empty();
    let mut book = TlbBook::default();
    let mut tlb = Tlb {
        data: &mut data,
        code: &mut code,
        book: &mut book,
    };
    let rights = Rights {
        read: true,
        write: false,
    };
    let extent = |size, scope| Extent { size, scope };
    let small = extent(PageSize::Size4K, Scope::Local);
    let large = extent(PageSize::Size2M, Scope::Global);
    let begin = 0xffff_8880_0020_0000;
    let pieces = [0, 0x7000, 0x1f_f000].map(|offset| Gva::new(begin + offset));
    let outside = [0x1f_f000, 0x40_0000].map(|low| Gva::new(0xffff_8880_0000_0000 + low));
    // It stands among their entries.
    let above = Gva::new(begin + 0x8000 + (TLB_ENTRIES as u64) * 4096);
    for gva in pieces {
        tlb.fill(View::Supervisor, gva, Hva::new(0x7000), large, rights);
        tlb.fill_code(View::Supervisor, gva, 3, large);
    }
    for gva in outside.into_iter().chain([above]) {
        tlb.fill(View::Supervisor, gva, Hva::new(0x9000), small, rights);
    }
    tlb.flush_page(Gva::new(begin + 0x12_3456));
    for gva in pieces {
        assert_eq!(tlb.find(View::Supervisor, gva, 8, false), None);
        let at = super::tlb::code_index(gva.frame());
        assert_eq!(tlb.code[View::Supervisor as usize][at], 0);
    }
    for gva in outside.into_iter().chain([above]) {
        assert!(tlb.find(View::Supervisor, gva, 8, false).is_some());
    }
}
