//! System instructions that run inline: those by which kernels are entered and left, and which their
//! hot paths are full of.
//!
//! Each does in translated code what [`crate::system`] would do in the common case, and leaves for it
//! in all others, with nothing done yet. Which case it is, the frame tells (`engine::frame::Fast`):
//! whether an event waits for IF, what CR4 and EFER allow, which mode the tables of each view are for.
//!
//! While translated code runs, RFLAGS in the frame has its arithmetic flags, DF and bit 1 clear: the
//! parts of a flags image are disjoint, and `LEA` adds them up without a change of flags. Single
//! steps, RF and virtual-8086 mode are never here ([`Mode::STEP`]).
//!
//! `SYSCALL`, `SYSRET`, `STAC` and `CLAC` change the view. The block goes on through the tables of the
//! other view, where those are for this block's mode but for the view.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86::rflags;

use super::address::{base_slot, segment_number};
use super::generic::has_memory;
use super::registers::Home;
use super::registers::{GUEST_RCX, home, number, slot, tmp};
use super::{Block, Cold, Flow, Mode, Reason, SCRATCH, T0, T1, Use};
use crate::emit::asm::{Cond, Map, Width};
use crate::emit::{Mem, Reg};
use crate::engine::frame::{JUMP_ENTRIES, JUMP_MASK, View, frame_disp};
use crate::state::{Segment, Segments};

const FS: u8 = 4;
const GS: u8 = 5;

/// Whether the block goes on behind this system instruction.
pub(super) fn continues(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Mov => {
            let to = instruction.op0_register();
            let from = instruction.op1_register();
            !to.is_segment_register() && !to.is_cr() && !to.is_dr() && !from.is_dr()
        }
        M::Cli
        | M::Sti
        | M::Pushfq
        | M::Popfq
        | M::Swapgs
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpid
        | M::Rdfsbase
        | M::Rdgsbase
        | M::Wrfsbase
        | M::Wrgsbase
        | M::Rdmsr
        | M::Wrmsr
        | M::Cpuid
        | M::In
        | M::Out
        | M::Verr
        | M::Verw
        | M::Lar
        | M::Lsl
        | M::Xgetbv
        | M::Rdpkru
        | M::Sldt
        | M::Str
        | M::Smsw => true,
        _ => false,
    }
}

/// A field of `Fast` in the frame.
macro_rules! fast {
    ($($field:tt)+) => {
        Mem::base(Reg::RSP, frame_disp!(fast.$($field)+))
    };
}

/// The low half of RFLAGS in the frame.
fn flags_slot() -> Mem {
    Mem::base(Reg::RSP, frame_disp!(state.rflags))
}

fn df_slot() -> Mem {
    Mem::base(Reg::RSP, frame_disp!(df))
}

fn selector_slot(segment: u8) -> Mem {
    let field = core::mem::offset_of!(Segment, selector);
    let offset = usize::from(segment) * size_of::<Segment>() + field;
    Mem::base(Reg::RSP, frame_disp!(state.segments) + offset as i32)
}

fn at(m: Mem, offset: usize) -> Mem {
    Mem {
        disp: m.disp + offset as i32,
        ..m
    }
}

/// What of RFLAGS lives elsewhere while translated code runs.
const ELSEWHERE: u64 = rflags::ARITHMETIC | rflags::DF | rflags::FIXED;

const LFENCE: [u8; 3] = [0x0f, 0xae, 0xe8];

impl Block<'_> {
    /// A system instruction: inline where that can be, by [`crate::system`] else.
    pub(super) fn system(&mut self, instruction: &Instruction) -> Flow {
        self.move_deferred();
        let index = self.tables.instructions.len() as u32;
        self.tables.instructions.push(*instruction);
        let reason = Reason::System {
            instruction: index,
            resume: 0,
        };
        let site = self.site(self.rip, reason);
        let goes_on = continues(instruction) && !self.mode.has(Mode::STEP | Mode::BOUNCE);
        let flow = self.inline(instruction, site).unwrap_or_else(|| {
            self.exit(site);
            if goes_on { Flow::Next } else { Flow::Ended }
        });
        if goes_on {
            self.tables.sites[site as usize].reason = Reason::System {
                instruction: index,
                resume: self.here(),
            };
        }
        flow
    }

    fn inline(&mut self, instruction: &Instruction, site: u32) -> Option<Flow> {
        if self.mode.is_kernel64() {
            self.inline_in_kernel(instruction, site)
        } else if self.mode.is_user64() {
            self.inline_in_user(instruction, site)
        } else {
            None
        }
    }

    fn inline_in_kernel(&mut self, instruction: &Instruction, site: u32) -> Option<Flow> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Cli => self.put_interrupt_flag(0),
            M::Sti => self.sti(instruction, site),
            M::Pushfq => self.pushf(),
            M::Popfq => self.popf(site, rflags::IOPL, rflags::IF),
            M::Swapgs => self.swapgs(),
            M::Stac => return Some(self.access_check(instruction, site, View::SupervisorAcSet)),
            M::Clac => return Some(self.access_check(instruction, site, View::Supervisor)),
            M::Sysretq => return Some(self.sysret(site)),
            M::Mov => return self.read_special(instruction),
            _ => return self.inline_anywhere(instruction, site, 1),
        }
        Some(Flow::Next)
    }

    fn inline_in_user(&mut self, instruction: &Instruction, site: u32) -> Option<Flow> {
        match instruction.mnemonic() {
            Mnemonic::Syscall => Some(self.syscall(instruction, site)),
            Mnemonic::Pushfq => {
                self.pushf();
                Some(Flow::Next)
            }
            Mnemonic::Mov if instruction.op1_register().is_segment_register() => {
                self.read_special(instruction)
            }
            _ => self.inline_anywhere(instruction, site, 0),
        }
    }

    /// Those that ask for the level (0: CPL 3) only whether CR4 allows them.
    fn inline_anywhere(
        &mut self,
        instruction: &Instruction,
        site: u32,
        level: usize,
    ) -> Option<Flow> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Rdtsc => {
                self.unless_zero(at(fast!(no_tsc), 4 * level), site);
                self.rdtsc();
            }
            M::Rdtscp => {
                self.unless_zero(at(fast!(no_tscp), 4 * level), site);
                // RDTSCP waits for the loads before it (SDM volume 2, RDTSCP); RDTSC does not.
                self.asm.bytes(&LFENCE);
                self.rdtsc();
                let aux = Mem::base(Reg::RSP, frame_disp!(state.msrs.tsc_aux));
                self.asm.load(Width::B32, GUEST_RCX, aux);
            }
            M::Rdfsbase => self.read_base(instruction, site, FS),
            M::Rdgsbase => self.read_base(instruction, site, GS),
            M::Wrfsbase => self.write_base(instruction, site, FS),
            M::Wrgsbase => self.write_base(instruction, site, GS),
            _ => return None,
        }
        Some(Flow::Next)
    }

    /// Leaves by this site.
    fn cold(&mut self, site: u32) {
        let from = self.asm.jmp();
        self.push_cold(from, site);
    }

    fn cold_if(&mut self, condition: Cond, site: u32) {
        let from = self.asm.jcc(condition as u8);
        self.push_cold(from, site);
    }

    fn push_cold(&mut self, from: crate::emit::Fixup, site: u32) {
        self.cold.push(Cold {
            from,
            address: T0,
            site,
        });
    }

    /// Leaves unless `rcx` is zero. Keeps flags.
    fn unless_rcx_zero(&mut self, site: u32) {
        let ok = self.asm.jrcxz();
        self.cold(site);
        self.asm.bind(ok);
    }

    /// Leaves unless a field is zero. Keeps flags.
    fn unless_zero(&mut self, field: Mem, site: u32) {
        self.asm.load(Width::B32, SCRATCH, field);
        self.unless_rcx_zero(site);
    }

    /// Leaves unless the tables of another view are for this block's mode. Keeps flags.
    fn unless_tables_fit(&mut self, view: View, site: u32) {
        let field = at(fast!(modes), 4 * view as usize);
        let mode = self.mode.with_view(view).0 as i32;
        self.asm.load(Width::B32, SCRATCH, field);
        self.asm
            .lea(Width::B32, SCRATCH, Mem::base(SCRATCH, mode.wrapping_neg()));
        self.unless_rcx_zero(site);
    }

    fn change_view(&mut self, view: View) {
        self.asm.store_imm(Width::B32, fast!(view), view as i32);
    }

    /// Puts `value` (0 or 1) at a bit of RFLAGS in the frame. Keeps flags.
    fn put_flag(&mut self, bit: u8, value: i32) {
        // Turned to the top, shifted out, replaced at the bottom, and turned back.
        self.asm.load(Width::B32, SCRATCH, flags_slot());
        self.asm.rorx32(SCRATCH, SCRATCH, bit + 1);
        self.asm.lea(
            Width::B32,
            SCRATCH,
            Mem::indexed(SCRATCH, SCRATCH, 0, value),
        );
        self.asm.rorx32(SCRATCH, SCRATCH, 32 - bit);
        self.asm.store(Width::B32, flags_slot(), SCRATCH);
    }

    fn put_interrupt_flag(&mut self, value: i32) {
        self.put_flag(rflags::IF.trailing_zeros() as u8, value);
    }

    /// `STI` while no event waits. The shadow is noted for whoever looks at events next.
    fn sti(&mut self, instruction: &Instruction, site: u32) {
        self.unless_zero(fast!(waits), site);
        self.asm.mov_imm(SCRATCH, instruction.next_ip());
        self.asm.store(Width::B64, fast!(sti_rip), SCRATCH);
        self.put_interrupt_flag(1);
    }

    /// RFLAGS as `PUSHF` shows them, in `T0`. Keeps flags; uses `rcx`.
    fn flags_image(&mut self) {
        let to_df = 32 - rflags::DF.trailing_zeros() as u8;
        let to_of = 32 - rflags::OF.trailing_zeros() as u8;
        self.asm.store(Width::B64, tmp(0), Reg::RAX);
        // lahf; seto al; movzx ecx, ah
        self.asm.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb6, 0xcc]);
        self.asm.movzx(Width::B8, T0, Reg::RAX);
        self.asm.rorx32(T0, T0, to_of);
        self.asm.load(Width::B64, Reg::RAX, tmp(0));
        let add = |block: &mut Self| {
            block
                .asm
                .lea(Width::B64, T0, Mem::indexed(T0, SCRATCH, 0, 0));
        };
        add(self);
        self.asm.load_zero_extended(Width::B8, SCRATCH, df_slot());
        self.asm.rorx32(SCRATCH, SCRATCH, to_df);
        add(self);
        self.asm.load(Width::B64, SCRATCH, flags_slot());
        add(self);
    }

    /// Takes arithmetic flags and DF from the image in `from`. Uses `rcx`.
    fn take_flags(&mut self, from: Reg) {
        self.asm.mov(Width::B32, SCRATCH, from);
        self.shift_right(SCRATCH, rflags::DF);
        self.asm.store(Width::B8, df_slot(), SCRATCH);
        self.asm.store(Width::B64, tmp(0), Reg::RAX);
        self.asm.mov(Width::B32, SCRATCH, from);
        self.shift_right(SCRATCH, rflags::OF);
        self.asm.mov(Width::B32, Reg::RAX, from);
        // shl eax, 8; mov al, cl; add al, 0x7f; sahf
        self.asm
            .bytes(&[0xc1, 0xe0, 8, 0x88, 0xc8, 0x04, 0x7f, 0x9e]);
        self.asm.load(Width::B64, Reg::RAX, tmp(0));
    }

    /// One flag of an image, in bit 0.
    fn shift_right(&mut self, reg: Reg, flag: u64) {
        self.asm.op_reg(Width::B32, Map::One, 0xc1, 5, reg);
        self.asm.byte(flag.trailing_zeros() as u8);
        self.and_imm(reg, 1);
    }

    fn and_imm(&mut self, reg: Reg, mask: u32) {
        self.asm.op_reg(Width::B32, Map::One, 0x81, 4, reg);
        self.asm.bytes(&mask.to_le_bytes());
    }

    fn xor_mem(&mut self, reg: Reg, m: Mem) {
        self.asm.op_mem(Width::B32, Map::One, 0x33, reg.0, m);
    }

    fn pushf(&mut self) {
        self.flags_image();
        self.asm.store(Width::B64, tmp(1), T0);
        let place = self.push_slot(8);
        self.asm.load(Width::B64, SCRATCH, tmp(1));
        self.asm.store(Width::B64, place, SCRATCH);
        self.move_stack(-8);
    }

    /// `POPFQ` that changes nothing but arithmetic flags, DF and the flags in `taken`.
    fn popf(&mut self, site: u32, more: u64, taken: u64) {
        let place = self.pop_slot(8);
        self.asm.load(Width::B64, T0, place);
        self.asm.mov(Width::B32, T1, T0);
        self.xor_mem(T1, flags_slot());
        self.asm.mov(Width::B32, SCRATCH, T1);
        let kept = rflags::TF | rflags::NT | rflags::AC | rflags::ID | more;
        self.and_imm(SCRATCH, kept as u32);
        self.cold_if(Cond::Ne, site);
        // What waits for IF is looked at wherever IF may become set.
        self.and_imm(T1, taken as u32);
        let unchanged = self.asm.jump8(0x74);
        self.asm.cmp_mem_imm8(fast!(waits), 0);
        self.cold_if(Cond::Ne, site);
        self.asm
            .op_mem(Width::B32, Map::One, 0x31, T1.0, flags_slot());
        self.asm.bind(unchanged);
        self.take_flags(T0);
        self.move_stack(8);
    }

    fn swapgs(&mut self) {
        let kernel = Mem::base(Reg::RSP, frame_disp!(state.msrs.kernel_gs_base));
        self.asm.load(Width::B64, SCRATCH, base_slot(GS));
        self.asm.load(Width::B64, T0, kernel);
        self.asm.store(Width::B64, kernel, SCRATCH);
        self.asm.store(Width::B64, base_slot(GS), T0);
    }

    fn rdtsc(&mut self) {
        self.asm.bytes(&[0x0f, 0x31]);
        let offset = Mem::base(Reg::RSP, frame_disp!(state.tsc_offset));
        self.asm.mov_imm(SCRATCH, 32);
        self.asm.shlx(Reg::RDX, Reg::RDX, SCRATCH);
        let sum = |other| Mem::indexed(Reg::RAX, other, 0, 0);
        self.asm.lea(Width::B64, Reg::RAX, sum(Reg::RDX));
        self.asm.load(Width::B64, T0, offset);
        self.asm.lea(Width::B64, Reg::RAX, sum(T0));
        self.asm.shrx(Reg::RDX, Reg::RAX, SCRATCH);
        self.asm.mov(Width::B32, Reg::RAX, Reg::RAX);
    }

    fn read_base(&mut self, instruction: &Instruction, site: u32, segment: u8) {
        self.unless_zero(fast!(no_fsgsbase), site);
        let target = instruction.op0_register();
        let width = Width::of_bytes(target.size() as u32);
        self.load_to_guest(width, target, base_slot(segment));
    }

    /// Zero-extends a field of the frame into a guest register.
    fn load_to_guest(&mut self, width: Width, target: Register, field: Mem) {
        let guest = number(target);
        if let (Home::Host(reg), Width::B32 | Width::B64) = (home(guest), width) {
            self.asm.load(width, reg, field);
        } else {
            self.asm.load_zero_extended(width, SCRATCH, field);
            self.assign(width, guest, SCRATCH);
        }
    }

    fn write_base(&mut self, instruction: &Instruction, site: u32, segment: u8) {
        self.unless_zero(fast!(no_fsgsbase), site);
        let source = instruction.op0_register();
        let value = self.value_in(number(source), T0);
        if source.size() == 4 {
            self.asm.mov(Width::B32, T0, value);
        } else {
            // Canonical with 48 bits; where there are 57, the others are no hurry.
            self.asm.mov_imm(T1, 16);
            self.asm.shlx(SCRATCH, value, T1);
            self.asm.sarx(SCRATCH, SCRATCH, T1);
            self.asm.not(SCRATCH);
            self.asm
                .lea(Width::B64, SCRATCH, Mem::indexed(SCRATCH, value, 0, 1));
            self.unless_rcx_zero(site);
            self.asm.mov(Width::B64, T0, value);
        }
        self.asm.store(Width::B64, base_slot(segment), T0);
    }

    /// `MOV` from a segment or control register.
    fn read_special(&mut self, instruction: &Instruction) -> Option<Flow> {
        let from = instruction.op1_register();
        if from.is_segment_register() {
            let selector = selector_slot(segment_number(from));
            if has_memory(instruction) {
                let segment = super::address::segment_of(instruction, self.mode);
                let address = self.linear(instruction, 2, Use::WriteOnly);
                let place = self.access(address, 2, Use::WriteOnly, segment);
                self.asm.load_zero_extended(Width::B16, SCRATCH, selector);
                self.asm.store(Width::B16, place, SCRATCH);
            } else {
                let to = instruction.op0_register();
                self.asm.load_zero_extended(Width::B16, SCRATCH, selector);
                let width = Width::of_bytes(to.size() as u32);
                self.assign(width, number(to), SCRATCH);
            }
            return Some(Flow::Next);
        }
        let field = match from {
            Register::CR0 => frame_disp!(state.cr0),
            Register::CR2 => frame_disp!(state.cr2),
            Register::CR3 => frame_disp!(state.cr3),
            Register::CR4 => frame_disp!(state.cr4),
            _ => return None,
        };
        debug_assert_eq!(instruction.op0_kind(), OpKind::Register);
        self.load_to_guest(
            Width::B64,
            instruction.op0_register(),
            Mem::base(Reg::RSP, field),
        );
        Some(Flow::Next)
    }

    /// `STAC`, `CLAC`: AC, and with SMAP the view.
    fn access_check(&mut self, instruction: &Instruction, site: u32, target: View) -> Flow {
        self.unless_zero(fast!(no_smap), site);
        let value = i32::from(target == View::SupervisorAcSet);
        let here = self.mode.view();
        if here != target {
            self.unless_tables_fit(target, site);
            self.change_view(target);
        }
        self.put_flag(rflags::AC.trailing_zeros() as u8, value);
        self.link(instruction.next_ip());
        Flow::Ended
    }

    /// Copies CS and SS from a field of `Fast`.
    fn load_code_and_stack(&mut self, from: Mem) {
        let cs = Mem::base(Reg::RSP, frame_disp!(state.segments) + offset(1));
        let ss = Mem::base(Reg::RSP, frame_disp!(state.segments) + offset(2));
        for (index, to) in [cs, ss].into_iter().enumerate() {
            for word in (0..size_of::<Segment>()).step_by(8) {
                let from = at(from, index * size_of::<Segment>() + word);
                self.asm.load(Width::B64, SCRATCH, from);
                self.asm.store(Width::B64, at(to, word), SCRATCH);
            }
        }
    }

    /// Puts the rest of the flags image in `T1` where it lives, and then takes the others.
    fn put_image(&mut self) {
        self.asm.mov(Width::B32, SCRATCH, T1);
        self.and_imm(SCRATCH, (rflags::ALL & !ELSEWHERE) as u32);
        self.asm.store(Width::B64, flags_slot(), SCRATCH);
        self.take_flags(T1);
    }

    /// `SYSCALL` in 64-bit mode at CPL 3.
    fn syscall(&mut self, instruction: &Instruction, site: u32) -> Flow {
        self.unless_zero(fast!(no_syscall), site);
        self.unless_tables_fit(View::Supervisor, site);
        self.flags_image();
        let keeps = fast!(syscall_keeps);
        self.asm.pext_mem(T1, T0, keeps);
        self.asm.pdep_mem(T1, T1, keeps);
        self.asm.store(Width::B64, slot(11), T0);
        self.asm.mov_imm(GUEST_RCX, instruction.next_ip());
        self.load_code_and_stack(fast!(kernel));
        self.put_image();
        self.change_view(View::Supervisor);
        let target = Mem::base(Reg::RSP, frame_disp!(state.msrs.lstar));
        self.asm.load(Width::B64, T0, target);
        self.forget_branch();
        self.indirect_in(View::Supervisor)
    }

    /// `SYSRET` to 64-bit mode.
    fn sysret(&mut self, site: u32) -> Flow {
        self.unless_zero(fast!(no_syscall), site);
        self.unless_zero(fast!(waits), site);
        self.unless_tables_fit(View::User, site);
        self.asm.mov_imm(SCRATCH, 47);
        self.asm.shrx(SCRATCH, GUEST_RCX, SCRATCH);
        self.unless_rcx_zero(site);
        self.asm.load(Width::B64, T0, slot(11));
        self.asm.pext_mem(SCRATCH, T0, fast!(trap_flag));
        self.unless_rcx_zero(site);
        let takes = fast!(sysret_takes);
        self.asm.pext_mem(T1, T0, takes);
        self.asm.pdep_mem(T1, T1, takes);
        self.load_code_and_stack(fast!(user));
        self.put_image();
        self.change_view(View::User);
        self.asm.mov(Width::B64, T0, GUEST_RCX);
        self.forget_branch();
        self.indirect_in(View::User)
    }

    /// Goes on at the address in `T0`, in a view. Keeps flags.
    pub(super) fn indirect_in(&mut self, view: View) -> Flow {
        let entry = self.table_entry(view);
        self.asm.jmp_mem(entry);
        Flow::Ended
    }

    /// What the table of indirect jumps holds for the address in `T0`. Keeps flags.
    pub(super) fn table_entry(&mut self, view: View) -> Mem {
        let table = view as usize * JUMP_ENTRIES;
        self.asm.mov_imm(T1, JUMP_MASK);
        self.asm.pext(T1, T0, T1);
        let disp = frame_disp!(jumps) + 8 * table as i32;
        Mem::indexed(Reg::RSP, T1, 3, disp)
    }
}

/// Where a segment register lies among the others.
const fn offset(segment: usize) -> i32 {
    const { assert!(core::mem::offset_of!(Segments, ss) == 2 * size_of::<Segment>()) };
    (segment * size_of::<Segment>()) as i32
}
