//! Guests whose end the manuals say: first on our CPU, which must end so; then on `/dev/kvm`, where
//! whoever differs from the manuals is named with the reason.
//!
//! | subject | section of the SDM |
//! |---|---|
//! | [`fast`]: SYSENTER and SYSEXIT, what SYSCALL leaves in the x87 pointers | 2B, SYSENTER; 1, 8.1.8 |
//! | [`rights`]: UMIP, SMAP, SMEP, INVPCID, RDPMC, XSETBV | 3A, 2.5, 4.6; 2, the instructions |
//! | [`nested`]: faults in the delivery of faults | 3A, 6.15, table 6-5 |
//! | [`tasks`]: faults by task gates, nested tasks, the T bit | 3A, 8.3 |
//! | [`debug`]: steps, breakpoints, RF | 3B, 17.2, 17.3 |
//! | [`strings`]: faults amid string instructions, branches to where no code can be | 1, 7.3.9 |

mod debug;
mod fast;
mod nested;
mod rights;
mod strings;
mod tasks;

use cpu::CpuState;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::{agree, with_rax};
use crate::guest::{End, Guest, Outcome};
use crate::layout::{CODE, HANDLERS, Start};
use crate::ours::Ours;

/// What becomes of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// In a handler that has halted: its vector, the error code, and the RIP that was pushed.
    Fault(u8, Option<u64>, u64),
    /// In a `HLT` of level 0; RIP behind it.
    Halt(u64),
    Shutdown,
}

use Ends::{Fault, Halt, Shutdown};

const UD: u8 = 6;
const DF: u8 = 8;
const TS: u8 = 10;
const NP: u8 = 11;
const GP: u8 = 13;
const PF: u8 = 14;

/// A guest, its end, and what else is to be looked at.
struct Case {
    guest: Guest,
    ends: Ends,
    also: Box<dyn Fn(&Outcome)>,
}

impl Case {
    fn new(name: &str, start: Start, code: &[u8], ends: Ends) -> Self {
        Self {
            guest: with_rax(name, start, code, 0),
            ends,
            also: Box::new(|_| ()),
        }
    }

    fn state(mut self, change: impl FnOnce(&mut CpuState)) -> Self {
        change(&mut self.guest.state);
        self
    }

    fn put(mut self, at: u64, bytes: &[u8]) -> Self {
        self.guest.put(at, bytes);
        self
    }

    fn also(mut self, look: impl Fn(&Outcome) + 'static) -> Self {
        self.also = Box::new(look);
        self
    }

    fn check(&self, outcome: &Outcome) {
        let name = &self.guest.name;
        let found = end_of(outcome);
        assert_eq!(
            found, self.ends,
            "{name}: {:x?}, {:x?}",
            outcome.end, outcome.state
        );
        (self.also)(outcome);
    }
}

/// Where a guest ended, as far as it can be seen.
fn end_of(outcome: &Outcome) -> Ends {
    if outcome.end == End::Shutdown {
        return Shutdown;
    }
    assert_eq!(outcome.end, End::Halt, "{:x?}", outcome.state);
    let state = &outcome.state;
    let rip = state.segments.cs.base + state.rip;
    let Some(at) = rip
        .checked_sub(HANDLERS + 1)
        .filter(|at| at % 16 == 0 && *at < 16 * 256)
    else {
        return Halt(rip);
    };
    let vector = (at / 16) as u8;
    // 64-bit handlers in long mode, those of 32-bit gates in protected mode, the real mode's table.
    let width = match (state.cr0 & 1, state.msrs.efer >> 10 & 1) {
        (0, _) => 2,
        (_, 0) => 4,
        _ => 8,
    };
    let has_code = width != 2 && matches!(vector, 8 | 10..=14 | 17);
    let code = has_code.then(|| pushed(outcome, width, 0));
    Fault(vector, code, pushed(outcome, width, usize::from(has_code)))
}

/// A slot of the stack, from the top.
fn pushed(outcome: &Outcome, width: usize, slot: usize) -> u64 {
    let top = (outcome.state.segments.ss.base + outcome.state.gpr[4]) as usize;
    word(outcome, (top + slot * width) as u64, width)
}

fn word(outcome: &Outcome, at: u64, width: usize) -> u64 {
    let mut raw = [0; 8];
    raw[..width].copy_from_slice(&outcome.memory[at as usize..][..width]);
    u64::from_le_bytes(raw)
}

/// A CPU with everything that these guests use.
fn cpuid() -> CpuId {
    let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        flags: if matches!(function, 7 | 0xd) {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        } else {
            0
        },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let entries = [
        leaf(
            1,
            [
                0,
                0,
                1 << 17 | 1 << 26,
                1 << 11 | 1 << 24 | 1 << 25 | 1 << 26,
            ],
        ),
        // FSGSBASE, SMEP, INVPCID, SMAP; UMIP
        leaf(7, [0, 1 | 1 << 7 | 1 << 10 | 1 << 20, 1 << 2, 0]),
        leaf(0xd, [7, 0, 0, 0]),
        leaf(0x8000_0001, [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 29]),
    ];
    CpuId::from_entries(&entries).expect("four entries")
}

/// All guests end as the manuals say; and on `/dev/kvm` as on our CPU, but for those that are excused.
fn by_the_manual(cases: Vec<Case>, excused: &[(&str, &str)]) {
    let mut ours = Ours::new(&cpuid());
    for case in &cases {
        case.check(&ours.run(&case.guest));
    }
    let guests = cases.into_iter().map(|case| case.guest);
    agree(guests.filter(can_begin).collect(), excused);
}

/// Whether a KVM lets it begin so: it refuses bits of CR4 that it doesn't offer.
fn can_begin(guest: &Guest) -> bool {
    const PCIDE: u64 = 1 << 17;
    guest.state.cr4 & PCIDE == 0
}

/// The end of user code: `HLT` is not for it.
fn user_ends(rip: u64) -> Ends {
    Fault(GP, Some(0), rip)
}

fn is_user(start: Start) -> bool {
    matches!(
        start,
        Start::User32 | Start::UserCompatibility | Start::UserLong
    )
}

/// The end of code of some length that goes through.
fn through(start: Start, code: &[u8]) -> Ends {
    let behind = CODE + code.len() as u64;
    if is_user(start) {
        user_ends(behind)
    } else {
        Halt(behind + 1)
    }
}
