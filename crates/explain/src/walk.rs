//! The guest's half of the way: its tables, entry by entry, and the rule that stops an access.

use addr::{Address, Gva, PageSize};
use mmu::walker::{self, AccessedDirty, GuestPage, Step, WalkFault};
use mmu::{Access, AccessKind, PagingRegisters, Privilege, Regime, Rights};
use x86::control::{Cr0, Cr4, Efer};
use x86::page_fault::PageFaultCode;
use x86::paging::{PagingMode, Pte};

use crate::chain::{GuestEntry, GuestSide, PagingSide};
use crate::decode::{entry_name, error_code_words, mode_name, pte_flags, words};
use crate::view::GuestView;

/// What a walk found.
pub(crate) struct Walked {
    pub(crate) entries: Vec<GuestEntry>,
    pub(crate) side: GuestSide,
    pub(crate) page: Option<GuestPage>,
}

/// Walks the guest's tables for `gva`; changes nothing.
pub(crate) fn walk(
    view: &mut GuestView<'_>,
    regime: &Regime,
    registers: &PagingRegisters,
    gva: Gva,
    access: Access,
) -> Walked {
    let mode = regime.mode();
    if mode.is_long() && !is_canonical(gva, mode.linear_bits()) {
        return Walked {
            entries: Vec::new(),
            side: GuestSide::NotCanonical {
                linear_bits: mode.linear_bits() as u8,
            },
            page: None,
        };
    }
    let mut steps: Vec<Step> = Vec::new();
    let found = {
        let mut record = |step| steps.push(step);
        walker::walk(view, regime, gva, access, AccessedDirty::Leave, &mut record)
    };
    let entries: Vec<_> = steps
        .iter()
        .map(|step| guest_entry(regime, gva, *step))
        .collect();
    let side = match &found {
        Ok(page) => page_side(mode, page),
        Err(WalkFault::Host(fault)) => GuestSide::HostFault { hva: fault.hva },
        Err(WalkFault::Page(fault)) => GuestSide::PageFault {
            error_code: fault.error_code.bits(),
            reasons: error_code_words(fault.error_code),
            rule: Rule {
                regime,
                registers,
                access,
                steps: &steps,
                entries: &entries,
            }
            .of(fault.error_code),
        },
    };
    Walked {
        entries,
        side,
        page: found.ok(),
    }
}

/// Whether the bits that are not translated repeat the highest that is.
fn is_canonical(gva: Gva, bits: u32) -> bool {
    let unused = 64 - bits;
    ((gva.raw() << unused) as i64 >> unused) as u64 == gva.raw()
}

fn guest_entry(regime: &Regime, gva: Gva, step: Step) -> GuestEntry {
    let mode = regime.mode();
    let mut flags = pte_flags(step.value);
    if step.level == 1 {
        // The bit that says "large page" above is one of PAT's here.
        for flag in flags.iter_mut().filter(|f| *f == "PS") {
            "PAT".clone_into(flag);
        }
    }
    let pdpte = mode == PagingMode::Pae && step.level == 3;
    let rights = if pdpte {
        step.rights
    } else {
        step.rights & Rights::of_entry(step.value)
    };
    let present = step.value & Pte::P.bits() != 0;
    GuestEntry {
        name: entry_name(step.level).to_owned(),
        level: step.level,
        index: if pdpte {
            (gva.raw() >> 30) & 3
        } else {
            step.gpa.page_offset(PageSize::Size4K) / mode.entry_bytes()
        },
        gpa: step.gpa,
        value: step.value,
        flags,
        rights: rights_words(rights),
        page_bytes: (present && !pdpte)
            .then(|| regime.page_size(step.level, step.value))
            .flatten()
            .map(PageSize::bytes),
    }
}

fn page_side(mode: PagingMode, page: &GuestPage) -> GuestSide {
    GuestSide::Page {
        gpa: page.gpa,
        // Without paging the walker answers for as much as it can; a person thinks of one address.
        page_bytes: match mode {
            PagingMode::Off => PageSize::Size4K.bytes(),
            _ => page.size.bytes(),
        },
        rights: rights_words(page.rights),
        global: page.global,
        key: page.pkey,
    }
}

pub(crate) fn rights_words(rights: Rights) -> Vec<String> {
    let names = [
        (Rights::WRITE, "write"),
        (Rights::EXECUTE, "execute"),
        (Rights::USER, "user"),
    ];
    let granted = names.iter().filter(|(bit, _)| rights.contains(*bit));
    let granted = granted.map(|(_, name)| *name);
    words(std::iter::once("read").chain(granted))
}

/// The registers of the walk in words.
pub(crate) fn paging_side(regime: &Regime, registers: &PagingRegisters) -> PagingSide {
    let cr4 = Cr4::from_bits_retain(registers.cr4);
    let paged = regime.mode() != PagingMode::Off;
    let nx = Efer::from_bits_retain(registers.efer).contains(Efer::NXE);
    let force = [
        (write_protect(registers), "WP"),
        (cr4.contains(Cr4::SMEP), "SMEP"),
        (cr4.contains(Cr4::SMAP), "SMAP"),
        (nx && regime.mode() != PagingMode::Bits32, "NX"),
        (regime.mode().is_long() && cr4.contains(Cr4::PKE), "PKE"),
        (cr4.contains(Cr4::PGE), "PGE"),
        (cr4.contains(Cr4::PCIDE), "PCIDE"),
    ];
    PagingSide {
        mode: mode_name(regime.mode()).to_owned(),
        cr0: registers.cr0,
        cr3: registers.cr3,
        cr4: registers.cr4,
        efer: registers.efer,
        in_force: words(
            force
                .iter()
                .filter(|(on, _)| *on && paged)
                .map(|(_, name)| *name),
        ),
    }
}

fn write_protect(registers: &PagingRegisters) -> bool {
    Cr0::from_bits_retain(registers.cr0).contains(Cr0::WP)
}

/// Which rule of SDM 3A, chapter 5, an access broke.
struct Rule<'a> {
    regime: &'a Regime,
    registers: &'a PagingRegisters,
    access: Access,
    steps: &'a [Step],
    entries: &'a [GuestEntry],
}

impl Rule<'_> {
    fn of(&self, code: PageFaultCode) -> String {
        let Some((last, entry)) = self.steps.last().zip(self.entries.last()) else {
            return "CR3 points to a table in no memory of the machine".to_owned();
        };
        if !code.contains(PageFaultCode::PRESENT) {
            return not_present(last, entry);
        }
        if code.contains(PageFaultCode::RESERVED) {
            let bits = self.regime.reserved_set(last.level, last.value);
            return format!("the {} has reserved bits set: {bits:#x}", entry.name);
        }
        if code.contains(PageFaultCode::PROTECTION_KEY) {
            let key = Pte::from_bits_retain(last.value).protection_key();
            let pkru = self.registers.pkru;
            return format!("PKRU {pkru:#x} forbids it for pages of protection key {key}");
        }
        self.rights()
    }

    fn rights(&self) -> String {
        let cr4 = Cr4::from_bits_retain(self.registers.cr4);
        let all = self.entries.last().map_or(&[][..], |e| &e.rights);
        let has = |right: &str| all.iter().any(|r| r == right);
        let user = self.access.privilege == Privilege::User;
        match self.access.kind {
            _ if user && !has("user") => {
                format!(
                    "U/S is clear in the {}: the page is the supervisor's",
                    self.who_lacks("user")
                )
            }
            AccessKind::Execute if !has("execute") => {
                format!("NX is set in the {}", self.who_lacks("execute"))
            }
            AccessKind::Execute if !user && cr4.contains(Cr4::SMEP) => {
                "CR4.SMEP: the supervisor may not run code of a user's page".to_owned()
            }
            AccessKind::Read | AccessKind::Write
                if !user && has("user") && cr4.contains(Cr4::SMAP) && self.smap_applies() =>
            {
                "CR4.SMAP: the supervisor may not touch a user's page while EFLAGS.AC is clear"
                    .to_owned()
            }
            AccessKind::Write if !has("write") && user => {
                format!("R/W is clear in the {}", self.who_lacks("write"))
            }
            AccessKind::Write if !has("write") => format!(
                "R/W is clear in the {}, and CR0.WP binds the supervisor, too",
                self.who_lacks("write")
            ),
            _ => "the rights of the page forbid it".to_owned(),
        }
    }

    fn smap_applies(&self) -> bool {
        self.access.privilege != Privilege::SupervisorAcSet
    }

    /// The first entry on the way that does not grant it.
    fn who_lacks(&self, right: &str) -> String {
        let lacks = |entry: &&GuestEntry| !entry.rights.iter().any(|r| r == right);
        let entry = self.entries.iter().find(lacks);
        entry.map_or_else(
            || "entry".to_owned(),
            |entry| format!("{} at gpa {:#x}", entry.name, entry.gpa),
        )
    }
}

fn not_present(last: &Step, entry: &GuestEntry) -> String {
    if last.value & Pte::P.bits() == 0 {
        return format!("the {} at gpa {:#x} has P clear", entry.name, entry.gpa);
    }
    format!(
        "the {} at gpa {:#x} points to a table in no memory of the machine",
        entry.name, entry.gpa
    )
}
