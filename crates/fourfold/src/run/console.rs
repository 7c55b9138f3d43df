//! The terminal as the guest's console, as QEMU's `-nographic` has it: raw mode, Ctrl-A as the
//! escape ([`super::keys`]), and the terminal restored on every way out.
//!
//! Ways out: the console is dropped (also by a panic that unwinds); a signal that ends the process
//! from outside; a fault inside the process. For the last two a handler restores the terminal and
//! lets the signal do what it does by default.

#![expect(unsafe_code, reason = "terminal modes and signal handlers are libc's")]

use std::{
    io::{self, IsTerminal, Read, Write},
    mem::MaybeUninit,
    sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError},
    thread,
};

use devices::virtio::console::Inbox;
use vmm::{Input, Stopper};

use super::{
    keys::{Action, Escape, HELP},
    screen,
};

/// The modes that the terminal had, for the handlers.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();

/// The machine that takes what is typed now.
static TARGET: Mutex<Option<Target>> = Mutex::new(None);

/// A machine at the terminal.
#[derive(Clone)]
pub(super) struct Target {
    /// Where it reads what is typed.
    pub(super) keyboard: Keyboard,
    /// What ends it.
    pub(super) stopper: Stopper,
    /// The name by which other commands find it.
    pub(super) name: String,
}

/// Where the guest reads what is typed.
#[derive(Clone)]
pub(super) enum Keyboard {
    /// Its first serial port.
    Serial(Input),
    /// Its virtio console.
    Virtio(Inbox),
}

impl Keyboard {
    fn send(&self, bytes: &[u8]) {
        match self {
            Self::Serial(input) => input.send(bytes),
            Self::Virtio(inbox) => inbox.push(bytes),
        }
    }

    /// A virtio console has no line to hold low; Linux takes Ctrl-O for it there
    /// (`drivers/tty/hvc/hvc_console.c`).
    fn send_break(&self) {
        const CTRL_O: u8 = 0xf;
        match self {
            Self::Serial(input) => input.send_break(),
            Self::Virtio(inbox) => inbox.push(&[CTRL_O]),
        }
    }
}

impl Target {
    fn act(&self, action: Action) {
        match action {
            Action::Send(byte) => self.keyboard.send(&[byte]),
            Action::Wait | Action::Ignore => {}
            Action::Help => say(HELP),
            Action::End => self.stopper.stop(),
            Action::Break => self.keyboard.send_break(),
            Action::Stamps => screen::toggle_stamps(),
            Action::Monitor => say(&format!(
                "\r\nThe monitor is the command itself, in another terminal: `fourfold explain {name} \
                 ADDRESS`, and `map`, `faults`, `pause`, `resume`, `stop` with the name {name}.\r\n",
                name = self.name,
            )),
            Action::Save => say(
                "\r\nThere is nothing to save: there are no snapshots, and what the guest writes to a \
                 disk goes into its image at once.\r\n",
            ),
        }
    }
}

fn say(text: &str) {
    // A terminal that is gone needs no word.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// The console; dropping it restores the terminal.
pub(super) struct Console;

impl Console {
    /// Connects standard input to the guest.
    pub(super) fn attach(target: Target) -> Self {
        static READER: Once = Once::new();
        if io::stdin().is_terminal() {
            enter_raw_mode();
        }
        *lock(&TARGET) = Some(target);
        // The thread ends with the process: a blocking read can't be called back. So there is one for
        // all lives of a machine that resets itself.
        READER.call_once(|| {
            thread::spawn(|| forward(&mut io::stdin()));
        });
        Self
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        restore();
    }
}

fn forward(from: &mut dyn Read) {
    let mut escape = Escape::default();
    let mut bytes = [0; 256];
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        let Some(target) = lock(&TARGET).clone() else {
            return;
        };
        for byte in &bytes[..len] {
            target.act(escape.next(*byte));
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn enter_raw_mode() {
    let mut modes = MaybeUninit::uninit();
    // SAFETY: tcgetattr fills the structure in where it gives 0.
    let modes = unsafe {
        if libc::tcgetattr(libc::STDIN_FILENO, modes.as_mut_ptr()) != 0 {
            return;
        }
        modes.assume_init()
    };
    let original = *ORIGINAL.get_or_init(|| modes);
    let mut raw = original;
    // SAFETY: both take a whole structure.
    unsafe {
        libc::cfmakeraw(&raw mut raw);
        libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw);
    }
}

/// Gives the terminal its modes back. Safe in a signal handler: `OnceLock::get` is one atomic load.
fn restore() {
    if let Some(original) = ORIGINAL.get() {
        // SAFETY: takes a whole structure; tcsetattr is async-signal-safe (signal-safety(7)).
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, original) };
    }
}

extern "C" fn restore_and_die(signal: libc::c_int) {
    restore();
    // SAFETY: both are async-signal-safe. The signal is blocked while its handler runs and takes
    // its default effect on return.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Makes signals that end the process restore the terminal first.
///
/// To be called before an accelerator is opened: its own handlers pass faults that are none of
/// theirs on to those that were there before.
pub(super) fn restore_on_signals() {
    const OUTSIDE: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT];
    const INSIDE: [libc::c_int; 5] = [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGABRT,
    ];
    let handler: extern "C" fn(libc::c_int) = restore_and_die;
    for signal in OUTSIDE.into_iter().chain(INSIDE) {
        // SAFETY: the handler calls only what is async-signal-safe.
        unsafe { libc::signal(signal, handler as *const () as libc::sighandler_t) };
    }
}
