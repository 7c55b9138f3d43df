//! Devices of a machine: serial, RTC, virtio.
