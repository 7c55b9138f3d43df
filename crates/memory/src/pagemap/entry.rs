//! One entry of `/proc/PID/pagemap`.

use addr::Pfn;

const FRAME: u64 = (1 << 55) - 1;
const SOFT_DIRTY: u64 = 1 << 55;
const EXCLUSIVE: u64 = 1 << 56;
const WRITE_PROTECTED: u64 = 1 << 57;
const FILE_OR_SHARED: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
const SWAP_TYPE_BITS: u32 = 5;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// In a frame of the host's memory.
    Present(FrameNumber),
    /// In swap space.
    Swapped {
        /// Which.
        device: u8,
        /// Where in it, in pages.
        offset: u64,
    },
    /// Nowhere yet, or given back: an access will be a page fault.
    Absent,
}

/// The number of a page frame, as far as the host tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameNumber {
    /// The frame.
    Known(Pfn),
    /// The host hides frame numbers from this user (they take `CAP_SYS_ADMIN`).
    Hidden,
}

/// What a page-table entry of the host says, without what the hardware alone needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEntry {
    /// Where the page is.
    pub state: PageState,
    /// Written since the soft-dirty bits were last cleared (`/proc/PID/clear_refs`).
    pub soft_dirty: bool,
    /// No other mapping shares the frame.
    pub exclusive: bool,
    /// Write-protected by userfaultfd.
    pub write_protected: bool,
    /// Of a file or of shared memory, not private anonymous memory.
    pub file_or_shared: bool,
}

impl PageEntry {
    /// From the word that the kernel shows.
    pub fn from_raw(raw: u64) -> Self {
        Self {
            state: PageState::from_raw(raw),
            soft_dirty: raw & SOFT_DIRTY != 0,
            exclusive: raw & EXCLUSIVE != 0,
            write_protected: raw & WRITE_PROTECTED != 0,
            file_or_shared: raw & FILE_OR_SHARED != 0,
        }
    }

    /// The frame, where the page is in memory and the host tells.
    pub fn frame(self) -> Option<Pfn> {
        match self.state {
            PageState::Present(FrameNumber::Known(frame)) => Some(frame),
            _ => None,
        }
    }
}

impl PageState {
    fn from_raw(raw: u64) -> Self {
        let number = raw & FRAME;
        if raw & PRESENT != 0 {
            // Frame 0 holds the firmware's data on x86 and is no process's page.
            Self::Present(match number {
                0 => FrameNumber::Hidden,
                number => FrameNumber::Known(Pfn::new(number)),
            })
        } else if raw & SWAPPED != 0 {
            let device = number & ((1 << SWAP_TYPE_BITS) - 1);
            Self::Swapped {
                device: device as u8,
                offset: number >> SWAP_TYPE_BITS,
            }
        } else {
            Self::Absent
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes() {
        let present = PageEntry::from_raw(PRESENT | EXCLUSIVE | SOFT_DIRTY | 0x1234);
        assert_eq!(present.frame(), Some(Pfn::new(0x1234)));
        assert!(present.exclusive && present.soft_dirty && !present.file_or_shared);
        let hidden = PageEntry::from_raw(PRESENT | FILE_OR_SHARED);
        assert_eq!(hidden.state, PageState::Present(FrameNumber::Hidden));
        assert_eq!(hidden.frame(), None);
        let swapped = PageEntry::from_raw(SWAPPED | WRITE_PROTECTED | 7 << 5 | 3);
        assert_eq!(
            swapped.state,
            PageState::Swapped {
                device: 3,
                offset: 7
            }
        );
        assert!(swapped.write_protected);
        assert_eq!(PageEntry::from_raw(SOFT_DIRTY).state, PageState::Absent);
    }
}
