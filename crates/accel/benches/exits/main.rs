//! What it costs to leave the guest, to come back, and to interrupt it: on every accelerator that
//! this host offers, side by side.
//!
//! `cargo bench -p accel --bench exits`, or with a word out of the names of what to measure, or
//! `kvm` or `user` for one accelerator only. Medians.

#![expect(
    unsafe_code,
    reason = "the guest's memory is handed to it, and KVM's structures are unions"
)]

mod guest;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use accel::{Accelerator, Exit, Preference, choose};
use guest::{COUNTER, Chips, GSI, Guest, VECTOR};
use kvm_bindings::{KVM_CAP_EXIT_HYPERCALL, kvm_enable_cap, kvm_irqfd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_millis(40);

/// `out 0xe1, al` for ever.
const PORT: &[u8] = &[0xe6, 0xe1, 0xeb, 0xfc];
/// `mov ebx, 0x80000000`; then `mov [rbx], eax` for ever.
const MMIO: &[u8] = &[0xbb, 0, 0, 0, 0x80, 0x89, 0x03, 0xeb, 0xfc];
/// `xor eax, eax`; `cpuid`; and again.
const CPUID: &[u8] = &[
    0xb9, 0xe8, 3, 0, 0, 0x89, 0xce, 0x31, 0xc0, 0x0f, 0xa2, 0xff, 0xce, 0x75, 0xf8, 0xe6, 0xe1,
    0xeb, 0xed,
];
/// `sti; hlt` for ever, with interrupts taken.
const HALT: &[u8] = &[0xfb, 0xf4, 0xeb, 0xfc];
/// `sti; pause` for ever.
const SPIN: &[u8] = &[0xfb, 0xf3, 0x90, 0xeb, 0xfc];

/// The guest's answers of the x2APIC EOI register: `mov ecx, 0x80b; xor eax, eax; xor edx, edx;
/// wrmsr`.
const EOI: &[u8] = &[0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30];

/// The same hypercall a thousand times, then `out 0xe1, al`: `mov esi, 1000; mov eax, 100;
/// vmcall; dec esi; jnz; out; jmp`.
const HYPERCALL: &[u8] = &[
    0xbe, 0xe8, 3, 0, 0, 0xb8, 100, 0, 0, 0, 0x0f, 0x01, 0xc1, 0xff, 0xce, 0x75, 0xf4, 0xe6, 0xe1,
    0xeb, 0xeb,
];

/// `KVM_HC_MAP_GPA_RANGE` for one page for ever, which the monitor asked to see: `mov ebx, 0x1000; mov
/// ecx, 1; xor edx, edx`; then `mov eax, 12; vmcall` and again.
const MAP_RANGE: &[u8] = &[
    0xbb, 0, 0x10, 0, 0, 0xb9, 1, 0, 0, 0, 0x31, 0xd2, 0xb8, 12, 0, 0, 0, 0x0f, 0x01, 0xc1, 0xeb,
    0xf6,
];

/// An interrupt handler: saves, `body`, EOI, restores, returns.
fn handler(body: &[u8]) -> Vec<u8> {
    let mut code = vec![0x50, 0x51, 0x52];
    code.extend(EOI);
    code.extend(body);
    code.extend([0x5a, 0x59, 0x58, 0x48, 0xcf]);
    code
}

/// `lock inc qword [COUNTER]`.
fn count() -> Vec<u8> {
    let mut code = vec![0xf0, 0x48, 0xff, 0x04, 0x25];
    code.extend((COUNTER as u32).to_le_bytes());
    code
}

/// A thousand IPIs to vCPU 1, each awaited in memory, then `out 0xe1, al`; for ever.
fn ping() -> Vec<u8> {
    let counter = (COUNTER as u32).to_le_bytes();
    // mov esi, 1000
    let mut code = vec![0xbe, 0xe8, 3, 0, 0];
    let round = code.len();
    // mov rdi, [COUNTER]; mov ecx, 0x830; mov edx, 1; mov eax, VECTOR | assert; wrmsr
    code.extend([0x48, 0x8b, 0x3c, 0x25]);
    code.extend(counter);
    code.extend([
        0xb9, 0x30, 0x08, 0, 0, 0xba, 1, 0, 0, 0, 0xb8, VECTOR, 0x40, 0, 0, 0x0f, 0x30,
    ]);
    // wait: pause; cmp rdi, [COUNTER]; je wait
    code.extend([0xf3, 0x90, 0x48, 0x3b, 0x3c, 0x25]);
    code.extend(counter);
    code.extend([0x74, 0xf4]);
    // dec esi; jnz round
    code.extend([0xff, 0xce, 0x75]);
    code.push((round as i64 - (code.len() as i64 + 1)) as u8);
    // out 0xe1, al; jmp start
    code.extend([0xe6, 0xe1, 0xeb]);
    code.push((-(code.len() as i64 + 1)) as u8);
    code
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds for each of `work` things that the guest does between two exits. Not a number where
/// the guest does not come out: a KVM in software may not know the instruction.
fn exits(accelerator: &dyn Accelerator, code: &[u8], work: u32) -> f64 {
    let mut guest = Guest::new(accelerator, Chips::Message, &[code], &[0x48, 0xcf]);
    if guest.vm.check_extension(KVM_CAP_EXIT_HYPERCALL) > 0 {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_EXIT_HYPERCALL,
            ..Default::default()
        };
        cap.args[0] = 1 << 12;
        guest.vm.enable_cap(&cap).expect("hypercalls that leave");
    }
    let done = watch(guest.vcpus[0].kicker());
    let vcpu = &mut guest.vcpus[0];
    let mut rounds = Vec::new();
    for _ in 0..=ROUNDS {
        let (start, mut count) = (Instant::now(), 0u32);
        while start.elapsed() < ROUND {
            for _ in 0..16 / work.min(16) {
                match vcpu.run().expect("KVM_RUN") {
                    Exit::IoOut { .. } | Exit::MmioWrite { .. } => count += 1,
                    Exit::Hypercall { ret, .. } => {
                        *ret = 0;
                        count += 1;
                    }
                    Exit::Interrupted => return f64::NAN,
                    other => panic!("{other:?}"),
                }
            }
        }
        rounds.push(start.elapsed().as_secs_f64() * 1e9 / f64::from(count * work));
    }
    done.store(true, Ordering::Relaxed);
    // The first round translates, faults and fills caches.
    median(rounds.split_off(1))
}

/// Gets a vCPU out if it is not done in time.
fn watch(kicker: Arc<dyn accel::Kicker>) -> Arc<AtomicBool> {
    let done = Arc::new(AtomicBool::new(false));
    let watched = Arc::clone(&done);
    std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !watched.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
            if Instant::now() > deadline {
                kicker.kick();
                return;
            }
        }
    });
    done
}

/// Nanoseconds from a write to an irqfd until the halted guest's handler has left for the monitor.
fn wake_up(accelerator: &dyn Accelerator) -> f64 {
    let body = handler(&[0xe6, 0xe1]);
    let mut guest = Guest::new(accelerator, Chips::Message, &[HALT], &body);
    guest.vcpus[0].set_apic_enabled();
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let request = kvm_irqfd {
        fd: event.as_raw_fd() as u32,
        gsi: GSI,
        ..Default::default()
    };
    guest.vm.irqfd(&request).expect("an irqfd");
    let (seen, stop) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let mut vcpu = guest.vcpus.remove(0);
    let kicker = vcpu.kicker();
    let thread = {
        let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if let Exit::IoOut { .. } = vcpu.run().expect("KVM_RUN") {
                    seen.fetch_add(1, Ordering::Release);
                }
            }
        })
    };
    let mut times = Vec::new();
    for round in 0..400u64 {
        // Long enough for the vCPU to fall asleep.
        std::thread::sleep(Duration::from_micros(300));
        let start = Instant::now();
        event.write(1).expect("an event");
        while seen.load(Ordering::Acquire) == round {
            assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
            std::thread::yield_now();
        }
        times.push(start.elapsed().as_secs_f64() * 1e9);
    }
    stop.store(true, Ordering::Relaxed);
    kicker.kick();
    thread.join().expect("the vCPU's thread");
    median(times)
}

/// Nanoseconds from an IPI until its handler's count is seen by the sender.
fn ipi(accelerator: &dyn Accelerator, target: &[u8]) -> f64 {
    let mut guest = Guest::new(
        accelerator,
        Chips::Message,
        &[&ping(), target],
        &handler(&count()),
    );
    guest.vcpus[0].set_apic_enabled();
    guest.vcpus[1].set_apic_enabled();
    let mut other = guest.vcpus.remove(1);
    let stop = Arc::new(AtomicBool::new(false));
    let kicker = other.kicker();
    let thread = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                other.run().expect("KVM_RUN");
            }
        })
    };
    let rounds = (0..=3).map(|_| {
        let start = Instant::now();
        guest.vcpus[0].run().expect("KVM_RUN");
        start.elapsed().as_secs_f64() * 1e9 / 1000.0
    });
    let result = median(rounds.skip(1).collect());
    stop.store(true, Ordering::Relaxed);
    kicker.kick();
    thread.join().expect("the vCPU's thread");
    result
}

trait ApicEnabled {
    fn set_apic_enabled(&self);
}

impl ApicEnabled for Box<dyn accel::Vcpu> {
    fn set_apic_enabled(&self) {
        let mut state = self.get_lapic().expect("a local APIC");
        state.regs[0xf0] = -1;
        state.regs[0xf1] = 1;
        self.set_lapic(&state).expect("a local APIC");
    }
}

type Measure = fn(&dyn Accelerator) -> f64;

const MEASURES: &[(&str, Measure)] = &[
    ("port write, exit and back", |a| exits(a, PORT, 1)),
    ("MMIO write, exit and back", |a| exits(a, MMIO, 1)),
    ("hypercall, exit and back", |a| exits(a, MAP_RANGE, 1)),
    ("hypercall", |a| exits(a, HYPERCALL, 1000)),
    ("CPUID", |a| exits(a, CPUID, 1000)),
    ("irqfd wakes HLT, and out", wake_up),
    ("IPI to a spinning vCPU", |a| ipi(a, SPIN)),
    ("IPI to a halted vCPU", |a| ipi(a, HALT)),
];

fn main() {
    let mut words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let only = words
        .iter()
        .position(|word| word == "kvm" || word == "user");
    let only = only.map(|at| words.remove(at));
    let accelerators = open(only.as_deref());
    print!("{:<28}", "nanoseconds each");
    for accelerator in &accelerators {
        print!("{:>12}", accelerator.kind().to_string());
    }
    println!();
    for (name, measure) in MEASURES {
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        print!("{name:<28}");
        for accelerator in &accelerators {
            match measure(&**accelerator) {
                ns if ns.is_nan() => print!("{:>12}", "never"),
                ns => print!("{ns:>12.0}"),
            }
        }
        println!();
    }
}

fn open(only: Option<&str>) -> Vec<Arc<dyn Accelerator>> {
    let preferences = [
        Preference::Kernel,
        Preference::User(accel::user::Config::default()),
    ];
    let open = |preference| match choose(preference) {
        Ok(choice) => Some(choice.accelerator),
        Err(refused) => {
            println!("{refused}");
            None
        }
    };
    let wanted = |a: &Arc<dyn Accelerator>| only.is_none_or(|name| a.kind().to_string() == name);
    preferences
        .into_iter()
        .filter_map(open)
        .filter(wanted)
        .collect()
}
