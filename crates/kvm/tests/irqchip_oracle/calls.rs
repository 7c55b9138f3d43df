//! Calls in random order: which are refused, and with what errno.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use fastrand::Rng;
use kvm::clock::time::GuestTsc;
use kvm::irqchip::apic::{Lapic, Role};
use kvm::irqchip::chip::{Irqchip, Vcpus};
use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::draw::Draw;
use super::user::Nobody;

vmm_sys_util::ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
vmm_sys_util::ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
vmm_sys_util::ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);
vmm_sys_util::ioctl_iow_nr!(KVM_REGISTER_COALESCED, KVMIO, 0x67, kvm_coalesced_mmio_zone);
vmm_sys_util::ioctl_iow_nr!(
    KVM_UNREGISTER_COALESCED,
    KVMIO,
    0x68,
    kvm_coalesced_mmio_zone
);

type Answer = Result<(), i32>;

struct Calls {
    vm: VmFd,
    vcpu: Option<VcpuFd>,
    chip: Irqchip,
    lapic: Option<Arc<Lapic>>,
    has_vcpu: Vcpus,
    events: Vec<EventFd>,
    random: Rng,
}

fn kernel<T>(result: Result<T, kvm_ioctls::Error>) -> Answer {
    result.map(drop).map_err(super::kvm_error)
}

fn user<T>(result: Result<T, kvm::errno::Errno>) -> Answer {
    result.map(drop).map_err(|errno| errno.0)
}

fn raw<T>(vm: &VmFd, number: libc::c_ulong, argument: &T) -> Answer {
    // SAFETY: every number here reads one structure of this type and writes nothing.
    if unsafe { ioctl_with_ref(vm, number, argument) } < 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap());
    }
    Ok(())
}

impl Calls {
    fn step(&mut self) -> (String, Answer, Answer) {
        match self.random.u32(..16) {
            0 => self.create(),
            1 => self.split(),
            2 => self.create_vcpu(),
            3 | 4 => self.pit(),
            5..8 => self.irqfd(),
            8..12 => self.ioeventfd(),
            12 => self.coalesced(),
            13 => self.get_chip(),
            14 => self.lapic(),
            _ => self.bus_clock(),
        }
    }

    fn create(&self) -> (String, Answer, Answer) {
        let k = kernel(self.vm.create_irq_chip());
        (
            "KVM_CREATE_IRQCHIP".into(),
            k,
            user(self.chip.create(self.has_vcpu)),
        )
    }

    fn split(&mut self) -> (String, Answer, Answer) {
        let pins = self.random.pick(&[0, 24, 4096, 4097]);
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        cap.args[0] = pins;
        let k = kernel(self.vm.enable_cap(&cap));
        (
            format!("split {pins}"),
            k,
            user(self.chip.create_split(pins, self.has_vcpu)),
        )
    }

    fn create_vcpu(&mut self) -> (String, Answer, Answer) {
        if self.vcpu.is_none() && self.random.u32(..4) == 0 {
            self.vcpu = Some(self.vm.create_vcpu(0).unwrap());
            let time = Arc::new(GuestTsc::new(1_000_000));
            self.lapic = self
                .chip
                .add_vcpu(0, Role::Bootstrap, Arc::new(Nobody), time);
            self.has_vcpu = Vcpus::Some;
        }
        ("vCPU".into(), Ok(()), Ok(()))
    }

    fn pit(&mut self) -> (String, Answer, Answer) {
        let config = kvm_pit_config {
            flags: self.random.u32(..3),
            ..Default::default()
        };
        let state = kvm_pit_state2::default();
        let control = kvm_reinject_control {
            pit_reinject: 1,
            ..Default::default()
        };
        let (k, u) = match self.random.u32(..4) {
            0 => (
                kernel(self.vm.create_pit2(config)),
                user(self.chip.create_pit(&config)),
            ),
            1 => (kernel(self.vm.get_pit2()), user(self.chip.pit_state2())),
            2 => (
                kernel(self.vm.set_pit2(&state)),
                user(self.chip.set_pit_state2(&state)),
            ),
            _ => {
                let k = raw(&self.vm, KVM_REINJECT_CONTROL(), &control);
                (k, user(self.chip.reinject_control(&control)))
            }
        };
        ("PIT".into(), k, u)
    }

    fn irqfd(&mut self) -> (String, Answer, Answer) {
        let fds = [
            self.events[0].as_raw_fd(),
            self.events[1].as_raw_fd(),
            1,
            9999,
        ];
        let request = kvm_irqfd {
            fd: self.random.pick(&fds) as u32,
            gsi: self.random.pick(&[1, 5, 5, 30, 5000]),
            flags: self.random.pick(&[0, 0, 1, 2, 3, 4]),
            resamplefd: self.random.pick(&fds) as u32,
            ..Default::default()
        };
        let k = raw(&self.vm, KVM_IRQFD(), &request);
        (format!("{request:?}"), k, user(self.chip.irqfd(&request)))
    }

    fn ioeventfd(&mut self) -> (String, Answer, Answer) {
        let fds = [
            self.events[0].as_raw_fd(),
            self.events[1].as_raw_fd(),
            1,
            9999,
        ];
        let request = kvm_ioeventfd {
            fd: self.random.pick(&fds),
            addr: self.random.pick(&[0x1000, 0x1000, 0x2000, u64::MAX]),
            len: self.random.pick(&[0, 1, 2, 2, 3, 4, 8]),
            datamatch: u64::from(self.random.u32(..2)),
            flags: self.random.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 16, 32]),
            ..Default::default()
        };
        let k = raw(&self.vm, KVM_IOEVENTFD(), &request);
        (
            format!("{request:?}"),
            k,
            user(self.chip.ioeventfd(&request)),
        )
    }

    fn coalesced(&mut self) -> (String, Answer, Answer) {
        let zone = kvm_coalesced_mmio_zone {
            addr: self.random.pick(&[0x3000, 0x4000]),
            size: self.random.pick(&[0x10, 0x1000]),
            __bindgen_anon_1: kvm_coalesced_mmio_zone__bindgen_ty_1 {
                pio: self.random.u32(..3),
            },
        };
        if self.random.u32(..2) == 0 {
            let k = raw(&self.vm, KVM_REGISTER_COALESCED(), &zone);
            (
                "register zone".into(),
                k,
                user(self.chip.register_coalesced(&zone)),
            )
        } else {
            let k = raw(&self.vm, KVM_UNREGISTER_COALESCED(), &zone);
            (
                "unregister zone".into(),
                k,
                user(self.chip.unregister_coalesced(&zone)),
            )
        }
    }

    fn get_chip(&mut self) -> (String, Answer, Answer) {
        let mut chip = kvm_irqchip {
            chip_id: self.random.u32(..5),
            ..Default::default()
        };
        let k = kernel(self.vm.get_irqchip(&mut chip));
        let u = user(self.chip.controllers().state(&mut chip));
        (format!("chip {}", chip.chip_id), k, u)
    }

    fn lapic(&mut self) -> (String, Answer, Answer) {
        let (Some(vcpu), Some(lapic)) = (&self.vcpu, &self.lapic) else {
            let k = self.vcpu.as_ref().map(|vcpu| kernel(vcpu.get_lapic()));
            return (
                "LAPIC".into(),
                k.unwrap_or(Err(libc::EINVAL)),
                Err(libc::EINVAL),
            );
        };
        let state = vcpu.get_lapic().unwrap();
        let k = kernel(vcpu.set_lapic(&state));
        ("LAPIC".into(), k, user(self.chip.set_lapic(lapic, &state)))
    }

    fn bus_clock(&mut self) -> (String, Answer, Answer) {
        // Later kernels know bits 2 and 3.
        let flags = self.random.pick(&[0, 1, 2, 3, 16]);
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            ..Default::default()
        };
        cap.args[0] = flags;
        let k = kernel(self.vm.enable_cap(&cap));
        (
            format!("x2APIC API {flags}"),
            k,
            user(self.chip.policy().enable_x2apic_api(flags)),
        )
    }
}

#[test]
fn calls_are_refused_alike() {
    for seed in 1..=40 {
        let Ok(kvm) = Kvm::new() else {
            assert!(std::env::var_os("REQUIRE_KVM").is_none());
            println!("skipped: no /dev/kvm");
            return;
        };
        let mut calls = Calls {
            vm: kvm.create_vm().unwrap(),
            vcpu: None,
            chip: Irqchip::new().unwrap(),
            lapic: None,
            has_vcpu: Vcpus::None,
            events: (0..2)
                .map(|_| EventFd::new(EFD_NONBLOCK).unwrap())
                .collect(),
            random: Rng::with_seed(0xca115 * seed),
        };
        let mut log = Vec::new();
        for _ in 0..60 {
            let (what, kernel, user) = calls.step();
            log.push(format!("{what} -> {kernel:?}"));
            assert_eq!(kernel, user, "seed {seed}, last of\n{}", log.join("\n"));
        }
    }
}
