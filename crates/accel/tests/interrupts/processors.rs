//! Processors that start, and local APICs that change their mode and place: INIT and SIPI, x2APIC,
//! `IA32_APIC_BASE` (SDM 3A, 10.4, 12.4.4, 12.12.5).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use accel::Exit;
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};

use super::guest::{COUNTER, Chips, Guest};
use super::{LONG, Watchdog, each, wait, wrmsr};

const APIC_BASE: u32 = 0x1b;
/// `out 0xe3, al`: the handler, of exceptions here.
const REFUSED: [u8; 2] = [0xe6, 0xe3];

/// Sends by the x2APIC's ICR.
fn ipi(destination: u32, low: u32) -> Vec<u8> {
    let mut code = vec![0xb9, 0x30, 8, 0, 0, 0xba];
    code.extend(destination.to_le_bytes());
    code.push(0xb8);
    code.extend(low.to_le_bytes());
    code.extend([0x0f, 0x30]);
    code
}

/// Spins until the counter moves, then tells by port 0xe1.
fn await_counter() -> Vec<u8> {
    let mut code = vec![0xf3, 0x90, 0x48, 0x83, 0x3c, 0x25];
    code.extend((COUNTER as u32).to_le_bytes());
    code.extend([0x00, 0x74, 0xf3, 0xe6, 0xe1]);
    code
}

#[test]
fn init_and_sipi_start_a_processor_in_real_mode() {
    each(|accelerator| {
        let start = [ipi(1, 0x4500), ipi(1, 0x4608), await_counter()].concat();
        let mut guest = Guest::new(accelerator, Chips::All, &[&start, &[0xf4]], &REFUSED);
        // mov ax, 0x3000; mov ds, ax; inc word [0]; hlt; jmp back
        let started = [
            0xb8, 0x00, 0x30, 0x8e, 0xd8, 0xff, 0x06, 0, 0, 0xf4, 0xeb, 0xfd,
        ];
        guest.write(0x8000, &started);
        let mut other = guest.vcpus.remove(1);
        let asleep = kvm_mp_state {
            mp_state: KVM_MP_STATE_UNINITIALIZED,
        };
        other.set_mp_state(asleep).unwrap();
        let kicker = other.kicker();
        let over = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            // Each event before the start comes out once.
            while !watched.load(Ordering::SeqCst) {
                assert!(matches!(other.run().unwrap(), Exit::Interrupted));
            }
            other
        });
        wait(&mut guest);
        // It halts behind its last instruction.
        std::thread::sleep(std::time::Duration::from_millis(100));
        over.store(true, Ordering::SeqCst);
        kicker.kick();
        let other = thread.join().unwrap();
        let (regs, sregs) = (other.get_regs().unwrap(), other.get_sregs().unwrap());
        assert_eq!((sregs.cs.selector, sregs.cs.base), (0x800, 0x8000));
        assert_eq!((sregs.cr0 & 0x8000_0001, sregs.efer), (0, 0), "real mode");
        assert_eq!((regs.rip, sregs.ds.base), (10, 0x3_0000));
        let state = other.get_mp_state().unwrap().mp_state;
        assert_eq!(state, KVM_MP_STATE_HALTED);
    });
}

/// `RDMSR`, and EAX to port 0xe4.
fn show_msr(index: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(index.to_le_bytes());
    code.extend([0x0f, 0x32, 0xe7, 0xe4]);
    code
}

/// A word of memory to port 0xe4.
fn show_memory(address: u32) -> Vec<u8> {
    let mut code = vec![0xbb];
    code.extend(address.to_le_bytes());
    code.extend([0x8b, 0x03, 0xe7, 0xe4]);
    code
}

/// What the guest shows until it ends (`0xe5`) or is refused (`0xe3`), that port at the end.
fn shown(guest: &mut Guest) -> Vec<u32> {
    let _watchdog = Watchdog::new(guest.vcpus[0].kicker(), LONG);
    let mut shown = Vec::new();
    loop {
        match guest.vcpus[0].run().unwrap() {
            Exit::IoOut {
                port: 0xe4, data, ..
            } => shown.push(u32::from_le_bytes(data.try_into().unwrap())),
            Exit::IoOut { port, .. } => {
                shown.push(port.into());
                return shown;
            }
            other => panic!("{other:?} after {shown:x?}"),
        }
    }
}

/// What it is about, its code, what it shows.
type Case = (&'static str, Vec<Vec<u8>>, &'static [u32]);

#[test]
fn apics_change_their_mode_as_the_manual_allows() {
    const END: [u8; 2] = [0xe6, 0xe5];
    let cases: [Case; 5] = [
        (
            "x2APIC: base, ID, logical ID",
            vec![show_msr(APIC_BASE), show_msr(0x802), show_msr(0x80d)],
            &[0xfee0_0d00, 0, 1, 0xe5],
        ),
        (
            "back to xAPIC at once",
            vec![wrmsr(APIC_BASE, 0xfee0_0900)],
            &[0xe3],
        ),
        (
            "off: its MSRs are gone",
            vec![
                wrmsr(APIC_BASE, 0xfee0_0100),
                show_msr(APIC_BASE),
                show_msr(0x802),
            ],
            &[0xfee0_0100, 0xe3],
        ),
        (
            "off, xAPIC: registers in memory, MSRs refused",
            vec![
                wrmsr(APIC_BASE, 0xfee0_0100),
                wrmsr(APIC_BASE, 0xfee0_0900),
                show_memory(0xfee0_0020),
                show_msr(0x802),
            ],
            &[0, 0xe3],
        ),
        (
            "x2APIC from off",
            vec![wrmsr(APIC_BASE, 0xfee0_0100), wrmsr(APIC_BASE, 0xfee0_0d00)],
            &[0xe3],
        ),
    ];
    each(|accelerator| {
        for (name, parts, expected) in &cases {
            let code = [parts.concat(), END.to_vec()].concat();
            let mut guest = Guest::new(accelerator, Chips::All, &[&code], &REFUSED);
            assert_eq!(shown(&mut guest), *expected, "{name}");
        }
    });
}
