//! A machine of QEMU's, looked at from outside: the same answer, drawn from QEMU's monitor and from
//! `/proc/PID`.
//!
//! | what                           | from                                                       |
//! |--------------------------------|------------------------------------------------------------|
//! | registers                      | `info registers`                                           |
//! | what lies where                | `info mtree -f`: ranges of RAM, ROM, devices               |
//! | where RAM lies in the process  | `gpa2hva`                                                  |
//! | bytes                          | `/proc/PID/mem`                                            |
//! | frames                         | `/proc/PID/pagemap`, `/proc/kpageflags`                    |
//!
//! The monitor's own `gva2gpa`, `gpa2hva` and `gpa2hpa` are asked last, and the answer says whether
//! they agree. The machine is not stopped.

mod monitor;
mod parse;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use addr::{Gpa, Gva, Hva};
use memory::pagemap::{Pagemap, PagemapError};
use mmu::{Access, PagingFeatures};

use crate::chain::{Chain, TlbSide, VcpuSide};
use crate::explain::{Evidence, Question, Search, explain};
use crate::hex;
use crate::question::Target;
use crate::second_level::Tables;
use crate::view::{GuestView, HostBytes, SlotRange};

pub use monitor::{Monitor, MonitorError};
pub use parse::{CpuRegisters, Range};

/// Why a machine of QEMU's can't be explained.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// Its monitor can't be asked.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// What the monitor says can't be understood.
    #[error("QEMU's `{command}` says what can't be understood: {answer:?}")]
    Answer {
        /// What was asked.
        command: String,
        /// The beginning of the answer.
        answer: String,
    },
    /// Its memory can't be read.
    #[error("opening /proc/{pid}/mem: ask as the user that runs QEMU, or as root")]
    Memory {
        /// Which process.
        pid: u32,
        /// How it failed.
        source: std::io::Error,
    },
    /// Its page tables can't be read.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
}

/// A machine of QEMU's.
pub struct Qemu {
    monitor: Monitor,
    bytes: ProcessBytes,
    pagemap: Pagemap,
    ranges: Vec<Range>,
    slots: Vec<SlotRange>,
}

/// Another process's memory.
struct ProcessBytes(File);

impl HostBytes for ProcessBytes {
    fn read(&self, hva: Hva, into: &mut [u8]) -> Result<(), Hva> {
        self.0.read_exact_at(into, hva.raw()).map_err(|_| hva)
    }
}

impl Qemu {
    /// The machine of process `pid`; its monitor is at `socket`, or where its command line says.
    pub fn open(pid: u32, socket: Option<&Path>) -> Result<Self, QemuError> {
        let mut monitor = Monitor::of_process(pid, socket)?;
        let memory = File::open(format!("/proc/{pid}/mem"));
        let bytes = ProcessBytes(memory.map_err(|source| QemuError::Memory { pid, source })?);
        let layout = monitor.ask("info mtree -f", None)?;
        let ranges = parse::system_memory(&layout);
        let mut slots = Vec::new();
        for (number, range) in (0..).zip(ranges.iter().filter(|range| range.is_memory())) {
            let answer = monitor.ask(&format!("gpa2hva {:#x}", range.start), None)?;
            // ROM of a kind that has no address in the process is left out.
            if let Some(hva) = parse::last_number(&answer) {
                slots.push(SlotRange {
                    slot: number,
                    address_space: 0,
                    gpa: Gpa::new(range.start),
                    bytes: range.bytes,
                    hva: Hva::new(hva),
                    writable: range.kind == "ram",
                    logs_dirty: false,
                    name: Some(range.name.clone()),
                });
            }
        }
        if slots.is_empty() {
            return Err(misunderstood("info mtree -f", &layout));
        }
        Ok(Self {
            monitor,
            bytes,
            pagemap: Pagemap::of_process(pid)?,
            ranges,
            slots,
        })
    }

    /// The registers of one CPU.
    pub fn registers(&mut self, cpu: u32) -> Result<CpuRegisters, QemuError> {
        let text = self.monitor.ask("info registers", Some(cpu))?;
        parse::registers(&text).ok_or_else(|| misunderstood("info registers", &text))
    }

    /// The whole way of one address.
    pub fn explain(
        &mut self,
        target: Target,
        access: Access,
        search: Search,
        cpu: u32,
        cr3: Option<u64>,
    ) -> Result<Chain, QemuError> {
        let found = self.registers(cpu)?;
        let mut registers = found.paging;
        registers.cr3 = cr3.unwrap_or(registers.cr3);
        let view = GuestView {
            slots: &self.slots,
            bytes: &self.bytes,
        };
        registers.pdptrs = view.pdptrs(registers.cr3).unwrap_or_default();
        let hidden = |what: &str| format!("QEMU's monitor does not show {what}");
        let evidence = Evidence {
            slots: &self.slots,
            bytes: &self.bytes,
            registers,
            features: PagingFeatures {
                max_phys_bits: 52,
                ..PagingFeatures::default()
            },
            vcpu: Some(VcpuSide {
                vcpu: cpu,
                rip: Gva::new(found.rip),
                cpl: found.cpl,
            }),
            tables: Tables::Hidden(hidden("its accelerator's")),
            tlb: Some(TlbSide::Hidden {
                why: hidden("what it caches"),
            }),
            pagemap: &self.pagemap,
        };
        let question = Question {
            target,
            access,
            search,
        };
        let mut chain = explain(&evidence, &question)?;
        chain
            .unknown
            .push("the guest CPU's MAXPHYADDR: reserved address bits are not checked".to_owned());
        let region = chain.gpa.and_then(|gpa| {
            let holding = self.ranges.iter().find(|r| r.contains(gpa.raw()));
            holding.map(|range| range.name.clone())
        });
        chain.region = region;
        if cr3.is_none() {
            self.check(&mut chain, cpu)?;
        }
        Ok(chain)
    }

    /// Asks the monitor the same.
    fn check(&mut self, chain: &mut Chain, cpu: u32) -> Result<(), QemuError> {
        if let (Some(gva), Some(_)) = (chain.gva, &chain.guest) {
            let answer = self.monitor.ask(&format!("gva2gpa {gva:#x}"), Some(cpu))?;
            let theirs = parse::labelled(&answer, "gpa:");
            chain
                .checks
                .push(agreement("gva2gpa", theirs, chain.gpa.map(Gpa::raw)));
        }
        let Some(gpa) = chain.gpa.filter(|_| chain.slot.is_some()) else {
            return Ok(());
        };
        let answer = self.monitor.ask(&format!("gpa2hva {gpa:#x}"), None)?;
        let ours = chain.host.as_ref().map(|host| host.hva.raw());
        chain
            .checks
            .push(agreement("gpa2hva", parse::last_number(&answer), ours));
        if let Some(hpa) = chain.host.as_ref().and_then(|host| host.hpa) {
            let answer = self.monitor.ask(&format!("gpa2hpa {gpa:#x}"), None)?;
            let theirs = parse::last_number(&answer);
            chain
                .checks
                .push(agreement("gpa2hpa", theirs, Some(hpa.raw())));
        }
        Ok(())
    }
}

fn agreement(command: &str, theirs: Option<u64>, ours: Option<u64>) -> String {
    let shown = |number: Option<u64>| {
        number.map_or_else(|| "nothing".to_owned(), |number| format!("{number:#x}"))
    };
    if theirs == ours {
        format!("QEMU's {command} agrees: {}", shown(ours))
    } else {
        format!(
            "QEMU's {command} says {}, and not {}",
            shown(theirs),
            shown(ours)
        )
    }
}

fn misunderstood(command: &str, answer: &str) -> QemuError {
    QemuError::Answer {
        command: command.to_owned(),
        answer: answer.chars().take(200).collect(),
    }
}

/// A number as the monitor prints it.
pub(crate) fn number(text: &str) -> Option<u64> {
    hex::parse(text.trim_end_matches(['.', ',', ';']))
}
