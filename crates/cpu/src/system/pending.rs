//! Exits that wait for the monitor's answer.
//!
//! The registers that the monitor sees meanwhile are those before the instruction, as with the
//! kernel's KVM. What the answer does to them is noted here when the instruction leaves, and done
//! when the answer comes, so that a vCPU whose state is saved after that (`immediate_exit`) is past
//! the instruction. Only what writes to memory (`INS`) has to run again.
//!
//! | state        | left by                | the answer                                |
//! |--------------|------------------------|-------------------------------------------|
//! | `In`         | `IN`                   | RAX, RIP                                  |
//! | `Out`        | `OUT`, `OUTS`          | RIP; RSI and RCX of `OUTS`                |
//! | `Ins`        | `INS`                  | becomes `InsData`                         |
//! | `InsData`    | the answer to `Ins`    | taken by the next run of the instruction  |
//! | `ReadMsr`    | `RDMSR`                | EDX:EAX, RIP; or `#GP`                    |
//! | `WriteMsr`   | `WRMSR`                | RIP; or `#GP`                             |
//! | `Hypercall`  | `VMCALL`               | RAX, RIP                                  |
//!
//! The instruction is named by its RIP: if the monitor moved RIP meanwhile (a reset), the answer is
//! dropped.

use x86::debug::DR6_BS;
use x86::rflags;
use x86::vector;

use super::Pending;
use super::registers::merge;
use crate::state::gpr;
use crate::{CpuState, Exception};

/// An exit that the monitor works on, or its answer. `rip` is the instruction's, `next` the one
/// behind it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are described above")]
pub enum PendingExit {
    /// None.
    #[default]
    None,
    /// `IN` of `size` bytes.
    In { rip: u64, next: u64, size: u8 },
    /// `OUT` or `OUTS` of these bytes; then RSI and RCX.
    Out {
        rip: u64,
        next: u64,
        data: Vec<u8>,
        rsi: u64,
        rcx: u64,
    },
    /// `INS`.
    Ins { rip: u64 },
    /// `INS` with its bytes.
    InsData { rip: u64, data: Vec<u8> },
    /// `RDMSR`.
    ReadMsr { rip: u64, next: u64 },
    /// `WRMSR`.
    WriteMsr { rip: u64, next: u64 },
    /// `VMCALL`, `VMMCALL`.
    Hypercall { rip: u64, next: u64 },
}

impl PendingExit {
    /// The bytes that go out with [`crate::Exit::Io`]; empty for input.
    pub fn output(&self) -> &[u8] {
        match self {
            Self::Out { data, .. } => data,
            _ => &[],
        }
    }
}

/// What is left to do after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Nothing: the instruction is done.
    Done,
    /// The instruction must run again, for one step, even where the vCPU is to leave at once.
    RunAgain,
}

/// The instruction that left is over.
fn retire(state: &mut CpuState, pending: &mut Pending, next: u64) {
    state.rip = next;
    pending.retired = true;
    if state.rflags & rflags::TF != 0 {
        pending.debug |= DR6_BS;
    }
    state.rflags &= !rflags::RF;
    state.events.sti_shadow = false;
    state.events.mov_ss_shadow = false;
}

/// The monitor has dealt with [`crate::Exit::Io`]: `data` are the bytes that come in, ignored for
/// output.
pub fn complete_io(state: &mut CpuState, pending: &mut Pending, data: &[u8]) -> Completion {
    match std::mem::take(&mut pending.exit) {
        PendingExit::In { rip, next, size } if rip == state.rip => {
            let mut bytes = [0; 8];
            let len = usize::from(size).min(data.len());
            bytes[..len].copy_from_slice(&data[..len]);
            state.set_accumulator(u64::from_le_bytes(bytes), u64::from(size));
            retire(state, pending, next);
        }
        PendingExit::Out {
            rip,
            next,
            rsi,
            rcx,
            ..
        } if rip == state.rip => {
            state.gpr[gpr::RSI] = rsi;
            state.gpr[gpr::RCX] = rcx;
            if next == rip {
                // More of a repeated OUTS follows.
                return Completion::Done;
            }
            retire(state, pending, next);
        }
        PendingExit::Ins { rip } if rip == state.rip => {
            pending.exit = PendingExit::InsData {
                rip,
                data: data.to_vec(),
            };
            return Completion::RunAgain;
        }
        _ => {}
    }
    Completion::Done
}

/// The monitor has dealt with [`crate::Exit::Msr`]: the value that was read (anything for a write),
/// or `None` where the guest gets `#GP`.
pub fn complete_msr(state: &mut CpuState, pending: &mut Pending, value: Option<u64>) {
    let (next, read) = match std::mem::take(&mut pending.exit) {
        PendingExit::ReadMsr { rip, next } if rip == state.rip => (next, true),
        PendingExit::WriteMsr { rip, next } if rip == state.rip => (next, false),
        _ => return,
    };
    let Some(value) = value else {
        state.events.exception = Some(Exception::with_code(vector::GP, 0));
        return;
    };
    if read {
        state.set_edx_eax(value);
    }
    retire(state, pending, next);
}

/// The monitor has dealt with [`crate::Exit::Hypercall`]: RAX.
pub fn complete_hypercall(state: &mut CpuState, pending: &mut Pending, result: u64) {
    if let PendingExit::Hypercall { rip, next } = std::mem::take(&mut pending.exit)
        && rip == state.rip
    {
        state.gpr[gpr::RAX] = result;
        retire(state, pending, next);
    }
}

impl CpuState {
    /// Sets AL, AX or EAX; EAX clears the upper half.
    pub(super) fn set_accumulator(&mut self, value: u64, size: u64) {
        let rax = self.gpr[gpr::RAX];
        self.gpr[gpr::RAX] = match size {
            1 => merge(rax, value, 0xff),
            2 => merge(rax, value, 0xffff),
            _ => value & 0xffff_ffff,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_ends_the_instruction() {
        let mut state = CpuState {
            rip: 7,
            ..CpuState::default()
        };
        state.gpr[gpr::RAX] = 0x1234_5678;
        let mut pending = Pending {
            exit: PendingExit::In {
                rip: 7,
                next: 8,
                size: 1,
            },
            ..Pending::default()
        };
        assert_eq!(
            complete_io(&mut state, &mut pending, &[0xab]),
            Completion::Done
        );
        assert_eq!((state.gpr[gpr::RAX], state.rip), (0x1234_56ab, 8));
        assert_eq!(pending.exit, PendingExit::None);
    }

    #[test]
    fn an_answer_after_a_reset_is_dropped() {
        let mut state = CpuState {
            rip: 0xfff0,
            ..CpuState::default()
        };
        let mut pending = Pending {
            exit: PendingExit::In {
                rip: 7,
                next: 8,
                size: 1,
            },
            ..Pending::default()
        };
        complete_io(&mut state, &mut pending, &[0xab]);
        assert_eq!((state.gpr[gpr::RAX], state.rip), (0, 0xfff0));
    }

    #[test]
    fn refused_msr_is_a_general_protection_fault() {
        let mut state = CpuState {
            rip: 7,
            ..CpuState::default()
        };
        let mut pending = Pending {
            exit: PendingExit::WriteMsr { rip: 7, next: 9 },
            ..Pending::default()
        };
        complete_msr(&mut state, &mut pending, None);
        assert_eq!(
            state.events.exception,
            Some(Exception::with_code(vector::GP, 0))
        );
        assert_eq!(state.rip, 7);
    }
}
