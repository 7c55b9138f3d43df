//! Debug registers, breakpoints, and what the monitor watches for (SDM 3B, chapter 19; `api.rst`,
//! `KVM_SET_GUEST_DEBUG`).

use addr::Gva;
use iced_x86::Instruction;
use x86::control::Cr4;
use x86::debug::{
    Condition, DR6_B, DR6_BD, DR6_BS, DR6_FIXED_1, DR6_VOLATILE, DR7_ENABLE_ALL, DR7_FIXED_1,
    DR7_GD, DR7_VOLATILE, breakpoint,
};
use x86::vector;

use super::fault::{debug, general, undefined};
use super::{Abort, Context, Effects, GuestDebug, Next};
use crate::{CpuState, DebugExit, Exit};

/// How data is touched, for watchpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataAccess {
    /// A load.
    Read,
    /// A store.
    Write,
}

/// Four addresses and their conditions: the guest's, or the monitor's in their place.
fn registers<'a>(state: &'a CpuState, guest_debug: &'a GuestDebug) -> (&'a [u64; 4], u64) {
    if guest_debug.enabled && guest_debug.hardware_breakpoints {
        (&guest_debug.dr, guest_debug.dr7)
    } else {
        (&state.dr, state.dr7)
    }
}

/// Bits of DR6 for the breakpoints that an access meets.
fn matching(dr: &[u64; 4], dr7: u64, gva: Gva, len: u64, wanted: &[Condition]) -> u64 {
    let mut bits = 0;
    for n in 0..4u32 {
        let at = breakpoint(dr7, n);
        if !at.enabled || !wanted.contains(&at.condition) {
            continue;
        }
        let first = dr[n as usize] & !(at.len - 1);
        let above = gva.raw().wrapping_sub(first);
        let below = first.wrapping_sub(gva.raw());
        if above < at.len || below < len {
            bits |= 1 << n;
        }
    }
    bits
}

/// Bits of DR6 for the data breakpoints that an access of `len` bytes meets; the trap is due after
/// the instruction.
pub(super) fn data_breakpoints(
    state: &CpuState,
    guest_debug: &GuestDebug,
    gva: Gva,
    len: u64,
    access: DataAccess,
) -> u64 {
    let (dr, dr7) = registers(state, guest_debug);
    if dr7 & DR7_ENABLE_ALL == 0 {
        return 0;
    }
    let wanted: &[Condition] = match access {
        DataAccess::Read => &[Condition::ReadWrite],
        DataAccess::Write => &[Condition::ReadWrite, Condition::Write],
    };
    matching(dr, dr7, gva, len, wanted)
}

/// The address ranges that data breakpoints watch.
pub(super) fn watched_ranges(
    state: &CpuState,
    guest_debug: &GuestDebug,
) -> impl Iterator<Item = (Gva, u64)> {
    let (&dr, dr7) = registers(state, guest_debug);
    (0..4u32).filter_map(move |n| {
        let at = breakpoint(dr7, n);
        let data = matches!(at.condition, Condition::Write | Condition::ReadWrite);
        let first = dr[n as usize] & !(at.len - 1);
        (at.enabled && data).then_some((Gva::new(first), at.len))
    })
}

/// Whether any breakpoint or watchpoint is on.
pub(super) fn has_breakpoints(state: &CpuState, guest_debug: &GuestDebug) -> bool {
    registers(state, guest_debug).1 & DR7_ENABLE_ALL != 0
}

/// Whether any instruction breakpoint is enabled.
pub(super) fn has_instruction_breakpoints(state: &CpuState, guest_debug: &GuestDebug) -> bool {
    let (_, dr7) = registers(state, guest_debug);
    dr7 & DR7_ENABLE_ALL != 0
        && (0..4).any(|n| {
            let at = breakpoint(dr7, n);
            at.enabled && at.condition == Condition::Execute
        })
}

impl Context<'_> {
    /// Bits of DR6 for instruction breakpoints at RIP.
    pub(super) fn instruction_breakpoints(&self) -> u64 {
        let (dr, dr7) = registers(self.state, self.guest_debug);
        if dr7 & DR7_ENABLE_ALL == 0 {
            return 0;
        }
        let linear = self.linear_rip();
        let mut bits = 0;
        for n in 0..4u32 {
            let at = breakpoint(dr7, n);
            let here = at.condition == Condition::Execute && dr[n as usize] == linear.raw();
            if at.enabled && here {
                bits |= 1 << n;
            }
        }
        bits
    }

    /// The linear address of RIP.
    pub(super) fn linear_rip(&self) -> Gva {
        let state = &*self.state;
        Gva::new(if state.is_64bit() {
            state.rip
        } else {
            state.segments.cs.base.wrapping_add(state.rip) & 0xffff_ffff
        })
    }

    /// Leaves for the monitor where it, not the guest, waits for these debug events.
    pub(super) fn report_debug(&mut self, bits: u64) -> Result<(), Abort> {
        let wants = self.guest_debug;
        if !wants.enabled {
            return Ok(());
        }
        let breakpoints = wants.hardware_breakpoints && bits & DR6_B != 0;
        let step = wants.single_step && bits & DR6_BS != 0;
        if breakpoints || step {
            return Err(self.debug_exit(vector::DB, bits));
        }
        Ok(())
    }

    pub(super) fn debug_exit(&self, vector: u8, bits: u64) -> Abort {
        let (_, dr7) = registers(self.state, self.guest_debug);
        Exit::Debug(DebugExit {
            vector,
            pc: self.linear_rip(),
            dr6: bits | DR6_FIXED_1,
            dr7,
        })
        .into()
    }

    /// `MOV` to and from debug registers.
    pub(super) fn mov_debug(&mut self, instruction: &Instruction) -> Result<Next, Abort> {
        let writes = instruction.op0_register().is_dr();
        let register = if writes {
            instruction.op0_register()
        } else {
            instruction.op1_register()
        };
        let number = self.debug_register(register.number())?;
        let next = self.next_rip(instruction);
        if writes {
            let value = self.state.register(instruction.op1_register());
            self.write_debug(number, value)?;
        } else {
            let value = match number {
                6 => self.state.dr6,
                7 => self.state.dr7,
                n => self.state.dr[n],
            };
            self.state.set_register(instruction.op0_register(), value);
        }
        self.state.rip = next;
        Ok(Next::Sequential)
    }

    /// The register that a number names, access checked: DR4 and DR5 are DR6 and DR7 without
    /// CR4.DE.
    fn debug_register(&mut self, number: usize) -> Result<usize, Abort> {
        let aliased = matches!(number, 4 | 5);
        self.require_cpl0()?;
        if number > 7 || aliased && self.state.cr4_has(Cr4::DE) {
            return Err(undefined());
        }
        let (_, dr7) = registers(self.state, self.guest_debug);
        if dr7 & DR7_GD != 0 {
            let watched = self.guest_debug.enabled && self.guest_debug.hardware_breakpoints;
            return Err(if watched {
                self.debug_exit(vector::DB, DR6_BD)
            } else {
                debug(DR6_BD)
            });
        }
        Ok(if aliased { number + 2 } else { number })
    }

    fn write_debug(&mut self, number: usize, value: u64) -> Result<(), Abort> {
        if number >= 6 && value >> 32 != 0 {
            return Err(general());
        }
        match number {
            6 => self.state.dr6 = value & DR6_VOLATILE | DR6_FIXED_1,
            7 => self.state.dr7 = value & DR7_VOLATILE | DR7_FIXED_1,
            n => self.state.dr[n] = value,
        }
        self.effects |= Effects::DEBUG;
        Ok(())
    }
}
