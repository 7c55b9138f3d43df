//! A step on one side, and what can be seen afterwards.

use std::time::Duration;

use kvm_bindings::*;

use crate::call::{Input, On, Patch, Step};
use crate::exit::Exit;
use crate::guest::{Guest, TABLES, write_tables};
use crate::side::{Answer, EVENTS, Side};
use crate::watch::Watch;

/// What is seen: a label, and bytes.
pub(crate) type Seen = Vec<(String, Vec<u8>)>;

/// A step's answer where it was not made, because its object is not there.
const NOT_MADE: Answer = Err(-1);
/// Answers that finish an instruction.
const MOST_ANSWERS: u32 = 256;
/// Words of the buffer for bitmaps.
const BITMAP: usize = 16;

const GET_REGS: u32 = 0x8090_ae81;
const SET_REGS: u32 = 0x4090_ae82;
const GET_SREGS: u32 = 0x8138_ae83;
const SET_SREGS: u32 = 0x4138_ae84;
const SET_EVENTS: u32 = 0x4040_aea0;
const SET_DEBUGREGS: u32 = 0x4080_aea2;
const SET_XCRS: u32 = 0x4188_aea7;
const SET_MP_STATE: u32 = 0x4004_ae99;
const SET_GUEST_DEBUG: u32 = 0x4048_ae9b;
const SET_CPUID2: u32 = 0x4008_ae90;
const RUN: u32 = 0xae80;

/// A side, and what the sequence has done to it.
pub(crate) struct World {
    pub(crate) side: Side,
    /// vCPUs in a state that no guest of ours has.
    pub(crate) wild: Vec<bool>,
    /// eventfds that were an irqfd's.
    irqfds: [bool; EVENTS],
    cpuid: Vec<u8>,
    patience: Duration,
}

impl World {
    pub(crate) fn new(side: Side, cpuid: Vec<u8>, patience: Duration) -> World {
        write_tables(&side);
        World {
            side,
            wild: Vec::new(),
            irqfds: [false; EVENTS],
            cpuid,
            patience,
        }
    }

    fn fd(&self, on: On) -> Option<i32> {
        match on {
            On::System => Some(self.side.system),
            On::Vm => Some(self.side.vm),
            On::Vcpu(index) => self.side.vcpus.get(index).map(|vcpu| vcpu.fd),
        }
    }

    fn structure<T: Default>(&self, fd: i32, request: u32) -> T {
        let mut value = T::default();
        let got = self
            .side
            .ioctl(fd, request, std::ptr::from_mut(&mut value) as u64);
        assert_eq!(got, Ok(0), "{request:#x}");
        value
    }

    fn give<T>(&self, fd: i32, request: u32, value: &T) -> Answer {
        self.side
            .ioctl(fd, request, std::ptr::from_ref(value) as u64)
    }

    /// Makes a step.
    pub(crate) fn perform(&mut self, step: &Step, watch: &Watch) -> (Answer, Seen) {
        let mut seen = Seen::new();
        let answer = match step {
            Step::Call {
                name,
                on,
                request,
                input,
            } => self.call(name, *on, *request, input, &mut seen),
            Step::Change {
                name,
                on,
                get,
                set,
                size,
                header,
                changes,
            } => self.change(name, *on, [*get, *set], *size, header, changes, &mut seen),
            Step::Event(index) => {
                self.side.events[*index].write(1).expect("an event");
                std::thread::sleep(self.patience / 50);
                Ok(0)
            }
            Step::Run {
                vcpu,
                guest,
                exits,
                answer,
            } => match self.load(*vcpu, guest) {
                Ok(_) => self.run(*vcpu, *exits, *answer, watch, &mut seen),
                refused => refused,
            },
            Step::Resume {
                vcpu,
                exits,
                answer,
            } => match self.wild.get(*vcpu) {
                Some(false) => self.run(*vcpu, *exits, *answer, watch, &mut seen),
                _ => NOT_MADE,
            },
        };
        (answer, seen)
    }

    fn call(&mut self, name: &str, on: On, request: u32, input: &Input, seen: &mut Seen) -> Answer {
        let Some(fd) = self.fd(on) else {
            return NOT_MADE;
        };
        let (mut bytes, patches) = match input {
            Input::Number(number) => {
                let answer = self.side.ioctl(fd, request, *number);
                return match (name, answer) {
                    ("KVM_CREATE_VCPU", Ok(fd)) => {
                        self.new_vcpu(fd as i32);
                        Ok(0)
                    }
                    (_, answer) => answer,
                };
            }
            Input::Bytes { bytes, patches } => (bytes.clone(), patches),
        };
        let mut bitmap = [0u64; BITMAP];
        for patch in patches {
            let (at, value) = match *patch {
                Patch::Event(at, index) => {
                    self.irqfds[index] |= name == "KVM_IRQFD";
                    (
                        at,
                        (self.side.event_fd(index) as u32).to_le_bytes().to_vec(),
                    )
                }
                Patch::Memory(at, byte) => {
                    let address = self.side.memory.as_ptr() as u64 + byte;
                    (at, address.to_le_bytes().to_vec())
                }
                Patch::Bitmap(at, word) => {
                    bitmap.fill(word);
                    (at, (bitmap.as_mut_ptr() as u64).to_le_bytes().to_vec())
                }
            };
            bytes[at..at + value.len()].copy_from_slice(&value);
        }
        let answer = self.side.ioctl(fd, request, bytes.as_mut_ptr() as u64);
        if name == "KVM_IRQFD" {
            // An eventfd that had a count interrupts soon.
            std::thread::sleep(self.patience / 50);
        }
        match patches.first() {
            None => seen.push((name.into(), bytes)),
            Some(Patch::Bitmap(..)) if answer.is_ok() => {
                seen.push((
                    "bitmap".into(),
                    bitmap.iter().flat_map(|w| w.to_le_bytes()).collect(),
                ));
            }
            Some(_) => {}
        }
        if let (
            On::Vcpu(index),
            "KVM_SET_MSRS" | "KVM_SET_GUEST_DEBUG" | "KVM_SET_MP_STATE",
            Ok(_),
        ) = (on, name, answer)
        {
            self.wild[index] = true;
        }
        answer
    }

    fn new_vcpu(&mut self, fd: i32) {
        self.side.adopt(fd);
        self.wild.push(true);
        let set = self.side.ioctl(fd, SET_CPUID2, self.cpuid.as_ptr() as u64);
        assert_eq!(set, Ok(0), "the CPUID");
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one step")]
    fn change(
        &mut self,
        name: &str,
        on: On,
        [get, set]: [u32; 2],
        size: usize,
        header: &[u8],
        changes: &[(usize, u8)],
        seen: &mut Seen,
    ) -> Answer {
        let Some(fd) = self.fd(on) else {
            return NOT_MADE;
        };
        let mut state = vec![0u8; size.max(4096)];
        state[..header.len()].copy_from_slice(header);
        self.side.ioctl(fd, get, state.as_mut_ptr() as u64)?;
        let mut shown = state[..size].to_vec();
        hide_time(name, &mut shown);
        seen.push((format!("{name} before"), shown));
        for (at, byte) in changes {
            state[*at] = *byte;
        }
        if let On::Vcpu(index) = on {
            self.wild[index] = true;
        }
        self.side.ioctl(fd, set, state.as_mut_ptr() as u64)
    }

    /// Gives a vCPU the state that a guest starts with.
    fn load(&mut self, index: usize, guest: &Guest) -> Answer {
        let Some(fd) = self.fd(On::Vcpu(index)) else {
            return NOT_MADE;
        };
        guest.write(&self.side);
        // A debugger sees exact flags.
        let debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE,
            ..Default::default()
        };
        self.give(fd, SET_GUEST_DEBUG, &debug)?;
        let runnable = kvm_mp_state::default();
        self.give(fd, SET_MP_STATE, &runnable)?;
        let now: kvm_sregs = self.structure(fd, GET_SREGS);
        self.give(fd, SET_SREGS, &guest.special(&now))?;
        self.give(fd, SET_REGS, &guest.registers())?;
        let none = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
            ..Default::default()
        };
        self.give(fd, SET_EVENTS, &none)?;
        let debug = kvm_debugregs {
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..Default::default()
        };
        self.give(fd, SET_DEBUGREGS, &debug)?;
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = 1;
        self.give(fd, SET_XCRS, &xcrs)?;
        // The others' code is gone.
        self.wild.fill(true);
        self.wild[index] = false;
        Ok(0)
    }

    fn run(
        &mut self,
        index: usize,
        exits: u32,
        input: u64,
        watch: &Watch,
        seen: &mut Seen,
    ) -> Answer {
        let Some(vcpu) = self.side.vcpus.get(index) else {
            return NOT_MADE;
        };
        let (fd, run) = (vcpu.fd, vcpu.run.as_ptr());
        let mut last = Ok(0);
        for _ in 0..exits {
            last = watch.during(self.patience, || self.side.ioctl(fd, RUN, 0));
            // SAFETY: the mapping is `size` bytes long and nobody runs the vCPU now.
            let exit = unsafe { Exit::take(run, input) };
            seen.push(("exit".into(), exit.shown(last)));
            if last.is_err() || exit.ends() {
                break;
            }
        }
        let halted = last.is_ok()
            && seen
                .last()
                .is_some_and(|(_, exit)| exit.starts_with(b"reason 5 "));
        // The access of the last exit is completed by the next run, which may need more answers.
        // SAFETY: as above.
        unsafe { (*run).immediate_exit = 1 };
        let mut finish = Ok(0);
        for _ in 0..MOST_ANSWERS {
            finish = watch.during(self.patience, || self.side.ioctl(fd, RUN, 0));
            if finish.is_err() {
                break;
            }
            // SAFETY: as above.
            let exit = unsafe { Exit::take(run, input) };
            seen.push(("exit".into(), exit.shown(finish)));
        }
        // SAFETY: as above.
        unsafe { (*run).immediate_exit = 0 };
        seen.push(("finish".into(), format!("{finish:?}").into_bytes()));
        // What lies behind the program is nobody's.
        self.wild[index] |= halted;
        last
    }

    /// All that can be seen.
    pub(crate) fn snapshot(&self) -> Seen {
        let mut seen = Seen::new();
        for (index, vcpu) in self.side.vcpus.iter().enumerate() {
            for (name, request, size) in VCPU_STATES {
                let mut bytes = vec![0u8; *size];
                let answer = self
                    .side
                    .ioctl(vcpu.fd, *request, bytes.as_mut_ptr() as u64);
                hide_time(name, &mut bytes);
                bytes.extend(format!("{answer:?}").into_bytes());
                seen.push((format!("vCPU {index} {name}"), bytes));
            }
        }
        for chip in 0..3u32 {
            let mut bytes = vec![0u8; 520];
            bytes[..4].copy_from_slice(&chip.to_le_bytes());
            let answer = self
                .side
                .ioctl(self.side.vm, 0xc208_ae62, bytes.as_mut_ptr() as u64);
            bytes.extend(format!("{answer:?}").into_bytes());
            seen.push((format!("chip {chip}"), bytes));
        }
        seen
    }

    /// Memory, and what the eventfds counted: looked at once, at the end. An irqfd's count is left
    /// out: kvm.ko leaves what was there before it became one.
    pub(crate) fn remains(&self) -> Seen {
        let mut memory = self.side.dump();
        hide_accessed(&mut memory);
        let mut seen = vec![("memory".to_owned(), memory)];
        for index in (0..EVENTS).filter(|index| !self.irqfds[*index]) {
            seen.push((
                format!("event {index}"),
                self.side.take_event(index).to_le_bytes().to_vec(),
            ));
        }
        seen
    }
}

const VCPU_STATES: &[(&str, u32, usize)] = &[
    ("regs", GET_REGS, 0x90),
    ("sregs", GET_SREGS, 0x138),
    ("events", 0x8040_ae9f, 0x40),
    ("debugregs", 0x8080_aea1, 0x80),
    ("xcrs", 0x8188_aea6, 0x188),
    ("fpu", 0x81a0_ae8c, 0x1a0),
    ("mp state", 0x8004_ae98, 4),
    ("lapic", 0x8400_ae8e, 0x400),
];

/// Parts that depend on when one looks.
fn hide_time(name: &str, bytes: &mut [u8]) {
    match name {
        "regs" => hide_flags(bytes),
        "events" => hide_what_was(bytes),
        // The timer's current count.
        "lapic" => bytes[0x390..0x394].fill(0),
        // count_load_time.
        "pit2" => {
            for channel in 0..3 {
                bytes[24 * channel + 16..24 * channel + 24].fill(0);
            }
        }
        _ => {}
    }
}

/// The accessed bits of the page tables: kvm.ko's `KVM_TRANSLATE` sets them, ours doesn't.
fn hide_accessed(memory: &mut [u8]) {
    for entry in memory[TABLES as usize..0x1_8000].chunks_mut(8) {
        entry[0] &= !0x20;
    }
}

/// RFLAGS' reserved bits, which kvm.ko keeps as given though no CPU runs with them.
fn hide_flags(regs: &mut [u8]) {
    regs[0x88] &= 0xd5;
    regs[0x89] &= 0x7f;
    // VM in real mode: kept by kvm.ko on AMD, hidden on Intel.
    regs[0x8a] &= 0x3d;
    regs[0x8b..].fill(0);
}

/// What an event was that is over: kvm.ko shows the last one's vector, and any payload that it was
/// given.
fn hide_what_was(events: &mut [u8]) {
    let [injected, pending] = [events[0], events[3]];
    if injected == 0 && pending == 0 {
        events[1..3].fill(0);
        events[4..8].fill(0);
        events[0x37..0x40].fill(0);
    }
    if events[8] == 0 {
        events[9..11].fill(0);
    }
    // Bits that mean nothing.
    events[11] &= 3;
    if events[0x37] == 0 {
        events[0x38..0x40].fill(0);
    }
}
