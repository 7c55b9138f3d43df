//! Where the arithmetic flags are for whoever looks.
//!
//! The check in front of a memory access is shortest where it may destroy the host's flags. Where the
//! guest's code is about to replace them unread, only a fault (or an interrupt, where a block polls)
//! shows them. For each such access it is decided here how they are to be had then:
//!
//! * from what is left of the instruction that set them, see [`Again`]: this costs nothing;
//! * from the frame, where they are put aside once for all accesses up to the instruction that replaces
//!   them;
//! * from the host's own flags, which the check keeps: where only one access comes, or where an
//!   instruction replaces but some of them before somebody may look.
//!
//! The checks of a loop's second translation can't keep flags. There an instruction that replaces but
//! some of them first gets those put aside back.
//!
//! A [`Site`](super::Site) and a [`Mark`](super::Mark) tell the engine which it is.

use iced_x86::Instruction;

use super::again::Again;
use super::flags::ARITHMETIC;
use super::form::{FlagUse, Form, Forms, Traits};
use super::generic::has_memory;
use super::joins::Joins;
use super::window::{self, Role};
use super::{Block, SCRATCH};
use crate::emit::asm::Width;
use crate::emit::{Asm, Mem, Reg};
use crate::engine::frame::frame_disp;

/// Where the flags are that the guest has before an instruction: one word, as there are many of them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flags(u32);

impl Flags {
    /// In the host's own.
    pub(crate) const HOST: Self = Self(u32::MAX);
    /// In the frame's [`aside`](crate::engine::frame::Frame::aside).
    pub(crate) const ASIDE: Self = Self(u32::MAX - 1);

    /// Nowhere, but this is how they come about again.
    fn again(how: Again, all: &mut Vec<Again>) -> Self {
        all.push(how);
        Self(all.len() as u32 - 1)
    }

    /// The number of the [`Again`] in [`super::Tables::again`], if they are nowhere.
    pub(crate) fn number(self) -> Option<usize> {
        (self != Self::HOST && self != Self::ASIDE).then_some(self.0 as usize)
    }
}

impl Default for Flags {
    fn default() -> Self {
        Self::HOST
    }
}

impl std::fmt::Debug for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.number() {
            Some(number) => write!(f, "again {number}"),
            None if *self == Self::ASIDE => f.write_str("aside"),
            None => f.write_str("host"),
        }
    }
}

/// How an instruction treats the flags that it finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Treatment {
    /// Where they are while it runs.
    pub(super) flags: Flags,
    /// The host's must stay as they are.
    pub(super) keeps: bool,
    /// They are put aside first.
    pub(super) puts_aside: bool,
    /// Those put aside come back first.
    pub(super) takes_back: bool,
}

impl Treatment {
    fn kept(keeps: bool) -> Self {
        Self {
            keeps,
            ..Self::default()
        }
    }
}

/// What is asked of each instruction of a block or loop.
pub(super) trait Code {
    fn instructions(&self) -> &[Instruction];
    /// Some of the flags that it finds are read, by it or behind it.
    fn is_live(&self, index: usize) -> bool;
    /// Somebody may look at those that it finds.
    fn shows(&self, index: usize) -> bool;
    /// It has a check, which could destroy them.
    fn checks(&self, index: usize) -> bool;
    /// Branches of the block lead to it.
    fn is_joined(&self, index: usize) -> bool;
    /// How many of the flags that count it replaces.
    fn replaces(&self, index: usize) -> Replaces;
    /// Registers that it may write, a bit for each.
    fn written(&self, index: usize) -> u16;
}

/// How many flags an instruction replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replaces {
    None,
    Some,
    All,
}

impl Replaces {
    fn of(uses: FlagUse, count: u32) -> Self {
        if uses.replaced & count == count {
            Self::All
        } else if uses.touched & count != 0 {
            Self::Some
        } else {
            Self::None
        }
    }
}

/// Whether somebody may look at the flags that this instruction finds: it can fault.
fn may_fault(instruction: &Instruction, form: &Form) -> bool {
    let accesses = form.traits.contains(Traits::ACCESSES) && has_memory(instruction);
    form.traits.contains(Traits::MAY_FAULT) || accesses
}

/// What comes from an instruction on, until all flags are replaced.
#[derive(Clone, Copy, Debug, Default)]
struct Ahead {
    /// Somebody looks.
    looks: bool,
    /// Somebody looks who must find them in the host's: an instruction replaces but some of them
    /// before, or a branch comes by another way.
    bound: bool,
    /// Registers written before the last look.
    written: u16,
    checks: u8,
}

impl Ahead {
    fn of(code: &impl Code, index: usize) -> Self {
        let mut ahead = Self::default();
        let (mut written, mut some) = (0, false);
        for at in index..code.instructions().len() {
            if at > index && code.is_joined(at) {
                ahead.bound = true;
                break;
            }
            if code.shows(at) {
                ahead.looks = true;
                ahead.bound |= some;
                ahead.written = written;
                ahead.checks += u8::from(code.checks(at));
            }
            match code.replaces(at) {
                Replaces::All => break,
                Replaces::Some => some = true,
                Replaces::None => {}
            }
            written |= code.written(at);
        }
        ahead
    }
}

/// What checks do about flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checks {
    /// They can keep them.
    Keep,
    Destroy,
    /// There are none.
    None,
}

/// What is known in front of an instruction.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Now {
    flags: Flags,
    /// The instruction that set them last, if it is known, and the registers written since.
    last: Option<usize>,
    written: u16,
}

impl Now {
    fn with(flags: Flags) -> Self {
        Self {
            flags,
            ..Self::default()
        }
    }

    /// How an instruction is to treat flags; goes on behind it. `None` if there is no way.
    #[inline]
    pub(super) fn step(
        &mut self,
        code: &impl Code,
        index: usize,
        checks: Checks,
        again: &mut Vec<Again>,
    ) -> Option<Treatment> {
        if code.is_joined(index) {
            self.last = None;
        }
        let live = code.is_live(index);
        if live {
            self.flags = Flags::HOST;
        }
        let mut treatment = Treatment {
            flags: self.flags,
            ..Treatment::kept(live)
        };
        let exact = self.flags == Flags::HOST;
        if exact && !live && checks != Checks::None && code.checks(index) {
            treatment = self.check(code, index, checks, again);
            self.flags = treatment.flags;
        }
        self.written |= code.written(index);
        match code.replaces(index) {
            Replaces::None => {}
            Replaces::Some => {
                self.last = None;
                if self.flags != Flags::HOST {
                    self.flags = replaces_some(self.flags, code, index, again)?;
                    treatment.takes_back = self.flags == Flags::HOST;
                }
            }
            Replaces::All => {
                *self = Self {
                    last: Some(index),
                    ..Self::default()
                };
            }
        }
        Some(treatment)
    }

    /// The treatment where a check comes while the host's flags are the guest's, and live for no one.
    fn check(
        &self,
        code: &impl Code,
        index: usize,
        checks: Checks,
        again: &mut Vec<Again>,
    ) -> Treatment {
        let ahead = Ahead::of(code, index);
        let kept = |how: &Again| how.registers() & (self.written | ahead.written) == 0;
        let last = self.last.filter(|_| !ahead.bound);
        let how = last.and_then(|last| Again::of(&code.instructions()[last]));
        if let Some(how) = how.filter(kept) {
            return Treatment {
                flags: Flags::again(how, again),
                ..Treatment::default()
            };
        }
        if checks == Checks::Keep && (ahead.bound || ahead.checks == 1) {
            return Treatment::kept(true);
        }
        Treatment {
            flags: Flags::ASIDE,
            puts_aside: true,
            ..Treatment::default()
        }
    }
}

/// Where the flags are behind an instruction that replaces but some of them, while the host's were not
/// the guest's. `None` if there is no way.
fn replaces_some(
    flags: Flags,
    code: &impl Code,
    index: usize,
    again: &mut Vec<Again>,
) -> Option<Flags> {
    let ahead = Ahead::of(code, index + 1);
    if !ahead.looks {
        // Nobody looks before the others are replaced, too.
        return Some(flags);
    }
    let carry_aside = flags
        .number()
        .is_none_or(|number| again[number].has_carry_aside());
    let how = Again::of(&code.instructions()[index]);
    let kept = |how: &Again| how.keeps_carry() && how.registers() & ahead.written == 0;
    match how.filter(kept) {
        Some(how) if carry_aside => Some(Flags::again(how.with_carry_aside(), again)),
        None if flags == Flags::ASIDE => Some(Flags::HOST),
        _ => None,
    }
}

/// A block, as it is run from its beginning to its end.
#[derive(Clone, Copy)]
pub(super) struct Straight<'a> {
    pub(super) instructions: &'a [Instruction],
    pub(super) live: &'a [bool],
    pub(super) forms: &'a Forms,
    pub(super) joins: &'a Joins,
    pub(super) spans: &'a window::Plan,
    pub(super) poll_at: Option<usize>,
}

impl Code for Straight<'_> {
    fn instructions(&self) -> &[Instruction] {
        self.instructions
    }

    fn is_live(&self, index: usize) -> bool {
        self.live[index]
    }

    fn shows(&self, index: usize) -> bool {
        let instruction = &self.instructions[index];
        let form = self.forms.of(instruction);
        let faults = form.traits.contains(Traits::MAY_FAULT);
        let accesses = match self.spans.brief(index).accesses {
            Some(accesses) => accesses,
            None => form.traits.contains(Traits::ACCESSES) && has_memory(instruction),
        };
        faults || accesses || self.poll_at == Some(index)
    }

    fn checks(&self, index: usize) -> bool {
        let first = self.spans.role(index) != Role::Member;
        first && self.shows(index) || self.poll_at == Some(index)
    }

    fn is_joined(&self, index: usize) -> bool {
        self.joins.is_target(index)
    }

    fn replaces(&self, index: usize) -> Replaces {
        Replaces::of(self.forms.of(&self.instructions[index]).flags, ARITHMETIC)
    }

    fn written(&self, index: usize) -> u16 {
        self.spans.brief(index).written
    }
}

/// The instructions of a loop.
pub(super) struct Looped<'a> {
    pub(super) instructions: &'a [Instruction],
    pub(super) forms: &'a Forms,
    /// The flags that count, and those of them that are live.
    pub(super) count: u32,
    pub(super) live: &'a [bool],
    /// Which have a check in a single round.
    pub(super) checks: &'a [bool],
    pub(super) written: &'a [u16],
}

impl Code for Looped<'_> {
    fn instructions(&self) -> &[Instruction] {
        self.instructions
    }

    fn is_live(&self, index: usize) -> bool {
        self.live[index]
    }

    fn shows(&self, index: usize) -> bool {
        let instruction = &self.instructions[index];
        may_fault(instruction, self.forms.of(instruction))
    }

    fn checks(&self, index: usize) -> bool {
        self.checks[index]
    }

    fn is_joined(&self, _: usize) -> bool {
        false
    }

    fn replaces(&self, index: usize) -> Replaces {
        Replaces::of(self.forms.of(&self.instructions[index]).flags, self.count)
    }

    fn written(&self, index: usize) -> u16 {
        self.written[index]
    }
}

/// How a loop's second translation treats flags.
#[derive(Clone, Debug, Default)]
pub(super) struct LoopFlags {
    /// Where they are at the head, where they may be destroyed.
    pub(super) head: Flags,
    /// In the first of the rounds under one check, in the others, and in a single one.
    pub(super) first: Vec<Treatment>,
    pub(super) later: Vec<Treatment>,
    pub(super) single: Vec<Treatment>,
}

impl LoopFlags {
    /// Works it out.
    pub(super) fn make(code: &Looped<'_>, again: &mut Vec<Again>) -> Option<Self> {
        let mut now = Now::default();
        let later = round(&mut now, code, Checks::None, again)?;
        let head = now.check(code, 0, Checks::Destroy, again).flags;
        let first = round(&mut Now::with(head), code, Checks::None, again)?;
        let single = round(&mut Now::with(head), code, Checks::Destroy, again)?;
        // Who puts them aside doesn't have those that don't count.
        let puts_aside = head == Flags::ASIDE || single.iter().any(|t| t.puts_aside);
        (code.count == ARITHMETIC || !puts_aside).then_some(Self {
            head,
            first,
            later,
            single,
        })
    }
}

/// The treatments in one round.
fn round(
    now: &mut Now,
    code: &Looped<'_>,
    checks: Checks,
    again: &mut Vec<Again>,
) -> Option<Vec<Treatment>> {
    (0..code.instructions.len())
        .map(|index| now.step(code, index, checks, again))
        .collect()
}

/// Where a block's treatments come from.
#[derive(Clone, Copy)]
pub(super) enum Treatments<'a> {
    /// All is kept.
    Kept,
    /// They are decided on the way.
    Straight(Straight<'a>),
    Planned(&'a [Treatment]),
}

impl Treatments<'_> {
    /// The treatment of this instruction, behind those in front of it.
    #[inline]
    pub(super) fn next(&self, index: usize, now: &mut Now, again: &mut Vec<Again>) -> Treatment {
        match self {
            Self::Kept => Treatment::kept(true),
            Self::Planned(all) => all[index],
            Self::Straight(code) => {
                let treatment = now.step(code, index, Checks::Keep, again);
                debug_assert!(treatment.is_some(), "what can be kept is never missing");
                treatment.unwrap_or_default()
            }
        }
    }
}

impl Block<'_> {
    /// Puts the flags aside. Keeps them; uses `rcx`.
    pub(super) fn put_flags_aside(&mut self) {
        self.asm.mov(Width::B64, SCRATCH, Reg::RAX);
        // lahf; seto al
        self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        let aside = Mem::base(Reg::RSP, frame_disp!(aside));
        self.asm.store(Width::B16, aside, Reg::RAX);
        self.asm.mov(Width::B64, Reg::RAX, SCRATCH);
    }

    /// Takes back the flags that were put aside. Uses `rcx`.
    pub(super) fn take_flags_back(&mut self) {
        emit_flags_back(self.asm);
    }
}

/// Brings the flags that were put aside into the host's. Uses `rcx`.
pub(crate) fn emit_flags_back(asm: &mut Asm) {
    let aside = Mem::base(Reg::RSP, frame_disp!(aside));
    asm.mov(Width::B64, SCRATCH, Reg::RAX);
    asm.load_zero_extended(Width::B16, Reg::RAX, aside);
    // add al, 0x7f; sahf
    asm.bytes(&[0x04, 0x7f, 0x9e]);
    asm.mov(Width::B64, Reg::RAX, SCRATCH);
}
