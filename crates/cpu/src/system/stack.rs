//! Pushes and pops that take effect together.
//!
//! A transfer works on a copy of the stack pointer and writes RSP only when nothing can fail any
//! more. The stack may be one that SS does not name yet (the inner stack of a gate).

use addr::Gva;
use x86::descriptor::attributes;

use super::offer::Vendor;
use super::operand::within_limit;
use super::registers::{Width, merge};
use super::{Abort, Context, Privilege};
use crate::state::Segment;
use crate::{CpuState, Exception};

/// A stack in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    segment: Segment,
    /// Which bits of the pointer move.
    mask: u64,
    /// The pointer.
    pub(super) sp: u64,
    /// Offsets are linear addresses.
    flat: Flat,
    privilege: Privilege,
    /// Error code of `#SS`.
    code: u32,
}

/// Whether segmentation applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flat {
    /// 64-bit mode: only canonical addresses are asked for.
    Yes,
    No,
}

impl Stack {
    /// The stack of SS:RSP.
    pub(super) fn current(state: &CpuState) -> Self {
        let mask = state.sp_mask();
        Self {
            segment: state.segments.ss,
            mask,
            sp: state.gpr[crate::state::gpr::RSP],
            flat: if state.is_64bit() {
                Flat::Yes
            } else {
                Flat::No
            },
            privilege: state.explicit_privilege(),
            code: 0,
        }
    }

    /// A stack that a gate switches to, in a segment that was just read.
    pub(super) fn inner(segment: Segment, sp: u64, cpl: u8, code: u32) -> Self {
        let mask = if segment.attributes & attributes::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        Self {
            segment,
            mask,
            sp,
            flat: Flat::No,
            privilege: inner_privilege(cpl),
            code,
        }
    }

    /// A stack at a linear address, in long mode.
    pub(super) fn flat(sp: u64, privilege: Privilege) -> Self {
        Self {
            segment: Segment::default(),
            mask: u64::MAX,
            sp,
            flat: Flat::Yes,
            privilege,
            code: 0,
        }
    }

    /// As code that is not of 64 bits sees it.
    pub(super) fn narrow(&mut self) {
        self.sp &= 0xffff_ffff;
        if !self.segment.unusable {
            self.flat = Flat::No;
        }
        self.mask = if self.segment.attributes & attributes::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
    }

    fn fault(&self) -> Abort {
        Exception::with_code(x86::vector::SS, self.code).into()
    }

    fn address(&self, state: &CpuState, sp: u64, len: u64) -> Result<Gva, Abort> {
        if self.flat == Flat::Yes {
            let last = sp.wrapping_add(len - 1);
            if !state.is_canonical(sp) || !state.is_canonical(last) {
                return Err(self.fault());
            }
            return Ok(Gva::new(sp));
        }
        let offset = sp & self.mask;
        let unusable = self.segment.unusable && state.is_protected();
        if unusable || !within_limit(&self.segment, offset, len) {
            return Err(self.fault());
        }
        let linear = self.segment.base.wrapping_add(offset);
        Ok(Gva::new(
            if state.is_long_active() && self.mask == u64::MAX {
                linear
            } else {
                linear & 0xffff_ffff
            },
        ))
    }

    fn moved(&self, by: u64) -> u64 {
        merge(self.sp, self.sp.wrapping_add(by), self.mask)
    }

    /// Pushes a value.
    pub(super) fn push(
        &mut self,
        ctx: &mut Context<'_>,
        value: u64,
        width: Width,
    ) -> Result<(), Abort> {
        let len = width.bytes();
        let sp = self.moved(len.wrapping_neg());
        let gva = self.address(ctx.state, sp, len)?;
        ctx.memory
            .write(gva, &value.to_le_bytes()[..len as usize], self.privilege)?;
        self.sp = sp;
        Ok(())
    }

    /// Pushes a selector. In a slot of 32 bits Intel's CPUs write only the lower 16 (SDM 2, `PUSH`).
    pub(super) fn push_selector(
        &mut self,
        ctx: &mut Context<'_>,
        selector: u16,
        width: Width,
    ) -> Result<(), Abort> {
        if width != Width::Dword || ctx.offer.vendor == Vendor::Amd {
            return self.push(ctx, u64::from(selector), width);
        }
        let sp = self.moved(width.bytes().wrapping_neg());
        let gva = self.address(ctx.state, sp, 2)?;
        ctx.memory
            .write(gva, &selector.to_le_bytes(), self.privilege)?;
        self.sp = sp;
        Ok(())
    }

    /// Pushes several values, the first one highest, all or none.
    pub(super) fn push_all(
        &mut self,
        ctx: &mut Context<'_>,
        values: &[u64],
        width: Width,
    ) -> Result<(), Abort> {
        let start = *self;
        for &value in values {
            if let Err(abort) = self.push(ctx, value, width) {
                *self = start;
                return Err(abort);
            }
        }
        Ok(())
    }

    /// Reads the value `index` slots above the top.
    pub(super) fn peek(
        &self,
        ctx: &mut Context<'_>,
        index: u64,
        width: Width,
    ) -> Result<u64, Abort> {
        let len = width.bytes();
        let gva = self.address(ctx.state, self.moved(index * len), len)?;
        let mut bytes = [0; 8];
        ctx.memory
            .read(gva, &mut bytes[..len as usize], self.privilege)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Pops a value.
    pub(super) fn pop(&mut self, ctx: &mut Context<'_>, width: Width) -> Result<u64, Abort> {
        let value = self.peek(ctx, 0, width)?;
        self.drop_bytes(width.bytes());
        Ok(value)
    }

    /// Moves the pointer up.
    pub(super) fn drop_bytes(&mut self, bytes: u64) {
        self.sp = self.moved(bytes);
    }

    /// The pointer becomes RSP.
    pub(super) fn commit(&self, state: &mut CpuState) {
        state.gpr[crate::state::gpr::RSP] = self.sp;
    }

    /// Pushes the first value highest, in one write, at an address known to be aligned to eight
    /// bytes or not: the frame of long mode.
    pub(super) fn push_frame(
        &mut self,
        ctx: &mut Context<'_>,
        values: &[u64],
    ) -> Result<(), Abort> {
        let mut bytes = [0; 64];
        let len = values.len() * 8;
        for (slot, value) in bytes.chunks_exact_mut(8).zip(values.iter().rev()) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        let sp = self.sp.wrapping_sub(len as u64);
        let written = self
            .address(ctx.state, sp, len as u64)
            .and_then(|gva| ctx.memory.write(gva, &bytes[..len], self.privilege));
        if written.is_err() {
            // Slot by slot, so that CR2 names the one that faults first.
            return self.push_all(ctx, values, Width::Qword);
        }
        self.sp = sp;
        Ok(())
    }

    /// Reads `N` slots of eight bytes from the top, in one read.
    pub(super) fn peek_frame<const N: usize>(
        &self,
        ctx: &mut Context<'_>,
    ) -> Result<[u64; N], Abort> {
        let mut bytes = [0; 64];
        let gva = self.address(ctx.state, self.sp, N as u64 * 8)?;
        ctx.memory.read(gva, &mut bytes[..N * 8], self.privilege)?;
        let mut values = [0; N];
        for (value, slot) in values.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut raw = [0; 8];
            raw.copy_from_slice(slot);
            *value = u64::from_le_bytes(raw);
        }
        Ok(values)
    }
}

/// With whose rights a transfer writes to the stack of a more privileged level.
fn inner_privilege(cpl: u8) -> Privilege {
    if cpl == 3 {
        Privilege::User
    } else {
        Privilege::Implicit
    }
}
