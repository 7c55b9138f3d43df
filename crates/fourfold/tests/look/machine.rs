//! A machine that runs in a process of its own, with a folder of sockets of its own.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Output, Stdio},
    time::{Duration, Instant},
};

use control::{Client, Directory, ExplainQuery, MemoryQuery, Status};
use explain::Chain;

fn command(args: &[&str], runtime: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    command
        .args(args)
        .env("XDG_CACHE_HOME", cache)
        .env("XDG_RUNTIME_DIR", runtime);
    command
}

/// Runs `fourfold ARGS` to its end.
pub(crate) fn fourfold(args: &[&str], runtime: &Path) -> Output {
    command(args, runtime).output().expect("the command starts")
}

/// A machine.
pub(crate) struct Running {
    child: Child,
    output: BufReader<ChildStdout>,
    runtime: PathBuf,
    socket: PathBuf,
    pub(crate) client: Client,
}

impl Running {
    /// Runs a command in a guest; `None` where the host can't fetch a kernel.
    pub(crate) fn start(name: &str, options: &[&str], guest: &str) -> Option<Self> {
        let mut args = vec!["--accel", "user"];
        args.extend(options);
        args.extend(["--exec", guest]);
        Self::start_with(name, &args)
    }

    /// Runs a kernel that needs nothing else, as the machine `count-ACCELERATOR`.
    pub(crate) fn start_kernel(accelerator: &str, kernel: &Path) -> Self {
        let name = format!("count-{accelerator}");
        let kernel = kernel.to_str().unwrap();
        let args = [
            "--accel",
            accelerator,
            "--kernel",
            kernel,
            "--serial",
            "none",
        ];
        Self::start_with(&name, &args).expect("nothing is to be fetched")
    }

    fn start_with(name: &str, options: &[&str]) -> Option<Self> {
        // Socket paths are short.
        let runtime = std::env::temp_dir().join(format!("ff-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&runtime);
        fs::create_dir_all(&runtime).unwrap();
        let mut args = vec!["run", "--timeout", "120", "--name", name];
        args.extend(options);
        let mut child = command(&args, &runtime)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let directory = Directory::at(runtime.join("fourfold")).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(socket) = directory.find(name)
                && let Ok(client) = Client::new(&socket)
                && let Ok(status) = client.get::<Status>("/status", &())
                && status.state != control::State::Starting
            {
                let output = BufReader::new(child.stdout.take().unwrap());
                return Some(Self {
                    child,
                    output,
                    runtime,
                    socket,
                    client,
                });
            }
            if child.try_wait().unwrap().is_some() || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        let mut errors = String::new();
        let _ = child.stderr.take().unwrap().read_to_string(&mut errors);
        assert!(
            errors.contains("fetching the default guest:")
                && std::env::var_os("REQUIRE_GUEST").is_none(),
            "{errors}"
        );
        eprintln!("skipped, there is no kernel to boot: {errors}");
        None
    }

    /// The folder for sockets and files.
    pub(crate) fn folder(&self) -> &Path {
        &self.runtime
    }

    /// The next line that the guest's command writes.
    pub(crate) fn line(&mut self) -> String {
        // A line is passed on when something follows it, for it might be the end's: the guest
        // writes an empty one behind each.
        loop {
            let mut line = String::new();
            let bytes = self.output.read_line(&mut line).unwrap();
            let line = line.trim_end();
            if bytes == 0 || !line.is_empty() {
                return line.to_owned();
            }
        }
    }

    /// Waits for its end; the exit code.
    pub(crate) fn end(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// Asks `/explain`.
    pub(crate) fn explain(&self, query: &ExplainQuery) -> Chain {
        self.client.get("/explain", query).unwrap()
    }

    /// Bytes of the guest's memory.
    pub(crate) fn memory(&self, address: &str, bytes: u64) -> Vec<u8> {
        let query = MemoryQuery {
            address: address.to_owned(),
            bytes,
            vcpu: None,
        };
        self.client.get_bytes("/memory", &query).unwrap()
    }

    /// Runs `fourfold ARGS`, which must succeed; its standard output.
    pub(crate) fn fourfold(&self, args: &[&str]) -> String {
        let output = fourfold(args, &self.runtime);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a line of shell, with our command in the path; it must succeed.
    pub(crate) fn shell(&self, line: &str, variables: &[(&str, &str)]) {
        let folder = Path::new(env!("CARGO_BIN_EXE_fourfold")).parent().unwrap();
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        let output = Command::new("sh")
            .args(["-c", line])
            .current_dir(&self.runtime)
            .env("PATH", path)
            .env("XDG_RUNTIME_DIR", &self.runtime)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "`{line}`: {errors}");
    }

    /// Sends what no client would, and finds the server unharmed.
    pub(crate) fn hostile(&self) {
        let long = vec![b'a'; 1 << 20];
        let requests: [&[u8]; 7] = [
            b"\0\0\0\0\r\n\r\n",
            b"GET /status HTTP/9.9\r\n\r\n",
            b"GET /explain?address=%ff%00%zz HTTP/1.1\r\nhost: x\r\n\r\n",
            b"POST /status HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            b"POST /pause HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
            &long,
        ];
        for request in requests {
            let mut stream = UnixStream::connect(&self.socket).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            // The server may hang up in the middle.
            let _ = stream.write_all(request);
            let mut answer = Vec::new();
            let _ = stream.take(1 << 16).read_to_end(&mut answer);
            let answer = String::from_utf8_lossy(&answer).into_owned();
            assert!(
                answer.is_empty() || answer.starts_with("HTTP/1."),
                "{answer}"
            );
        }
        // More connections than are served at a time, which say nothing.
        let idle: Vec<_> = (0..20).map(|_| UnixStream::connect(&self.socket)).collect();
        let _: control::StateAnswer = self.client.post("/resume").unwrap();
        drop(idle);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.runtime);
    }
}

/// A disk that holds a program for the guest, and the step that it may take.
pub(crate) struct ProgramDisk {
    path: PathBuf,
    file: File,
}

/// The program of `guest.c`; `None` where the host has no C compiler for static programs.
pub(crate) fn program_disk() -> Option<ProgramDisk> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = folder.join("look-guest");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/look/guest.c");
    let built = Command::new("cc")
        .args(["-O1", "-static", "-o"])
        .args([&program, &source])
        .output();
    match built {
        Ok(output) if output.status.success() => {}
        other => {
            eprintln!("skipped, no static C program can be built here: {other:?}");
            return None;
        }
    }
    let mut image = vec![b'0'; 4096];
    image.extend(fs::read(program).unwrap());
    image.resize(image.len().next_multiple_of(4096), 0);
    let path = folder.join("look-guest.img");
    fs::write(&path, image).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    Some(ProgramDisk { path, file })
}

impl ProgramDisk {
    pub(crate) fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Lets the program take its next step.
    pub(crate) fn go_on(&self, step: char) {
        self.file.write_all_at(&[step as u8], 0).unwrap();
    }
}

/// What something took: by the clock, and of processors.
pub(crate) struct Timed {
    pub(crate) elapsed: Duration,
    pub(crate) processor: Duration,
}

impl Running {
    /// Times `work`, which this thread and those of the machine do that run no guest.
    pub(crate) fn timed(&self, work: impl FnOnce(&Self)) -> Timed {
        let used = || used_by_others(self.child.id()) + used_by("/proc/thread-self");
        let (before, started) = (used(), Instant::now());
        work(self);
        let elapsed = started.elapsed();
        Timed {
            elapsed,
            processor: used().saturating_sub(before),
        }
    }
}

/// The processor time of all threads of a process but its vCPUs'.
fn used_by_others(pid: u32) -> Duration {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Duration::ZERO;
    };
    let threads = threads.flatten().map(|thread| thread.path());
    let is_other = |path: &PathBuf| {
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        !name.starts_with("vcpu")
    };
    threads.filter(is_other).map(used_by).sum()
}

/// The first number of `schedstat` (the kernel's `Documentation/scheduler/sched-stats.rst`).
fn used_by(thread: impl AsRef<Path>) -> Duration {
    let text = fs::read_to_string(thread.as_ref().join("schedstat")).unwrap_or_default();
    let used = text.split_whitespace().next().and_then(|n| n.parse().ok());
    Duration::from_nanos(used.unwrap_or(0))
}

/// Some times in words.
pub(crate) fn distribution(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    let limit = Duration::from_millis(5);
    let below = times.iter().filter(|time| **time < limit).count();
    format!(
        "median {:.2?}, 90 % {:.2?}, 99 % {:.2?}, worst {:.2?}; {below} of {} below 5 ms",
        at(50),
        at(90),
        at(99),
        at(100),
        times.len()
    )
}
