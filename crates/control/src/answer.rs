//! Answers, drawn from a machine.

use std::collections::BTreeMap;

use addr::{Address, Gpa, Gva, PageSize};
use explain::{
    Chain, Evidence, GuestView, OwnBytes, Question, Search, Tables, Target, VcpuSide,
    map::{MemoryMap, Place, Survey},
    parse_hex,
};
use memory::pagemap::Pagemap;
use mmu::{Access, AccessKind, Mmu, PagingRegisters, Privilege};
use x86::control::{Cr0, Cr4, Efer};

use crate::{
    api::{ExplainQuery, MapQuery, MemoryQuery, StatisticsAnswer},
    machine::{Machine, Trouble, VcpuState},
    routes::{checked_end, number},
    vm::effective,
};

/// The whole way of one address.
pub(crate) fn explain(machine: &dyn Machine, query: &ExplainQuery) -> Result<Chain, Trouble> {
    let target: Target = query
        .address
        .parse()
        .map_err(|error: explain::NoAddress| Trouble::Question(error.to_string()))?;
    let kind = access_kind(query.access.as_deref())?;
    let asked = privilege(query.privilege.as_deref())?;
    let search = search(query.search.as_deref(), target)?;
    let vcpu = query.vcpu.unwrap_or(0);
    let gva = match target {
        Target::Gva(gva) => Some(gva),
        _ => None,
    };
    let pagemap = Pagemap::of_self()?;
    let mmu = machine.mmu()?;
    let slots = machine.slots()?;
    let held = machine.hold()?;
    let state = held.vcpu(vcpu, gva.map(|gva| (gva, asked)))?;
    let view = GuestView {
        slots: &slots,
        bytes: &OwnBytes,
    };
    let mut registers = paging_registers(&state, &view);
    let mut tlb = state.tlb.clone();
    if let Some(cr3) = &query.cr3 {
        registers.cr3 = number("cr3", cr3)?;
        registers.pdptrs = view.pdptrs(registers.cr3).unwrap_or_default();
        // The TLB belongs to the address space that is loaded.
        if registers.cr3 != state.sregs.cr3 {
            tlb = None;
        }
    }
    let privilege = effective(asked, state.regs.rflags, state.sregs.ss.dpl);
    let access = Access::new(kind, privilege);
    let hidden = || {
        "the kernel's KVM keeps its second level to itself (see \
         /sys/kernel/debug/kvm for counts)"
            .to_owned()
    };
    let evidence = Evidence {
        slots: &slots,
        bytes: &OwnBytes,
        registers,
        features: state.features,
        vcpu: Some(VcpuSide {
            vcpu,
            rip: Gva::new(state.regs.rip),
            cpl: state.sregs.ss.dpl,
        }),
        tables: mmu
            .as_ref()
            .map_or_else(|| Tables::Hidden(hidden()), Tables::Ours),
        tlb,
        pagemap: &pagemap,
    };
    // The search reads all tables, which takes its time: the guest may go on meanwhile.
    let held = match search {
        Search::Whole => {
            drop(held);
            None
        }
        Search::No => Some(held),
    };
    let question = Question {
        target,
        access,
        search,
    };
    let mut chain = explain::explain(&evidence, &question)?;
    drop(held);
    chain.region = region(machine, &chain)?;
    if gva.is_some() && query.cr3.is_none() {
        compare_pdptes(&mut chain, &state, &view);
    }
    Ok(chain)
}

/// With PAE paging the CPU walks from the PDPTEs that it loaded (SDM 3A, 5.4.1): memory may say
/// something else by now.
fn compare_pdptes(chain: &mut Chain, state: &VcpuState, view: &GuestView<'_>) {
    let Some(entry) = chain.entries.first().filter(|e| e.name == "PDPTE") else {
        return;
    };
    if entry.level != 3 || chain.entries.len() > 3 {
        return;
    }
    let index = entry.index as usize & 3;
    let memory = view.pdptrs(state.sregs.cr3).map(|all| all[index]);
    match (state.pdptrs, memory) {
        (None, _) => chain.unknown.push(
            "which PDPTEs the CPU has loaded: the kernel's KVM does not tell here, so these are as \
             memory has them now"
                .to_owned(),
        ),
        (Some(loaded), Some(memory)) if loaded[index] != memory => chain.checks.push(format!(
            "the CPU has loaded {:#x} as PDPTE {index}; memory has {memory:#x} there now, which \
             counts from the next MOV to CR3 on",
            loaded[index]
        )),
        _ => {}
    }
}

fn region(machine: &dyn Machine, chain: &Chain) -> Result<Option<String>, Trouble> {
    let Some(gpa) = chain.gpa else {
        return Ok(None);
    };
    let regions = machine.regions()?;
    let holds = |start: &str, bytes: u64| {
        let start = parse_hex(start).unwrap_or(u64::MAX);
        gpa.raw().checked_sub(start).is_some_and(|o| o < bytes)
    };
    let region = regions.iter().rev().find(|r| holds(&r.gpa, r.bytes));
    Ok(region.map(|region| region.name.clone()))
}

/// The registers that govern translation. Where the accelerator does not tell which PDPTEs the CPU
/// has loaded, they are as memory has them now.
pub(crate) fn paging_registers(state: &VcpuState, view: &GuestView<'_>) -> PagingRegisters {
    let sregs = &state.sregs;
    let pae = Cr4::from_bits_retain(sregs.cr4).contains(Cr4::PAE);
    let long = Efer::from_bits_retain(sregs.efer).contains(Efer::LMA);
    let pages = pae && !long && Cr0::from_bits_retain(sregs.cr0).contains(Cr0::PG);
    let in_memory = || pages.then(|| view.pdptrs(sregs.cr3)).flatten();
    let pdptrs = state.pdptrs.filter(|_| pages).or_else(in_memory);
    PagingRegisters {
        cr0: sregs.cr0,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
        pdptrs: pdptrs.unwrap_or_default(),
        pkru: state.pkru,
    }
}

fn access_kind(text: Option<&str>) -> Result<AccessKind, Trouble> {
    match text.unwrap_or("read") {
        "read" => Ok(AccessKind::Read),
        "write" => Ok(AccessKind::Write),
        "exec" => Ok(AccessKind::Execute),
        other => Err(Trouble::Question(format!(
            "access={other}: there are `read`, `write` and `exec`"
        ))),
    }
}

fn privilege(text: Option<&str>) -> Result<Privilege, Trouble> {
    match text.unwrap_or("supervisor") {
        "user" => Ok(Privilege::User),
        "supervisor" => Ok(Privilege::Supervisor),
        other => Err(Trouble::Question(format!(
            "privilege={other}: there are `user` and `supervisor`"
        ))),
    }
}

fn search(text: Option<&str>, target: Target) -> Result<Search, Trouble> {
    match (text, target) {
        (Some("whole"), _) | (None, Target::Hva(_) | Target::Hpa(_)) => Ok(Search::Whole),
        (Some("no") | None, _) => Ok(Search::No),
        (Some(other), _) => Err(Trouble::Question(format!(
            "search={other}: there are `whole` and `no`"
        ))),
    }
}

/// Bytes of guest memory.
pub(crate) fn memory(machine: &dyn Machine, query: &MemoryQuery) -> Result<Vec<u8>, Trouble> {
    let target: Target = query
        .address
        .parse()
        .map_err(|error: explain::NoAddress| Trouble::Question(error.to_string()))?;
    let slots = machine.slots()?;
    let view = GuestView {
        slots: &slots,
        bytes: &OwnBytes,
    };
    let mut bytes = Vec::new();
    match target {
        Target::Gpa(gpa) => {
            checked_end(gpa, query.bytes)?;
            pages(gpa, query.bytes, |at, len| read(&view, at, len, &mut bytes))?;
        }
        Target::Gva(gva) => {
            checked_end(gva, query.bytes)?;
            let held = machine.hold()?;
            let vcpu = query.vcpu.unwrap_or(0);
            pages(gva, query.bytes, |at, len| {
                let gpa = held.translate(vcpu, at)?.ok_or_else(|| {
                    Trouble::Question(format!("gva {at:#x} leads nowhere: /explain says why"))
                })?;
                read(&view, gpa, len, &mut bytes)
            })?;
        }
        Target::Hva(_) | Target::Hpa(_) => {
            let why = "give a guest address: gpa:0x… or gva:0x…";
            return Err(Trouble::Question(why.to_owned()));
        }
    }
    Ok(bytes)
}

/// Cuts a range into pieces that lie in one page each.
fn pages<A: Address>(
    start: A,
    bytes: u64,
    mut see: impl FnMut(A, u64) -> Result<(), Trouble>,
) -> Result<(), Trouble> {
    let mut done = 0;
    while done < bytes {
        let at = start.wrapping_add(done);
        let page = PageSize::Size4K;
        let len = (page.bytes() - at.page_offset(page)).min(bytes - done);
        see(at, len)?;
        done += len;
    }
    Ok(())
}

fn read(view: &GuestView<'_>, gpa: addr::Gpa, len: u64, into: &mut Vec<u8>) -> Result<(), Trouble> {
    let from = into.len();
    into.resize(from + len as usize, 0);
    view.read(gpa, &mut into[from..]).map_err(|_| {
        Trouble::Question(format!(
            "gpa {gpa:#x} is no memory of the machine: /slots says what is"
        ))
    })
}

/// All of the guest's physical memory.
pub(crate) fn map(machine: &dyn Machine, query: &MapQuery) -> Result<MemoryMap, Trouble> {
    const MOST_CELLS: u64 = 1 << 16;
    let pagemap = Pagemap::of_self()?;
    let mmu = machine.mmu()?;
    let slots = machine.slots()?;
    let regions = machine.regions()?.into_iter();
    let places: Vec<_> = regions
        .filter_map(|region| {
            Some(Place {
                gpa: Gpa::new(parse_hex(&region.gpa)?),
                name: region.name,
                kind: region.kind,
                bytes: region.bytes,
            })
        })
        .collect();
    let survey = Survey {
        name: &machine.status().name,
        places: &places,
        slots: &slots,
        mmu: mmu.as_deref(),
        pagemap: &pagemap,
        cells: query.cells.unwrap_or(1024).clamp(1, MOST_CELLS),
    };
    Ok(survey.map()?)
}

/// Counters.
pub(crate) fn statistics(machine: &dyn Machine) -> Result<StatisticsAnswer, Trouble> {
    let Some(mmu) = machine.mmu()? else {
        let why = "the kernel's KVM counts for itself: see /sys/kernel/debug/kvm";
        return Err(Trouble::Unsupported(why.to_owned()));
    };
    Ok(StatisticsAnswer {
        machine: machine_counters(&mmu),
        vcpus: mmu.vcpu_stats().iter().map(|s| named(&s.named())).collect(),
    })
}

fn machine_counters(mmu: &Mmu) -> BTreeMap<String, u64> {
    let [small, medium, large] = mmu.pages();
    let (stats, shadow) = (mmu.stats(), mmu.shadow_stats());
    named(&[
        ("pages_4k", small),
        ("pages_2m", medium),
        ("pages_1g", large),
        ("table_bytes", mmu.table_bytes() as u64),
        ("remote_tlb_flush", stats.remote_tlb_flush.get()),
        (
            "remote_tlb_flush_requests",
            stats.remote_tlb_flush_requests.get(),
        ),
        ("mmu_recycled", stats.mmu_recycled.get()),
        ("mmu_cache_miss", shadow.mmu_cache_miss),
        ("mmu_shadow_zapped", shadow.mmu_shadow_zapped),
        ("mmu_pte_write", shadow.mmu_pte_write),
        ("mmu_unsync", shadow.mmu_unsync),
    ])
}

fn named(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
    let pairs = pairs.iter();
    pairs
        .map(|(name, value)| ((*name).to_owned(), *value))
        .collect()
}
