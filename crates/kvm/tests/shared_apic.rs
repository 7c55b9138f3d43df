//! What guest, monitor and local APIC share: reported accesses of the task priority, the vAPIC's word,
//! ends of interrupts by a byte; halts that are the guest's own affair, and held vCPUs.
#![expect(
    unsafe_code,
    reason = "guest memory is handed to the VM, and kvm_run is a C structure"
)]

mod machine;

use std::ops::Deref;
use std::time::{Duration, Instant};

use kvm::Errno;
use kvm::vcpu::PORT_DATA_OFFSET;
use kvm_bindings as kb;
use machine::Machine;

const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x2000;
/// The vAPIC's word.
const WORD: u64 = 0x3000;
/// The byte that ends interrupts.
const BYTE: u64 = 0x3100;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const SIZE: usize = 0x10000;
const VECTOR: u8 = 0x50;

/// `sti; hlt; jmp back`.
const WAIT: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfc];

/// Where the interrupt controllers are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Chips {
    None,
    Kernel,
}

struct Guest(Machine);

impl Deref for Guest {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Guest {
    /// 32-bit protected mode, flat, no paging.
    fn new(code: &[u8], chips: Chips) -> Self {
        let guest = Self(Machine::new(SIZE, |vm| {
            if chips == Chips::Kernel {
                vm.create_irqchip().unwrap();
            }
        }));
        guest.write(CODE, code);
        guest.write(GDT + 8, &0x00cf_9b00_0000_ffff_u64.to_le_bytes());
        guest.write(GDT + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
        let gate = HANDLER | 8 << 16 | 0x8e00 << 32;
        guest.write(IDT + 8 * u64::from(VECTOR), &gate.to_le_bytes());
        guest.set_registers();
        guest
    }

    fn set_registers(&self) {
        let mut sregs = self.vcpu.get_sregs();
        let code = kb::kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 11,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        let data = kb::kvm_segment {
            selector: 16,
            type_: 3,
            ..code
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0x7ff);
        sregs.cr0 |= 1;
        self.vcpu.set_sregs(&sregs).unwrap();
        self.vcpu.set_regs(&kb::kvm_regs {
            rip: CODE,
            rsp: 0x8000,
            rflags: 2,
            ..Default::default()
        });
    }

    /// Runs to an `OUT`: its port and byte.
    fn port(&self) -> (u16, u8) {
        assert_eq!(self.run(), kb::KVM_EXIT_IO);
        // SAFETY: the exit is one of a port.
        let port = self.field(|run| unsafe { &raw mut run.__bindgen_anon_1.io.port });
        (
            port,
            self.vcpu.run_page().read_bytes(PORT_DATA_OFFSET, 1)[0],
        )
    }

    /// Runs to a reported access: its RIP, and whether it is a write.
    fn tpr_access(&self) -> (u64, u32) {
        assert_eq!(self.run(), kb::KVM_EXIT_TPR_ACCESS);
        // SAFETY: the exit is one of these.
        unsafe {
            (
                self.field(|run| &raw mut run.__bindgen_anon_1.tpr_access.rip),
                self.field(|run| &raw mut run.__bindgen_anon_1.tpr_access.is_write),
            )
        }
    }

    fn apic(&self, register: usize) -> u32 {
        let regs = self.vcpu.get_lapic().unwrap().regs;
        let bytes = std::array::from_fn(|i| regs[register + i] as u8);
        u32::from_le_bytes(bytes)
    }

    fn interrupt(&self) {
        let msi = kb::kvm_msi {
            address_lo: 0xfee0_0000,
            data: VECTOR.into(),
            ..Default::default()
        };
        let taken = self.vm.irqchip().controllers().signal_msi(&msi);
        assert_eq!(taken, Ok(1));
    }
}

#[test]
fn accesses_of_the_task_priority_are_reported_with_their_instruction() {
    #[rustfmt::skip]
    let code = [
        0xa1, 0x80, 0x00, 0xe0, 0xfe,                       // mov eax, [TPR]
        0xc7, 0x05, 0x80, 0x00, 0xe0, 0xfe, 0x20, 0, 0, 0,  // mov dword [TPR], 0x20
        0xa1, 0x20, 0x00, 0xe0, 0xfe,                       // mov eax, [ID]
        0xe6, 0x10,                                         // out 0x10, al
    ];
    let guest = Guest::new(&code, Chips::Kernel);
    guest.vcpu.set_tpr_reporting(1, 0).unwrap();
    assert_eq!(guest.tpr_access(), (CODE, 0));
    assert_eq!(guest.vcpu.get_regs().rip, CODE + 5, "and done");
    assert_eq!(guest.tpr_access(), (CODE + 5, 1));
    assert_eq!(guest.vcpu.get_regs().rip, CODE + 15);
    assert_eq!(guest.apic(0x80), 0x20);
    assert_eq!(guest.port(), (0x10, 0), "no other register is reported");
    guest.set_registers();
    guest.vcpu.set_tpr_reporting(0, 0).unwrap();
    assert_eq!(guest.port(), (0x10, 0), "nor, later, this one");
}

#[test]
fn the_word_of_the_vapic_goes_both_ways() {
    #[rustfmt::skip]
    let code = [
        0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0, 0, // mov dword [SPIV], 0x1ff
        0xe6, 0x10,                                           // out 0x10, al
        0xa1, 0x00, 0x30, 0x00, 0x00,                         // mov eax, [WORD]
        0xc6, 0x05, 0x00, 0x30, 0x00, 0x00, 0x40,             // mov byte [WORD], 0x40
        0xe6, 0x11,                                           // out 0x11, al
    ];
    let guest = Guest::new(&code, Chips::Kernel);
    assert_eq!(guest.vcpu.set_vapic_address(1 << 40), Err(Errno::EINVAL));
    guest.vcpu.set_vapic_address(WORD).unwrap();
    assert_eq!(guest.port().0, 0x10);
    guest.interrupt();
    assert_eq!(guest.port().0, 0x11);
    assert_eq!(guest.vcpu.get_regs().rax, u64::from(VECTOR) << 24);
    assert_eq!(guest.apic(0x80), 0x40, "the guest's word counts");
}

/// Ends the interrupt by the byte if it may, by the register if not; tells which by port 0x11.
#[rustfmt::skip]
const ENDS: [u8; 26] = [
    0x0f, 0xba, 0x35, 0x00, 0x31, 0x00, 0x00, 0x00,       // btr dword [BYTE], 0
    0x0f, 0x92, 0xc0,                                     // setc al
    0x72, 0x0a,                                           // jc over the next
    0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0, 0, 0, 0,       // mov dword [EOI], 0
    0xe6, 0x11,                                           // out 0x11, al
    0xcf,                                                 // iret
];

fn interrupted(chips: Chips) -> Guest {
    #[rustfmt::skip]
    let mut code = vec![
        0xb9, 0x04, 0x4d, 0x56, 0x4b,                         // mov ecx, MSR_KVM_PV_EOI_EN
        0xb8, 0x01, 0x31, 0x00, 0x00,                         // mov eax, BYTE | 1
        0x31, 0xd2, 0x0f, 0x30,                               // xor edx, edx; wrmsr
        0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0, 0, // mov dword [SPIV], 0x1ff
        0xe6, 0x10,                                           // out 0x10, al
    ];
    code.extend(WAIT);
    let code = if chips == Chips::None {
        &WAIT[..]
    } else {
        &code
    };
    let guest = Guest::new(code, chips);
    guest.write(HANDLER, &ENDS);
    guest
}

#[test]
fn an_interrupt_ends_by_a_byte() {
    let guest = interrupted(Chips::Kernel);
    assert_eq!(guest.port().0, 0x10);
    for round in 0..3 {
        guest.interrupt();
        assert_eq!(guest.port(), (0x11, 1), "round {round}: the byte was set");
        assert_eq!(guest.apic(0x120), 0, "nothing in service");
        assert_eq!(guest.word(BYTE), 0);
    }
    // One that waits behind another needs the register: its end is looked at by the APIC.
    let mut apic = guest.vcpu.get_lapic().unwrap();
    apic.regs[0x222] = 3;
    guest.vcpu.set_lapic(&apic).unwrap();
    let gate = HANDLER | 8 << 16 | 0x8e00 << 32;
    guest.write(IDT + 8 * u64::from(VECTOR + 1), &gate.to_le_bytes());
    assert_eq!(guest.port(), (0x11, 0), "another waits");
    assert_eq!(guest.port(), (0x11, 1), "none waits");
}

#[test]
fn a_halted_vcpu_that_polls_is_woken() {
    let guest = interrupted(Chips::Kernel);
    guest.enable(kb::KVM_CAP_HALT_POLL, 100_000_000);
    assert_eq!(guest.port().0, 0x10);
    for _ in 0..20 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(1));
                guest.interrupt();
            });
            assert_eq!(guest.port(), (0x11, 1));
        });
    }
}

#[test]
fn a_halt_may_be_the_guests_own_affair() {
    let guest = interrupted(Chips::None);
    guest.enable(
        kb::KVM_CAP_X86_DISABLE_EXITS,
        kb::KVM_X86_DISABLE_EXITS_HLT.into(),
    );
    let mut turns = (0..50).map(|_| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                guest.vcpu.kicker().kick();
            });
            assert_eq!(guest.vcpu.run(), Err(Errno::EINTR), "no exit, and no spin");
        });
        guest.vcpu.get_regs().rip
    });
    // On a busy host the kick comes before the guest has run so far.
    assert!(turns.any(|rip| rip == CODE + 2), "behind the HLT");
    assert_eq!(turns.next(), Some(CODE + 2), "and there it stays");
    let runnable = kb::KVM_MP_STATE_RUNNABLE;
    assert_eq!(guest.vcpu.get_mp_state().mp_state, runnable);
    guest.vcpu.interrupt(VECTOR.into()).unwrap();
    // The handler's register is in no APIC here: a write that leaves.
    assert_eq!(guest.run(), kb::KVM_EXIT_MMIO);
    assert_eq!(guest.port().0, 0x11);
}

#[test]
fn held_vcpus_stand_still_and_go_on() {
    // inc dword [WORD]; jmp back
    let guest = Guest::new(&[0xff, 0x05, 0, 0x30, 0, 0, 0xeb, 0xf8], Chips::Kernel);
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| guest.vcpu.run());
        let moves = || {
            let before = guest.word(WORD);
            let end = Instant::now() + Duration::from_secs(30);
            while guest.word(WORD) == before {
                assert!(Instant::now() < end, "the guest does not run");
                std::thread::yield_now();
            }
        };
        for _ in 0..20 {
            moves();
            let hold = guest.vm.hold(Duration::from_secs(30)).unwrap();
            let second = guest.vm.hold(Duration::from_secs(30)).unwrap();
            drop(hold);
            let before = guest.word(WORD);
            let rip = guest.vcpu.get_regs().rip;
            assert!((CODE..CODE + 8).contains(&rip));
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(guest.word(WORD), before);
            drop(second);
        }
        let _hold = guest.vm.hold(Duration::from_secs(30)).unwrap();
        guest.vcpu.kicker().kick();
        assert_eq!(ended.join().unwrap(), Err(Errno::EINTR));
    });
}
