//! Delivery of exceptions and interrupts through the IDT (SDM 3A, chapter 7; 21.1.4 for real mode,
//! 21.3 for virtual-8086 mode; 7.14 for 64-bit mode).

use addr::Gva;
use x86::control::Cr4;
use x86::debug::{DR6_B, DR6_FIXED_1, DR6_VOLATILE, DR7_GD};
use x86::descriptor::{Descriptor, Gate, Selector, system_type};
use x86::rflags;
use x86::tss::tss32;
use x86::vector::{self, Class};

use super::fault::{general, general_at, naming};
use super::flags::virtual_image;
use super::gate::InnerStack;
use super::modes::Mode;
use super::registers::Width;
use super::segment::null_segment;
use super::stack::Stack;
use super::table::load_real;
use super::task::Source;
use super::{Abort, Context, Effects, Privilege};
use crate::state::{Segment, gpr};
use crate::{Exception, Exit};

/// What is brought to the guest's handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exception.
    Exception(Exception),
    /// An interrupt from a controller.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// `INT n` that the monitor injects; RIP is already behind the instruction.
    SoftwareInterrupt(u8),
}

/// Where an event came from, as far as delivery cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A fault or abort: the instruction runs again.
    Fault,
    /// A trap, an interrupt, an NMI, `INT1`.
    External,
    /// `INT n`: the gate's DPL is checked, and IOPL in virtual-8086 mode.
    Interrupt,
    /// `INT3`, `INTO`: the gate's DPL is checked.
    Exception,
}

/// One event on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delivery {
    pub(super) vector: u8,
    pub(super) error_code: Option<u32>,
    pub(super) origin: Origin,
}

impl Delivery {
    fn of(event: Event) -> Self {
        match event {
            Event::Exception(exception) => Self {
                vector: exception.vector,
                error_code: exception.error_code,
                origin: if is_fault(exception.vector) {
                    Origin::Fault
                } else {
                    Origin::External
                },
            },
            Event::Interrupt(vector) => Self {
                vector,
                error_code: None,
                origin: Origin::External,
            },
            Event::Nmi => Self {
                vector: vector::NMI,
                error_code: None,
                origin: Origin::External,
            },
            Event::SoftwareInterrupt(vector) => Self {
                vector,
                error_code: None,
                origin: Origin::Interrupt,
            },
        }
    }

    /// The EXT bit of error codes on the way: not the program's own doing.
    fn external(self) -> u32 {
        u32::from(matches!(self.origin, Origin::Fault | Origin::External))
    }

    fn is_software(self) -> bool {
        matches!(self.origin, Origin::Interrupt | Origin::Exception)
    }

    /// The error code that names the IDT entry.
    fn idt_code(self) -> u32 {
        u32::from(self.vector) * 8 + 2
    }

    /// RFLAGS as they are pushed.
    fn image(self, flags: u64) -> u64 {
        if self.origin == Origin::Fault {
            flags | rflags::RF
        } else if self.is_software() {
            // The instruction is done, and what is done clears RF.
            flags & !rflags::RF
        } else {
            flags
        }
    }
}

/// Whether the exception is a fault, whose frame has RF set. So has that of a double fault, which
/// takes the place of one.
fn is_fault(vector: u8) -> bool {
    !matches!(
        vector,
        vector::DB | vector::NMI | vector::BP | vector::OF | vector::MC
    )
}

/// Brings an event to the guest's handler.
///
/// Faults on the way become double faults, and those a shutdown. On `Err`, which is an exit or a
/// host fault, never an exception, the event waits in [`crate::CpuState::events`].
pub fn deliver(ctx: &mut Context<'_>, event: Event) -> Result<(), Abort> {
    let mut event = event;
    loop {
        if let Event::Exception(exception) = event {
            ctx.apply_payload(exception);
        }
        match ctx.deliver_once(Delivery::of(event)) {
            Ok(()) => break,
            Err(Abort::Exception(second)) => event = combine(event, second)?,
            Err(abort) => {
                ctx.keep_event(event);
                return Err(abort);
            }
        }
    }
    ctx.state.events.sti_shadow = false;
    ctx.state.events.mov_ss_shadow = false;
    if event == Event::Nmi {
        ctx.state.events.nmi_masked = true;
    }
    Ok(())
}

/// What an exception during the delivery of an event makes of both (SDM 3A, table 7-5).
fn combine(first: Event, second: Exception) -> Result<Event, Abort> {
    let first_class = match first {
        Event::Exception(exception) => vector::class(exception.vector),
        _ => Class::Benign,
    };
    let second_class = vector::class(second.vector);
    match (first_class, second_class) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => Err(Exit::Shutdown.into()),
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Ok(Event::Exception(Exception::with_code(vector::DF, 0)))
        }
        _ => Ok(Event::Exception(second)),
    }
}

/// Sets the EXT bit in error codes that name a selector.
fn with_external(abort: Abort, external: u32) -> Abort {
    match abort {
        Abort::Exception(Exception {
            vector,
            error_code: Some(code),
            payload,
        }) if matches!(vector, vector::TS | vector::NP | vector::SS | vector::GP) => {
            let error_code = Some(code | external);
            Abort::Exception(Exception {
                vector,
                error_code,
                payload,
            })
        }
        abort => abort,
    }
}

impl Context<'_> {
    /// CR2 and DR6 change when the exception is delivered, not when it is raised.
    fn apply_payload(&mut self, exception: Exception) {
        let Some(payload) = exception.payload else {
            return;
        };
        match exception.vector {
            vector::PF => self.state.cr2 = payload,
            vector::DB => {
                let kept = self.state.dr6 & !DR6_B & DR6_VOLATILE;
                self.state.dr6 = kept | payload & DR6_VOLATILE | DR6_FIXED_1;
                self.state.dr7 &= !DR7_GD;
                self.effects |= Effects::DEBUG;
            }
            _ => {}
        }
    }

    /// `INT n`, `INT3`, `INTO`, `INT1`: delivered with RIP behind the instruction.
    pub(super) fn software_interrupt(
        &mut self,
        delivery: Delivery,
        next: u64,
    ) -> Result<(), Abort> {
        self.effects -= Effects::TASK_SWITCHED;
        let rip = std::mem::replace(&mut self.state.rip, next);
        let result = self.deliver_once(delivery);
        if result.is_err() && !self.effects.contains(Effects::TASK_SWITCHED) {
            self.state.rip = rip;
        }
        result
    }

    fn deliver_once(&mut self, delivery: Delivery) -> Result<(), Abort> {
        let result = match self.state.mode() {
            Mode::Real => self.deliver_real(delivery, u64::MAX),
            Mode::Long | Mode::Compatibility => self.deliver_long(delivery),
            Mode::Virtual8086 => self.deliver_virtual8086(delivery),
            Mode::Protected => self.deliver_protected(delivery),
        };
        result.map_err(|abort| with_external(abort, delivery.external()))?;
        self.effects |= Effects::MODE
            | Effects::SEGMENTS
            | Effects::DEBUG
            | Effects::ACCESS_RIGHTS
            | Effects::JUMP
            | Effects::DELIVERED;
        Ok(())
    }

    /// Through the real-mode interrupt vector table. `flags` hides bits of the pushed flags.
    fn deliver_real(&mut self, delivery: Delivery, visible: u64) -> Result<(), Abort> {
        let offset = u64::from(delivery.vector) * 4;
        if offset + 3 > u64::from(self.state.idtr.limit) {
            return Err(naming(vector::GP, Selector(delivery.idt_code() as u16)));
        }
        let mut entry = [0; 4];
        let gva = Gva::new(self.state.idtr.base.wrapping_add(offset) & 0xffff_ffff);
        self.memory.read(gva, &mut entry, Privilege::Implicit)?;
        let entry = u32::from_le_bytes(entry);
        let mut stack = Stack::current(self.state);
        let flags = self.state.rflags & visible;
        let cs = u64::from(self.state.segments.cs.selector);
        stack.push_all(self, &[flags, cs, self.state.rip], Width::Word)?;
        let rip = u64::from(entry & 0xffff);
        if rip > u64::from(self.state.segments.cs.limit) {
            return Err(general());
        }
        stack.commit(self.state);
        load_real(&mut self.state.segments.cs, (entry >> 16) as u16);
        self.state.rip = rip;
        self.state.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        Ok(())
    }

    fn deliver_virtual8086(&mut self, delivery: Delivery) -> Result<(), Abort> {
        if delivery.origin == Origin::Interrupt {
            if self.state.cr4_has(Cr4::VME) && self.is_redirected(delivery.vector)? {
                return self.deliver_redirected(delivery);
            }
            if self.state.iopl() < 3 {
                return Err(general());
            }
        }
        self.deliver_protected(delivery)
    }

    /// Whether the bitmap in the TSS sends this `INT n` to the 8086 program itself (SDM 3A,
    /// 21.3.3.4).
    fn is_redirected(&mut self, vector: u8) -> Result<bool, Abort> {
        let tr = self.state.segments.tr;
        if tr.unusable || tr.limit < tss32::MIN_LIMIT {
            return Err(general());
        }
        let mut word = [0; 2];
        let at = |offset: u64| Gva::new(tr.base.wrapping_add(offset) & 0xffff_ffff);
        self.memory.read(
            at(u64::from(tss32::IO_MAP_BASE)),
            &mut word,
            Privilege::Implicit,
        )?;
        let map = u64::from(u16::from_le_bytes(word)).wrapping_sub(32);
        let offset = map.wrapping_add(u64::from(vector / 8));
        if offset > u64::from(tr.limit) {
            return Err(general());
        }
        let mut byte = [0];
        self.memory
            .read(at(offset), &mut byte, Privilege::Implicit)?;
        Ok(byte[0] >> (vector % 8) & 1 == 0)
    }

    fn deliver_redirected(&mut self, delivery: Delivery) -> Result<(), Abort> {
        let mut entry = [0; 4];
        let gva = Gva::new(u64::from(delivery.vector) * 4);
        self.memory.read(gva, &mut entry, Privilege::User)?;
        let entry = u32::from_le_bytes(entry);
        let flags = self.state.rflags;
        let restricted = self.state.iopl() < 3;
        let image = if restricted {
            virtual_image(flags)
        } else {
            flags
        };
        let mut stack = Stack::current(self.state);
        let cs = u64::from(self.state.segments.cs.selector);
        stack.push_all(self, &[image, cs, self.state.rip], Width::Word)?;
        stack.commit(self.state);
        load_real(&mut self.state.segments.cs, (entry >> 16) as u16);
        self.state.rip = u64::from(entry & 0xffff);
        let interrupt = if restricted { rflags::VIF } else { rflags::IF };
        self.state.rflags &= !(rflags::TF | rflags::RF | rflags::AC | interrupt);
        Ok(())
    }

    fn deliver_protected(&mut self, delivery: Delivery) -> Result<(), Abort> {
        let offset = u64::from(delivery.vector) * 8;
        let code = Selector(delivery.idt_code() as u16);
        let named = |vector: u8| Exception::with_code(vector, delivery.idt_code());
        if offset + 7 > u64::from(self.state.idtr.limit) {
            return Err(named(vector::GP).into());
        }
        debug_assert_eq!(code.0 & 2, 2);
        let gva = Gva::new(self.state.idtr.base.wrapping_add(offset) & 0xffff_ffff);
        let gate = Gate {
            low: self.read_system(gva)?,
            high: 0,
        };
        let descriptor = gate.descriptor();
        let width = match descriptor.kind() {
            system_type::TASK_GATE => None,
            system_type::INTERRUPT_GATE16 | system_type::TRAP_GATE16 => Some(Width::Word),
            system_type::INTERRUPT_GATE | system_type::TRAP_GATE => Some(Width::Dword),
            _ => return Err(named(vector::GP).into()),
        };
        let forbidden = delivery.is_software() && descriptor.dpl() < self.state.cpl();
        if !descriptor.is_system() || forbidden {
            return Err(named(vector::GP).into());
        }
        if !descriptor.is_present() {
            return Err(named(vector::NP).into());
        }
        match width {
            None => self.deliver_to_task(delivery, gate.selector()),
            Some(width) => self.deliver_gate(delivery, gate, width),
        }
    }

    fn deliver_to_task(&mut self, delivery: Delivery, selector: Selector) -> Result<(), Abort> {
        let next = self.state.rip;
        let flags = self.state.rflags;
        self.state.rflags = delivery.image(flags);
        let source = Source::Interrupt {
            error_code: delivery.error_code,
        };
        let result = self.switch_task(selector, source, next);
        if result.is_err() && !self.effects.contains(Effects::TASK_SWITCHED) {
            self.state.rflags = flags;
        }
        result
    }

    /// The code segment that a gate of the IDT names.
    fn checked_handler(&mut self, selector: Selector) -> Result<Descriptor, Abort> {
        if selector.is_null() {
            return Err(general());
        }
        let code = self.read_descriptor(selector, vector::GP)?;
        if !code.is_code() || code.dpl() > self.state.cpl() {
            return Err(general_at(selector));
        }
        if !code.is_present() {
            return Err(naming(vector::NP, selector));
        }
        Ok(code)
    }

    fn deliver_gate(&mut self, delivery: Delivery, gate: Gate, width: Width) -> Result<(), Abort> {
        let code = self.checked_handler(gate.selector())?;
        let cpl = self.state.cpl();
        let virtual8086 = self.state.mode() == Mode::Virtual8086;
        if virtual8086 && (code.is_conforming() || code.dpl() != 0) {
            return Err(general_at(gate.selector()));
        }
        let level = if code.is_conforming() {
            cpl
        } else {
            code.dpl()
        };
        let mut new_ss = None;
        let mut stack = if level < cpl {
            let InnerStack { ss, stack } = self.inner_stack(level)?;
            new_ss = Some(ss);
            stack
        } else {
            Stack::current(self.state)
        };
        self.push_interrupt_frame(&mut stack, delivery, width, new_ss.is_some())?;
        let offset = gate.offset32() & width.mask();
        self.check_target(code, offset)?;
        let cs = self.load_descriptor(gate.selector().with_rpl(level), code)?;
        if virtual8086 {
            self.drop_virtual8086_segments();
        }
        if let Some(ss) = new_ss {
            self.state.segments.ss = ss;
        }
        stack.commit(self.state);
        self.put_code(cs, offset);
        self.enter_handler(gate);
        Ok(())
    }

    fn push_interrupt_frame(
        &mut self,
        stack: &mut Stack,
        delivery: Delivery,
        width: Width,
        changes_stack: bool,
    ) -> Result<(), Abort> {
        let segments = self.state.segments;
        let word = |segment: Segment| u64::from(segment.selector);
        if changes_stack {
            if self.state.mode() == Mode::Virtual8086 {
                let outer = [segments.gs, segments.fs, segments.ds, segments.es].map(word);
                stack.push_all(self, &outer, width)?;
            }
            let rsp = self.state.gpr[gpr::RSP];
            stack.push_all(self, &[word(segments.ss), rsp], width)?;
        }
        let image = delivery.image(self.state.rflags);
        stack.push_all(self, &[image, word(segments.cs), self.state.rip], width)?;
        if let Some(code) = delivery.error_code {
            stack.push(self, u64::from(code), width)?;
        }
        Ok(())
    }

    /// Leaving virtual-8086 mode, the data segments become null.
    fn drop_virtual8086_segments(&mut self) {
        let null = null_segment(Selector(0), 0);
        let segments = &mut self.state.segments;
        segments.es = null;
        segments.ds = null;
        segments.fs = null;
        segments.gs = null;
    }

    /// The flags of a handler.
    fn enter_handler(&mut self, gate: Gate) {
        let interrupt_gate = gate.descriptor().kind() & 1 == 0;
        let interrupt = if interrupt_gate { rflags::IF } else { 0 };
        self.state.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM | interrupt);
    }

    fn deliver_long(&mut self, delivery: Delivery) -> Result<(), Abort> {
        let gate = self.read_long_gate(delivery)?;
        let code = self.checked_handler(gate.selector())?;
        if !code.is_long() || code.is_big() {
            return Err(general_at(gate.selector()));
        }
        let cpl = self.state.cpl();
        let level = if code.is_conforming() {
            cpl
        } else {
            code.dpl()
        };
        let mut stack = self.long_stack(gate, level)?;
        let state = &*self.state;
        // Compatibility mode has ESP only.
        let rsp = if state.is_64bit() {
            state.gpr[gpr::RSP]
        } else {
            state.gpr[gpr::RSP] & 0xffff_ffff
        };
        let frame = [
            u64::from(delivery.error_code.unwrap_or(0)),
            state.rip,
            u64::from(state.segments.cs.selector),
            delivery.image(state.rflags),
            rsp,
            u64::from(state.segments.ss.selector),
        ];
        let start = usize::from(delivery.error_code.is_none());
        let mut frame = frame;
        frame.reverse();
        stack.push_frame(self, &frame[..frame.len() - start])?;
        let rip = gate.offset64();
        if !self.state.is_canonical(rip) {
            return Err(general());
        }
        let cs = self.load_descriptor(gate.selector().with_rpl(level), code)?;
        if level < cpl {
            self.state.segments.ss = null_segment(Selector(u16::from(level)), level);
        }
        stack.commit(self.state);
        self.put_code(cs, rip);
        self.enter_handler(gate);
        Ok(())
    }

    fn read_long_gate(&mut self, delivery: Delivery) -> Result<Gate, Abort> {
        let offset = u64::from(delivery.vector) * 16;
        let named = |vector: u8| Abort::from(Exception::with_code(vector, delivery.idt_code()));
        if offset + 15 > u64::from(self.state.idtr.limit) {
            return Err(named(vector::GP));
        }
        let mut bytes = [0; 16];
        let gva = Gva::new(self.state.idtr.base.wrapping_add(offset));
        self.memory.read(gva, &mut bytes, Privilege::Implicit)?;
        let raw = u128::from_le_bytes(bytes);
        let gate = Gate {
            low: raw as u64,
            high: (raw >> 64) as u64,
        };
        let descriptor = gate.descriptor();
        let is_gate = matches!(
            descriptor.kind(),
            system_type::INTERRUPT_GATE | system_type::TRAP_GATE
        );
        let forbidden = delivery.is_software() && descriptor.dpl() < self.state.cpl();
        if !descriptor.is_system() || !is_gate || forbidden {
            return Err(named(vector::GP));
        }
        if !descriptor.is_present() {
            return Err(named(vector::NP));
        }
        Ok(gate)
    }

    /// The stack for a handler in long mode: of the interrupt stack table, of the inner level, or the
    /// present one; aligned to 16 bytes.
    fn long_stack(&mut self, gate: Gate, level: u8) -> Result<Stack, Abort> {
        let inner = level < self.state.cpl();
        let rsp = if gate.ist() != 0 {
            self.interrupt_stack_pointer(gate.ist())?
        } else if inner {
            self.long_stack_pointer(level)?
        } else {
            self.state.gpr[gpr::RSP]
        };
        let privilege = if inner {
            Privilege::Implicit
        } else {
            self.state.privilege_at(level)
        };
        Ok(Stack::flat(rsp & !0xf, privilege))
    }
}
