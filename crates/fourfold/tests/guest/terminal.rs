//! The console on a real terminal: tmux has it, types, and looks at the screen.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::host::{output, scratch, tool};

/// A tmux server of the test's own with one window.
struct Terminal(String);

impl Terminal {
    /// A shell that runs `command`.
    fn start(name: &str, command: &str) -> Option<Self> {
        tool("tmux")?;
        let terminal = Self(format!("fourfold-{name}-{}", std::process::id()));
        let status = terminal
            .tmux(&[
                "-f",
                "/dev/null",
                "new-session",
                "-d",
                "-x",
                "100",
                "-y",
                "40",
                command,
            ])
            .status()
            .unwrap();
        assert!(status.success(), "tmux: {status}");
        Some(terminal)
    }

    fn tmux(&self, args: &[&str]) -> Command {
        let mut command = Command::new("tmux");
        command.args(["-L", &self.0]).args(args);
        command.env("XDG_CACHE_HOME", scratch().join("cache"));
        command
    }

    fn send(&self, keys: &[&str]) {
        let mut args = vec!["send-keys"];
        args.extend(keys);
        assert!(self.tmux(&args).status().unwrap().success());
    }

    fn screen(&self) -> String {
        let output = self.tmux(&["capture-pane", "-p", "-S", "-2000"]).output();
        String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
    }

    fn wait_for(&self, text: &str) {
        self.wait_for_times(text, 1);
    }

    fn wait_for_times(&self, text: &str, times: usize) {
        let began = Instant::now();
        while self.screen().matches(text).count() < times {
            let waited = began.elapsed();
            assert!(
                waited < Duration::from_secs(180),
                "no {text:?} on\n{}",
                self.screen()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.tmux(&["kill-server"]).status();
    }
}

/// A machine on a terminal. It leaves its process ID in a file; when it has ended, the shell says
/// how, and the terminal's mode.
struct Machine {
    terminal: Terminal,
    pid: PathBuf,
}

impl Machine {
    fn start(name: &str, options: &str) -> Option<Self> {
        output(&["--exec", "true"])?;
        let fourfold = env!("CARGO_BIN_EXE_fourfold");
        let pid = scratch().join(format!("pid-{name}-{}", std::process::id()));
        let run = format!("{fourfold} run --accel user --timeout 600 {options}");
        let command = format!(
            "sh -c 'echo $$ > {}; exec {run}'; echo ended with $?; \
             stty -a | grep -o '.icanon'; sleep 100",
            pid.display()
        );
        let terminal = Terminal::start(name, &command)?;
        terminal.wait_for("This is a shell in the guest");
        Some(Self { terminal, pid })
    }

    fn kill(&self, signal: &str) {
        let pid = fs::read_to_string(&self.pid).unwrap();
        let sent = Command::new("kill")
            .args(["-s", signal, pid.trim()])
            .status();
        assert!(sent.unwrap().success());
    }

    fn assert_ended_with(&self, code: u8) {
        self.terminal.wait_for(&format!("ended with {code}"));
        self.terminal.wait_for(" icanon");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.pid);
    }
}

/// Types, ends what runs, and asks Linux for the help of its magic key.
fn type_a_little(terminal: &Terminal) {
    terminal.send(&["echo $((6 * 7)) is the answer", "Enter"]);
    terminal.wait_for("\n42 is the answer");
    terminal.send(&["sleep 1000", "Enter"]);
    thread::sleep(Duration::from_millis(300));
    terminal.send(&["C-c"]);
    terminal.send(&["echo $((6 * 8)) came back", "Enter"]);
    terminal.wait_for("\n48 came back");
    terminal.send(&["C-a", "b", "h"]);
    terminal.wait_for("sysrq: HELP");
}

#[test]
fn the_console_is_a_terminal_with_qemus_escapes() {
    let Some(machine) = Machine::start("keys", "--name keys") else {
        return;
    };
    let terminal = &machine.terminal;
    type_a_little(terminal);
    terminal.send(&["C-a", "h"]);
    terminal.wait_for("Ctrl-A x  end");
    terminal.send(&["C-a", "c"]);
    terminal.wait_for("`fourfold explain keys ADDRESS`");
    terminal.send(&["C-a", "s"]);
    terminal.wait_for("nothing to save");
    terminal.send(&["C-a", "t"]);
    terminal.send(&["Enter", "echo $((6 * 9)) at a time", "Enter"]);
    terminal.wait_for("] 54 at a time");
    terminal.wait_for("\n[00:0");
    terminal.send(&["C-a", "t"]);
    // No key: it is nobody's.
    terminal.send(&["C-a", "q"]);
    terminal.send(&["Enter", "echo $((6 * 10)) without", "Enter"]);
    terminal.wait_for("\n60 without");
    terminal.send(&["C-a", "x"]);
    machine.assert_ended_with(0);
}

#[test]
fn the_virtio_console_is_a_terminal_too() {
    let Some(machine) = Machine::start("hvc0", "--virtio-console stdio") else {
        return;
    };
    let terminal = &machine.terminal;
    terminal.send(&["tty", "Enter"]);
    terminal.wait_for("\n/dev/hvc0");
    type_a_little(terminal);
    // More than the queue's 64 buffers hold, typed at once.
    let long = "0123456789".repeat(30);
    terminal.send(&[&format!("echo {long} | wc -c"), "Enter"]);
    terminal.wait_for("\n301");
    terminal.send(&["C-a", "x"]);
    machine.assert_ended_with(0);
}

#[test]
#[ignore = "seconds: cargo xtask guest-tests"]
fn a_signal_leaves_the_terminal_as_it_was() {
    for (signal, code) in [("TERM", 143), ("SEGV", 139)] {
        let Some(machine) = Machine::start(signal, "") else {
            return;
        };
        machine.kill(signal);
        machine.assert_ended_with(code);
    }
}

#[test]
#[ignore = "seconds: cargo xtask guest-tests"]
fn exit_and_reboot_do_what_they_say() {
    let Some(machine) = Machine::start("reboot", "") else {
        return;
    };
    let terminal = &machine.terminal;
    terminal.send(&["reboot -f", "Enter"]);
    // The first life's are in the history, too.
    terminal.wait_for_times("This is a shell in the guest", 2);
    terminal.send(&["exit", "Enter"]);
    machine.assert_ended_with(0);
}
