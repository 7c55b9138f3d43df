//! The smallest kernel that a boot loader takes.

/// Where its code lies.
pub(crate) const LOAD_AT: u64 = 0x20_0000;

/// An ELF image whose one segment is `code`, entered at its start.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend(LOAD_AT.to_le_bytes());
    image.extend(64_u64.to_le_bytes());
    image.extend([0; 8 + 4]);
    image.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    image.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let len = code.len() as u64;
    for word in [HEADERS, LOAD_AT, LOAD_AT, len, len, 0x1000] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}
