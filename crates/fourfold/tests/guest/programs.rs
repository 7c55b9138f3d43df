//! Programs that strain one part of the machine each, and check the results themselves.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::host::{Image, in_guest, programs};

/// All of them for a short time.
#[test]
fn every_part_of_the_machine_holds_for_a_short_time() {
    let program = programs();
    let command = "./guest memory 40 && ./guest processes 5 && ./guest files 8 && \
        ./guest registers 200 && ./guest timers";
    let options = ["--file", &program, "--cpus", "2", "--memory", "192M"];
    let Some(out) = in_guest(&options, command) else {
        return;
    };
    assert_eq!(out.lines().count(), 5, "{out}");
    let epoch: u64 = out.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(
        now.as_secs().abs_diff(epoch) < 20,
        "the guest's clock says {epoch}, the host's {now:?}"
    );
}

fn strain(command: &str, options: &[&str]) {
    let program = programs();
    for paging in ["nested", "shadow", "direct"] {
        let mut options = options.to_vec();
        options.extend(["--file", &program, "--paging", paging]);
        in_guest(&options, command);
    }
}

#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn memory_holds_random_patterns() {
    strain("./guest memory 85", &["--cpus", "4", "--memory", "1G"]);
}

#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn processes_threads_and_signals() {
    strain("./guest processes 200", &["--cpus", "4"]);
}

#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn files_and_the_page_cache() {
    strain("./guest files 128", &["--cpus", "2"]);
}

#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn registers_across_context_switches() {
    strain("./guest registers 5000", &["--cpus", "4"]);
}

#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn timers_and_clocks() {
    strain(
        "./guest timers && ./guest timers && ./guest timers",
        &["--cpus", "4"],
    );
}

/// More memory is used than there is: the rest is on the disk.
#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn memory_that_is_swapped_out_comes_back() {
    let swap = Image::new("swap", 512);
    let program = programs();
    let command = "mkswap /dev/vda >/dev/null && swapon /dev/vda && ./guest memory 180 && \
        awk '$1 == \"pswpin\" { print $2 }' /proc/vmstat";
    let options = [
        "--file",
        &program,
        "--memory",
        "160M",
        "--disk",
        swap.path(),
    ];
    let Some(out) = in_guest(&options, command) else {
        return;
    };
    let swapped_in: u64 = out.lines().last().unwrap().parse().unwrap();
    assert!(swapped_in > 1000, "{swapped_in} pages were swapped in");
}
