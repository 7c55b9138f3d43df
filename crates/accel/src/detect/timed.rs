//! A tiny timed guest: a counted loop in real mode, ended by `HLT`.
//!
//! What it measures is who executes the loop. On hardware the whole run is one exit and a few
//! microseconds; where the kernel emulates, each turn is a trip through an interpreter.

#![expect(
    unsafe_code,
    reason = "KVM is told to use a mapping of ours as guest memory"
)]

use std::{
    fmt,
    time::{Duration, Instant},
};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use thiserror::Error;
use vm_memory::{MmapRegion, VolatileMemory};

/// `mov ecx, TURNS; dec ecx; jnz -4; hlt`, 16-bit code with operand-size prefixes.
const CODE: [u8; 11] = [0x66, 0xb9, 0, 0, 0, 0, 0x66, 0x49, 0x75, 0xfc, 0xf4];
/// Enough for the loop to outweigh the entry on hardware, and for an interpreter to finish within
/// about a tenth of a second.
const TURNS: u32 = 20_000;
const PAGE: usize = 4096;

/// How long the guest took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Timing {
    instructions: u32,
    took: Duration,
}

impl Timing {
    pub(super) fn new(instructions: u32, took: Duration) -> Self {
        Self { instructions, took }
    }

    pub(super) fn ns_per_instruction(self) -> f64 {
        self.took.as_secs_f64() * 1e9 / f64::from(self.instructions)
    }
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} ns for each instruction of a test guest",
            self.ns_per_instruction()
        )
    }
}

/// The guest did not get through.
#[derive(Debug, Error)]
pub(super) enum TestGuestError {
    #[error("the test guest can't be set up: {0}")]
    Setup(#[from] kvm_ioctls::Error),
    #[error("no memory for the test guest")]
    Memory,
    #[error("the test guest ended with {0}")]
    Exit(String),
}

/// Runs it twice (the first run pays for the first touch) and times the second.
pub(super) fn run(kvm: &Kvm) -> Result<Timing, TestGuestError> {
    let memory = MmapRegion::<()>::new(PAGE).map_err(|_| TestGuestError::Memory)?;
    let vm = kvm.create_vm()?;
    let region = kvm_userspace_memory_region {
        memory_size: PAGE as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the mapping lives until the end of this function, longer than the VM, and holds
    // nothing but the guest's page.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    run_loop(&mut vcpu, &memory, 1)?;
    run_loop(&mut vcpu, &memory, TURNS)
}

fn run_loop(vcpu: &mut VcpuFd, memory: &MmapRegion, turns: u32) -> Result<Timing, TestGuestError> {
    let mut code = CODE;
    code[2..6].copy_from_slice(&turns.to_le_bytes());
    memory
        .as_volatile_slice()
        .subslice(0, code.len())
        .map_err(|_| TestGuestError::Memory)?
        .copy_from(&code);
    enter_at_zero(vcpu)?;
    let began = Instant::now();
    match vcpu.run()? {
        VcpuExit::Hlt => Ok(Timing::new(2 * turns + 2, began.elapsed())),
        other => Err(TestGuestError::Exit(format!("{other:?}"))),
    }
}

fn enter_at_zero(vcpu: &VcpuFd) -> Result<(), TestGuestError> {
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    Ok(())
}
