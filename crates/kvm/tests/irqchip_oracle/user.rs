//! Ours, operated the same way.

use std::sync::Arc;

use addr::Gpa;
use cpu::Handled;
use kvm::clock::time::GuestTsc;
use kvm::irqchip::apic::{ApicFeatures, Cmci, Lapic, Role};
use kvm::irqchip::chip::{Irqchip, Vcpus};
use kvm::irqchip::ioapic::LineStatus;
use kvm::irqchip::wake::VcpuWake;
use kvm_bindings::kvm_irqchip;

pub(crate) struct User {
    pub(crate) chip: Irqchip,
    pub(crate) lapics: Vec<Arc<Lapic>>,
}

pub(crate) struct Nobody;

impl VcpuWake for Nobody {
    fn interrupt(&self) {}
    fn request(&self) {}
}

impl User {
    pub(crate) fn new(vcpus: u32) -> User {
        let chip = Irqchip::new().unwrap();
        chip.create(Vcpus::None).unwrap();
        let lapics = (0..vcpus).map(|id| {
            let role = if id == 0 {
                Role::Bootstrap
            } else {
                Role::Application
            };
            let tsc = Arc::new(GuestTsc::new(1_000_000));
            let lapic = chip.add_vcpu(id, role, Arc::new(Nobody), tsc).unwrap();
            lapic.set_cmci(Cmci::Absent);
            lapic.set_features(ApicFeatures {
                x2apic: true,
                tsc_deadline: true,
                physical_bits: 40,
            });
            lapic
        });
        let lapics = lapics.collect();
        User { chip, lapics }
    }

    pub(crate) fn read_port(&self, port: u16) -> u8 {
        let mut byte = [0xff];
        assert_eq!(self.chip.read_port(port, &mut byte), Handled::Yes);
        byte[0]
    }

    pub(crate) fn write_port(&self, port: u16, value: u8) {
        assert_eq!(self.chip.write_port(port, &[value]), Handled::Yes);
    }

    pub(crate) fn read_memory(&self, address: u32) -> u32 {
        let (lapic, mut bytes) = (&self.lapics[0], [0; 4]);
        let gpa = Gpa::new(u64::from(address));
        assert_eq!(
            self.chip.read_memory(Some(lapic), gpa, &mut bytes),
            Handled::Yes
        );
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write_memory(&self, address: u32, value: u32) {
        let gpa = Gpa::new(u64::from(address));
        let handled = self
            .chip
            .write_memory(Some(&self.lapics[0]), gpa, &value.to_le_bytes());
        assert_eq!(handled, Handled::Yes);
    }

    pub(crate) fn take_interrupt(&self) -> Option<u8> {
        let lapic = &self.lapics[0];
        if self.chip.has_interrupt(lapic) {
            self.chip.acknowledge(lapic)
        } else {
            None
        }
    }

    pub(crate) fn line(&self, gsi: u32, level: u32) -> i32 {
        self.chip.irq_line(gsi, level, LineStatus::Wanted).unwrap()
    }

    pub(crate) fn chip(&self, chip_id: u32) -> kvm_irqchip {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.chip.controllers().state(&mut chip).unwrap();
        chip
    }
}
