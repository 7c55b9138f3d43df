//! A guest that writes garbage to every register of every device: no panic, no hang, and the
//! devices still answer afterwards.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use addr::{Gpa, GpaRange};
use devices::{
    IrqLine,
    bus::{Device, PortBus},
    cmos::{self, Cmos},
    pci::{
        PciRoot,
        msix::{MsiMessage, MsiSink},
        root::{CONFIG_PORT, CONFIG_PORTS, ECAM_SIZE},
    },
    pm::{self, AcpiPm},
    power::{KeyboardReset, PowerEvent, PowerSink},
    serial::{self, ComPort, Serial},
    virtio::{
        VirtioDevice,
        console::{Console, Inbox},
        pci::VirtioPci,
        rng::Rng,
    },
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Takes whatever devices send out.
#[derive(Default)]
struct World(AtomicUsize);

impl IrqLine for World {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl MsiSink for World {
    fn signal(&self, _: MsiMessage) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl PowerSink for World {
    fn request(&self, _: PowerEvent) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

const WINDOW: u64 = 0xc000_0000;
const ECAM: u64 = 0xe000_0000;
const RAM: usize = 1 << 20;

struct Machine {
    ports: PortBus,
    /// Start, length, device.
    mmio: Vec<(u64, u64, Arc<dyn Device>)>,
    memory: GuestMemoryMmap,
}

fn range(start: u64, len: u64) -> GpaRange {
    GpaRange::new(Gpa::new(start), len).unwrap()
}

fn machine() -> Machine {
    let world = Arc::new(World::default());
    let mut ports = PortBus::default();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    ports
        .add(cmos::PORT, cmos::LEN, Arc::new(Cmos::default()))
        .unwrap();
    ports
        .add(pm::PORT, pm::LEN, Arc::new(AcpiPm::new(world.clone())))
        .unwrap();
    let keyboard = Arc::new(KeyboardReset::new(world.clone()));
    ports.add(KeyboardReset::PORT, 1, keyboard).unwrap();
    let serial = Arc::new(Serial::new(world.clone(), Box::new(io::sink())));
    serial.receive(b"typed before");
    ports
        .add(ComPort::Com1.port(), serial::LEN, serial)
        .unwrap();
    let pci = Arc::new(PciRoot::new(range(WINDOW, 0x1000_0000), world.clone()));
    let console = Console::new(Inbox::default(), Box::new(io::sink()));
    let virtio: [Box<dyn VirtioDevice>; 2] = [Box::new(Rng::new().unwrap()), Box::new(console)];
    for device in virtio {
        let device = VirtioPci::new(device, memory.clone(), world.clone()).unwrap();
        pci.add(Arc::new(device)).unwrap();
    }
    ports
        .add(CONFIG_PORT, CONFIG_PORTS, pci.config_ports())
        .unwrap();
    let mmio = vec![
        (WINDOW, 0x1000_0000, pci.memory_window()),
        (ECAM, ECAM_SIZE, pci.ecam()),
    ];
    Machine {
        ports,
        mmio,
        memory,
    }
}

#[derive(Clone, Debug)]
enum Poke {
    PortWrite(u16, Vec<u8>),
    PortRead(u16, usize),
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Ram(u64, Vec<u8>),
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        0x60_u16..0x80,
        0x3f0_u16..0x400,
        0x5fc_u16..0x610,
        0xcf4_u16..0xd02,
        any::<u16>(),
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0_u64..3, 0_u64..0x100).prop_map(|(slot, at)| ECAM + slot * 0x8000 + at),
        (0_u64..2, 0_u64..0x8000).prop_map(|(slot, at)| WINDOW + slot * 0x8000 + at),
        (0_u64..2, 0_u64..0x38).prop_map(|(slot, at)| WINDOW + slot * 0x8000 + at),
        any::<u64>(),
    ]
}

fn poke() -> impl Strategy<Value = Poke> {
    let bytes = || {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..=8),
            proptest::sample::select(vec![1, 2, 4, 8]).prop_map(|len| vec![0xff; len]),
        ]
    };
    prop_oneof![
        (port(), bytes()).prop_map(|(at, data)| Poke::PortWrite(at, data)),
        (port(), 1..=8_usize).prop_map(|(at, len)| Poke::PortRead(at, len)),
        (address(), bytes()).prop_map(|(at, data)| Poke::Write(at, data)),
        (address(), 1..=8_usize).prop_map(|(at, len)| Poke::Read(at, len)),
        (0_u64..0x1_0000, bytes()).prop_map(|(at, data)| Poke::Ram(at, data)),
    ]
}

impl Machine {
    /// The device behind a guest physical address.
    fn decode(&self, at: u64) -> Option<(u64, &dyn Device)> {
        self.mmio.iter().find_map(|(start, len, device)| {
            let offset = at.checked_sub(*start).filter(|offset| offset < len)?;
            Some((offset, &**device))
        })
    }

    fn take(&self, poke: &Poke) {
        match poke {
            Poke::PortWrite(port, data) => self.ports.write(*port, data),
            Poke::PortRead(port, len) => self.ports.read(*port, &mut vec![0; *len]),
            Poke::Write(at, data) => {
                if let Some((offset, device)) = self.decode(*at) {
                    device.write(offset, data);
                }
            }
            Poke::Read(at, len) => {
                if let Some((offset, device)) = self.decode(*at) {
                    device.read(offset, &mut vec![0; *len]);
                }
            }
            Poke::Ram(at, data) => self.memory.write_slice(data, GuestAddress(*at)).unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn garbage_everywhere_leaves_a_machine_that_answers(
        pokes in proptest::collection::vec(poke(), 0..400)
    ) {
        let machine = machine();
        for poke in &pokes {
            machine.take(poke);
        }
        machine.ports.write(CONFIG_PORT, &0x8000_0000_u32.to_le_bytes());
        let mut identity = [0; 4];
        machine.ports.read(CONFIG_PORT + 4, &mut identity);
        prop_assert_eq!(u32::from_le_bytes(identity), 0x0008_1b36);
        let mut status = [0];
        machine.ports.read(cmos::PORT + 1, &mut status);
        machine.ports.read(ComPort::Com1.port() + 5, &mut status);
        prop_assert!(status[0] & 0x60 == 0x60, "the transmitter is always ready");
    }
}
