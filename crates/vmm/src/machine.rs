//! Building a machine and running it.

use std::sync::Arc;

use accel::{Accelerator, Vcpu, Vm};
use addr::GpaRange;
use devices::{
    bus::PortBus,
    cmos::{self, Cmos},
    pci::{
        PciRoot,
        root::{CONFIG_PORT, CONFIG_PORTS, ECAM_SIZE},
    },
    pm::{self, AcpiPm},
    power::KeyboardReset,
    serial::{self, ComPort, Serial},
    virtio::{Service, pci::VirtioPci},
};
use kvm_bindings::{KVM_CAP_MAX_VCPUS, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use memory::space::Space;

use crate::{
    acpi, boot,
    config::{MachineConfig, SerialOutput},
    cpus,
    error::{BuildError, Named},
    interrupts, layout,
    outcome::{Crash, Ending, Outcome},
    ram::Ram,
    remote::{Facts, Remote},
    run::{Shared, VcpuThread},
    space,
};

/// A machine that is ready to start.
///
/// Fields are dropped in their order: vCPUs and VM before the memory that they use.
pub struct Machine {
    vcpus: Vec<Box<dyn Vcpu>>,
    shared: Arc<Shared>,
    serial: [Arc<Serial>; 3],
    vm: Arc<dyn Vm>,
    slots: space::KnownSlots,
    facts: Facts,
    _ram: Ram,
}

/// Input for a machine's serial port.
#[derive(Clone)]
pub struct Input(Arc<Serial>);

impl Input {
    /// Types `bytes`.
    pub fn send(&self, bytes: &[u8]) {
        self.0.receive(bytes);
    }

    /// Sends a break, which Linux takes for its magic key.
    pub fn send_break(&self) {
        self.0.receive_break();
    }
}

/// Stops a machine from outside.
#[derive(Clone)]
pub struct Stopper(Arc<Ending>);

impl Stopper {
    /// Ends it as [`Outcome::Stopped`], as pulling the plug would.
    pub fn stop(&self) {
        self.0.report(Outcome::Stopped);
    }
}

impl Machine {
    /// Builds what `config` says on `accelerator`.
    pub fn build(config: MachineConfig, accelerator: &dyn Accelerator) -> Result<Self, BuildError> {
        check_cpus(config.cpus, accelerator)?;
        let facts = Facts {
            name: config.name.clone(),
            accelerator: accelerator.kind(),
            kernel: config.kernel.clone(),
            memory: config.memory,
            cpus: config.cpus,
        };
        let ram = Ram::new(config.memory)?;
        let entry = boot::load(
            &ram,
            &config.kernel,
            config.initrd.as_ref(),
            &config.command_line,
        )?;
        acpi::write(&ram.view, config.cpus)?;
        let vm = accelerator.create_vm().named("KVM_CREATE_VM")?;
        set_up_vm(&*vm)?;
        let space = space::with_ram(&ram)?;
        let slots = space::follow(&space, &vm)?;
        let ending = Arc::new(Ending::default());
        let vcpus = cpus::create(accelerator, &*vm, config.cpus, &entry)?;
        let mut ports = PortBus::default();
        add_legacy(&mut ports, &ending)?;
        let serial = add_serial(&mut ports, &*vm, config.serial)?;
        let pci = Arc::new(PciRoot::new(layout::pci_window(), ending.clone()));
        add_pci(&mut ports, &space, &pci)?;
        for device in config.virtio {
            add_virtio(&pci, device, &ram, &vm)?;
        }
        Ok(Self {
            vcpus,
            shared: Arc::new(Shared {
                ports,
                space,
                ending,
                gate: Arc::default(),
            }),
            serial,
            vm,
            slots,
            facts,
            _ram: ram,
        })
    }

    /// Input for COM1.
    pub fn com1(&self) -> Input {
        Input(self.serial[0].clone())
    }

    /// Input for COM2.
    pub fn com2(&self) -> Input {
        Input(self.serial[1].clone())
    }

    /// A handle that stops it.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.ending.clone())
    }

    /// A handle for those who look at it while it runs.
    pub fn remote(&self) -> Remote {
        Remote::new(
            self.facts.clone(),
            self.shared.gate.clone(),
            self.stopper(),
            self.vm.clone(),
            self.slots.clone(),
            self.shared.space.clone(),
        )
    }

    /// Runs it to its end.
    pub fn run(mut self) -> Outcome {
        let mut threads = Vec::new();
        for (index, vcpu) in (0..).zip(std::mem::take(&mut self.vcpus)) {
            match VcpuThread::start(index, vcpu, self.shared.clone()) {
                Ok(thread) => threads.push(thread),
                Err(error) => self.shared.ending.report(Outcome::Crashed(Crash {
                    cpu: index,
                    rip: None,
                    cause: format!("no thread for it: {error}"),
                })),
            }
        }
        let outcome = self.shared.ending.wait();
        self.shared.gate.open_for_good();
        threads.into_iter().for_each(VcpuThread::stop);
        outcome
    }
}

fn check_cpus(asked: u8, accelerator: &dyn Accelerator) -> Result<(), BuildError> {
    // APIC ID 255 is broadcast.
    const MOST: u32 = 254;
    let most = accelerator.check_extension(KVM_CAP_MAX_VCPUS);
    let most = u32::try_from(most).unwrap_or(1).clamp(1, MOST);
    if asked == 0 || u32::from(asked) > most {
        return Err(BuildError::Cpus { asked, most });
    }
    Ok(())
}

fn set_up_vm(vm: &dyn Vm) -> Result<(), BuildError> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .named("KVM_SET_IDENTITY_MAP_ADDR")?;
    vm.set_tss_address(layout::TSS).named("KVM_SET_TSS_ADDR")?;
    vm.create_irqchip().named("KVM_CREATE_IRQCHIP")?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(&pit).named("KVM_CREATE_PIT2")
}

fn add_legacy(ports: &mut PortBus, ending: &Arc<Ending>) -> Result<(), BuildError> {
    ports.add(cmos::PORT, cmos::LEN, Arc::new(Cmos::default()))?;
    ports.add(pm::PORT, pm::LEN, Arc::new(AcpiPm::new(ending.clone())))?;
    let keyboard = Arc::new(KeyboardReset::new(ending.clone()));
    ports.add(KeyboardReset::PORT, 1, keyboard)?;
    Ok(())
}

fn add_serial(
    ports: &mut PortBus,
    vm: &dyn Vm,
    outputs: [SerialOutput; 3],
) -> Result<[Arc<Serial>; 3], BuildError> {
    let odd = interrupts::line(vm, ComPort::Com1.irq())?;
    let even = interrupts::line(vm, ComPort::Com2.irq())?;
    let mut add = |port: ComPort, line, output| -> Result<Arc<Serial>, BuildError> {
        let serial = Arc::new(Serial::new(line, output));
        ports.add(port.port(), serial::LEN, serial.clone())?;
        Ok(serial)
    };
    let [first, second, third] = outputs;
    Ok([
        add(ComPort::Com1, odd.clone(), first)?,
        add(ComPort::Com2, even, second)?,
        add(ComPort::Com3, odd, third)?,
    ])
}

fn add_pci(ports: &mut PortBus, space: &Space, pci: &Arc<PciRoot>) -> Result<(), BuildError> {
    ports.add(CONFIG_PORT, CONFIG_PORTS, pci.config_ports())?;
    space::add_device(space, "pci", layout::pci_window(), pci.memory_window())?;
    let ecam = GpaRange::new(layout::ECAM, ECAM_SIZE).ok_or(BuildError::Write {
        what: "ECAM",
        gpa: layout::ECAM,
    })?;
    space::add_device(space, "ecam", ecam, pci.ecam())?;
    Ok(())
}

fn add_virtio(
    pci: &PciRoot,
    device: Box<dyn devices::virtio::VirtioDevice>,
    ram: &Ram,
    vm: &Arc<dyn Vm>,
) -> Result<(), BuildError> {
    let msi = Arc::new(interrupts::VmMsi(vm.clone()));
    let device = VirtioPci::new(device, ram.view.clone(), msi);
    let device = Arc::new(device.map_err(|error| BuildError::Queues(error.to_string()))?);
    let service: Arc<dyn Service> = device.clone();
    device.connect(&Arc::downgrade(&service));
    pci.add(device)?;
    Ok(())
}
