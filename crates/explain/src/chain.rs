//! The whole way of one address, as data.

use addr::{Gpa, Gva, Hva};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::backwards::Backwards;
use crate::hex;
use crate::host::HostSide;
use crate::view::SlotRange;

/// One entry of the guest's tables on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestEntry {
    /// `PML4E`, `PDPTE`, `PDE`, `PTE`.
    pub name: String,
    /// 1 is the lowest.
    pub level: u8,
    /// Which entry of its table.
    pub index: u64,
    /// Where it lies.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub gpa: Gpa,
    /// What stands there.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub value: u64,
    /// Its flags that are set.
    pub flags: Vec<String>,
    /// What this entry and those before it grant together: `read write execute user`.
    pub rights: Vec<String>,
    /// The size of the page, where the entry maps one.
    pub page_bytes: Option<u64>,
}

/// Where the guest's tables lead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum GuestSide {
    /// To a page.
    Page {
        /// The byte.
        #[serde(with = "hex")]
        #[schema(value_type = String)]
        gpa: Gpa,
        /// The page's size in bytes.
        page_bytes: u64,
        /// What all entries together allow: `read write execute user`.
        rights: Vec<String>,
        /// A global page.
        global: bool,
        /// The protection key.
        key: u8,
    },
    /// Nowhere: the guest gets `#PF`.
    PageFault {
        /// What the exception pushes.
        #[serde(with = "hex")]
        #[schema(value_type = String)]
        error_code: u32,
        /// The same in words.
        reasons: Vec<String>,
        /// Which rule of the architecture, and which entry.
        rule: String,
    },
    /// Nowhere: the address is not canonical, and the guest gets `#GP(0)` (`#SS(0)` by RSP or RBP).
    NotCanonical {
        /// How many bits are translated.
        linear_bits: u8,
    },
    /// The host has no memory behind a guest table.
    HostFault {
        /// Where.
        #[serde(with = "hex")]
        #[schema(value_type = String)]
        hva: Hva,
    },
}

/// The memslot that holds the guest physical address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SlotSide {
    /// The slot.
    #[serde(flatten)]
    pub range: SlotRange,
    /// How far into the slot the address is.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub offset: u64,
}

/// One entry of the accelerator's tables on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TableEntry {
    /// The highest is the root.
    pub level: u8,
    /// The entry as it stands in memory; 0 is empty.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub value: u64,
    /// Where it leads, if it maps a page.
    #[serde(with = "hex::option")]
    #[schema(value_type = Option<String>)]
    pub hva: Option<Hva>,
    /// Its bits in words.
    pub flags: Vec<String>,
}

/// What the accelerator keeps to go from the guest's address to the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "path", rename_all = "snake_case")]
pub enum SecondLevel {
    /// Tables from GPA to HVA.
    Nested {
        /// From the root on.
        entries: Vec<TableEntry>,
    },
    /// Tables from GVA to HVA.
    Shadow {
        /// From the root on; none where the present root has no shadow page yet.
        entries: Vec<TableEntry>,
    },
    /// Nothing but the TLB.
    Direct,
    /// It can't be seen.
    Hidden {
        /// Why not.
        why: String,
    },
}

/// What the vCPU's TLB holds for the address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "tlb", rename_all = "snake_case")]
pub enum TlbSide {
    /// An access goes through without asking.
    Hit {
        /// Where it leads.
        #[serde(with = "hex")]
        #[schema(value_type = String)]
        hva: Hva,
        /// What goes through: `read`, `write`.
        allows: Vec<String>,
    },
    /// The next access asks the tables.
    Miss,
    /// It can't be seen.
    Hidden {
        /// Why not.
        why: String,
    },
}

/// The vCPU that was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VcpuSide {
    /// Which.
    pub vcpu: u32,
    /// What it will run next.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub rip: Gva,
    /// Its privilege level.
    pub cpl: u8,
}

/// The registers that govern the walk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PagingSide {
    /// `4-level paging` and so on.
    pub mode: String,
    /// CR0.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub cr0: u64,
    /// CR3.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub cr3: u64,
    /// CR4.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub cr4: u64,
    /// EFER.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub efer: u64,
    /// What of these forbids or allows: `WP SMEP SMAP NX PKE`.
    pub in_force: Vec<String>,
}

/// The whole way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Chain {
    /// The address as it was asked for: `gva:0x1000`.
    pub asked: String,
    /// The symbol that holds it, where symbols were given.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub symbol: Option<String>,
    /// The guest virtual address, where one was asked for.
    #[serde(with = "hex::option")]
    #[schema(value_type = Option<String>)]
    pub gva: Option<Gva>,
    /// The access asked about.
    pub access: String,
    /// Whose registers.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vcpu: Option<VcpuSide>,
    /// How the guest's addresses are translated, where a virtual one was asked for.
    pub paging: Option<PagingSide>,
    /// The guest's entries that were read, from the root on.
    pub entries: Vec<GuestEntry>,
    /// Where they lead.
    pub guest: Option<GuestSide>,
    /// The guest physical address, where there is one.
    #[serde(with = "hex::option")]
    #[schema(value_type = Option<String>)]
    pub gpa: Option<Gpa>,
    /// What lies there, where the monitor tells: `ram`, `pci`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub region: Option<String>,
    /// The slot, where there is one.
    pub slot: Option<SlotSide>,
    /// What the accelerator's tables hold.
    pub second_level: Option<SecondLevel>,
    /// What the TLB holds.
    pub tlb: Option<TlbSide>,
    /// The host's side, where a slot leads there.
    pub host: Option<HostSide>,
    /// Who else leads there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub backwards: Option<Backwards>,
    /// What an access would do now, in one sentence.
    pub verdict: String,
    /// What somebody else says of the same address.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub checks: Vec<String>,
    /// What could not be seen from here, and why.
    pub unknown: Vec<String>,
}

impl Chain {
    /// The entries of the second level, on the nested path.
    pub fn nested(&self) -> Option<&[TableEntry]> {
        match &self.second_level {
            Some(SecondLevel::Nested { entries }) => Some(entries),
            _ => None,
        }
    }

    /// The page frame that serves the address, where the host tells.
    pub fn frame(&self) -> Option<u64> {
        Some(self.host.as_ref()?.hpa?.raw() >> 12)
    }
}
