//! What is done where translated code has left.

use addr::{Address, Gva};
use iced_x86::Instruction;
use mmu::AccessKind;

use super::bounce::{Bounced, Committed};
use super::enter;
use super::frame::{HostTrap, Window};
use super::memory::{Resolved, privilege_of};
use super::run::arith;
use super::segments::{bad_address, checked, is_canonical, segment};
use super::tlb::{FRESH_RUN, LONGEST_RUN};
use super::vcpu::{BlockLength, Vcpu};
use crate::state::gpr::{RCX, RDI, RSI, RSP};
use crate::system::{self, Abort, FpuUse, Next};
use crate::translate::{Access, Branch, By, Flags, LoopMiss, Mark, Reason, STREAMS, Site, Use};
use crate::{Exception, HostFault, Platform};

/// MXCSR.MM of AMD's CPUs: misaligned operands are allowed (APM 1, 4.5.3).
const MXCSR_MM: u32 = 1 << 17;
/// An operand of 80 bits is accessed in two parts: the first is of so many bytes.
const FIRST_PART: u32 = 8;

/// How the loop goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// Enter the cache at this address.
    Enter(u64),
    /// The instruction is done; look around, then at RIP.
    Done,
    /// Nothing was done; look around, then at RIP.
    Retry,
}

fn kind_of(usage: Use) -> AccessKind {
    if usage.writes() {
        AccessKind::Write
    } else {
        AccessKind::Read
    }
}

/// A waiting x87 exception comes before a fault of the instruction that looks for it.
fn before_fault(waits: bool, then: Result<Then, Abort>) -> Result<Then, Abort> {
    if waits && matches!(then, Err(Abort::Exception(_))) && enter::has_pending_x87() {
        return Err(Abort::Exception(Exception::plain(x86::vector::MF)));
    }
    then
}

impl Vcpu {
    /// Does what this site is for.
    pub(super) fn handle(&mut self, site: u32, platform: &mut dyn Platform) -> Result<Then, Abort> {
        let Site { rip, reason, flags } = self.tables.sites[site as usize];
        self.count(&reason);
        self.recall_flags(flags);
        match reason {
            Reason::Access(access) => self.on_access(rip, &access, platform),
            Reason::Span(access, span) => self.on_span(site, &access, span, platform),
            Reason::Loop(miss) => Ok(self.on_loop(rip, &miss)),
            Reason::Link { patch, by } => self.on_link(rip, patch, by),
            Reason::Indirect => self.on_indirect(),
            Reason::System {
                instruction,
                resume,
            } => {
                self.set_rip(rip);
                let instruction = self.tables.instructions[instruction as usize];
                self.run_system(&instruction, resume, platform)
            }
            Reason::Rust { instruction } => {
                self.set_rip(rip);
                let instruction = self.tables.instructions[instruction as usize];
                self.run_in_rust(&instruction, platform)
            }
            Reason::Raise { vector, error_code } => {
                self.set_rip(rip);
                Err(Abort::Exception(Exception {
                    vector,
                    error_code,
                    payload: None,
                }))
            }
            Reason::Poll | Reason::Stale | Reason::Branch(_) => {
                self.set_rip(rip);
                Ok(Then::Retry)
            }
            Reason::Commit => {
                self.set_rip(rip);
                self.on_commit()
            }
            Reason::CommitIndirect => {
                let target = self.frame().t0;
                if !self.reach().contains(target) {
                    self.roll_back();
                    self.memory.mmio.end();
                    self.set_rip(rip);
                    return Err(bad_address(1));
                }
                self.set_rip(target);
                self.on_commit()
            }
            Reason::Limit { segment, waits } => {
                self.set_rip(rip);
                before_fault(waits, Err(bad_address(segment)))
            }
            Reason::Segment(access) => before_fault(access.waits, self.on_segment(rip, &access)),
            Reason::HostFault => self.on_trap(),
        }
    }

    /// Makes the flags those that the guest has, from where they are.
    fn recall_flags(&mut self, flags: Flags) {
        if flags == Flags::HOST {
            return;
        }
        let again = flags.number().map(|number| self.tables.again[number]);
        let frame = self.frame_mut();
        frame.arith = match again {
            None => frame.aside,
            Some(again) => {
                let (host, aside) = (frame.arith >> 8, frame.aside >> 8);
                arith(again.flags(&frame.state.gpr, host.into(), aside.into()))
            }
        };
    }

    fn set_rip(&mut self, rip: u64) {
        self.frame_mut().state.rip = rip;
        self.memory.mmu.set_instruction(rip);
    }

    fn on_commit(&mut self) -> Result<Then, Abort> {
        Ok(match self.commit()? {
            Committed::Yes => Then::Done,
            Committed::Again => Then::Retry,
        })
    }

    pub(super) fn resume(&self, access: &Access) -> Then {
        Then::Enter(self.cache.base() + u64::from(access.resume))
    }

    /// AMD's CPUs look at the offset, too, before they add a base to it.
    pub(super) fn is_offset_beyond(&self, gva: Gva, number: u8) -> bool {
        let state = self.state();
        self.offer.vendor == system::Vendor::Amd
            && matches!(number, 4 | 5)
            && !is_canonical(gva.raw().wrapping_sub(segment(state, number).base), state)
    }

    pub(super) fn on_access(
        &mut self,
        rip: u64,
        access: &Access,
        platform: &mut dyn Platform,
    ) -> Result<Then, Abort> {
        self.set_rip(rip);
        before_fault(access.waits, self.access(access, platform))
    }

    fn access(&mut self, access: &Access, platform: &mut dyn Platform) -> Result<Then, Abort> {
        let gva = Gva::new(self.frame().t0);
        let size = usize::from(access.size);
        self.check_alignment(gva.raw(), access.align)?;
        self.first_part(gva, access)?;
        if self.context.mode.is_64() {
            let last = gva.raw().wrapping_add(size as u64 - 1);
            let state = self.state();
            if !is_canonical(gva.raw(), state)
                || !is_canonical(last, state)
                || self.is_offset_beyond(gva, access.segment)
            {
                return Err(bad_address(if access.segment == 2 { 2 } else { 0 }));
            }
        }
        let beyond = 1 << 32;
        if !self.context.mode.is_64() && gva.raw() + size as u64 > beyond {
            return Err(bad_address(access.segment));
        }
        if access.bounce {
            return Ok(match self.bounce_access(access, platform)? {
                Bounced::Ready => self.resume(access),
                Bounced::AgainAlone => Then::Retry,
            });
        }
        let kind = kind_of(access.usage);
        let view = self.context.mode.view();
        match self.view().resolve(gva, size, kind, view)? {
            Resolved::Addend(addend) => {
                if !self.memory.late.is_empty() {
                    self.kick.notice();
                }
                self.frame_mut().t1 = addend;
                Ok(self.resume(access))
            }
            Resolved::Bounce => self.begin_bounce().map(Then::Enter),
        }
    }

    fn check_alignment(&self, address: u64, align: u8) -> Result<(), Abort> {
        let misaligned = address & u64::from(align - 1) != 0;
        if misaligned && self.frame().guest_mxcsr & MXCSR_MM == 0 {
            return Err(bad_address(0));
        }
        Ok(())
    }

    /// An operand of 80 bits is read and written in two parts. Where all of it crosses the end of what
    /// can be addressed, the first may have a page fault.
    fn first_part(&mut self, gva: Gva, access: &Access) -> Result<(), Abort> {
        const FIRST: u64 = FIRST_PART as u64;
        let reachable = |last: u64| {
            if self.context.mode.is_64() {
                is_canonical(last, self.state())
            } else {
                u32::try_from(last).is_ok()
            }
        };
        let last = gva.raw().wrapping_add(FIRST - 1);
        if access.size != 10 || !reachable(gva.raw()) || !reachable(last) || reachable(last + 2) {
            return Ok(());
        }
        let view = self.context.mode.view();
        let kind = kind_of(access.usage);
        self.view()
            .resolve(gva, FIRST as usize, kind, view)
            .map(|_| ())
    }

    /// A stream of a loop has left its window: a wider one, or the instruction alone.
    fn on_loop(&mut self, rip: u64, miss: &LoopMiss) -> Then {
        self.set_rip(rip);
        let low = Gva::new(self.frame().tmp[2]);
        let view = self.context.mode.view();
        let extent = u64::from(miss.extent);
        let writes = miss.writes;
        let mut run = self
            .view()
            .tlb()
            .run(view, low, extent, writes, LONGEST_RUN);
        if run.is_none() && self.fill_for(low, miss) {
            run = self.view().tlb().run(view, low, extent, writes, FRESH_RUN);
        }
        let Some(run) = run else {
            return Then::Retry;
        };
        let windows = &mut self.frame_mut().windows;
        // What was just done may have taken the other's translations away.
        windows.streams = [Window::default(); STREAMS];
        windows.streams[usize::from(miss.stream)] = Window {
            start: run.start.raw(),
            limit: run.length - extent + 1,
            common_limit: (run.length - extent + 1).saturating_sub(u64::from(miss.reach)),
        };
        windows.widen = (run.length >> 10).clamp(16, 1024) as i32;
        let frame = self.frame_mut();
        if miss.stream == 0 {
            frame.t0 = run.addend;
        } else {
            frame.t1 = run.addend;
        }
        Then::Enter(self.cache.base() + u64::from(miss.resume))
    }

    /// Fills the TLB for the access at hand; whether it is worth another look.
    fn fill_for(&mut self, low: Gva, miss: &LoopMiss) -> bool {
        let gva = low.wrapping_add(u64::from(miss.first));
        let last = gva.wrapping_add(u64::from(miss.size) - 1);
        let state = self.state();
        if !is_canonical(gva.raw(), state) || !is_canonical(last.raw(), state) {
            return false;
        }
        let view = self.context.mode.view();
        let size = usize::from(miss.size);
        let filled = self.view().resolve(gva, size, kind_of(miss.usage), view);
        matches!(filled, Ok(Resolved::Addend(_))) && self.memory.late.is_empty()
    }

    fn on_segment(&mut self, rip: u64, access: &Access) -> Result<Then, Abort> {
        self.set_rip(rip);
        let offset = self.frame().t0 as u32;
        let size = u32::from(access.size);
        let usage: Use = access.usage;
        let state = self.state();
        let linear = checked(state, access.segment, offset, size, usage);
        let base = segment(state, access.segment).base;
        self.check_alignment(base.wrapping_add(offset.into()), access.align)?;
        if linear.is_err()
            && size == 10
            && let Ok(first) = checked(self.state(), access.segment, offset, FIRST_PART, usage)
        {
            let view = self.context.mode.view();
            let kind = kind_of(usage);
            self.view()
                .resolve(first, FIRST_PART as usize, kind, view)?;
        }
        self.frame_mut().t0 = linear?.raw();
        Ok(self.resume(access))
    }

    pub(super) fn enter_block(&self, number: u32) -> Then {
        let plain = self.blocks.blocks[number as usize].plain;
        Then::Enter(self.cache.base() + u64::from(plain))
    }

    /// Goes on at RIP, and will look for the block again next time.
    fn enter_unchained(&mut self) -> Result<Then, Abort> {
        if self.kick.is_asked() {
            return Ok(Then::Done);
        }
        let number = self.find(0)?;
        Ok(self.enter_block(number))
    }

    fn on_link(&mut self, target: u64, patch: u32, by: By) -> Result<Then, Abort> {
        self.set_rip(target);
        // Code that only goes forward polls nowhere, and what is new is translated for long.
        if !self.may_chain() || self.kick.is_asked() {
            return Ok(Then::Done);
        }
        if self.length == BlockLength::OneInstruction {
            return self.enter_unchained();
        }
        let generation = self.generation;
        let voids = self.seen_voids;
        let number = self.find(0)?;
        if generation == self.generation && voids == self.seen_voids {
            self.chain(patch, by, number);
        }
        Ok(self.enter_block(number))
    }

    /// Takes the last indirect branch back; the fault that it has instead.
    fn undo_branch(&mut self) -> Result<Abort, Abort> {
        let site = self.tables.sites[self.frame().branch as usize];
        let Reason::Branch(Branch { moved, pushed }) = site.reason else {
            // The fault of the code at the target.
            let target = self.frame().t0;
            self.set_rip(target);
            return Ok(bad_address(1));
        };
        let size = usize::from(pushed);
        if size > 0 {
            let bytes = self.frame().overwritten.to_le_bytes();
            let pointer = self.state().gpr[RSP];
            let gva = self.stack_gva(pointer, size, Use::WriteOnly)?;
            let privilege = privilege_of(self.context.mode.view());
            self.memory.write_as(gva, &bytes[..size], privilege)?;
        }
        let pointer = self.state().gpr[RSP].wrapping_sub(i64::from(moved) as u64);
        self.set_stack_pointer(pointer);
        self.set_rip(site.rip);
        Ok(bad_address(1))
    }

    fn on_indirect(&mut self) -> Result<Then, Abort> {
        let target = self.frame().t0;
        if !self.reach().contains(target) {
            return Err(self.undo_branch()?);
        }
        self.set_rip(target);
        if !self.may_chain() || self.kick.is_asked() {
            return Ok(Then::Done);
        }
        if self.length == BlockLength::OneInstruction {
            return self.enter_unchained();
        }
        let number = self.find(0)?;
        self.remember_jump(number);
        Ok(self.enter_block(number))
    }

    fn run_system(
        &mut self,
        instruction: &Instruction,
        resume: u32,
        platform: &mut dyn Platform,
    ) -> Result<Then, Abort> {
        let (before, due) = (self.context, self.boundary_due);
        let state = (self.generation, self.seen_voids);
        let asks = system::asks_platform(instruction);
        if asks {
            self.suspect_events();
        }
        let fpu = system::fpu_use(instruction);
        if fpu != FpuUse::None {
            self.fpu_out();
        }
        self.memory.mmio.begin();
        if self.may_chain() {
            self.effects = system::Effects::empty();
        }
        let next = self.with_context(platform, |ctx| system::execute(ctx, instruction));
        if fpu == FpuUse::Changed {
            self.fpu_in();
        }
        if asks {
            self.refresh_fast();
        }
        let next = next?;
        self.memory.mmio.end();
        if self.effects.contains(system::Effects::RF_LOADED) && self.may_chain() {
            self.resume_lazily(due);
        }
        if self.must_look_around() {
            return Ok(match next {
                Next::Sequential | Next::Jump => Then::Done,
                Next::Again => {
                    self.boundary_due = true;
                    Then::Retry
                }
            });
        }
        Ok(match next {
            Next::Sequential
                if resume != 0
                    && before == self.context
                    && state == (self.generation, self.seen_voids)
                    && !self.effects.intersects(system::Effects::PAGING) =>
            {
                Then::Enter(self.cache.base() + u64::from(resume))
            }
            Next::Sequential | Next::Jump => {
                let number = self.find(0)?;
                self.enter_block(number)
            }
            Next::Again => {
                self.boundary_due = true;
                Then::Retry
            }
        })
    }

    /// `IRET` has loaded RF: looked at by nobody, it is no reason to look around.
    fn resume_lazily(&mut self, due: bool) {
        use system::Effects;
        if self.put_rf_aside() && !self.effects.contains(Effects::EVENTS) {
            let waits = self.frame().fast.waits != 0;
            self.boundary_due = due || waits && self.effects.contains(Effects::INTERRUPTS);
        }
    }

    /// Whether the loop around translated code has something to do before guest code may go on.
    fn must_look_around(&self) -> bool {
        self.boundary_due
            || !self.may_chain()
            || self.kick.is_asked()
            || !self.memory.late.is_empty()
            || self.memory.mmio.has_writes()
    }

    /// A trap of the host in translated code.
    fn on_trap(&mut self) -> Result<Then, Abort> {
        let trap = self.frame().fault;
        self.settle_string(&trap);
        self.settle_carry(&trap);
        if let Some((rip, mark)) = self.place_of(trap.pc) {
            self.set_rip(rip);
            self.recall_flags(mark.flags);
            let rsp = &mut self.frame_mut().state.gpr[RSP];
            *rsp = rsp.wrapping_add_signed(i64::from(mark.stack));
        }
        let vector = trap.vector as u8;
        if vector == x86::vector::MF {
            self.find_deferred_x87(trap.pc);
        }
        Err(match vector {
            x86::vector::DE | x86::vector::UD | x86::vector::MF | x86::vector::XM => {
                Abort::Exception(Exception {
                    vector,
                    error_code: None,
                    payload: None,
                })
            }
            x86::vector::GP | x86::vector::SS | x86::vector::AC => Abort::Exception(Exception {
                vector,
                error_code: Some(0),
                payload: None,
            }),
            _ => Abort::HostFault(HostFault {
                gpa: None,
                hva: addr::Hva::new(trap.address),
            }),
        })
    }

    fn find_deferred_x87(&mut self, pc: u64) {
        let Some(offset) = self.cache.offset_of(pc) else {
            return;
        };
        if let Some(start) = self.blocks.block_at(offset).map(|block| block.plain) {
            self.note_deferred_x87(start, offset);
        }
    }

    /// A trap in a loop that has put the carry aside.
    fn settle_carry(&mut self, trap: &HostTrap) {
        let Some(offset) = self.cache.offset_of(trap.pc) else {
            return;
        };
        let loops = &self.tables.loops;
        let after = loops.partition_point(|mark| mark.start <= offset);
        if loops[..after].last().is_some_and(|mark| offset < mark.end) {
            let frame = self.frame_mut();
            // CF is bit 0 of what LAHF gives.
            frame.arith = frame.arith & !0x100 | u16::from(frame.windows.carry) << 8;
        }
    }

    /// Where the host's own string instruction trapped: the guest's registers, as far as it got.
    fn settle_string(&mut self, trap: &HostTrap) {
        let Some(offset) = self.cache.offset_of(trap.pc) else {
            return;
        };
        let strings = &self.tables.strings;
        let Ok(index) = strings.binary_search_by_key(&offset, |mark| mark.host) else {
            return;
        };
        let moves = strings[index].moves;
        let frame = self.frame_mut();
        if moves {
            frame.state.gpr[RSI] = frame.state.gpr[RSI].wrapping_sub(frame.t0);
        }
        frame.state.gpr[RDI] = frame.state.gpr[RDI].wrapping_sub(frame.t1);
        frame.state.gpr[RCX] = trap.rcx;
    }

    /// RIP of the guest instruction whose translation holds this address, and its mark.
    fn place_of(&self, pc: u64) -> Option<(u64, Mark)> {
        let offset = self.cache.offset_of(pc)?;
        let block = self.blocks.block_at(offset)?;
        let marks = &self.tables.marks[block.marks as usize..];
        let after = marks
            .iter()
            .position(|m| m.host > offset || m.host >= block.end)
            .unwrap_or(marks.len());
        let mark = marks[..after].last()?;
        Some((block.rip.wrapping_add(u64::from(mark.guest)), *mark))
    }
}
