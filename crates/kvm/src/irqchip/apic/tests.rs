//! The local APIC as a state machine, under a clock that stands still unless told to move.

use std::sync::atomic::AtomicU32;

use super::registers::SPIV_ENABLED;
use super::*;
use crate::irqchip::message::Shorthand;

#[derive(Default)]
struct Bell {
    interrupts: AtomicU32,
    requests: AtomicU32,
}

impl VcpuWake for Bell {
    fn interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
    }
    fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Clock(AtomicU64);

impl TimeSource for Clock {
    fn now(&self) -> Now {
        let ns = self.0.load(Ordering::Relaxed);
        Now {
            ns,
            tsc: 2 * ns,
            tsc_khz: 2_000_000,
        }
    }
}

struct NoAlarm;

impl Alarm for NoAlarm {
    fn set(&self, _at: Option<u64>) {}
}

struct Bench {
    lapic: Lapic,
    bell: Arc<Bell>,
    clock: Arc<Clock>,
}

fn bench(id: u32) -> Bench {
    let (bell, clock) = (Arc::new(Bell::default()), Arc::new(Clock::default()));
    let lapic = Lapic::new(LapicConfig {
        id,
        role: if id == 0 {
            Role::Bootstrap
        } else {
            Role::Application
        },
        policy: Arc::new(Policy::default()),
        wake: bell.clone(),
        time: clock.clone(),
        alarm: Arc::new(NoAlarm),
    });
    lapic.set_features(FEATURES);
    Bench { lapic, bell, clock }
}

impl Bench {
    fn write(&self, register: u32, value: u32) -> Effects {
        self.lapic.write_memory(register, &value.to_le_bytes())
    }

    fn read(&self, register: u32) -> u32 {
        let mut bytes = [0xcc; 4];
        self.lapic.read_memory(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn enable(&self) {
        self.write(reg::SPIV, SPIV_ENABLED | 0xff);
    }

    fn take(&self) -> Option<u8> {
        let vector = self.lapic.has_interrupt()?;
        self.lapic.acknowledge(vector);
        Some(vector)
    }
}

const FEATURES: ApicFeatures = ApicFeatures {
    x2apic: true,
    tsc_deadline: true,
    physical_bits: 40,
};
const X2APIC: u64 = DEFAULT_BASE | 0xc00;

#[test]
fn after_reset() {
    let bsp = bench(0);
    assert_eq!(bsp.lapic.base(), 0xfee0_0900);
    assert_eq!(
        bsp.read(reg::LVT0),
        0x700,
        "the bootstrap processor hears the 8259"
    );
    assert_eq!(bsp.read(reg::LVT1), lvt::MASKED);
    assert_eq!(bsp.read(reg::SPIV), 0xff);
    assert_eq!(bsp.read(reg::DFR), 0xffff_ffff);
    let ap = bench(3);
    assert_eq!(ap.lapic.base(), 0xfee0_0800);
    assert_eq!(ap.read(reg::ID), 3 << 24);
    assert_eq!(ap.read(reg::LVT0), lvt::MASKED);
}

#[test]
fn nothing_is_taken_before_software_enables_it() {
    let b = bench(0);
    assert!(!b.lapic.accept(&Message::fixed(0x40, 0)));
    b.enable();
    assert!(b.lapic.accept(&Message::fixed(0x40, 0)));
    assert_eq!(b.take(), Some(0x40));
}

#[test]
fn priorities_nest_by_class() {
    let b = bench(0);
    b.enable();
    for vector in [0x41, 0x45, 0x52] {
        b.lapic.accept(&Message::fixed(vector, 0));
    }
    assert_eq!(b.take(), Some(0x52));
    assert_eq!(b.read(reg::PROCPRI), 0x50);
    assert_eq!(b.take(), None, "class 4 waits for class 5");
    b.lapic.accept(&Message::fixed(0x61, 0));
    assert_eq!(b.take(), Some(0x61));
    let ended: Vec<_> = (0..2)
        .map(|_| b.write(reg::EOI, 0).eoi.unwrap().vector)
        .collect();
    assert_eq!(ended, [0x61, 0x52]);
    assert_eq!(b.take(), Some(0x45));
    assert_eq!(b.take(), None, "the same class waits");
}

#[test]
fn task_priority_holds_back_its_class_and_below() {
    let b = bench(0);
    b.enable();
    b.lapic.set_task_priority(5);
    assert_eq!(b.read(reg::TASKPRI), 0x50);
    b.lapic.accept(&Message::fixed(0x5f, 0));
    assert_eq!(b.take(), None);
    let rung = b.bell.interrupts.load(Ordering::Relaxed);
    b.lapic.set_task_priority(4);
    assert!(
        b.bell.interrupts.load(Ordering::Relaxed) > rung,
        "the vCPU is told to look"
    );
    assert_eq!(b.take(), Some(0x5f));
}

#[test]
fn tmr_follows_the_trigger_and_eoi_reports_it() {
    let b = bench(0);
    b.enable();
    let level = Message {
        trigger: Trigger::Level,
        ..Message::fixed(0x33, 0)
    };
    b.lapic.accept(&level);
    b.take();
    let eoi = b.write(reg::EOI, 0).eoi.unwrap();
    assert_eq!(
        eoi,
        EndOfInterrupt {
            vector: 0x33,
            trigger: Trigger::Level
        }
    );
    b.lapic.accept(&Message::fixed(0x33, 0));
    b.take();
    assert_eq!(b.write(reg::EOI, 0).eoi.unwrap().trigger, Trigger::Edge);
    assert_eq!(
        b.write(reg::EOI, 0).eoi,
        None,
        "an EOI with nothing in service"
    );
}

#[test]
fn software_disable_masks_the_lvt() {
    let b = bench(0);
    b.enable();
    b.write(reg::LVTERR, 0x30);
    b.write(reg::SPIV, 0xff);
    assert_eq!(b.read(reg::LVTERR), lvt::MASKED | 0x30);
    b.write(reg::LVTERR, 0x31);
    assert_eq!(
        b.read(reg::LVTERR),
        lvt::MASKED | 0x31,
        "and keeps it masked"
    );
    b.enable();
    b.write(reg::LVTERR, 0xffff_ffff);
    assert_eq!(b.read(reg::LVTERR), lvt::MASKED | lvt::SEND_PENDING | 0xff);
}

#[test]
fn odd_accesses_by_memory() {
    let b = bench(0x0c);
    let mut byte = [0];
    b.lapic.read_memory(reg::ID + 3, &mut byte);
    assert_eq!(byte, [0x0c]);
    let mut wide = [0xcc; 8];
    b.lapic.read_memory(reg::ID, &mut wide);
    assert_eq!(wide, [0; 8], "wider than a register");
    b.lapic.write_memory(reg::TASKPRI, &[0x20]);
    assert_eq!(b.read(reg::TASKPRI), 0, "narrower than a register");
    assert_eq!(b.read(0x40), 0, "reserved");
}

#[test]
fn x2apic_has_msrs_only_and_a_fixed_logical_id() {
    let b = bench(0x25);
    assert_eq!(b.lapic.read_msr(0x802), Err(Refused));
    assert!(
        b.lapic
            .set_base(X2APIC, BaseWriter::Guest)
            .unwrap()
            .addressing_changed
    );
    assert_eq!(b.lapic.read_msr(0x802), Ok(0x25));
    assert_eq!(b.lapic.read_msr(0x80d), Ok(0x0002_0020));
    for index in [0x80e, 0x831, 0x809] {
        assert_eq!(
            b.lapic.read_msr(index),
            Err(Refused),
            "{index:#x} is not in x2APIC mode"
        );
    }
    assert_eq!(b.lapic.write_msr(0x80d, 1), Err(Refused));
    assert_eq!(b.lapic.write_msr(0x808, 1 << 32), Err(Refused));
    assert_eq!(b.lapic.write_msr(0x828, 1), Err(Refused));
    assert_eq!(b.lapic.write_msr(0x828, 0), Ok(Effects::NONE));
}

#[test]
fn x2apic_ipis() {
    let b = bench(0);
    b.lapic.set_base(X2APIC | 0x100, BaseWriter::Guest).unwrap();
    let sent = b
        .lapic
        .write_msr(0x830, 0x0001_0002_0000_1845)
        .unwrap()
        .ipi
        .unwrap();
    assert_eq!((sent.destination, sent.vector), (0x1_0002, 0x45));
    assert_eq!(
        b.lapic.read_msr(0x830),
        Ok(0x0001_0002_0000_0845),
        "never busy"
    );
    assert_eq!(b.lapic.write_msr(0x830, 1 << 13), Err(Refused));
    let own = b.lapic.write_msr(0x83f, 0x77).unwrap().ipi.unwrap();
    assert_eq!((own.shorthand, own.vector), (Shorthand::Myself, 0x77));
    assert_eq!(b.lapic.write_msr(0x83f, 0x177), Err(Refused));
}

#[test]
fn base_transitions_as_the_manual_draws_them() {
    const DISABLED: u64 = DEFAULT_BASE;
    const XAPIC: u64 = DEFAULT_BASE | 0x800;
    const INVALID: u64 = DEFAULT_BASE | 0x400;
    let without = ApicFeatures {
        x2apic: false,
        ..FEATURES
    };
    let guest = |old, new| check_base(old, new, BaseWriter::Guest, FEATURES);
    let modes = [DISABLED, XAPIC, X2APIC];
    let allowed: Vec<Vec<bool>> = modes
        .iter()
        .map(|old| modes.iter().map(|new| guest(*old, *new)).collect())
        .collect();
    assert_eq!(
        allowed,
        [[true, true, false], [true, true, true], [true, false, true]]
    );
    assert!(!guest(XAPIC, INVALID));
    assert!(check_base(X2APIC, XAPIC, BaseWriter::Monitor, FEATURES));
    assert!(
        !check_base(XAPIC, X2APIC, BaseWriter::Monitor, without),
        "not in CPUID"
    );
    assert!(
        !guest(XAPIC, XAPIC | 1 << 40),
        "beyond the physical addresses"
    );
    assert!(!guest(XAPIC, XAPIC | 1), "reserved");
}

#[test]
fn init_drops_an_earlier_sipi() {
    let b = bench(1);
    let message = |delivery, vector| Message {
        delivery,
        ..Message::fixed(vector, 1)
    };
    b.lapic.accept(&message(DeliveryMode::Startup, 0x10));
    b.lapic.accept(&message(DeliveryMode::Init, 0));
    assert!(b.lapic.take_init());
    assert_eq!(b.lapic.take_sipi(), None);
    b.lapic.accept(&message(DeliveryMode::Startup, 0x9f));
    assert_eq!(b.lapic.take_sipi(), Some(0x9f));
    assert!(!b.lapic.has_startup_events());
    let deassert = Message {
        trigger: Trigger::Level,
        level: Level::Deassert,
        ..message(DeliveryMode::Init, 0)
    };
    assert!(!b.lapic.accept(&deassert));
}

#[test]
fn a_masked_timer_waits_for_its_mask() {
    let b = bench(0);
    b.enable();
    b.write(reg::LVTT, lvt::MASKED | 0x30);
    b.write(reg::TMICT, 1000);
    b.clock.0.store(2000, Ordering::Relaxed);
    b.lapic.timer_fired();
    assert!(!b.lapic.has_pending_timer());
    b.write(reg::LVTT, 0x30);
    assert!(b.lapic.has_pending_timer());
    assert_eq!(b.take(), None, "an interrupt only when the vCPU asks");
    b.lapic.inject_pending_timer();
    assert_eq!(b.take(), Some(0x30));
}

#[test]
fn a_timer_before_cpuid_knows_one_mode() {
    let b = bench(0);
    b.lapic.set_features(ApicFeatures::default());
    b.enable();
    b.write(reg::LVTT, lvt::TIMER_TSC_DEADLINE | 0x30);
    assert_eq!(b.read(reg::LVTT), 0x30);
}

#[test]
fn state_goes_out_and_in_again() {
    let b = bench(2);
    b.enable();
    b.write(reg::TDCR, 0xb);
    b.write(reg::TMICT, 10_000);
    b.clock.0.store(4_000, Ordering::Relaxed);
    b.lapic.accept(&Message::fixed(0x40, 2));
    let state = b.lapic.state();
    let other = bench(2);
    assert!(other.lapic.set_state(&state).unwrap().addressing_changed);
    assert_eq!(other.read(reg::TMCCT), 6_000);
    assert_eq!(other.take(), Some(0x40));
    other.clock.0.store(6_000, Ordering::Relaxed);
    other.lapic.timer_fired();
    assert_eq!(other.read(reg::TMCCT), 0);
}

#[test]
fn x2apic_state_shows_the_id_where_the_monitor_expects_it() {
    let b = bench(5);
    b.lapic.set_base(X2APIC, BaseWriter::Guest).unwrap();
    let id = |state: &kvm_bindings::kvm_lapic_state| {
        u32::from_le_bytes(std::array::from_fn(|i| {
            state.regs[reg::ID as usize + i] as u8
        }))
    };
    let mut state = b.lapic.state();
    assert_eq!(id(&state), 5 << 24);
    b.lapic.policy.enable_x2apic_api(1).unwrap();
    assert_eq!(id(&b.lapic.state()), 5);
    assert_eq!(b.lapic.set_state(&state), Err(crate::errno::Errno::EINVAL));
    state.regs[reg::ID as usize..reg::ID as usize + 4].copy_from_slice(&[5, 0, 0, 0]);
    assert!(b.lapic.set_state(&state).is_ok());
}

#[test]
fn a_sleeper_is_its_own_alarm_clock() {
    let b = bench(0);
    b.enable();
    b.write(reg::LVTT, 0x30);
    b.write(reg::TMICT, 500_000);
    let gate = HaltGate::default();
    // The clock of this bench moves by hand: the sleeper wakes by its own time, and looks.
    gate.shut();
    assert_eq!(b.lapic.sleep(&gate), Woken::TimedOut);
    assert!(!b.lapic.has_pending_timer());
    b.clock.0.store(1_000_000, Ordering::Relaxed);
    gate.shut();
    assert_eq!(b.lapic.sleep(&gate), Woken::TimedOut);
    assert!(b.lapic.has_pending_timer());
    gate.shut();
    gate.open();
    assert_eq!(b.lapic.sleep(&gate), Woken::Opened);
}

#[test]
fn eoi_interest_is_kept_by_vector() {
    let b = bench(0);
    assert!(b.lapic.is_eoi_interest_stale());
    b.lapic.set_eoi_interest(|set| set.insert(0x91));
    assert!(b.lapic.wants_eoi(0x91) && !b.lapic.wants_eoi(0x90));
    assert!(!b.lapic.is_eoi_interest_stale());
}

/// A vCPU that sleeps whenever it has nothing to do.
struct Sleeper(Arc<HaltGate>);

impl VcpuWake for Sleeper {
    fn interrupt(&self) {
        self.0.open();
    }
    fn request(&self) {
        self.0.open();
    }
}

#[test]
fn no_interrupt_and_no_wake_up_is_lost_between_threads() {
    const ROUNDS: u32 = 2000;
    let gate = Arc::new(HaltGate::default());
    let lapic = Arc::new(Lapic::new(LapicConfig {
        id: 0,
        role: Role::Bootstrap,
        policy: Arc::new(Policy::default()),
        wake: Arc::new(Sleeper(Arc::clone(&gate))),
        time: Arc::new(Clock::default()),
        alarm: Arc::new(NoAlarm),
    }));
    lapic.write_memory(reg::SPIV, &0x1ffu32.to_le_bytes());
    let taken: Arc<[AtomicU32; 2]> = Arc::default();
    let posters: Vec<_> = (0..2u8)
        .map(|poster| {
            let (lapic, taken) = (Arc::clone(&lapic), Arc::clone(&taken));
            std::thread::spawn(move || {
                for round in 0..ROUNDS {
                    lapic.accept(&Message::fixed(0x40 + 0x10 * poster, 0));
                    while taken[usize::from(poster)].load(Ordering::Acquire) == round {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let mut left = 2 * ROUNDS;
    while left > 0 {
        gate.shut();
        let Some(vector) = lapic.has_interrupt() else {
            let woken = gate.wait(Some(Duration::from_secs(20)));
            assert_eq!(woken, Woken::Opened, "{left} interrupts to come");
            continue;
        };
        gate.cancel();
        lapic.acknowledge(vector);
        lapic.write_memory(reg::EOI, &[0; 4]);
        taken[usize::from(vector - 0x40) / 0x10].fetch_add(1, Ordering::Release);
        left -= 1;
    }
    for poster in posters {
        poster.join().unwrap();
    }
}
