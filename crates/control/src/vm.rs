//! A machine of `vmm` behind the control API, through all its lives: a reset builds it anew.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use accel::Vcpu;
use addr::{Gpa, Gva};
use explain::{SlotRange, TlbSide, path_name};
use memory::space::SlotCall;
use mmu::{GigabytePages, Mmu, PagingFeatures, Privilege, Vendor};
use vmm::{Facts, Hold, Region, RegionKind, Remote};

use crate::{
    api::{RegionSide, State, Status},
    machine::{Held, Machine, Trouble, VcpuState, Wanted},
};

/// How long vCPUs may take to stop. They take microseconds; a busy host may let them wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// A machine of this process.
pub struct Vm {
    name: String,
    started: Instant,
    life: Mutex<Life>,
}

#[derive(Default)]
struct Life {
    facts: Option<Facts>,
    remote: Option<Remote>,
    /// While it lives, the vCPUs are stopped.
    hold: Option<Hold>,
}

impl Vm {
    /// One that is not built yet.
    pub fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            started: Instant::now(),
            life: Mutex::default(),
        })
    }

    /// It has been built, and will run now.
    pub fn attach(&self, remote: Remote, wanted: Wanted) -> Result<(), Trouble> {
        let hold = match wanted {
            Wanted::Paused => Some(remote.hold(PATIENCE)?),
            Wanted::Running => None,
        };
        *self.lock() = Life {
            facts: Some(remote.facts().clone()),
            remote: Some(remote),
            hold,
        };
        Ok(())
    }

    /// It has ended.
    pub fn detach(&self) {
        let mut life = self.lock();
        life.hold = None;
        life.remote = None;
    }

    fn remote(&self) -> Result<Remote, Trouble> {
        self.lock().remote.clone().ok_or(Trouble::Starting)
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Life {
    fn state(&self) -> State {
        match (&self.remote, &self.hold) {
            (None, _) => State::Starting,
            (Some(_), None) => State::Running,
            (Some(_), Some(_)) => State::Paused,
        }
    }
}

impl Machine for Vm {
    fn status(&self) -> Status {
        let life = self.lock();
        let facts = life.facts.as_ref();
        let mmu = life.remote.as_ref().and_then(|remote| remote.vm().mmu());
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            state: life.state(),
            accelerator: facts.map_or(String::new(), |f| f.accelerator.to_string()),
            paging: mmu.map(|mmu| path_name(mmu.path()).to_owned()),
            cpus: facts.map_or(0, |f| f.cpus.into()),
            memory_bytes: facts.map_or(0, |f| f.memory),
            kernel: facts.map(|f| f.kernel.display().to_string()),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn slots(&self) -> Result<Vec<SlotRange>, Trouble> {
        let remote = self.remote()?;
        let regions = remote.regions();
        let slots = match remote.vm().mmu() {
            Some(mmu) => SlotRange::of_table(&mmu.slots().snapshot(0)),
            None => remote.slots().iter().map(registered).collect(),
        };
        let named = slots.into_iter().map(|mut slot| {
            let region = regions.iter().find(|r| r.range.contains(slot.gpa));
            slot.name = region.map(|r| r.name.clone());
            slot
        });
        Ok(named.collect())
    }

    fn regions(&self) -> Result<Vec<RegionSide>, Trouble> {
        Ok(self.remote()?.regions().iter().map(region_side).collect())
    }

    fn mmu(&self) -> Result<Option<Arc<Mmu>>, Trouble> {
        Ok(self.remote()?.vm().mmu())
    }

    fn hold(&self) -> Result<Box<dyn Held>, Trouble> {
        let remote = self.remote()?;
        let hold = remote.hold(PATIENCE)?;
        Ok(Box::new(HeldVm(hold)))
    }

    fn set_state(&self, wanted: Wanted) -> Result<State, Trouble> {
        let remote = self.remote()?;
        let hold = match wanted {
            Wanted::Paused => Some(remote.hold(PATIENCE)?),
            Wanted::Running => None,
        };
        let mut life = self.lock();
        life.hold = hold;
        Ok(life.state())
    }

    fn stop(&self) -> Result<(), Trouble> {
        self.remote()?.stop();
        Ok(())
    }
}

fn registered(call: &SlotCall) -> SlotRange {
    SlotRange {
        slot: call.slot,
        address_space: 0,
        gpa: call.gpa,
        bytes: call.size,
        hva: call.hva,
        writable: !call.flags.contains(memory::slot::SlotFlags::READONLY),
        logs_dirty: call
            .flags
            .contains(memory::slot::SlotFlags::LOG_DIRTY_PAGES),
        name: None,
    }
}

fn region_side(region: &Region) -> RegionSide {
    RegionSide {
        name: region.name.clone(),
        kind: match region.kind {
            RegionKind::Ram => "ram",
            RegionKind::Rom => "rom",
            RegionKind::Mmio => "mmio",
        }
        .to_owned(),
        gpa: format!("{:#x}", region.range.start()),
        bytes: region.range.len(),
    }
}

struct HeldVm(Hold);

impl Held for HeldVm {
    fn vcpu(&self, index: u32, tlb: Option<(Gva, Privilege)>) -> Result<VcpuState, Trouble> {
        self.0
            .with_vcpu(index as usize, move |vcpu| read(vcpu, tlb))?
    }

    fn translate(&self, index: u32, gva: Gva) -> Result<Option<Gpa>, Trouble> {
        let answer = self
            .0
            .with_vcpu(index as usize, move |vcpu| vcpu.translate(gva))?;
        translated(answer)
    }
}

/// What `KVM_TRANSLATE` answered.
pub(crate) fn translated(
    answer: accel::Result<kvm_bindings::kvm_translation>,
) -> Result<Option<Gpa>, Trouble> {
    let call = "KVM_TRANSLATE";
    let answer = answer.map_err(|cause| Trouble::Kvm { call, cause })?;
    Ok((answer.valid != 0).then(|| Gpa::new(answer.physical_address)))
}

/// Reads a vCPU that stands still.
pub(crate) fn read(
    vcpu: &mut dyn Vcpu,
    tlb: Option<(Gva, Privilege)>,
) -> Result<VcpuState, Trouble> {
    let failed = |call| move |cause| Trouble::Kvm { call, cause };
    let sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let cpuid = vcpu.get_cpuid().map_err(failed("KVM_GET_CPUID2"))?;
    let regs = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    Ok(VcpuState {
        features: features(cpuid.as_slice()),
        pdptrs: vcpu.pdptrs(),
        pkru: pkru(vcpu, sregs.cr4, cpuid.as_slice()),
        tlb: tlb.map(|(gva, privilege)| {
            tlb_side(vcpu, gva, effective(privilege, regs.rflags, sregs.ss.dpl))
        }),
        regs,
        sregs,
    })
}

/// A supervisor's access, with AC as it stands.
pub(crate) fn effective(privilege: Privilege, rflags: u64, cpl: u8) -> Privilege {
    const AC: u64 = 1 << 18;
    match privilege {
        Privilege::Supervisor if rflags & AC != 0 && cpl < 3 => Privilege::SupervisorAcSet,
        other => other,
    }
}

/// The TLB of an accelerator that shows it.
fn tlb_side(vcpu: &dyn Vcpu, gva: Gva, privilege: Privilege) -> TlbSide {
    let allowed = |may: bool, name: &str| may.then(|| name.to_owned());
    match vcpu.tlb(gva, privilege) {
        None => TlbSide::Hidden {
            why: "it is the CPU's own, and no instruction reads it".to_owned(),
        },
        Some(None) => TlbSide::Miss,
        Some(Some(entry)) => TlbSide::Hit {
            hva: entry.hva,
            allows: [allowed(entry.read, "read"), allowed(entry.write, "write")]
                .into_iter()
                .flatten()
                .collect(),
        },
    }
}

/// What a guest's CPUID says about paging.
pub(crate) fn features(cpuid: &[kvm_bindings::kvm_cpuid_entry2]) -> PagingFeatures {
    const GIGABYTE_PAGES: u32 = 1 << 26;
    let leaf = |function| cpuid.iter().find(|entry| entry.function == function);
    let default = PagingFeatures::default();
    PagingFeatures {
        max_phys_bits: leaf(0x8000_0008).map_or(default.max_phys_bits, |l| l.eax as u8),
        gigabyte_pages: match leaf(0x8000_0001) {
            Some(l) if l.edx & GIGABYTE_PAGES == 0 => GigabytePages::Reserved,
            _ => GigabytePages::Supported,
        },
        // "AuthenticAMD" and "HygonGenuine", by EBX.
        vendor: match leaf(0).map(|l| l.ebx.to_le_bytes()) {
            Some(name) if name == *b"Auth" || name == *b"Hygo" => Vendor::Amd,
            _ => Vendor::Intel,
        },
    }
}

/// PKRU from the XSAVE image (SDM 1, 13.5.7), where protection keys are in force.
fn pkru(vcpu: &dyn Vcpu, cr4: u64, cpuid: &[kvm_bindings::kvm_cpuid_entry2]) -> u32 {
    const PKE: u64 = 1 << 22;
    const COMPONENT: u32 = 9;
    if cr4 & PKE == 0 {
        return 0;
    }
    let place = cpuid
        .iter()
        .find(|entry| entry.function == 0xd && entry.index == COMPONENT);
    let word = place.map(|entry| entry.ebx as usize / 4);
    let image = vcpu.get_xsave().ok();
    image
        .zip(word)
        .and_then(|(image, word)| image.region.get(word).copied())
        .unwrap_or(0)
}
