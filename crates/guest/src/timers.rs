//! Timers and clocks: sleeps that are neither short nor much too long, periodic timers that lose
//! nothing, a clock that goes forward on all CPUs at once.

#![expect(unsafe_code, reason = "timer descriptors are libc's")]

use std::{
    fs::File,
    io::Read,
    os::fd::FromRawFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};

use crate::cpus;

pub(crate) fn run() -> Result<()> {
    let late = sleeps()?;
    let ticks = periodic()?;
    let readings = clocks_agree()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    println!(
        "timers: half of the sleeps at most {} us late, {ticks} ticks, {readings} readings in \
         order, epoch {now}",
        late.as_micros()
    );
    Ok(())
}

/// The median of how much too late sleeps end. None may end early; the host may be busy, so single
/// ones may be very late.
fn sleeps() -> Result<Duration> {
    const TOLERANCE: Duration = Duration::from_millis(20);
    let mut late = Vec::new();
    for milliseconds in (1..=20).chain([50, 100, 300]) {
        let asked = Duration::from_millis(milliseconds);
        let began = Instant::now();
        thread::sleep(asked);
        let over = began.elapsed().checked_sub(asked);
        late.push(over.with_context(|| format!("a sleep of {asked:?} ended early"))?);
    }
    late.sort_unstable();
    let median = late[late.len() / 2];
    ensure!(
        median < TOLERANCE,
        "half of the sleeps are more than {median:?} late"
    );
    Ok(median)
}

/// A timer of 5 ms for half a second: the ticks that the descriptor counts, and the clock, agree.
fn periodic() -> Result<u64> {
    const PERIOD: Duration = Duration::from_millis(5);
    let period = libc::timespec {
        tv_sec: 0,
        tv_nsec: i64::from(PERIOD.subsec_nanos()),
    };
    let spec = libc::itimerspec {
        it_interval: period,
        it_value: period,
    };
    // SAFETY: a new descriptor, owned by the file from here on; the structure is whole.
    let mut timer = unsafe {
        let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC);
        ensure!(
            fd >= 0,
            "timerfd_create: {}",
            std::io::Error::last_os_error()
        );
        let file = File::from_raw_fd(fd);
        let set = libc::timerfd_settime(fd, 0, &raw const spec, std::ptr::null_mut());
        ensure!(
            set == 0,
            "timerfd_settime: {}",
            std::io::Error::last_os_error()
        );
        file
    };
    let began = Instant::now();
    let mut ticks = 0;
    while began.elapsed() < Duration::from_millis(500) {
        let mut count = [0; 8];
        timer.read_exact(&mut count)?;
        ticks += u64::from_ne_bytes(count);
    }
    let expected = (began.elapsed().as_nanos() / PERIOD.as_nanos()) as u64;
    ensure!(
        ticks.abs_diff(expected) <= 2,
        "{ticks} ticks of a timer that has run {expected} periods"
    );
    Ok(ticks)
}

/// All CPUs read the clock and put what they read into one place, where it may only grow.
fn clocks_agree() -> Result<u64> {
    let began = Instant::now();
    let latest = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..cpus())
        .map(|_| {
            let latest = latest.clone();
            thread::spawn(move || -> Result<u64> {
                let mut readings = 0;
                while began.elapsed() < Duration::from_millis(500) {
                    let before = latest.load(Ordering::SeqCst);
                    let now = began.elapsed().as_nanos() as u64;
                    ensure!(
                        now >= before,
                        "a CPU reads {now}, {before} had been read before"
                    );
                    latest.fetch_max(now, Ordering::SeqCst);
                    readings += 1;
                }
                Ok(readings)
            })
        })
        .collect();
    let mut readings = 0;
    for worker in workers {
        readings += worker.join().ok().context("a thread panicked")??;
    }
    Ok(readings)
}
