//! Task switches (SDM 3A, 9.3).
//!
//! Up to the commit point a fault belongs to the old task. From there on the new task's registers
//! are in place, with all segment registers invalid, and a fault while they are loaded one by one
//! is the new task's. [`Effects::TASK_SWITCHED`] tells the two apart.

use addr::Gva;
use iced_x86::Register;
use x86::control::{Cr0, Cr4};
use x86::debug::{DR6_BT, DR7_LOCAL_ENABLES};
use x86::descriptor::{Descriptor, Selector, attributes, system_type};
use x86::rflags;
use x86::tss::{tss16, tss32};
use x86::vector;

use super::far::Transfer;
use super::fault::{general, naming};
use super::registers::{Width, merge};
use super::segment::null_segment;
use super::stack::Stack;
use super::table::{segment_of, virtual8086_segment};
use super::{Abort, Context, Effects, Privilege};
use crate::CpuState;
use crate::state::Segment;

/// What causes a task switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Jump,
    Call,
    Iret,
    /// An event through a task gate; the error code goes on the new task's stack.
    Interrupt {
        error_code: Option<u32>,
    },
}

impl From<Transfer> for Source {
    fn from(transfer: Transfer) -> Self {
        match transfer {
            Transfer::Jump => Self::Jump,
            Transfer::Call => Self::Call,
        }
    }
}

impl Source {
    /// Whether the new task is nested in the old one.
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Interrupt { .. })
    }

    /// The vector of faults that name the new TSS.
    fn wrong(self) -> u8 {
        if self == Self::Iret {
            vector::TS
        } else {
            vector::GP
        }
    }
}

/// The registers that a TSS holds; a 16-bit one has no CR3, FS and GS.
struct Image {
    width: Width,
    cr3: u64,
    ip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

const SEGMENTS: [Register; 6] = [
    Register::ES,
    Register::CS,
    Register::SS,
    Register::DS,
    Register::FS,
    Register::GS,
];

fn is_wide(kind: u8) -> bool {
    matches!(kind, system_type::TSS_AVAILABLE | system_type::TSS_BUSY)
}

fn field(bytes: &[u8], offset: u32, len: usize) -> u64 {
    let mut raw = [0; 8];
    raw[..len].copy_from_slice(&bytes[offset as usize..][..len]);
    u64::from_le_bytes(raw)
}

impl Image {
    fn parse32(bytes: &[u8; 104]) -> Self {
        Self {
            width: Width::Dword,
            cr3: field(bytes, tss32::CR3, 4),
            ip: field(bytes, tss32::EIP, 4),
            flags: field(bytes, tss32::EFLAGS, 4),
            gpr: std::array::from_fn(|n| field(bytes, tss32::EAX + 4 * n as u32, 4)),
            segments: std::array::from_fn(|n| field(bytes, tss32::ES + 4 * n as u32, 2) as u16),
            ldt: field(bytes, tss32::LDT, 2) as u16,
            trap: field(bytes, tss32::TRAP, 2) & 1 != 0,
        }
    }

    fn parse16(bytes: &[u8; 104]) -> Self {
        let mut segments = [0; 6];
        for (n, segment) in segments.iter_mut().take(4).enumerate() {
            *segment = field(bytes, tss16::ES + 2 * n as u32, 2) as u16;
        }
        Self {
            width: Width::Word,
            cr3: 0,
            ip: field(bytes, tss16::IP, 2),
            flags: field(bytes, tss16::FLAGS, 2),
            gpr: std::array::from_fn(|n| field(bytes, tss16::AX + 2 * n as u32, 2)),
            segments,
            ldt: field(bytes, tss16::LDT, 2) as u16,
            trap: false,
        }
    }
}

/// The dynamic fields of the old task, from the instruction pointer to the last segment register,
/// as they lie in its TSS.
fn dynamic_fields(state: &CpuState, width: Width, ip: u64, flags: u64) -> (u32, Vec<u8>) {
    let len = width.bytes() as usize;
    let (start, segments) = if width == Width::Dword {
        (tss32::EIP, 6)
    } else {
        (tss16::IP, 4)
    };
    let mut bytes = Vec::with_capacity(64);
    let mut put = |value: u64| bytes.extend_from_slice(&value.to_le_bytes()[..len]);
    put(ip);
    put(flags);
    state.gpr[..8].iter().for_each(|&value| put(value));
    for register in SEGMENTS.iter().take(segments) {
        put(u64::from(state.segments.get(*register).selector));
    }
    (start, bytes)
}

impl Context<'_> {
    /// Switches to the task of a TSS. `next` is where the old one goes on.
    pub(super) fn switch_task(
        &mut self,
        selector: Selector,
        source: Source,
        next: u64,
    ) -> Result<(), Abort> {
        self.effects -= Effects::TASK_SWITCHED;
        let descriptor = self.checked_tss(selector, source)?;
        let image = self.read_tss_image(descriptor)?;
        self.save_task(source, next)?;
        self.enter_tss(selector, descriptor, source)?;
        self.load_task(&image, source)
    }

    fn checked_tss(&mut self, selector: Selector, source: Source) -> Result<Descriptor, Abort> {
        let wrong = source.wrong();
        if selector.is_null() || selector.is_local() {
            return Err(naming(wrong, selector));
        }
        let descriptor = self.read_descriptor(selector, wrong)?;
        let kinds = if source == Source::Iret {
            [system_type::TSS_BUSY, system_type::TSS16_BUSY]
        } else {
            [system_type::TSS_AVAILABLE, system_type::TSS16_AVAILABLE]
        };
        if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
            return Err(naming(wrong, selector));
        }
        if !descriptor.is_present() {
            return Err(naming(vector::NP, selector));
        }
        let least = if is_wide(descriptor.kind()) {
            tss32::MIN_LIMIT
        } else {
            tss16::MIN_LIMIT
        };
        if descriptor.limit() < least {
            return Err(naming(vector::TS, selector));
        }
        Ok(descriptor)
    }

    fn read_tss_image(&mut self, descriptor: Descriptor) -> Result<Image, Abort> {
        let mut bytes = [0; 104];
        let wide = is_wide(descriptor.kind());
        let len = if wide {
            tss32::MIN_LIMIT
        } else {
            tss16::MIN_LIMIT
        } as usize
            + 1;
        let gva = Gva::new(u64::from(descriptor.base()));
        self.memory
            .read(gva, &mut bytes[..len], Privilege::Implicit)?;
        Ok(if wide {
            Image::parse32(&bytes)
        } else {
            Image::parse16(&bytes)
        })
    }

    /// Writes the old task's registers to its TSS.
    fn save_task(&mut self, source: Source, next: u64) -> Result<(), Abort> {
        let tr = self.state.segments.tr;
        let kind = (tr.attributes & attributes::TYPE) as u8;
        let width = if is_wide(kind) {
            Width::Dword
        } else {
            Width::Word
        };
        let hidden = if source == Source::Iret {
            rflags::NT
        } else {
            0
        };
        let flags = self.state.rflags & !hidden;
        let (start, bytes) = dynamic_fields(self.state, width, next, flags);
        if u64::from(start) + bytes.len() as u64 > u64::from(tr.limit) + 1 {
            return Err(naming(vector::TS, Selector(tr.selector)));
        }
        let gva = Gva::new(tr.base.wrapping_add(u64::from(start)) & 0xffff_ffff);
        self.memory.write(gva, &bytes, Privilege::Implicit)?;
        if !source.nests() {
            let selector = Selector(tr.selector);
            if let Some(descriptor) = self.find_descriptor(selector)? {
                self.clear_busy(selector, descriptor)?;
            }
        }
        Ok(())
    }

    /// The new TSS becomes the current one: back link, busy bit, TR, CR0.TS.
    fn enter_tss(
        &mut self,
        selector: Selector,
        descriptor: Descriptor,
        source: Source,
    ) -> Result<(), Abort> {
        if source.nests() {
            let link = self.state.segments.tr.selector.to_le_bytes();
            let gva = Gva::new(u64::from(descriptor.base() + tss32::LINK));
            self.memory.write(gva, &link, Privilege::Implicit)?;
        }
        if source != Source::Iret {
            self.mark_busy(selector, descriptor)?;
        }
        let mut tr = segment_of(selector, descriptor);
        tr.attributes |= u16::from(system_type::BUSY);
        self.state.segments.tr = tr;
        self.state.cr0 |= Cr0::TS.bits();
        self.effects |= Effects::TASK_SWITCHED
            | Effects::MODE
            | Effects::SEGMENTS
            | Effects::FPU
            | Effects::DEBUG
            | Effects::ACCESS_RIGHTS
            | Effects::EVENTS
            | Effects::RF_LOADED
            | Effects::JUMP;
        Ok(())
    }

    /// The new task's registers. All that can fault here faults in the new task.
    fn load_task(&mut self, image: &Image, source: Source) -> Result<(), Abort> {
        let nested = if source.nests() { rflags::NT } else { 0 };
        let bits = image.width.mask();
        self.state.rip = image.ip;
        self.state.rflags = (image.flags & rflags::ALL & bits) | nested | rflags::FIXED;
        for (register, value) in self.state.gpr.iter_mut().zip(image.gpr) {
            *register = merge(*register & 0xffff_ffff, value, bits);
        }
        self.state.dr7 &= !DR7_LOCAL_ENABLES;
        let virtual8086 = self.state.flags_have(rflags::VM);
        self.invalidate_segments(image, virtual8086);
        if image.width == Width::Dword && self.state.cr0_has(Cr0::PG) {
            self.load_task_cr3(image.cr3)?;
        }
        if image.trap {
            self.pending.debug |= DR6_BT;
        }
        self.load_task_ldt(Selector(image.ldt))?;
        if virtual8086 {
            self.put_virtual8086_segments(image);
        } else {
            self.load_task_segments(image)?;
        }
        self.push_task_error(image.width, source)?;
        if image.ip > u64::from(self.state.segments.cs.limit) {
            return Err(general());
        }
        Ok(())
    }

    fn load_task_cr3(&mut self, cr3: u64) -> Result<(), Abort> {
        if cr3 != self.state.cr3 || self.state.cr4_has(Cr4::PAE) {
            self.set_cr3(cr3).map_err(|abort| match abort {
                Abort::Exception(_) => {
                    naming(vector::TS, Selector(self.state.segments.tr.selector))
                }
                abort => abort,
            })?;
        }
        Ok(())
    }

    /// The selectors are there, but nothing may be accessed through them yet. CPL is CS's RPL.
    fn invalidate_segments(&mut self, image: &Image, virtual8086: bool) {
        let cpl = if virtual8086 {
            3
        } else {
            image.segments[1] as u8 & 3
        };
        for (register, selector) in SEGMENTS.iter().zip(image.segments) {
            let level = if *register == Register::SS { cpl } else { 0 };
            *self.state.segments.get_mut(*register) = null_segment(Selector(selector), level);
        }
        self.state.segments.ldtr = null_segment(Selector(image.ldt), 0);
    }

    fn load_task_ldt(&mut self, selector: Selector) -> Result<(), Abort> {
        self.state.segments.ldtr = self.checked_ldt(selector, vector::TS, vector::TS)?;
        Ok(())
    }

    fn put_virtual8086_segments(&mut self, image: &Image) {
        for (register, selector) in SEGMENTS.iter().zip(image.segments) {
            *self.state.segments.get_mut(*register) = virtual8086_segment(selector);
        }
    }

    fn load_task_segments(&mut self, image: &Image) -> Result<(), Abort> {
        let cs = Selector(image.segments[1]);
        let cpl = cs.rpl();
        self.state.segments.cs = self.checked_task_code(cs)?;
        let ss = Selector(image.segments[2]);
        self.state.segments.ss = self.checked_task_stack(ss, cpl)?;
        for n in [0, 3, 4, 5] {
            let selector = Selector(image.segments[n]);
            let segment = self.checked_task_data(selector, cpl)?;
            *self.state.segments.get_mut(SEGMENTS[n]) = segment;
        }
        Ok(())
    }

    fn checked_task_code(&mut self, selector: Selector) -> Result<Segment, Abort> {
        let wrong = Err(naming(vector::TS, selector));
        if selector.is_null() {
            return wrong;
        }
        let descriptor = self.read_descriptor(selector, vector::TS)?;
        let level = if descriptor.is_conforming() {
            descriptor.dpl() <= selector.rpl()
        } else {
            descriptor.dpl() == selector.rpl()
        };
        if !descriptor.is_code() || !level {
            return wrong;
        }
        if !descriptor.is_present() {
            return Err(naming(vector::NP, selector));
        }
        self.load_descriptor(selector, descriptor)
    }

    fn checked_task_stack(&mut self, selector: Selector, cpl: u8) -> Result<Segment, Abort> {
        let wrong = Err(naming(vector::TS, selector));
        if selector.is_null() {
            return wrong;
        }
        let descriptor = self.read_descriptor(selector, vector::TS)?;
        if !descriptor.is_writable() || descriptor.dpl() != cpl || selector.rpl() != cpl {
            return wrong;
        }
        if !descriptor.is_present() {
            return Err(naming(vector::SS, selector));
        }
        self.load_descriptor(selector, descriptor)
    }

    fn checked_task_data(&mut self, selector: Selector, cpl: u8) -> Result<Segment, Abort> {
        if selector.is_null() {
            return Ok(null_segment(selector, 0));
        }
        let descriptor = self.read_descriptor(selector, vector::TS)?;
        let privileged = !descriptor.is_conforming() && descriptor.dpl() < cpl.max(selector.rpl());
        if descriptor.is_system() || !descriptor.is_readable() || privileged {
            return Err(naming(vector::TS, selector));
        }
        if !descriptor.is_present() {
            return Err(naming(vector::NP, selector));
        }
        self.load_descriptor(selector, descriptor)
    }

    fn push_task_error(&mut self, width: Width, source: Source) -> Result<(), Abort> {
        if let Source::Interrupt {
            error_code: Some(code),
        } = source
        {
            let mut stack = Stack::current(self.state);
            stack.push(self, u64::from(code), width)?;
            stack.commit(self.state);
        }
        Ok(())
    }
}
