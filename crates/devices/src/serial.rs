//! A 16550A serial port: vm-superio's registers, with a queue in front of the receive FIFO, and
//! breaks.
//!
//! A break is a line held low for longer than a byte takes: the port receives a zero and says in the
//! line status that it was none (bit 4, until the status is read). vm-superio has no breaks. So a
//! break waits until the FIFO is empty, goes in as a zero, and nothing behind it before it is read.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io::Write,
    sync::{Arc, Mutex},
};

use vm_superio::{Serial as Uart, Trigger, serial::NoEvents};

use crate::{IrqLine, bus::Device, lock};

/// Number of ports.
pub const LEN: u16 = 8;

/// Where a PC has its serial ports, and their interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComPort {
    /// 0x3f8, IRQ 4.
    Com1,
    /// 0x2f8, IRQ 3.
    Com2,
    /// 0x3e8, IRQ 4, shared with the first.
    Com3,
}

impl ComPort {
    /// First port.
    pub const fn port(self) -> u16 {
        match self {
            Self::Com1 => 0x3f8,
            Self::Com2 => 0x2f8,
            Self::Com3 => 0x3e8,
        }
    }

    /// GSI.
    pub const fn irq(self) -> u32 {
        match self {
            Self::Com1 | Self::Com3 => 4,
            Self::Com2 => 3,
        }
    }
}

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// What comes over the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Received {
    Byte(u8),
    Break,
}

/// Where a break is that the guest has yet to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BreakInFifo {
    None,
    /// The line status says so.
    Told,
    /// Only the zero is left.
    Untold,
}

struct State {
    uart: Uart<Line, NoEvents, Box<dyn Write + Send>>,
    /// Input that the FIFO had no room for yet.
    waiting: VecDeque<Received>,
    line_break: BreakInFifo,
}

/// Registers.
const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;
/// Bits of the line status.
const DATA_READY: u8 = 1;
const BREAK: u8 = 1 << 4;

/// The port.
pub struct Serial(Mutex<State>);

impl Serial {
    /// Input beyond this is dropped: the guest is not reading.
    const MAX_WAITING: usize = 1 << 20;

    /// A port that interrupts by `irq` and whose output goes to `out`.
    pub fn new(irq: Arc<dyn IrqLine>, out: Box<dyn Write + Send>) -> Self {
        Self(Mutex::new(State {
            uart: Uart::new(Line(irq), out),
            waiting: VecDeque::new(),
            line_break: BreakInFifo::None,
        }))
    }

    /// Input for the guest, at most a mebibyte ahead of its reading.
    pub fn receive(&self, input: &[u8]) {
        self.add(input.iter().copied().map(Received::Byte));
    }

    /// A break, behind the input so far.
    pub fn receive_break(&self) {
        self.add([Received::Break]);
    }

    fn add(&self, input: impl IntoIterator<Item = Received>) {
        let mut state = lock(&self.0);
        let room = Self::MAX_WAITING.saturating_sub(state.waiting.len());
        state.waiting.extend(input.into_iter().take(room));
        state.refill();
    }
}

impl State {
    fn refill(&mut self) {
        if self.line_break != BreakInFifo::None {
            return;
        }
        let room = self.uart.fifo_capacity();
        let bytes = self.waiting.iter().map_while(|received| match received {
            Received::Byte(byte) => Some(*byte),
            Received::Break => None,
        });
        let chunk: Vec<u8> = bytes.take(room).collect();
        if !chunk.is_empty() {
            // In loopback mode it takes nothing: the line is cut, the bytes wait.
            let taken = self.uart.enqueue_raw_bytes(&chunk).unwrap_or(0);
            self.waiting.drain(..taken);
        } else if self.waiting.front() == Some(&Received::Break) {
            self.let_break_in();
        }
    }

    fn let_break_in(&mut self) {
        let is_empty = self.uart.read(LINE_STATUS as u8) & DATA_READY == 0;
        if is_empty && matches!(self.uart.enqueue_raw_bytes(&[0]), Ok(1)) {
            self.waiting.pop_front();
            self.line_break = BreakInFifo::Told;
        }
    }

    fn read(&mut self, register: u64) -> u8 {
        let value = self.uart.read(register as u8);
        match (register, self.line_break) {
            (LINE_STATUS, BreakInFifo::Told) => {
                self.line_break = BreakInFifo::Untold;
                return value | BREAK;
            }
            // Also the divisor's register, by which nobody asks for data; the zero stays then.
            (DATA, _) if self.uart.read(LINE_STATUS as u8) & DATA_READY == 0 => {
                self.line_break = BreakInFifo::None;
            }
            _ => {}
        }
        self.refill();
        value
    }
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(byte) = data.first_mut() else { return };
        *byte = lock(&self.0).read(offset);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        let mut state = lock(&self.0);
        if let Err(error) = state.uart.write(offset as u8, byte) {
            tracing::debug!(?error, "serial output was lost");
        }
        state.refill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{IrqCount, Sink};

    const INTERRUPT_ENABLE: u64 = 1;

    fn read(serial: &Serial, register: u64) -> u8 {
        let mut data = [0];
        serial.read(register, &mut data);
        data[0]
    }

    #[test]
    fn output_goes_out_byte_by_byte() {
        let out = Sink::default();
        let serial = Serial::new(Arc::new(IrqCount::default()), Box::new(out.clone()));
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(out.bytes(), b"hello");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_with_interrupts() {
        let irq = Arc::new(IrqCount::default());
        let serial = Serial::new(irq.clone(), Box::new(Sink::default()));
        serial.write(INTERRUPT_ENABLE, &[1]);
        let sent: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        serial.receive(&sent);
        let mut received = Vec::new();
        while read(&serial, LINE_STATUS) & DATA_READY != 0 {
            received.push(read(&serial, DATA));
        }
        assert_eq!(received, sent);
        assert!(irq.count() > 0);
    }

    #[test]
    fn a_break_stands_where_it_was_sent() {
        let irq = Arc::new(IrqCount::default());
        let serial = Serial::new(irq.clone(), Box::new(Sink::default()));
        serial.write(INTERRUPT_ENABLE, &[1]);
        serial.receive(b"ab");
        serial.receive_break();
        serial.receive(b"c");
        let mut seen = Vec::new();
        loop {
            let status = read(&serial, LINE_STATUS);
            if status & DATA_READY == 0 {
                break;
            }
            seen.push((status & BREAK != 0, read(&serial, DATA)));
        }
        let expected = [(false, b'a'), (false, b'b'), (true, 0), (false, b'c')];
        assert_eq!(seen, expected);
        // One into the empty FIFO; one that nobody looks for by the line status.
        let before = irq.count();
        serial.receive_break();
        assert!(irq.count() > before);
        assert_eq!(read(&serial, DATA), 0);
        assert_eq!(read(&serial, LINE_STATUS) & (BREAK | DATA_READY), 0);
    }
}
