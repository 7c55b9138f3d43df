//! A VM of a program that knows nothing of us: it called KVM's API, and the crate `kvm` answered.
//!
//! Its monitor is not ours, so there are no names for regions but those of the slots, and nothing can
//! be said of its devices. The vCPUs are held inside `KVM_RUN` ([`kvm::Vm::hold`]); those whose
//! threads are in the program's own code wait at their next `KVM_RUN`.
//!
//! A process may have several VMs; the newest that has vCPUs is the one shown.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use accel::user;
use addr::{Gpa, Gva};
use explain::{SlotRange, path_name};
use mmu::{Mmu, Privilege};

use crate::{
    api::{RegionSide, State, Status},
    machine::{Held, Machine, Trouble, VcpuState, Wanted},
    vm::{read, translated},
};

/// How long vCPUs may take to stop. They take microseconds; a busy host may let them wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// Finds the VM that is shown now.
pub type Newest = fn() -> Option<Arc<kvm::Vm>>;

/// This process's VM.
pub struct Program {
    name: String,
    started: Instant,
    newest: Newest,
    /// While it lives, the vCPUs are stopped.
    hold: Mutex<Option<kvm::Hold>>,
}

impl Program {
    /// For a process of this name; `newest` finds its VM.
    pub fn new(name: &str, newest: Newest) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            started: Instant::now(),
            newest,
            hold: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<kvm::Hold>> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM that is held, or else the newest.
    fn find(&self) -> Option<Arc<kvm::Vm>> {
        let held = self.lock().as_ref().map(|hold| Arc::clone(hold.vm()));
        held.or_else(self.newest)
    }

    fn vm(&self) -> Result<Arc<kvm::Vm>, Trouble> {
        self.find().ok_or(Trouble::Starting)
    }

    fn state(&self) -> State {
        match (&*self.lock(), (self.newest)()) {
            (Some(_), _) => State::Paused,
            (None, Some(_)) => State::Running,
            (None, None) => State::Starting,
        }
    }
}

fn slots_of(vm: &kvm::Vm) -> Vec<SlotRange> {
    SlotRange::of_table(&vm.shared().slots().snapshot(0))
}

impl Machine for Program {
    fn status(&self) -> Status {
        let vm = self.find();
        let bytes = |vm: &Arc<kvm::Vm>| slots_of(vm).iter().map(|slot| slot.bytes).sum();
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            state: self.state(),
            accelerator: "user".to_owned(),
            paging: vm
                .as_ref()
                .map(|vm| path_name(vm.shared().paging()).to_owned()),
            cpus: vm.as_ref().map_or(0, |vm| vm.vcpus().len() as u32),
            memory_bytes: vm.as_ref().map_or(0, bytes),
            kernel: None,
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn slots(&self) -> Result<Vec<SlotRange>, Trouble> {
        Ok(slots_of(&*self.vm()?))
    }

    fn regions(&self) -> Result<Vec<RegionSide>, Trouble> {
        let slots = slots_of(&*self.vm()?);
        Ok(slots.iter().map(region).collect())
    }

    fn mmu(&self) -> Result<Option<Arc<Mmu>>, Trouble> {
        Ok(Some(Arc::clone(self.vm()?.shared().mmu())))
    }

    fn hold(&self) -> Result<Box<dyn Held>, Trouble> {
        Ok(Box::new(HeldProgram(self.vm()?.hold(PATIENCE)?)))
    }

    fn set_state(&self, wanted: Wanted) -> Result<State, Trouble> {
        let hold = match wanted {
            Wanted::Paused => Some(self.vm()?.hold(PATIENCE)?),
            Wanted::Running => None,
        };
        // The old one ends outside of the lock.
        let before = std::mem::replace(&mut *self.lock(), hold);
        drop(before);
        Ok(self.state())
    }

    fn stop(&self) -> Result<(), Trouble> {
        *self.lock() = None;
        // The answer goes first.
        thread::spawn(|| {
            thread::sleep(Duration::from_millis(20));
            end_process();
        });
        Ok(())
    }
}

#[expect(unsafe_code, reason = "signals are libc's")]
fn end_process() {
    // SAFETY: numbers alone.
    unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
}

/// A slot is all that is known of what lies there.
fn region(slot: &SlotRange) -> RegionSide {
    let kind = if slot.writable { "ram" } else { "rom" };
    RegionSide {
        name: format!("slot {}", slot.slot),
        kind: kind.to_owned(),
        gpa: format!("{:#x}", slot.gpa),
        bytes: slot.bytes,
    }
}

struct HeldProgram(kvm::Hold);

impl HeldProgram {
    fn with<T>(
        &self,
        id: u32,
        look: impl FnOnce(&mut dyn accel::Vcpu) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let vm = self.0.vm();
        let vcpus = vm.vcpus();
        let vcpu = vcpus.into_iter().find(|vcpu| vcpu.id() == id);
        let vcpu = vcpu.ok_or(vmm::PauseError::NoVcpu { vcpu: id as usize })?;
        look(&mut *user::adopt(vm, vcpu))
    }
}

impl Held for HeldProgram {
    fn vcpu(&self, index: u32, tlb: Option<(Gva, Privilege)>) -> Result<VcpuState, Trouble> {
        self.with(index, |vcpu| read(vcpu, tlb))
    }

    fn translate(&self, index: u32, gva: Gva) -> Result<Option<Gpa>, Trouble> {
        self.with(index, |vcpu| translated(vcpu.translate(gva)))
    }
}
