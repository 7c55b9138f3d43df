//! A 16550A serial port: vm-superio's registers, with a queue in front of the receive FIFO.

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

struct State {
    uart: Uart<Line, NoEvents, Box<dyn Write + Send>>,
    /// Input that the FIFO had no room for yet.
    waiting: VecDeque<u8>,
}

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
        }))
    }

    /// Input for the guest, at most a mebibyte ahead of its reading.
    pub fn receive(&self, input: &[u8]) {
        let mut state = lock(&self.0);
        let room = Self::MAX_WAITING.saturating_sub(state.waiting.len());
        state.waiting.extend(&input[..input.len().min(room)]);
        state.refill();
    }
}

impl State {
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity().min(self.waiting.len());
        if room == 0 {
            return;
        }
        let chunk: Vec<u8> = self.waiting.iter().copied().take(room).collect();
        // In loopback mode it takes nothing: the line is cut, the bytes wait.
        let taken = self.uart.enqueue_raw_bytes(&chunk).unwrap_or(0);
        self.waiting.drain(..taken);
    }
}

impl Device for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(byte) = data.first_mut() else { return };
        let mut state = lock(&self.0);
        *byte = state.uart.read(offset as u8);
        state.refill();
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

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;

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
}
