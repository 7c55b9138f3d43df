//! Device memory: what was answered, what is asked, what is still to be written.
//!
//! An instruction that reads a device leaves as if it had not begun, and runs again with the answers
//! so far; it takes them in the order in which it reads. Writes are queued while the instruction runs
//! and leave one by one behind it (decision 10 of the design).
//!
//! Answers belong to the one instruction that asked. It is the next to begin: nothing is delivered
//! before it, as its reads have had their effect on the device.

use std::collections::VecDeque;

use addr::{Address, Gpa};

use crate::{Handled, MmioExit, Platform};

/// At most eight bytes of device memory, as KVM hands them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    gpa: Gpa,
    len: u8,
    data: [u8; 8],
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mmio {
    answers: Vec<Piece>,
    taken: usize,
    asked: Option<(Gpa, u8)>,
    /// The next instruction that begins is the one that asked, with the answers so far.
    resumes: bool,
    writes: VecDeque<Piece>,
}

fn pieces(gpa: Gpa, len: usize) -> impl Iterator<Item = (usize, Gpa, usize)> {
    (0..len)
        .step_by(8)
        .map(move |at| (at, gpa.wrapping_add(at as u64), (len - at).min(8)))
}

impl Mmio {
    /// An instruction begins, or begins again.
    pub(crate) fn begin(&mut self) {
        if !std::mem::take(&mut self.resumes) {
            self.answers.clear();
        }
        self.taken = 0;
        self.asked = None;
    }

    /// The instruction is over; its answers are spent.
    pub(crate) fn end(&mut self) {
        self.resumes = false;
        self.begin();
    }

    /// How many answers the instruction has taken.
    pub(crate) fn taken(&self) -> usize {
        self.taken
    }

    /// Goes back to when the instruction had taken so many answers.
    pub(crate) fn take_again(&mut self, taken: usize) {
        self.taken = taken;
    }

    /// Reads device memory from the answers. `Err`: this piece must be asked for first.
    pub(crate) fn read(&mut self, gpa: Gpa, data: &mut [u8]) -> Result<(), MmioExit> {
        for (at, gpa, len) in pieces(gpa, data.len()) {
            let answer = self.answers.get(self.taken);
            let Some(answer) = answer.filter(|a| a.gpa == gpa && usize::from(a.len) == len) else {
                self.answers.truncate(self.taken);
                self.asked = Some((gpa, len as u8));
                return Err(MmioExit {
                    gpa,
                    len: len as u8,
                    write: None,
                });
            };
            data[at..at + len].copy_from_slice(&answer.data[..len]);
            self.taken += 1;
        }
        Ok(())
    }

    /// Queues a write.
    pub(crate) fn write(&mut self, gpa: Gpa, data: &[u8]) {
        for (at, gpa, len) in pieces(gpa, data.len()) {
            let mut piece = Piece {
                gpa,
                len: len as u8,
                data: [0; 8],
            };
            piece.data[..len].copy_from_slice(&data[at..at + len]);
            self.writes.push_back(piece);
        }
    }

    /// The monitor is done: an instruction that asked begins again with this answer, and for a write
    /// there is nothing to do.
    pub(crate) fn complete(&mut self, data: &[u8]) {
        if self.asked.is_some() {
            self.answer(data);
            self.resume();
        }
    }

    /// The instruction that asked begins again, with what was answered.
    pub(crate) fn resume(&mut self) {
        self.resumes = true;
    }

    /// Whether an instruction waits to begin again.
    pub(crate) fn resumes(&self) -> bool {
        self.resumes
    }

    /// The answer to what was asked.
    pub(crate) fn answer(&mut self, data: &[u8]) {
        if let Some((gpa, len)) = self.asked.take() {
            let mut piece = Piece {
                gpa,
                len,
                data: [0; 8],
            };
            let count = data.len().min(usize::from(len));
            piece.data[..count].copy_from_slice(&data[..count]);
            self.answers.push(piece);
        }
    }

    /// Asks the platform for what is asked; whether it knew.
    pub(crate) fn ask(&mut self, platform: &mut dyn Platform) -> Handled {
        let Some((gpa, len)) = self.asked else {
            return Handled::No;
        };
        let mut data = [0; 8];
        let handled = platform.mmio_read(gpa, &mut data[..usize::from(len)]);
        if handled == Handled::Yes {
            self.answer(&data);
        }
        handled
    }

    /// Hands queued writes to the platform until one is for the monitor.
    pub(crate) fn flush(&mut self, platform: &mut dyn Platform) -> Option<MmioExit> {
        while let Some(piece) = self.writes.pop_front() {
            let data = &piece.data[..usize::from(piece.len)];
            if platform.mmio_write(piece.gpa, data) == Handled::No {
                return Some(MmioExit {
                    gpa: piece.gpa,
                    len: piece.len,
                    write: Some(piece.data),
                });
            }
        }
        None
    }

    /// Whether an instruction waits to begin again, or writes wait.
    pub(crate) fn is_busy(&self) -> bool {
        self.resumes || self.has_writes()
    }

    /// Whether writes wait.
    pub(crate) fn has_writes(&self) -> bool {
        !self.writes.is_empty()
    }
}
