//! `run --exec`: the command's output and exit code out of the guest.
//!
//! The guest writes the command's output to a serial port, and then a newline, a nonce that the
//! command can't guess, a space, the exit code and a newline. Everything before that is output.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// 128 random bits in hexadecimal.
pub(super) fn nonce() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

struct State<W> {
    out: W,
    /// What ends the output.
    marker: Vec<u8>,
    /// Bytes that may turn out to be the marker's beginning.
    held: Vec<u8>,
    /// Digits behind the marker.
    digits: Vec<u8>,
    marked: bool,
    code: Option<u8>,
}

/// The writer behind the guest's second serial port.
pub(super) struct Capture<W>(Arc<Mutex<State<W>>>);

impl<W> Clone for Capture<W> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<W: Write> Capture<W> {
    /// Passes output on to `out`.
    pub(super) fn new(nonce: &str, out: W) -> Self {
        Self(Arc::new(Mutex::new(State {
            out,
            marker: format!("\n{nonce} ").into_bytes(),
            held: Vec::new(),
            digits: Vec::new(),
            marked: false,
            code: None,
        })))
    }

    /// The exit code, once the command has ended.
    pub(super) fn code(&self) -> Option<u8> {
        lock(&self.0).code
    }
}

impl<W: Write> State<W> {
    fn take(&mut self, byte: u8) -> io::Result<()> {
        if self.marked {
            if byte == b'\n' && self.code.is_none() {
                let digits = String::from_utf8_lossy(&self.digits);
                self.code = digits.trim().parse().ok();
            }
            self.digits.push(byte);
            return Ok(());
        }
        self.held.push(byte);
        if self.marker.starts_with(&self.held) {
            self.marked = self.held.len() == self.marker.len();
            return Ok(());
        }
        // Only the marker's first byte is a newline, so only the last byte can begin it anew.
        let keep = usize::from(self.marker.first() == Some(&byte));
        let rest = self.held.split_off(self.held.len() - keep);
        let released = std::mem::replace(&mut self.held, rest);
        self.out.write_all(&released)
    }
}

impl<W: Write> Write for Capture<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.0);
        for byte in bytes {
            state.take(*byte)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0).out.flush()
    }
}

/// The guest's console while a command runs: the last part is kept for messages.
#[derive(Clone)]
pub(super) struct Log {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    destination: LogDestination,
}

/// Whether the console is shown as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogDestination {
    /// On standard error.
    Shown,
    /// Only kept.
    Kept,
}

impl Log {
    const MOST: usize = 4096;

    pub(super) fn new(destination: LogDestination) -> Self {
        let bytes = Arc::default();
        Self { bytes, destination }
    }

    /// The last lines.
    pub(super) fn tail(&self) -> String {
        let bytes: Vec<u8> = lock(&self.bytes).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = lock(&self.bytes);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(Self::MOST);
        kept.drain(..excess);
        if self.destination == LogDestination::Shown {
            io::stderr().write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(input: &[u8]) -> (Vec<u8>, Option<u8>) {
        let mut capture = Capture::new("abc", Vec::new());
        for byte in input {
            capture.write_all(&[*byte]).unwrap();
        }
        let code = capture.code();
        (std::mem::take(&mut lock(&capture.0).out), code)
    }

    #[test]
    fn output_and_code_are_told_apart() {
        assert_eq!(capture(b"hello\n\nabc 7\n"), (b"hello\n".to_vec(), Some(7)));
        assert_eq!(capture(b"\nabc 0\n"), (b"".to_vec(), Some(0)));
        assert_eq!(
            capture(b"no newline\nabc 255\n"),
            (b"no newline".to_vec(), Some(255))
        );
    }

    #[test]
    fn near_misses_are_output() {
        let (output, code) = capture(b"\nab\n\nabx \nabc\n\n\nabc 1\n");
        assert_eq!(output, b"\nab\n\nabx \nabc\n\n");
        assert_eq!(code, Some(1));
    }

    #[test]
    fn without_the_marker_there_is_no_code() {
        assert_eq!(capture(b"hello\n").1, None);
        assert_eq!(capture(b"\nabc 3").1, None);
    }
}
