//! Small guests on every accelerator: the same exits, registers and memory.

mod interrupts;
mod machine;

use accel::Exit;
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_MEM_LOG_DIRTY_PAGES, kvm_guest_debug,
};
use machine::{ALIAS, CODE, DEVICE, Machine, STACK, Seen, subjects};

/// `mov dx, 0x10; out dx, al; hlt` and its kin need no assembler; longer guests name each
/// instruction.
#[test]
fn ten_instructions_in_long_mode() {
    #[rustfmt::skip]
    let code = [
        0xb8, 0x05, 0x00, 0x00, 0x00,             // mov eax, 5
        0xbb, 0x07, 0x00, 0x00, 0x00,             // mov ebx, 7
        0x01, 0xd8,                               // add eax, ebx
        0x48, 0xb9, 0, 0, 0, 0, 0x40, 0, 0, 0,    // mov rcx, ALIAS
        0x48, 0x89, 0x01,                         // mov [rcx], rax
        0x48, 0x8b, 0x11,                         // mov rdx, [rcx]
        0x48, 0xc1, 0xe2, 0x04,                   // shl rdx, 4
        0x66, 0xba, 0x10, 0x00,                   // mov dx, 0x10
        0xee,                                     // out dx, al
        0xf4,                                     // hlt
    ];
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.long_mode(&code);
        assert_eq!(
            machine.run(),
            Seen::IoOut(0x10, 1, vec![12]),
            "{}",
            subject.name
        );
        assert_eq!(machine.run(), Seen::Halt, "{}", subject.name);
        let regs = machine.vcpu.get_regs().unwrap();
        assert_eq!(
            (regs.rax, regs.rbx, regs.rcx),
            (12, 7, ALIAS),
            "{}",
            subject.name
        );
        assert_eq!(regs.rip, CODE + code.len() as u64, "{}", subject.name);
        assert_eq!(
            machine.memory.read(0x20_0000),
            12u64.to_le_bytes(),
            "{}",
            subject.name
        );
    }
}

#[test]
fn real_mode() {
    #[rustfmt::skip]
    let code = [
        0xb0, 0x41,             // mov al, 'A'
        0xba, 0xf8, 0x03,       // mov dx, 0x3f8
        0xee,                   // out dx, al
        0xec,                   // in al, dx
        0xa2, 0x00, 0x20,       // mov [0x2000], al
        0xf4,                   // hlt
    ];
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.real_mode(&code);
        assert_eq!(
            machine.run(),
            Seen::IoOut(0x3f8, 1, vec![0x41]),
            "{}",
            subject.name
        );
        match machine.vcpu.run().unwrap() {
            Exit::IoIn {
                port: 0x3f8,
                size: 1,
                data,
            } => data[0] = 0x5a,
            other => panic!("{}: {other:?}", subject.name),
        }
        assert_eq!(machine.run(), Seen::Halt, "{}", subject.name);
        assert_eq!(machine.memory.read(0x2000), [0x5a], "{}", subject.name);
    }
}

#[test]
fn protected_mode_calls_and_loops() {
    #[rustfmt::skip]
    let code = [
        0xb9, 0x0a, 0, 0, 0,    // mov ecx, 10
        0x31, 0xc0,             // xor eax, eax
        0xe8, 0x03, 0, 0, 0,    // call +3
        0xe2, 0xf9,             // loop -7
        0xf4,                   // hlt
        0x01, 0xc8,             // add eax, ecx
        0xc3,                   // ret
    ];
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.protected_mode(&code);
        assert_eq!(machine.run(), Seen::Halt, "{}", subject.name);
        let regs = machine.vcpu.get_regs().unwrap();
        assert_eq!(
            (regs.rax, regs.rcx, regs.rsp),
            (55, 0, STACK),
            "{}",
            subject.name
        );
    }
}

#[test]
fn device_memory_is_read_and_written() {
    #[rustfmt::skip]
    let code = [
        0xbf, 0, 0, 0, 0x20,                // mov edi, DEVICE
        0x8b, 0x07,                         // mov eax, [rdi]
        0x83, 0xc0, 0x01,                   // add eax, 1
        0x89, 0x47, 0x04,                   // mov [rdi+4], eax
        0x48, 0xff, 0x47, 0x08,             // inc qword [rdi+8]
        0xf4,                               // hlt
    ];
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.long_mode(&code);
        let answer =
            |machine: &mut Machine, at: u64, bytes: &[u8]| match machine.vcpu.run().unwrap() {
                Exit::MmioRead { gpa, data } => {
                    assert_eq!(gpa, addr::Gpa::new(at), "{}", subject.name);
                    data.copy_from_slice(bytes);
                }
                other => panic!("{}: {other:?}", subject.name),
            };
        answer(&mut machine, DEVICE, &[1, 2, 3, 4]);
        let write = Seen::MmioWrite(DEVICE + 4, vec![2, 2, 3, 4]);
        assert_eq!(machine.run(), write, "{}", subject.name);
        answer(&mut machine, DEVICE + 8, &9u64.to_le_bytes());
        let write = Seen::MmioWrite(DEVICE + 8, 10u64.to_le_bytes().to_vec());
        assert_eq!(machine.run(), write, "{}", subject.name);
        assert_eq!(machine.run(), Seen::Halt, "{}", subject.name);
        assert_eq!(
            machine.vcpu.get_regs().unwrap().rax,
            0x0403_0202,
            "{}",
            subject.name
        );
    }
}

#[test]
fn each_read_of_a_device_asks_the_device() {
    #[rustfmt::skip]
    let code = [
        0xbf, 0, 0, 0, 0x20,                // mov edi, DEVICE
        0x8b, 0x07,                         // mov eax, [rdi]
        0x8b, 0x1f,                         // mov ebx, [rdi]
        0xe6, 0x10,                         // out 0x10, al
        0x8b, 0x0f,                         // mov ecx, [rdi]
        0xf4,                               // hlt
    ];
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.long_mode(&code);
        let mut answers = 1..;
        loop {
            match machine.vcpu.run().unwrap() {
                Exit::MmioRead { data, .. } => {
                    data.fill(0);
                    data[0] = answers.next().unwrap();
                }
                Exit::IoOut { .. } => {}
                Exit::Halt => break,
                other => panic!("{}: {other:?}", subject.name),
            }
        }
        let regs = machine.vcpu.get_regs().unwrap();
        assert_eq!(
            (regs.rax, regs.rbx, regs.rcx),
            (1, 2, 3),
            "{}",
            subject.name
        );
    }
}

#[test]
fn writes_are_logged() {
    // mov rcx, ALIAS; mov [rcx], rax; mov [rcx+0x3000], rax; hlt
    #[rustfmt::skip]
    let code = [
        0x48, 0xb9, 0, 0, 0, 0, 0x40, 0, 0, 0,
        0x48, 0x89, 0x01,
        0x48, 0x89, 0x81, 0, 0x30, 0, 0,
        0xf4,
    ];
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.map(0, KVM_MEM_LOG_DIRTY_PAGES);
        machine.long_mode(&code);
        assert_eq!(machine.run(), Seen::Halt, "{}", subject.name);
        let log = machine
            .vm
            .get_dirty_log(0, (machine::MEMORY / 4096) as u64)
            .unwrap();
        assert_eq!(log[0x200 / 64], 0b1001, "{}", subject.name);
        let log = machine
            .vm
            .get_dirty_log(0, (machine::MEMORY / 4096) as u64)
            .unwrap();
        assert_eq!(log[0x200 / 64], 0, "{}", subject.name);
    }
}

#[test]
fn no_idt_is_a_shutdown() {
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.protected_mode(&[0x0f, 0x0b]);
        let mut sregs = machine.vcpu.get_sregs().unwrap();
        sregs.idt.limit = 0;
        machine.vcpu.set_sregs(&sregs).unwrap();
        assert_eq!(machine.run(), Seen::Shutdown, "{}", subject.name);
    }
}

#[test]
fn single_steps() {
    for subject in subjects() {
        if subject.name == "kvm" {
            // The software KVM of some hosts reports steps at other addresses.
            continue;
        }
        let mut machine = Machine::new(&subject);
        machine.long_mode(&[0x90, 0x90, 0xf4]);
        let debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
            ..Default::default()
        };
        machine.vcpu.set_guest_debug(&debug).unwrap();
        for pc in [CODE + 1, CODE + 2] {
            let step = Seen::Debug { exception: 1, pc };
            assert_eq!(machine.run(), step, "{}", subject.name);
        }
    }
}

#[test]
fn a_kick_interrupts_a_loop() {
    for subject in subjects() {
        let mut machine = Machine::new(&subject);
        machine.long_mode(&[0xeb, 0xfe]);
        let kicker = machine.vcpu.kicker();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            kicker.kick();
        });
        assert_eq!(machine.run(), Seen::Interrupted, "{}", subject.name);
        thread.join().unwrap();
        assert_eq!(
            machine.vcpu.get_regs().unwrap().rip,
            CODE,
            "{}",
            subject.name
        );
    }
}
