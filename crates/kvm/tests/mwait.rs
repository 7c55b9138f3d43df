//! `MONITOR` and `MWAIT`: nothing happens, or `#UD`, as two of KVM's quirks and CPUID say
//! (`KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS`, `KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT` in `api.rst`).
#![expect(
    unsafe_code,
    reason = "guest memory is handed to the VM, and kvm_run is a C structure"
)]

#[expect(dead_code, reason = "not all of it is of use here")]
mod machine;

use kvm_bindings as kb;
use machine::{Machine, enable};

const CODE: u64 = 0x1000;
const UNDEFINED: u64 = 0x1800;
const SIZE: usize = 0x2000;
const MISC_ENABLE: u32 = 0x1a0;
const MWAIT: u64 = 1 << 18;
const SSE3: u32 = 1;

/// A guest in real mode that runs one of them and halts; its handler of `#UD` halts, too.
struct Guest(Machine);

impl Guest {
    fn new(quirks_off: u32) -> Self {
        let machine = Machine::new(SIZE, |vm| {
            enable(vm, kb::KVM_CAP_DISABLE_QUIRKS2, quirks_off.into());
        });
        let leaf = kb::kvm_cpuid_entry2 {
            function: 1,
            ecx: SSE3,
            ..Default::default()
        };
        machine.vcpu.set_cpuid(vec![leaf]).unwrap();
        machine.write(6 * 4, &(UNDEFINED as u32).to_le_bytes());
        machine.write(UNDEFINED, &[0xf4]);
        Self(machine)
    }

    fn switch(&self, misc_enable: u64) {
        let entry = kb::kvm_msr_entry {
            index: MISC_ENABLE,
            data: misc_enable,
            ..Default::default()
        };
        assert_eq!(self.0.vcpu.set_msrs(&[entry]), 1);
    }

    /// Whether the instruction, `0f 01` and this byte, is `#UD`.
    fn faults(&self, last: u8) -> bool {
        let Self(machine) = self;
        machine.write(CODE, &[0x0f, 0x01, last, 0xf4]);
        let mut sregs = machine.vcpu.get_sregs();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        machine.vcpu.set_sregs(&sregs).unwrap();
        machine.vcpu.set_regs(&kb::kvm_regs {
            rip: CODE,
            rsp: 0x800,
            rflags: 2,
            ..Default::default()
        });
        assert_eq!(machine.run(), kb::KVM_EXIT_HLT);
        machine.vcpu.get_regs().rip > UNDEFINED
    }

    fn both_fault(&self) -> bool {
        let [monitor, mwait] = [0xc8, 0xc9].map(|last| self.faults(last));
        assert_eq!(monitor, mwait);
        monitor
    }

    fn announces(&self) -> bool {
        self.0.vcpu.get_cpuid()[0].ecx & 1 << 3 != 0
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
