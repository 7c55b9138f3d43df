//! The child: a signal handler that runs one case after the other.
//!
//! Everything here runs with the test's FS base until [`enter`] restores the program's own, so
//! nothing before that may touch thread-local storage.
#![expect(
    unsafe_code,
    reason = "signal contexts and mappings at fixed addresses"
)]

use std::arch::asm;
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering;

use super::local;
use super::mailbox::{CHILD, Mailbox, PARENT, pass_turn, wait_turn};
use crate::case::{
    Case, Ending, Extended, LEGACY_BYTES, Mode, Outcome, Program, State, XSAVE_BYTES, YMM_OFFSET,
    selector,
};
use crate::layout::{CODE, CODE_BYTES, DATA_BYTES, FILLER, PAGE, WINDOWS, WRITABLE_BYTES};

const SIGNALS: [i32; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGALRM,
];
const ALTERNATE_STACK: usize = 256 * 1024;
/// Microseconds between two looks at whether a case still runs.
const TICK: i64 = 20_000;
/// So many ticks in one case are a timeout.
const TICKS: u32 = 3;
/// No such program: nothing is loaded into the code window.
const NONE: u32 = u32::MAX;

/// What the handler knows. One per process, touched by the handler alone after `main`.
struct Sandbox {
    mailbox: *mut Mailbox,
    /// The code window and the data, writable.
    code: *mut u8,
    data: *mut u8,
    fs_base: u64,
    gs_base: u64,
    /// The case that runs, if any.
    running: bool,
    current: u32,
    ticks: u32,
    /// The program in the code window, and its extent.
    loaded: u32,
    extent: (usize, usize),
}

static mut SANDBOX: Sandbox = Sandbox {
    mailbox: ptr::null_mut(),
    code: ptr::null_mut(),
    data: ptr::null_mut(),
    fs_base: 0,
    gs_base: 0,
    running: false,
    current: 0,
    ticks: 0,
    loaded: NONE,
    extent: (0, 0),
};

/// The child's life. Ends by being killed.
pub(super) fn main(mailbox: NonNull<Mailbox>) -> ! {
    // SAFETY: the process has one thread; the handler doesn't run before the trap below.
    unsafe {
        let sandbox = &mut *ptr::addr_of_mut!(SANDBOX);
        sandbox.mailbox = mailbox.as_ptr();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if map_windows(sandbox).is_none() || !install_handler() || !start_timer() {
            libc::_exit(1);
        }
        if !local::install() {
            libc::_exit(3);
        }
        stay_on_first_processor();
        sandbox.fs_base = read_fs_base();
        sandbox.gs_base = read_gs_base();
        deny_system_calls();
        asm!("int3");
        libc::_exit(2)
    }
}

/// `LSL` tells user code the processor's number. Where that isn't allowed, it will.
unsafe fn stay_on_first_processor() {
    // SAFETY: an all-zero set is a valid one.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Maps a memfd twice or thrice: the handler's writable view, and the test's.
unsafe fn map_windows(sandbox: &mut Sandbox) -> Option<()> {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: new mappings; the fixed ones refuse to replace what is there.
    unsafe {
        let code = memory_file(CODE_BYTES)?;
        sandbox.code = map(0, CODE_BYTES, rw, code, 0)?;
        map(
            CODE.raw(),
            CODE_BYTES,
            libc::PROT_READ | libc::PROT_EXEC,
            code,
            0,
        )?;
        ptr::write_bytes(sandbox.code, FILLER, CODE_BYTES);
        let data = memory_file(DATA_BYTES)?;
        sandbox.data = map(0, DATA_BYTES, rw, data, 0)?;
        for window in WINDOWS {
            map(window.raw(), WRITABLE_BYTES, rw, data, 0)?;
            let rest = window.raw() + WRITABLE_BYTES as u64;
            map(rest, PAGE, libc::PROT_READ, data, WRITABLE_BYTES)?;
        }
    }
    Some(())
}

unsafe fn memory_file(len: usize) -> Option<i32> {
    // SAFETY: plain system calls with a constant name.
    unsafe {
        let fd = libc::memfd_create(c"differential".as_ptr(), libc::MFD_CLOEXEC);
        (fd >= 0 && libc::ftruncate(fd, len as i64) == 0).then_some(fd)
    }
}

unsafe fn map(
    address: u64,
    len: usize,
    protection: i32,
    fd: i32,
    offset: usize,
) -> Option<*mut u8> {
    let fixed = if address == 0 {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE | fixed;
    // SAFETY: nothing existing is replaced.
    let at = unsafe { libc::mmap(address as *mut _, len, protection, flags, fd, offset as i64) };
    (at != libc::MAP_FAILED).then_some(at.cast())
}

unsafe fn install_handler() -> bool {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh stack for the handler, which is never unmapped; the handler has the
    // signature that SA_SIGINFO asks for.
    unsafe {
        let stack = libc::mmap(ptr::null_mut(), ALTERNATE_STACK, rw, anonymous, -1, 0);
        if stack == libc::MAP_FAILED {
            return false;
        }
        let stack = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: ALTERNATE_STACK,
        };
        let mut ok = libc::sigaltstack(&raw const stack, ptr::null_mut()) == 0;
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        for signal in SIGNALS {
            ok &= libc::sigaction(signal, &raw const action, ptr::null_mut()) == 0;
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        ok &= libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) == 0;
        ok
    }
}

unsafe fn start_timer() -> bool {
    let interval = libc::timeval {
        tv_sec: 0,
        tv_usec: TICK,
    };
    let timer = libc::itimerval {
        it_interval: interval,
        it_value: interval,
    };
    // SAFETY: a plain system call with a local argument.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) == 0 }
}

/// From here on only what the handler itself needs.
unsafe fn deny_system_calls() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(LOAD, 0, 0, 4),
        step(EQUAL, 0, 4, AUDIT_ARCH_X86_64),
        step(LOAD, 0, 0, 0),
        step(EQUAL, 3, 0, libc::SYS_futex as u32),
        step(EQUAL, 2, 0, libc::SYS_rt_sigreturn as u32),
        step(EQUAL, 1, 0, libc::SYS_exit_group as u32),
        step(RETURN, 0, 0, libc::SECCOMP_RET_TRAP),
        step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the filter outlives the call, which copies it. Where seccomp is not to be had, the
    // sandbox is a process of its own all the same.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        );
    }
}

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the handler runs with all signals blocked, in the only thread, so nothing else
    // touches SANDBOX; the kernel's context is valid until the handler returns.
    unsafe {
        let sandbox = &mut *ptr::addr_of_mut!(SANDBOX);
        let (fs_base, gs_base) = (read_fs_base(), read_gs_base());
        enter(sandbox);
        let context = &mut *context.cast::<libc::ucontext_t>();
        if signal == libc::SIGALRM && sandbox.running && sandbox.ticks < TICKS {
            sandbox.ticks += 1;
            leave(fs_base, gs_base);
            return;
        }
        if sandbox.running {
            let mailbox = &mut *sandbox.mailbox;
            let outcome = &mut mailbox.outcomes[sandbox.current as usize];
            outcome.state.fs_base = fs_base;
            outcome.state.gs_base = gs_base;
            store_outcome(signal, context, outcome);
            if mailbox.programs[sandbox.loaded as usize].mode == Mode::Compat16 {
                // Going to a 16-bit stack leaves the kernel's own bits above ESP (Linux, "espfix64").
                outcome.state.gpr[4] &= 0xffff_ffff;
            }
            ptr::copy_nonoverlapping(sandbox.data, outcome.memory.as_mut_ptr(), WRITABLE_BYTES);
            sandbox.current += 1;
        }
        let case = next_case(sandbox);
        load_memory(sandbox, case);
        load_state(context, case, sandbox);
        leave(case.state.fs_base, case.state.gs_base);
    }
}

/// From the test's segments to the program's.
unsafe fn enter(sandbox: &Sandbox) {
    // SAFETY: these are the bases that the process began with. The kernel leaves AC, NT and ID as
    // the test had them, and takes them from here when it returns: they are cleared. AC would make the
    // handler's own unaligned accesses fault; the kernel leaves it set.
    unsafe {
        asm!("pushfq", "and dword ptr [rsp], 0xffdbbfff", "popfq");
        write_fs_base(sandbox.fs_base);
        write_gs_base(sandbox.gs_base);
    }
}

/// To the test's bases. Nothing after this may use thread-local storage.
unsafe fn leave(fs_base: u64, gs_base: u64) {
    // SAFETY: the caller goes straight back to the test.
    unsafe {
        write_fs_base(fs_base);
        write_gs_base(gs_base);
    }
}

/// Waits for the parent's turn to end where all cases are done; answers the case to run.
unsafe fn next_case(sandbox: &mut Sandbox) -> &'static Case {
    // SAFETY: the mailbox is mapped for the life of the process; between the two calls the parent
    // has the turn and no reference of ours but the one to the turn word is used.
    unsafe {
        let mailbox = sandbox.mailbox;
        let finished = sandbox.current >= (*mailbox).count;
        if !sandbox.running || finished {
            let turn = &(*mailbox).turn;
            if sandbox.running {
                pass_turn(turn, PARENT);
            }
            while !wait_turn(turn, PARENT, None) {}
            debug_assert_eq!(turn.load(Ordering::Acquire), CHILD);
            sandbox.running = true;
            sandbox.current = 0;
            unload_program(sandbox);
        }
        sandbox.ticks = 0;
        (*mailbox).current.store(sandbox.current, Ordering::Release);
        &(*mailbox).cases[sandbox.current as usize]
    }
}

unsafe fn unload_program(sandbox: &mut Sandbox) {
    let (start, len) = sandbox.extent;
    // SAFETY: the extent was inside the code window when the program was loaded.
    unsafe { ptr::write_bytes(sandbox.code.add(start), FILLER, len) };
    sandbox.loaded = NONE;
}

unsafe fn load_memory(sandbox: &mut Sandbox, case: &Case) {
    // SAFETY: programs and patches lie within the windows, by construction on the parent's side.
    unsafe {
        let mailbox = &*sandbox.mailbox;
        ptr::copy_nonoverlapping(mailbox.pattern.as_ptr(), sandbox.data, DATA_BYTES);
        for patch in &case.patches {
            let to = sandbox.data.add(patch.offset as usize);
            ptr::copy_nonoverlapping(patch.bytes.as_ptr(), to, patch.len as usize);
        }
        if sandbox.loaded != case.program {
            unload_program(sandbox);
            let program: &Program = &mailbox.programs[case.program as usize];
            let code = program.code();
            let to = sandbox.code.add(program.offset as usize);
            ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
            sandbox.loaded = case.program;
            sandbox.extent = (program.offset as usize, code.len());
        }
    }
}

/// The kernel's order of registers in the encoding's order.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

unsafe fn load_state(context: &mut libc::ucontext_t, case: &Case, sandbox: &Sandbox) {
    // SAFETY: the program was chosen by the parent; the FP image in the context is as large as
    // the kernel's header in it says, at least our XSAVE_BYTES where the CPU has AVX.
    unsafe {
        let program: &Program = &(*sandbox.mailbox).programs[case.program as usize];
        let gregs = &mut context.uc_mcontext.gregs;
        for (index, register) in GREGS.iter().enumerate() {
            gregs[*register as usize] = case.state.gpr[index] as i64;
        }
        gregs[libc::REG_RIP as usize] = program.entry() as i64;
        gregs[libc::REG_EFL as usize] = case.state.rflags as i64;
        let [es, cs, ss, ds, fs, gs] = program.mode.selectors();
        gregs[libc::REG_CSGSFS as usize] = i64::from(cs) | i64::from(ss) << 48;
        asm!("mov es, {0:x}", "mov ds, {1:x}", "mov fs, {2:x}", "mov gs, {3:x}",
             in(reg) es, in(reg) ds, in(reg) fs, in(reg) gs, options(nostack));
        let image = context.uc_mcontext.fpregs.cast::<u8>();
        let from = case.state.extended.0.as_ptr();
        ptr::copy_nonoverlapping(from, image, LEGACY_BYTES);
        ptr::copy_nonoverlapping(from.add(YMM_OFFSET), image.add(YMM_OFFSET), 256);
        *image.add(512) |= 7;
    }
}

unsafe fn store_outcome(signal: i32, context: &libc::ucontext_t, outcome: &mut Outcome) {
    let gregs = &context.uc_mcontext.gregs;
    let state: &mut State = &mut outcome.state;
    for (index, register) in GREGS.iter().enumerate() {
        state.gpr[index] = gregs[*register as usize] as u64;
    }
    state.rip = gregs[libc::REG_RIP as usize] as u64;
    state.rflags = gregs[libc::REG_EFL as usize] as u64;
    let visible = gregs[libc::REG_CSGSFS as usize] as u64;
    state.selectors[selector::CS] = visible as u16;
    state.selectors[selector::SS] = (visible >> 48) as u16;
    // SAFETY: as in `load_state`.
    unsafe {
        store_data_selectors(&mut state.selectors);
        store_extended(context, &mut state.extended);
    }
    outcome.ending = ending(signal, gregs);
}

unsafe fn store_data_selectors(selectors: &mut [u16; 6]) {
    let (es, ds, fs, gs): (u16, u16, u16, u16);
    // SAFETY: reading selectors has no effect.
    unsafe {
        asm!("mov {0:x}, es", "mov {1:x}, ds", "mov {2:x}, fs", "mov {3:x}, gs",
             out(reg) es, out(reg) ds, out(reg) fs, out(reg) gs,
             options(nomem, nostack, preserves_flags));
    }
    selectors[selector::ES] = es;
    selectors[selector::DS] = ds;
    selectors[selector::FS] = fs;
    selectors[selector::GS] = gs;
}

unsafe fn store_extended(context: &libc::ucontext_t, extended: &mut Extended) {
    let image = context.uc_mcontext.fpregs.cast::<u8>();
    let to = &mut extended.0;
    *to = Extended::initial().0;
    // SAFETY: the kernel's image is at least XSAVE_BYTES long where the CPU has AVX.
    unsafe {
        let present = *image.add(512);
        let from = |at: usize, len: usize| std::slice::from_raw_parts(image.add(at), len);
        if present & 1 != 0 {
            to[..24].copy_from_slice(from(0, 24));
            to[32..160].copy_from_slice(from(32, 128));
        }
        to[24..28].copy_from_slice(from(24, 4));
        if present & 2 != 0 {
            to[160..LEGACY_BYTES].copy_from_slice(from(160, LEGACY_BYTES - 160));
        }
        if present & 4 != 0 {
            to[YMM_OFFSET..XSAVE_BYTES].copy_from_slice(from(YMM_OFFSET, 256));
        }
    }
}

fn ending(signal: i32, gregs: &[i64; 23]) -> Ending {
    let vector = match signal {
        libc::SIGALRM => Ending::TIMEOUT,
        libc::SIGSYS => Ending::SYSTEM_CALL,
        _ => gregs[libc::REG_TRAPNO as usize] as u32,
    };
    let cr2 = gregs[libc::REG_CR2 as usize] as u64;
    Ending {
        vector,
        error_code: gregs[libc::REG_ERR as usize] as u32,
        cr2: if vector == 14 { cr2 } else { 0 },
    }
}

unsafe fn read_fs_base() -> u64 {
    let base;
    // SAFETY: the sandbox is only started where the kernel enabled FSGSBASE.
    unsafe { asm!("rdfsbase {}", out(reg) base, options(nomem, nostack, preserves_flags)) };
    base
}

unsafe fn read_gs_base() -> u64 {
    let base;
    // SAFETY: as above.
    unsafe { asm!("rdgsbase {}", out(reg) base, options(nomem, nostack, preserves_flags)) };
    base
}

unsafe fn write_fs_base(base: u64) {
    // SAFETY: as above; the caller knows what the base means.
    unsafe { asm!("wrfsbase {}", in(reg) base, options(nostack, preserves_flags)) };
}

unsafe fn write_gs_base(base: u64) {
    // SAFETY: as above.
    unsafe { asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags)) };
}
