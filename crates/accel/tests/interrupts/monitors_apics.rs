//! Two processors whose local APICs are the monitor's own, as with QEMU's `kernel-irqchip=off`: INIT
//! and SIPI become registers, interrupts `KVM_INTERRUPT`, and the accelerator tells of `HLT` and of
//! when an interrupt would be taken (`api.rst`, `KVM_INTERRUPT`).
//!
//! ```text
//!   processor 0, 64-bit            the monitor              processor 1, real mode
//!   store INIT, SIPI ─── MMIO ──► registers ──────────────► starts
//!   sti; hlt         ◄── KVM_INTERRUPT ◄── port 0xe7 ────── tells it
//!   store IPI ────────── MMIO ──► kick, KVM_INTERRUPT ────► handler counts
//!   sti; hlt         ◄── KVM_INTERRUPT ◄── port 0xe7 ────── tells it          (200 times)
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

use accel::{Exit, Kicker, Kind, Level, Vcpu};
use kvm_bindings::{kvm_regs, kvm_segment};
use vm_memory::{Bytes, VolatileMemory};

use super::guest::{COUNTER, Chips, Guest, VECTOR};
use super::{LONG, each, store};

/// Registers of a local APIC in memory (SDM 3A, 12.4.1).
const EOI: u64 = 0xfee0_00b0;
const COMMAND: u64 = 0xfee0_0300;
const DESTINATION: u64 = 0xfee0_0310;
/// Where the second processor starts, and its handler.
const START: u64 = 0x8000;
const REAL_HANDLER: u64 = 0x9000;
/// By this port the second processor interrupts the first, which it can't by an APIC beyond its MiB.
const DOORBELL: u16 = 0xe7;
const DONE: u16 = 0xe1;
const ROUNDS: u8 = 200;

/// How the second processor waits for its interrupts.
#[derive(Clone, Copy, Debug)]
enum Waits {
    Halted,
    Spinning,
}

/// What the monitor's APIC holds for one processor.
#[derive(Default)]
struct Apic {
    requested: VecDeque<u8>,
    startup: Option<u8>,
    ended: u32,
}

/// The monitor's side: both APICs.
struct Board {
    apics: Mutex<([Apic; 2], bool)>,
    changed: Condvar,
    kickers: [Arc<dyn Kicker>; 2],
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, ([Apic; 2], bool)> {
        self.apics.lock().unwrap()
    }

    fn change(&self, to: usize, change: impl FnOnce(&mut Apic)) {
        change(&mut self.lock().0[to]);
        self.changed.notify_all();
        self.kickers[to].kick();
    }

    fn end(&self) {
        self.lock().1 = true;
        self.changed.notify_all();
        self.kickers.iter().for_each(|kicker| kicker.kick());
    }

    /// Sleeps until there is something for a processor to do. Whether it goes on.
    fn wait(&self, of: usize) -> bool {
        let idle = |(apics, over): &mut ([Apic; 2], bool)| {
            !*over && apics[of].requested.is_empty() && apics[of].startup.is_none()
        };
        let (state, out) = self
            .changed
            .wait_timeout_while(self.lock(), LONG, idle)
            .unwrap();
        assert!(!out.timed_out(), "processor {of} waits for ever");
        !state.1
    }

    /// An access of the local APIC of processor 0.
    fn write(&self, gpa: u64, value: u32, destination: &mut usize) {
        match (gpa, value >> 8 & 7) {
            (EOI, _) => self.lock().0[0].ended += 1,
            (DESTINATION, _) => *destination = (value >> 24) as usize,
            (COMMAND, 0) => self.change(*destination, |apic| apic.requested.push_back(value as u8)),
            // INIT: it waits for SIPI already.
            (COMMAND, 5) => {}
            (COMMAND, 6) => self.change(*destination, |apic| apic.startup = Some(value as u8)),
            other => panic!("{other:x?}"),
        }
    }

    /// Hands an interrupt over, or asks when one could be.
    fn inject(&self, of: usize, vcpu: &mut dyn Vcpu) {
        let requested = &mut self.lock().0[of].requested;
        if vcpu.ready_for_interrupt()
            && let Some(vector) = requested.pop_front()
        {
            vcpu.interrupt(vector).unwrap();
        }
        vcpu.request_interrupt_window(if requested.is_empty() {
            Level::Low
        } else {
            Level::High
        });
    }

    fn run(&self, of: usize, vcpu: &mut dyn Vcpu) {
        let began = Instant::now();
        let mut destination = 0;
        while !self.lock().1 {
            assert!(
                began.elapsed() < LONG,
                "processor {of} does not come to an end"
            );
            self.inject(of, vcpu);
            match vcpu.run().unwrap() {
                Exit::Interrupted | Exit::InterruptWindow => {}
                Exit::Halt => {
                    self.wait(of);
                }
                Exit::IoOut { port: DONE, .. } => self.end(),
                Exit::IoOut { port: DOORBELL, .. } => {
                    self.change(0, |apic| apic.requested.push_back(VECTOR));
                }
                Exit::MmioWrite { gpa, data } => {
                    let value = u32::from_le_bytes(data.try_into().unwrap());
                    self.write(gpa.raw(), value, &mut destination);
                }
                other => panic!("processor {of}: {other:?}"),
            }
        }
    }
}

/// SIPI, as a monitor does it.
fn start(vcpu: &dyn Vcpu, page: u8) {
    let mut sregs = vcpu.get_sregs().unwrap();
    let data = kvm_segment {
        limit: 0xffff,
        type_: 3,
        present: 1,
        s: 1,
        ..Default::default()
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.ss,
        &mut sregs.fs,
        &mut sregs.gs,
    ] {
        *segment = data;
    }
    sregs.cs = kvm_segment {
        selector: u16::from(page) << 8,
        base: u64::from(page) << 12,
        type_: 11,
        ..data
    };
    (sregs.idt.base, sregs.idt.limit) = (0, 0x3ff);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x6000_0010, 0, 0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
}

/// Starts the other, then sends it one interrupt after the other, and sleeps until each has an answer.
fn first() -> Vec<u8> {
    const SLEEP: [u8; 3] = [0xfb, 0xf4, 0xfa];
    let mut code = store(DESTINATION as u32, 1 << 24);
    code.extend(store(COMMAND as u32, 0x4500));
    code.extend(store(COMMAND as u32, 0x4600 | (START >> 12) as u32));
    code.extend(SLEEP);
    // mov ecx, ROUNDS
    code.extend([0xb9, ROUNDS, 0, 0, 0]);
    let mut round = store(COMMAND as u32, 0x4000 | u32::from(VECTOR));
    round.extend(SLEEP);
    // dec ecx; jnz
    round.extend([0xff, 0xc9, 0x75]);
    round.push((round.len() as u8 + 1).wrapping_neg());
    code.extend(round);
    code.extend([0xe6, DONE as u8]);
    code
}

/// Counts in the word behind the other's, and ends the interrupt.
fn first_handler() -> Vec<u8> {
    let mut code = vec![0x48, 0xff, 0x04, 0x25];
    code.extend((COUNTER as u32 + 8).to_le_bytes());
    code.extend(store(EOI as u32, 0));
    code.extend([0x48, 0xcf]);
    code
}

fn write_second(guest: &Guest, waits: Waits) {
    // mov ax, 0x3000; mov ds, ax; mov ss, ax; mov sp, 0x8000; sti; out DOORBELL, al
    let mut code = vec![
        0xb8, 0x00, 0x30, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x80, 0xfb,
    ];
    code.extend([0xe6, DOORBELL as u8]);
    code.extend(match waits {
        Waits::Halted => [0xf4, 0xeb, 0xfd].as_slice(),
        Waits::Spinning => [0xf3, 0x90, 0xeb, 0xfc].as_slice(),
    });
    guest.write(START, &code);
    // inc word [0]; out DOORBELL, al; iret
    guest.write(
        REAL_HANDLER,
        &[0xff, 0x06, 0, 0, 0xe6, DOORBELL as u8, 0xcf],
    );
    let far = (REAL_HANDLER as u32) << 12;
    guest.write(4 * u64::from(VECTOR), &far.to_le_bytes());
}

fn counted(guest: &Guest, at: u64) -> u64 {
    let memory = guest.memory().as_volatile_slice();
    memory.read_obj(at as usize).unwrap()
}

#[test]
fn processors_start_and_interrupt_each_other_by_the_monitors_apics() {
    each(|accelerator| {
        for waits in [Waits::Halted, Waits::Spinning] {
            let handler = first_handler();
            let mut guest = Guest::new(accelerator, Chips::None, &[&first(), &[0xf4]], &handler);
            write_second(&guest, waits);
            let mut second = guest.vcpus.remove(1);
            let mut first = guest.vcpus.remove(0);
            let board = Board {
                apics: Mutex::default(),
                changed: Condvar::new(),
                kickers: [first.kicker(), second.kicker()],
            };
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    if board.wait(1) {
                        let page = board.lock().0[1].startup.take().unwrap();
                        start(&*second, page);
                        board.run(1, &mut *second);
                    }
                });
                board.run(0, &mut *first);
            });
            let rounds = u64::from(ROUNDS);
            assert_eq!(counted(&guest, COUNTER) & 0xffff, rounds, "{waits:?}");
            assert_eq!(counted(&guest, COUNTER + 8), rounds + 1, "{waits:?}");
            assert_eq!(u64::from(board.lock().0[0].ended), rounds + 1, "{waits:?}");
        }
    });
}

#[test]
fn a_lower_task_priority_is_the_monitors_to_know() {
    each(|accelerator| {
        // mov eax, 5; mov cr8, rax; mov eax, 2; mov cr8, rax; out 0xe1, al
        let lower = [0xb8, 2, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0];
        let code = [
            &[0xb8, 5, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0],
            &lower[..],
            &[0xe6, DONE as u8],
        ]
        .concat();
        let mut guest = Guest::new(accelerator, Chips::None, &[&code], &[]);
        let vcpu = &mut guest.vcpus[0];
        // A KVM in software may leave it at telling the value.
        if accelerator.kind() == Kind::User {
            assert!(matches!(vcpu.run().unwrap(), Exit::SetTpr));
            assert_eq!(vcpu.get_sregs().unwrap().cr8, 2);
        }
        assert!(matches!(
            vcpu.run().unwrap(),
            Exit::IoOut { port: DONE, .. }
        ));
        assert_eq!(vcpu.get_sregs().unwrap().cr8, 2);
    });
}
