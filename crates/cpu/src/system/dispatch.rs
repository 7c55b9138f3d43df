//! From the decoder's mnemonic to the function that runs it.

use iced_x86::{Instruction, Mnemonic};
use x86::rflags;

use super::fault::{general, undefined};
use super::{Abort, Context, Next};

/// Runs one system instruction at `state.rip`.
///
/// The instruction was decoded with that RIP (not the linear address) as its `ip`, in the bitness
/// of CS. A mnemonic that is not a system instruction's, or not offered, is `#UD`.
pub fn execute(ctx: &mut Context<'_>, instruction: &Instruction) -> Result<Next, Abort> {
    use Mnemonic::{
        Call, Clac, Cli, Int, Int1, Int3, Into, Invlpg, Iret, Iretd, Iretq, Jmp, Mov, Pop, Popf,
        Popfd, Popfq, Push, Pushf, Pushfd, Pushfq, Rdmsr, Retf, Stac, Sti, Swapgs, Syscall,
        Sysenter, Sysexit, Sysexitq, Sysret, Sysretq, Wrmsr,
    };
    match instruction.mnemonic() {
        Syscall => ctx.syscall(instruction),
        Sysret | Sysretq => ctx.sysret(instruction),
        Iret | Iretd | Iretq => ctx.iret(instruction),
        Swapgs => ctx.swapgs(instruction),
        Mov => mov(ctx, instruction),
        Invlpg => ctx.invlpg(instruction),
        Stac => ctx.set_access_check(instruction, rflags::AC),
        Clac => ctx.set_access_check(instruction, 0),
        Cli => ctx.cli(instruction),
        Sti => ctx.sti(instruction),
        Pushf | Pushfd | Pushfq => ctx.pushf(instruction),
        Popf | Popfd | Popfq => ctx.popf(instruction),
        Rdmsr => ctx.rdmsr(instruction),
        Wrmsr => ctx.wrmsr(instruction),
        Pop | Push => ctx.stack_segment(instruction),
        Jmp | Call => ctx.far_transfer(instruction),
        Retf => ctx.far_return(instruction),
        Sysenter => ctx.sysenter(),
        Sysexit | Sysexitq => ctx.sysexit(instruction),
        Int | Int1 | Int3 | Into => ctx.interrupt(instruction),
        mnemonic => execute_rare(ctx, instruction, mnemonic),
    }
}

fn mov(ctx: &mut Context<'_>, instruction: &Instruction) -> Result<Next, Abort> {
    let (to, from) = (instruction.op0_register(), instruction.op1_register());
    if to.is_cr() {
        ctx.write_control(instruction)
    } else if from.is_cr() {
        ctx.read_control(instruction)
    } else if to.is_dr() || from.is_dr() {
        ctx.mov_debug(instruction)
    } else if to.is_segment_register() || from.is_segment_register() {
        ctx.mov_segment(instruction)
    } else {
        Err(undefined())
    }
}

fn execute_rare(
    ctx: &mut Context<'_>,
    instruction: &Instruction,
    mnemonic: Mnemonic,
) -> Result<Next, Abort> {
    use Mnemonic::{
        Arpl, Bound, Clts, Cpuid, Fldenv, Fnsave, Fnstenv, Frstor, Fxrstor, Fxrstor64, Fxsave,
        Fxsave64, Hlt, In, Insb, Insd, Insw, Invd, Invpcid, Lar, Lds, Les, Lfs, Lgdt, Lgs, Lidt,
        Lldt, Lmsw, Lsl, Lss, Ltr, Monitor, Mwait, Out, Outsb, Outsd, Outsw, Rdfsbase, Rdgsbase,
        Rdpid, Rdpkru, Rdpmc, Rdtsc, Rdtscp, Sgdt, Sidt, Sldt, Smsw, Str, Verr, Verw, Vmcall,
        Vmmcall, Wbinvd, Wbnoinvd, Wrfsbase, Wrgsbase, Wrpkru, Xgetbv, Xrstor, Xrstor64, Xrstors,
        Xrstors64, Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64, Xsaves, Xsaves64,
        Xsetbv,
    };
    match mnemonic {
        In => ctx.port_in(instruction),
        Out => ctx.port_out(instruction),
        Insb | Insw | Insd => ctx.string_in(instruction),
        Outsb | Outsw | Outsd => ctx.string_out(instruction),
        Cpuid => Ok(ctx.cpuid(instruction)),
        Hlt => ctx.hlt(instruction),
        Rdtsc | Rdtscp => ctx.rdtsc(instruction),
        Rdpid => ctx.rdpid(instruction),
        // No performance counter is offered: every index faults, at any CPL.
        Rdpmc => Err(general()),
        Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => ctx.segment_base(instruction),
        Invpcid => ctx.invpcid(instruction),
        Invd | Wbinvd | Wbnoinvd => ctx.flush_caches(instruction),
        Lgdt | Lidt => ctx.load_table(instruction),
        Sgdt | Sidt => ctx.store_table(instruction),
        Lldt => ctx.lldt(instruction),
        Ltr => ctx.ltr(instruction),
        Sldt | Str => ctx.store_selector(instruction),
        Lmsw => ctx.lmsw(instruction),
        Smsw => ctx.smsw(instruction),
        Clts => ctx.clts(instruction),
        Lar | Lsl => ctx.load_attributes(instruction),
        Verr | Verw => ctx.verify_segment(instruction),
        Arpl => ctx.arpl(instruction),
        Lds | Les | Lfs | Lgs | Lss => ctx.load_far_pointer(instruction),
        Bound => ctx.bound(instruction),
        Monitor | Mwait => ctx.monitor(instruction),
        Vmcall | Vmmcall => ctx.hypercall(instruction),
        Xgetbv => ctx.xgetbv(instruction),
        Xsetbv => ctx.xsetbv(instruction),
        Rdpkru | Wrpkru => ctx.pkru(instruction),
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xsaves | Xsaves64 => {
            ctx.xsave(instruction)
        }
        Fnstenv | Fnsave | Fldenv | Frstor | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 => {
            ctx.x87_state(instruction)
        }
        Xrstor | Xrstor64 | Xrstors | Xrstors64 => ctx.xrstor(instruction),
        _ => Err(undefined()),
    }
}
