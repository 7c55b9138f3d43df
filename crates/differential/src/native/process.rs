//! The parent's side: starts the child, feeds it, starts another when it dies.
#![expect(unsafe_code, reason = "fork and a mapping shared with the child")]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::child;
use super::mailbox::{CASES, CHILD, Mailbox, PARENT, PROGRAMS, pass_turn, wait_turn};
use crate::case::{Batch, Case, Ending, Executor, Outcome, State};
use crate::layout::WRITABLE_BYTES;

/// How long between two looks at whether the child still lives.
const PATIENCE: Duration = Duration::from_millis(300);
/// So many looks at a batch: the child's timer ends each case long before.
const LOOKS: u32 = 60;

/// The physical CPU, in a child process.
pub struct NativeCpu {
    mailbox: NonNull<Mailbox>,
    child: libc::pid_t,
}

impl NativeCpu {
    /// Starts the child.
    pub fn new() -> Result<Self> {
        // SAFETY: a fresh mapping; all-zero bytes are a valid Mailbox (integers, and enums whose
        // first variant is 0).
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Mailbox>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        ensure!(raw != libc::MAP_FAILED, "no memory for the mailbox");
        let mailbox = NonNull::new(raw.cast()).context("a mailbox at address 0")?;
        let mut cpu = Self { mailbox, child: 0 };
        cpu.start()?;
        Ok(cpu)
    }

    fn start(&mut self) -> Result<()> {
        self.mailbox().turn.store(PARENT, Ordering::Release);
        // SAFETY: the child calls nothing but system calls: no allocator, no locks of the parent.
        match unsafe { libc::fork() } {
            -1 => bail!("fork: {}", std::io::Error::last_os_error()),
            0 => child::main(self.mailbox),
            pid => self.child = pid,
        }
        Ok(())
    }

    fn stop(&mut self) {
        // SAFETY: `child` is our own child and not yet waited for.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
        }
    }

    fn mailbox(&mut self) -> &mut Mailbox {
        // SAFETY: the mapping lives as long as `self`; the child touches it only in its turn, during
        // which `exchange` holds no other reference than the one to the turn word.
        unsafe { self.mailbox.as_mut() }
    }

    /// Runs the cases in the mailbox; answers how many have an outcome.
    fn exchange(&mut self) -> Result<usize> {
        let mailbox = self.mailbox();
        let count = mailbox.count as usize;
        pass_turn(&mailbox.turn, CHILD);
        for _ in 0..LOOKS {
            if wait_turn(&self.mailbox().turn, CHILD, Some(PATIENCE)) {
                return Ok(count);
            }
            if self.has_died() {
                break;
            }
        }
        self.stop();
        let mailbox = self.mailbox();
        let done = mailbox.current.load(Ordering::Acquire) as usize;
        mailbox.outcomes[done] = failed(&mailbox.cases[done]);
        self.start()?;
        Ok(done + 1)
    }

    fn has_died(&self) -> bool {
        // SAFETY: WNOWAIT leaves the child to be waited for by `stop`.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            let id = self.child as libc::id_t;
            libc::waitid(libc::P_PID, id, &raw mut info, options) == 0 && info.si_pid() != 0
        }
    }

    fn run_chunk(&mut self, batch: &Batch, cases: &[Case], out: &mut Vec<Outcome>) -> Result<()> {
        let first = cases[0].program;
        let mailbox = self.mailbox();
        mailbox.count = cases.len() as u32;
        mailbox.pattern = *batch.pattern;
        for (slot, case) in mailbox.cases.iter_mut().zip(cases) {
            *slot = *case;
            slot.program -= first;
            let index = slot.program as usize;
            mailbox.programs[index] = batch.programs[case.program as usize];
        }
        let done = self.exchange()?;
        out.extend_from_slice(&self.mailbox().outcomes[..done]);
        if done < cases.len() {
            return self.run_chunk(batch, &cases[done..], out);
        }
        Ok(())
    }
}

impl Executor for NativeCpu {
    fn name(&self) -> &'static str {
        "native"
    }

    /// Cases must be ordered by program.
    fn run(&mut self, batch: &Batch, outcomes: &mut Vec<Outcome>) -> Result<()> {
        let mut rest = batch.cases.as_slice();
        while let Some(first) = rest.first() {
            let fits = |case: &&Case| {
                (first.program..first.program + PROGRAMS as u32).contains(&case.program)
            };
            let len = rest.iter().take(CASES).take_while(fits).count();
            let (chunk, tail) = rest.split_at(len);
            self.run_chunk(batch, chunk, outcomes)?;
            rest = tail;
        }
        Ok(())
    }
}

impl Drop for NativeCpu {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: mapped in `new` with this size; no reference outlives `self`.
        unsafe { libc::munmap(self.mailbox.as_ptr().cast(), size_of::<Mailbox>()) };
    }
}

fn failed(case: &Case) -> Outcome {
    Outcome {
        ending: Ending {
            vector: Ending::FAILED,
            error_code: 0,
            cr2: 0,
        },
        state: State { ..case.state },
        memory: [0; WRITABLE_BYTES],
    }
}
