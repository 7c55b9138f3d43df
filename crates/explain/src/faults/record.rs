//! One fault, as it is told.

use addr::{Gpa, Gva, Hva};
use mmu::event::{Cause, FaultEvent};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::decode::describe_access;
use crate::hex;

/// What was installed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Install {
    /// The size of the entry in bytes.
    pub bytes: u64,
    /// Whether writes go on without another fault.
    pub writable: bool,
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FaultRecord {
    /// Nanoseconds since the recording began, when the fault had been handled.
    pub time_ns: u64,
    /// Which vCPU.
    pub vcpu: u32,
    /// `not_present`, `write_protected`, `spurious`, `tlb_fill`, `guest`, `mmio`, `read_only`, `host`.
    pub cause: String,
    /// The error code of the guest's own page fault.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error_code: Option<u32>,
    /// `user write` and so on.
    pub access: String,
    /// The instruction that did it.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub rip: u64,
    /// The guest virtual address.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub gva: Gva,
    /// The guest physical address, where the guest's tables lead to one.
    #[serde(with = "hex::option", default)]
    #[schema(value_type = Option<String>)]
    pub gpa: Option<Gpa>,
    /// The memory slot.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub slot: Option<u32>,
    /// What lies there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub region: Option<String>,
    /// The host virtual address.
    #[serde(with = "hex::option", default)]
    #[schema(value_type = Option<String>)]
    pub hva: Option<Hva>,
    /// What was installed or changed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub installed: Option<Install>,
    /// Nanoseconds that it took.
    pub cost_ns: u64,
}

impl FaultRecord {
    pub(super) fn new(time_ns: u64, event: &FaultEvent) -> Self {
        Self {
            time_ns,
            vcpu: event.vcpu,
            cause: cause_name(event.cause).to_owned(),
            error_code: match event.cause {
                Cause::Guest(code) => Some(code.bits()),
                _ => None,
            },
            access: describe_access(event.access),
            rip: event.rip,
            gva: event.gva,
            gpa: event.gpa,
            slot: None,
            region: None,
            hva: event.hva,
            installed: event.installed.map(|installed| Install {
                bytes: installed.size.bytes(),
                writable: installed.writable,
            }),
            cost_ns: event.nanoseconds,
        }
    }
}

pub(super) fn cause_name(cause: Cause) -> &'static str {
    match cause {
        Cause::NotPresent => "not_present",
        Cause::WriteProtected => "write_protected",
        Cause::Spurious => "spurious",
        Cause::TlbFill => "tlb_fill",
        Cause::Guest(_) => "guest",
        Cause::Mmio => "mmio",
        Cause::ReadOnly => "read_only",
        Cause::Host => "host",
    }
}

/// One line of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum Line {
    /// A fault.
    Fault(FaultRecord),
    /// Faults that were lost since the line before, because nobody read fast enough.
    Dropped {
        /// Which vCPU's; none where the listener itself was too slow.
        vcpu: Option<u32>,
        /// How many.
        count: u64,
    },
    /// Nothing happened for a while; the stream lives.
    Idle {
        /// Nanoseconds since the recording began.
        time_ns: u64,
    },
}

/// Which faults are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
pub struct FaultFilter {
    /// Causes, separated by commas; all unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Of this vCPU alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
    /// In this region of guest physical memory alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Those that took at least so many nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_ns: Option<u64>,
}

/// The causes that there are.
const CAUSES: [&str; 8] = [
    "not_present",
    "write_protected",
    "spurious",
    "tlb_fill",
    "guest",
    "mmio",
    "read_only",
    "host",
];

impl FaultFilter {
    /// Whether its causes exist; the first that does not.
    pub fn unknown_cause(&self) -> Option<String> {
        let causes = self.cause.iter().flat_map(|list| list.split(','));
        causes
            .map(str::trim)
            .find(|cause| !CAUSES.contains(cause))
            .map(|cause| format!("cause {cause:?}: there are {}", CAUSES.join(", ")))
    }

    /// Whether a fault is wanted.
    pub fn wants(&self, record: &FaultRecord) -> bool {
        let cause = |list: &String| list.split(',').any(|c| c.trim() == record.cause);
        self.cause.as_ref().is_none_or(cause)
            && self.vcpu.is_none_or(|vcpu| vcpu == record.vcpu)
            && self.min_ns.is_none_or(|least| record.cost_ns >= least)
            && (self.region.is_none() || self.region == record.region)
    }
}
