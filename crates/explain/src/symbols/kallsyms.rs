//! The kernel's own table of symbols, `kallsyms`, found in its image without help
//! (`scripts/kallsyms.c`, `kernel/kallsyms.c`).
//!
//! Names are packed: each is a length and so many bytes, and a byte stands for a token, a piece of
//! text in a table of 256. What lies where, each part aligned to 8 bytes:
//!
//! | until 6.3                                         | since 6.4                                      |
//! |---------------------------------------------------|------------------------------------------------|
//! | `offsets`, `relative_base`                        |                                                |
//! | `num_syms`, `names`, `markers`                    | `num_syms`, `names`, `markers`                 |
//! | `seqs_of_names` (6.2, 6.3)                        |                                                |
//! | `token_table`, `token_index`                      | `token_table`, `token_index`                   |
//! |                                                   | `offsets`, `relative_base`, `seqs_of_names`    |
//!
//! The token table is the anchor: the tokens of the ten digits are the digits themselves, one behind
//! the other, and `token_index` says where each token begins. `markers` say where every 256th name
//! begins, which proves that `names` was found.

use super::elf::Bytes;

const TOKENS: usize = 256;

/// All symbols of a kernel's image.
pub(super) fn symbols(image: &[u8]) -> Option<Vec<(u64, String)>> {
    let bytes = Bytes(image);
    let tokens = Tokens::find(image)?;
    let names = Names::find(&bytes, tokens.start)?;
    let addresses = addresses(&bytes, &tokens, &names)?;
    let mut found = Vec::with_capacity(names.count);
    let mut at = names.start;
    for address in addresses {
        let (len, skip) = length(image, at)?;
        let packed = image.get(at + skip..at + skip + len)?;
        at += skip + len;
        let name = tokens.unpack(packed)?;
        // The first character is the kind, as `nm` prints it.
        let name = name.get(1..)?;
        if !name.is_empty() {
            found.push((address, name.to_owned()));
        }
    }
    Some(found)
}

/// A name's length, and how many bytes say so: since 6.1 two where it is above 127.
fn length(image: &[u8], at: usize) -> Option<(usize, usize)> {
    let first = usize::from(*image.get(at)?);
    if first & 0x80 == 0 {
        return Some((first, 1));
    }
    let second = usize::from(*image.get(at + 1)?);
    Some((first & 0x7f | second << 7, 2))
}

/// The texts that bytes of names stand for.
struct Tokens<'a> {
    start: usize,
    /// Behind `token_index`.
    end: usize,
    texts: Vec<&'a [u8]>,
}

impl<'a> Tokens<'a> {
    fn find(image: &'a [u8]) -> Option<Self> {
        const DIGITS: &[u8] = b"\x000\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
        let mut from = 0;
        while let Some(found) = find(&image[from..], DIGITS) {
            let digits = from + found + 1;
            if let Some(tokens) = Self::around(image, digits) {
                return Some(tokens);
            }
            from = digits;
        }
        None
    }

    /// With the token of "0" at `digits`.
    fn around(image: &'a [u8], digits: usize) -> Option<Self> {
        let mut start = digits;
        for _ in 0..b'0' {
            // Back over one NUL and to behind the one before it.
            let before = image.get(..start.checked_sub(1)?)?;
            let least = before.len().saturating_sub(64);
            start = least + before[least..].iter().rposition(|byte| *byte == 0)? + 1;
        }
        // The table's own alignment leaves zeroes before it, which look like empty tokens.
        let mut texts = Vec::with_capacity(TOKENS);
        let mut at = start;
        for _ in 0..TOKENS {
            let len = image.get(at..)?.iter().take(64).position(|b| *b == 0)?;
            texts.push(&image[at..at + len]);
            at += len + 1;
        }
        let index = at.next_multiple_of(8);
        let bytes = Bytes(image);
        let mut offset = 0;
        for (number, text) in texts.iter().enumerate() {
            if usize::from(bytes.u16(index + number * 2)?) != offset {
                return None;
            }
            offset += text.len() + 1;
        }
        Some(Self {
            start,
            end: index + TOKENS * 2,
            texts,
        })
    }

    fn unpack(&self, packed: &[u8]) -> Option<String> {
        let mut name = Vec::new();
        for byte in packed {
            name.extend_from_slice(self.texts[usize::from(*byte)]);
        }
        String::from_utf8(name).ok()
    }
}

/// Where the packed names are.
struct Names {
    /// Of `num_syms`.
    header: usize,
    start: usize,
    count: usize,
}

impl Names {
    /// Before the token table, with markers between the two.
    fn find(bytes: &Bytes<'_>, tokens: usize) -> Option<Self> {
        // Without a `seqs_of_names` the markers end here; with one, three bytes a symbol earlier.
        let plain = Self::with_markers_until(bytes, tokens);
        plain.or_else(|| Self::behind_sequence(bytes, tokens))
    }

    /// 6.2 and 6.3: somewhere before three bytes for each symbol.
    fn behind_sequence(bytes: &Bytes<'_>, tokens: usize) -> Option<Self> {
        (0..2_usize << 20)
            .step_by(8)
            .filter_map(|back| Self::with_markers_until(bytes, tokens.checked_sub(back)?))
            .find(|names| tokens.checked_sub(names.count * 3).is_some())
    }

    /// The markers end at `end`, or up to seven bytes earlier.
    fn with_markers_until(bytes: &Bytes<'_>, end: usize) -> Option<Self> {
        let mut at = end.checked_sub(4)?;
        if bytes.u32(at)? == 0 {
            at = at.checked_sub(4)?;
        }
        let last = bytes.u32(at)? as usize;
        let mut markers = vec![last];
        let mut above = last;
        while above != 0 {
            at = at.checked_sub(4)?;
            let marker = bytes.u32(at)? as usize;
            // A marker stands for 256 names of at least two bytes and at most 514.
            if above
                .checked_sub(marker)
                .is_none_or(|d| !(512..=256 * 514).contains(&d))
            {
                return None;
            }
            markers.push(marker);
            above = marker;
        }
        markers.reverse();
        if markers.len() < 4 {
            return None;
        }
        Self::before(bytes, at, &markers)
    }

    /// The names end where the markers begin.
    fn before(bytes: &Bytes<'_>, markers_at: usize, markers: &[usize]) -> Option<Self> {
        let last = *markers.last()?;
        let highest = markers_at.checked_sub(last)? & !7;
        let lowest = highest.saturating_sub(256 * 514);
        let mut start = highest;
        while start > lowest.max(8) {
            let header = start - 8;
            let count = bytes.u32(header)? as usize;
            if count.div_ceil(256) == markers.len()
                && bytes.u32(header + 4) == Some(0)
                && Self::agree(bytes.0, start, markers)
            {
                return Some(Self {
                    header,
                    start,
                    count,
                });
            }
            start -= 8;
        }
        None
    }

    /// Whether every 256th name begins where its marker says.
    fn agree(image: &[u8], start: usize, markers: &[usize]) -> bool {
        let mut at = start;
        for marker in markers {
            if at - start != *marker {
                return false;
            }
            if Some(marker) == markers.last() {
                break;
            }
            for _ in 0..256 {
                let Some((len, skip)) = length(image, at) else {
                    return false;
                };
                at += len + skip;
            }
        }
        true
    }
}

/// The address of each symbol.
fn addresses(bytes: &Bytes<'_>, tokens: &Tokens<'_>, names: &Names) -> Option<Vec<u64>> {
    let size = (names.count * 4).next_multiple_of(8);
    let new = (
        tokens.end.next_multiple_of(8),
        tokens.end.next_multiple_of(8) + size,
    );
    let old = names
        .header
        .checked_sub(8)
        .and_then(|base| Some((base.checked_sub(size)?, base)));
    [Some(new), old]
        .into_iter()
        .flatten()
        .find_map(|(offsets, base)| at(bytes, names.count, offsets, base))
}

fn at(bytes: &Bytes<'_>, count: usize, offsets: usize, base: usize) -> Option<Vec<u64>> {
    const KERNEL: u64 = 0xffff_ffff_8000_0000;
    let base = bytes.u64(base).filter(|base| *base >= KERNEL)?;
    let raw: Option<Vec<u32>> = (0..count).map(|n| bytes.u32(offsets + n * 4)).collect();
    let raw = raw?;
    // CONFIG_KALLSYMS_ABSOLUTE_PERCPU: negative ones are relative, the others absolute.
    let negative = raw.iter().filter(|offset| **offset >> 31 != 0).count();
    let absolute_percpu = negative * 2 > count;
    let address = |offset: u32| match offset as i32 {
        relative if relative < 0 && absolute_percpu => base
            .wrapping_sub(1)
            .wrapping_sub(i64::from(relative) as u64),
        _ if absolute_percpu => u64::from(offset),
        _ => base.wrapping_add(u64::from(offset)),
    };
    Some(raw.into_iter().map(address).collect())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}
