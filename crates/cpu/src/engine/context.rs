//! What translations depend on, worked out from the architectural state.

use x86::control::{Cr0, Cr4};
use x86::descriptor::attributes;
use x86::rflags;

use super::blocks::CodeContext;
use super::frame::View;
use super::vcpu::BlockLength;
use crate::translate::{CodeSize, Mode, SegmentClass};
use crate::{CpuState, Segment};

const EFER_LMA: u64 = 1 << 10;

/// In which privilege level the CPU is.
pub(crate) fn cpl(state: &CpuState) -> u8 {
    if !is_protected(state) {
        return 0;
    }
    if state.rflags & rflags::VM != 0 {
        return 3;
    }
    ((state.segments.ss.attributes & attributes::DPL) >> attributes::DPL_SHIFT) as u8
}

fn is_protected(state: &CpuState) -> bool {
    state.cr0 & Cr0::PE.bits() != 0
}

fn code_size(state: &CpuState) -> CodeSize {
    let cs = state.segments.cs.attributes;
    let long = state.msrs.efer & EFER_LMA != 0;
    if long && cs & attributes::L != 0 && state.rflags & rflags::VM == 0 {
        CodeSize::Bits64
    } else if is_protected(state) && state.rflags & rflags::VM == 0 && cs & attributes::DB != 0 {
        CodeSize::Bits32
    } else if cs & attributes::DB != 0 && !is_protected(state) {
        // Real mode entered with a 32-bit code segment still loaded.
        CodeSize::Bits32
    } else {
        CodeSize::Bits16
    }
}

/// With whose rights data is accessed.
pub(crate) fn view(state: &CpuState) -> View {
    if cpl(state) == 3 {
        View::User
    } else if state.cr4 & Cr4::SMAP.bits() != 0 && state.rflags & rflags::AC != 0 {
        View::SupervisorAcSet
    } else {
        View::Supervisor
    }
}

fn class(segment: &Segment) -> SegmentClass {
    let a = segment.attributes;
    let data_up = a & (attributes::CODE | attributes::DOWN_CONFORMING) == 0
        && a & attributes::WRITABLE_READABLE != 0;
    if segment.unusable || a & attributes::P == 0 || !data_up {
        SegmentClass::Checked
    } else if segment.base == 0 && segment.limit == u32::MAX {
        SegmentClass::Flat
    } else {
        SegmentClass::Based
    }
}

/// In real and virtual-8086 mode the type in the hidden part says nothing.
fn real_class(segment: &Segment) -> SegmentClass {
    if segment.base == 0 && segment.limit == u32::MAX {
        SegmentClass::Flat
    } else {
        SegmentClass::Based
    }
}

fn units(state: &CpuState) -> u32 {
    let cr0 = |bit: Cr0| state.cr0 & bit.bits() != 0;
    let cr4 = |bit: Cr4| state.cr4 & bit.bits() != 0;
    let mut bits = 0;
    if cr0(Cr0::TS) {
        bits |= Mode::X87_NM | Mode::SSE_NM;
        if cr0(Cr0::MP) {
            bits |= Mode::WAIT_NM;
        }
    }
    if cr0(Cr0::EM) {
        bits |= Mode::EM;
    }
    if !cr4(Cr4::OSFXSR) {
        bits |= Mode::SSE_UD;
    }
    if !cr4(Cr4::OSXSAVE) || state.xcr0 & 6 != 6 {
        bits |= Mode::AVX_UD;
    }
    bits
}

/// All that translations depend on.
pub(crate) fn code_context(state: &CpuState, length: BlockLength) -> CodeContext {
    let size = code_size(state);
    let mut mode = Mode::new(size, view(state))
        .with(units(state))
        .with(length.mode_bits());
    if matches!(cpl(state), 1 | 2) {
        mode = mode.with(Mode::MIDDLE);
    }
    if size == CodeSize::Bits64 {
        return CodeContext {
            mode,
            cs_base: 0,
            cs_limit: 0,
        };
    }
    let s = &state.segments;
    if s.ss.attributes & attributes::DB != 0 {
        mode = mode.with(Mode::STACK32);
    }
    let real = !is_protected(state) || state.rflags & rflags::VM != 0;
    for (index, segment) in [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs]
        .iter()
        .enumerate()
    {
        let class = if real {
            real_class(segment)
        } else {
            class(segment)
        };
        mode = mode.with_segment(index, class);
    }
    CodeContext {
        mode,
        cs_base: s.cs.base,
        cs_limit: s.cs.limit,
    }
}
