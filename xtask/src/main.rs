//! The quality gate: `cargo xtask check` runs all that CI runs.

mod compare_tcg;
mod fault_cost;
mod gate;
mod guest_tests;
mod harness;
mod hostile;
mod layers;
mod readme;
mod rust_vmm;
mod selftests;
mod threads;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's own tasks.
#[derive(Parser)]
#[command(about, bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Everything that CI runs: fmt, clippy, layers, docs, tests
    Check,
    /// The commands that the README shows
    Readme,
    /// Fails where a crate depends on one that lies above it
    Layers,
    /// Writes docs/ioctls.md from the table that dispatch runs on
    Ioctls,
    /// The kernel's own KVM selftests on our KVM and on the kernel's, side by side
    Selftests(selftests::Options),
    /// The tests of the crates kvm-ioctls and vmm-sys-util on our KVM
    RustVmm,
    /// Whole guests under strain: memory, processes, disks, other kernels, power cuts
    GuestTests(guest_tests::Options),
    /// Broken images, changing disks and a guest that pokes every register, for minutes
    Hostile(hostile::Options),
    /// What listening to faults costs a boot
    FaultCost,
    /// The same guest on our CPU and on QEMU's TCG: processor time, side by side
    CompareTcg(compare_tcg::Options),
    /// Every form of instruction natively and translated, compared bit for bit
    #[command(disable_help_flag = true)]
    Differential(harness::Arguments),
    /// Random bytes and broken code in every mode: no panic, no hang, no access outside the guest
    #[command(disable_help_flag = true)]
    HostileCode(harness::Arguments),
    /// The handshakes between vCPU threads under every order of steps that the memory model allows
    Loom,
    /// Tests whose threads meet, under the thread sanitizer (with a nightly compiler)
    Tsan,
}

fn main() -> Result<ExitCode> {
    let done = match Cli::parse().task {
        Task::Check => gate::check(),
        Task::Readme => readme::run(),
        Task::Layers => layers::check(),
        Task::Ioctls => gate::ioctls(),
        Task::Selftests(options) => selftests::main(&options),
        Task::RustVmm => rust_vmm::main(),
        Task::GuestTests(options) => guest_tests::main(&options),
        Task::Hostile(options) => hostile::main(&options),
        Task::FaultCost => fault_cost::main(),
        Task::CompareTcg(options) => compare_tcg::main(&options),
        Task::Loom => threads::loom(),
        Task::Tsan => threads::tsan(),
        Task::HostileCode(arguments) => {
            return harness::run("differential", "hostile", &arguments);
        }
        Task::Differential(arguments) => {
            return harness::run("differential", "differential", &arguments);
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}
