//! Entropy source (virtio 1.2, 5.4): the host's `/dev/urandom`.

use std::{
    fs::File,
    io::{self, Read, Write},
};

use super::{Chain, DeviceType, ProtocolError, Queues, Step, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];
/// Enough for any driver; a longer buffer is answered in part, as the specification allows.
const MOST: usize = 4096;

/// The device.
pub struct Rng {
    source: File,
}

impl Rng {
    /// Opens the host's source.
    pub fn new() -> io::Result<Self> {
        let source = File::open("/dev/urandom")?;
        Ok(Self { source })
    }

    fn fill(&mut self, chain: &Chain<'_>) -> Result<Step, ProtocolError> {
        let mut writer = chain.writer()?;
        let mut bytes = [0; MOST];
        let len = writer.available_bytes().min(MOST);
        let filled = self
            .source
            .read_exact(&mut bytes[..len])
            .and_then(|()| writer.write_all(&bytes[..len]));
        if let Err(error) = filled {
            tracing::warn!(%error, "no entropy for the guest");
        }
        Ok(Step::Done(writer.bytes_written() as u32))
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn service(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), ProtocolError> {
        queues.each(queue, |chain| self.fill(&chain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, Driver};

    #[test]
    fn buffers_come_back_filled() {
        let mut driver = Driver::start(Box::new(Rng::new().unwrap()));
        driver.offer(0, &[Buffer::In(100), Buffer::In(28)]);
        driver.notify(0);
        let bytes = driver.used(0).unwrap();
        assert_eq!(bytes.len(), 128);
        assert_ne!(bytes[..64], bytes[64..]);
    }
}
