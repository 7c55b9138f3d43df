//! The ways in which a guest ends or resets its machine, and the small devices that only do that.

use std::sync::Arc;

use crate::bus::Device;

/// What the guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// ACPI S5.
    PowerOff,
    /// Reset, by whichever of the many ways.
    Reset,
}

/// Who is told.
pub trait PowerSink: Send + Sync {
    /// Called in the vCPU's thread; returns at once, the machine stops soon after.
    fn request(&self, event: PowerEvent);
}

/// The port at which chipsets since the PIIX reset the machine, and ACPI's reset register here.
pub const RESET_PORT: u16 = 0xcf9;
/// The value that [`RESET_PORT`] takes as "reset now".
pub const RESET_VALUE: u8 = 0b0110;
const RESET_CPU: u8 = 0b0100;

/// Takes a write to the reset port.
pub(crate) fn reset_port_write(value: u8, sink: &dyn PowerSink) {
    if value & RESET_CPU != 0 {
        sink.request(PowerEvent::Reset);
    }
}

/// What is left of the keyboard controller: its status port says "ready, nothing here", and its
/// command 0xFE pulses the CPU's reset line. Sits at port 0x64.
pub struct KeyboardReset {
    sink: Arc<dyn PowerSink>,
}

impl KeyboardReset {
    /// The command and status port.
    pub const PORT: u16 = 0x64;
    const PULSE_RESET: u8 = 0xfe;

    /// A controller that tells `sink`.
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self { sink }
    }
}

impl Device for KeyboardReset {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.first() == Some(&Self::PULSE_RESET) {
            self.sink.request(PowerEvent::Reset);
        }
    }
}
