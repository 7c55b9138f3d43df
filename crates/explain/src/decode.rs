//! Bits as words.

use mmu::{Access, AccessKind, Privilege};
use x86::page_fault::PageFaultCode;
use x86::paging::{PagingMode, Pte};

/// The mode as the manuals call it.
pub fn mode_name(mode: PagingMode) -> &'static str {
    match mode {
        PagingMode::Off => "no paging",
        PagingMode::Bits32 => "32-bit paging",
        PagingMode::Pae => "PAE paging",
        PagingMode::Level4 => "4-level paging",
        PagingMode::Level5 => "5-level paging",
    }
}

/// What a level's table is called (SDM 3A, table 5-1).
pub(crate) fn entry_name(level: u8) -> &'static str {
    match level {
        1 => "PTE",
        2 => "PDE",
        3 => "PDPTE",
        4 => "PML4E",
        _ => "PML5E",
    }
}

/// The flags of an entry that are set, in the order of their bits: `P RW US A D`.
pub fn pte_flags(value: u64) -> Vec<String> {
    let pte = Pte::from_bits_retain(value);
    let names = [
        (Pte::P, "P"),
        (Pte::RW, "RW"),
        (Pte::US, "US"),
        (Pte::PWT, "PWT"),
        (Pte::PCD, "PCD"),
        (Pte::A, "A"),
        (Pte::D, "D"),
        (Pte::PS, "PS"),
        (Pte::G, "G"),
        (Pte::NX, "NX"),
    ];
    let set = names.iter().filter(|(bit, _)| pte.contains(*bit));
    words(set.map(|(_, name)| *name))
}

/// Words, owned.
pub(crate) fn words<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    words.map(str::to_owned).collect()
}

/// The bits of a page fault's error code in words.
pub fn error_code_words(code: PageFaultCode) -> Vec<String> {
    let first = if code.contains(PageFaultCode::PRESENT) {
        "protection violation"
    } else {
        "page not present"
    };
    let names = [
        (PageFaultCode::WRITE, "write"),
        (PageFaultCode::USER, "user"),
        (PageFaultCode::RESERVED, "reserved bit set"),
        (PageFaultCode::FETCH, "instruction fetch"),
        (PageFaultCode::PROTECTION_KEY, "protection key"),
    ];
    let set = names.iter().filter(|(bit, _)| code.contains(*bit));
    words(std::iter::once(first).chain(set.map(|(_, name)| *name)))
}

/// `supervisor read`, `user fetch` …
pub fn describe_access(access: Access) -> String {
    let who = match access.privilege {
        Privilege::User => "user",
        Privilege::Supervisor => "supervisor",
        Privilege::SupervisorAcSet => "supervisor (AC set)",
        Privilege::Implicit => "implicit supervisor",
    };
    let what = match access.kind {
        AccessKind::Read => "read",
        AccessKind::Write => "write",
        AccessKind::Execute => "fetch",
    };
    format!("{who} {what}")
}
