//! Processes: fork and exec with pipes between, threads that hand a token round (futexes), signals
//! that interrupt a computation, and faults that a handler answers.

#![expect(unsafe_code, reason = "fork and signal handlers are libc's")]

use std::{
    env,
    process::{Command, Stdio},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::cpus;

pub(crate) fn run(rounds: u64) -> Result<()> {
    for round in 0..rounds {
        fork_and_wait(round as u8)?;
        run_again(&format!("round {round}"))?;
    }
    hand_round(4 * cpus(), rounds * 10)?;
    let alarms = count_alarms(rounds)?;
    println!("processes: {rounds} forks and execs, {alarms} signals");
    Ok(())
}

/// A child that leaves with a code of its own, after it has written to memory that it shares with
/// its parent until then.
fn fork_and_wait(code: u8) -> Result<()> {
    let mut memory = vec![code; 64 << 10];
    // SAFETY: the child calls nothing but `_exit` and touches only memory of its own.
    let child = unsafe { libc::fork() };
    if child == 0 {
        memory.fill(!code);
        let same = memory.iter().all(|byte| *byte == !code);
        // SAFETY: ends the process.
        unsafe { libc::_exit(if same { i32::from(code & 0x7f) } else { 255 }) };
    }
    ensure!(child > 0, "fork: {}", std::io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: the status is ours.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(waited == child, "waitpid gave {waited}");
    ensure!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == i32::from(code & 0x7f),
        "the child ended with {status:#x}"
    );
    ensure!(
        memory.iter().all(|byte| *byte == code),
        "the child's writes are seen here"
    );
    Ok(())
}

/// This program again, whose answer comes through a pipe.
fn run_again(text: &str) -> Result<()> {
    let child = Command::new(env::current_exe()?)
        .args(["processes-child", text])
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "exec: {}", output.status);
    let expected: String = text.chars().rev().collect();
    ensure!(
        output.stdout == expected.as_bytes(),
        "exec answered {:?}",
        output.stdout
    );
    Ok(())
}

/// What [`run_again`] starts.
pub(crate) fn child(text: &str) {
    print!("{}", text.chars().rev().collect::<String>());
}

/// A token that each thread in turn takes and gives to the next.
fn hand_round(threads: usize, rounds: u64) -> Result<()> {
    let turn = Arc::new((Mutex::new(0_u64), Condvar::new()));
    let end = rounds * threads as u64;
    let workers: Vec<_> = (0..threads as u64)
        .map(|own| {
            let turn = turn.clone();
            thread::spawn(move || {
                let (token, moved) = &*turn;
                let Ok(mut now) = token.lock() else { return };
                loop {
                    while *now < end && *now % threads as u64 != own {
                        let Ok(woken) = moved.wait(now) else { return };
                        now = woken;
                    }
                    if *now >= end {
                        return;
                    }
                    *now += 1;
                    moved.notify_all();
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().ok().context("a thread panicked")?;
    }
    let now = turn.0.lock().map(|now| *now).unwrap_or_default();
    ensure!(
        now == end,
        "the token was handed on {now} times instead of {end}"
    );
    Ok(())
}

static ALARMS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    ALARMS.fetch_add(1, Ordering::Relaxed);
}

/// An interval timer's signals during a computation whose result is known.
fn count_alarms(wanted: u64) -> Result<u64> {
    let handler: extern "C" fn(libc::c_int) = count;
    let millisecond = libc::timeval {
        tv_sec: 0,
        tv_usec: 1000,
    };
    let interval = libc::itimerval {
        it_interval: millisecond,
        it_value: millisecond,
    };
    // SAFETY: the handler only counts; the structure is whole.
    let set = unsafe {
        libc::signal(libc::SIGALRM, handler as *const () as libc::sighandler_t);
        libc::setitimer(libc::ITIMER_REAL, &raw const interval, std::ptr::null_mut())
    };
    ensure!(set == 0, "setitimer: {}", std::io::Error::last_os_error());
    let began = Instant::now();
    while ALARMS.load(Ordering::Relaxed) < wanted {
        let sum: f64 = (1..=10_000).map(f64::from).sum();
        ensure!((sum - 50_005_000.0).abs() < 0.5, "a sum became {sum}");
        if began.elapsed() > Duration::from_secs(60) {
            bail!(
                "only {} signals in a minute",
                ALARMS.load(Ordering::Relaxed)
            );
        }
    }
    // SAFETY: as above; zero stops the timer.
    unsafe {
        let never: libc::itimerval = std::mem::zeroed();
        libc::setitimer(libc::ITIMER_REAL, &raw const never, std::ptr::null_mut());
    }
    Ok(ALARMS.load(Ordering::Relaxed))
}
