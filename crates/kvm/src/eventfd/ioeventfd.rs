//! `KVM_IOEVENTFD`: a write to a port or an address becomes an event (api.rst, 4.59).

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};

use cpu::Handled;
use kvm_bindings::kvm_ioeventfd;

use crate::bus::{Counted, IoBus, IoDevice};
use crate::errno::Errno;

use super::handle::EventHandle;

const DATAMATCH: u32 = 1;
const PIO: u32 = 1 << 1;
const DEASSIGN: u32 = 1 << 2;
/// A channel subsystem's notification, which only s390 has, and which x86 does not refuse.
const CCW: u32 = 1 << 3;
/// Also the flag of fast MMIO, which no kernel looks at.
const VALID: u32 = 0x1f;

/// Which bus an ioeventfd listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    Ports,
    Memory,
    Nowhere,
}

impl Where {
    fn of(flags: u32) -> Where {
        if flags & PIO != 0 {
            Where::Ports
        } else if flags & CCW != 0 {
            Where::Nowhere
        } else {
            Where::Memory
        }
    }
}

struct Ioeventfd {
    bus: Where,
    address: u64,
    /// 0: any.
    length: u32,
    /// `None`: any.
    data: Option<u64>,
    event: EventHandle,
}

fn value(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len().min(8)].copy_from_slice(&data[..data.len().min(8)]);
    u64::from_le_bytes(bytes)
}

impl Ioeventfd {
    fn takes(&self, address: u64, data: &[u8]) -> bool {
        address == self.address
            && (self.length == 0
                || data.len() == self.length as usize
                    && self.data.is_none_or(|wanted| wanted == value(data)))
    }

    fn collides(&self, other: &Ioeventfd) -> bool {
        self.bus == other.bus
            && self.address == other.address
            && (self.length == 0
                || other.length == 0
                || self.length == other.length
                    && (self.data.is_none() || other.data.is_none() || self.data == other.data))
    }

    fn is(&self, other: &Ioeventfd) -> bool {
        self.bus == other.bus
            && self.event.is_same(&other.event)
            && (self.address, self.length, self.data) == (other.address, other.length, other.data)
    }
}

impl IoDevice for Ioeventfd {
    fn write(&self, address: u64, data: &[u8]) -> Handled {
        if !self.takes(address, data) {
            return Handled::No;
        }
        self.event.signal();
        Handled::Yes
    }
}

/// An ioeventfd, and the same as its bus knows it.
type Registered = (Arc<Ioeventfd>, Arc<dyn IoDevice>);

/// The ioeventfds of a VM.
#[derive(Default)]
pub struct Ioeventfds(Mutex<Vec<Registered>>);

impl Ioeventfds {
    /// `KVM_IOEVENTFD`.
    pub fn control(
        &self,
        request: &kvm_ioeventfd,
        ports: &IoBus,
        memory: &IoBus,
    ) -> Result<(), Errno> {
        let deassign = request.flags & DEASSIGN != 0;
        if !deassign {
            check(request)?;
        }
        let wanted = Ioeventfd {
            bus: Where::of(request.flags),
            address: request.addr,
            length: request.len,
            data: (request.flags & DATAMATCH != 0).then_some(request.datamatch),
            event: EventHandle::new(request.fd as RawFd)?,
        };
        let bus = match wanted.bus {
            Where::Ports => Some(ports),
            Where::Memory => Some(memory),
            Where::Nowhere => None,
        };
        if deassign {
            self.deassign(&wanted, bus)
        } else {
            self.assign(wanted, bus)
        }
    }

    fn assign(&self, wanted: Ioeventfd, bus: Option<&IoBus>) -> Result<(), Errno> {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if list.iter().any(|(other, _)| other.collides(&wanted)) {
            return Err(Errno::EEXIST);
        }
        let (start, length) = (wanted.address, u64::from(wanted.length));
        let wanted = Arc::new(wanted);
        let device: Arc<dyn IoDevice> = wanted.clone();
        if let Some(bus) = bus {
            bus.add(start, length, Counted::No, Arc::clone(&device))?;
        }
        list.push((wanted, device));
        Ok(())
    }

    fn deassign(&self, wanted: &Ioeventfd, bus: Option<&IoBus>) -> Result<(), Errno> {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = list
            .iter()
            .position(|(other, _)| other.is(wanted))
            .ok_or(Errno::ENOENT)?;
        let (_, device) = list.remove(at);
        if let Some(bus) = bus {
            bus.remove(&device);
        }
        Ok(())
    }
}

fn check(request: &kvm_ioeventfd) -> Result<(), Errno> {
    let sized = matches!(request.len, 0 | 1 | 2 | 4 | 8);
    let wraps = request.addr.checked_add(u64::from(request.len)).is_none();
    let unsized_match = request.len == 0 && request.flags & DATAMATCH != 0;
    if !sized || wraps || request.flags & !VALID != 0 || unsized_match {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    struct Bench {
        event: EventFd,
        list: Ioeventfds,
        ports: IoBus,
        memory: IoBus,
    }

    impl Bench {
        fn new() -> Bench {
            Bench {
                event: EventFd::new(EFD_NONBLOCK).unwrap(),
                list: Ioeventfds::default(),
                ports: IoBus::default(),
                memory: IoBus::default(),
            }
        }

        fn control(&self, addr: u64, len: u32, datamatch: u64, flags: u32) -> Result<(), Errno> {
            let fd = self.event.as_raw_fd();
            let request = kvm_ioeventfd {
                addr,
                len,
                datamatch,
                flags,
                fd,
                ..Default::default()
            };
            self.list.control(&request, &self.ports, &self.memory)
        }

        fn hits(&self, bus: &IoBus, address: u64, data: &[u8]) -> bool {
            let handled = bus.write(address, data) == Handled::Yes;
            assert_eq!(self.event.read().is_ok(), handled);
            handled
        }
    }

    #[test]
    fn address_length_and_data_must_match() {
        let b = Bench::new();
        b.control(0x1000, 4, 7, DATAMATCH).unwrap();
        b.control(0x1000, 4, 8, DATAMATCH).unwrap();
        b.control(0x1000, 2, 0, 0).unwrap();
        b.control(0x3f8, 1, 0, PIO).unwrap();
        assert!(b.hits(&b.memory, 0x1000, &[7, 0, 0, 0]));
        assert!(!b.hits(&b.memory, 0x1000, &[9, 0, 0, 0]));
        assert!(b.hits(&b.memory, 0x1000, &[9, 9]));
        assert!(!b.hits(&b.memory, 0x1000, &[9]));
        assert!(b.hits(&b.ports, 0x3f8, &[1]));
        assert!(!b.hits(&b.memory, 0x3f8, &[1]));
    }

    #[test]
    fn without_a_length_every_write_hits() {
        let b = Bench::new();
        b.control(0x2000, 0, 0, 0).unwrap();
        assert!(b.hits(&b.memory, 0x2000, &[0; 8]));
        assert!(!b.hits(&b.memory, 0x2001, &[0]));
        assert_eq!(b.control(0x2000, 4, 1, DATAMATCH), Err(Errno::EEXIST));
    }

    #[test]
    fn bad_requests() {
        let b = Bench::new();
        assert_eq!(b.control(0, 3, 0, 0), Err(Errno::EINVAL));
        assert_eq!(b.control(u64::MAX, 1, 0, 0), Err(Errno::EINVAL));
        assert_eq!(b.control(0, 1, 0, 1 << 5), Err(Errno::EINVAL));
        assert_eq!(b.control(0, 0, 0, DATAMATCH), Err(Errno::EINVAL));
        assert_eq!(b.control(0, 4, 0, DEASSIGN), Err(Errno::ENOENT));
    }

    #[test]
    fn deassigned_means_gone() {
        let b = Bench::new();
        b.control(0x10, 1, 0, PIO).unwrap();
        assert_eq!(b.control(0x10, 1, 0, PIO), Err(Errno::EEXIST));
        b.control(0x10, 1, 0, PIO | DEASSIGN).unwrap();
        assert!(!b.hits(&b.ports, 0x10, &[0]));
        b.control(0x10, 1, 0, PIO).unwrap();
    }
}
