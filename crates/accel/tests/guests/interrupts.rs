//! Interrupt controllers in the accelerator.

use accel::Level;

use crate::machine::{CODE, Machine, Seen, subjects};

/// Real mode: vector `n` leads to `handler`.
fn vector(machine: &Machine, n: u64, handler: u16) {
    machine.memory.write(4 * n, &handler.to_le_bytes());
    machine.memory.write(4 * n + 2, &[0, 0]);
}

#[test]
fn a_line_wakes_a_halted_cpu() {
    // The master 8259 at vectors 0x20, only line 3 open; then sleep, and report from the handler.
    #[rustfmt::skip]
    let code = [
        0xb0, 0x11, 0xe6, 0x20,     // mov al, 0x11; out 0x20, al
        0xb0, 0x20, 0xe6, 0x21,     // mov al, 0x20; out 0x21, al
        0xb0, 0x04, 0xe6, 0x21,     // mov al, 4; out 0x21, al
        0xb0, 0x01, 0xe6, 0x21,     // mov al, 1; out 0x21, al
        0xb0, 0xf7, 0xe6, 0x21,     // mov al, 0xf7; out 0x21, al
        0xe6, 0x10,                 // out 0x10, al: ready
        0xfb,                       // sti
        0xf4,                       // hlt
        0xe6, 0x12,                 // out 0x12, al: behind the handler
    ];
    let handler = [
        0xb0, 0x20, 0xe6, 0x20, // mov al, 0x20; out 0x20, al: end of interrupt
        0xe6, 0x11, // out 0x11, al
        0xcf, // iret
    ];
    for subject in subjects() {
        let mut machine = Machine::prepared(&subject, |vm| vm.create_irqchip().unwrap());
        machine.real_mode(&code);
        machine.memory.write(CODE + 0x100, &handler);
        vector(&machine, 0x23, (CODE + 0x100) as u16);
        assert_eq!(
            machine.run(),
            Seen::IoOut(0x10, 1, vec![0xf7]),
            "{}",
            subject.name
        );
        let vm = std::sync::Arc::clone(&machine.vm);
        let device = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            vm.set_irq_line(3, Level::High).unwrap();
            vm.set_irq_line(3, Level::Low).unwrap();
        });
        assert_eq!(
            machine.run(),
            Seen::IoOut(0x11, 1, vec![0x20]),
            "{}",
            subject.name
        );
        assert_eq!(
            machine.run(),
            Seen::IoOut(0x12, 1, vec![0x20]),
            "{}",
            subject.name
        );
        device.join().unwrap();
    }
}

#[test]
fn the_monitor_injects_where_it_has_the_controllers() {
    // sti; nop; jmp -1
    let code = [0xfb, 0x90, 0xeb, 0xfe];
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.real_mode(&code);
        machine.memory.write(CODE + 0x100, &[0xe6, 0x11, 0xf4]);
        vector(&machine, 0x40, (CODE + 0x100) as u16);
        machine.vcpu.request_interrupt_window(Level::High);
        assert_eq!(machine.run(), Seen::InterruptWindow, "{}", subject.name);
        assert!(machine.vcpu.ready_for_interrupt(), "{}", subject.name);
        machine.vcpu.request_interrupt_window(Level::Low);
        machine.vcpu.interrupt(0x40).unwrap();
        assert_eq!(
            machine.run(),
            Seen::IoOut(0x11, 1, vec![0]),
            "{}",
            subject.name
        );
        assert_eq!(machine.run(), Seen::Halt, "{}", subject.name);
    }
}
