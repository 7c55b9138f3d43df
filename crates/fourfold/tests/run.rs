//! The command as a user has it: guests that boot, and every way to be refused.

#[path = "../../vmm/tests/common/kernel.rs"]
#[allow(dead_code, reason = "written for another test")]
mod kernel;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

/// `fourfold ARGS`, with a cache of the tests' own.
fn fourfold(args: &[&str]) -> Output {
    command(args).output().expect("the command starts")
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.args(args).env(
        "XDG_CACHE_HOME",
        Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"),
    );
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `command` in a guest on `user`; `None` where the host can't fetch a kernel.
fn in_guest(options: &[&str], command: &str) -> Option<Output> {
    let mut args = vec![
        "run",
        "--accel",
        "user",
        "--timeout",
        "100",
        "--exec",
        command,
    ];
    args.extend(options);
    let output = fourfold(&args);
    let errors = text(&output.stderr);
    if errors.contains("fetching the default guest:") {
        assert!(std::env::var_os("REQUIRE_GUEST").is_none(), "{errors}");
        eprintln!("skipped, there is no kernel to boot: {errors}");
        return None;
    }
    Some(output)
}

struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::write(&path, bytes).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// One boot: two vCPUs, a disk that is written, output, errors and an exit code.
#[test]
fn debians_kernel_boots_and_runs_a_command() {
    let disk = TempFile::new("disk.img", &vec![0; 64 << 10]);
    let command = "uname -s; nproc; seq 1 2000 | md5sum; \
        echo 'on the disk' | dd of=/dev/vda bs=512 seek=5 conv=notrunc 2>/dev/null; sync; \
        dd if=/dev/hwrng bs=32 count=1 2>/dev/null | wc -c; echo on the console >/dev/hvc0; echo oops >&2; exit 7";
    let console = TempFile::new("console", b"");
    let target = format!("file:{}", console.path());
    let mut options = vec!["--cpus", "2", "--memory", "256M", "--disk", disk.path()];
    options.extend(["--virtio-console", &target]);
    let Some(output) = in_guest(&options, command) else {
        return;
    };
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{errors}");
    let expected = "Linux\n2\nea4d0a24dabcaa11f9aa979b872d162b  -\n32\n";
    assert_eq!(text(&output.stdout), expected, "{errors}");
    assert!(errors.ends_with("oops\n"), "{errors}");
    assert_eq!(fs::read(&console.0).unwrap(), b"on the console\r\n");
    assert!(fs::read(&disk.0).unwrap()[5 * 512..].starts_with(b"on the disk"));
}

#[test]
fn a_refusal_says_what_where_and_why() {
    let odd = TempFile::new("odd.img", &[0; 700]);
    let config = TempFile::new("broken.toml", b"cpus = \"many\"");
    let kernel = TempFile::new("kernel", b"this is no kernel");
    for (args, code, expected) in [
        (&["run", "--kernel", "/no/such"][..], 1, "/no/such"),
        (
            &["run", "--kernel", kernel.path()],
            1,
            "neither a bzImage nor",
        ),
        (
            &["run", "--kernel", kernel.path(), "--disk", odd.path()],
            1,
            "700 bytes",
        ),
        (&["run", "--config", config.path()], 1, "cpus"),
        (&["run", "--memory", "lots"], 1, "--memory lots"),
        (&["run", "--serial", "tcp"], 1, "file:PATH"),
        (&["run", "--exec", "true", "--initrd", "x"], 125, "--initrd"),
        (
            &["run", "--cpus", "0", "--kernel", kernel.path()],
            1,
            "0 vCPUs",
        ),
        (&["run", "--no-such-option"], 2, "--no-such-option"),
    ] {
        let output = fourfold(args);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        assert!(errors.contains(expected), "{args:?}: {errors}");
    }
}

/// A guest that goes on for ever is stopped, and the exit code says so.
#[test]
fn time_is_over() {
    let spins = TempFile::new("spins", &kernel::elf(&[0xeb, 0xfe]));
    let kernel = ["--serial", "none", "--kernel", spins.path()];
    let mut args = vec!["run", "--accel", "user", "--timeout", "1"];
    args.extend(kernel);
    let output = fourfold(&args);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(124), "{errors}");
    assert!(errors.contains("--timeout"), "{errors}");
}

/// A KVM that would take half an hour is refused before anything is fetched or booted.
#[test]
fn a_software_kvm_is_refused_and_a_real_one_boots() {
    let began = Instant::now();
    let output = fourfold(&["run", "--accel", "kvm", "--exec", "true"]);
    let errors = text(&output.stderr);
    match output.status.code() {
        Some(0) => {}
        Some(3) => {
            assert!(errors.contains("/dev/kvm"), "{errors}");
            let took = began.elapsed();
            assert!(took < Duration::from_secs(20), "{took:?}: {errors}");
        }
        Some(125) if errors.contains("fetching the default guest:") => {}
        other => panic!("{other:?}: {errors}"),
    }
}

#[test]
fn doctor_completions_and_manual_are_there() {
    let doctor = fourfold(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert!(report["findings"].as_array().unwrap().len() >= 8);
    assert_eq!(report["accelerator"].is_string(), doctor.status.success());
    let completions = fourfold(&["completions", "bash"]);
    assert!(text(&completions.stdout).contains("_fourfold"));
    let manual = fourfold(&["man"]);
    assert!(text(&manual.stdout).contains(".TH fourfold"));
}
