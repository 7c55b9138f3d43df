//! Random sequences of API calls on a whole VM, with little guests run in between, on the kernel's
//! KVM and on ours: the same errnos, outputs, exits, states, memory and events.
//!
//! ```text
//!   seed ─► steps ─► kernel's KVM ─┐
//!              └───► ours ─────────┴─► compare after every step
//!                     differ: leave steps out while they still differ, and print what is left
//! ```
//!
//! `cargo test -p kvm --test api_oracle` runs a few; `API_ORACLE=SEED..SEED` says which, for a long
//! run; a seed alone is one sequence. Nested, shadow and direct paging take turns.
//!
//! Not compared, because the KVM in software of some hosts answers otherwise than kvm.ko's source says:
//!
//! | what                                       | kvm.ko (`arch/x86/kvm`)            | that one         |
//! |--------------------------------------------|------------------------------------|------------------|
//! | `VMCALL`, `VMMCALL`                        | `kvm_emulate_hypercall`            | hangs            |
//! | CPUID leaves 1 and 7                       | as set                             | bits of its own  |
//! | `WRMSR` of a PAT with bad types            | `#GP` (`kvm_pat_valid`)            | accepts          |
//! | `IA32_MISC_ENABLE`                         | PMU bits read-only                 | none             |
//! | `IA32_ARCH_CAPABILITIES`, microcode        | there                              | `#GP`, 0         |
//! | the local APIC's ISR                       | kept                               | not kept         |
//! | an 8259's interrupt that waits at `STI`    | taken behind the next instruction  | at the next entry |
//! | an INIT by MSI, level 0                    | taken (`irq->level = 1`)           | ignored          |
//! | no memory under code, `KVM_PRE_FAULT_MEMORY` | emulation failure, filled in     | `ENOSPC`, `EOPNOTSUPP` |
//!
//! And where ours does otherwise than kvm.ko on purpose: `OUTS` comes to the monitor in one exit, not
//! one by one; `KVM_TRANSLATE` marks nothing accessed; an eventfd's count from before it became an
//! irqfd is taken.

#![expect(unsafe_code, reason = "ioctls, and the C unions in KVM's structures")]

mod call;
mod compare;
#[path = "../draw/mod.rs"]
mod draw;
mod exit;
mod guest;
mod perform;
mod side;
mod watch;

use std::time::{Duration, Instant};

use call::{Step, opening};
use compare::{Compared, Difference, run};
use fastrand::Rng;
use kvm::PagingPath;
use watch::Watch;

/// Steps of a sequence, besides those that it begins with.
const STEPS: u64 = 40;
/// Sequences that every run makes.
const QUICK: std::ops::Range<u64> = 1..101;
/// How long a guest may take. A difference must also show with the longer ones: on a busy host a slow
/// KVM may be interrupted in the middle of a loop.
const PATIENCE: Duration = Duration::from_millis(50);
const LONG_PATIENCE: Duration = Duration::from_millis(400);
const LONGEST_PATIENCE: Duration = Duration::from_secs(4);

fn seeds() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("API_ORACLE") else {
        return QUICK;
    };
    let (first, last) = text.split_once("..").unwrap_or((&text, ""));
    let first = first.parse().expect("a seed");
    first..last.parse().unwrap_or(first + 1)
}

fn sequence(seed: u64) -> Vec<Step> {
    let mut random = Rng::with_seed(seed);
    let mut steps = opening(&mut random);
    for _ in 0..random.u64(..STEPS) {
        steps.push(Step::random(&mut random));
    }
    steps
}

fn paging(seed: u64) -> PagingPath {
    [PagingPath::Nested, PagingPath::Shadow, PagingPath::Direct][(seed % 3) as usize]
}

/// Leaves out what is not needed for a difference: halves first, then single steps.
fn shrink(
    mut steps: Vec<Step>,
    mut found: Difference,
    paging: PagingPath,
    watch: &Watch,
) -> (Vec<Step>, Difference) {
    let deadline = Instant::now() + Duration::from_secs(20);

    steps.truncate(found.step + 1);
    let mut size = steps.len() / 2;
    while size > 0 && Instant::now() < deadline {
        // The slot that guests live in stays.
        let mut at = 1;
        while at + size <= steps.len() && Instant::now() < deadline {
            let mut fewer = steps.clone();
            fewer.drain(at..at + size);
            match run(&fewer, paging, watch, LONG_PATIENCE) {
                Compared::Differ(smaller) => {
                    fewer.truncate(smaller.step + 1);
                    (steps, found) = (fewer, smaller);
                }
                _ => at += size,
            }
        }
        size /= 2;
    }
    (steps, found)
}

#[test]
fn random_sequences_give_the_same() {
    let watch = Watch::new();
    let (mut failed, mut made) = (Vec::new(), 0);
    for seed in seeds() {
        let steps = sequence(seed);
        made += steps.len();
        match run(&steps, paging(seed), &watch, PATIENCE) {
            Compared::Same => continue,
            Compared::Differ(_) => {}
            Compared::NoKernel => {
                assert!(
                    std::env::var_os("REQUIRE_KVM").is_none(),
                    "/dev/kvm does not open"
                );
                println!("skipped: /dev/kvm does not open");
                return;
            }
        }
        let again = |patience| run(&steps, paging(seed), &watch, patience);
        if matches!(again(LONG_PATIENCE), Compared::Same) {
            continue;
        }
        let Compared::Differ(found) = again(LONGEST_PATIENCE) else {
            continue;
        };
        let (steps, difference) = shrink(steps, found, paging(seed), &watch);
        println!("seed {seed}, {:?} paging: {difference}", paging(seed));
        for step in &steps {
            println!("    {}", compare::describe(step));
        }
        failed.push(seed);
    }
    println!("{made} steps compared");
    assert!(failed.is_empty(), "the two differ with seeds {failed:?}");
}
