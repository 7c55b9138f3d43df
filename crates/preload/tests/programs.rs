//! Small C programs that know nothing of this library, run with it: what they see must be what the
//! kernel's `/dev/kvm` would show them.
//!
//! Each program in `tests/programs` checks one thing, says on standard error what was wrong, and
//! ends with 0 if nothing was. They are skipped, with the reason printed, where there is no C
//! compiler.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, Mutex, PoisonError};

/// The library; cargo builds none for tests by itself.
fn library() -> PathBuf {
    static LIBRARY: LazyLock<PathBuf> = LazyLock::new(|| {
        let build = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", "preload"])
            .output()
            .unwrap();
        let messages = String::from_utf8_lossy(&build.stderr);
        assert!(build.status.success(), "building the library:\n{messages}");
        let test = std::env::current_exe().unwrap();
        let folder = test.ancestors().nth(2).unwrap();
        folder.join("libfourfold_preload.so")
    });
    LIBRARY.clone()
}

/// The program, built; `None` where there is no compiler. Several tests run the same one: it is
/// written once, because none may be written while it runs.
fn build(name: &str) -> Option<PathBuf> {
    static BUILT: Mutex<BTreeMap<String, Option<PathBuf>>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let known = built.entry(name.to_owned());
    known.or_insert_with(|| compile(name)).clone()
}

fn compile(name: &str) -> Option<PathBuf> {
    compile_with(name, &[])
}

fn compile_with(name: &str, flags: &[&str]) -> Option<PathBuf> {
    if Command::new("cc").arg("--version").output().is_err() {
        println!("SKIPPED: {name}: no C compiler (cc)");
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/programs/{name}.c"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let output = Command::new("cc")
        .args(["-O1", "-Wall", "-pthread"])
        .args(flags)
        .arg("-o")
        .args([&program, &source])
        .arg("-ldl")
        .output()
        .unwrap();
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "building {name}:\n{messages}");
    Some(program)
}

/// Runs it with the library and these options of `fourfold exec`.
fn run(name: &str, options: &str) -> Option<Output> {
    run_with(name, options, library().into_os_string())
}

fn run_with(name: &str, options: &str, libraries: OsString) -> Option<Output> {
    let output = Command::new("timeout")
        .arg("30")
        .arg(build(name)?)
        .env("LD_PRELOAD", libraries)
        .env("FOURFOLD_EXEC", options)
        .output()
        .unwrap();
    Some(output)
}

fn passes_with(name: &str, options: &str) -> String {
    let Some(output) = run(name, options) else {
        return String::new();
    };
    succeeded(name, &output)
}

fn succeeded(name: &str, output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{name}: {}:\n{errors}",
        output.status
    );
    errors
}

fn passes(name: &str) {
    passes_with(name, "");
}

#[test]
fn every_way_to_open() {
    passes("opens");
}

#[test]
fn descriptors_live_as_files_do() {
    passes("descriptors");
}

#[test]
fn children_of_fork_vfork_and_exec() {
    passes("children");
}

#[test]
fn a_handler_finds_kvm_at_rest() {
    passes("handlers");
}

#[test]
fn an_allocator_that_makes_system_calls() {
    let Some(early) = compile_with("early", &["-shared", "-fPIC"]) else {
        return;
    };
    // What is loaded later is initialised earlier.
    let mut libraries = library().into_os_string();
    libraries.push(":");
    libraries.push(early);
    let output = run_with("allocator", "paging=nested", libraries);
    succeeded("allocator", &output.unwrap());
}

#[test]
fn memory_that_changes_under_a_running_vcpu() {
    passes("memory");
}

#[test]
fn memory_that_the_program_can_not_reach() {
    passes("protected");
}

#[test]
fn a_library_that_is_loaded_later() {
    passes("loaded");
}

#[test]
fn a_filter_that_lets_the_engine_work_is_installed() {
    passes_with("seccomp", "");
}

#[test]
fn a_filter_that_would_end_the_engine_is_refused_and_said() {
    let Some(output) = run("seccomp_deadly", "") else {
        return;
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(13), "{errors}");
    assert!(
        errors.contains("seccomp filter forbids") && errors.contains("futex"),
        "{errors}"
    );
    assert!(errors.contains("--ignore-seccomp"), "{errors}");
}

#[test]
fn a_filter_is_left_out_only_where_asked_and_not_in_silence() {
    let errors = passes_with("seccomp_deadly", "ignore-seccomp");
    assert!(errors.is_empty() || errors.contains("left out"), "{errors}");
}

#[test]
fn the_trace_decodes_calls_and_exits() {
    let Some(output) = run("handlers", "trace,stats") else {
        return;
    };
    let trace = String::from_utf8_lossy(&output.stderr);
    shows_calls_and_exits(&trace);
    // What became of the guest's addresses: TLB fills, and faults that installed an entry.
    for counter in ["tlb_fill  ", "pf_taken  ", "pf_fixed  "] {
        assert!(trace.contains(counter), "no {counter} in:\n{trace}");
    }
}

#[test]
fn the_kernels_own_kvm_is_traced_the_same_way() {
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        assert!(
            std::env::var_os("REQUIRE_KVM").is_none(),
            "/dev/kvm: {error}"
        );
        println!("SKIPPED: trace of the kernel's KVM: /dev/kvm: {error}");
        return;
    }
    if let Some(output) = run("handlers", "accel=kvm,trace,stats") {
        let trace = String::from_utf8_lossy(&output.stderr);
        shows_calls_and_exits(&trace);
        assert!(!trace.contains("tlb_fill"), "no vCPU of ours ran");
    }
}

fn shows_calls_and_exits(trace: &str) {
    for part in [
        "KVM_CREATE_VM, 0) = ",
        "KVM_SET_USER_MEMORY_REGION, {slot 0x0",
        "KVM_SET_SREGS, {cr0",
        "KVM_RUN, 0) = 0 KVM_EXIT_IO {out, port 0x",
        "KVM_RUN, 0) = -1 Interrupted system call",
        "KVM_EXIT_IO ",
    ] {
        assert!(trace.contains(part), "no {part} in:\n{trace}");
    }
}
