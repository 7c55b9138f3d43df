//! KVM's hypercalls (`Documentation/virt/kvm/x86/hypercalls.rst`).
//!
//! The number is in RAX, the arguments in RBX, RCX, RDX and RSI; the answer goes to RAX, negative
//! where it is one of KVM's own errnos.

use std::sync::OnceLock;

use addr::Gpa;

use crate::clock::kvmclock::KvmClock;
use crate::clock::memory::GuestMemory;
use crate::clock::time::GuestTsc;
use crate::irqchip::delivery::ApicBus;
use crate::irqchip::message::{DeliveryMode, Message};

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const CLOCK_PAIRING: u64 = 9;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;
const MAP_GPA_RANGE: u64 = 12;

const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
const VMMCALL: [u8; 3] = [0x0f, 0x01, 0xd9];

const EPERM: i64 = -1;
const EFAULT: i64 = -14;
const EINVAL: i64 = -22;
const EOPNOTSUPP: i64 = -95;
const ENOSYS: i64 = -1000;

/// `KVM_FEATURE_*`: bits of CPUID leaf `0x4000_0001`, EAX.
#[derive(Clone, Copy)]
enum Feature {
    Unhalt = 7,
    SendIpi = 11,
    SchedYield = 13,
}

/// Whether the caller is in 64-bit mode: others pass 32 bits of each register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 64-bit mode.
    Long,
    /// Everything else.
    Short,
}

/// A hypercall as the guest made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercall {
    /// RAX.
    pub nr: u64,
    /// RBX, RCX, RDX, RSI.
    pub args: [u64; 4],
    /// The caller's mode.
    pub width: Width,
    /// The caller's privilege level: 0, or the call is refused.
    pub cpl: u8,
}

/// What a hypercall may reach.
pub struct Machine<'a> {
    /// What the guest was offered (leaf `0x4000_0001`, EAX), or all ones where the monitor does not
    /// want that enforced.
    pub features: u32,
    /// Whether `KVM_HC_MAP_GPA_RANGE` leaves for the monitor (`KVM_CAP_EXIT_HYPERCALL`).
    pub exits_map_gpa_range: bool,
    /// The local APICs, where they are ours.
    pub apics: Option<&'a ApicBus>,
    /// The VM's clock.
    pub clock: &'a KvmClock,
    /// The vCPU's TSC.
    pub tsc: &'a GuestTsc,
    /// Guest memory.
    pub memory: &'a dyn GuestMemory,
}

/// How a hypercall ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this in RAX.
    Answer(u64),
    /// The monitor answers (`KVM_EXIT_HYPERCALL`).
    Exit,
}

/// The hypercall instruction of this host's vendor: what KVM lets its guests end up with.
pub fn native_instruction() -> [u8; 3] {
    static NATIVE: OnceLock<[u8; 3]> = OnceLock::new();
    *NATIVE.get_or_init(|| {
        let leaf = core::arch::x86_64::__cpuid(0);
        let intel = [leaf.ebx, leaf.edx, leaf.ecx]
            .map(u32::to_le_bytes)
            .concat()
            == b"GenuineIntel";
        if intel { VMCALL } else { VMMCALL }
    })
}

/// Makes the call.
pub fn call(call: &Hypercall, machine: &Machine<'_>) -> Outcome {
    let narrow = |value: u64| match call.width {
        Width::Long => value,
        Width::Short => value & 0xffff_ffff,
    };
    let nr = narrow(call.nr);
    let args = call.args.map(narrow);
    if call.cpl == 0 && nr == MAP_GPA_RANGE && machine.exits_map_gpa_range {
        return map_gpa_range(args).map_or(Outcome::Exit, |errno| Outcome::Answer(narrow(errno)));
    }
    let answer = if call.cpl != 0 {
        EPERM
    } else {
        answer(nr, args, call.width, machine)
    };
    Outcome::Answer(narrow(answer as u64))
}

fn map_gpa_range([gpa, pages, ..]: [u64; 4]) -> Option<u64> {
    let frame = gpa >> 12;
    let valid = gpa.is_multiple_of(4096) && frame.wrapping_add(pages) > frame;
    (!valid).then_some(EINVAL as u64)
}

fn answer(nr: u64, args: [u64; 4], width: Width, machine: &Machine<'_>) -> i64 {
    let has = |feature: Feature| machine.features & (1 << feature as u32) != 0;
    match nr {
        VAPIC_POLL_IRQ => 0,
        KICK_CPU if has(Feature::Unhalt) => kick(args[1], machine),
        CLOCK_PAIRING => clock_pairing(args, machine),
        SEND_IPI if has(Feature::SendIpi) => send_ipi(args, width, machine),
        SCHED_YIELD if has(Feature::SchedYield) => {
            std::thread::yield_now();
            0
        }
        _ => ENOSYS,
    }
}

fn kick(id: u64, machine: &Machine<'_>) -> i64 {
    if let Some(apics) = machine.apics {
        let delivery = DeliveryMode::RemoteRead;
        apics.deliver(
            None,
            &Message {
                delivery,
                ..Message::fixed(0, id as u32)
            },
        );
        std::thread::yield_now();
    }
    0
}

fn clock_pairing([page, kind, ..]: [u64; 4], machine: &Machine<'_>) -> i64 {
    if kind != 0 {
        return EOPNOTSUPP;
    }
    match machine
        .clock
        .write_pairing(machine.memory, Gpa::new(page), machine.tsc)
    {
        Ok(()) => 0,
        Err(_) => EFAULT,
    }
}

fn send_ipi([low, high, first, icr]: [u64; 4], width: Width, machine: &Machine<'_>) -> i64 {
    const DESTINATION_MODE: u64 = 1 << 11;
    const SHORTHAND: u64 = 3 << 18;
    if icr & (DESTINATION_MODE | SHORTHAND) != 0 {
        return EINVAL;
    }
    let Some(apics) = machine.apics else {
        return EOPNOTSUPP;
    };
    let message = Message::from_icr(icr as u32, 0);
    let second = (first as u32).wrapping_add(if width == Width::Long { 64 } else { 32 });
    let Some(count) = apics.deliver_to_set(first as u32, low, &message) else {
        return EOPNOTSUPP;
    };
    i64::from(count + apics.deliver_to_set(second, high, &message).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::memory::NoMemory;

    struct Nothing;

    impl GuestMemory for Nothing {
        fn read(&self, gpa: Gpa, _data: &mut [u8]) -> Result<(), NoMemory> {
            Err(NoMemory(gpa))
        }
        fn write(&self, gpa: Gpa, _data: &[u8]) -> Result<(), NoMemory> {
            Err(NoMemory(gpa))
        }
    }

    fn run(nr: u64, args: [u64; 4], features: u32, cpl: u8, width: Width) -> Outcome {
        let (clock, tsc) = (KvmClock::new(1_000_000), GuestTsc::new(1_000_000));
        let machine = Machine {
            features,
            exits_map_gpa_range: features == 0,
            apics: None,
            clock: &clock,
            tsc: &tsc,
            memory: &Nothing,
        };
        call(
            &Hypercall {
                nr,
                args,
                width,
                cpl,
            },
            &machine,
        )
    }

    fn long(nr: u64, args: [u64; 4], features: u32) -> i64 {
        match run(nr, args, features, 0, Width::Long) {
            Outcome::Answer(value) => value as i64,
            Outcome::Exit => i64::MAX,
        }
    }

    #[test]
    fn what_is_not_offered_is_not_there() {
        assert_eq!(long(KICK_CPU, [0; 4], 1), ENOSYS);
        assert_eq!(long(KICK_CPU, [0; 4], 1 << 7), 0);
        assert_eq!(long(SEND_IPI, [0; 4], 1), ENOSYS);
        assert_eq!(long(77, [0; 4], u32::MAX), ENOSYS);
        assert_eq!(long(VAPIC_POLL_IRQ, [0; 4], 1), 0);
    }

    #[test]
    fn answers_are_as_wide_as_the_caller() {
        assert_eq!(
            run(77, [0; 4], 1, 0, Width::Short),
            Outcome::Answer(0xffff_fc18)
        );
        assert_eq!(run(1, [0; 4], 1, 3, Width::Long), Outcome::Answer(u64::MAX));
    }

    #[test]
    fn bad_arguments() {
        assert_eq!(long(SEND_IPI, [1, 0, 0, 1 << 11], u32::MAX), EINVAL);
        assert_eq!(long(CLOCK_PAIRING, [0x1000, 1, 0, 0], 1), EOPNOTSUPP);
        assert_eq!(long(CLOCK_PAIRING, [0x1000, 0, 0, 0], 1), EFAULT);
        assert_eq!(long(MAP_GPA_RANGE, [0x1001, 1, 0, 0], 0), EINVAL);
        assert_eq!(long(MAP_GPA_RANGE, [0x1000, 0, 0, 0], 0), EINVAL);
        assert_eq!(long(MAP_GPA_RANGE, [0x1000, 1, 0, 0], 0), i64::MAX);
        assert_eq!(long(MAP_GPA_RANGE, [0x1000, 1, 0, 0], 1), ENOSYS);
    }
}
