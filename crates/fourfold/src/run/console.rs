//! The terminal as the guest's console, as QEMU's `-nographic` has it: raw mode, Ctrl-A as the
//! escape, and the terminal restored on every way out.
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

const HELP: &str = "\r\n\
    Ctrl-A h  this help\r\n\
    Ctrl-A x  end the machine, as pulling the plug would\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// The modes that the terminal had, for the handlers.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();

/// The machine that takes what is typed now.
static TARGET: Mutex<Option<(Keyboard, Stopper)>> = Mutex::new(None);

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
}

/// The console; dropping it restores the terminal.
pub(super) struct Console;

impl Console {
    /// Connects standard input to the guest.
    pub(super) fn attach(input: Keyboard, stopper: Stopper) -> Self {
        static READER: Once = Once::new();
        if io::stdin().is_terminal() {
            enter_raw_mode();
        }
        *lock(&TARGET) = Some((input, stopper));
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
        let Some((input, stopper)) = lock(&TARGET).clone() else {
            return;
        };
        for byte in &bytes[..len] {
            match escape.next(*byte) {
                Action::Send(byte) => input.send(&[byte]),
                Action::Wait => {}
                Action::Help => {
                    // A terminal that is gone needs no help.
                    let _ = io::stderr().write_all(HELP.as_bytes());
                }
                Action::End => stopper.stop(),
            }
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a typed byte means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Send(u8),
    Wait,
    Help,
    End,
}

/// Whether the byte before was the escape.
#[derive(Default)]
struct Escape(bool);

impl Escape {
    const CTRL_A: u8 = 1;

    fn next(&mut self, byte: u8) -> Action {
        let escaped = std::mem::take(&mut self.0);
        match (escaped, byte) {
            (false, Self::CTRL_A) => {
                self.0 = true;
                Action::Wait
            }
            (true, b'x' | b'X') => Action::End,
            (true, b'h' | b'H' | b'?') => Action::Help,
            (true, b'a') => Action::Send(Self::CTRL_A),
            (_, byte) => Action::Send(byte),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_qemus() {
        let mut escape = Escape::default();
        let actions: Vec<_> = b"a\x01h\x01x\x01\x01b"
            .iter()
            .map(|byte| escape.next(*byte))
            .collect();
        assert_eq!(
            actions,
            [
                Action::Send(b'a'),
                Action::Wait,
                Action::Help,
                Action::Wait,
                Action::End,
                Action::Wait,
                Action::Send(1),
                Action::Send(b'b'),
            ]
        );
    }
}
