//! A small machine for small guests: memory, page tables, one vCPU, on any accelerator.
#![expect(unsafe_code, reason = "maps guest memory")]

use std::sync::Arc;

use accel::{Accelerator, Exit, Preference, Vcpu, Vm, choose};
use kvm::PagingPath;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};

/// Bytes of guest memory.
pub(crate) const MEMORY: usize = 4 << 20;
/// Where code is loaded.
pub(crate) const CODE: u64 = 0x1000;
/// The top of the stack.
pub(crate) const STACK: u64 = 0x8000;
/// Page tables of the long-mode guest: they map the first GiB to itself, and [`ALIAS`] to 2 MiB.
const TABLES: u64 = 0x10_0000;
/// A guest virtual address that leads to guest physical 2 MiB.
pub(crate) const ALIAS: u64 = 0x40_0000_0000;
/// A guest physical address in no slot.
pub(crate) const DEVICE: u64 = 0x2000_0000;

/// Memory that the guest shares.
pub(crate) struct Memory {
    base: *mut u8,
}

impl Memory {
    fn new() -> Self {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self { base: base.cast() }
    }

    /// Writes guest memory from outside.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        let at = usize::try_from(gpa).unwrap();
        assert!(at + bytes.len() <= MEMORY);
        // SAFETY: inside the mapping; the guest does not run.
        unsafe {
            self.base
                .add(at)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        };
    }

    /// Reads guest memory from outside.
    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let at = usize::try_from(gpa).unwrap();
        assert!(at + N <= MEMORY);
        let mut bytes = [0; N];
        // SAFETY: as for `write`.
        unsafe {
            bytes
                .as_mut_ptr()
                .copy_from_nonoverlapping(self.base.add(at), N);
        };
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the VM is gone (field order in `Machine`).
        unsafe { libc::munmap(self.base.cast(), MEMORY) };
    }
}

/// An accelerator by name.
pub(crate) struct Subject {
    /// For messages.
    pub(crate) name: &'static str,
    /// It.
    pub(crate) accelerator: Arc<dyn Accelerator>,
}

/// `user` with each paging, and the kernel's KVM where it opens.
pub(crate) fn subjects() -> Vec<Subject> {
    let mut subjects: Vec<_> = [
        ("user, nested", PagingPath::Nested),
        ("user, shadow", PagingPath::Shadow),
        ("user, direct", PagingPath::Direct),
    ]
    .into_iter()
    .map(|(name, paging)| Subject {
        name,
        accelerator: choose(Preference::User(paging.into())).unwrap().accelerator,
    })
    .collect();
    match choose(Preference::Kernel) {
        Ok(choice) => subjects.push(Subject {
            name: "kvm",
            accelerator: choice.accelerator,
        }),
        Err(refused) => {
            assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{refused}");
            println!("skipped on the kernel's KVM: {refused}");
        }
    }
    subjects
}

/// A machine with one vCPU.
pub(crate) struct Machine {
    /// The vCPU; before the memory, so that it is dropped first.
    pub(crate) vcpu: Box<dyn Vcpu>,
    /// The VM.
    pub(crate) vm: Arc<dyn Vm>,
    /// Guest memory.
    pub(crate) memory: Memory,
}

impl Machine {
    /// Memory in slot 0, a vCPU after reset with the supported CPUID.
    pub(crate) fn new(subject: &Subject) -> Self {
        Self::prepared(subject, |_| {})
    }

    /// The same, with something done to the VM before the vCPU.
    pub(crate) fn prepared(subject: &Subject, prepare: impl FnOnce(&dyn Vm)) -> Self {
        let vm = subject.accelerator.create_vm().unwrap();
        let memory = Memory::new();
        prepare(&*vm);
        let machine = Self {
            vcpu: vm.create_vcpu(0).unwrap(),
            vm,
            memory,
        };
        machine.map(0, 0);
        let cpuid = subject.accelerator.supported_cpuid().unwrap();
        machine.vcpu.set_cpuid(&cpuid).unwrap();
        machine
    }

    /// Puts the memory into slot 0 with these flags, at guest physical `gpa`.
    pub(crate) fn map(&self, gpa: u64, flags: u32) {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags,
            guest_phys_addr: gpa,
            memory_size: MEMORY as u64,
            userspace_addr: self.memory.base as u64,
        };
        // SAFETY: the mapping lives as long as the VM and is only read and written by copies.
        unsafe { self.vm.set_user_memory_region(&region) }.unwrap();
    }

    /// 64-bit code with paging on, at CPL 0.
    pub(crate) fn long_mode(&self, code: &[u8]) {
        self.write_tables();
        self.memory.write(CODE, code);
        let mut sregs = self.vcpu.get_sregs().unwrap();
        flat(&mut sregs, Bits::Long);
        sregs.cr0 = 0x8005_0033;
        sregs.cr3 = TABLES;
        sregs.cr4 = 0x620;
        sregs.efer = 0xd01;
        self.vcpu.set_sregs(&sregs).unwrap();
        self.start();
    }

    /// 32-bit code without paging, at CPL 0.
    pub(crate) fn protected_mode(&self, code: &[u8]) {
        self.memory.write(CODE, code);
        let mut sregs = self.vcpu.get_sregs().unwrap();
        flat(&mut sregs, Bits::Protected);
        sregs.cr0 = 0x33;
        self.vcpu.set_sregs(&sregs).unwrap();
        self.start();
    }

    /// 16-bit code in real mode.
    pub(crate) fn real_mode(&self, code: &[u8]) {
        self.memory.write(CODE, code);
        let mut sregs = self.vcpu.get_sregs().unwrap();
        sregs.cs.selector = 0;
        sregs.cs.base = 0;
        self.vcpu.set_sregs(&sregs).unwrap();
        self.start();
    }

    fn start(&self) {
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACK,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).unwrap();
    }

    fn write_tables(&self) {
        let entry = |at: u64, value: u64| self.memory.write(at, &value.to_le_bytes());
        entry(TABLES, (TABLES + 0x1000) | 7);
        entry(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        // ALIAS is 256 GiB: entry 256 of level 3.
        entry(TABLES + 0x1000 + 8 * (ALIAS >> 30), (TABLES + 0x3000) | 7);
        for i in 0..512u64 {
            entry(TABLES + 0x2000 + 8 * i, i << 21 | 0x87);
        }
        entry(TABLES + 0x3000, (TABLES + 0x4000) | 7);
        for i in 0..512u64 {
            entry(TABLES + 0x4000 + 8 * i, (0x20_0000 + (i << 12)) | 7);
        }
    }

    /// Runs to the next exit.
    pub(crate) fn run(&mut self) -> Seen {
        Seen::from(self.vcpu.run().unwrap())
    }
}

#[derive(Clone, Copy)]
enum Bits {
    Protected,
    Long,
}

fn flat(sregs: &mut kvm_sregs, bits: Bits) {
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let long = u8::from(matches!(bits, Bits::Long));
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 0xb,
        db: 1 - long,
        l: long,
        ..data
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
}

/// An exit, to be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    IoIn(u16, u8, usize),
    IoOut(u16, u8, Vec<u8>),
    MmioRead(u64, usize),
    MmioWrite(u64, Vec<u8>),
    Halt,
    Shutdown,
    InterruptWindow,
    Interrupted,
    Debug { exception: u32, pc: u64 },
    Other(String),
}

impl From<Exit<'_>> for Seen {
    fn from(exit: Exit<'_>) -> Self {
        match exit {
            Exit::IoIn { port, size, data } => Seen::IoIn(port, size, data.len()),
            Exit::IoOut { port, size, data } => Seen::IoOut(port, size, data.to_vec()),
            Exit::MmioRead { gpa, data } => Seen::MmioRead(gpa.raw(), data.len()),
            Exit::MmioWrite { gpa, data } => Seen::MmioWrite(gpa.raw(), data.to_vec()),
            Exit::Halt => Seen::Halt,
            Exit::Shutdown => Seen::Shutdown,
            Exit::InterruptWindow => Seen::InterruptWindow,
            Exit::Interrupted => Seen::Interrupted,
            Exit::Debug(arch) => Seen::Debug {
                exception: arch.exception,
                pc: arch.pc,
            },
            other => Seen::Other(format!("{other:?}")),
        }
    }
}
