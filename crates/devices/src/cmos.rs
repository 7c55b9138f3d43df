//! The real-time clock and its CMOS memory (MC146818), at ports 0x70 (index) and 0x71 (data).
//!
//! Time comes from the host's clock in UTC, whenever it is read, in the format that register B
//! asks for. Writes to the time registers are dropped: the host's clock is the clock. There are no
//! interrupts.

use std::{
    sync::Mutex,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{bus::Device, lock};

/// First port.
pub const PORT: u16 = 0x70;
/// Number of ports.
pub const LEN: u16 = 2;
/// The register that holds the century, as the FADT says.
pub const CENTURY: u8 = 0x32;

const INDEX_MASK: u8 = 0x7f;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Time base 32.768 kHz, no update in progress.
const A_DIVIDER: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const D_VALID: u8 = 1 << 7;

struct Registers {
    index: u8,
    memory: [u8; 128],
}

/// The chip.
pub struct Cmos {
    registers: Mutex<Registers>,
    now: fn() -> SystemTime,
}

impl Default for Cmos {
    fn default() -> Self {
        Self::with_clock(SystemTime::now)
    }
}

impl Cmos {
    fn with_clock(now: fn() -> SystemTime) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(REGISTER_B)] = B_24_HOURS;
        Self {
            registers: Mutex::new(Registers { index: 0, memory }),
            now,
        }
    }

    fn read_data(&self) -> u8 {
        let registers = lock(&self.registers);
        let b = registers.memory[usize::from(REGISTER_B)];
        let time = || Time::at((self.now)());
        match registers.index {
            0 => encode(time().second, b),
            2 => encode(time().minute, b),
            4 => encode_hour(time().hour, b),
            6 => encode(time().weekday, b),
            7 => encode(time().day, b),
            8 => encode(time().month, b),
            9 => encode((time().year % 100) as u8, b),
            CENTURY => encode((time().year / 100) as u8, b),
            REGISTER_A => A_DIVIDER,
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            index => registers.memory[usize::from(index)],
        }
    }
}

impl Device for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.read_data();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        let mut registers = lock(&self.registers);
        if offset == 0 {
            registers.index = byte & INDEX_MASK;
        } else {
            let index = usize::from(registers.index);
            registers.memory[index] = byte;
        }
    }
}

fn encode(value: u8, register_b: u8) -> u8 {
    if register_b & B_BINARY != 0 {
        value
    } else {
        ((value / 10) << 4) | (value % 10)
    }
}

fn encode_hour(hour: u8, register_b: u8) -> u8 {
    const AFTERNOON: u8 = 1 << 7;
    if register_b & B_24_HOURS != 0 {
        return encode(hour, register_b);
    }
    let twelve = (hour + 11) % 12 + 1;
    encode(twelve, register_b) | if hour >= 12 { AFTERNOON } else { 0 }
}

#[derive(Debug, PartialEq, Eq)]
struct Time {
    year: u32,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Time {
    fn at(time: SystemTime) -> Self {
        let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (days, in_day) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil(days);
        Self {
            year,
            month,
            day,
            // The first of January 1970 was a Thursday.
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (in_day / 3600) as u8,
            minute: (in_day / 60 % 60) as u8,
            second: (in_day % 60) as u8,
        }
    }
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar: counted in
/// years that begin in March, so that the leap day is a year's last.
fn civil(days: u64) -> (u32, u8, u8) {
    const DAYS_BEFORE_1970: u64 = 719_468;
    const DAYS_IN_400_YEARS: u64 = 146_097;
    let days = days + DAYS_BEFORE_1970;
    let (era, day) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let from_march = (5 * day + 2) / 153;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year + u64::from(month <= 2);
    let day = day - (153 * from_march + 2) / 5 + 1;
    (year as u32, month as u8, day as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// 29 February 2024, 13:05:09 UTC, a Thursday.
    fn leap_day() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_709_211_909)
    }

    fn get(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(0, &[index]);
        let mut data = [0];
        cmos.read(1, &mut data);
        data[0]
    }

    #[test]
    fn a_leap_day_reads_in_bcd_and_in_binary() {
        let cmos = Cmos::with_clock(leap_day);
        let bcd: Vec<_> = [CENTURY, 9, 8, 7, 6, 4, 2, 0].map(|i| get(&cmos, i)).into();
        assert_eq!(bcd, [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x05, 0x09]);
        cmos.write(0, &[REGISTER_B]);
        cmos.write(1, &[B_BINARY]);
        assert_eq!(get(&cmos, 7), 29);
        assert_eq!(get(&cmos, 4), 0x81, "one in the afternoon");
    }

    #[test]
    fn dates_agree_with_the_calendar() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(47_540), (2100, 2, 28));
        assert_eq!(civil(47_541), (2100, 3, 1));
    }

    #[test]
    fn other_registers_are_memory() {
        let cmos = Cmos::default();
        cmos.write(0, &[0x8f]);
        cmos.write(1, &[0x0a]);
        assert_eq!(get(&cmos, 0x0f), 0x0a);
        assert_eq!(get(&cmos, REGISTER_D), D_VALID);
    }
}
