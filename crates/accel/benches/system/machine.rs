//! The image on an accelerator: a vCPU, its interrupt controllers, and a port that takes text.

#![expect(unsafe_code, reason = "the guest's memory is handed to it")]

use accel::{Accelerator, Exit, Vcpu};
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use vm_memory::{MmapRegion, VolatileMemory};

use crate::image::{DONE, ENTRY};

const MEMORY: usize = 32 << 20;
/// The first serial port.
const SERIAL: u16 = 0x3f8;

/// Runs the image: its lines, or why there are none.
pub(crate) fn run(accelerator: &dyn Accelerator, image: &[u8]) -> Result<Vec<String>, String> {
    let memory = MmapRegion::<()>::new(MEMORY).map_err(|error| error.to_string())?;
    memory
        .as_volatile_slice()
        .subslice(ENTRY as usize, image.len())
        .map_err(|error| error.to_string())?
        .copy_from(image);
    boot(accelerator, &memory).map_err(|error| error.to_string())?
}

fn boot(
    accelerator: &dyn Accelerator,
    memory: &MmapRegion,
) -> accel::Result<Result<Vec<String>, String>> {
    let vm = accelerator.create_vm()?;
    vm.create_irqchip()?;
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the caller's memory outlives the VM, and is accessed as volatile memory only.
    unsafe { vm.set_user_memory_region(&region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(&accelerator.supported_cpuid()?)?;
    begin(&*vcpu)?;
    listen(&mut *vcpu)
}

/// The state of the PVH boot protocol.
fn begin(vcpu: &dyn Vcpu) -> accel::Result<()> {
    let segment = |type_| kvm_segment {
        selector: 8,
        type_,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = segment(11);
    let data = segment(3);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: ENTRY,
        rflags: 2,
        ..Default::default()
    })?;
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    })
}

/// Runs the guest to its last line.
fn listen(vcpu: &mut dyn Vcpu) -> accel::Result<Result<Vec<String>, String>> {
    let mut text = Vec::new();
    while !text.ends_with(format!("{DONE}\n").as_bytes()) {
        match vcpu.run()? {
            Exit::IoOut {
                port: SERIAL, data, ..
            } => text.extend(data),
            Exit::IoOut { .. } | Exit::Interrupted => {}
            other => return Ok(Err(format!("the guest left by {other:?}"))),
        }
    }
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().filter(|line| *line != DONE);
    Ok(Ok(lines.map(str::to_owned).collect()))
}
