//! Where code and data lie: at the same virtual addresses natively and in the guest.
//!
//! ```text
//!   CODE        4 pages, read and execute
//!   data, seen from each of WINDOWS:
//!     -1        not present
//!      0 1 2    read and write, no execute
//!      3        read only, no execute
//!      4        not present
//! ```
//!
//! Both windows show the same pages, one below 4 GiB (absolute addresses, 32-bit addresses) and one
//! far above. What a test leaves in the pages is compared once.

use addr::Gva;

/// Bytes of a page here: only 4 KiB pages are used.
pub const PAGE: usize = 4096;

/// The first byte of the code window.
pub const CODE: Gva = Gva::new(0x1000_0000);
/// Bytes of the code window.
pub const CODE_BYTES: usize = 4 * PAGE;

/// The data pages as code can reach them.
pub const WINDOWS: [Gva; 2] = [Gva::new(0x2000_0000), Gva::new(0x5a5a_4000_0000)];
/// Bytes of the window that can be written.
pub const WRITABLE_BYTES: usize = 3 * PAGE;
/// Bytes of the window that are present: one read-only page follows the writable ones.
pub const DATA_BYTES: usize = 4 * PAGE;

/// What fills unused code: `INT3`, which ends a test wherever a jump leads.
pub const FILLER: u8 = 0xcc;

/// Whether `address` lies in the data as seen from one of the windows, and at which offset.
pub fn data_offset(address: Gva) -> Option<usize> {
    WINDOWS.iter().find_map(|base| {
        let offset = address.raw().checked_sub(base.raw())?;
        (offset < DATA_BYTES as u64).then_some(offset as usize)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_show_the_same_bytes() {
        assert_eq!(data_offset(Gva::new(0x2000_0123)), Some(0x123));
        assert_eq!(data_offset(Gva::new(0x5a5a_4000_0123)), Some(0x123));
        assert_eq!(data_offset(Gva::new(0x2000_4000)), None);
        assert_eq!(data_offset(Gva::new(0x1fff_ffff)), None);
    }
}
