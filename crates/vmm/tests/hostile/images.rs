//! Small images of every kind that the boot code takes.

use super::guest;

/// A 64-bit ELF, one with PVH's note, a bzImage, an initial RAM disk.
pub(crate) fn originals() -> Vec<Vec<u8>> {
    let loops = guest::elf(&[0xeb, 0xfe]);
    vec![
        loops.clone(),
        with_pvh_note(&loops),
        bzimage(&[]),
        bzimage(&packed(&loops)),
        b"070701".repeat(40),
    ]
}

/// An image that these bytes describe: as they stand, or one of the originals with changes, five
/// bytes each: where (two), what (two), and how.
pub(crate) fn from_bytes(bytes: &[u8]) -> Vec<u8> {
    let originals = originals();
    let Some((choice, rest)) = bytes.split_first() else {
        return Vec::new();
    };
    let Some(original) = originals.get(usize::from(*choice) % (originals.len() + 1)) else {
        return rest.to_vec();
    };
    let mut image = original.clone();
    for change in rest.chunks_exact(5) {
        let [a, b, c, d, how] = change else { continue };
        let at = usize::from(u16::from_le_bytes([*a, *b])) % image.len().max(1);
        let value = u16::from_le_bytes([*c, *d]);
        match how % 4 {
            0 => image.truncate(at.max(1)),
            1 => image[at] = *c,
            2 => put(&mut image, at, &value.to_le_bytes()),
            // The high half of a number of 64 bits, or all of one of 32.
            _ => put(
                &mut image,
                at,
                &(u32::from(value) << 16 | 0xffff).to_le_bytes(),
            ),
        }
    }
    image
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in image.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// A second program header, of a note that gives the 32-bit entry.
fn with_pvh_note(elf: &[u8]) -> Vec<u8> {
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    let mut image = elf[..HEADER + PROGRAM_HEADER].to_vec();
    image[56..58].copy_from_slice(&2_u16.to_le_bytes());
    let mut note = Vec::new();
    for word in [4, 4, XEN_ELFNOTE_PHYS32_ENTRY] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((guest::LOAD_AT as u32).to_le_bytes());
    let at = (HEADER + 2 * PROGRAM_HEADER) as u64;
    image.extend([4, 0, 0, 0, 4, 0, 0, 0]);
    for word in [at, 0, 0, note.len() as u64, note.len() as u64, 4] {
        image.extend(word.to_le_bytes());
    }
    // The code lies behind the note now.
    let code = &elf[HEADER + PROGRAM_HEADER..];
    image[HEADER + 8..HEADER + 16].copy_from_slice(&(at + note.len() as u64).to_le_bytes());
    image.extend(note);
    image.extend(code);
    image
}

/// As a kernel's build packs it: LZ4's legacy frame, and the length at the end.
fn packed(elf: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    // One block of literals: a token with 15, more length in bytes of 255, then the bytes.
    let mut block = vec![0xf0];
    let mut rest = elf.len() - 15;
    while rest >= 255 {
        block.push(255);
        rest -= 255;
    }
    block.push(rest as u8);
    block.extend(elf);
    payload.extend((block.len() as u32).to_le_bytes());
    payload.extend(block);
    payload.extend((elf.len() as u32).to_le_bytes());
    payload
}

/// One sector of setup, then code that loops at both entries, then the payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    const CODE: usize = 0x400;
    let mut code = [0xeb, 0xfe].repeat(CODE / 2);
    code.extend(payload);
    code.resize(code.len().next_multiple_of(16), 0);
    let mut image = vec![0; 2 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(code.len() as u32 / 16).to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &[1]);
    put(0x248, &(CODE as u32).to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x20_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    image.extend(code);
    image
}
