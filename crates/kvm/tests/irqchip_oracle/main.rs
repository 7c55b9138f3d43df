//! The same random sequences on the kernel's interrupt controllers and on ours: the same answers,
//! the same vectors taken, the same states.

#![expect(unsafe_code, reason = "ioctls, and the C unions in KVM's structures")]

mod calls;
#[path = "../draw/mod.rs"]
#[expect(dead_code, reason = "not all draws are of use here")]
mod draw;
mod kernel;
mod user;

use draw::Draw;
use fastrand::Rng;
use kernel::Kernel;
use kvm::irqchip::apic::registers::reg;
use kvm_bindings::*;
use user::User;

const APIC: u32 = 0xfee0_0000;
const IOAPIC: u32 = 0xfec0_0000;

struct Pair {
    kernel: Kernel,
    user: User,
    random: Rng,
    log: Vec<String>,
    /// Whether the kernel's local APIC remembers what is in service. A KVM in software may not:
    /// then every interrupt taken by it is ended at once.
    nests: bool,
}

impl Pair {
    fn new(vcpus: u32, seed: u64) -> Option<Pair> {
        let kernel = Kernel::open(u64::from(vcpus))?;
        let (user, random, log) = (User::new(vcpus), Rng::with_seed(seed), Vec::new());
        let mut pair = Pair {
            kernel,
            user,
            random,
            log,
            nests: true,
        };
        pair.nests = pair.probe_nesting();
        Some(pair)
    }

    fn probe_nesting(&mut self) -> bool {
        let before = self.kernel.vcpus[0].get_lapic().unwrap();
        self.kernel.write_memory(APIC + reg::SPIV, 0x1ff);
        self.kernel.write_memory(APIC + reg::ICR, 0x440f0);
        assert_eq!(self.kernel.take_interrupt(), Some(0xf0));
        let nests = word(&self.kernel.vcpus[0].get_lapic().unwrap(), reg::ISR + 0x70) != 0;
        if !nests {
            println!("this kernel's APIC has no interrupts in service: nesting is not compared");
        }
        self.kernel.vcpus[0].set_lapic(&before).unwrap();
        nests
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "the callers have no further use for them"
    )]
    #[track_caller]
    fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: String, kernel: T, user: T) {
        self.log.push(format!("{what} -> {kernel:x?}"));
        assert!(
            kernel == user,
            "{what}: kernel {kernel:x?}, user {user:x?}, after\n{}",
            self.log[self.log.len().saturating_sub(25)..].join("\n")
        );
    }

    fn line(&mut self, gsi: u32, level: u32) {
        let answers = (self.kernel.line(gsi, level), self.user.line(gsi, level));
        self.same(format!("GSI {gsi} to {level}"), answers.0, answers.1);
    }

    fn take(&mut self) {
        let vectors = (self.kernel.take_interrupt(), self.user.take_interrupt());
        self.same("take".into(), vectors.0, vectors.1);
        if vectors.0.is_some() && !self.nests {
            self.write_memory(APIC + reg::EOI, 0);
        }
    }

    fn read_port(&mut self, port: u16) {
        let values = (self.kernel.read_port(port), self.user.read_port(port));
        self.same(format!("in {port:#x}"), values.0, values.1);
    }

    fn write_port(&mut self, port: u16, value: u8) {
        self.log.push(format!("out {port:#x}, {value:#x}"));
        self.kernel.write_port(port, value);
        self.user.write_port(port, value);
    }

    fn read_memory(&mut self, address: u32) {
        let values = (
            self.kernel.read_memory(address),
            self.user.read_memory(address),
        );
        self.same(format!("read {address:#x}"), values.0, values.1);
    }

    fn write_memory(&mut self, address: u32, value: u32) {
        self.log.push(format!("write {address:#x}, {value:#x}"));
        self.kernel.write_memory(address, value);
        self.user.write_memory(address, value);
    }

    fn write_ioapic(&mut self, register: u32, value: u32) {
        self.write_memory(IOAPIC, register);
        self.write_memory(IOAPIC + 0x10, value);
    }

    fn msi(&mut self, address_lo: u32, data: u32) {
        let msi = kvm_msi {
            address_lo,
            data,
            ..Default::default()
        };
        let kernel = self.kernel.vm.signal_msi(msi).map_err(kvm_error);
        let user = self
            .user
            .chip
            .controllers()
            .signal_msi(&msi)
            .map_err(|e| e.0);
        self.same(format!("MSI {address_lo:#x} {data:#x}"), kernel, user);
    }

    fn compare_pics(&mut self) {
        for chip in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let (kernel, user) = (self.kernel.chip(chip), self.user.chip(chip));
            // SAFETY: both are PICs' states.
            let states = unsafe { (kernel.chip.pic, user.chip.pic) };
            self.same(format!("PIC {chip}"), states.0, states.1);
        }
    }

    fn compare_ioapic(&mut self) {
        let (kernel, user) = (
            self.kernel.chip(KVM_IRQCHIP_IOAPIC),
            self.user.chip(KVM_IRQCHIP_IOAPIC),
        );
        let view = |chip: &kvm_irqchip| {
            // SAFETY: it is the IOAPIC's state, plain integers.
            let state = unsafe { chip.chip.ioapic };
            // SAFETY: both variants of an entry are 8 bytes of plain integers.
            let entries = state.redirtbl.map(|entry| unsafe { entry.bits });
            (
                state.base_address,
                state.ioregsel,
                state.id,
                state.irr,
                entries,
            )
        };
        self.same("IOAPIC".into(), view(&kernel), view(&user));
    }

    fn compare_lapics(&mut self) {
        for index in 0..self.user.lapics.len() {
            let kernel = self.kernel.vcpus[index].get_lapic().unwrap();
            let user = self.user.lapics[index].state();
            let differences: Vec<_> = (0..64)
                .map(|register| register * 0x10)
                .filter(|at| ![reg::TMCCT, reg::PROCPRI].contains(at))
                .map(|at| (at, word(&kernel, at), word(&user, at)))
                .filter(|(_, kernel, user)| kernel != user)
                .collect();
            self.same(format!("LAPIC {index}"), vec![], differences);
        }
    }

    fn enable_apics(&mut self) {
        self.write_memory(APIC + reg::SPIV, 0x1ff);
        for index in 1..self.user.lapics.len() {
            let mut state = self.kernel.vcpus[index].get_lapic().unwrap();
            put(&mut state, reg::SPIV, 0x1ff);
            put(&mut state, reg::LDR, 1 << (24 + index));
            self.set_lapic(index, &state).unwrap();
        }
        self.write_memory(APIC + reg::LDR, 1 << 24);
    }

    fn set_lapic(&mut self, index: usize, state: &kvm_lapic_state) -> Result<(), i32> {
        let kernel = self.kernel.vcpus[index].set_lapic(state).map_err(kvm_error);
        let lapic = &self.user.lapics[index];
        let user = self.user.chip.set_lapic(lapic, state).map_err(|e| e.0);
        self.same(format!("set LAPIC {index}"), kernel, user);
        kernel
    }
}

fn kvm_error(error: kvm_ioctls::Error) -> i32 {
    error.errno()
}

fn word(state: &kvm_lapic_state, at: u32) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| state.regs[at as usize + i] as u8))
}

fn put(state: &mut kvm_lapic_state, at: u32, value: u32) {
    for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
        state.regs[at as usize + i] = byte as i8;
    }
}

#[test]
fn pics_by_ports_and_lines() {
    for seed in 1..=12 {
        let Some(mut pair) = Pair::new(1, 0x9d1c * seed) else {
            return;
        };
        for port in [0x20, 0xa0] {
            pair.write_port(port, 0x11);
            for value in [0x30, 4, 1] {
                pair.write_port(port + 1, value);
            }
        }
        for _ in 0..250 {
            pic_step(&mut pair);
        }
        pair.compare_pics();
    }
}

fn pic_step(pair: &mut Pair) {
    let port = pair.random.pick(&[0x20, 0xa0]);
    let value = pair.random.u8(..);
    match pair.random.u32(..20) {
        0..8 => {
            let (gsi, level) = (pair.random.u32(..16), pair.random.u32(..2));
            pair.line(gsi, level);
        }
        8..11 => pair.take(),
        11 => {
            let eoi = pair
                .random
                .pick(&[0x20, 0x60 | value & 7, 0xa0, 0xe0 | value & 7]);
            pair.write_port(port, eoi);
        }
        12 => pair.write_port(port, value & 0xef),
        13 => pair.write_port(port + 1, value & pair_mask(value)),
        14 => pair.read_port(port),
        15 => pair.read_port(port + 1),
        16 => pair.write_port(0x4d0 + u16::from(value & 1), value),
        17 => pair.read_port(0x4d0 + u16::from(value & 1)),
        18 if value < 40 => pair.write_port(port, 0x11),
        18 => pair.write_port(port, 0x0c),
        _ => pair.compare_pics(),
    }
}

/// Most pins stay open.
fn pair_mask(value: u8) -> u8 {
    value.rotate_left(3) & value.rotate_left(5)
}

#[test]
fn pic_state_is_taken_as_it_comes() {
    let Some(mut pair) = Pair::new(1, 0x51a7e) else {
        return;
    };
    for _ in 0..60 {
        let chip_id = pair.random.u32(..2);
        let bytes: [u8; 16] = std::array::from_fn(|_| pair.random.u8(..));
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        // SAFETY: any sixteen bytes are a PIC's state.
        chip.chip.pic = unsafe { std::mem::transmute::<[u8; 16], kvm_pic_state>(bytes) };
        pair.log.push(format!("set PIC {chip_id} {bytes:x?}"));
        pair.kernel.vm.set_irqchip(&chip).unwrap();
        pair.user.chip.controllers().set_state(&chip).unwrap();
        pair.compare_pics();
        for _ in 0..6 {
            let (gsi, level) = (pair.random.u32(..16), pair.random.u32(..2));
            pair.line(gsi, level);
            pair.take();
        }
        pair.compare_pics();
    }
}

#[test]
fn ioapic_lines_entries_and_eois() {
    for seed in 1..=12 {
        let Some(mut pair) = Pair::new(2, 0x10a1c * seed) else {
            return;
        };
        pair.enable_apics();
        // The 8259s stay out of this: masked, and LINT0 closed.
        pair.write_port(0x21, 0xff);
        pair.write_port(0xa1, 0xff);
        pair.write_memory(APIC + reg::LVT0, 0x10000);
        for pin in 0..24 {
            write_entry(&mut pair, pin);
        }
        for _ in 0..250 {
            ioapic_step(&mut pair);
        }
        pair.compare_ioapic();
        pair.compare_lapics();
    }
}

fn write_entry(pair: &mut Pair, pin: u32) {
    let vector = 0x20 + pair.random.u32(..0x60);
    let mode = pair.random.pick(&[0, 0, 0, 0x100]);
    let logical = pair.random.pick(&[0, 0x800]);
    let level = pair.random.pick(&[0, 0x8000]);
    let masked = pair.random.pick(&[0, 0, 0, 0x10000]);
    let destination = pair.random.pick(&[0, 1, 2, 3, 0xff]);
    pair.write_ioapic(0x11 + 2 * pin, destination << 24);
    pair.write_ioapic(0x10 + 2 * pin, vector | mode | logical | level | masked);
}

fn ioapic_step(pair: &mut Pair) {
    match pair.random.u32(..20) {
        0..8 => {
            let (gsi, level) = (pair.random.u32(..24), pair.random.u32(..2));
            pair.line(gsi, level);
        }
        8..12 => pair.take(),
        12..15 => pair.write_memory(APIC + reg::EOI, 0),
        15 => {
            let pin = pair.random.u32(..24);
            write_entry(pair, pin);
        }
        16 => {
            let register = pair.random.u32(..0x42);
            pair.write_memory(IOAPIC, register);
            pair.read_memory(IOAPIC + 0x10);
        }
        17 => pair.compare_ioapic(),
        18 => pair.compare_lapics(),
        _ => {
            let priority = pair.random.pick(&[0, 0x30, 0x55, 0xf0]);
            pair.write_memory(APIC + reg::TASKPRI, priority);
            pair.read_memory(APIC + reg::PROCPRI);
        }
    }
}

#[test]
fn lapic_registers_by_memory() {
    for seed in 1..=12 {
        let Some(mut pair) = Pair::new(1, 0x1a91c * seed) else {
            return;
        };
        pair.enable_apics();
        for _ in 0..300 {
            lapic_step(&mut pair);
        }
        pair.compare_lapics();
    }
}

fn lapic_step(pair: &mut Pair) {
    const WRITABLE: &[u32] = &[
        reg::ID,
        reg::LDR,
        reg::DFR,
        reg::SPIV,
        reg::ESR,
        reg::ICR2,
        reg::LVTTHMR,
        reg::LVTPC,
        reg::LVT1,
        reg::LVTERR,
        reg::LVTCMCI,
        reg::TASKPRI,
        reg::EOI,
        reg::TDCR,
        reg::SELF_IPI,
    ];
    let value = pair.random.u32(..);
    match pair.random.u32(..10) {
        0..3 => {
            let register = pair.random.pick(WRITABLE);
            // Mostly enabled, and with a priority that lets something through.
            let value = match register {
                reg::SPIV => value | (0x100 * u32::from(value & 0x7000 != 0)),
                reg::TASKPRI => value & 0x7f,
                _ => value,
            };
            pair.write_memory(APIC + register, value);
        }
        3..5 => {
            let register = pair.random.u32(..0x40) * 0x10;
            // Where there is no register, the kernel leaves the last answer in its buffer.
            let none = matches!(register, 0..=0x10 | 0x40..=0x70 | 0xb0 | 0xc0 | 0x290..=0x2f0)
                || matches!(register, reg::TMCCT | 0x3a0..=0x3d0 | reg::SELF_IPI);
            if !none {
                pair.read_memory(APIC + register);
            }
        }
        5..7 => pair.take(),
        7 => pair.write_memory(APIC + reg::EOI, 0),
        8 => pair.write_memory(APIC + reg::ICR, 0x4_4000 | (0x10 + (value & 0xe7))),
        _ => pair.compare_lapics(),
    }
}

#[test]
fn messages_find_the_same_cpus() {
    for seed in 1..=12 {
        let Some(mut pair) = Pair::new(4, 0x3e55a6e * seed) else {
            return;
        };
        pair.enable_apics();
        for _ in 0..150 {
            message_step(&mut pair);
        }
        pair.compare_lapics();
    }
}

fn message_step(pair: &mut Pair) {
    let vector = 0x20 + pair.random.u32(..0xc0);
    let destination = pair
        .random
        .pick(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0x0f, 0x11, 0x80, 0xff]);
    let logical = pair.random.u32(..2);
    let mode = pair.random.pick(&[0, 0, 0x100, 0x700, 0x200]);
    match pair.random.u32(..12) {
        0..5 => {
            let hint = pair.random.u32(..2) << 3;
            let level = pair.random.pick(&[0, 0xc000]);
            pair.msi(
                0xfee0_0000 | destination << 12 | hint | logical << 2,
                vector | mode | level,
            );
        }
        5..8 => {
            let shorthand = pair.random.pick(&[0, 0, 0, 1, 2, 3]) << 18;
            let level = pair.random.pick(&[0x4000, 0x4000, 0xc000, 0x8000]);
            pair.write_memory(APIC + reg::ICR2, destination << 24);
            pair.write_memory(
                APIC + reg::ICR,
                vector | mode | logical << 11 | shorthand | level,
            );
        }
        8..10 => {
            let index = 1 + pair.random.usize(..3);
            let mut state = pair.kernel.vcpus[index].get_lapic().unwrap();
            let ldr = pair
                .random
                .pick(&[1, 2, 4, 8, 0x11, 0x12, 0x21, 0x41, 0x80, 3, 0]);
            let dfr = pair.random.pick(&[u32::MAX, u32::MAX, 0x0fff_ffff]);
            let spiv = pair.random.pick(&[0x1ff, 0x1ff, 0x1ff, 0xff]);
            let id = pair.random.pick(&[index as u32, index as u32, 9]);
            put(&mut state, reg::LDR, ldr << 24);
            put(&mut state, reg::DFR, dfr);
            put(&mut state, reg::SPIV, spiv);
            put(&mut state, reg::ID, id << 24);
            pair.set_lapic(index, &state).unwrap();
        }
        10 => pair.compare_lapics(),
        _ => {
            pair.take();
            pair.write_memory(APIC + reg::EOI, 0);
        }
    }
}

#[test]
fn lapic_state_is_taken_as_it_comes() {
    let Some(mut pair) = Pair::new(1, 0x5e71a91c) else {
        return;
    };
    for _ in 0..80 {
        let mut state = kvm_lapic_state {
            regs: std::array::from_fn(|_| pair.random.i8(..)),
        };
        // No timer: its expiry depends on the time.
        put(&mut state, reg::TMICT, 0);
        put(&mut state, reg::LVTT, 0x10000);
        put(&mut state, reg::LVT0, 0x10000);
        // Vectors below 16 are none.
        for bitmap in [reg::IRR, reg::ISR] {
            let low = word(&state, bitmap) & !0xffff;
            put(&mut state, bitmap, low);
        }
        pair.set_lapic(0, &state).unwrap();
        pair.compare_lapics();
        for _ in 0..3 {
            pair.take();
            pair.write_memory(APIC + reg::EOI, 0);
        }
        pair.compare_lapics();
    }
}

#[test]
fn routing_tables_are_judged_alike() {
    let Some(mut pair) = Pair::new(1, 0x6510) else {
        return;
    };
    for _ in 0..300 {
        let count = pair.random.usize(..4) + 1;
        let entries: Vec<_> = (0..count).map(|_| random_route(&mut pair.random)).collect();
        let routing = KvmIrqRouting::from_entries(&entries).unwrap();
        let kernel = pair.kernel.vm.set_gsi_routing(&routing).map_err(kvm_error);
        let user = pair
            .user
            .chip
            .controllers()
            .set_routing(&entries)
            .map_err(|e| e.0);
        pair.same(format!("routing {entries:?}"), kernel, user);
        let gsi = pair.random.u32(..6);
        pair.line(gsi, 1);
        pair.line(gsi, 0);
    }
}

fn random_route(random: &mut Rng) -> kvm_irq_routing_entry {
    let gsi = random.pick(&[0, 1, 2, 3, 4, 5, 4095, 4096]);
    let flags = random.pick(&[0, 0, 0, 0, 0, 1, 2]);
    let mut entry = kvm_irq_routing_entry {
        gsi,
        flags,
        ..Default::default()
    };
    if random.u32(..3) == 0 {
        entry.type_ = KVM_IRQ_ROUTING_MSI;
        entry.u.msi = kvm_irq_routing_msi {
            address_lo: 0xfee0_0000,
            address_hi: random.pick(&[0, 0, 1, 0x100]),
            data: 0x20 + random.u32(..0xc0),
            ..Default::default()
        };
    } else {
        entry.type_ = random.pick(&[1, 1, 1, 1, 0, 9]);
        entry.u.irqchip = kvm_irq_routing_irqchip {
            irqchip: random.u32(..4),
            pin: random.u32(..26),
        };
    }
    entry
}

#[test]
fn pit_registers() {
    let Some(mut pair) = Pair::new(1, 0x8254) else {
        return;
    };
    let config = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    pair.kernel.vm.create_pit2(config).unwrap();
    pair.user.chip.create_pit(&config).unwrap();
    for _ in 0..300 {
        pit_step(&mut pair);
    }
}

fn pit_step(pair: &mut Pair) {
    let value = pair.random.u8(..);
    match pair.random.u32(..6) {
        0 => {
            // Channel 0 in mode 5, which has no timer; the others in any mode. Or read back.
            let control = match value >> 6 {
                0 => value & 0xf1 | 0x0a,
                _ => value,
            };
            let latches_only = control & 0x30 == 0 && control >> 6 != 3;
            pair.write_port(
                0x43,
                if latches_only {
                    control & 0xc0
                } else {
                    control
                },
            );
        }
        1 => pair.write_port(0x41 + u16::from(value & 1), value),
        2 => {
            let port = 0x40 + u16::from(value & 3);
            pair.kernel.read_port(port);
            pair.user.read_port(port);
        }
        3 => pair.write_port(0x61, value),
        4 => {
            let states = (
                pair.kernel.vm.get_pit2().unwrap(),
                pair.user.chip.pit_state2().unwrap(),
            );
            let mut state = states.0;
            for channel in &mut state.channels {
                channel.count = u32::from(pair.random.u16(..));
                channel.mode = pair.random.pick(&[0, 1, 2, 3, 4, 5]);
            }
            state.channels[0].mode = 5;
            pair.kernel.vm.set_pit2(&state).unwrap();
            pair.user.chip.set_pit_state2(&state).unwrap();
        }
        _ => compare_pits(pair),
    }
}

/// Everything that does not depend on the time.
fn compare_pits(pair: &mut Pair) {
    let view = |state: &kvm_pit_state2| {
        let channels = state.channels.map(|c| {
            let modes = (
                c.rw_mode,
                c.mode,
                c.bcd,
                c.gate,
                c.read_state,
                c.write_state,
            );
            (
                c.count,
                c.count_latched,
                c.status_latched,
                c.status & 0x3f,
                c.write_latch,
                modes,
            )
        });
        (channels, state.flags)
    };
    let states = (
        pair.kernel.vm.get_pit2().unwrap(),
        pair.user.chip.pit_state2().unwrap(),
    );
    pair.same("PIT".into(), view(&states.0), view(&states.1));
}
