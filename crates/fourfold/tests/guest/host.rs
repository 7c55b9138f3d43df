//! What the tests use: the command, the guest's programs, disk images, and tools that the host may
//! lack.

use std::{
    env, fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Seconds after which a machine is stopped; others may use the host's processors, too.
const TIMEOUT: &str = "900";

/// `fourfold run ARGS` on `user`, with a cache of the tests' own.
pub(crate) fn run(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.args(["run", "--accel", "user"]).args(args);
    if !args.contains(&"--timeout") {
        command.args(["--timeout", TIMEOUT]);
    }
    command
        .env("XDG_CACHE_HOME", scratch().join("cache"))
        .stdin(Stdio::null());
    command
}

/// The output of a machine; `None` where there is no kernel to boot.
pub(crate) fn output(args: &[&str]) -> Option<Output> {
    let output = run(args).output().expect("the command starts");
    let errors = text(&output.stderr);
    if errors.contains("fetching the default guest:") || errors.contains("lists have no") {
        assert!(env::var_os("REQUIRE_GUEST").is_none(), "{errors}");
        eprintln!("skipped, there is no kernel to boot: {errors}");
        return None;
    }
    Some(output)
}

/// What a command in the guest prints; the test fails where it does.
pub(crate) fn in_guest(options: &[&str], command: &str) -> Option<String> {
    let mut args = vec!["--exec", command];
    args.extend(options);
    let output = output(&args)?;
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success(),
        "{command}: {}\n{out}{errors}",
        output.status
    );
    println!("{out}");
    Some(out)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A directory that lives as long as the build's.
pub(crate) fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The guest's programs, statically linked, as an option of `run`.
pub(crate) fn programs() -> String {
    static BUILDING: Mutex<()> = Mutex::new(());
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = scratch().join("guest-programs");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked", "--release"])
        .args(["--package", "guest", "--target", TARGET, "--target-dir"])
        .arg(&directory)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .expect("cargo starts");
    assert!(status.success(), "building the guest's programs: {status}");
    let program = directory.join(TARGET).join("release/guest");
    program.to_str().expect("a path in UTF-8").to_owned()
}

/// A file of the test's own, gone after it.
pub(crate) struct Image(PathBuf);

impl Image {
    /// Zeroes.
    pub(crate) fn new(name: &str, mib: u64) -> Self {
        let path = scratch().join(format!("{name}-{}.img", std::process::id()));
        let file = fs::File::create(&path).unwrap();
        file.set_len(mib << 20).unwrap();
        Self(path)
    }

    /// With an empty ext4; `None` where the host has no `mkfs.ext4`.
    pub(crate) fn ext4(name: &str, mib: u64) -> Option<Self> {
        let image = Self::new(name, mib);
        let mut make = tool("mkfs.ext4")?;
        let made = make.args(["-q", "-F"]).arg(&image.0).status().unwrap();
        assert!(made.success(), "mkfs.ext4: {made}");
        Some(image)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// Fails where `e2fsck` finds anything to repair.
    pub(crate) fn assert_clean(&self) {
        let Some(mut check) = tool("e2fsck") else {
            return;
        };
        let output = check.args(["-f", "-n"]).arg(&self.0).output().unwrap();
        let said = text(&output.stdout);
        assert!(output.status.success(), "e2fsck: {}\n{said}", output.status);
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A program of the host's, or `None`, with the reason printed.
pub(crate) fn tool(name: &str) -> Option<Command> {
    let path = env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/sbin"]);
    let found = places
        .map(|place| Path::new(place).join(name))
        .find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: the host has no {name}");
    }
    found.map(Command::new)
}

/// A running process; killed when the test ends before it does.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads until `enough` says so, or the end; panics after `limit`.
pub(crate) fn read_until(
    from: &mut impl Read,
    limit: Duration,
    mut enough: impl FnMut(&str) -> bool,
) -> String {
    let began = Instant::now();
    let (mut all, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let len = from.read(&mut part).expect("output can be read");
        all.extend(&part[..len]);
        let seen = text(&all);
        if len == 0 || enough(&seen) {
            return seen;
        }
        assert!(
            began.elapsed() < limit,
            "after {limit:?} there was only: {seen}"
        );
    }
}
