//! The kernel inside a bzImage, unpacked here rather than by the guest.
//!
//! A bzImage is a small program that unpacks an ELF image and jumps to it. Doing that on the host
//! saves the guest some hundred million instructions. What is lost is the choice of a random
//! address, which is that program's job: the kernel runs where it was linked.
//!
//! The header says where the payload lies (`Documentation/arch/x86/boot.rst`, `payload_offset`),
//! its first bytes say how it was packed, and its last four how long it is unpacked (the kernel's
//! build appends them; gzip has them in any case). A format that is not known here is left to the
//! guest.

use std::io::{self, Read};

use linux_loader::loader::bootparam::setup_header;
use ruzstd::decoding::StreamingDecoder;

const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// The ELF image in a bzImage of which `code` is the protected-mode part; `None` where it is packed
/// in a way that only the guest knows.
pub(super) fn unpack(header: &setup_header, code: &[u8]) -> Option<io::Result<Vec<u8>>> {
    let start = header.payload_offset as usize;
    let end = start.checked_add(header.payload_length as usize)?;
    let payload = code.get(start..end)?;
    let (rest, last) = payload.split_last_chunk::<4>()?;
    let size = u32::from_le_bytes(*last);
    // What it takes at run time holds the image.
    if size > header.init_size {
        return None;
    }
    let size = size as usize;
    if let Some(blocks) = rest.strip_prefix(LZ4_LEGACY) {
        Some(unpack_lz4(blocks, size))
    } else if payload.starts_with(GZIP) {
        Some(read_whole(flate2::read::GzDecoder::new(payload), size))
    } else if rest.starts_with(ZSTD) {
        let decoder = StreamingDecoder::new(rest).map_err(io::Error::other);
        Some(decoder.and_then(|decoder| read_whole(decoder, size)))
    } else {
        None
    }
}

/// Reads exactly `size` bytes.
fn read_whole(from: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut image = Vec::with_capacity(size);
    from.take(size as u64).read_to_end(&mut image)?;
    if image.len() == size {
        Ok(image)
    } else {
        Err(too_short(image.len(), size))
    }
}

fn too_short(got: usize, size: usize) -> io::Error {
    io::Error::other(format!("{got} bytes unpacked, and {size} promised"))
}

/// LZ4's legacy frame: blocks of a 32-bit length and so many bytes, each unpacked by itself.
fn unpack_lz4(mut blocks: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut image = vec![0; size];
    let mut done = 0;
    while let Some((len, rest)) = blocks.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let block = rest.get(..len).ok_or_else(|| too_short(done, size))?;
        let unpacked = lz4_flex::block::decompress_into(block, &mut image[done..]);
        done += unpacked.map_err(io::Error::other)?;
        blocks = &rest[len..];
    }
    if done == size {
        Ok(image)
    } else {
        Err(too_short(done, size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Something that packs well and is longer than one back-reference can reach.
    fn image() -> Vec<u8> {
        (0..300_000_u32)
            .flat_map(|i| (i / 7).to_le_bytes())
            .collect()
    }

    fn unpack_payload(payload: &[u8]) -> Option<io::Result<Vec<u8>>> {
        const OFFSET: u32 = 100;
        let mut code = vec![0; OFFSET as usize];
        code.extend(payload);
        let header = setup_header {
            payload_offset: OFFSET,
            payload_length: payload.len() as u32,
            init_size: 64 << 20,
            ..setup_header::default()
        };
        unpack(&header, &code)
    }

    fn lz4(image: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for block in image.chunks(8 << 20) {
            let packed = lz4_flex::block::compress(block);
            payload.extend((packed.len() as u32).to_le_bytes());
            payload.extend(packed);
        }
        payload.extend((image.len() as u32).to_le_bytes());
        payload
    }

    #[test]
    fn lz4_and_gzip_come_out_as_they_went_in() {
        let image = image();
        assert!(unpack_payload(&lz4(&image)).unwrap().unwrap() == image);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&image).unwrap();
        let gzip = gzip.finish().unwrap();
        assert!(unpack_payload(&gzip).unwrap().unwrap() == image);
    }

    #[test]
    fn zstd_comes_out_as_it_went_in() {
        let image = image();
        let mut payload = ruzstd::encoding::compress_to_vec(
            image.as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        payload.extend((image.len() as u32).to_le_bytes());
        assert!(unpack_payload(&payload).unwrap().unwrap() == image);
    }

    #[test]
    fn broken_payloads_are_errors_and_strange_ones_are_left_to_the_guest() {
        let whole = lz4(&image());
        for cut in [5, 9, 100, whole.len() / 2] {
            let mut broken = whole[..cut].to_vec();
            broken.extend(1_200_000_u32.to_le_bytes());
            assert!(unpack_payload(&broken).unwrap().is_err(), "cut at {cut}");
        }
        let mut wrong = whole.clone();
        wrong[5000] ^= 0x55;
        // Either an error or other bytes: never a panic.
        let _ = unpack_payload(&wrong);
        assert!(unpack_payload(b"\xfd7zXZ\0 and so on").is_none());
        assert!(unpack_payload(b"").is_none());
        let mut bomb = LZ4_LEGACY.to_vec();
        bomb.extend(u32::MAX.to_le_bytes());
        assert!(unpack_payload(&bomb).is_none());
    }
}
