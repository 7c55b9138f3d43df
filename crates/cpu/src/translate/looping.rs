//! A second translation of a loop's body, in which accesses have next to nothing to wait for.
//!
//! Where a block's last branch leads back to its first instruction, and all that the body does is well
//! known, the body is translated twice. The first time as ever; its branch back leads to the second,
//! which goes on until the loop ends or somebody asks for attention. There the addend of each stream
//! of accesses (those off the same registers) stays in a scratch register from one round to the next,
//! with the register that the loop does not change added to it. The check beside it says whether the
//! address is still in the window of guest addresses for which the addend holds:
//!
//! ```text
//!   lea  rcx, [address of the stream's lowest byte]
//!   sub  rcx, [window's start]
//!   cmp  rcx, [window's length, less what the stream touches]
//!   jae  cold
//!   OP   [t0 + index*scale + disp]        ; t0 = addend + base
//! ```
//!
//! The address itself waits for nothing. The cold stub looks into the inline TLB, which makes a window
//! of a page. When that was not there, or too often (`widen`), [`Reason::Loop`] lets the engine make
//! the widest window that the inline TLB's entries allow. It ends where the loop is left: nobody can
//! take a translation away unseen, since each round polls, and what runs between an exit and the way
//! back into a loop begins with empty windows.
//!
//! Whatever the engine can't do, it leaves to the first translation, of the instruction at hand.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::form::{Form, Forms, MemoryUse};
use super::generic::has_memory;
use super::registers::{Home, home, is_high_byte, number};
use super::window::{WIDEST, distance, is_plain_integer, is_plain_vector};
use super::{Block, Mode, Reason, SCRATCH, T0, T1, Use};
use crate::emit::asm::{Cond, Fixup, Width};
use crate::emit::{Mem, Reg};
use crate::engine::frame::{Windows, disp, frame_disp};

/// Streams that there are scratch registers for.
pub(crate) const STREAMS: usize = 2;
/// Misses of one run of a loop before the engine widens a window.
const MISSES: i32 = 3;

/// What a stream's miss needs of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoopMiss {
    /// Where the cache goes on with the addend in the stream's register.
    pub(crate) resume: u32,
    pub(crate) stream: u8,
    /// Bytes from the stream's lowest to its highest.
    pub(crate) extent: u16,
    /// The access at hand: its distance from the lowest byte, and what it is.
    pub(crate) first: u16,
    pub(crate) size: u16,
    pub(crate) usage: Use,
    /// Whether any access of the stream writes.
    pub(crate) writes: bool,
}

/// Which part of an address the loop leaves alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fixed {
    None,
    Base,
    Index,
}

/// Accesses off the same registers.
#[derive(Clone, Copy, Debug)]
struct Stream {
    base: Reg,
    index: Option<(Reg, u8)>,
    fixed: Fixed,
    low: i32,
    high: i32,
    writes: bool,
}

/// How an instruction of the body finds its operand.
#[derive(Clone, Copy, Debug)]
struct Operand {
    stream: u8,
    checks: bool,
}

/// A loop whose body is worth a second translation.
#[derive(Clone, Debug)]
pub(super) struct LoopPlan {
    streams: Vec<Stream>,
    operands: Vec<Option<Operand>>,
}

/// The second translation under way.
#[derive(Debug)]
pub(super) struct Looping {
    plan: LoopPlan,
    /// Which instruction is translated now.
    pub(super) at: usize,
    /// Where a round begins, as an address.
    pub(super) head: u64,
    misses: Vec<Miss>,
}

#[derive(Debug)]
struct Miss {
    from: Fixup,
    /// Address behind the check.
    back: u64,
    site: u32,
    stream: u8,
}

/// One access, before it is known to which stream it belongs.
struct Access {
    base: u8,
    index: Option<(u8, u8)>,
    disp: i32,
    size: i32,
    writes: bool,
}

/// Integer instructions beyond those of spans that write nothing but their operands.
fn is_plain(instruction: &Instruction, form: &Form, mode: Mode) -> bool {
    use Mnemonic as M;
    let more = match instruction.mnemonic() {
        M::Imul => instruction.op_count() > 1,
        M::Rol
        | M::Ror
        | M::Bswap
        | M::Popcnt
        | M::Tzcnt
        | M::Lzcnt
        | M::Bsf
        | M::Bsr
        | M::Shlx
        | M::Shrx
        | M::Sarx
        | M::Rorx
        | M::Andn
        | M::Bextr
        | M::Blsr
        | M::Movbe => true,
        _ => false,
    };
    more || is_plain_integer(instruction.mnemonic()) || is_plain_vector(instruction, form, mode)
}

/// The registers that an instruction of the body writes, or nothing if it can't be in one.
fn written(instruction: &Instruction, mode: Mode, forms: &mut Forms) -> Option<u16> {
    if super::branch::is_side_exit(instruction) {
        return Some(0);
    }
    let simple = instruction.flow_control() == FlowControl::Next
        && !instruction.is_stack_instruction()
        && !instruction.has_lock_prefix()
        && !crate::system::is_system(instruction);
    let form = forms.get(instruction);
    if !simple || form.uses_cl || !is_plain(instruction, &form, mode) {
        return None;
    }
    let mut written = 0;
    for operand in 0..instruction.op_count() {
        let register = instruction.op_register(operand);
        if instruction.op_kind(operand) != OpKind::Register || !register.is_gpr() {
            continue;
        }
        if is_high_byte(register) || !at_home(register) {
            return None;
        }
        let reads_only = matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test);
        let field_writes = form
            .fields()
            .any(|f| u32::from(f.operand) == operand && f.written);
        // Also the accumulator of short forms, which is in no field.
        if field_writes || operand == 0 && !reads_only {
            written |= 1 << number(register);
        }
    }
    let index = instruction.memory_index();
    let simple = instruction.memory_base().is_gpr64()
        && at_home(instruction.memory_base())
        && (index == Register::None || index.is_gpr64() && at_home(index));
    (!has_memory(instruction) || simple).then_some(written)
}

fn at_home(register: Register) -> bool {
    matches!(home(number(register)), Home::Host(_))
}

fn host(guest: u8) -> Reg {
    match home(guest) {
        Home::Host(reg) => reg,
        // Planned loops name no such register.
        Home::Frame(_) => SCRATCH,
    }
}

/// The memory operand; `Err` if the loop can't have it.
fn access(instruction: &Instruction, forms: &mut Forms) -> Result<Option<Access>, ()> {
    let form = forms.get(instruction);
    if !has_memory(instruction) || form.memory == MemoryUse::Address {
        return Ok(None);
    }
    let size = instruction.memory_size().size() as i32;
    let based = instruction.memory_base() != Register::None
        && !matches!(instruction.memory_segment(), Register::FS | Register::GS);
    let displacement = distance(instruction.memory_displacement64() as i64);
    let (true, 1..=64, Some(disp)) = (based, size, displacement) else {
        return Err(());
    };
    let index = match instruction.memory_index() {
        Register::None => None,
        r => Some((
            number(r),
            instruction.memory_index_scale().trailing_zeros() as u8,
        )),
    };
    Ok(Some(Access {
        base: number(instruction.memory_base()),
        index,
        disp,
        size,
        writes: matches!(form.memory, MemoryUse::Write | MemoryUse::WriteOnly),
    }))
}

impl Stream {
    fn new(access: &Access, written: u16) -> Option<Self> {
        let kept = |guest: u8| written & 1 << guest == 0;
        let fixed = match access.index {
            None => Fixed::None,
            Some(_) if kept(access.base) => Fixed::Base,
            Some((index, 0)) if kept(index) => Fixed::Index,
            Some(_) => return None,
        };
        Some(Self {
            base: host(access.base),
            index: access.index.map(|(index, scale)| (host(index), scale)),
            fixed,
            low: access.disp,
            high: access.disp + access.size,
            writes: access.writes,
        })
    }

    /// Takes another access in, if it is off the same registers and not too far.
    fn join(&mut self, other: &Self) -> bool {
        let low = self.low.min(other.low);
        let high = self.high.max(other.high);
        if (self.base, self.index) != (other.base, other.index) || high - low > WIDEST {
            return false;
        }
        (self.low, self.high) = (low, high);
        self.writes |= other.writes;
        true
    }

    fn address(&self, disp: i32) -> Mem {
        Mem {
            base: Some(self.base),
            index: self.index,
            disp,
        }
    }

    fn extent(&self) -> i32 {
        self.high - self.low
    }

    /// The register that is part of the addend.
    fn inside(&self) -> Option<Reg> {
        match self.fixed {
            Fixed::None => None,
            Fixed::Base => Some(self.base),
            Fixed::Index => self.index.map(|(index, _)| index),
        }
    }

    /// The operand with the addend in `addend`.
    fn operand(&self, addend: Reg, disp: i32) -> Mem {
        let (base, index) = match self.fixed {
            Fixed::None => (self.base, Some((addend, 0))),
            Fixed::Base => (addend, self.index),
            Fixed::Index => (addend, Some((self.base, 0))),
        };
        Mem {
            base: Some(base),
            index,
            disp,
        }
    }
}

/// Works out whether the block is a loop that is worth it, and how.
pub(super) fn plan(
    instructions: &[Instruction],
    live: &[bool],
    mode: Mode,
    forms: &mut Forms,
) -> Option<LoopPlan> {
    let (last, body) = instructions.split_last()?;
    let special = Mode::STEP | Mode::BOUNCE | Mode::UNSHARED;
    let loops = last.is_jcc_short_or_near()
        && body.first().map(Instruction::ip) == Some(last.near_branch_target());
    if !loops || !mode.is_64() || mode.has(special) || !body.iter().any(has_memory) {
        return None;
    }
    let mut all = 0;
    for instruction in body {
        all |= written(instruction, mode, forms)?;
    }
    let mut plan = LoopPlan {
        streams: Vec::new(),
        operands: vec![None; instructions.len()],
    };
    let mut checked = [false; STREAMS];
    for (at, instruction) in body.iter().enumerate() {
        if let Some(access) = access(instruction, forms).ok()? {
            if live[at] {
                return None;
            }
            let stream = plan.stream_of(&Stream::new(&access, all)?)?;
            let checks = !std::mem::replace(&mut checked[stream], true);
            let stream = stream as u8;
            plan.operands[at] = Some(Operand { stream, checks });
        }
        let changed = written(instruction, mode, forms)?;
        for (stream, checked) in plan.streams.iter().zip(&mut checked) {
            *checked &= !stream.moves_with(changed);
        }
    }
    (!plan.streams.is_empty()).then_some(plan)
}

impl Stream {
    fn moves_with(&self, written: u16) -> bool {
        (0..16)
            .filter(|guest| written & 1 << guest != 0)
            .any(|guest| {
                host(guest) == self.base
                    || self.index.is_some_and(|(index, _)| host(guest) == index)
            })
    }
}

impl LoopPlan {
    /// The number of the stream that an access belongs to.
    fn stream_of(&mut self, wanted: &Stream) -> Option<usize> {
        if let Some(known) = self.streams.iter_mut().position(|s| s.join(wanted)) {
            return Some(known);
        }
        self.streams.push(*wanted);
        (self.streams.len() <= STREAMS).then(|| self.streams.len() - 1)
    }
}

fn addend_of(stream: u8) -> Reg {
    if stream == 0 { T0 } else { T1 }
}

/// A field of a stream's window.
fn window(stream: u8, field: usize) -> Mem {
    let at = core::mem::offset_of!(Windows, windows) + usize::from(stream) * 16 + field;
    Mem::base(Reg::RSP, frame_disp!(windows) + at as i32)
}

fn start_of(stream: u8) -> Mem {
    window(stream, 0)
}

fn limit_of(stream: u8) -> Mem {
    window(stream, 8)
}

fn widen() -> Mem {
    let at = core::mem::offset_of!(crate::engine::frame::Frame, windows)
        + core::mem::offset_of!(Windows, widen);
    Mem::base(Reg::RSP, disp(at))
}

impl Block<'_> {
    /// Begins the second translation: `from` is the branch back of the first.
    pub(super) fn begin_loop(&mut self, from: Fixup, plan: LoopPlan) {
        self.asm.bind(from);
        for stream in 0..plan.streams.len() as u8 {
            self.asm.store_imm(Width::B64, limit_of(stream), 0);
        }
        self.asm.store_imm(Width::B32, widen(), MISSES);
        self.polled = false;
        self.looping = Some(Looping {
            plan,
            at: 0,
            head: self.asm.address(),
            misses: Vec::new(),
        });
    }

    /// The operand of the present instruction, where this is a loop's second translation.
    pub(super) fn loop_operand(&mut self, instruction: &Instruction, usage: Use) -> Option<Mem> {
        let looping = self.looping.as_ref()?;
        let Operand { stream, checks } = looping.plan.operands[looping.at]?;
        let form = looping.plan.streams[usize::from(stream)];
        let disp = instruction.memory_displacement64() as i32;
        if checks {
            self.check_window(stream, &form);
            let site = self.site(self.rip, Reason::Stale);
            let from = self.asm.jcc(Cond::Ae as u8);
            let miss = Miss {
                from,
                back: self.asm.address(),
                site,
                stream,
            };
            self.tables.sites[site as usize].reason = Reason::Loop(LoopMiss {
                resume: 0,
                stream,
                extent: form.extent() as u16,
                first: (disp - form.low) as u16,
                size: instruction.memory_size().size() as u16,
                usage,
                writes: form.writes,
            });
            if let Some(looping) = &mut self.looping {
                looping.misses.push(miss);
            }
        }
        Some(form.operand(addend_of(stream), disp))
    }

    fn check_window(&mut self, stream: u8, form: &Stream) {
        self.asm.lea(Width::B64, SCRATCH, form.address(form.low));
        self.asm.sub_mem(SCRATCH, start_of(stream));
        self.asm.cmp_with_mem(SCRATCH, limit_of(stream));
    }

    /// Writes the cold stubs of the second translation.
    pub(super) fn end_loop(&mut self) {
        let Some(looping) = self.looping.take() else {
            return;
        };
        for miss in &looping.misses {
            let form = looping.plan.streams[usize::from(miss.stream)];
            self.miss_stub(miss, &form);
        }
    }

    fn miss_stub(&mut self, miss: &Miss, form: &Stream) {
        let addend = addend_of(miss.stream);
        let usage = if form.writes { Use::Write } else { Use::Read };
        self.asm.bind(miss.from);
        self.asm.dec_mem(widen());
        let too_often = self.asm.jcc(Cond::S as u8);
        self.asm.lea(Width::B64, addend, form.address(form.low));
        self.asm
            .lea(Width::B64, SCRATCH, Mem::base(addend, form.extent() - 1));
        self.asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
        self.asm.bextr(addend, addend, Reg::RSP);
        let tags = self.tags_at(addend, usage);
        self.asm.add_mem(Width::B64, SCRATCH, tags);
        let unknown = self.asm.jcc(Cond::Ne as u8);
        let addends = self.addend_at(addend);
        self.asm.load(Width::B64, addend, addends);
        self.asm.lea(Width::B64, SCRATCH, form.address(form.low));
        self.asm.and_imm(SCRATCH, -4096);
        self.asm.store(Width::B64, start_of(miss.stream), SCRATCH);
        let limit = 4097 - form.extent();
        self.asm.store_imm(Width::B64, limit_of(miss.stream), limit);
        let resume = self.here();
        if let Reason::Loop(reason) = &mut self.tables.sites[miss.site as usize].reason {
            reason.resume = resume;
        }
        if let Some(inside) = form.inside() {
            self.asm
                .lea(Width::B64, addend, Mem::indexed(addend, inside, 0, 0));
        }
        self.asm.jmp_to(miss.back);
        self.asm.bind(too_often);
        self.asm.bind(unknown);
        self.asm.lea(Width::B64, SCRATCH, form.address(form.low));
        self.asm
            .store(Width::B64, super::registers::tmp(2), SCRATCH);
        self.exit(miss.site);
    }
}
