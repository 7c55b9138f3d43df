//! Whole machines with kernels of a few instructions, on the kernel's KVM, and broken kernels.

#[path = "common/kernel.rs"]
mod kernel;

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use accel::{Accelerator, Preference, choose};
use devices::virtio::rng::Rng;
use kernel::elf;
use vmm::{Initrd, Machine, MachineConfig, Outcome};

/// The kernel's KVM, or `None` where there is none.
fn kernel_kvm() -> Option<Arc<dyn Accelerator>> {
    match choose(Preference::Kernel) {
        Ok(choice) => Some(choice.accelerator),
        Err(refused) => {
            assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{refused}");
            eprintln!("skipped: {refused}");
            None
        }
    }
}

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is gone after the test.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let name = format!("fourfold-vmm-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn config(kernel: &TempFile, output: &Output) -> MachineConfig {
    MachineConfig {
        name: "test".to_owned(),
        memory: 32 << 20,
        cpus: 1,
        kernel: kernel.0.clone(),
        initrd: None,
        command_line: "console=ttyS0".to_owned(),
        serial: [
            Box::new(output.clone()),
            Box::new(io::sink()),
            Box::new(io::sink()),
        ],
        virtio: vec![Box::new(Rng::new().unwrap())],
    }
}

/// `mov edx, PORT; mov al, BYTE; out dx, al`
fn out(port: u16, byte: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0xba, low, high, 0, 0, 0xb0, byte, 0xee]
}

/// `mov edx, 0x604; mov eax, 0x3400; out dx, ax; hlt; jmp -3`: ACPI S5.
const POWER_OFF: [u8; 15] = [
    0xba, 0x04, 0x06, 0, 0, 0xb8, 0x00, 0x34, 0, 0, 0x66, 0xef, 0xf4, 0xeb, 0xfd,
];

#[test]
fn a_kernel_prints_and_powers_off() {
    let Some(kvm) = kernel_kvm() else { return };
    let mut code: Vec<u8> = b"hi\n".iter().flat_map(|byte| out(0x3f8, *byte)).collect();
    code.extend(POWER_OFF);
    let (kernel, output) = (TempFile::new("prints", &elf(&code)), Output::default());
    let machine = Machine::build(config(&kernel, &output), &*kvm).unwrap();
    assert_eq!(machine.run(), Outcome::PowerOff);
    assert_eq!(output.text(), "hi\n");
}

#[test]
fn a_kernel_finds_its_command_line_where_the_zero_page_says() {
    let Some(kvm) = kernel_kvm() else { return };
    // mov ebx, [rsi + 0x228]; mov edx, 0x3f8; 1: mov al, [rbx]; test al, al; jz 2f; out dx, al;
    // inc rbx; jmp 1b; 2:
    let mut code = vec![
        0x8b, 0x9e, 0x28, 0x02, 0, 0, 0xba, 0xf8, 0x03, 0, 0, 0x8a, 0x03, 0x84, 0xc0, 0x74, 0x06,
        0xee, 0x48, 0xff, 0xc3, 0xeb, 0xf4,
    ];
    code.extend(POWER_OFF);
    let (kernel, output) = (TempFile::new("cmdline", &elf(&code)), Output::default());
    let machine = Machine::build(config(&kernel, &output), &*kvm).unwrap();
    assert_eq!(machine.run(), Outcome::PowerOff);
    assert_eq!(output.text(), "console=ttyS0");
}

#[test]
fn reset_triple_fault_and_stop_are_told_apart() {
    let Some(kvm) = kernel_kvm() else { return };
    let run = |name: &str, code: &[u8]| {
        let (kernel, output) = (TempFile::new(name, &elf(code)), Output::default());
        Machine::build(config(&kernel, &output), &*kvm)
            .unwrap()
            .run()
    };
    assert_eq!(run("reset", &out(0xcf9, 6)), Outcome::Reset);
    // ud2 without an IDT.
    let crashed = run("ud2", &[0x0f, 0x0b]);
    assert!(matches!(crashed, Outcome::Crashed(_)), "{crashed:?}");
    let kernel = TempFile::new("loop", &elf(&[0xeb, 0xfe]));
    let machine = Machine::build(config(&kernel, &Output::default()), &*kvm).unwrap();
    let stopper = machine.stopper();
    let other = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        stopper.stop();
    });
    assert_eq!(machine.run(), Outcome::Stopped);
    other.join().unwrap();
}

fn refusal(change: impl FnOnce(&mut MachineConfig), kernel: &[u8]) -> Option<String> {
    let kvm = kernel_kvm()?;
    let kernel = TempFile::new(&format!("bad-{:?}", thread::current().id()), kernel);
    let mut config = config(&kernel, &Output::default());
    change(&mut config);
    let error = Machine::build(config, &*kvm).err().expect("a refusal");
    Some(error.to_string())
}

/// A bzImage header that promises `sectors` sectors of code behind one sector of setup.
fn bzimage(promised: u32, actual: usize) -> Vec<u8> {
    let mut image = vec![0; 2 * 512];
    image[0x1f1] = 1;
    image[0x1f4..0x1f8].copy_from_slice(&(promised * 512 / 16).to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    image[0x211] = 1;
    image[0x236] = 1;
    image.resize(2 * 512 + actual * 512, 0);
    image
}

#[test]
fn broken_kernels_say_what_is_wrong() {
    let cases: [(&[u8], &str); 6] = [
        (b"", "neither a bzImage nor"),
        (b"MZ this is no kernel", "neither a bzImage nor"),
        (b"\x7fELF", "kernel "),
        (&elf(&[0x90; 64])[..140], "kernel "),
        (&bzimage(100, 99), "truncated"),
        (&bzimage(10, 10)[..0x210], "truncated"),
    ];
    for (image, expected) in cases {
        let Some(message) = refusal(|_| (), image) else {
            return;
        };
        println!("{message}");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn configurations_that_cannot_be_say_why() {
    type Change = fn(&mut MachineConfig);
    let code = elf(&POWER_OFF);
    let cases: [(Change, &str); 6] = [
        (|c| c.memory = 1 << 20, "bytes of memory"),
        (|c| c.memory += 1, "bytes of memory"),
        (|c| c.cpus = 0, "0 vCPUs"),
        (|c| c.kernel = "/no/such/kernel".into(), "/no/such/kernel"),
        (|c| c.command_line = "x".repeat(5000), "5000 bytes"),
        (
            |c| c.initrd = Some(Initrd::Bytes(vec![0; 32 << 20])),
            "more memory",
        ),
    ];
    for (change, expected) in cases {
        let Some(message) = refusal(change, &code) else {
            return;
        };
        println!("{message}");
        assert!(message.contains(expected), "{message}");
    }
}
