//! Random sequences of API calls, on `user` and on the kernel's KVM: the same errno, and the same
//! registers afterwards.
//!
//! Not compared, because the software KVM of some hosts answers otherwise than kvm.ko's source says:
//!
//! | call                                        | kvm.ko                 | that one             |
//! |---------------------------------------------|------------------------|----------------------|
//! | `KVM_SET_SREGS`, reserved bits of EFER      | `EINVAL`               | accepts              |
//! | `KVM_SET_SREGS`, paging without memory      | CR0 as given           | CR0.PG stays clear   |
//! | CR4 bits of features that it does not offer | by the guest's CPUID   | by its own           |

use std::sync::Arc;

use accel::{Accelerator, Preference, Vcpu, Vm, choose, user};
use fastrand::Rng;
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_DB, kvm_debugregs, kvm_guest_debug, kvm_mp_state,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

/// Calls of one sequence, and sequences.
const CALLS: usize = 60;
const SEQUENCES: u64 = 40;

fn pick<T: Copy>(random: &mut Rng, from: &[T]) -> T {
    from[random.usize(..from.len())]
}

struct Machine {
    vcpu: Box<dyn Vcpu>,
    _vm: Arc<dyn Vm>,
}

impl Machine {
    fn new(accelerator: &dyn Accelerator, cpuid: &kvm_bindings::CpuId) -> Self {
        let vm = accelerator.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(cpuid).unwrap();
        Self { vcpu, _vm: vm }
    }
}

/// One call with its arguments.
#[derive(Clone, Debug)]
enum Call {
    Regs(Box<kvm_regs>),
    Control {
        cr0: u64,
        cr4: u64,
        efer: u64,
        cr8: u64,
    },
    Xcr0 {
        value: u64,
        nr: u32,
        flags: u32,
    },
    Debug(Box<kvm_debugregs>),
    Events(Box<kvm_vcpu_events>),
    MpState(u32),
    GuestDebug(u32),
    Interrupt(u8),
    Nmi,
}

fn call(random: &mut Rng) -> Call {
    match random.u64(..9) {
        0 => Call::Regs(Box::new(kvm_regs {
            rax: random.u64(..),
            r15: random.u64(..),
            rip: random.u64(..) & 0xffff,
            rflags: pick(random, &[0, 2, 0x202, 0x246]),
            ..Default::default()
        })),
        1 => Call::Control {
            cr0: pick(
                random,
                &[0x6000_0010, 0x11, 0x31, 0x8000_0010, 0x2000_0011, 1 << 40],
            ),
            cr4: pick(random, &[0, 0x20, 0x10, 0x620, 0x2_0000_0000, 1 << 15]),
            efer: pick(random, &[0, 1, 0x100, 0x500, 0xd01]),
            cr8: random.u64(..16),
        },
        2 => Call::Xcr0 {
            value: pick(random, &[0, 1, 2, 3, 5, 1 << 40]),
            nr: pick(random, &[0, 1, 1, 1, 17]),
            flags: pick(random, &[0, 0, 0, 1]),
        },
        3 => Call::Debug(Box::new(kvm_debugregs {
            db: [random.u64(..), 0, 0, random.u64(..)],
            dr6: pick(random, &[0xffff_0ff0, 0xffff_4ff1, 1 << 32]),
            dr7: pick(random, &[0x400, 0x401, 0x0003_0402, 1 << 32]),
            flags: pick(random, &[0, 0, 0, 1]),
            ..Default::default()
        })),
        4 => Call::Events(Box::new(events(random))),
        5 => Call::MpState(random.u32(..12)),
        6 => Call::GuestDebug(pick(
            random,
            &[0, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_DB],
        )),
        7 => Call::Interrupt(random.u8(..)),
        _ => Call::Nmi,
    }
}

fn events(random: &mut Rng) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events {
        flags: pick(random, &[0, 1, 4, 5, 0x10, 0x20, 0x40]),
        ..Default::default()
    };
    events.exception.injected = random.u8(..2);
    events.exception.nr = pick(random, &[0, 1, 2, 6, 13, 14, 31, 32]);
    events.exception.has_error_code = u8::from(matches!(events.exception.nr, 13 | 14));
    events.exception.error_code = u32::from(events.exception.has_error_code) * 2;
    events.interrupt.injected = random.u8(..2);
    events.interrupt.nr = random.u8(..);
    events.nmi.pending = random.u8(..2);
    events.nmi.masked = random.u8(..2);
    events
}

fn make(vcpu: &dyn Vcpu, call: &Call) -> Result<(), i32> {
    let answer = match call {
        Call::Regs(regs) => vcpu.set_regs(regs),
        Call::Control {
            cr0,
            cr4,
            efer,
            cr8,
        } => {
            let sregs = kvm_sregs {
                cr0: *cr0,
                cr4: *cr4,
                efer: *efer,
                cr8: *cr8,
                ..vcpu.get_sregs().unwrap()
            };
            vcpu.set_sregs(&sregs)
        }
        Call::Xcr0 { value, nr, flags } => {
            let mut xcrs = kvm_xcrs {
                nr_xcrs: *nr,
                flags: *flags,
                ..Default::default()
            };
            xcrs.xcrs[0].value = *value;
            vcpu.set_xcrs(&xcrs)
        }
        Call::Debug(regs) => vcpu.set_debugregs(regs),
        Call::Events(events) => vcpu.set_vcpu_events(events),
        Call::MpState(mp_state) => vcpu.set_mp_state(kvm_mp_state {
            mp_state: *mp_state,
        }),
        Call::GuestDebug(control) => vcpu.set_guest_debug(&kvm_guest_debug {
            control: *control,
            ..Default::default()
        }),
        Call::Interrupt(vector) => vcpu.interrupt(*vector),
        Call::Nmi => vcpu.nmi(),
    };
    answer.map_err(accel::Errno::errno)
}

/// What can be seen of the vCPU.
fn state(vcpu: &dyn Vcpu) -> Vec<String> {
    let sregs = vcpu.get_sregs().unwrap();
    let events = vcpu.get_vcpu_events().unwrap();
    let debug = vcpu.get_debugregs().unwrap();
    vec![
        format!("{:?}", vcpu.get_regs().unwrap()),
        format!(
            "cr0 {:#x} cr4 {:#x} efer {:#x}",
            sregs.cr0, sregs.cr4, sregs.efer
        ),
        format!("cr8 {:#x} pending {:?}", sregs.cr8, sregs.interrupt_bitmap),
        format!("xcr0 {:#x}", vcpu.get_xcrs().unwrap().xcrs[0].value),
        format!(
            "db {:x?} dr6 {:#x} dr7 {:#x}",
            debug.db, debug.dr6, debug.dr7
        ),
        format!(
            "injected {} nmi {:?}",
            events.exception.injected, events.nmi
        ),
        format!("mp {}", vcpu.get_mp_state().unwrap().mp_state),
    ]
}

#[test]
fn random_calls_get_the_same_answers() {
    let kernel = match choose(Preference::Kernel) {
        Ok(choice) => choice.accelerator,
        Err(refused) => {
            assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{refused}");
            println!("skipped: {refused}");
            return;
        }
    };
    let ours = choose(Preference::User(user::Config::default()))
        .unwrap()
        .accelerator;
    let cpuid = ours.supported_cpuid().unwrap();
    for seed in 1..=SEQUENCES {
        let mut random = Rng::with_seed(seed);
        let (user, kvm) = (Machine::new(&*ours, &cpuid), Machine::new(&*kernel, &cpuid));
        for step in 0..CALLS {
            let call = call(&mut random);
            let (here, there) = (make(&*user.vcpu, &call), make(&*kvm.vcpu, &call));
            assert_eq!(here, there, "seed {seed}, call {step}: {call:x?}");
            let (here, there) = (state(&*user.vcpu), state(&*kvm.vcpu));
            assert_eq!(here, there, "seed {seed}, after call {step}: {call:x?}");
        }
    }
}
