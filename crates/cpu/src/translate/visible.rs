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
use super::flags::{ARITHMETIC, AT_END, Passing, of_form};
use super::form::{FlagUse, Forms, Traits};
use super::generic::has_memory;
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

bitflags::bitflags! {
    /// What an instruction has to do with flags.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Traffic: u8 {
        /// Some of those that it finds are read, by it or behind it.
        const LIVE = 1;
        /// Somebody may look at those that it finds.
        const SHOWS = 1 << 1;
        /// It has a check, which could destroy them.
        const CHECKS = 1 << 2;
        /// Branches of the block lead to it.
        const JOINED = 1 << 3;
        /// It replaces all that count.
        const REPLACES_ALL = 1 << 4;
        /// It replaces some of them, and not all.
        const REPLACES_SOME = 1 << 5;
        /// It accesses its operand in memory, if it has one.
        const ACCESSES = 1 << 6;
    }
}

impl Traffic {
    /// It or nothing, without a branch: code of all kinds comes by, and none would be foretold.
    fn when(self, condition: bool) -> Self {
        Self::from_bits_retain(self.bits() * u8::from(condition))
    }

    fn replaces(uses: FlagUse, count: u8) -> Self {
        let all = uses.replaced & count == count;
        let some = uses.touched & count != 0;
        Self::REPLACES_ALL.when(all) | Self::REPLACES_SOME.when(some).when(!all)
    }
}

/// What instructions of a form have to do with flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Conduct {
    pub(super) passing: Passing,
    traffic: Traffic,
}

impl Conduct {
    /// [`Traffic::SHOWS`] is for faults other than those of an operand in memory.
    pub(super) fn of(instruction: &Instruction, traits: Traits) -> Self {
        let uses = of_form(instruction);
        let faults = Traffic::SHOWS.when(traits.contains(Traits::MAY_FAULT));
        let accesses = Traffic::ACCESSES.when(traits.contains(Traits::ACCESSES));
        Self {
            passing: Passing::of(instruction, uses),
            traffic: Traffic::replaces(uses, ARITHMETIC) | faults | accesses,
        }
    }

    /// Whether an instruction of the form shows the flags that it finds.
    fn shows(self, instruction: &Instruction) -> bool {
        let accesses = self.traffic.contains(Traffic::ACCESSES) & has_memory(instruction);
        self.traffic.contains(Traffic::SHOWS) | accesses
    }
}

/// What is known of an instruction.
#[derive(Clone, Copy, Debug)]
struct Facts {
    traffic: Traffic,
    /// Registers that it may write, a bit for each.
    written: u16,
}

/// The instructions of a block or a loop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Code<'a> {
    instructions: &'a [Instruction],
    facts: &'a [Facts],
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
    fn of(code: Code<'_>, index: usize) -> Self {
        let mut ahead = Self::default();
        let (mut written, mut some) = (0, false);
        for (at, facts) in code.facts.iter().enumerate().skip(index) {
            let traffic = facts.traffic;
            if at > index && traffic.contains(Traffic::JOINED) {
                ahead.bound = true;
                break;
            }
            if traffic.contains(Traffic::SHOWS) {
                ahead.looks = true;
                ahead.bound |= some;
                ahead.written = written;
                ahead.checks += u8::from(traffic.contains(Traffic::CHECKS));
            }
            if traffic.contains(Traffic::REPLACES_ALL) {
                break;
            }
            some |= traffic.contains(Traffic::REPLACES_SOME);
            written |= facts.written;
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
        code: Code<'_>,
        index: usize,
        checks: Checks,
        again: &mut Vec<Again>,
    ) -> Option<Treatment> {
        let Facts { traffic, written } = code.facts[index];
        if traffic.contains(Traffic::JOINED) {
            self.last = None;
        }
        let live = traffic.contains(Traffic::LIVE);
        if live {
            self.flags = Flags::HOST;
        }
        let mut treatment = Treatment {
            flags: self.flags,
            ..Treatment::kept(live)
        };
        let destroys = traffic & (Traffic::CHECKS | Traffic::LIVE) == Traffic::CHECKS;
        if destroys && self.flags == Flags::HOST && checks != Checks::None {
            treatment = self.check(code, index, checks, again);
            self.flags = treatment.flags;
        }
        self.written |= written;
        if traffic.contains(Traffic::REPLACES_ALL) {
            *self = Self {
                last: Some(index),
                ..Self::default()
            };
        } else if traffic.contains(Traffic::REPLACES_SOME) {
            self.last = None;
            if self.flags != Flags::HOST {
                self.flags = replaces_some(self.flags, code, index, again)?;
                treatment.takes_back = self.flags == Flags::HOST;
                if treatment.takes_back && checks == Checks::Destroy && destroys {
                    // Its own check would destroy what was taken back.
                    return None;
                }
            }
        }
        Some(treatment)
    }

    /// The treatment where a check comes while the host's flags are the guest's, and live for no one.
    fn check(
        &self,
        code: Code<'_>,
        index: usize,
        checks: Checks,
        again: &mut Vec<Again>,
    ) -> Treatment {
        let ahead = Ahead::of(code, index);
        let kept = |how: &Again| how.registers() & (self.written | ahead.written) == 0;
        let last = self.last.filter(|_| !ahead.bound);
        let how = last.and_then(|last| Again::of(&code.instructions[last]));
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
    code: Code<'_>,
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
    let how = Again::of(&code.instructions[index]);
    let kept = |how: &Again| how.keeps_carry() && how.registers() & ahead.written == 0;
    match how.filter(kept) {
        Some(how) if carry_aside => Some(Flags::again(how.with_carry_aside(), again)),
        None if flags == Flags::ASIDE => Some(Flags::HOST),
        _ => None,
    }
}

/// What is known of a block, an entry for each instruction.
pub(super) struct Input<'a> {
    pub(super) instructions: &'a [Instruction],
    pub(super) conducts: &'a [Conduct],
    pub(super) joined: &'a [bool],
    pub(super) spans: &'a window::Plan,
    pub(super) poll_at: Option<usize>,
}

/// What is known of a block's instructions.
#[derive(Debug, Default)]
pub(super) struct Known {
    facts: Vec<Facts>,
}

impl Known {
    /// Works it out.
    pub(super) fn find(&mut self, input: &Input<'_>) {
        let nothing = Facts {
            traffic: Traffic::empty(),
            written: 0,
        };
        let count = input.conducts.len();
        self.facts.clear();
        self.facts.resize(count, nothing);
        let (facts, conducts) = (&mut self.facts[..count], &input.conducts[..count]);
        let instructions = &input.instructions[..count];
        let (joined, roles) = (&input.joined[..count], &input.spans.roles()[..count]);
        let mut wanted = AT_END;
        for index in (0..count).rev() {
            let conduct = conducts[index];
            wanted = conduct.passing.before(wanted);
            let shows = conduct.shows(&instructions[index]);
            let member = roles[index] == Role::Member;
            facts[index] = Facts {
                traffic: conduct.traffic
                    | Traffic::LIVE.when(wanted != 0)
                    | Traffic::SHOWS.when(shows)
                    | Traffic::CHECKS.when(shows).when(!member)
                    | Traffic::JOINED.when(joined[index]),
                written: input.spans.written(index),
            };
        }
        if let Some(polled) = input.poll_at {
            facts[polled].traffic |= Traffic::SHOWS | Traffic::CHECKS;
        }
    }

    /// These instructions, which it was found out of.
    pub(super) fn code<'a>(&'a self, instructions: &'a [Instruction]) -> Code<'a> {
        let facts = &self.facts;
        Code {
            instructions,
            facts,
        }
    }
}

/// The instructions of a loop, with what else is known of them.
pub(super) struct Looped<'a> {
    pub(super) instructions: &'a [Instruction],
    pub(super) forms: &'a Forms,
    /// The flags that count, and before which instructions some of them are live.
    pub(super) count: u8,
    pub(super) live: &'a [bool],
    /// Which have a check in a single round.
    pub(super) checks: &'a [bool],
    pub(super) written: &'a [u16],
}

impl Looped<'_> {
    fn facts(&self, index: usize) -> Facts {
        let instruction = &self.instructions[index];
        let shows = self.forms.of(instruction).conduct.shows(instruction);
        let traffic = Traffic::LIVE.when(self.live[index])
            | Traffic::SHOWS.when(shows)
            | Traffic::CHECKS.when(self.checks[index])
            | Traffic::replaces(of_form(instruction), self.count);
        Facts {
            traffic,
            written: self.written[index],
        }
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
    pub(super) fn make(looped: &Looped<'_>, again: &mut Vec<Again>) -> Option<Self> {
        let all = 0..looped.instructions.len();
        let facts: Vec<_> = all.map(|index| looped.facts(index)).collect();
        let code = Code {
            instructions: looped.instructions,
            facts: &facts,
        };
        let mut now = Now::default();
        let later = round(&mut now, code, Checks::None, again)?;
        let head = now.check(code, 0, Checks::Destroy, again).flags;
        let first = round(&mut Now::with(head), code, Checks::None, again)?;
        let single = round(&mut Now::with(head), code, Checks::Destroy, again)?;
        // Who puts them aside doesn't have those that don't count.
        let puts_aside = head == Flags::ASIDE || single.iter().any(|t| t.puts_aside);
        (looped.count == ARITHMETIC || !puts_aside).then_some(Self {
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
    code: Code<'_>,
    checks: Checks,
    again: &mut Vec<Again>,
) -> Option<Vec<Treatment>> {
    (0..code.facts.len())
        .map(|index| now.step(code, index, checks, again))
        .collect()
}

/// Where a block's treatments come from.
#[derive(Clone, Copy)]
pub(super) enum Treatments<'a> {
    /// All is kept.
    Kept,
    /// They are decided on the way.
    Straight(Code<'a>),
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
                let treatment = now.step(*code, index, Checks::Keep, again);
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
