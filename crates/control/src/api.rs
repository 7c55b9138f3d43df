//! What the control API answers, as data.

use explain::SlotRange;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are stopped between two instructions.
    Paused,
    /// It is being built, or built again after a reset.
    Starting,
}

/// What a machine is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// The process that runs it.
    pub pid: u32,
    /// Whether the guest runs.
    pub state: State,
    /// `kvm` or `user`.
    pub accelerator: String,
    /// `nested`, `shadow` or `direct`, where the accelerator is `user`.
    pub paging: Option<String>,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// The file that was booted.
    pub kernel: Option<String>,
    /// Seconds since it was started.
    pub uptime_seconds: f64,
    /// The version of Fourfold.
    pub version: String,
}

/// A range of guest physical addresses with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegionSide {
    /// What the monitor calls it.
    pub name: String,
    /// `ram`, `rom` or `mmio`.
    pub kind: String,
    /// Its first guest physical address, in hexadecimal.
    pub gpa: String,
    /// Its size in bytes.
    pub bytes: u64,
}

/// The memory slots and the regions that they are made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SlotsAnswer {
    /// Memory slots, by guest address.
    pub slots: Vec<SlotRange>,
    /// What lies where in guest physical memory.
    pub regions: Vec<RegionSide>,
}

/// What a pause or a resumption took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StateAnswer {
    /// The state afterwards.
    pub state: State,
    /// Milliseconds until all vCPUs had done so.
    pub milliseconds: f64,
}

/// One vCPU's registers; numbers in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegistersAnswer {
    /// Which vCPU.
    pub vcpu: u32,
    /// Its privilege level.
    pub cpl: u8,
    /// General registers, RIP and RFLAGS, by name.
    pub general: std::collections::BTreeMap<String, String>,
    /// Control registers and EFER, by name.
    pub control: std::collections::BTreeMap<String, String>,
    /// Segments: selector, base and limit, by name.
    pub segments: std::collections::BTreeMap<String, Segment>,
}

/// A segment or a descriptor table; numbers in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Segment {
    /// The selector; none for a descriptor table.
    pub selector: Option<String>,
    /// The base.
    pub base: String,
    /// The limit.
    pub limit: String,
}

/// Counters by name, as `KVM_GET_STATS_FD` names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatisticsAnswer {
    /// Of the machine.
    pub machine: std::collections::BTreeMap<String, u64>,
    /// Of each vCPU.
    pub vcpus: Vec<std::collections::BTreeMap<String, u64>>,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What, where and why, in one sentence.
    pub error: String,
}

/// What `/explain` is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ExplainQuery {
    /// `gva:0x…`, `gpa:0x…`, `hva:0x…` or `hpa:0x…`.
    pub address: String,
    /// Whose registers; 0 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
    /// Another CR3 than the vCPU's, in hexadecimal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cr3: Option<String>,
    /// `read`, `write` or `exec`; `read` unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access: Option<String>,
    /// `user` or `supervisor`; `supervisor` unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub privilege: Option<String>,
    /// `whole` searches the guest's tables for other ways to the place, `no` does not; `no` unless
    /// given, but `whole` for `hva:` and `hpa:`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
}

/// Which vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct VcpuQuery {
    /// Its number; 0 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
}

/// What `/memory` is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct MemoryQuery {
    /// `gpa:0x…` or `gva:0x…`.
    pub address: String,
    /// How many bytes, at most 16 MiB.
    pub bytes: u64,
    /// Whose tables, for a guest virtual address; 0 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu: Option<u32>,
}

/// What `/map` is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub struct MapQuery {
    /// Into how many cells each region is divided at most, for pictures; 1024 unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cells: Option<u64>,
}
