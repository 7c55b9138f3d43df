//! Console (virtio 1.2, 5.3) with one port: queue 0 to the guest, queue 1 from it.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    sync::{Arc, Mutex, Weak},
};

use super::{Chain, DeviceType, ProtocolError, Queues, Service, Step, VirtioDevice};
use crate::lock;

const QUEUE_SIZES: [u16; 2] = [64, 64];
/// The queue by which the guest receives.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CHUNK: usize = 4096;

/// What was typed and not yet taken. Whoever pushes has queue 0 serviced, too.
#[derive(Clone, Default)]
pub struct Inbox {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    /// The device, once it is part of a machine.
    service: Arc<Mutex<Option<Weak<dyn Service>>>>,
}

impl Inbox {
    /// Input beyond this is dropped: the guest is not reading.
    const MOST: usize = 1 << 20;

    /// Adds input for the guest.
    pub fn push(&self, input: &[u8]) {
        {
            let mut bytes = lock(&self.bytes);
            let room = Self::MOST.saturating_sub(bytes.len());
            bytes.extend(&input[..input.len().min(room)]);
        }
        let service = lock(&self.service).as_ref().and_then(Weak::upgrade);
        if let Some(service) = service {
            service.service(RECEIVE);
        }
    }
}

/// The device.
pub struct Console {
    inbox: Inbox,
    out: Box<dyn Write + Send>,
}

impl Console {
    /// A console that reads from `inbox` and writes to `out`.
    pub fn new(inbox: Inbox, out: Box<dyn Write + Send>) -> Self {
        Self { inbox, out }
    }

    fn receive(&mut self, chain: &Chain<'_>) -> Result<Step, ProtocolError> {
        let mut bytes = lock(&self.inbox.bytes);
        if bytes.is_empty() {
            return Ok(Step::Later);
        }
        let mut writer = chain.writer()?;
        let len = writer.available_bytes().min(bytes.len());
        let input: Vec<u8> = bytes.drain(..len).collect();
        writer
            .write_all(&input)
            .map_err(|_| ProtocolError::Request("a receive buffer that takes nothing"))?;
        Ok(Step::Done(len as u32))
    }

    fn transmit(&mut self, chain: &Chain<'_>) -> Result<Step, ProtocolError> {
        let mut reader = chain.reader()?;
        let mut chunk = [0; CHUNK];
        while let Ok(len @ 1..) = reader.read(&mut chunk) {
            if let Err(error) = self.out.write_all(&chunk[..len]) {
                tracing::debug!(%error, "console output was lost");
            }
        }
        // Output that can't be shown is lost, as on a terminal that is switched off.
        let _ = self.out.flush();
        Ok(Step::Done(0))
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn connect(&mut self, service: Weak<dyn Service>) {
        *lock(&self.inbox.service) = Some(service);
    }

    fn config(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn service(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), ProtocolError> {
        match queue {
            RECEIVE => queues.each(RECEIVE, |chain| self.receive(&chain)),
            TRANSMIT => queues.each(TRANSMIT, |chain| self.transmit(&chain)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, Driver, Sink};

    #[test]
    fn output_reaches_the_host() {
        let out = Sink::default();
        let console = Console::new(Inbox::default(), Box::new(out.clone()));
        let mut driver = Driver::start(Box::new(console));
        driver.offer(
            1,
            &[
                Buffer::Out(b"hello ".to_vec()),
                Buffer::Out(b"host".to_vec()),
            ],
        );
        driver.notify(1);
        assert_eq!(driver.used(1), Some(vec![]));
        assert_eq!(out.bytes(), b"hello host");
    }

    #[test]
    fn input_waits_for_buffers_and_buffers_wait_for_input() {
        let inbox = Inbox::default();
        let console = Console::new(inbox.clone(), Box::new(Sink::default()));
        let mut driver = Driver::start(Box::new(console));
        driver.offer(0, &[Buffer::In(4)]);
        driver.notify(0);
        assert_eq!(driver.used(0), None, "nothing was typed");
        let device: Arc<dyn Service> = driver.device.clone();
        driver.device.connect(&Arc::downgrade(&device));
        inbox.push(b"hello");
        assert_eq!(driver.used(0).unwrap(), b"hell");
        driver.offer(0, &[Buffer::In(4)]);
        driver.notify(0);
        assert_eq!(driver.used(0).unwrap(), b"o");
        assert_eq!(driver.msi.take().len(), 2);
    }
}
