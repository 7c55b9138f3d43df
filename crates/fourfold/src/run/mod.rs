//! `fourfold run`: a machine with a kernel, a console, and an end.
//!
//! | file          | what it does                                                               |
//! |---------------|----------------------------------------------------------------------------|
//! | [`options`]   | command line and TOML file, checked once                                   |
//! | [`fetch`]     | the default kernel and busybox, from Debian's packages, into the cache     |
//! | [`initramfs`] | the default initial RAM disk: busybox, modules, an init                    |
//! | [`modules`]   | which modules of the kernel go into it                                     |
//! | [`console`]   | the terminal as the guest's serial port or virtio console                  |
//! | [`keys`], [`screen`] | the keys that are not the guest's; its output on the terminal       |
//! | [`exec`]      | one command in the guest: its output and exit code                         |
//! | [`control`]   | the machine's control socket                                               |

mod console;
mod control;
mod exec;
mod fetch;
mod initramfs;
mod keys;
mod modules;
mod options;
mod screen;

use std::{
    fs::File,
    io, thread,
    time::{Duration, Instant},
};

use accel::{Choice, Kind, choose, detect::KernelKvm};
use anyhow::{Context, Result};
use devices::virtio::{
    VirtioDevice,
    blk::{Block, RawImage},
    console::{Console as VirtioConsole, Inbox},
    rng::Rng,
};
use vmm::{Initrd, Machine, MachineConfig, Outcome, SerialOutput};

pub(crate) use options::RunOptions;

use self::control::Control;
use crate::ending::Ending;
use console::{Console, Keyboard, Target};
use exec::{Capture, Log, LogDestination};
use initramfs::{KernelOrigin, Payload};
use options::{Plan, SerialTarget};
use screen::Screen;

/// Runs a machine to its end; a reset starts it again.
pub(crate) fn run(options: RunOptions) -> Result<Ending> {
    let is_exec = options.is_exec();
    let ending = plan_and_run(options);
    match ending {
        Err(error) if is_exec && Ending::of_error(&error).is_failure() => {
            Ok(Ending::CommandNotRun(format!("{error:#}")))
        }
        other => other,
    }
}

fn plan_and_run(options: RunOptions) -> Result<Ending> {
    let plan = options.plan()?;
    if plan.exec.is_none() && plan.has_terminal() {
        console::restore_on_signals();
    }
    let choice = choose(plan.accel)?;
    if let (Kind::Kernel, None) = (choice.accelerator.kind(), plan.timeout)
        && let Some(refusal) = too_slow(&KernelKvm::probe())
    {
        return Ok(Ending::HostLacks(refusal));
    }
    let control = Control::open(&plan)?;
    let boot = Boot::prepare(&plan)?;
    if plan.exec.is_none() {
        announce(&plan, &choice, &boot);
    }
    boot_again(&plan, &choice, &boot, &control)
}

/// Boots as often as was asked for, until one boot ends badly; gives the last ending.
fn boot_again(plan: &Plan, choice: &Choice, boot: &Boot, control: &Control) -> Result<Ending> {
    let began = Instant::now();
    let mut ending = Ending::Done;
    for number in 1..=plan.boots {
        ending = boot_to_end(plan, choice, boot, control)?;
        if !ending.is_success() {
            if plan.boots > 1 {
                eprintln!("fourfold: boot {number} of {} failed", plan.boots);
            }
            return Ok(ending);
        }
    }
    if plan.boots > 1 {
        let seconds = began.elapsed().as_secs_f64() / f64::from(plan.boots);
        eprintln!(
            "fourfold: {} boots ended well, {seconds:.2} s each",
            plan.boots
        );
    }
    Ok(ending)
}

/// One boot, and those that follow it because the guest resets itself.
fn boot_to_end(plan: &Plan, choice: &Choice, boot: &Boot, control: &Control) -> Result<Ending> {
    let timeout = plan.timeout;
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        let run = match &plan.exec {
            None => run_interactive(plan, choice, boot, control, deadline)?,
            Some(_) => run_command(plan, choice, boot, control, deadline)?,
        };
        match run {
            Finished::Again => {}
            Finished::With(ending) => return Ok(ending),
        }
    }
}

/// Why it makes no sense to boot on this KVM: a software one would take so long that it looks like
/// a hang.
fn too_slow(kernel: &KernelKvm) -> Option<String> {
    /// About what a kernel needs to its first process.
    const BOOT_INSTRUCTIONS: u32 = 1_000_000_000;
    const PATIENCE: Duration = Duration::from_secs(60);
    let estimate = kernel.time_for(BOOT_INSTRUCTIONS)?;
    (estimate > PATIENCE).then(|| {
        format!(
            "{}: a kernel would need some {} minutes to boot. `--accel user` is made for hosts \
             like this; with `--timeout` it is tried all the same",
            kernel.describe(),
            estimate.as_secs().div_ceil(60),
        )
    })
}

/// What one life of the machine led to.
enum Finished {
    /// The guest reset itself.
    Again,
    /// The end.
    With(Ending),
}

/// What is booted.
struct Boot {
    kernel: std::path::PathBuf,
    initrd: Option<Initrd>,
    command_line: String,
    nonce: String,
}

impl Boot {
    fn prepare(plan: &Plan) -> Result<Self> {
        let nonce = exec::nonce().context("/dev/urandom")?;
        let mut kernel = plan.kernel.clone();
        let mut initrd = plan.initrd.clone().map(Initrd::File);
        if kernel.is_none() || (initrd.is_none() && plan.exec.is_some()) {
            let packages = fetch::guest(&plan.kernel_package)?;
            if initrd.is_none() {
                let origin = match kernel {
                    None => KernelOrigin::Packages,
                    Some(_) => KernelOrigin::User,
                };
                let archive = initramfs::build(
                    &packages,
                    origin,
                    &Payload {
                        command: plan.exec.as_deref(),
                        files: &plan.files,
                    },
                    &nonce,
                )?;
                initrd = Some(Initrd::Bytes(archive));
            }
            kernel.get_or_insert(packages.kernel);
        }
        Ok(Self {
            kernel: kernel.context("no kernel")?,
            initrd,
            command_line: plan.command_line(),
            nonce,
        })
    }
}

fn announce(plan: &Plan, choice: &Choice, boot: &Boot) {
    eprintln!(
        "fourfold: {} with {} MiB and {} vCPU{} on `{}` ({})",
        boot.kernel.display(),
        plan.memory >> 20,
        plan.cpus,
        if plan.cpus == 1 { "" } else { "s" },
        choice.accelerator.kind(),
        choice.reason,
    );
    if plan.has_terminal() {
        eprintln!("fourfold: Ctrl-A x ends it, Ctrl-A h helps");
    }
}

fn machine(
    plan: &Plan,
    choice: &Choice,
    boot: &Boot,
    serial: [SerialOutput; 3],
    inbox: Inbox,
) -> Result<Machine> {
    let config = MachineConfig {
        name: plan.name.as_str().to_owned(),
        memory: plan.memory,
        cpus: plan.cpus,
        kernel: boot.kernel.clone(),
        initrd: boot.initrd.clone(),
        command_line: boot.command_line.clone(),
        serial,
        virtio: virtio_devices(plan, inbox)?,
    };
    Ok(Machine::build(config, &*choice.accelerator)?)
}

fn virtio_devices(plan: &Plan, inbox: Inbox) -> Result<Vec<Box<dyn VirtioDevice>>> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (number, disk) in plan.disks.iter().enumerate() {
        let image = RawImage::open(&disk.path, disk.access)?;
        devices.push(Box::new(Block::new(image, &format!("disk{number}"))));
    }
    devices.push(Box::new(Rng::new().context("/dev/urandom")?));
    if let Some(target) = &plan.virtio_console {
        let out = output(target, "--virtio-console")?;
        devices.push(Box::new(VirtioConsole::new(inbox, out)));
    }
    Ok(devices)
}

/// Where a console's output goes.
fn output(target: &SerialTarget, option: &str) -> Result<SerialOutput> {
    Ok(match target {
        SerialTarget::Stdio => Box::new(Screen::stdout()),
        SerialTarget::None => nowhere(),
        SerialTarget::File(path) => {
            let file = File::create(path);
            Box::new(file.with_context(|| format!("{option} file:{}", path.display()))?)
        }
    })
}

fn nowhere() -> SerialOutput {
    Box::new(io::sink())
}

fn run_interactive(
    plan: &Plan,
    choice: &Choice,
    boot: &Boot,
    control: &Control,
    deadline: Option<Instant>,
) -> Result<Finished> {
    let serial = output(&plan.serial, "--serial")?;
    let inbox = Inbox::default();
    let outputs = [serial, nowhere(), nowhere()];
    let machine = machine(plan, choice, boot, outputs, inbox.clone())?;
    stop_at(deadline, &machine);
    let _attached = control.attach(plan, &machine)?;
    let outcome = if plan.has_terminal() {
        let keyboard = match plan.serial {
            SerialTarget::Stdio => Keyboard::Serial(machine.com1()),
            SerialTarget::None | SerialTarget::File(_) => Keyboard::Virtio(inbox),
        };
        let _console = Console::attach(Target {
            keyboard,
            stopper: machine.stopper(),
            name: plan.name.as_str().to_owned(),
        });
        machine.run()
    } else {
        machine.run()
    };
    Ok(match outcome {
        Outcome::Stopped if is_over(deadline) => {
            Finished::With(Ending::TimeOver(TIME_OVER.to_owned()))
        }
        Outcome::PowerOff | Outcome::Stopped => Finished::With(Ending::Done),
        Outcome::Reset => Finished::Again,
        Outcome::Crashed(crash) => Finished::With(Ending::Failed(crash_message(&crash, choice))),
    })
}

fn run_command(
    plan: &Plan,
    choice: &Choice,
    boot: &Boot,
    control: &Control,
    deadline: Option<Instant>,
) -> Result<Finished> {
    let capture = Capture::new(&boot.nonce, io::stdout());
    let log = Log::new(match plan.serial {
        SerialTarget::Stdio => LogDestination::Shown,
        SerialTarget::None | SerialTarget::File(_) => LogDestination::Kept,
    });
    let serial: [SerialOutput; 3] = [
        Box::new(log.clone()),
        Box::new(capture.clone()),
        Box::new(io::stderr()),
    ];
    let machine = machine(plan, choice, boot, serial, Inbox::default())?;
    stop_at(deadline, &machine);
    let _attached = control.attach(plan, &machine)?;
    let outcome = machine.run();
    if let Some(code) = capture.code() {
        return Ok(Finished::With(Ending::Command(code)));
    }
    let ending = |what: &str| format!("{what}; the last lines of its console:\n{}", log.tail());
    Ok(Finished::With(match outcome {
        Outcome::Crashed(crash) => Ending::CommandNotRun(ending(&crash_message(&crash, choice))),
        Outcome::Stopped if is_over(deadline) => Ending::TimeOver(ending(TIME_OVER)),
        Outcome::Stopped => Ending::CommandNotRun(ending("the guest was stopped")),
        Outcome::PowerOff | Outcome::Reset => {
            Ending::CommandNotRun(ending("the guest ended without having run the command"))
        }
    }))
}

const TIME_OVER: &str = "the guest was stopped: the time given by --timeout is over";

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

/// Stops the machine when the time is over; it may have been reset before.
fn stop_at(deadline: Option<Instant>, machine: &Machine) {
    if let Some(deadline) = deadline {
        let stopper = machine.stopper();
        thread::spawn(move || {
            thread::sleep(deadline.saturating_duration_since(Instant::now()));
            stopper.stop();
        });
    }
}

fn crash_message(crash: &vmm::Crash, choice: &Choice) -> String {
    let advice = match choice.accelerator.kind() {
        Kind::Kernel => "; `--accel user` runs guests without /dev/kvm",
        Kind::User => "",
    };
    format!("the machine can't go on: {crash}{advice}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use accel::detect::KvmKind;

    #[test]
    fn only_a_slow_kvm_is_refused_and_the_way_out_is_named() {
        let kvm = |kind, ns| KernelKvm::Open {
            api_version: 12,
            kind,
            evidence: Vec::new(),
            ns_per_instruction: Some(ns),
        };
        assert_eq!(too_slow(&kvm(KvmKind::Hardware, 0.7)), None);
        let refusal = too_slow(&kvm(KvmKind::Software, 500.0)).unwrap();
        assert!(refusal.contains("9 minutes"), "{refusal}");
        assert!(refusal.contains("--accel user"), "{refusal}");
    }
}
