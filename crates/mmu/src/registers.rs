//! The registers that govern translation, and what follows from them.
//!
//! [`PagingRegisters`] are the architecture's; [`Regime`] is what the walker needs of them, derived
//! once per change: mode, root, reserved bits, which protections are in force.

use addr::Gpa;
use x86::control::{Cr0, Cr4, Efer};
use x86::paging::{ADDRESS_MASK, ADDRESS_MASK_32, PagingMode};

use crate::reserved::Reserved;

/// The registers that govern translation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagingRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3; bit 63 of the value written by `MOV CR3` is not part of it.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The PDPTEs of PAE paging, as `MOV CR3` loaded them.
    pub pdptrs: [u64; 4],
    /// PKRU.
    pub pkru: u32,
}

/// Who made the guest's CPU: AMD reserves bit 8 of entries that point to tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vendor {
    /// Intel and all that follow it.
    #[default]
    Intel,
    /// AMD and Hygon.
    Amd,
}

/// Whether the guest's CPU has 1 GiB pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GigabytePages {
    /// CPUID leaf `0x8000_0001`, EDX bit 26.
    #[default]
    Supported,
    /// PS is reserved at level 3.
    Reserved,
}

/// What the guest's CPUID says about paging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingFeatures {
    /// MAXPHYADDR, 32 to 52; values outside are taken to the nearest.
    pub max_phys_bits: u8,
    /// 1 GiB pages.
    pub gigabyte_pages: GigabytePages,
    /// Whose rules.
    pub vendor: Vendor,
}

impl Default for PagingFeatures {
    fn default() -> Self {
        Self {
            max_phys_bits: 46,
            gigabyte_pages: GigabytePages::Supported,
            vendor: Vendor::Intel,
        }
    }
}

impl PagingFeatures {
    /// MAXPHYADDR within the architecture's bounds.
    pub(crate) fn physical_bits(self) -> u32 {
        u32::from(self.max_phys_bits).clamp(32, 52)
    }
}

/// What the registers say, in the walker's terms.
#[derive(Clone, Debug)]
pub struct Regime {
    pub(crate) mode: PagingMode,
    /// Where the top table lies; in PAE paging the PDPTEs say so instead.
    pub(crate) root: Gpa,
    pub(crate) pdptrs: [u64; 4],
    pub(crate) pkru: u32,
    pub(crate) write_protect: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) protection_keys: bool,
    pub(crate) global_pages: bool,
    pub(crate) page_size_extensions: bool,
    /// Whether the error code tells fetches apart.
    pub(crate) reports_fetch: bool,
    pub(crate) reserved: Reserved,
}

impl Regime {
    /// What these registers mean on this CPU.
    pub fn new(registers: &PagingRegisters, features: PagingFeatures) -> Self {
        let cr0 = Cr0::from_bits_retain(registers.cr0);
        let cr4 = Cr4::from_bits_retain(registers.cr4);
        let efer = Efer::from_bits_retain(registers.efer);
        let mode = PagingMode::of(cr0, cr4, efer);
        // Without paging nothing is protected.
        let paged = mode != PagingMode::Off;
        let nx = efer.contains(Efer::NXE) && cr4.contains(Cr4::PAE);
        Self {
            mode,
            root: root_of(mode, registers.cr3, features),
            pdptrs: registers.pdptrs,
            pkru: registers.pkru,
            write_protect: cr0.contains(Cr0::WP),
            smep: paged && cr4.contains(Cr4::SMEP),
            smap: paged && cr4.contains(Cr4::SMAP),
            protection_keys: mode.is_long() && cr4.contains(Cr4::PKE),
            global_pages: cr4.contains(Cr4::PGE),
            page_size_extensions: mode != PagingMode::Bits32 || cr4.contains(Cr4::PSE),
            reports_fetch: nx || cr4.contains(Cr4::SMEP),
            reserved: Reserved::new(mode, features, efer.contains(Efer::NXE)),
        }
    }

    /// The mode.
    pub fn mode(&self) -> PagingMode {
        self.mode
    }

    /// The top tables: CR3's, or in PAE paging one for each PDPTE that is present.
    pub fn tops(&self) -> [Option<Gpa>; 4] {
        match self.mode {
            PagingMode::Off => [None; 4],
            PagingMode::Pae => self
                .pdptrs
                .map(|pdpte| (pdpte & 1 == 1).then(|| Gpa::new(pdpte & ADDRESS_MASK))),
            _ => [Some(self.root), None, None, None],
        }
    }

    /// The part of a linear address that is translated.
    pub fn linear(&self, gva: addr::Gva) -> u64 {
        match self.mode {
            PagingMode::Off | PagingMode::Bits32 | PagingMode::Pae => gva.raw() & 0xffff_ffff,
            PagingMode::Level4 | PagingMode::Level5 => {
                gva.raw() & ((1 << self.mode.linear_bits()) - 1)
            }
        }
    }
}

fn root_of(mode: PagingMode, cr3: u64, features: PagingFeatures) -> Gpa {
    let mask = match mode {
        PagingMode::Off => 0,
        PagingMode::Bits32 => ADDRESS_MASK_32,
        PagingMode::Pae => 0xffff_ffe0,
        PagingMode::Level4 | PagingMode::Level5 => {
            ADDRESS_MASK & ((1 << features.physical_bits()) - 1)
        }
    };
    Gpa::new(cr3 & mask)
}
