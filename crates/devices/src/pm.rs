//! ACPI's fixed hardware: PM1 event and control registers and the power-management timer
//! (ACPI 6.5, 4.8.3).
//!
//! | offset | bytes | register                                             |
//! |--------|-------|------------------------------------------------------|
//! | 0      | 2     | `PM1_STS`, written bits are cleared                  |
//! | 2      | 2     | `PM1_EN`                                             |
//! | 4      | 2     | `PM1_CNT`: `SCI_EN` always set, `SLP_TYP`, `SLP_EN`  |
//! | 8      | 4     | `PM_TMR`, counts at 3.579545 MHz                     |

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use crate::{
    bus::Device,
    lock,
    power::{PowerEvent, PowerSink},
};

/// First port.
pub const PORT: u16 = 0x600;
/// Number of ports.
pub const LEN: u16 = 12;
/// Offset of `PM1_CNT`.
pub const CONTROL: u16 = 4;
/// Offset of `PM_TMR`.
pub const TIMER: u16 = 8;
/// `SLP_TYP` of the state S5 (power off), as `\_S5` in the DSDT gives it.
pub const SLEEP_TYPE_S5: u8 = 5;

const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const TIMER_HZ: u128 = 3_579_545;

#[derive(Default)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

/// The registers.
pub struct AcpiPm {
    registers: Mutex<Registers>,
    began: Instant,
    sink: Arc<dyn PowerSink>,
}

impl AcpiPm {
    /// Registers whose power-off goes to `sink`.
    pub fn new(sink: Arc<dyn PowerSink>) -> Self {
        Self {
            registers: Mutex::default(),
            began: Instant::now(),
            sink,
        }
    }

    fn image(&self) -> [u8; LEN as usize] {
        let registers = lock(&self.registers);
        let mut image = [0; LEN as usize];
        image[0..2].copy_from_slice(&registers.status.to_le_bytes());
        image[2..4].copy_from_slice(&registers.enable.to_le_bytes());
        image[4..6].copy_from_slice(&(registers.control | SCI_ENABLED).to_le_bytes());
        image[8..12].copy_from_slice(&self.timer().to_le_bytes());
        image
    }

    fn timer(&self) -> u32 {
        (self.began.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000) as u32
    }

    fn write_control(&self, value: u16) {
        lock(&self.registers).control = value & !SLEEP_ENABLE;
        let sleep_type = (value >> 10 & 0b111) as u8;
        if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
            self.sink.request(PowerEvent::PowerOff);
        }
    }
}

impl Device for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = image.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 2];
        let taken = data.len().min(2);
        value[..taken].copy_from_slice(&data[..taken]);
        let value = u16::from_le_bytes(value);
        match offset {
            0 => lock(&self.registers).status &= !value,
            2 => lock(&self.registers).enable = value,
            4 => self.write_control(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::PowerLog;

    #[test]
    fn writing_s5_with_sleep_enable_powers_off_once() {
        let log = Arc::new(PowerLog::default());
        let pm = AcpiPm::new(log.clone());
        pm.write(4, &(u16::from(SLEEP_TYPE_S5) << 10).to_le_bytes());
        assert_eq!(log.events(), []);
        pm.write(4, &(1_u16 << 10 | SLEEP_ENABLE).to_le_bytes());
        assert_eq!(log.events(), [], "S1 is not S5");
        pm.write(
            4,
            &(u16::from(SLEEP_TYPE_S5) << 10 | SLEEP_ENABLE).to_le_bytes(),
        );
        assert_eq!(log.events(), [PowerEvent::PowerOff]);
    }

    #[test]
    fn the_timer_runs_at_its_frequency() {
        let pm = AcpiPm::new(Arc::new(PowerLog::default()));
        let read = || {
            let mut data = [0; 4];
            pm.read(8, &mut data);
            u32::from_le_bytes(data)
        };
        let (before, began) = (read(), Instant::now());
        std::thread::sleep(std::time::Duration::from_millis(20));
        let ticks = read() - before;
        let expected = began.elapsed().as_secs_f64() * 3_579_545.0;
        assert!((f64::from(ticks) - expected).abs() < expected / 10.0);
    }
}
