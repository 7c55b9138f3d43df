//! Interrupt lines that several sources share: a line is high while any source holds it high.

use super::message::Level;

/// Who drives a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `KVM_IRQ_LINE` and irqfds without resampling.
    Userspace,
    /// irqfds with resampling.
    Resample,
    /// The PIT.
    Pit,
}

/// The sources that hold one line high.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Line(u8);

impl Line {
    /// Drives the line from `source`, and answers its level.
    pub fn drive(&mut self, source: Source, level: Level) -> Level {
        let bit = 1 << source as u8;
        match level {
            Level::Assert => self.0 |= bit,
            Level::Deassert => self.0 &= !bit,
        }
        if self.0 == 0 {
            Level::Deassert
        } else {
            Level::Assert
        }
    }

    /// The source is gone.
    pub fn release(&mut self, source: Source) {
        self.0 &= !(1 << source as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn high_while_any_source_is() {
        let mut line = Line::default();
        assert_eq!(line.drive(Source::Userspace, Level::Assert), Level::Assert);
        assert_eq!(line.drive(Source::Resample, Level::Assert), Level::Assert);
        assert_eq!(
            line.drive(Source::Userspace, Level::Deassert),
            Level::Assert
        );
        assert_eq!(
            line.drive(Source::Resample, Level::Deassert),
            Level::Deassert
        );
    }
}
