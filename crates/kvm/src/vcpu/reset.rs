//! The state after RESET and after INIT (SDM 3A, 11.1.1 and table 11-1).

use cpu::{CpuState, Segment, Segments, TableRegister};
use x86::control::Cr0;
use x86::descriptor::attributes as attribute;
use x86::{debug, rflags, xstate};

/// PAT after a reset.
pub(crate) const PAT: u64 = 0x0007_0406_0007_0406;

/// What is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Power on: everything.
    Reset,
    /// INIT: what survives, survives.
    Init,
}

/// Brings the state to where the CPU starts. `signature` is CPUID leaf 1's EAX, where the guest has
/// one.
pub(crate) fn reset(state: &mut CpuState, cause: Cause, signature: Option<u32>) {
    let old = state.clone();
    *state = CpuState {
        rip: 0xfff0,
        rflags: rflags::FIXED,
        segments: segments(),
        gdtr: TABLE,
        idtr: TABLE,
        cr0: Cr0::ET.bits() | caching(cause, old.cr0),
        dr6: debug::DR6_FIXED_1,
        dr7: debug::DR7_FIXED_1,
        xcr0: xstate::X87,
        ..CpuState::default()
    };
    state.gpr[cpu::state::gpr::RDX] = u64::from(signature.unwrap_or(0x600));
    state.msrs.pat = PAT;
    if cause == Cause::Init {
        survive(state, &old);
    }
}

const TABLE: TableRegister = TableRegister {
    base: 0,
    limit: 0xffff,
};

/// CD and NW are set by RESET and kept by INIT.
fn caching(cause: Cause, old: u64) -> u64 {
    let bits = (Cr0::CD | Cr0::NW).bits();
    match cause {
        Cause::Reset => bits,
        Cause::Init => old & bits,
    }
}

fn survive(state: &mut CpuState, old: &CpuState) {
    state.xcr0 = old.xcr0;
    state.msrs = old.msrs;
    state.msrs.efer = 0;
    state.tsc_offset = old.tsc_offset;
    state.tsc_ratio = old.tsc_ratio;
    state.pkru = old.pkru;
}

fn segments() -> Segments {
    let kind = |kind: u16, s: u16| Segment {
        base: 0,
        limit: 0xffff,
        selector: 0,
        attributes: kind | s | attribute::P,
        unusable: false,
    };
    let data = kind(0x3, attribute::S);
    Segments {
        es: data,
        cs: Segment {
            base: 0xffff_0000,
            selector: 0xf000,
            ..kind(0xb, attribute::S)
        },
        ss: data,
        ds: data,
        fs: data,
        gs: data,
        ldtr: kind(0x2, 0),
        tr: kind(0xb, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_instruction_is_at_the_reset_vector() {
        let mut state = CpuState::default();
        reset(&mut state, Cause::Reset, None);
        assert_eq!(state.segments.cs.base + state.rip, 0xffff_fff0);
        assert_eq!(state.cr0, 0x6000_0010);
        assert_eq!(state.gpr[cpu::state::gpr::RDX], 0x600);
        assert_eq!(state.rflags, 2);
    }

    #[test]
    fn init_keeps_what_the_manual_says() {
        let mut state = CpuState::default();
        reset(&mut state, Cause::Reset, None);
        state.xcr0 = 7;
        state.cr0 = Cr0::ET.bits() | Cr0::PE.bits() | Cr0::NW.bits();
        state.msrs.efer = 0x500;
        state.msrs.star = 5;
        reset(&mut state, Cause::Init, Some(0xa10f11));
        assert_eq!(state.xcr0, 7);
        assert_eq!(state.cr0, Cr0::ET.bits() | Cr0::NW.bits());
        assert_eq!((state.msrs.efer, state.msrs.star), (0, 5));
        assert_eq!(state.gpr[cpu::state::gpr::RDX], 0xa10f11);
    }
}
