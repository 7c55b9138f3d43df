//! The guest's output on the terminal, with the time before each line where that is wanted.

use std::{
    io::{self, Write},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Since when lines have times; one for all lives of a machine that resets itself.
static STAMPS: Mutex<Option<Instant>> = Mutex::new(None);

/// Times before lines from now on, or no more. They count from here, as QEMU's do.
pub(super) fn toggle_stamps() {
    let mut since = STAMPS.lock().unwrap_or_else(PoisonError::into_inner);
    *since = match *since {
        None => Some(Instant::now()),
        Some(_) => None,
    };
}

/// Writes to `W`, and stamps lines.
pub(super) struct Screen<W> {
    out: W,
    at_start_of_line: bool,
}

impl Screen<io::Stdout> {
    /// Standard output.
    pub(super) fn stdout() -> Self {
        Self::new(io::stdout())
    }
}

impl<W: Write> Screen<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            at_start_of_line: true,
        }
    }

    fn write_stamped(&mut self, bytes: &[u8], time: Duration) -> io::Result<()> {
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.at_start_of_line {
                write!(self.out, "[{}] ", clock(time))?;
            }
            self.out.write_all(line)?;
            self.at_start_of_line = line.ends_with(b"\n");
        }
        Ok(())
    }
}

/// Hours, minutes, seconds, milliseconds.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        time.subsec_millis()
    )
}

impl<W: Write> Write for Screen<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let since = *STAMPS.lock().unwrap_or_else(PoisonError::into_inner);
        match since {
            None => {
                self.out.write_all(bytes)?;
                if let Some(last) = bytes.last() {
                    self.at_start_of_line = *last == b'\n';
                }
            }
            Some(since) => self.write_stamped(bytes, since.elapsed())?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_its_time_however_it_is_cut() {
        let time = Duration::from_millis(3_723_004);
        let mut screen = Screen::new(Vec::new());
        screen.write_all(b"plain ").unwrap();
        for part in ["middle\n", "on", "e\ntwo", "\n", "three"] {
            screen.write_stamped(part.as_bytes(), time).unwrap();
        }
        let stamp = "[01:02:03.004] ";
        let expected = format!("plain middle\n{stamp}one\n{stamp}two\n{stamp}three");
        assert_eq!(String::from_utf8(screen.out).unwrap(), expected);
    }
}
