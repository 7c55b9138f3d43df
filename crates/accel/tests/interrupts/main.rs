//! Timers, controllers and event descriptors as a guest meets them: the same guests on every
//! accelerator that this host offers.
#![expect(
    unsafe_code,
    reason = "the guest's memory is handed to it, and KVM's structures are unions"
)]

#[path = "../../benches/exits/guest.rs"]
mod guest;
mod monitors_apics;
mod processors;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use accel::{Accelerator, Exit, Kicker, Kind, Level, Preference, choose};
use guest::{COUNTER, Chips, GSI, Guest, VECTOR};
use kvm_bindings::{KVM_IRQFD_FLAG_RESAMPLE, kvm_irqfd, kvm_pit_config};
use vm_memory::VolatileMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const LONG: Duration = Duration::from_secs(20);

/// Ours always, the kernel's where it opens.
fn each(test: impl Fn(&dyn Accelerator)) {
    for preference in [
        Preference::Kernel,
        Preference::User(accel::user::Config::default()),
    ] {
        match choose(preference) {
            Ok(choice) => {
                println!("on {}", choice.accelerator.kind());
                test(&*choice.accelerator);
            }
            Err(refused) => println!("skipped: {refused}"),
        }
    }
}

/// `WRMSR`.
fn wrmsr(index: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(index.to_le_bytes());
    code.push(0xb8);
    code.extend(value.to_le_bytes());
    code.extend([0x31, 0xd2, 0x0f, 0x30]);
    code
}

/// `mov dword [address], value`.
fn store(address: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0xbb];
    code.extend(address.to_le_bytes());
    code.extend([0xc7, 0x03]);
    code.extend(value.to_le_bytes());
    code
}

/// `mov al, value; out port, al`.
fn out(port: u8, value: u8) -> Vec<u8> {
    vec![0xb0, value, 0xe6, port]
}

/// `sti; hlt` for ever.
const WAIT: [u8; 4] = [0xfb, 0xf4, 0xeb, 0xfc];

/// Enables the local APIC, does `parts`, then waits.
fn program(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut code = wrmsr(0x80f, 0x1ff);
    code.extend(parts.concat());
    code.extend(WAIT);
    code
}

/// Tells the monitor by port 0xe1, then ends the interrupt and returns.
fn handler() -> Vec<u8> {
    let mut code = vec![0x50, 0x51, 0x52, 0xe6, 0xe1];
    code.extend(wrmsr(0x80b, 0));
    code.extend([0x5a, 0x59, 0x58, 0x48, 0xcf]);
    code
}

/// Makes a vCPU leave if the test takes too long.
struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    fn new(kicker: Arc<dyn Kicker>, limit: Duration) -> Watchdog {
        let done = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&done);
        std::thread::spawn(move || {
            let deadline = Instant::now() + limit;
            while !watched.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(10));
                if Instant::now() > deadline {
                    kicker.kick();
                    return;
                }
            }
        });
        Watchdog(done)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs the first vCPU until the handler has reported.
fn wait(guest: &mut Guest) {
    let _watchdog = Watchdog::new(guest.vcpus[0].kicker(), LONG);
    match guest.vcpus[0].run().unwrap() {
        Exit::IoOut { port: 0xe1, .. } => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_apic_timer_ends_hlt_once() {
    each(|accelerator| {
        let timer = [
            wrmsr(0x832, u32::from(VECTOR)),
            wrmsr(0x83e, 0xb),
            wrmsr(0x838, 5_000_000),
        ];
        let mut guest = Guest::new(accelerator, Chips::All, &[&program(&timer)], &handler());
        let start = Instant::now();
        wait(&mut guest);
        assert!(start.elapsed() >= Duration::from_millis(5));
        let _watchdog = Watchdog::new(guest.vcpus[0].kicker(), Duration::from_millis(60));
        assert!(
            matches!(guest.vcpus[0].run().unwrap(), Exit::Interrupted),
            "one shot"
        );
    });
}

#[test]
fn the_apic_timer_ticks() {
    each(|accelerator| {
        let timer = [
            wrmsr(0x832, 0x2_0000 | u32::from(VECTOR)),
            wrmsr(0x83e, 0xb),
            wrmsr(0x838, 2_000_000),
        ];
        let mut guest = Guest::new(accelerator, Chips::All, &[&program(&timer)], &handler());
        let start = Instant::now();
        (0..5).for_each(|_| wait(&mut guest));
        assert!(
            start.elapsed() >= Duration::from_millis(8),
            "{:?}",
            start.elapsed()
        );
    });
}

#[test]
fn the_tsc_deadline_ends_hlt() {
    each(|accelerator| {
        // rdtsc; add eax, 10000000; adc edx, 0; mov ecx, 0x6e0; wrmsr
        let deadline = vec![
            0x0f, 0x31, 0x05, 0x80, 0x96, 0x98, 0x00, 0x83, 0xd2, 0, 0xb9, 0xe0, 6, 0, 0, 0x0f,
            0x30,
        ];
        let timer = [wrmsr(0x832, 0x4_0000 | u32::from(VECTOR)), deadline];
        let mut guest = Guest::new(accelerator, Chips::All, &[&program(&timer)], &handler());
        wait(&mut guest);
    });
}

#[test]
fn the_pit_ticks_through_the_ioapic() {
    each(|accelerator| {
        let setup = [
            store(0xfec0_0000, 0x10),
            store(0xfec0_0010, u32::from(VECTOR)),
            out(0x43, 0x34),
            out(0x40, 0x9c),
            out(0x40, 0x2e),
        ];
        let mut guest = Guest::new(accelerator, Chips::All, &[&[0xf4]], &handler());
        guest.vm.create_pit2(&kvm_pit_config::default()).unwrap();
        guest.reload(0, &program(&setup));
        let start = Instant::now();
        (0..5).for_each(|_| wait(&mut guest));
        assert!(
            start.elapsed() >= Duration::from_millis(40),
            "five ticks of 10 ms"
        );
    });
}

#[test]
fn a_pulse_of_a_line_comes_through_the_8259() {
    each(|accelerator| {
        let setup = [
            wrmsr(0x835, 0x700),
            out(0x20, 0x11),
            out(0x21, VECTOR),
            out(0x21, 4),
            out(0x21, 1),
            out(0x21, 0),
            vec![0xe6, 0xe2],
        ];
        // The handler ends it at the 8259 as well.
        let mut body = out(0x20, 0x20);
        body.splice(0..0, [0x50]);
        body.push(0x58);
        body.extend(handler());
        let mut guest = Guest::new(accelerator, Chips::All, &[&program(&setup)], &body);
        assert!(matches!(
            guest.vcpus[0].run().unwrap(),
            Exit::IoOut { port: 0xe2, .. }
        ));
        for _ in 0..3 {
            guest.vm.set_irq_line(4, Level::High).unwrap();
            guest.vm.set_irq_line(4, Level::Low).unwrap();
            wait(&mut guest);
        }
    });
}

#[test]
fn an_irqfd_with_resampling_asks_again_at_the_eoi() {
    each(|accelerator| {
        const PIN: u32 = 5;
        let setup = [
            store(0xfec0_0000, 0x10 + 2 * PIN),
            store(0xfec0_0010, 0x8000 | u32::from(VECTOR)),
            // The same GSI is a pin of the 8259, too.
            out(0x21, 0xff),
            vec![0xe6, 0xe2],
        ];
        let mut guest = Guest::new(accelerator, Chips::All, &[&program(&setup)], &handler());
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let resample = EventFd::new(EFD_NONBLOCK).unwrap();
        let request = kvm_irqfd {
            fd: event.as_raw_fd() as u32,
            gsi: PIN,
            flags: KVM_IRQFD_FLAG_RESAMPLE,
            resamplefd: resample.as_raw_fd() as u32,
            ..Default::default()
        };
        guest.vm.irqfd(&request).unwrap();
        assert!(matches!(
            guest.vcpus[0].run().unwrap(),
            Exit::IoOut { port: 0xe2, .. }
        ));
        for _ in 0..2 {
            event.write(1).unwrap();
            wait(&mut guest);
            // A KVM in software may keep no interrupts in service: taking one ends it.
            if accelerator.kind() == Kind::User {
                assert!(resample.read().is_err(), "no EOI yet");
            }
            let _watchdog = Watchdog::new(guest.vcpus[0].kicker(), Duration::from_millis(60));
            let after = format!("{:?}", guest.vcpus[0].run().unwrap());
            assert_eq!(
                after,
                "Interrupted",
                "the line is low: resample {:?}",
                resample.read()
            );
            assert_eq!(resample.read().ok(), Some(1));
        }
    });
}

/// A function far from the code of the vCPUs: `mov eax, value; ret`.
const FUNCTION: u32 = 0x2_4000;

fn function(value: u8) -> [u8; 6] {
    [0xb8, value, 0, 0, 0, 0xc3]
}

/// `sti`, then calls [`FUNCTION`] until the counter isn't zero, and once more, and tells the result.
fn caller(at: u32) -> Vec<u8> {
    let call = |from: u32| {
        let mut code = vec![0xe8];
        code.extend(FUNCTION.wrapping_sub(from + 5).to_le_bytes());
        code
    };
    let mut code = vec![0xfb, 0xbb];
    code.extend((COUNTER as u32).to_le_bytes());
    code.extend(call(at + 6));
    // cmp dword [rbx], 0; je back to the call
    code.extend([0x83, 0x3b, 0x00, 0x74, 0xf6]);
    code.extend(call(at + 16));
    code.extend([0xe6, 0xe1]);
    code
}

#[test]
fn code_that_a_device_brought_is_seen_after_its_interrupt() {
    each(|accelerator| {
        let apic = wrmsr(0x80f, 0x1ff);
        let code = [apic.clone(), caller(guest::CODE as u32 + apic.len() as u32)].concat();
        let mut handler = store(COUNTER as u32, 1);
        handler.extend([0x50, 0x51, 0x52]);
        handler.extend(wrmsr(0x80b, 0));
        handler.extend([0x5a, 0x59, 0x58, 0x48, 0xcf]);
        let mut guest = Guest::new(accelerator, Chips::Message, &[&code], &handler);
        guest.write(u64::from(FUNCTION), &function(1));
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let request = kvm_irqfd {
            fd: event.as_raw_fd() as u32,
            gsi: GSI,
            ..Default::default()
        };
        guest.vm.irqfd(&request).unwrap();
        let mut vcpu = guest.vcpus.remove(0);
        let memory = guest.memory();
        let _watchdog = Watchdog::new(vcpu.kicker(), LONG);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                let place = memory.as_volatile_slice();
                let place = place.subslice(FUNCTION as usize, 6).unwrap();
                place.copy_from(&function(2));
                event.write(1).unwrap();
            });
            match vcpu.run().unwrap() {
                Exit::IoOut {
                    port: 0xe1, data, ..
                } => assert_eq!(data[0], 2, "the new code"),
                other => panic!("{other:?}"),
            }
        });
    });
}

#[test]
fn the_monitors_ioapic_sees_the_eoi() {
    each(|accelerator| {
        let setup = [vec![0xe6, 0xe2]];
        let mut guest = Guest::new(accelerator, Chips::Split, &[&program(&setup)], &handler());
        assert!(matches!(
            guest.vcpus[0].run().unwrap(),
            Exit::IoOut { port: 0xe2, .. }
        ));
        guest.vm.set_irq_line(GSI, Level::High).unwrap();
        let _watchdog = Watchdog::new(guest.vcpus[0].kicker(), LONG);
        match guest.vcpus[0].run().unwrap() {
            Exit::IoOut { port: 0xe1, .. } => {}
            // A KVM in software may keep no interrupts in service: taking one ends it.
            Exit::IoapicEoi { vector: VECTOR } if accelerator.kind() == Kind::Kernel => return,
            other => panic!("{other:?}"),
        }
        let _watchdog = Watchdog::new(guest.vcpus[0].kicker(), LONG);
        match guest.vcpus[0].run().unwrap() {
            Exit::IoapicEoi { vector } => assert_eq!(vector, VECTOR),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn an_ipi_counts_on_the_other_cpu() {
    each(|accelerator| {
        // wrmsr ICR to vCPU 1; spin until the counter moves; out 0xe1.
        let mut send = wrmsr(0x80f, 0x1ff);
        send.extend([
            0xb9, 0x30, 8, 0, 0, 0xba, 1, 0, 0, 0, 0xb8, VECTOR, 0x40, 0, 0, 0x0f, 0x30,
        ]);
        send.extend([0xf3, 0x90, 0x48, 0x83, 0x3c, 0x25]);
        send.extend((COUNTER as u32).to_le_bytes());
        send.extend([0x00, 0x74, 0xf3, 0xe6, 0xe1]);
        let mut count = vec![0xf0, 0x48, 0xff, 0x04, 0x25];
        count.extend((COUNTER as u32).to_le_bytes());
        count.extend([0x48, 0xcf]);
        let mut guest = Guest::new(accelerator, Chips::All, &[&send, &program(&[])], &count);
        let mut other = guest.vcpus.remove(1);
        let kicker = other.kicker();
        // The other CPU must have enabled its APIC first.
        let thread = std::thread::spawn(move || other.run().map(|exit| format!("{exit:?}")));
        std::thread::sleep(Duration::from_millis(100));
        wait(&mut guest);
        kicker.kick();
        assert_eq!(thread.join().unwrap().unwrap(), "Interrupted");
    });
}
