//! The vCPU threads.

use std::{
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use accel::{Exit, Kicker, Vcpu};
use addr::Gva;
use devices::bus::PortBus;
use memory::space::Space;

use crate::{
    outcome::{Crash, Ending, Outcome},
    pause::Gate,
    space,
};

/// What all vCPU threads share.
pub(crate) struct Shared {
    pub(crate) ports: PortBus,
    pub(crate) space: Arc<Space>,
    pub(crate) ending: Arc<Ending>,
    pub(crate) gate: Arc<Gate>,
}

/// A vCPU's thread.
pub(crate) struct VcpuThread {
    kicker: Arc<dyn Kicker>,
    left: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`.
    pub(crate) fn start(
        index: u8,
        vcpu: Box<dyn Vcpu>,
        shared: Arc<Shared>,
    ) -> std::io::Result<Self> {
        let kicker = vcpu.kicker();
        let left = Arc::new(AtomicBool::new(false));
        let leaving = Leaving {
            index,
            left: left.clone(),
            ending: shared.ending.clone(),
            gate: shared.gate.clone(),
        };
        shared.gate.join(index, kicker.clone());
        let thread = thread::Builder::new()
            .name(format!("vcpu {index}"))
            .spawn(move || {
                let _leaving = leaving;
                run(index, vcpu, &shared);
            })?;
        Ok(Self {
            kicker,
            left,
            thread,
        })
    }

    /// Makes it leave and waits until it has. The ending has been reported before.
    pub(crate) fn stop(self) {
        while !self.left.load(Ordering::Acquire) {
            self.kicker.kick();
            thread::sleep(Duration::from_micros(200));
        }
        // A panic was reported by `Leaving`.
        let _ = self.thread.join();
    }
}

/// Reports, on every way out of a vCPU thread, that it is gone; also after a panic.
struct Leaving {
    index: u8,
    left: Arc<AtomicBool>,
    ending: Arc<Ending>,
    gate: Arc<Gate>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.ending.report(Outcome::Crashed(Crash {
            cpu: self.index,
            rip: None,
            cause: "its thread ended; this is a bug of Fourfold".to_owned(),
        }));
        self.gate.leave(self.index);
        self.left.store(true, Ordering::Release);
    }
}

/// Whether a vCPU stands between two instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boundary {
    /// It may be stopped and looked at.
    Here,
    /// The accelerator has yet to complete the last instruction.
    Ahead,
}

fn run(index: u8, mut vcpu: Box<dyn Vcpu>, shared: &Shared) {
    let mut boundary = Boundary::Here;
    while !shared.ending.is_reported() {
        if shared.gate.is_asked() {
            match boundary {
                Boundary::Here => shared.gate.park(index, &mut *vcpu),
                // The next run completes the instruction and comes back.
                Boundary::Ahead => vcpu.kicker().kick(),
            }
        }
        let cause = match step(&mut *vcpu, shared) {
            Ok(reached) => {
                boundary = reached;
                continue;
            }
            Err(cause) => cause,
        };
        let rip = vcpu.get_regs().ok().map(|regs| Gva::new(regs.rip));
        shared.ending.report(Outcome::Crashed(Crash {
            cpu: index,
            rip,
            cause,
        }));
    }
}

/// Runs to the next exit and handles it; an error is what the machine dies of.
fn step(vcpu: &mut dyn Vcpu, shared: &Shared) -> Result<Boundary, String> {
    match vcpu.run().map_err(|error| format!("KVM_RUN: {error}"))? {
        Exit::IoIn { port, size, data } => {
            for element in data.chunks_mut(usize::from(size.max(1))) {
                shared.ports.read(port, element);
            }
        }
        Exit::IoOut { port, size, data } => {
            for element in data.chunks(usize::from(size.max(1))) {
                shared.ports.write(port, element);
            }
        }
        Exit::MmioRead { gpa, data } => space::read(&shared.space, gpa, data),
        Exit::MmioWrite { gpa, data } => space::write(&shared.space, gpa, data),
        Exit::Interrupted => return Ok(Boundary::Here),
        Exit::Halt | Exit::InterruptWindow | Exit::SetTpr => {}
        Exit::Shutdown => {
            return Err("triple fault: the guest could handle no exception".to_owned());
        }
        Exit::InternalError { suberror, data } => return Err(internal_error(suberror, data)),
        Exit::FailEntry { reason, .. } => {
            return Err(format!(
                "the accelerator can't enter this state: reason {reason:#x}"
            ));
        }
        other => return Err(format!("an exit that nothing asked for: {other:?}")),
    }
    Ok(Boundary::Ahead)
}

/// `KVM_INTERNAL_ERROR_EMULATION`.
const EMULATION: u32 = 1;

fn internal_error(suberror: u32, data: &[u64]) -> String {
    let data: Vec<_> = data.iter().map(|word| format!("{word:#x}")).collect();
    let what = match suberror {
        EMULATION => "the accelerator can't run this instruction",
        _ => "internal error of the accelerator",
    };
    format!("{what} (suberror {suberror}, data [{}])", data.join(", "))
}
