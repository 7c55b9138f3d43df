//! From guest code to host code, one block at a time.
//!
//! A block is a run of instructions up to a jump, a system instruction, the end of the page or a
//! fixed length. It is decoded once, the liveness of flags is worked out backwards, and the host code
//! is written in one pass. What is rare (TLB misses, jumps that are not chained yet) stands in cold
//! stubs behind the block; each leaves by a [`Site`].

mod address;
mod again;
mod branch;
mod calls;
mod flags;
mod form;
mod generic;
#[cfg(test)]
mod golden;
mod inline;
mod joins;
mod looping;
mod mode;
mod registers;
mod site;
mod special;
mod stack;
mod strings;
mod visible;
mod window;
mod x87;

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};

use crate::emit::asm::{Fixup, Width};
use crate::emit::{Asm, Mem, Raw, Reg};
use crate::system::Vendor;

pub use crate::emit::asm::Branches;
pub(crate) use address::{address_bits, segment_of};
pub(crate) use again::Again;
pub(crate) use calls::{Arrival, DROP, Landing, ReturnSite, emit_arrival, emit_drop};
pub(crate) use form::Forms;
use form::{Form, Traits};
pub(crate) use looping::{LoopMark, LoopMiss, STREAMS};
pub(crate) use mode::{CodeSize, Mode, SegmentClass};
pub(crate) use site::{
    Access, Branch, By, Reason, SITE_HOST_FAULT, SITE_INDIRECT, Site, Span, Use,
};
pub(crate) use strings::StringMark;
use visible::{Conduct, Now, Treatments};
pub(crate) use visible::{Flags, emit_flags_back};
pub(crate) use x87::X87Mark;

/// Scratch registers of translated code.
pub(crate) const T0: Reg = Reg::R11;
pub(crate) const T1: Reg = Reg::R15;
pub(crate) const SCRATCH: Reg = Reg::RCX;

/// The most instructions that a block holds.
pub(crate) const MAX_INSTRUCTIONS: usize = 48;
/// Host code of the longest block, generously.
pub(crate) const MAX_BLOCK_BYTES: usize = 32 * 1024;
const _: () = assert!(MAX_BLOCK_BYTES < crate::emit::asm::SPACE);
/// The longest instruction.
pub(crate) const LONGEST: usize = 15;

/// Where the translation of an instruction begins: for faults that signals report.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    /// Offset into the cache.
    pub(crate) host: u32,
    /// Offset from the block's RIP.
    pub(crate) guest: u16,
    /// What the stack pointer is yet to be moved by.
    pub(crate) stack: i16,
    /// Where the arithmetic flags are.
    pub(crate) flags: Flags,
}

/// A page identity that translated code checks: entry of the instruction TLB and its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageCheck {
    pub(crate) index: u32,
    pub(crate) id: u32,
}

/// What is to be translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    /// RIP of the first byte.
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
    /// The code, at most to the end of the page, or a little beyond for one instruction.
    pub(crate) bytes: &'a [u8],
    /// The check of the second page, for the one instruction that crosses.
    pub(crate) second: Option<PageCheck>,
    pub(crate) reach: Reach,
    /// Where the call at the end, if it is one, returns to; `None` for a jump that only pushes.
    pub(crate) returns: Option<ReturnSite>,
}

/// Which addresses code can have: a branch elsewhere faults itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Canonical ones of so many bits.
    Canonical(u32),
    /// Up to a limit.
    Limit(u32),
}

impl Reach {
    pub(crate) fn contains(self, rip: u64) -> bool {
        match self {
            Self::Canonical(bits) => {
                let shift = 64 - bits;
                ((rip << shift) as i64 >> shift) as u64 == rip
            }
            Self::Limit(limit) => rip <= u64::from(limit),
        }
    }
}

/// Lists that grow with the cache, and are emptied with it.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) sites: Vec<Site>,
    pub(crate) marks: Vec<Mark>,
    /// Where host string instructions stand, in order.
    pub(crate) strings: Vec<StringMark>,
    /// Loops that have put the carry aside, in order.
    pub(crate) loops: Vec<LoopMark>,
    /// How flags come about again that nobody keeps.
    pub(crate) again: Vec<Again>,
    /// Instructions that are run in Rust.
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) x87: Vec<X87Mark>,
}

/// How far a decoded block reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decoded {
    /// Instructions were found, in so many bytes.
    Bytes(usize),
    /// The first instruction reaches beyond the bytes given.
    NeedsMore,
}

/// Something for the cold end of the block.
#[derive(Clone, Copy, Debug)]
struct Cold {
    from: Fixup,
    /// The address register to be copied to `T0` first.
    address: Reg,
    site: u32,
}

/// The translator of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct Translator {
    pub(crate) asm: Asm,
    forms: Forms,
    decoded: Vec<Instruction>,
    plan: window::Plan,
    conducts: Vec<Conduct>,
    /// The numbers of the branches that the block goes on behind.
    branches: Vec<u8>,
    visible: visible::Known,
    joins: joins::Joins,
    ahead: Vec<joins::Ahead>,
    cold: Vec<Cold>,
    /// The landing of the last translation, if it has one.
    pub(crate) landing: Option<Landing>,
    /// Whose reading of the few encodings that differ.
    pub(crate) vendor: Vendor,
}

/// One block being translated.
struct Block<'a> {
    asm: &'a mut Asm,
    forms: &'a Forms,
    tables: &'a mut Tables,
    cold: &'a mut Vec<Cold>,
    joins: &'a joins::Joins,
    ahead: &'a mut Vec<joins::Ahead>,
    mode: Mode,
    /// Offset in the cache at which the block begins.
    start: u32,
    /// Address at which the way out lies, which is that of the cache: it begins with it.
    leave: u64,
    /// RIP of the present instruction, and its number in the block.
    rip: u64,
    index: usize,
    /// Whether the host's flags must stay as they are before the present instruction.
    flags_live: bool,
    /// Where the guest's are.
    flags: Flags,
    /// Bounce buffers used by the present instruction.
    slots: u8,
    /// A bounced operand of the present instruction is written.
    must_commit: bool,
    /// The alignment without which the memory operand of the present instruction faults.
    align: u8,
    /// `go` was looked at for the branch at the end.
    polled: bool,
    /// A way out that must stand right behind the code.
    near: Option<(Fixup, u32)>,
    /// Whether the present instruction shares its check with others.
    role: window::Role,
    /// The stack pointer is yet to be moved by this; the present instruction only adds to it.
    deferred: i32,
    defers: bool,
    /// The block is a loop that is translated twice; its branch back.
    loops: bool,
    back: Option<Fixup>,
    looping: Option<looping::Looping>,
    /// The next instruction is of the x87, and can't leave.
    x87_follows: bool,
    /// The present instruction looks for a waiting x87 exception first.
    waits: bool,
    reach: Reach,
    vendor: Vendor,
    returns: Option<ReturnSite>,
    landing: Option<Landing>,
}

/// What follows an instruction's translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// The next instruction.
    Next,
    /// The block has ended: control went elsewhere.
    Ended,
}

impl Translator {
    /// Decodes a block into the translator's own list.
    pub(crate) fn decode(&mut self, source: &Source<'_>) -> Decoded {
        self.decoded.clear();
        self.conducts.clear();
        self.branches.clear();
        let bits = source.mode.code_size().bits();
        let options = match self.vendor {
            Vendor::Intel => DecoderOptions::NONE,
            Vendor::Amd => DecoderOptions::AMD,
        };
        let mut decoder = Decoder::with_ip(bits, source.bytes, source.rip, options);
        let most = if source.mode.has(Mode::STEP | Mode::BOUNCE | Mode::SINGLE)
            || source.second.is_some()
        {
            1
        } else {
            MAX_INSTRUCTIONS
        };
        let mut end = 0;
        while self.decoded.len() < most && decoder.can_decode() {
            let begin = decoder.position();
            self.decoded.push(Instruction::default());
            let Some(instruction) = self.decoded.last_mut() else {
                break;
            };
            decoder.decode_out(instruction);
            let has_all = source.bytes.len() - begin >= LONGEST;
            // With all bytes there, it is longer than any instruction may be.
            if decoder.last_error() == DecoderError::NoMoreBytes && !has_all {
                self.decoded.pop();
                break;
            }
            end = decoder.position();
            let form = self.forms.learn(instruction);
            self.conducts.push(form.conduct);
            if branch::ends_block(instruction, form, source.mode) {
                break;
            }
            if form.traits.contains(Traits::MAY_END) && branch::is_side_exit(instruction) {
                self.branches.push(self.conducts.len() as u8 - 1);
            }
        }
        if self.decoded.is_empty() {
            Decoded::NeedsMore
        } else {
            Decoded::Bytes(end)
        }
    }

    /// Whether what [`Self::decode`] found ends in a call.
    pub(crate) fn ends_in_call(&self) -> bool {
        let last = self.decoded.last().map(Instruction::flow_control);
        matches!(last, Some(FlowControl::Call | FlowControl::IndirectCall))
    }

    /// How many instructions [`Self::decode`] found.
    pub(crate) fn decoded(&self) -> usize {
        self.decoded.len()
    }

    /// Writes the host code for what [`Self::decode`] found; it is to run at `base + start`, where
    /// calls come; jumps come [`DROP`] bytes behind that.
    pub(crate) fn translate(
        &mut self,
        source: &Source<'_>,
        tables: &mut Tables,
        base: u64,
        start: u32,
    ) -> &[u8] {
        self.joins.find(&self.decoded, &self.branches);
        self.plan
            .make(&self.decoded, source.mode, &self.forms, &self.joins);
        // The second translation of a loop checks an address once a round: nothing may lead past that.
        let plan = if self.joins.any() {
            None
        } else {
            looping::plan(&self.decoded, source.mode, &self.forms, &mut tables.again)
        };
        let last = self.decoded.len().wrapping_sub(1);
        // A block of a special kind is looked up each time, which checks its pages.
        let special = source.mode.has(Mode::STEP | Mode::BOUNCE | Mode::UNSHARED);
        let poll_at =
            poll_position(&self.decoded).filter(|_| !special && !self.joins.is_target(last));
        let flags = if source.mode.has(Mode::STEP | Mode::BOUNCE) {
            Treatments::Kept
        } else {
            self.visible.find(&visible::Input {
                instructions: &self.decoded,
                conducts: &self.conducts,
                joined: self.joins.targets(),
                spans: &self.plan,
                poll_at,
            });
            Treatments::Straight(self.visible.code(&self.decoded))
        };
        self.asm.reset(base + u64::from(start));
        self.cold.clear();
        let mut block = Block {
            asm: &mut self.asm,
            forms: &self.forms,
            tables,
            cold: &mut self.cold,
            joins: &self.joins,
            ahead: &mut self.ahead,
            mode: source.mode,
            start,
            leave: base,
            rip: source.rip,
            index: 0,
            flags_live: true,
            flags: Flags::HOST,
            slots: 0,
            must_commit: false,
            align: 1,
            polled: false,
            near: None,
            role: window::Role::None,
            deferred: 0,
            defers: false,
            loops: false,
            back: None,
            looping: None,
            x87_follows: false,
            waits: false,
            reach: source.reach,
            vendor: self.vendor,
            returns: source.returns,
            landing: None,
        };
        emit_drop(block.asm);
        if let Some(check) = source.second.filter(|_| !special) {
            block.check_page(check);
        }
        let body = Body {
            source,
            instructions: &self.decoded,
            flags,
            plan: &self.plan,
            poll_at,
        };
        block.loops = plan.is_some();
        block.body(&body);
        block.close_near();
        if let Some((plan, back)) = plan.zip(block.back.take()) {
            let next = self.decoded.last().map_or(0, Instruction::next_ip);
            block.loop_again(back, plan, &body, next);
        }
        block.leave_by_branches();
        block.cold_stubs();
        self.landing = block.landing;
        self.asm.code()
    }
}

/// The instructions of a block, with what was worked out about them.
#[derive(Clone, Copy)]
struct Body<'a> {
    source: &'a Source<'a>,
    instructions: &'a [Instruction],
    flags: Treatments<'a>,
    plan: &'a window::Plan,
    /// In front of which to poll.
    poll_at: Option<usize>,
}

impl Block<'_> {
    /// Translates all instructions.
    fn body(&mut self, body: &Body<'_>) {
        let rip = body.source.rip;
        let mut at = 0;
        let mut now = Now::default();
        for (index, instruction) in body.instructions.iter().enumerate() {
            self.role = body.plan.role(index);
            self.settle_stack(instruction, body.poll_at == Some(index));
            let joined = self.joins.is_target(index);
            if joined {
                self.move_deferred();
            }
            let treatment = body.flags.next(index, &mut now, &mut self.tables.again);
            self.index = index;
            let form = self.forms.of(instruction);
            self.begin(instruction, form, rip, treatment);
            if joined {
                self.join();
            }
            if treatment.puts_aside {
                self.put_flags_aside();
            }
            if treatment.takes_back {
                self.take_flags_back();
            }
            if let Some(looping) = &mut self.looping {
                looping.at = index;
                self.role = window::Role::None;
            }
            let bytes = &body.source.bytes[at..at + instruction.len()];
            at += instruction.len();
            self.x87_follows =
                form.traits.contains(Traits::X87) && self.x87_behind(body, index, at);
            if body.poll_at == Some(index) {
                self.poll();
            }
            if self.instruction(instruction, form, bytes) == Flow::Ended {
                return;
            }
        }
        self.move_deferred();
        self.flags = Flags::HOST;
        let next = rip.wrapping_add(at as u64);
        self.link(self.truncate_ip(next));
    }

    /// Whether the instruction behind this one, whose bytes begin `at`, is of the x87, too.
    fn x87_behind(&self, body: &Body<'_>, index: usize, at: usize) -> bool {
        // What a branch leads to doesn't always come behind the present instruction.
        let behind = body.instructions.get(index + 1);
        behind.is_some_and(|behind| {
            !self.joins.is_target(index + 1)
                && self.forms.of(behind).traits.contains(Traits::X87)
                && x87::is_arithmetic(&body.source.bytes[at..])
        })
    }

    /// Writes the way out that must stand right behind the code.
    fn close_near(&mut self) {
        if let Some((from, site)) = self.near.take() {
            self.asm.bind(from);
            self.exit(site);
        }
    }

    /// Leaves for a new lookup unless the page check holds. Keeps flags.
    fn check_page(&mut self, check: PageCheck) {
        let rip = self.rip;
        let stale = self.site(rip, Reason::Stale);
        emit_page_check(self.asm, self.mode, check);
        let ok = self.asm.jrcxz();
        self.exit(stale);
        self.asm.bind(ok);
    }

    fn begin(
        &mut self,
        instruction: &Instruction,
        form: &Form,
        block_rip: u64,
        flags: visible::Treatment,
    ) {
        self.rip = instruction.ip();
        self.flags_live = flags.keeps;
        self.flags = flags.flags;
        self.slots = 0;
        self.must_commit = false;
        self.waits = false;
        self.align = form.align;
        let host = self.here();
        self.tables.marks.push(Mark {
            host,
            guest: self.rip.wrapping_sub(block_rip) as u16,
            stack: self.deferred as i16,
            flags: self.flags,
        });
    }

    /// The offset in the cache of what is emitted next.
    fn here(&self) -> u32 {
        self.start + self.asm.here() as u32
    }

    /// A new site.
    fn site(&mut self, rip: u64, reason: Reason) -> u32 {
        let flags = self.flags;
        self.tables.sites.push(Site { rip, reason, flags });
        self.tables.sites.len() as u32 - 1
    }

    /// Leaves by this site.
    fn exit(&mut self, site: u32) {
        emit_exit(self.asm, site, self.leave);
    }

    /// Leaves for this reason at the present instruction.
    fn exit_here(&mut self, reason: Reason) -> Flow {
        let site = self.site(self.rip, reason);
        self.exit(site);
        Flow::Ended
    }

    /// Lets the engine run the instruction.
    fn rust(&mut self, instruction: &Instruction) -> Flow {
        let index = self.tables.instructions.len() as u32;
        self.tables.instructions.push(*instruction);
        self.exit_here(Reason::Rust { instruction: index })
    }

    /// `#GP(0)`.
    fn raise_general(&mut self) -> Flow {
        self.exit_here(GENERAL_PROTECTION)
    }

    fn raise(&mut self, vector: u8) -> Flow {
        self.exit_here(Reason::Raise {
            vector,
            error_code: None,
        })
    }

    /// An instruction pointer as wide as the code segment makes it.
    fn truncate_ip(&self, rip: u64) -> u64 {
        match self.mode.code_size() {
            CodeSize::Bits64 => rip,
            CodeSize::Bits32 | CodeSize::Bits16 => rip & 0xffff_ffff,
        }
    }

    fn cold_stubs(&mut self) {
        for index in 0..self.cold.len() {
            let cold = self.cold[index];
            self.asm.bind(cold.from);
            if cold.address != T0 {
                self.asm.mov(Width::B64, T0, cold.address);
            }
            self.exit(cold.site);
            let exit = self.here() - 4;
            if let Reason::Span(_, span) = &mut self.tables.sites[cold.site as usize].reason {
                span.exit = exit;
            }
        }
    }

    /// Translates one instruction.
    fn instruction(&mut self, instruction: &Instruction, form: &Form, bytes: &[u8]) -> Flow {
        if let Some(flow) = self.unavailable(instruction, form) {
            return flow;
        }
        let traits = form.traits;
        if traits.contains(Traits::SYSTEM) {
            return self.system(instruction);
        }
        if let Some(flow) = self.special(instruction, form, bytes) {
            return self.end_of_instruction(instruction, flow);
        }
        self.generic(instruction, form, bytes);
        if traits.contains(Traits::X87) {
            self.note_x87(instruction, bytes);
        }
        self.end_of_instruction(instruction, Flow::Next)
    }

    fn parse(&mut self, instruction: &Instruction, bytes: &[u8]) -> Raw {
        let is_vex = instruction.code().encoding() == iced_x86::EncodingKind::VEX;
        let mut raw = Raw::parse(bytes, self.mode.code_size().bits(), is_vex);
        if !self.mode.is_64() {
            let form = self.forms.of(instruction);
            match form.sized {
                Some(16) => raw.operand_size = true,
                Some(_) => raw.operand_size = false,
                None => {}
            }
            modernise(&mut raw);
        }
        raw
    }

    fn end_of_instruction(&mut self, instruction: &Instruction, flow: Flow) -> Flow {
        if self.must_commit && flow == Flow::Next {
            let next = self.truncate_ip(instruction.next_ip());
            let site = self.site(next, Reason::Commit);
            self.exit(site);
            return Flow::Ended;
        }
        flow
    }
}

/// `#GP(0)`.
const GENERAL_PROTECTION: Reason = Reason::Raise {
    vector: x86::vector::GP,
    error_code: Some(0),
};

/// Where to poll for the branch that ends the block: in front of the comparison before it, so that the
/// two stay together, if that is a short one.
fn poll_position(instructions: &[Instruction]) -> Option<usize> {
    let (last, before) = instructions.split_last()?;
    let compare = before.last()?;
    let short = !compare.is_stack_instruction()
        && !crate::system::is_system(compare)
        && compare.flow_control() == iced_x86::FlowControl::Next
        && (0..compare.op_count()).all(|i| {
            compare.op_kind(i) == iced_x86::OpKind::Register || compare.try_immediate(i).is_ok()
        });
    let jumps_back = branch::is_backward(last) && last.near_branch_target() <= last.ip();
    (short && jumps_back).then(|| before.len() - 1)
}

/// Replaces encodings that 64-bit mode gave another meaning.
fn modernise(raw: &mut Raw) {
    if raw.map != 0 {
        return;
    }
    // INC and DEC of a register became REX prefixes.
    if raw.modrm.is_none() && raw.opcode & 0xf0 == 0x40 {
        raw.modrm = Some(0xc0 | raw.opcode & 0xf);
        raw.opcode = 0xff;
    }
    if raw.opcode == 0x82 {
        raw.opcode = 0x80;
    }
}

/// Where the frame holds the page identity that a check is about.
fn page_slot(mode: Mode, check: PageCheck) -> Mem {
    use crate::engine::frame::{XTLB_ENTRIES, frame_disp};
    let table = mode.view() as usize * XTLB_ENTRIES + check.index as usize;
    Mem::base(Reg::RSP, frame_disp!(xtlb) + 4 * table as i32)
}

/// `rcx` becomes zero where the page check holds. Keeps flags.
pub(crate) fn emit_page_check(asm: &mut Asm, mode: Mode, check: PageCheck) {
    asm.load(Width::B32, SCRATCH, page_slot(mode, check));
    asm.lea(
        Width::B32,
        SCRATCH,
        Mem::base(SCRATCH, (check.id as i32).wrapping_neg()),
    );
}

/// Leaves by a site.
pub(crate) fn emit_exit(asm: &mut Asm, site: u32, leave: u64) {
    asm.mov_imm(SCRATCH, u64::from(site));
    asm.jmp_to(leave);
}
