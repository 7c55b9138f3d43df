//! The symbol table of a 64-bit ELF file (System V ABI, chapter 4).

/// Reads numbers at offsets, or nothing behind the end.
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl Bytes<'_> {
    pub(super) fn array<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    pub(super) fn u16(&self, at: usize) -> Option<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&self, at: usize) -> Option<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&self, at: usize) -> Option<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    /// The text at an offset, up to its NUL.
    fn text(&self, at: usize) -> Option<&str> {
        let rest = self.0.get(at..)?;
        let end = rest.iter().take(512).position(|byte| *byte == 0)?;
        std::str::from_utf8(&rest[..end]).ok()
    }
}

const SYMTAB: u32 = 2;
const SYMBOL: usize = 24;

/// All named symbols that are defined.
pub(super) fn symbols(file: &[u8]) -> Option<Vec<(u64, String)>> {
    let bytes = Bytes(file);
    let sections = bytes.u64(0x28)? as usize;
    let size = usize::from(bytes.u16(0x3a)?);
    let count = usize::from(bytes.u16(0x3c)?);
    let section = |index: usize| sections.checked_add(index.checked_mul(size)?);
    let table = (0..count)
        .filter_map(section)
        .find(|at| bytes.u32(at + 4) == Some(SYMTAB))?;
    let strings = section(bytes.u32(table + 0x28)? as usize)?;
    let names = bytes.u64(strings.checked_add(0x18)?)? as usize;
    let start = bytes.u64(table + 0x18)? as usize;
    let entries = bytes.u64(table + 0x20)? as usize / SYMBOL;
    let mut found = Vec::new();
    for index in 0..entries.min(1 << 22) {
        let at = start.checked_add(index * SYMBOL)?;
        let name = names.checked_add(bytes.u32(at)? as usize)?;
        let kind = bytes.array::<1>(at + 4)?[0] & 0xf;
        let (home, value) = (bytes.u16(at + 6)?, bytes.u64(at + 8)?);
        // Untyped, data, function; not sections and files.
        if home == 0 || kind > 2 {
            continue;
        }
        if let Some(name) = bytes.text(name).filter(|name| !name.is_empty()) {
            found.push((value, name.to_owned()));
        }
    }
    Some(found)
}
