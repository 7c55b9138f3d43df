//! The whole way of one address.

use std::sync::Arc;

use addr::{Address, Gpa, Gva, Hva, PageSize};
use memory::pagemap::{Pagemap, PagemapError};
use memory::slot::Slot;
use mmu::walker::Step;
use mmu::{Access, Fault, Mmu, PagingFeatures, PagingPath, PagingRegisters, Rights, VcpuMmu};
use serde::Serialize;
use x86::paging::PagingMode;

use crate::decode::{describe_access, entry_name, error_code_words, mode_name, pte_flags};
use crate::hex::{hex, hex_option};
use crate::host::HostSide;

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The address.
    pub gva: Gva,
    /// What is to be done there.
    pub access: Access,
    /// The vCPU's registers.
    pub registers: PagingRegisters,
    /// What its CPUID says about paging.
    pub features: PagingFeatures,
}

/// One entry of the guest's tables on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GuestEntry {
    /// `PML4E`, `PDPTE`, `PDE`, `PTE`.
    pub name: &'static str,
    /// 1 is the lowest.
    pub level: u8,
    /// Which entry of its table.
    pub index: u64,
    /// Where it lies.
    #[serde(serialize_with = "hex")]
    pub gpa: Gpa,
    /// What stands there.
    #[serde(serialize_with = "hex")]
    pub value: u64,
    /// Its flags that are set.
    pub flags: Vec<&'static str>,
}

/// Where the guest's tables lead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum GuestSide {
    /// To a page.
    Page {
        /// The byte.
        #[serde(serialize_with = "hex")]
        gpa: Gpa,
        /// The page's size in bytes.
        page_bytes: u64,
        /// What all entries together allow: `read write execute user`.
        rights: Vec<&'static str>,
        /// A global page.
        global: bool,
    },
    /// Nowhere: the guest gets `#PF`.
    PageFault {
        /// What the exception pushes.
        #[serde(serialize_with = "hex")]
        error_code: u32,
        /// The same in words.
        reasons: Vec<&'static str>,
    },
    /// The host has no memory behind a guest table.
    HostFault {
        /// Where.
        #[serde(serialize_with = "hex")]
        hva: Hva,
    },
}

/// The memslot that holds the guest physical address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlotSide {
    /// Its number.
    pub slot: u32,
    /// Its address space.
    pub address_space: u32,
    /// Its first guest physical address.
    #[serde(serialize_with = "hex")]
    pub gpa: Gpa,
    /// Its size in bytes.
    pub bytes: u64,
    /// Where it begins in the monitor.
    #[serde(serialize_with = "hex")]
    pub hva: Hva,
    /// The guest may write.
    pub writable: bool,
    /// Writes are logged.
    pub logs_dirty: bool,
    /// How far into the slot the address is.
    #[serde(serialize_with = "hex")]
    pub offset: u64,
}

/// One entry of our second level on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SecondLevelSide {
    /// 3 is the root.
    pub level: u8,
    /// The entry as it stands in memory; 0 is empty.
    #[serde(serialize_with = "hex")]
    pub value: u64,
    /// Where it leads, if it maps a page.
    #[serde(serialize_with = "hex_option")]
    pub hva: Option<Hva>,
    /// Whether it takes writes.
    pub writable: bool,
}

/// The whole way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chain {
    /// The address asked for.
    #[serde(serialize_with = "hex")]
    pub gva: Gva,
    /// The access asked about.
    pub access: String,
    /// The paging mode.
    pub mode: &'static str,
    /// The guest's entries that were read, from the root on.
    pub entries: Vec<GuestEntry>,
    /// Where they lead.
    pub guest: GuestSide,
    /// The slot, where there is one.
    pub slot: Option<SlotSide>,
    /// Our second level, on the nested path.
    pub second_level: Option<Vec<SecondLevelSide>>,
    /// The host's side, where a slot leads there.
    pub host: Option<HostSide>,
}

impl Chain {
    /// The guest physical address, where the guest's tables lead to one.
    pub fn gpa(&self) -> Option<Gpa> {
        match self.guest {
            GuestSide::Page { gpa, .. } => Some(gpa),
            _ => None,
        }
    }
}

/// Follows an address through all four spaces.
pub fn explain(
    mmu: &Arc<Mmu>,
    pagemap: &Pagemap,
    question: &Question,
) -> Result<Chain, PagemapError> {
    // A vCPU of our own, that runs nothing: a walker with the registers asked about.
    let mut walker = VcpuMmu::new(mmu, u32::MAX);
    let _ = walker.set_features(question.features);
    // It holds no translation that a change of registers could make stale.
    let _ = walker.set_registers(&question.registers);
    let mode = walker.regime().mode();
    let mut entries = Vec::new();
    let mut record = |step: Step| entries.push(guest_entry(mode, question.gva, step));
    let found = walker.probe(question.gva, question.access, &mut record);
    let guest = match found {
        Ok(probe) => GuestSide::Page {
            gpa: probe.page.gpa,
            page_bytes: page_bytes(mode, probe.page.size),
            rights: rights_words(probe.page.rights),
            global: probe.page.global,
        },
        Err(fault) => guest_fault(fault),
    };
    let mut chain = Chain {
        gva: question.gva,
        access: describe_access(question.access),
        mode: mode_name(mode),
        entries,
        guest,
        slot: None,
        second_level: None,
        host: None,
    };
    if let Some(gpa) = chain.gpa() {
        follow_physical(&mut chain, mmu, pagemap, gpa)?;
    }
    Ok(chain)
}

fn follow_physical(
    chain: &mut Chain,
    mmu: &Mmu,
    pagemap: &Pagemap,
    gpa: Gpa,
) -> Result<(), PagemapError> {
    let table = mmu.slots().snapshot(0);
    let slot = table.find(gpa.frame());
    chain.slot = slot.map(|slot| slot_side(slot, gpa));
    if mmu.path() == PagingPath::Nested {
        chain.second_level = Some(second_level(mmu, gpa));
    }
    if let Some(hva) = slot.and_then(|s| s.hva_at(gpa)) {
        chain.host = Some(HostSide::read(pagemap, hva)?);
    }
    Ok(())
}

fn guest_entry(mode: PagingMode, gva: Gva, step: Step) -> GuestEntry {
    let mut flags = pte_flags(step.value);
    if step.level == 1 {
        // The bit that says "large page" above is one of PAT's here.
        for flag in flags.iter_mut().filter(|f| **f == "PS") {
            *flag = "PAT";
        }
    }
    let table_bytes = if mode == PagingMode::Pae && step.level == 3 {
        32
    } else {
        4096
    };
    GuestEntry {
        name: entry_name(step.level),
        level: step.level,
        index: if table_bytes == 32 {
            (gva.raw() >> 30) & 3
        } else {
            step.gpa.page_offset(PageSize::Size4K) / mode.entry_bytes()
        },
        gpa: step.gpa,
        value: step.value,
        flags,
    }
}

/// Without paging the walker answers for as much as it can; a person thinks of one address.
fn page_bytes(mode: PagingMode, size: PageSize) -> u64 {
    match mode {
        PagingMode::Off => PageSize::Size4K.bytes(),
        _ => size.bytes(),
    }
}

fn rights_words(rights: Rights) -> Vec<&'static str> {
    let mut words = vec!["read"];
    let names = [
        (Rights::WRITE, "write"),
        (Rights::EXECUTE, "execute"),
        (Rights::USER, "user"),
    ];
    words.extend(
        names
            .iter()
            .filter(|(bit, _)| rights.contains(*bit))
            .map(|(_, name)| *name),
    );
    words
}

fn guest_fault(fault: Fault) -> GuestSide {
    match fault {
        Fault::Page(fault) => GuestSide::PageFault {
            error_code: fault.error_code.bits(),
            reasons: error_code_words(fault.error_code),
        },
        Fault::Host(fault) => GuestSide::HostFault { hva: fault.hva },
        // A probe asks the guest's tables alone, and these come from what lies behind them.
        Fault::Mmio { gpa, .. } | Fault::ReadOnly { gpa, .. } => GuestSide::Page {
            gpa,
            page_bytes: PageSize::Size4K.bytes(),
            rights: Vec::new(),
            global: false,
        },
    }
}

fn slot_side(slot: &Slot, gpa: Gpa) -> SlotSide {
    let range = slot.range();
    SlotSide {
        slot: slot.id.number().into(),
        address_space: slot.id.address_space() as u32,
        gpa: range.start(),
        bytes: range.len(),
        hva: slot.hva,
        writable: slot.is_writable(),
        logs_dirty: slot.logs_dirty(),
        offset: range.offset_of(gpa).unwrap_or_default(),
    }
}

fn second_level(mmu: &Mmu, gpa: Gpa) -> Vec<SecondLevelSide> {
    let entries = mmu.second_level(0, gpa).into_iter();
    entries
        .map(|entry| SecondLevelSide {
            level: entry.level,
            value: entry.raw,
            hva: entry.hva,
            writable: entry.writable,
        })
        .collect()
}
