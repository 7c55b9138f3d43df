//! XSAVE on the image.

use x86::control::{Cr0, Cr4};
use x86::vector;

use super::Machine;
use crate::system::Next;

const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23]; // xsave64 [rbx]
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const AREA: u64 = 0x6000;

fn prepared() -> Machine {
    let mut m = Machine::long();
    m.state.cr4 |= Cr4::OSXSAVE.bits();
    m.state.xcr0 = 7;
    m.state.gpr[3] = AREA;
    m.state.gpr[0] = 7;
    let image = m.fpu.image_mut();
    image[160..416].fill(0x5a);
    image[576..832].fill(0xa5);
    m.fpu.set_xstate_bv(6);
    m
}

#[test]
fn there_and_back() {
    let mut m = prepared();
    m.put(AREA + 512, &[0xff; 8]);
    assert_eq!(m.run(XSAVE64), Ok(Next::Sequential));
    assert_eq!(m.get(AREA + 512, 8), !7 | 6);
    m.put(AREA + 512, &6u64.to_le_bytes());
    let saved = m.fpu.clone();
    m.fpu = crate::fpu::FpuState::default();
    assert_eq!(m.run(XRSTOR64), Ok(Next::Sequential));
    assert!(m.fpu == saved);
}

#[test]
fn initial_components() {
    let mut m = prepared();
    m.put(AREA + 512, &0u64.to_le_bytes());
    m.put(AREA + 24, &0x1f80u32.to_le_bytes());
    assert_eq!(m.run(XRSTOR64), Ok(Next::Sequential));
    assert_eq!(m.fpu.xstate_bv(), 0);
    assert!(m.fpu == crate::fpu::FpuState::default());
}

#[test]
fn compacted() {
    let mut m = prepared();
    m.state.gpr[0] = 3;
    assert_eq!(m.run(XSAVEC64), Ok(Next::Sequential));
    assert_eq!(
        (m.get(AREA + 512, 8), m.get(AREA + 520, 8)),
        (2, 1 << 63 | 3)
    );
    assert_eq!(m.get(AREA + 160, 8), 0x5a5a_5a5a_5a5a_5a5a);
    assert_eq!(m.get(AREA + 576, 8), 0);
    assert_eq!(m.run(XRSTOR64), Ok(Next::Sequential));
    assert_eq!(m.fpu.xstate_bv(), 6);
}

#[test]
fn faults() {
    let mut m = prepared();
    m.state.gpr[3] = AREA + 16;
    m.faults(XSAVE64, vector::GP, Some(0));
    m.state.gpr[3] = AREA;
    m.put(AREA + 512, &8u64.to_le_bytes());
    m.faults(XRSTOR64, vector::GP, Some(0));
    m.put(AREA + 512, &0u64.to_le_bytes());
    m.put(AREA + 24, &0x1_0000u32.to_le_bytes());
    m.faults(XRSTOR64, vector::GP, Some(0));
    m.state.cr0 |= Cr0::TS.bits();
    m.faults(XSAVE64, vector::NM, None);
    m.state.cr4 &= !Cr4::OSXSAVE.bits();
    m.faults(XSAVE64, vector::UD, None);
}
