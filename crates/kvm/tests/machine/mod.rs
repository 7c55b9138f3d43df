//! One vCPU and memory from guest physical address 0: what small guests need.

use std::sync::Arc;

use kvm::{PagingPath, System, Vcpu, Vm};
use kvm_bindings as kb;

pub(crate) struct Machine {
    pub(crate) vcpu: Arc<Vcpu>,
    pub(crate) vm: Arc<Vm>,
    memory: *mut u8,
    size: usize,
}

// SAFETY: the memory is shared by its nature; tests touch it by volatile accesses.
unsafe impl Sync for Machine {}
// SAFETY: as above.
unsafe impl Send for Machine {}

impl Machine {
    /// So much memory. What must be before the vCPU is there is done by `prepare`.
    pub(crate) fn new(size: usize, prepare: impl FnOnce(&Vm)) -> Self {
        let vm = System::new(PagingPath::Nested).create_vm(0).unwrap();
        prepare(&vm);
        // SAFETY: a new mapping, which lives as long as the process.
        let memory = unsafe {
            let anywhere = std::ptr::null_mut();
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(anywhere, size, access, kind, -1, 0)
        };
        assert_ne!(memory, libc::MAP_FAILED);
        let region = kb::kvm_userspace_memory_region {
            memory_size: size as u64,
            userspace_addr: memory as u64,
            ..Default::default()
        };
        vm.set_user_memory_region(&region).unwrap();
        Self {
            vcpu: vm.create_vcpu(0).unwrap(),
            vm,
            memory: memory.cast(),
            size,
        }
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= self.size);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping.
            unsafe { self.memory.add(at as usize + i).write_volatile(*byte) };
        }
    }

    pub(crate) fn word(&self, at: u64) -> u32 {
        assert!(at as usize + 4 <= self.size);
        // SAFETY: inside the mapping.
        let byte = |i| unsafe { self.memory.add(at as usize + i).read_volatile() };
        u32::from_le_bytes(std::array::from_fn(byte))
    }

    /// Runs until the vCPU leaves: the exit's reason.
    pub(crate) fn run(&self) -> u32 {
        self.vcpu.run().unwrap();
        self.field(|run| &raw mut run.exit_reason)
    }

    pub(crate) fn field<T: Copy>(&self, field: impl FnOnce(&mut kb::kvm_run) -> *mut T) -> T {
        // SAFETY: the pages live as long as the vCPU; only a place in them is computed.
        self.vcpu.run_page().get(|run| field(unsafe { &mut *run }))
    }

    pub(crate) fn enable(&self, cap: u32, argument: u64) {
        enable(&self.vm, cap, argument);
    }
}

pub(crate) fn enable(vm: &Vm, cap: u32, argument: u64) {
    let enable = kb::kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&enable).unwrap();
}
