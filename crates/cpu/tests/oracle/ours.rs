//! Guests on our CPU.

use std::sync::Arc;

use addr::{Gpa, Hva};
use cpu::system::{Offer, Vendor};
use cpu::{
    CodeMap, CpuState, CpuidResult, Exception, Exit, InjectedInterrupt, IoDirection, Platform,
    Refusal, Vcpu, VcpuConfig,
};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};
use memory::quiesce::{Domain, Requests};
use memory::slot::{Region, Slots, SlotsConfig};
use mmu::{Mmu, MmuConfig, VcpuMmu};
use x86::vector;

use crate::guest::{End, Guest, MAX_EXITS, Outcome, Seen, input};
use crate::kernel::map;
use crate::layout::MEMORY;
use crate::watch::Watch;

/// One VM that runs guest after guest.
pub struct Ours {
    vcpu: Vcpu,
    platform: Everything,
    memory: *mut u8,
    _mmu: Arc<Mmu>,
}

/// All is left to the monitor.
struct Everything {
    cpuid: CpuId,
    wants_window: bool,
}

impl Everything {
    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let found = self.cpuid.as_slice().iter().find(|entry| {
            let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
            entry.function == leaf && (!indexed || entry.index == subleaf)
        });
        found.map_or_else(CpuidResult::default, |entry| CpuidResult {
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
    }
}

impl Platform for Everything {
    fn interrupt_window_requested(&self) -> bool {
        self.wants_window
    }
    fn cpuid(&mut self, _: &CpuState, leaf: u32, subleaf: u32) -> CpuidResult {
        self.leaf(leaf, subleaf)
    }
    fn read_msr(&mut self, _: &CpuState, _: u32) -> Result<u64, Refusal> {
        Err(Refusal::Exception(Exception::with_code(vector::GP, 0)))
    }
    fn write_msr(&mut self, _: &mut CpuState, _: u32, _: u64) -> Result<(), Refusal> {
        Err(Refusal::Exception(Exception::with_code(vector::GP, 0)))
    }
    fn task_priority(&self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _: u8) {}
    fn hypercall(&mut self, _: &mut CpuState) -> Result<u64, Refusal> {
        Err(Refusal::Exception(Exception::plain(vector::UD)))
    }
}

impl Ours {
    /// A VM whose guests see this CPUID.
    pub fn new(cpuid: &CpuId) -> Self {
        let memory = map(MEMORY);
        let domain = Domain::new();
        let slots = Slots::new(Arc::clone(&domain), SlotsConfig::default());
        let mmu = Mmu::new(&slots, MmuConfig::default());
        let region = Region {
            slot: 0,
            flags: 0,
            gpa: Gpa::new(0),
            size: MEMORY as u64,
            hva: Hva::new(memory as u64),
        };
        slots.set_region(&region).expect("a memory slot");
        let platform = Everything {
            cpuid: cpuid.clone(),
            wants_window: false,
        };
        let config = VcpuConfig {
            code: Arc::new(CodeMap::default()),
            cache_size: 16 << 20,
            blocks: cpu::BlockLength::Whole,
            offer: Offer {
                // KVM's emulator, which runs real mode, follows Intel's manual.
                vendor: Vendor::Intel,
                ..Offer::from_cpuid(|leaf, subleaf| platform.leaf(leaf, subleaf))
            },
        };
        let vcpu = Vcpu::new(config, VcpuMmu::new(&mmu, 0), &domain).expect("a vCPU");
        Self {
            vcpu,
            platform,
            memory,
            _mmu: mmu,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is MEMORY bytes long, lives as long as the process, and the guest
        // doesn't run.
        unsafe { std::slice::from_raw_parts_mut(self.memory, MEMORY) }
    }

    /// Runs a guest to its end.
    pub fn run(&mut self, guest: &Guest) -> Outcome {
        self.bytes().copy_from_slice(&guest.memory);
        *self.vcpu.state_mut() = guest.state.clone();
        self.vcpu.state_mut().events.nmi_pending = guest.wishes.nmi.into();
        self.vcpu.set_guest_debug(guest.wishes.debug);
        self.platform.wants_window = guest.wishes.interrupt.is_some();
        *self.vcpu.fpu_mut() = cpu::fpu::FpuState::default();
        let mut seen = Vec::new();
        let kicker = self.vcpu.kicker();
        let watch = Watch::start(move || kicker.request(Requests::EXIT));
        let end = loop {
            if seen.len() > MAX_EXITS {
                break End::Endless;
            }
            let exit = self.vcpu.run(&mut self.platform);
            if exit == Exit::InterruptWindow {
                seen.push(Seen::Window {
                    rip: self.vcpu.state().rip,
                });
                self.platform.wants_window = false;
                self.vcpu.state_mut().events.interrupt =
                    guest.wishes.interrupt.map(|vector| InjectedInterrupt {
                        vector,
                        soft: false,
                    });
                continue;
            }
            if let Some(end) = self.handle(exit, &mut seen) {
                break end;
            }
        };
        drop(watch);
        let state = self.vcpu.state().clone();
        Outcome {
            seen,
            end,
            state,
            memory: self.bytes().to_vec(),
        }
    }

    /// Answers an exit; `Some` where the guest is over.
    fn handle(&mut self, exit: Exit, seen: &mut Vec<Seen>) -> Option<End> {
        match exit {
            Exit::Io(io) if io.direction == IoDirection::Out => {
                let data = self.vcpu.output().to_vec();
                seen.push(Seen::Out {
                    port: io.port,
                    data,
                });
                self.vcpu.complete_io(&[]);
            }
            Exit::Io(io) => {
                let len = usize::from(io.size) * io.count as usize;
                seen.push(Seen::In {
                    port: io.port,
                    size: len as u8,
                    count: 1,
                });
                self.vcpu.complete_io(&input(io.port.into(), len));
            }
            Exit::Mmio(mmio) => {
                let gpa = mmio.gpa.raw();
                if let Some(data) = mmio.write {
                    let data = data[..usize::from(mmio.len)].to_vec();
                    seen.push(Seen::Write { gpa, data });
                    self.vcpu.complete_mmio(&[]);
                } else {
                    seen.push(Seen::Read { gpa, len: mmio.len });
                    self.vcpu.complete_mmio(&input(gpa, mmio.len.into()));
                }
            }
            Exit::Debug(debug) => seen.push(Seen::Debug {
                vector: debug.vector,
                pc: debug.pc.raw(),
                dr6: debug.dr6,
            }),
            Exit::Interrupted => return Some(End::Endless),
            Exit::Halt => return Some(End::Halt),
            Exit::Shutdown => return Some(End::Shutdown),
            other => return Some(End::Failed(format!("{other:?}"))),
        }
        None
    }
}
