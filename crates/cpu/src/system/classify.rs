//! Which instructions are not for translated code.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Whether the instruction reads or changes the CPU's own state, or transfers control between
/// segments: [`super::execute`] runs it.
pub fn is_system(instruction: &Instruction) -> bool {
    match instruction.mnemonic() {
        Mnemonic::Mov => touches_special_register(instruction),
        Mnemonic::Pop | Mnemonic::Push => instruction.op0_register().is_segment_register(),
        Mnemonic::Jmp | Mnemonic::Call => is_far(instruction),
        mnemonic => is_system_mnemonic(mnemonic),
    }
}

/// What an instruction does with [`super::Context::fpu`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FpuUse {
    /// Nothing.
    None,
    /// It must be up to date before the instruction.
    Read,
    /// And is to be taken over after it.
    Changed,
}

/// What this system instruction does with [`super::Context::fpu`].
pub fn fpu_use(instruction: &Instruction) -> FpuUse {
    use Mnemonic::{
        Fldenv, Fnsave, Fnstenv, Frstor, Fxrstor, Fxrstor64, Fxsave, Fxsave64, Xrstor, Xrstor64,
        Xrstors, Xrstors64, Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64, Xsaves,
        Xsaves64,
    };
    match instruction.mnemonic() {
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xsaves | Xsaves64
        | Fxsave | Fxsave64 => FpuUse::Read,
        Xrstor | Xrstor64 | Xrstors | Xrstors64 | Fxrstor | Fxrstor64 | Fnstenv | Fnsave
        | Fldenv | Frstor => FpuUse::Changed,
        _ => FpuUse::None,
    }
}

/// Whether the machine around the CPU may have more for it after this instruction than before.
pub fn asks_platform(instruction: &Instruction) -> bool {
    use Mnemonic::{
        Hlt, In, Insb, Insd, Insw, Monitor, Mov, Mwait, Out, Outsb, Outsd, Outsw, Rdmsr, Vmcall,
        Vmmcall, Wrmsr,
    };
    match instruction.mnemonic() {
        Mov => instruction.op0_register() == Register::CR8,
        mnemonic => matches!(
            mnemonic,
            Hlt | In
                | Insb
                | Insd
                | Insw
                | Monitor
                | Mwait
                | Out
                | Outsb
                | Outsd
                | Outsw
                | Rdmsr
                | Vmcall
                | Vmmcall
                | Wrmsr
        ),
    }
}

fn touches_special_register(instruction: &Instruction) -> bool {
    let special = |register: Register| {
        register.is_segment_register() || register.is_cr() || register.is_dr() || register.is_tr()
    };
    special(instruction.op0_register()) || special(instruction.op1_register())
}

fn is_far(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::FarBranch16 | OpKind::FarBranch32
    ) || instruction.is_jmp_far_indirect()
        || instruction.is_call_far_indirect()
}

/// Virtualisation, enclave and other extensions that no guest is offered stand here too: they raise
/// `#UD`, whatever the host would do.
#[expect(clippy::too_many_lines, reason = "a table")]
fn is_system_mnemonic(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{
        Arpl, Bound, Clac, Clgi, Cli, Clts, Clui, Cpuid, Encls, Enclu, Enclv, Fldenv, Fnsave,
        Fnstenv, Frstor, Fxrstor, Fxrstor64, Fxsave, Fxsave64, Getsec, Hlt, Hreset, In, Insb, Insd,
        Insw, Int, Int1, Int3, Into, Invd, Invept, Invlpg, Invlpga, Invlpgb, Invpcid, Invvpid,
        Iret, Iretd, Iretq, Lar, Lds, Les, Lfs, Lgdt, Lgs, Lidt, Lldt, Lmsw, Loadiwkey, Lsl, Lss,
        Ltr, Monitor, Monitorx, Mwait, Mwaitx, Out, Outsb, Outsd, Outsw, Pconfig, Popf, Popfd,
        Popfq, Psmash, Pushf, Pushfd, Pushfq, Pvalidate, Rdfsbase, Rdgsbase, Rdmsr, Rdmsrlist,
        Rdpid, Rdpkru, Rdpmc, Rdpru, Rdtsc, Rdtscp, Retf, Rmpadjust, Rmpupdate, Rsm, Senduipi,
        Sgdt, Sidt, Skinit, Sldt, Smsw, Stac, Stgi, Sti, Str, Stui, Swapgs, Syscall, Sysenter,
        Sysexit, Sysexitq, Sysret, Sysretq, Testui, Tlbsync, Tpause, Ud0, Ud1, Ud2, Uiret,
        Umonitor, Umwait, Verr, Verw, Vmcall, Vmclear, Vmfunc, Vmlaunch, Vmload, Vmmcall, Vmptrld,
        Vmptrst, Vmread, Vmresume, Vmrun, Vmsave, Vmwrite, Vmxoff, Vmxon, Wbinvd, Wbnoinvd,
        Wrfsbase, Wrgsbase, Wrmsr, Wrmsrlist, Wrmsrns, Wrpkru, Xgetbv, Xrstor, Xrstor64, Xrstors,
        Xrstors64, Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64, Xsaves, Xsaves64,
        Xsetbv,
    };
    matches!(
        mnemonic,
        Arpl | Bound
            | Clac
            | Clgi
            | Cli
            | Clts
            | Clui
            | Cpuid
            | Encls
            | Enclu
            | Enclv
            | Fldenv
            | Fnsave
            | Fnstenv
            | Frstor
            | Fxrstor
            | Fxrstor64
            | Fxsave
            | Fxsave64
            | Getsec
            | Hlt
            | Hreset
            | In
            | Insb
            | Insd
            | Insw
            | Int
            | Int1
            | Int3
            | Into
            | Invd
            | Invept
            | Invlpg
            | Invlpga
            | Invlpgb
            | Invpcid
            | Invvpid
            | Iret
            | Iretd
            | Iretq
            | Lar
            | Lds
            | Les
            | Lfs
            | Lgdt
            | Lgs
            | Lidt
            | Lldt
            | Lmsw
            | Loadiwkey
            | Lsl
            | Lss
            | Ltr
            | Monitor
            | Monitorx
            | Mwait
            | Mwaitx
            | Out
            | Outsb
            | Outsd
            | Outsw
            | Pconfig
            | Popf
            | Popfd
            | Popfq
            | Psmash
            | Pushf
            | Pushfd
            | Pushfq
            | Pvalidate
            | Rdfsbase
            | Rdgsbase
            | Rdmsr
            | Rdmsrlist
            | Rdpid
            | Rdpkru
            | Rdpmc
            | Rdpru
            | Rdtsc
            | Rdtscp
            | Retf
            | Rmpadjust
            | Rmpupdate
            | Rsm
            | Senduipi
            | Sgdt
            | Sidt
            | Skinit
            | Sldt
            | Smsw
            | Stac
            | Stgi
            | Sti
            | Str
            | Stui
            | Swapgs
            | Syscall
            | Sysenter
            | Sysexit
            | Sysexitq
            | Sysret
            | Sysretq
            | Testui
            | Tlbsync
            | Tpause
            | Ud0
            | Ud1
            | Ud2
            | Uiret
            | Umonitor
            | Umwait
            | Verr
            | Verw
            | Vmcall
            | Vmclear
            | Vmfunc
            | Vmlaunch
            | Vmload
            | Vmmcall
            | Vmptrld
            | Vmptrst
            | Vmread
            | Vmresume
            | Vmrun
            | Vmsave
            | Vmwrite
            | Vmxoff
            | Vmxon
            | Wbinvd
            | Wbnoinvd
            | Wrfsbase
            | Wrgsbase
            | Wrmsr
            | Wrmsrlist
            | Wrmsrns
            | Wrpkru
            | Xgetbv
            | Xrstor
            | Xrstor64
            | Xrstors
            | Xrstors64
            | Xsave
            | Xsave64
            | Xsavec
            | Xsavec64
            | Xsaveopt
            | Xsaveopt64
            | Xsaves
            | Xsaves64
            | Xsetbv
    )
}
