//! The kernel's KVM through the seam: small guests, exit by exit.
#![expect(unsafe_code, reason = "the guest's memory is handed to it")]

use std::{sync::Arc, thread, time::Duration};

use accel::{Exit, Preference, Vcpu, Vm, choose};
use addr::Gpa;
use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{MmapRegion, VolatileMemory};

const PAGE: usize = 4096;

struct Guest {
    vcpu: Box<dyn Vcpu>,
    // Dropped after the vCPU and the VM, which use it.
    _vm: Arc<dyn Vm>,
    _memory: MmapRegion,
}

/// A guest with one page at 0 that runs `code` in real mode; `None` where there is no KVM.
fn guest(code: &[u8]) -> Option<Guest> {
    let choice = match choose(Preference::Kernel) {
        Ok(choice) => choice,
        Err(refused) => {
            assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{refused}");
            eprintln!("skipped: {refused}");
            return None;
        }
    };
    let memory = MmapRegion::<()>::new(PAGE).unwrap();
    let target = memory.as_volatile_slice().subslice(0, code.len()).unwrap();
    target.copy_from(code);
    let vm = choice.accelerator.create_vm().unwrap();
    let region = kvm_userspace_memory_region {
        memory_size: PAGE as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the page is the guest's for as long as the VM lives.
    unsafe { vm.set_user_memory_region(&region).unwrap() };
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (0, 2);
    vcpu.set_regs(&regs).unwrap();
    Some(Guest {
        vcpu,
        _vm: vm,
        _memory: memory,
    })
}

#[test]
fn ports_and_mmio_are_answered_in_place() {
    // in al, 0x10; out 0x20, al; mov [0x8000], al; mov al, [0x9000]; out 0x20, al; hlt
    let code = [
        0xe4, 0x10, 0xe6, 0x20, 0xa2, 0x00, 0x80, 0xa0, 0x00, 0x90, 0xe6, 0x20, 0xf4,
    ];
    let Some(mut guest) = guest(&code) else {
        return;
    };
    let mut seen = Vec::new();
    loop {
        match guest.vcpu.run().unwrap() {
            Exit::IoIn {
                port: 0x10, data, ..
            } => data.fill(0x5a),
            Exit::IoOut { port, data, .. } => seen.push((u64::from(port), data[0])),
            Exit::MmioWrite { gpa, data } => seen.push((gpa.raw(), data[0])),
            Exit::MmioRead { gpa, data } => {
                assert_eq!(gpa, Gpa::new(0x9000));
                data.fill(0xa5);
            }
            Exit::Halt => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, [(0x20, 0x5a), (0x8000, 0x5a), (0x20, 0xa5)]);
}

#[test]
fn a_kick_ends_an_endless_loop_and_one_before_the_run_is_not_lost() {
    // jmp self
    let Some(mut guest) = guest(&[0xeb, 0xfe]) else {
        return;
    };
    let kicker = guest.vcpu.kicker();
    kicker.kick();
    assert!(matches!(guest.vcpu.run().unwrap(), Exit::Interrupted));
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        kicker.kick();
        kicker
    });
    assert!(matches!(guest.vcpu.run().unwrap(), Exit::Interrupted));
    let kicker = other.join().unwrap();
    drop(guest);
    // A kick for a vCPU that is gone is nobody's.
    kicker.kick();
}
