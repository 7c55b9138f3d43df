//! Block device (virtio 1.2, 5.2) on a raw image.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use thiserror::Error;
use virtio_queue::{Reader, Writer};

use super::{Chain, DeviceType, ProtocolError, Queues, Step, VirtioDevice};

/// Bytes of a sector, the unit of all addresses here.
pub const SECTOR: u64 = 512;

const QUEUE_SIZES: [u16; 1] = [256];
const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
/// A chain of 256 descriptors less header and status.
const SEGMENTS: u32 = 254;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const ID_BYTES: usize = 20;

/// Bytes that are carried between file and guest at a time.
const CHUNK: usize = 64 << 10;

/// The last byte of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Whether the guest may write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskAccess {
    /// It may.
    #[default]
    ReadWrite,
    /// It may not.
    ReadOnly,
}

/// An image that can't be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It can't be opened or measured.
    #[error("disk image {}: {cause}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It holds no sector, or part of one at its end.
    #[error(
        "disk image {}: {bytes} bytes are no whole number of {SECTOR}-byte sectors; \
         is the file truncated, or no raw image?", path.display()
    )]
    Size {
        /// Which.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Somebody else uses it.
    #[error(
        "disk image {}: in use by another process; give each machine its own copy, or attach it \
         `,readonly` everywhere", path.display()
    )]
    InUse {
        /// Which.
        path: PathBuf,
    },
}

/// A raw image: sector `n` lies at byte `512 n`.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    sectors: u64,
    access: DiskAccess,
}

impl RawImage {
    /// Opens and locks it: one writer, or any number of readers.
    pub fn open(path: &Path, access: DiskAccess) -> Result<Self, DiskError> {
        let path_of = || path.to_owned();
        let writable = access == DiskAccess::ReadWrite;
        let file = OpenOptions::new().read(true).write(writable).open(path);
        let mut file = file.map_err(|cause| DiskError::Open {
            path: path_of(),
            cause,
        })?;
        let locked = if writable {
            file.try_lock()
        } else {
            file.try_lock_shared()
        };
        locked.map_err(|_| DiskError::InUse { path: path_of() })?;
        // A block device has no length in its metadata; both have an end.
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0));
        let bytes = bytes.map_err(|cause| DiskError::Open {
            path: path_of(),
            cause,
        })?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size {
                path: path_of(),
                bytes,
            });
        }
        Ok(Self {
            file,
            sectors: bytes / SECTOR,
            access,
        })
    }
}

/// The device.
pub struct Block {
    image: RawImage,
    id: [u8; ID_BYTES],
    chunk: Vec<u8>,
}

impl Block {
    /// A device on `image`, which the guest sees with the serial number `id` (at most 20 bytes).
    pub fn new(image: RawImage, id: &str) -> Self {
        let mut serial = [0; ID_BYTES];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            image,
            id: serial,
            chunk: vec![0; CHUNK],
        }
    }

    fn handle(&mut self, chain: &Chain<'_>) -> Result<Step, ProtocolError> {
        let mut reader = chain.reader()?;
        let mut data = chain.writer()?;
        let room = data.available_bytes();
        let before_status = room
            .checked_sub(1)
            .ok_or(ProtocolError::Request("no room for the status byte"))?;
        let mut status_byte = data
            .split_at(before_status)
            .map_err(|_| ProtocolError::Request("no room for the status byte"))?;
        let mut header = [0; 16];
        reader
            .read_exact(&mut header)
            .map_err(|_| ProtocolError::Request("a header of fewer than 16 bytes"))?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap_or_default());
        let status = match kind {
            TYPE_IN => self.read(sector, &mut data),
            TYPE_OUT => self.write(sector, &mut reader),
            TYPE_FLUSH => self.image.file.sync_data().map(|()| Status::Ok),
            TYPE_GET_ID => data.write_all(&self.id).map(|()| Status::Ok),
            _ => Ok(Status::Unsupported),
        };
        let status = status.unwrap_or_else(|error| {
            tracing::warn!(%error, kind, sector, "a disk request failed");
            Status::IoError
        });
        // "At least this many from the first on": after a failure, none.
        let written = match status {
            Status::Ok => data.bytes_written() as u32 + 1,
            Status::IoError | Status::Unsupported => 0,
        };
        status_byte
            .write_all(&[status as u8])
            .map_err(|_| ProtocolError::Request("no room for the status byte"))?;
        Ok(Step::Done(written))
    }

    fn read(&mut self, sector: u64, to: &mut Writer<'_>) -> io::Result<Status> {
        let mut at = self.place(sector, to.available_bytes())?;
        while to.available_bytes() > 0 {
            let len = to.available_bytes().min(CHUNK);
            let chunk = &mut self.chunk[..len];
            self.image.file.read_exact_at(chunk, at)?;
            to.write_all(chunk)?;
            at += len as u64;
        }
        Ok(Status::Ok)
    }

    fn write(&mut self, sector: u64, from: &mut Reader<'_>) -> io::Result<Status> {
        if self.image.access == DiskAccess::ReadOnly {
            return Ok(Status::IoError);
        }
        let mut at = self.place(sector, from.available_bytes())?;
        while from.available_bytes() > 0 {
            let len = from.available_bytes().min(CHUNK);
            let chunk = &mut self.chunk[..len];
            from.read_exact(chunk)?;
            self.image.file.write_all_at(chunk, at)?;
            at += len as u64;
        }
        Ok(Status::Ok)
    }

    /// The byte at which `len` bytes from `sector` begin, where all of them are on the disk.
    fn place(&self, sector: u64, len: usize) -> io::Result<u64> {
        let size = self.image.sectors * SECTOR;
        sector
            .checked_mul(SECTOR)
            .filter(|at| at.checked_add(len as u64).is_some_and(|end| end <= size))
            .filter(|_| (len as u64).is_multiple_of(SECTOR))
            .ok_or_else(|| io::Error::other(format!("{len} bytes at sector {sector} of {size}")))
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let read_only = match self.image.access {
            DiskAccess::ReadOnly => FEATURE_READ_ONLY,
            DiskAccess::ReadWrite => 0,
        };
        FEATURE_SEG_MAX | FEATURE_BLOCK_SIZE | FEATURE_FLUSH | read_only
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 0x18];
        config[0x00..0x08].copy_from_slice(&self.image.sectors.to_le_bytes());
        config[0x0c..0x10].copy_from_slice(&SEGMENTS.to_le_bytes());
        config[0x14..0x18].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config
    }

    fn service(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), ProtocolError> {
        queues.each(queue, |chain| self.handle(&chain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, Driver};

    const OK: u8 = Status::Ok as u8;
    const IO_ERROR: u8 = Status::IoError as u8;

    fn image(name: &str, bytes: &[u8]) -> PathBuf {
        let name = format!("fourfold-blk-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn start(path: &Path, access: DiskAccess) -> Driver {
        let image = RawImage::open(path, access).unwrap();
        Driver::start(Box::new(Block::new(image, "serial-1")))
    }

    fn header(kind: u32, sector: u64) -> Buffer {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        Buffer::Out(bytes)
    }

    fn request(driver: &mut Driver, buffers: &[Buffer]) -> Vec<u8> {
        driver.offer(0, buffers);
        driver.notify(0);
        driver.used_whole(0).expect("an answer").0
    }

    fn read(driver: &mut Driver, sector: u64, len: usize) -> Vec<u8> {
        let buffers = [header(TYPE_IN, sector), Buffer::In(len), Buffer::In(1)];
        request(driver, &buffers)
    }

    fn write(driver: &mut Driver, sector: u64, data: Vec<u8>) -> Vec<u8> {
        let buffers = [header(TYPE_OUT, sector), Buffer::Out(data), Buffer::In(1)];
        request(driver, &buffers)
    }

    #[test]
    fn what_is_written_is_in_the_file_and_reads_back() {
        let path = image("round-trip", &[0; 4096]);
        let mut driver = start(&path, DiskAccess::ReadWrite);
        assert_eq!(driver.read::<8>(0x2000), 8_u64.to_le_bytes(), "capacity");
        assert_eq!(write(&mut driver, 3, vec![0xa5; 1024]), [OK]);
        let mut expected = vec![0xa5; 1024];
        expected.push(OK);
        assert_eq!(read(&mut driver, 3, 1024), expected);
        assert_eq!(std::fs::read(&path).unwrap()[1536..2560], [0xa5; 1024]);
        let flush = [header(TYPE_FLUSH, 0), Buffer::In(1)];
        assert_eq!(request(&mut driver, &flush), [OK]);
        let id = [header(TYPE_GET_ID, 0), Buffer::In(20), Buffer::In(1)];
        assert_eq!(&request(&mut driver, &id)[..9], b"serial-1\0");
        assert!(!driver.msi.take().is_empty(), "interrupts were sent");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn requests_over_the_end_or_against_a_read_only_disk_fail_and_change_nothing() {
        let path = image("limits", &[7; 1024]);
        let mut driver = start(&path, DiskAccess::ReadOnly);
        assert_eq!(write(&mut driver, 0, vec![0; 512]), [IO_ERROR]);
        for sector in [1, 2, u64::MAX, u64::MAX / 512 + 1] {
            assert_eq!(read(&mut driver, sector, 1024).last(), Some(&IO_ERROR));
        }
        assert_eq!(read(&mut driver, 0, 100).last(), Some(&IO_ERROR));
        let unknown = [header(99, 0), Buffer::In(1)];
        assert_eq!(request(&mut driver, &unknown), [Status::Unsupported as u8]);
        assert_eq!(std::fs::read(&path).unwrap(), [7; 1024]);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn an_image_cut_under_a_running_guest_gives_io_errors() {
        let path = image("cut", &[7; 4096]);
        let mut driver = start(&path, DiskAccess::ReadWrite);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(512)
            .unwrap();
        assert_eq!(read(&mut driver, 4, 512).last(), Some(&IO_ERROR));
        assert_eq!(read(&mut driver, 0, 512).last(), Some(&OK));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_request_without_header_or_status_stops_the_device() {
        let path = image("malformed", &[0; 512]);
        for buffers in [
            vec![Buffer::Out(vec![0; 4]), Buffer::In(1)],
            vec![Buffer::Out(vec![0; 16])],
        ] {
            let mut driver = start(&path, DiskAccess::ReadWrite);
            driver.offer(0, &buffers);
            driver.notify(0);
            assert_eq!(driver.used(0), None);
            assert_eq!(driver.status() & 64, 64, "DEVICE_NEEDS_RESET");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn broken_images_say_what_is_wrong() {
        let path = image("odd", &[0; 700]);
        let error = RawImage::open(&path, DiskAccess::ReadWrite).unwrap_err();
        assert!(error.to_string().contains("700 bytes"), "{error}");
        std::fs::write(&path, [0; 512]).unwrap();
        let _first = RawImage::open(&path, DiskAccess::ReadWrite).unwrap();
        let error = RawImage::open(&path, DiskAccess::ReadOnly).unwrap_err();
        assert!(error.to_string().contains("in use"), "{error}");
        std::fs::remove_file(&path).unwrap();
        let error = RawImage::open(&path, DiskAccess::ReadOnly).unwrap_err();
        assert!(matches!(error, DiskError::Open { .. }));
    }
}
