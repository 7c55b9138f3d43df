//! `--stats`: how often each call was made and how long it took, what `KVM_RUN` came back for, and the
//! faults and TLB fills of all vCPUs (of ours; the kernel keeps its own with the VM), when the program
//! ends.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use kvm::signals::Call;

use crate::trace::{exits, name};

#[derive(Clone, Copy, Default)]
struct Sum {
    calls: u64,
    time: Duration,
}

static SUMS: Mutex<BTreeMap<u32, Sum>> = Mutex::new(BTreeMap::new());
/// Exits of `KVM_RUN` by their numbers.
static EXITS: Mutex<BTreeMap<u32, u64>> = Mutex::new(BTreeMap::new());
static AT_EXIT: Once = Once::new();

/// Counts one call.
pub(crate) fn count(request: u32, took: Duration) {
    AT_EXIT.call_once(|| {
        // SAFETY: a function without arguments that does not unwind.
        unsafe { libc::atexit(print) };
    });
    let mut sums = SUMS.lock().unwrap_or_else(PoisonError::into_inner);
    let sum = sums.entry(request).or_default();
    sum.calls += 1;
    sum.time += took;
}

/// Counts one exit.
pub(crate) fn count_exit(reason: u32) {
    let mut exits = EXITS.lock().unwrap_or_else(PoisonError::into_inner);
    *exits.entry(reason).or_default() += 1;
}

/// What vCPUs of ours met on the way from guest addresses to host ones.
fn print_translations(text: &mut String) {
    for (name, count) in kvm::totals().into_iter().filter(|(_, count)| *count > 0) {
        // Writing to a String can't fail.
        let _ = writeln!(text, "{name:<36} {count:>12}");
    }
}

fn print_exits(text: &mut String) {
    let exits = EXITS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rows: Vec<_> = exits.iter().collect();
    rows.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    for (reason, count) in rows {
        // Writing to a String can't fail.
        let _ = writeln!(text, "{:<36} {count:>12}", exits::name(*reason));
    }
}

extern "C" fn print() {
    let _call = Call::enter();
    let sums = SUMS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rows: Vec<_> = sums.iter().collect();
    rows.sort_by_key(|(_, sum)| std::cmp::Reverse(sum.time));
    let mut text = format!(
        "{:<36} {:>12} {:>14} {:>12}\n",
        "call", "times", "total ms", "mean us"
    );
    for (request, sum) in rows {
        let total = sum.time.as_secs_f64();
        let mean = sum.time.as_nanos() / u128::from(sum.calls.max(1));
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "{:<36} {:>12} {:>14.3} {:>9}.{:03}",
            name(*request),
            sum.calls,
            total * 1e3,
            mean / 1000,
            mean % 1000
        );
    }
    print_exits(&mut text);
    print_translations(&mut text);
    // Nobody to tell where it fails.
    let _ = std::io::stderr().write_all(text.as_bytes());
}
