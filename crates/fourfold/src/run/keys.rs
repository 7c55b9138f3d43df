//! The keys that are not the guest's: Ctrl-A and one more, as QEMU's `-nographic` has them.

/// What Ctrl-A h shows.
pub(super) const HELP: &str = "\r\n\
    Ctrl-A h  this help\r\n\
    Ctrl-A x  end the machine, as pulling the plug would\r\n\
    Ctrl-A b  send a break: to Linux, the magic SysRq key\r\n\
    Ctrl-A t  the time before each line, or no more\r\n\
    Ctrl-A c  where this machine's monitor is\r\n\
    Ctrl-A s  whether the disks are saved\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// What a typed byte means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// It is the guest's.
    Send(u8),
    /// The escape: what it means is yet to come.
    Wait,
    /// Nothing: no such key.
    Ignore,
    /// Show [`HELP`].
    Help,
    /// End the machine.
    End,
    /// A break on the line.
    Break,
    /// Times before lines, on or off.
    Stamps,
    /// QEMU's monitor, of which there is none here.
    Monitor,
    /// QEMU writes its snapshots back.
    Save,
}

/// Whether the byte before was the escape.
#[derive(Default)]
pub(super) struct Escape(bool);

impl Escape {
    const CTRL_A: u8 = 1;

    /// The next byte that is typed.
    pub(super) fn next(&mut self, byte: u8) -> Action {
        let escaped = std::mem::take(&mut self.0);
        match (escaped, byte) {
            (false, Self::CTRL_A) => {
                self.0 = true;
                Action::Wait
            }
            (false, byte) => Action::Send(byte),
            (true, b'x' | b'X') => Action::End,
            (true, b'h' | b'H' | b'?') => Action::Help,
            (true, b'b' | b'B') => Action::Break,
            (true, b't' | b'T') => Action::Stamps,
            (true, b'c' | b'C') => Action::Monitor,
            (true, b's' | b'S') => Action::Save,
            (true, b'a' | Self::CTRL_A) => Action::Send(Self::CTRL_A),
            (true, _) => Action::Ignore,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_qemus() {
        let mut escape = Escape::default();
        let actions: Vec<_> = b"a\x01h\x01x\x01\x01b\x01b\x01t\x01c\x01s\x01qx"
            .iter()
            .map(|byte| escape.next(*byte))
            .filter(|action| *action != Action::Wait)
            .collect();
        assert_eq!(
            actions,
            [
                Action::Send(b'a'),
                Action::Help,
                Action::End,
                Action::Send(1),
                Action::Send(b'b'),
                Action::Break,
                Action::Stamps,
                Action::Monitor,
                Action::Save,
                Action::Ignore,
                Action::Send(b'x'),
            ]
        );
    }
}
