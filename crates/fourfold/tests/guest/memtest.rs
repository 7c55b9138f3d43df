//! memtest86+ (Debian's package `memtest86+`), unmodified, by its serial console.

use std::{env, path::Path, process::Stdio, time::Duration};

use crate::host::{Running, read_until, run};

const PROGRAM: &str = "/boot/memtest86+x64.bin";
/// The tests before the one that waits: it begins at 94 % of a pass.
const LAST_TEST: &str = "#10 [Bit fade";
/// A pass waits for 160 s of its own. On a busy host it takes its clock for faster than it is, when it
/// measures it at first, and waits for longer.
const LIMIT: Duration = Duration::from_secs(800);

/// All that it draws on its screen until it shows `until`.
fn screens(options: &[&str], until: &str) -> Option<String> {
    if !Path::new(PROGRAM).is_file() {
        assert!(env::var_os("REQUIRE_GUEST").is_none(), "no {PROGRAM}");
        eprintln!("skipped: the host has no {PROGRAM} (Debian's package memtest86+)");
        return None;
    }
    let mut args = vec!["--kernel", PROGRAM];
    args.extend(options);
    let mut command = run(&args);
    let mut child = Running(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut out = child.0.stdout.take().unwrap();
    Some(read_until(&mut out, LIMIT, |seen| seen.contains(until)))
}

/// The numbers behind a word, as often as they are shown.
fn numbers<'a>(screens: &'a str, word: &'a str) -> impl Iterator<Item = u64> + 'a {
    screens.split(word).skip(1).filter_map(|rest| {
        let digits: String = rest
            .trim_start()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().ok()
    })
}

fn assert_no_error(screens: &str) {
    assert!(numbers(screens, "Errors:").count() > 0, "{screens}");
    assert_eq!(numbers(screens, "Errors:").max(), Some(0), "{screens}");
}

#[test]
fn its_first_tests_find_no_error() {
    let options = ["--memory", "16M", "--append", "console=ttyS0,115200"];
    if let Some(screens) = screens(&options, "#10 [") {
        assert_no_error(&screens);
    }
}

#[test]
#[ignore = "minutes: cargo xtask guest-tests"]
fn a_pass_on_one_and_on_two_cpus_finds_no_error() {
    for (cpus, append) in [
        ("1", "console=ttyS0,115200"),
        ("2", "console=ttyS0,115200 smp"),
    ] {
        let options = ["--memory", "64M", "--cpus", cpus, "--append", append];
        let Some(screens) = screens(&options, "Pass:  1") else {
            return;
        };
        assert_no_error(&screens);
        assert!(screens.contains(LAST_TEST), "{screens}");
        assert!(screens.contains(&format!("CPU: {cpus} Cores")), "{screens}");
    }
}
