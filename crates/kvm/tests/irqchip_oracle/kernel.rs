//! The kernel's controllers, operated through a vCPU that runs two instructions at a time.
//!
//! Memory at 0x1000 holds the interrupt vector table's stubs, one for each vector: `mov al, n; out
//! 0xe0, al`. Taking an interrupt is running `nop; nop; cli; out 0xe1, al` with interrupts enabled:
//! the port that comes out says whether there was one, and which. DS has a limit of 4 GiB, so that
//! real mode reaches the registers in memory.

use std::os::fd::AsRawFd;

use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const STUBS: u64 = 0x1000;
const CODE: u64 = 0x4000;
const MEMORY: usize = 0x10000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Interrupts {
    Enabled,
    Disabled,
}

pub(crate) struct Kernel {
    pub(crate) vm: VmFd,
    pub(crate) vcpus: Vec<VcpuFd>,
    memory: GuestMemoryMmap,
    _kvm: Kvm,
}

vmm_sys_util::ioctl_iowr_nr!(KVM_IRQ_LINE_STATUS, KVMIO, 0x67, kvm_irq_level);

impl Kernel {
    /// `None`, with the reason printed, where there is no `/dev/kvm`.
    pub(crate) fn open(vcpus: u64) -> Option<Kernel> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(refused) => {
                assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{refused}");
                println!("skipped: /dev/kvm: {refused}");
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap();
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: host as u64,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the VM, in the same structure.
        unsafe { vm.set_user_memory_region(region).unwrap() };
        let vcpus: Vec<_> = (0..vcpus).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        for vcpu in &vcpus {
            vcpu.set_cpuid2(&cpuid).unwrap();
        }
        let kernel = Kernel {
            vm,
            vcpus,
            memory,
            _kvm: kvm,
        };
        kernel.write_stubs();
        kernel.reset_registers();
        Some(kernel)
    }

    fn write_stubs(&self) {
        for vector in 0..=255u16 {
            let stub = STUBS + 4 * u64::from(vector);
            self.memory
                .write_obj(stub as u32, GuestAddress(4 * u64::from(vector)))
                .unwrap();
            self.memory
                .write_slice(&[0xb0, vector as u8, 0xe6, 0xe0], GuestAddress(stub))
                .unwrap();
        }
    }

    fn reset_registers(&self) {
        let mut sregs = self.vcpus[0].get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        for segment in [&mut sregs.ds, &mut sregs.ss, &mut sregs.es] {
            segment.base = 0;
            segment.selector = 0;
        }
        sregs.ds.limit = 0xffff_ffff;
        sregs.ds.g = 1;
        self.vcpus[0].set_sregs(&sregs).unwrap();
    }

    /// Runs code on the first vCPU until it writes a port of ours: the port, and EAX.
    fn run(&mut self, code: &[u8]) -> (u16, u32) {
        self.run_with(code, Interrupts::Disabled)
    }

    fn run_with(&mut self, code: &[u8], interrupts: Interrupts) -> (u16, u32) {
        self.memory.write_slice(code, GuestAddress(CODE)).unwrap();
        let rflags = if interrupts == Interrupts::Enabled {
            0x202
        } else {
            2
        };
        let regs = kvm_regs {
            rip: CODE,
            rsp: 0x8000,
            rflags,
            ..Default::default()
        };
        self.vcpus[0].set_regs(&regs).unwrap();
        let port = match self.vcpus[0].run().unwrap() {
            VcpuExit::IoOut(port, _) => port,
            exit => panic!("the guest left with {exit:?}"),
        };
        // The kernel completes the OUT only on the next entry.
        self.vcpus[0].set_kvm_immediate_exit(1);
        assert_eq!(self.vcpus[0].run().unwrap_err().errno(), libc::EINTR);
        self.vcpus[0].set_kvm_immediate_exit(0);
        (port, self.vcpus[0].get_regs().unwrap().rax as u32)
    }

    pub(crate) fn read_port(&mut self, port: u16) -> u8 {
        let [low, high] = port.to_le_bytes();
        self.run(&[0xba, low, high, 0xec, 0xe6, 0xe1]).1 as u8
    }

    pub(crate) fn write_port(&mut self, port: u16, value: u8) {
        let [low, high] = port.to_le_bytes();
        self.run(&[0xba, low, high, 0xb0, value, 0xee, 0xe6, 0xe1]);
    }

    pub(crate) fn read_memory(&mut self, address: u32) -> u32 {
        let mut code = vec![0x66, 0x67, 0xa1];
        code.extend(address.to_le_bytes());
        code.extend([0xe6, 0xe1]);
        self.run(&code).1
    }

    pub(crate) fn write_memory(&mut self, address: u32, value: u32) {
        let mut code = vec![0x66, 0xb8];
        code.extend(value.to_le_bytes());
        code.extend([0x66, 0x67, 0xa3]);
        code.extend(address.to_le_bytes());
        code.extend([0xe6, 0xe1]);
        self.run(&code);
    }

    /// Lets the CPU take an interrupt, if there is one.
    pub(crate) fn take_interrupt(&mut self) -> Option<u8> {
        let (port, value) = self.run_with(&[0x90, 0x90, 0xfa, 0xe6, 0xe1], Interrupts::Enabled);
        (port == 0xe0).then_some(value as u8)
    }

    pub(crate) fn line(&self, gsi: u32, level: u32) -> i32 {
        let mut event = kvm_irq_level {
            __bindgen_anon_1: kvm_irq_level__bindgen_ty_1 { irq: gsi },
            level,
        };
        // SAFETY: the ioctl reads and writes this structure and nothing else.
        let result = unsafe {
            vmm_sys_util::ioctl::ioctl_with_mut_ref(&self.vm, KVM_IRQ_LINE_STATUS(), &mut event)
        };
        assert_eq!(result, 0, "fd {}", self.vm.as_raw_fd());
        // SAFETY: the kernel has written the status.
        unsafe { event.__bindgen_anon_1.status }
    }

    pub(crate) fn chip(&self, chip_id: u32) -> kvm_irqchip {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        self.vm.get_irqchip(&mut chip).unwrap();
        chip
    }
}
