//! Many boots, boots with the translator's debug mode, and what the monitor costs the host.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::host::{Running, in_guest, output, read_until, run, text};

#[test]
#[ignore = "minutes: cargo xtask guest-tests"]
fn a_hundred_boots_in_a_row() {
    let args = [
        "--boots", "100", "--cpus", "2", "--memory", "128M", "--exec", "nproc",
    ];
    let Some(output) = output(&args) else { return };
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(text(&output.stdout), "2\n".repeat(100));
    assert!(errors.contains("100 boots ended well"), "{errors}");
}

/// The time that the user gives is one for all lives of a machine that resets itself.
#[test]
#[ignore = "seconds: cargo xtask guest-tests"]
fn a_machine_that_resets_itself_for_ever_is_stopped() {
    let args = ["--timeout", "10", "--append", "panic=-1 rdinit=/none"];
    let begin = Instant::now();
    let Some(output) = output(&args) else { return };
    let lives = text(&output.stdout).matches("Linux version").count();
    assert!(lives > 1, "{lives} lives");
    assert!(begin.elapsed() < Duration::from_secs(60));
}

#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn a_boot_with_one_instruction_for_each_block() {
    let out = in_guest(&["--debug", "one-instruction"], "uname -s");
    assert!(out.is_none_or(|out| out == "Linux\n"));
}

/// The monitor's memory beside the guest's: everything that is resident (what is mapped twice or
/// shared counts in proportion) but the mapping of the guest's RAM.
fn memory_beside_the_guest(cpus: &str) -> Option<u64> {
    const RAM_KIB: u64 = 384 << 10;
    output(&["--exec", "true"])?;
    // Work for all vCPUs: each has its own code cache.
    let command = "for i in $(seq $(nproc)); do seq 1 100000 | md5sum & done; wait; \
        echo ready; sleep 60";
    let args = ["--memory", "384M", "--cpus", cpus, "--exec", command];
    let mut child = Running(run(&args).stdout(Stdio::piped()).spawn().unwrap());
    let mut out = child.0.stdout.take().unwrap();
    read_until(&mut out, Duration::from_secs(180), |seen| {
        seen.contains("ready")
    });
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.0.id())).unwrap();
    let value = |line: &str, key: &str| -> Option<u64> {
        let rest = line.strip_prefix(key)?;
        rest.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    let (mut size, mut own, mut guest) = (0, 0, 0);
    for line in smaps.lines() {
        if let Some(kib) = value(line, "Size:") {
            size = kib;
        } else if let Some(kib) = value(line, "Pss:") {
            *(if size == RAM_KIB {
                &mut guest
            } else {
                &mut own
            }) += kib;
        }
    }
    println!(
        "{cpus} vCPUs: guest RAM {} MiB resident, all else {} MiB",
        guest >> 10,
        own >> 10
    );
    assert!(
        guest > 10 << 10,
        "the guest's RAM was not found in\n{smaps}"
    );
    Some(own)
}

/// Each vCPU has a code cache of its own, so what one takes is what each further one may take.
#[test]
fn the_monitor_is_small_beside_its_guest() {
    for (cpus, most) in [("1", 64 << 10), ("2", 96 << 10), ("4", 144 << 10)] {
        if let Some(own) = memory_beside_the_guest(cpus) {
            assert!(own <= most, "{cpus} vCPUs: {own} KiB beside the guest");
        }
    }
}
