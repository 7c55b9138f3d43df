//! The queues of one device, as it sees them while it is being serviced.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::GuestMemoryMmap;

use super::ProtocolError;

/// A chain of buffers that the driver made available.
pub struct Chain<'m> {
    descriptors: DescriptorChain<&'m GuestMemoryMmap>,
    memory: &'m GuestMemoryMmap,
    queue: usize,
}

impl<'m> Chain<'m> {
    /// What the driver wrote for the device.
    pub fn reader(&self) -> Result<Reader<'m>, ProtocolError> {
        let reader = self.descriptors.clone().reader(self.memory);
        reader.map_err(|cause| self.broken(cause))
    }

    /// Where the device is to write.
    pub fn writer(&self) -> Result<Writer<'m>, ProtocolError> {
        let writer = self.descriptors.clone().writer(self.memory);
        writer.map_err(|cause| self.broken(cause))
    }

    fn broken(&self, cause: virtio_queue::Error) -> ProtocolError {
        let queue = self.queue;
        ProtocolError::Queue { queue, cause }
    }
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It goes back to the driver, with this many bytes written.
    Done(u32),
    /// The device has nothing for it now: it stays available, and the loop ends.
    Later,
}

/// All queues of one device.
pub struct Queues<'a> {
    rings: &'a mut [Queue],
    memory: &'a GuestMemoryMmap,
    /// The queues whose driver wants an interrupt.
    interrupts: u64,
}

impl<'a> Queues<'a> {
    pub(super) fn new(rings: &'a mut [Queue], memory: &'a GuestMemoryMmap) -> Self {
        Self {
            rings,
            memory,
            interrupts: 0,
        }
    }

    /// Whether the driver has enabled `queue`.
    pub fn is_ready(&self, queue: usize) -> bool {
        self.rings.get(queue).is_some_and(QueueT::ready)
    }

    /// Gives every available chain of `queue` to `handle`, until there is none left or it says
    /// [`Step::Later`]. Notifications are off meanwhile, and one that comes between the last chain
    /// and turning them on again is not lost.
    pub fn each(
        &mut self,
        queue: usize,
        mut handle: impl FnMut(Chain<'_>) -> Result<Step, ProtocolError>,
    ) -> Result<(), ProtocolError> {
        if !self.is_ready(queue) {
            return Ok(());
        }
        let broken = |cause| ProtocolError::Queue { queue, cause };
        let memory = self.memory;
        let ring = &mut self.rings[queue];
        let mut used_any = false;
        loop {
            let mut waiting = false;
            let mut handled = 0;
            ring.disable_notification(memory).map_err(broken)?;
            while let Some(chain) = ring.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                let step = handle(Chain {
                    descriptors: chain,
                    memory,
                    queue,
                })?;
                match step {
                    Step::Done(len) => ring.add_used(memory, head, len).map_err(broken)?,
                    Step::Later => {
                        ring.go_to_previous_position();
                        waiting = true;
                        break;
                    }
                }
                handled += 1;
            }
            used_any |= handled > 0;
            let more = ring.enable_notification(memory).map_err(broken)?;
            if waiting || !more {
                break;
            }
            if handled == 0 {
                // The index says that there is more than the ring can hold.
                return Err(broken(virtio_queue::Error::InvalidAvailRingIndex));
            }
        }
        if used_any && ring.needs_notification(memory).map_err(broken)? {
            self.interrupts |= 1 << queue;
        }
        Ok(())
    }

    /// The queues that want an interrupt, a bit each.
    pub(super) fn interrupts(&self) -> u64 {
        self.interrupts
    }
}
