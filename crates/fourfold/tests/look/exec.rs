//! A program under `fourfold exec`: found by its process, held inside `KVM_RUN`, explained.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use control::{Client, Directory, MemoryQuery, StateAnswer, Status};
use explain::{Chain, SecondLevel};

use crate::machine::fourfold;

/// The program's counters: guest physical, and by the guest's tables.
const COUNTERS: u64 = 0x2_0000;
const ALIAS: u64 = 0x40_0000_0000;

/// The command with its library beside it: cargo builds none for tests by itself.
fn build_library() {
    let profile = if cfg!(debug_assertions) || env!("CARGO_BIN_EXE_fourfold").contains("/debug/") {
        "dev"
    } else {
        "release"
    };
    let build = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--package", "preload", "--profile"])
        .arg(profile)
        .output()
        .unwrap();
    let messages = String::from_utf8_lossy(&build.stderr);
    assert!(build.status.success(), "building the library:\n{messages}");
}

/// Builds the program once: a file that is being written can't be run.
fn build_program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM.get_or_init(compile_program).as_deref()
}

fn compile_program() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("look-program");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/look/program.c");
    let built = Command::new("cc")
        .args(["-O1", "-pthread", "-o"])
        .args([&program, &source])
        .output();
    match built {
        Ok(output) if output.status.success() => Some(program),
        other => {
            eprintln!("skipped, no C program can be built here: {other:?}");
            None
        }
    }
}

struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    runtime: PathBuf,
}

impl Program {
    fn start(paging: &str, options: &[&str]) -> Option<Self> {
        build_library();
        let program = build_program()?;
        let label = options.first().unwrap_or(&"").trim_start_matches('-');
        let folder = format!("ff-exec-{}-{paging}{label}", std::process::id());
        let runtime = std::env::temp_dir().join(folder);
        let _ = std::fs::remove_dir_all(&runtime);
        std::fs::create_dir_all(&runtime).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_fourfold"))
            .args(["exec", "--paging", paging])
            .args(options)
            .arg("--")
            .arg(program)
            .env("XDG_RUNTIME_DIR", &runtime)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Some(Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
            runtime,
        })
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    fn ask(&self, args: &[&str]) -> String {
        let output = fourfold(args, &self.runtime);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn directory(&self) -> Directory {
        Directory::at(self.runtime.join("fourfold")).unwrap()
    }

    fn client(&self) -> Client {
        let name = self.directory().name_of(self.child.id()).unwrap();
        Client::new(&self.directory().find(&name.unwrap()).unwrap()).unwrap()
    }

    fn counters(client: &Client) -> Vec<u8> {
        let query = MemoryQuery {
            address: format!("gpa:{COUNTERS:#x}"),
            bytes: 16,
            vcpu: None,
        };
        client.get_bytes("/memory", &query).unwrap()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.runtime);
    }
}

fn post(client: &Client, path: &str) -> StateAnswer {
    client.post(path).unwrap()
}

#[test]
fn a_program_under_exec_is_explained_by_its_process() {
    for paging in ["nested", "shadow", "direct"] {
        let Some(mut program) = Program::start(paging, &[]) else {
            return;
        };
        let ready = program.line();
        let hva = ready.strip_prefix("ready 0x").expect("ready");
        let hva = u64::from_str_radix(hva, 16).unwrap() + COUNTERS;
        let pid = program.pid();
        let listed: Vec<Status> = serde_json::from_str(&program.ask(&["ps", "--json"])).unwrap();
        assert_eq!(listed[0].pid.to_string(), pid);
        assert_eq!(
            (listed[0].cpus, listed[0].paging.as_deref()),
            (2, Some(paging))
        );
        let address = format!("gva:{ALIAS:#x}");
        for vcpu in ["0", "1"] {
            let args = ["explain", "--pid", &pid, &address, "--vcpu", vcpu, "--json"];
            let chain: Chain = serde_json::from_str(&program.ask(&args)).unwrap();
            assert_eq!(chain.entries.len(), 4, "{chain}");
            assert_eq!(chain.gpa.unwrap().raw(), COUNTERS, "{chain}");
            assert_eq!(chain.slot.as_ref().unwrap().range.slot, 7);
            assert_eq!(chain.host.as_ref().unwrap().hva.raw(), hva, "{chain}");
            let level = chain.second_level.as_ref().unwrap();
            let path = match level {
                SecondLevel::Nested { .. } => "nested",
                SecondLevel::Shadow { .. } => "shadow",
                SecondLevel::Direct => "direct",
                SecondLevel::Hidden { .. } => "hidden",
            };
            assert_eq!(path, paging);
        }
        let map = program.ask(&["map", "--pid", &pid]);
        assert!(map.contains("slot 7"), "{map}");
        held_and_let_go(&mut program);
        if paging == "nested" {
            let stopped = program.ask(&["stop", "--pid", &pid]);
            assert!(stopped.ends_with(": stopped\n"), "{stopped}");
            program.child.wait().unwrap();
            assert!(program.directory().names().unwrap().is_empty());
        } else {
            program.input.write_all(b"end\n").unwrap();
            assert_eq!(program.child.wait().unwrap().code(), Some(0));
            let folder = program.runtime.join("fourfold");
            let left: Vec<_> = std::fs::read_dir(folder).unwrap().collect();
            assert!(left.is_empty(), "an exit takes the files with it: {left:?}");
        }
    }
}

/// Held vCPUs run nothing; a signal ends `KVM_RUN` all the same.
fn held_and_let_go(program: &mut Program) {
    let client = program.client();
    post(&client, "/pause");
    let before = Program::counters(&client);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(Program::counters(&client), before, "paused");
    program.input.write_all(b"\n").unwrap();
    assert_eq!(program.line(), "EINTR", "a signal reaches a held vCPU");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(Program::counters(&client), before, "still paused");
    post(&client, "/resume");
    let halves = |bytes: &[u8]| (bytes[..8].to_vec(), bytes[8..].to_vec());
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let (now, old) = (halves(&Program::counters(&client)), halves(&before));
        if now.0 != old.0 && now.1 != old.1 {
            break;
        }
        assert!(Instant::now() < deadline, "both vCPUs go on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_private_program_is_not_found() {
    let Some(mut program) = Program::start("nested", &["--private"]) else {
        return;
    };
    assert!(program.line().starts_with("ready"));
    assert!(program.directory().names().unwrap().is_empty());
    let output = fourfold(&["map", "--pid", &program.pid()], &program.runtime);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("runs no machine that can be reached"),
        "{errors}"
    );
}
