//! One step of a sequence: an ioctl with its argument, an event, or a guest that runs.

use fastrand::Rng;
use kvm_bindings::*;

use crate::draw::Draw;
use crate::guest::Guest;
use crate::side::{EVENTS, MEMORY};

/// The object that an ioctl is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum On {
    System,
    Vm,
    Vcpu(usize),
}

/// What only the side knows, put into an argument at an offset.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patch {
    /// The descriptor of an eventfd (4 bytes).
    Event(usize, usize),
    /// The host address of a byte of the memory (8 bytes).
    Memory(usize, u64),
    /// The host address of a buffer for bitmaps (8 bytes), which is filled with this word before.
    Bitmap(usize, u64),
}

#[derive(Clone, Debug)]
pub(crate) enum Input {
    Number(u64),
    Bytes { bytes: Vec<u8>, patches: Vec<Patch> },
}

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Call {
        name: &'static str,
        on: On,
        request: u32,
        input: Input,
    },
    /// What `get` shows, with some bytes changed, is given to `set`.
    Change {
        name: &'static str,
        on: On,
        get: u32,
        set: u32,
        size: usize,
        header: Vec<u8>,
        changes: Vec<(usize, u8)>,
    },
    /// Adds to an eventfd.
    Event(usize),
    /// Loads a guest on a vCPU, and runs it for some exits, answering with this.
    Run {
        vcpu: usize,
        guest: Box<Guest>,
        exits: u32,
        answer: u64,
    },
    /// Runs what is loaded.
    Resume {
        vcpu: usize,
        exits: u32,
        answer: u64,
    },
}

fn bytes<T>(value: &T) -> Vec<u8> {
    // SAFETY: a structure of KVM's API is plain integers; padding in it was initialised with it.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
        .to_vec()
}

const fn number(direction: u32, nr: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | 0xae00 | nr
}

fn io(nr: u32) -> u32 {
    number(0, nr, 0)
}

fn call<T>(name: &'static str, on: On, direction: u32, nr: u32, value: &T) -> Step {
    patched(name, on, direction, nr, value, Vec::new())
}

fn patched<T>(
    name: &'static str,
    on: On,
    direction: u32,
    nr: u32,
    value: &T,
    patches: Vec<Patch>,
) -> Step {
    let request = number(direction, nr, size_of::<T>());
    Step::Call {
        name,
        on,
        request,
        input: Input::Bytes {
            bytes: bytes(value),
            patches,
        },
    }
}

fn plain(name: &'static str, on: On, nr: u32, value: u64) -> Step {
    Step::Call {
        name,
        on,
        request: io(nr),
        input: Input::Number(value),
    }
}

const W: u32 = 1;
const R: u32 = 2;
const WR: u32 = 3;

impl Step {
    pub(crate) fn random(random: &mut Rng) -> Step {
        match random.u64(..100) {
            0..12 => memory(random),
            12..17 => plain(
                "KVM_CREATE_VCPU",
                On::Vm,
                0x41,
                random.mostly(&[0, 0, 1], |n| n % 5000),
            ),
            17..20 => plain("KVM_CREATE_IRQCHIP", On::Vm, 0x60, 0),
            20..42 => interrupts(random),
            42..50 => vm_state(random),
            50..72 => vcpu_state(random),
            72..92 => Step::Run {
                vcpu: random.usize(..2),
                guest: Box::new(Guest::random(random)),
                exits: 1 + random.u32(..6),
                answer: random.u64(..),
            },
            _ => Step::Resume {
                vcpu: random.usize(..2),
                exits: 1 + random.u32(..3),
                answer: random.u64(..),
            },
        }
    }
}

/// Steps that most sequences begin with.
pub(crate) fn opening(random: &mut Rng) -> Vec<Step> {
    let mut steps = vec![slot(0, 0, 0, 0x10_0000, 0)];
    if random.u64(..3) > 0 {
        steps.push(plain("KVM_CREATE_IRQCHIP", On::Vm, 0x60, 0));
    }
    steps.push(plain("KVM_CREATE_VCPU", On::Vm, 0x41, 0));
    steps
}

fn slot(slot: u32, flags: u32, gpa: u64, size: u64, at: u64) -> Step {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: size,
        userspace_addr: 0,
    };
    patched(
        "KVM_SET_USER_MEMORY_REGION",
        On::Vm,
        W,
        0x46,
        &region,
        vec![Patch::Memory(24, at)],
    )
}

fn memory(random: &mut Rng) -> Step {
    match random.u64(..10) {
        0 => slot(0, random.pick(&[0, 1]), 0, 0x10_0000, 0),
        1..7 => {
            let size = random.mostly(&[0, 0x1000, 0x2000, 0x8_0000, 0x10_0000], |n| n & 0x1f_ffff);
            let gpa = random.mostly(
                &[
                    0x10_0000, 0x18_0000, 0x20_0000, 0x28_0000, 0x30_0000, 0x8_0000,
                ],
                |n| n & 0xff_ffff,
            );
            let at = random.mostly(&[0x10_0000, 0x18_0000, 0x10_1000], |n| n & 0xf_ffff);
            let number = random.mostly(&[1, 1, 2, 2, 3], |n| n as u32);
            let flags = random.mostly(&[0, 0, 1, 1, 2, 3], |n| n as u32);
            slot(number, flags, gpa, size.min(MEMORY as u64 - at), at)
        }
        7 | 8 => {
            let log = kvm_dirty_log {
                slot: random.mostly(&[0, 1, 2, 3], |n| n as u32),
                ..Default::default()
            };
            patched(
                "KVM_GET_DIRTY_LOG",
                On::Vm,
                W,
                0x42,
                &log,
                vec![Patch::Bitmap(8, 0)],
            )
        }
        _ => {
            let log = kvm_clear_dirty_log {
                slot: random.pick(&[0, 1, 2]),
                num_pages: random.pick(&[0, 2, 64, 128, 256]),
                first_page: random.pick(&[0, 0, 64, 128, 7]),
                ..Default::default()
            };
            let bits = random.pick(&[!0, 0xff, 0]);
            patched(
                "KVM_CLEAR_DIRTY_LOG",
                On::Vm,
                WR,
                0xc0,
                &log,
                vec![Patch::Bitmap(16, bits)],
            )
        }
    }
}

fn route(random: &mut Rng) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: random.mostly(&[0, 1, 5, 9, 30, 31], |n| n as u32 % 5000),
        type_: random.mostly(&[1, 1, 2, 2], |n| n as u32 % 8),
        flags: random.mostly(&[0], |n| n as u32 & 3),
        ..Default::default()
    };
    if entry.type_ == 1 {
        entry.u.irqchip = kvm_irq_routing_irqchip {
            irqchip: random.mostly(&[0, 1, 2], |n| n as u32 % 5),
            pin: random.mostly(&[0, 1, 5, 7, 9], |n| n as u32 % 30),
        };
    } else {
        entry.u.msi = message(random);
    }
    entry
}

fn message(random: &mut Rng) -> kvm_irq_routing_msi {
    kvm_irq_routing_msi {
        address_lo: random.mostly(&[0xfee0_0000, 0xfee0_1000, 0xfee0_1004, 0xfeef_f000], |n| {
            n as u32
        }),
        address_hi: random.mostly(&[0], |n| (n as u32) & 0xffff_ff01),
        data: random.mostly(&[0x21, 0x30, 0x3f, 0x4030, 0xc033, 0x131], |n| {
            n as u32 & 0xff
        }),
        ..Default::default()
    }
}

fn event(random: &mut Rng) -> usize {
    random.usize(..EVENTS)
}

fn interrupts(random: &mut Rng) -> Step {
    match random.u64(..20) {
        0..4 => {
            let mut line = kvm_irq_level {
                level: random.pick(&[0, 1, 1, 7]),
                ..Default::default()
            };
            line.__bindgen_anon_1.irq = random.mostly(&[0, 1, 5, 8, 9, 15, 23, 30], |n| n as u32);
            if random.u64(..2) == 0 {
                call("KVM_IRQ_LINE", On::Vm, W, 0x61, &line)
            } else {
                call("KVM_IRQ_LINE_STATUS", On::Vm, WR, 0x67, &line)
            }
        }
        4..6 => {
            let count = random.mostly(&[0, 1, 2, 5], |n| n % 9) as usize;
            let flags = random.mostly(&[0u32], |n| n as u32 & 1);
            let mut table = (count as u32).to_le_bytes().to_vec();
            table.extend(flags.to_le_bytes());
            for _ in 0..count {
                table.extend(bytes(&route(random)));
            }
            Step::Call {
                name: "KVM_SET_GSI_ROUTING",
                on: On::Vm,
                request: number(W, 0x6a, 8),
                input: Input::Bytes {
                    bytes: table,
                    patches: Vec::new(),
                },
            }
        }
        6..8 => {
            let msi = message(random);
            let msi = kvm_msi {
                address_lo: msi.address_lo,
                address_hi: msi.address_hi,
                data: msi.data,
                flags: random.mostly(&[0], |n| n as u32 & 3),
                ..Default::default()
            };
            call("KVM_SIGNAL_MSI", On::Vm, W, 0xa5, &msi)
        }
        8..15 => descriptors(random),
        15 => plain("KVM_CREATE_PIT", On::Vm, 0x64, 0),
        16 => {
            let config = kvm_pit_config {
                flags: random.pick(&[0, 1, 2]),
                ..Default::default()
            };
            call("KVM_CREATE_PIT2", On::Vm, W, 0x77, &config)
        }
        17 => change(random, "irqchip", On::Vm, (WR, 0x62), (R, 0x63), 520),
        18 => Step::Event(event(random)),
        _ => {
            let control = kvm_reinject_control {
                pit_reinject: random.pick(&[0, 1]),
                ..Default::default()
            };
            call("KVM_REINJECT_CONTROL", On::Vm, 0, 0x71, &control)
        }
    }
}

/// What ties eventfds and the coalesced ring to places.
fn descriptors(random: &mut Rng) -> Step {
    match random.u64(..7) {
        0..3 => {
            let irqfd = kvm_irqfd {
                gsi: random.mostly(&[1, 5, 9, 30], |n| n as u32 % 5000),
                flags: random.mostly(&[0, 0, 1, 2], |n| n as u32 & 7),
                ..Default::default()
            };
            let patches = vec![
                Patch::Event(0, event(random)),
                Patch::Event(12, event(random)),
            ];
            patched("KVM_IRQFD", On::Vm, W, 0x76, &irqfd, patches)
        }
        3..6 => {
            let ioeventfd = kvm_ioeventfd {
                addr: random.mostly(&[0x500, 0x504, 0x3000_0000, 0x3000_0010, 0x40_0000], |n| n),
                len: random.mostly(&[0, 1, 2, 4, 8], |n| n as u32 & 15),
                datamatch: random.mostly(&[0, 1], |n| n),
                flags: random.mostly(&[0, 1, 2, 3, 4, 6], |n| n as u32 & 31),
                ..Default::default()
            };
            patched(
                "KVM_IOEVENTFD",
                On::Vm,
                W,
                0x79,
                &ioeventfd,
                vec![Patch::Event(20, event(random))],
            )
        }
        _ => {
            let zone = kvm_coalesced_mmio_zone {
                addr: random.pick(&[0x510, 0x3000_0ff8, 0x38_0000]),
                size: random.pick(&[1, 4, 0x1000]),
                __bindgen_anon_1: kvm_coalesced_mmio_zone__bindgen_ty_1 {
                    pio: random.mostly(&[0, 1], |n| n as u32),
                },
            };
            let (name, nr) = random.pick(&[
                ("KVM_REGISTER_COALESCED_MMIO", 0x67),
                ("KVM_REGISTER_COALESCED_MMIO", 0x67),
                ("KVM_UNREGISTER_COALESCED_MMIO", 0x68),
            ]);
            call(name, On::Vm, W, nr, &zone)
        }
    }
}

fn change(
    random: &mut Rng,
    name: &'static str,
    on: On,
    get: (u32, u32),
    set: (u32, u32),
    size: usize,
) -> Step {
    let header = if name == "irqchip" {
        (random.mostly(&[0, 1, 2], |n| n as u32 % 5))
            .to_le_bytes()
            .to_vec()
    } else {
        Vec::new()
    };
    // Past the chip's number; the PIT's counters would run.
    let first = if name == "pit2" { 72 } else { header.len() * 2 };
    let changes = (0..random.u64(..4)).map(|_| {
        let at = first as u64 + random.u64(..(size.min(first + 600) - first) as u64);
        (
            at as usize,
            random.mostly(&[0, 1, 2, 0x10, 0x80, 0xff], |n| n as u8),
        )
    });
    // A KVM in software may forget what is in service, now or once it is taken.
    let in_service = |at: &usize| name == "lapic" && (0x100..0x280).contains(at);
    let changes = changes.filter(|(at, _)| !in_service(at)).collect();
    Step::Change {
        name,
        on,
        get: number(get.0, get.1, size),
        set: number(set.0, set.1, size),
        size,
        header,
        changes,
    }
}

fn cap(random: &mut Rng, on: On) -> Step {
    let (number, argument) = random.pick(&[
        (KVM_CAP_SPLIT_IRQCHIP, 24),
        (KVM_CAP_SPLIT_IRQCHIP, 4097),
        (KVM_CAP_X2APIC_API, 1),
        (KVM_CAP_X2APIC_API, 3),
        (KVM_CAP_DISABLE_QUIRKS, 1),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3),
        (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 2),
        (KVM_CAP_EXCEPTION_PAYLOAD, 1),
        (KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
        (KVM_CAP_MAX_VCPU_ID, 3),
        (KVM_CAP_MAX_VCPU_ID, 99999),
        (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1),
        (KVM_CAP_HALT_POLL, 0),
        (KVM_CAP_MSR_PLATFORM_INFO, 0),
        (KVM_CAP_NR_MEMSLOTS, 0),
        (12345, 0),
    ]);
    let mut cap = kvm_enable_cap {
        cap: number,
        flags: random.mostly(&[0], |n| n as u32 & 1),
        ..Default::default()
    };
    cap.args[0] = argument;
    call("KVM_ENABLE_CAP", on, W, 0xa3, &cap)
}

fn vm_state(random: &mut Rng) -> Step {
    match random.u64(..12) {
        0..4 => cap(random, On::Vm),
        4 => plain(
            "KVM_SET_TSS_ADDR",
            On::Vm,
            0x47,
            random.pick(&[0xfffb_d000, 0xffff_d000, 0xffff_d001, !0]),
        ),
        5 => call(
            "KVM_SET_IDENTITY_MAP_ADDR",
            On::Vm,
            W,
            0x48,
            &random.pick(&[0u64, 0xfffb_c000]),
        ),
        6 => plain(
            "KVM_SET_BOOT_CPU_ID",
            On::Vm,
            0x78,
            random.mostly(&[0, 1], |n| n),
        ),
        7 => plain(
            "KVM_SET_NR_MMU_PAGES",
            On::Vm,
            0x44,
            random.pick(&[0, 63, 64, 1000]),
        ),
        8 => change(
            random,
            "pit2",
            On::Vm,
            (R, 0x9f),
            (W, 0xa0),
            size_of::<kvm_pit_state2>(),
        ),
        9 => {
            let clock = kvm_clock_data {
                flags: random.pick(&[1, 2, 4, 16]),
                ..Default::default()
            };
            call("KVM_SET_CLOCK with flags", On::Vm, W, 0x7b, &clock)
        }
        10 => {
            let device = kvm_create_device {
                type_: random.pick(&[99, 3, !0]),
                flags: random.pick(&[0, 1, 2]),
                ..Default::default()
            };
            call("KVM_CREATE_DEVICE", On::Vm, WR, 0xe0, &device)
        }
        _ => plain(
            "no such ioctl",
            random.pick(&[On::Vm, On::System, On::Vcpu(0)]),
            random.pick(&[0xf0, 0x99, 0x0b, 0xd7]),
            0,
        ),
    }
}

fn vcpu_state(random: &mut Rng) -> Step {
    let on = On::Vcpu(random.usize(..2));
    match random.u64(..23) {
        0 | 1 => change(
            random,
            "regs",
            on,
            (R, 0x81),
            (W, 0x82),
            size_of::<kvm_regs>(),
        ),
        2 | 3 => change(
            random,
            "events",
            on,
            (R, 0x9f),
            (W, 0xa0),
            size_of::<kvm_vcpu_events>(),
        ),
        4 => change(random, "debugregs", on, (R, 0xa1), (W, 0xa2), 0x40),
        5 => change(random, "xcrs", on, (R, 0xa6), (W, 0xa7), 0x20),
        6 => change(random, "fpu", on, (R, 0x8c), (W, 0x8d), 0x80),
        7 | 8 => change(random, "lapic", on, (R, 0x8e), (W, 0x8f), 1024),
        9 | 10 => call(
            "KVM_SET_MP_STATE",
            on,
            W,
            0x99,
            &kvm_mp_state {
                mp_state: random.mostly(&[0, 1, 2, 3, 4], |n| n as u32),
            },
        ),
        11 => call(
            "KVM_INTERRUPT",
            on,
            W,
            0x86,
            &kvm_interrupt {
                irq: random.mostly(&[0x20, 0x33, 6], |n| n as u32),
            },
        ),
        12 => plain("KVM_NMI", on, 0x9a, 0),
        13 => cap(random, on),
        _ => vcpu_questions(random, on),
    }
}

fn vcpu_questions(random: &mut Rng, on: On) -> Step {
    match random.u64(..9) {
        0 => {
            let asked = kvm_translation {
                linear_address: random.pick(&[
                    0,
                    0x4000,
                    0x2_0abc,
                    0x3000_0000,
                    0x4000_0000,
                    1 << 47,
                    !0,
                ]),
                ..Default::default()
            };
            call("KVM_TRANSLATE", on, WR, 0x85, &asked)
        }
        1 | 2 => msrs(random, on),
        3 => {
            let control = random.mostly(&[0, 1, 1, 0x10_0001, 0x4_0000], |n| n as u32);
            call(
                "KVM_SET_GUEST_DEBUG",
                on,
                W,
                0x9b,
                &kvm_guest_debug {
                    control: control & !2,
                    ..Default::default()
                },
            )
        }
        4 => {
            let tpr = kvm_tpr_access_ctl {
                enabled: random.pick(&[0, 1]),
                flags: random.mostly(&[0], |n| n as u32),
                ..Default::default()
            };
            call(
                "KVM_TPR_ACCESS_REPORTING",
                on,
                WR,
                0x92,
                &kvm_tpr_access_ctl { enabled: 0, ..tpr },
            )
        }
        5 => call(
            "KVM_SET_VAPIC_ADDR",
            on,
            W,
            0x93,
            &kvm_vapic_addr {
                vapic_addr: random.pick(&[0, 0x2_3000, 0x7fff_0000]),
            },
        ),
        6 => plain("KVM_KVMCLOCK_CTRL", on, 0xad, 0),
        7 => call(
            "KVM_X86_SETUP_MCE",
            on,
            W,
            0x9c,
            &random.pick(&[0u64, 10, 32, 33, 1 << 24, 0x100_000a, 1 << 8]),
        ),
        _ => {
            let attribute = kvm_device_attr {
                group: random.pick(&[0, 1]),
                attr: random.pick(&[0, 1]),
                ..Default::default()
            };
            call("KVM_HAS_DEVICE_ATTR", on, W, 0xe3, &attribute)
        }
    }
}

/// `KVM_SET_MSRS` or `KVM_GET_MSRS` of a few.
fn msrs(random: &mut Rng, on: On) -> Step {
    let count = 1 + random.u32(..3);
    let mut list = count.to_le_bytes().to_vec();
    list.extend([0; 4]);
    for _ in 0..count {
        let entry = kvm_msr_entry {
            index: random.pick(&[
                0x174,
                0x175,
                0x176,
                0x2ff,
                0x200,
                0x201,
                0x250,
                0xc000_0080,
                0xc000_0081,
                0xc000_0082,
                0xc000_0084,
                0xc000_0100,
                0xc000_0102,
                0xc000_0103,
                0x1b,
                0x17a,
                0x400,
                0x403,
                0x4b56_4d04,
                0x6e0,
                0x3b,
                0x1234,
                0x80d,
            ]),
            data: random.mostly(
                &[
                    0,
                    1,
                    6,
                    0x500,
                    0xfee0_0900,
                    0x0606_0606_0606_0606,
                    0x8000_0000_0000,
                ],
                |n| n,
            ),
            ..Default::default()
        };
        list.extend(bytes(&entry));
    }
    let (name, request) = random.pick(&[
        ("KVM_SET_MSRS", number(W, 0x89, 8)),
        ("KVM_GET_MSRS", number(WR, 0x88, 8)),
    ]);
    Step::Call {
        name,
        on,
        request,
        input: Input::Bytes {
            bytes: list,
            patches: Vec::new(),
        },
    }
}
