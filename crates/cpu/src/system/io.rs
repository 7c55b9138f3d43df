//! Exits that wait for the monitor's answer, and port access.

use super::Pending;
use crate::CpuState;

/// An exit that the monitor works on, or its answer.
///
/// The instruction that left is named by its RIP: should the monitor move RIP meanwhile, the answer
/// is dropped.
#[derive(Clone, Debug, Default)]
pub enum PendingExit {
    /// None.
    #[default]
    None,
    /// Left for the monitor.
    Asked {
        /// RIP of the instruction.
        rip: u64,
        /// Bytes that go out, or how many are to come in.
        data: Vec<u8>,
    },
    /// The monitor has answered.
    Answered {
        /// RIP of the instruction.
        rip: u64,
        /// The bytes that came in.
        data: Vec<u8>,
    },
}

/// The monitor has dealt with [`crate::Exit::Io`]: `data` are the bytes that come in, empty for
/// `OUT`. Done at once for `IN` and `OUT`; a string instruction must run again for one step even
/// where the vCPU is to leave at once, which `true` says.
pub fn complete_io(state: &mut CpuState, pending: &mut Pending, data: &[u8]) -> bool {
    if let PendingExit::Asked { rip, .. } = pending.exit
        && rip == state.rip
    {
        pending.exit = PendingExit::Answered {
            rip,
            data: data.to_vec(),
        };
        return true;
    }
    false
}

/// The monitor has dealt with [`crate::Exit::Msr`]: the value that was read (anything for a write),
/// or `None` where the guest gets `#GP`.
pub fn complete_msr(state: &mut CpuState, pending: &mut Pending, value: Option<u64>) {
    let _ = (state, pending, value);
}

/// The monitor has dealt with [`crate::Exit::Hypercall`]: RAX.
pub fn complete_hypercall(state: &mut CpuState, pending: &mut Pending, result: u64) {
    let _ = (state, pending, result);
}
