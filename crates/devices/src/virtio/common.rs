//! The common configuration structure (virtio 1.2, 4.1.4.3): negotiation and the set-up of queues.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};

const NO_VECTOR: u16 = 0xffff;
const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

/// What a write brought about, for the rest of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing beyond the registers.
    None,
    /// The device was reset.
    Reset,
    /// The driver set `DRIVER_OK`.
    Ready,
    /// The driver set `DRIVER_OK` with queues that make no sense.
    Broken,
}

/// The registers.
pub(super) struct Common {
    queues: Vec<Queue>,
    vectors: Vec<u16>,
    config_vector: u16,
    status: u8,
    device_features: u64,
    driver_features: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
}

impl Common {
    /// Registers for queues of at most `sizes` and a device that offers `features`.
    pub(super) fn new(sizes: &[u16], features: u64) -> Result<Self, virtio_queue::Error> {
        let queues = sizes.iter().map(|size| Queue::new(*size));
        let transport = FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX;
        Ok(Self {
            queues: queues.collect::<Result<_, _>>()?,
            vectors: vec![NO_VECTOR; sizes.len()],
            config_vector: NO_VECTOR,
            status: 0,
            device_features: features | transport,
            driver_features: 0,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
        })
    }

    pub(super) fn queues_mut(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    pub(super) fn queue_vector(&self, queue: usize) -> u16 {
        self.vectors.get(queue).copied().unwrap_or(NO_VECTOR)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    pub(super) fn driver_features(&self) -> u64 {
        self.driver_features
    }

    /// Whether queues may be touched.
    pub(super) fn is_running(&self) -> bool {
        self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK
    }

    pub(super) fn set_needs_reset(&mut self) {
        self.status |= STATUS_NEEDS_RESET;
    }

    /// Reads at `offset`, any width.
    pub(super) fn read(&self, offset: u64, vectors: u16, data: &mut [u8]) {
        let image = self.image(vectors);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = image.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn image(&self, vectors: u16) -> [u8; 0x38] {
        let mut image = [0; 0x38];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_select.to_le_bytes());
        put(
            0x04,
            &half(self.device_features, self.device_select).to_le_bytes(),
        );
        put(0x08, &self.driver_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_select).to_le_bytes(),
        );
        put(0x10, &existing(self.config_vector, vectors).to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status]);
        put(0x16, &self.queue_select.to_le_bytes());
        let selected = usize::from(self.queue_select);
        if let Some(queue) = self.queues.get(selected) {
            put(0x18, &queue.size().to_le_bytes());
            put(
                0x1a,
                &existing(self.vectors[selected], vectors).to_le_bytes(),
            );
            put(0x1c, &u16::from(queue.ready()).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.desc_table().to_le_bytes());
            put(0x28, &queue.avail_ring().to_le_bytes());
            put(0x30, &queue.used_ring().to_le_bytes());
        }
        image
    }

    /// Writes at `offset`; widths that the specification does not allow are ignored.
    pub(super) fn write(
        &mut self,
        memory: &GuestMemoryMmap,
        offset: u64,
        vectors: u16,
        data: &[u8],
    ) -> Change {
        match *data {
            [byte] if offset == 0x14 => return self.write_status(memory, byte),
            [low, high] => self.write_u16(offset, vectors, u16::from_le_bytes([low, high])),
            [_, _, _, _] => self.write_u32(offset, word(data)),
            // The three queue addresses may be written whole.
            [_, _, _, _, _, _, _, _] if matches!(offset, 0x20 | 0x28 | 0x30) => {
                self.write_u32(offset, word(data));
                self.write_u32(offset + 4, word(&data[4..]));
            }
            _ => {}
        }
        Change::None
    }

    fn write_u16(&mut self, offset: u64, vectors: u16, value: u16) {
        let selected = usize::from(self.queue_select);
        match offset {
            0x10 => self.config_vector = existing(value, vectors),
            0x16 => self.queue_select = value,
            0x1a => {
                if let Some(vector) = self.vectors.get_mut(selected) {
                    *vector = existing(value, vectors);
                }
            }
            0x18 => self.configure(|queue| queue.set_size(value)),
            0x1c if value == 1 => self.configure(|queue| queue.set_ready(true)),
            _ => {}
        }
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.device_select = value,
            0x08 => self.driver_select = value,
            0x0c => self.write_features(value),
            0x20 => self.configure(|queue| queue.set_desc_table_address(Some(value), None)),
            0x24 => self.configure(|queue| queue.set_desc_table_address(None, Some(value))),
            0x28 => self.configure(|queue| queue.set_avail_ring_address(Some(value), None)),
            0x2c => self.configure(|queue| queue.set_avail_ring_address(None, Some(value))),
            0x30 => self.configure(|queue| queue.set_used_ring_address(Some(value), None)),
            0x34 => self.configure(|queue| queue.set_used_ring_address(None, Some(value))),
            _ => {}
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Changes the selected queue, which may only be done before it is enabled.
    fn configure(&mut self, change: impl FnOnce(&mut Queue)) {
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !queue.ready()
        {
            change(queue);
        }
    }

    fn write_status(&mut self, memory: &GuestMemoryMmap, value: u8) -> Change {
        if value == 0 {
            self.reset();
            return Change::Reset;
        }
        let was_ok = self.status & STATUS_DRIVER_OK != 0;
        let mut value = value | self.status & STATUS_NEEDS_RESET;
        if value & STATUS_FEATURES_OK != 0 && !self.features_acceptable() {
            value &= !STATUS_FEATURES_OK;
        }
        if value & STATUS_FEATURES_OK == 0 {
            value &= !STATUS_DRIVER_OK;
        }
        self.status = value;
        if was_ok || value & STATUS_DRIVER_OK == 0 {
            return Change::None;
        }
        let event_idx = self.driver_features & FEATURE_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
        }
        let valid = self.queues.iter().all(|q| !q.ready() || q.is_valid(memory));
        if valid { Change::Ready } else { Change::Broken }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device_features == 0
            && self.driver_features & FEATURE_VERSION_1 != 0
    }

    fn reset(&mut self) {
        for queue in &mut self.queues {
            queue.reset();
        }
        self.vectors.fill(NO_VECTOR);
        self.config_vector = NO_VECTOR;
        self.status = 0;
        self.driver_features = 0;
        self.device_select = 0;
        self.driver_select = 0;
        self.queue_select = 0;
    }
}

/// The doubleword at the start of `data`, which holds one.
fn word(data: &[u8]) -> u32 {
    data.first_chunk()
        .map_or(0, |word| u32::from_le_bytes(*word))
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn existing(vector: u16, vectors: u16) -> u16 {
    if vector < vectors { vector } else { NO_VECTOR }
}
