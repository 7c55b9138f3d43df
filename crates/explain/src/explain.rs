//! From evidence to an answer.

use std::sync::Arc;

use addr::{Address, Frame, Gpa, Hpa, Hva, HvaRange, PageSize};
use memory::pagemap::{Pagemap, PagemapError};
use mmu::{Access, Mmu, PagingFeatures, PagingPath, PagingRegisters, Regime};

use crate::backwards::{self, Backwards};
use crate::chain::{Chain, GuestSide, SecondLevel, SlotSide, TlbSide, VcpuSide};
use crate::decode::describe_access;
use crate::host::HostSide;
use crate::question::Target;
use crate::second_level::{Tables, second_level};
use crate::view::{GuestView, HostBytes, OwnBytes, SlotRange};
use crate::walk::{paging_side, walk};

/// Everything that an answer is drawn from.
pub struct Evidence<'a> {
    /// The memory slots.
    pub slots: &'a [SlotRange],
    /// The monitor's memory.
    pub bytes: &'a dyn HostBytes,
    /// The registers that govern translation.
    pub registers: PagingRegisters,
    /// What the guest's CPUID says about paging.
    pub features: PagingFeatures,
    /// Whose registers they are.
    pub vcpu: Option<VcpuSide>,
    /// The accelerator's tables.
    pub tables: Tables<'a>,
    /// What the TLB holds for the address asked about, where that is a guest virtual one.
    pub tlb: Option<TlbSide>,
    /// The page tables of the monitor's process.
    pub pagemap: &'a Pagemap,
}

/// Whether the guest's tables are searched for other ways to the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search {
    /// All tables below CR3.
    Whole,
    /// None.
    No,
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// The address.
    pub target: Target,
    /// What is to be done there.
    pub access: Access,
    /// The way back.
    pub search: Search,
}

/// Follows an address through all four spaces; changes nothing.
pub fn explain(evidence: &Evidence<'_>, question: &Question) -> Result<Chain, PagemapError> {
    Explainer {
        view: GuestView {
            slots: evidence.slots,
            bytes: evidence.bytes,
        },
        regime: Regime::new(&evidence.registers, evidence.features),
        evidence,
        question,
        chain: empty(evidence, question),
    }
    .run()
}

/// The same for a guest virtual address of a machine of this process: its vCPU's registers, and what
/// its CPUID says about paging.
pub fn explain_own(
    mmu: &Arc<Mmu>,
    pagemap: &Pagemap,
    (registers, features): (PagingRegisters, PagingFeatures),
    question: &Question,
) -> Result<Chain, PagemapError> {
    let slots = SlotRange::of_table(&mmu.slots().snapshot(0));
    let evidence = Evidence {
        slots: &slots,
        bytes: &OwnBytes,
        registers,
        features,
        vcpu: None,
        tables: Tables::Ours(mmu),
        tlb: None,
        pagemap,
    };
    explain(&evidence, question)
}

fn empty(evidence: &Evidence<'_>, question: &Question) -> Chain {
    Chain {
        asked: question.target.to_string(),
        symbol: None,
        gva: None,
        access: describe_access(question.access),
        vcpu: evidence.vcpu.clone(),
        paging: None,
        entries: Vec::new(),
        guest: None,
        gpa: None,
        region: None,
        slot: None,
        second_level: None,
        tlb: None,
        host: None,
        backwards: None,
        verdict: String::new(),
        checks: Vec::new(),
        unknown: Vec::new(),
    }
}

struct Explainer<'a> {
    view: GuestView<'a>,
    regime: Regime,
    evidence: &'a Evidence<'a>,
    question: &'a Question,
    chain: Chain,
}

impl Explainer<'_> {
    fn run(mut self) -> Result<Chain, PagemapError> {
        match self.question.target {
            Target::Gva(_) => self.begin_at_virtual()?,
            Target::Gpa(gpa) => self.begin_at_physical(gpa)?,
            Target::Hva(hva) => self.begin_at_host_virtual(hva)?,
            Target::Hpa(hpa) => self.begin_at_host_physical(hpa)?,
        }
        if self.chain.verdict.is_empty() {
            self.chain.verdict = self.verdict();
        }
        Ok(self.chain)
    }

    fn begin_at_virtual(&mut self) -> Result<(), PagemapError> {
        let Target::Gva(gva) = self.question.target else {
            return Ok(());
        };
        let registers = &self.evidence.registers;
        let access = self.question.access;
        let walked = walk(&mut self.view, &self.regime, registers, gva, access);
        self.chain.gva = Some(gva);
        self.chain.paging = Some(paging_side(&self.regime, registers));
        self.chain.entries = walked.entries;
        self.chain.guest = Some(walked.side);
        self.chain.tlb.clone_from(&self.evidence.tlb);
        if let Some(TlbSide::Hidden { why }) = &self.chain.tlb {
            self.chain.unknown.push(format!("the TLB: {why}"));
        }
        match walked.page {
            Some(page) => self.begin_at_physical(page.gpa),
            None => Ok(()),
        }
    }

    fn begin_at_physical(&mut self, gpa: Gpa) -> Result<(), PagemapError> {
        self.chain.gpa = Some(gpa);
        self.chain.slot = self.view.slot(gpa).map(|(slot, offset)| SlotSide {
            range: slot.clone(),
            offset,
        });
        let tables = &self.evidence.tables;
        let second = second_level(tables, &self.regime, self.chain.gva, gpa);
        if let SecondLevel::Hidden { why } = &second {
            self.chain.unknown.push(format!("the second level: {why}"));
        }
        self.chain.second_level = Some(second);
        let Some(hva) = self.view.hva(gpa) else {
            self.search(vec![gpa], None);
            return Ok(());
        };
        self.host(hva)?;
        self.search(vec![gpa], Some(hva));
        Ok(())
    }

    fn begin_at_host_virtual(&mut self, hva: Hva) -> Result<(), PagemapError> {
        let gpas = self.guest_places(hva);
        if let Some(gpa) = gpas.first() {
            return self.begin_at_physical(*gpa);
        }
        self.host(hva)?;
        self.search(Vec::new(), Some(hva));
        "it is the monitor's own memory: in no memory slot, and the guest can't reach it"
            .clone_into(&mut self.chain.verdict);
        Ok(())
    }

    fn begin_at_host_physical(&mut self, hpa: Hpa) -> Result<(), PagemapError> {
        let mut hidden = false;
        for slot in self.evidence.slots {
            let Some(range) = HvaRange::new(slot.hva, slot.bytes) else {
                continue;
            };
            let found = self.evidence.pagemap.find_frame(range, hpa.frame())?;
            hidden |= found.hidden;
            if let Some(page) = found.page {
                let offset = hpa.page_offset(PageSize::Size4K);
                return self.begin_at_host_virtual(page.start().wrapping_add(offset));
            }
        }
        if hidden {
            let why = "the host hides frame numbers from this user: ask as root, or give the \
                       machine's process CAP_SYS_ADMIN";
            self.chain.unknown.push(why.to_owned());
            "it can't be said whether the frame belongs to this machine"
                .clone_into(&mut self.chain.verdict);
        } else {
            "the frame holds no page of this machine's memory slots"
                .clone_into(&mut self.chain.verdict);
        }
        Ok(())
    }

    /// All guest physical addresses of a place in the monitor.
    fn guest_places(&self, hva: Hva) -> Vec<Gpa> {
        let slots = self.evidence.slots.iter();
        slots
            .filter_map(|slot| slot.gpa.checked_add(slot.offset_of_hva(hva)?))
            .collect()
    }

    fn host(&mut self, hva: Hva) -> Result<(), PagemapError> {
        let host = HostSide::read(self.evidence.pagemap, hva)?;
        if host.state == "present, frame hidden" {
            let why = "the frame's number: the host tells it to CAP_SYS_ADMIN alone";
            self.chain.unknown.push(why.to_owned());
        }
        self.chain.host = Some(host);
        Ok(())
    }

    fn search(&mut self, mut gpas: Vec<Gpa>, hva: Option<Hva>) {
        if self.question.search == Search::No {
            return;
        }
        let mut slots = Vec::new();
        if let Some(hva) = hva {
            slots = self
                .evidence
                .slots
                .iter()
                .filter_map(|slot| {
                    Some(SlotSide {
                        range: slot.clone(),
                        offset: slot.offset_of_hva(hva)?,
                    })
                })
                .collect();
            gpas = self.guest_places(hva);
        }
        self.chain.backwards = Some(if gpas.is_empty() {
            Backwards {
                complete: true,
                ..Backwards::default()
            }
        } else {
            Backwards {
                slots,
                ..backwards::search(&self.view, &self.regime, &gpas)
            }
        });
    }

    /// What an access would do, in one sentence.
    fn verdict(&self) -> String {
        let access = &self.chain.access;
        match &self.chain.guest {
            Some(GuestSide::PageFault {
                error_code, rule, ..
            }) => format!("a {access} is a page fault, error code {error_code:#x}: {rule}"),
            Some(GuestSide::NotCanonical { linear_bits }) => format!(
                "a {access} is a general protection fault: bits 63 to {} must all be equal",
                linear_bits - 1
            ),
            Some(GuestSide::HostFault { hva }) => format!(
                "a {access} ends KVM_RUN with EFAULT: the host has no page at {hva:#x}, where a \
                 guest's table lies"
            ),
            Some(GuestSide::Page { .. }) | None => self.verdict_on_memory(),
        }
    }

    fn verdict_on_memory(&self) -> String {
        let access = &self.chain.access;
        let Some(slot) = &self.chain.slot else {
            let gpa = self.chain.gpa.map_or(0, Address::raw);
            return format!(
                "a {access} leaves for the monitor as MMIO: gpa {gpa:#x} is in no memory slot"
            );
        };
        if self.question.access.is_write() && !slot.range.writable {
            return format!("a {access} leaves for the monitor as MMIO: the slot is read-only");
        }
        let how = match (&self.chain.tlb, &self.chain.second_level) {
            (Some(TlbSide::Hit { allows, .. }), _) if allows.iter().any(|a| self.needs(a)) => {
                "by the TLB alone"
            }
            (_, Some(SecondLevel::Nested { entries } | SecondLevel::Shadow { entries })) => {
                match entries.iter().find_map(|e| e.hva.map(|_| e)) {
                    None => "after a fault that fills the accelerator's tables",
                    Some(e)
                        if self.question.access.is_write() && !e.flags.iter().any(|f| f == "W") =>
                    {
                        "after a fault that lets writes through"
                    }
                    Some(_) => "through the accelerator's tables, without a fault of its own",
                }
            }
            (_, Some(SecondLevel::Direct)) => "through the guest's tables and the slot",
            _ => "through the slot",
        };
        format!("a {access} reaches memory, {how}")
    }

    fn needs(&self, allowed: &str) -> bool {
        allowed
            == if self.question.access.is_write() {
                "write"
            } else {
                "read"
            }
    }
}

/// The path of an accelerator of ours in words.
pub fn path_name(path: PagingPath) -> &'static str {
    match path {
        PagingPath::Nested => "nested",
        PagingPath::Shadow => "shadow",
        PagingPath::Direct => "direct",
    }
}
