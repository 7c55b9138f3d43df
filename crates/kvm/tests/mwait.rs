//! `MONITOR` and `MWAIT`: nothing happens, or `#UD`, as two of KVM's quirks and CPUID say
//! (`KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS`, `KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT` in `api.rst`).
#![expect(
    unsafe_code,
    reason = "guest memory is handed to the VM, and kvm_run is a C structure"
)]

use std::sync::Arc;

use kvm::{PagingPath, System, Vcpu, Vm};
use kvm_bindings as kb;

const CODE: u64 = 0x1000;
const UNDEFINED: u64 = 0x1800;
const SIZE: usize = 0x2000;
const MISC_ENABLE: u32 = 0x1a0;
const MWAIT: u64 = 1 << 18;
const SSE3: u32 = 1;

/// A guest in real mode that runs one of them and halts; its handler of `#UD` halts, too.
struct Guest {
    vm: Arc<Vm>,
    vcpu: Arc<Vcpu>,
}

impl Guest {
    fn new(quirks_off: u32) -> Self {
        let vm = System::new(PagingPath::Nested).create_vm(0).unwrap();
        let disable = kb::kvm_enable_cap {
            cap: kb::KVM_CAP_DISABLE_QUIRKS2,
            args: [quirks_off.into(), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&disable).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let leaf = kb::kvm_cpuid_entry2 {
            function: 1,
            ecx: SSE3,
            ..Default::default()
        };
        vcpu.set_cpuid(vec![leaf]).unwrap();
        Self { vm, vcpu }
    }

    fn switch(&self, misc_enable: u64) {
        let entry = kb::kvm_msr_entry {
            index: MISC_ENABLE,
            data: misc_enable,
            ..Default::default()
        };
        assert_eq!(self.vcpu.set_msrs(&[entry]), 1);
    }

    /// Whether the instruction, `0f 01` and this byte, is `#UD`.
    fn faults(&self, last: u8) -> bool {
        let mut bytes = vec![0_u8; SIZE];
        bytes[6 * 4..][..4].copy_from_slice(&(UNDEFINED as u32).to_le_bytes());
        bytes[CODE as usize..][..4].copy_from_slice(&[0x0f, 0x01, last, 0xf4]);
        bytes[UNDEFINED as usize] = 0xf4;
        // Page-aligned, and there until the process ends.
        let place = memory::ram::GuestRam::new(&memory::ram::RamConfig::private(SIZE as u64));
        let place = Box::leak(Box::new(place.unwrap()));
        let start = place.range().start();
        memory::access::write(start, &bytes).unwrap();
        let region = |size| kb::kvm_userspace_memory_region {
            memory_size: size,
            userspace_addr: addr::Address::raw(start),
            ..Default::default()
        };
        self.vm
            .set_user_memory_region(&region(SIZE as u64))
            .unwrap();
        let mut sregs = self.vcpu.get_sregs();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        self.vcpu.set_regs(&kb::kvm_regs {
            rip: CODE,
            rsp: 0x800,
            rflags: 2,
            ..Default::default()
        });
        self.vcpu.run().unwrap();
        // SAFETY: the page lives as long as the vCPU; only a place in it is computed.
        let reason = self
            .vcpu
            .run_page()
            .get(|run| unsafe { &raw mut (*run).exit_reason });
        assert_eq!(reason, kb::KVM_EXIT_HLT);
        self.vm.set_user_memory_region(&region(0)).unwrap();
        self.vcpu.get_regs().rip > UNDEFINED
    }

    fn both_fault(&self) -> bool {
        let [monitor, mwait] = [0xc8, 0xc9].map(|last| self.faults(last));
        assert_eq!(monitor, mwait);
        monitor
    }

    fn announces(&self) -> bool {
        self.vcpu.get_cpuid()[0].ecx & 1 << 3 != 0
    }
}

#[test]
fn by_default_they_do_nothing() {
    let guest = Guest::new(0);
    assert!(!guest.both_fault());
    guest.switch(MWAIT);
    assert!(!guest.announces(), "the switch is not heeded");
}

#[test]
fn without_the_first_quirk_cpuid_decides() {
    let guest = Guest::new(kb::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS);
    assert!(guest.both_fault());
    guest.switch(MWAIT);
    assert!(guest.both_fault(), "the switch is not heeded");
}

#[test]
fn without_both_the_switch_decides() {
    let quirks = kb::KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS | kb::KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT;
    let guest = Guest::new(quirks);
    assert!(guest.both_fault());
    guest.switch(MWAIT);
    assert!(guest.announces());
    assert!(!guest.both_fault());
    guest.switch(0);
    assert!(guest.both_fault());
}
