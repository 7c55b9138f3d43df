//! Runs cases on the translating CPU.

use std::time::Duration;

use addr::{Gpa, Gva};
use anyhow::Result;
use cpu::system::GuestDebug;
use cpu::{CpuState, Exit, Segment, TableRegister};

use super::image::{self, Image};
use super::machine::Machine;
use super::thread_time::Work;
use super::watchdog::Watchdog;
use crate::case::{Batch, Case, Ending, Executor, Outcome, Program, State};
use crate::layout::{CODE_BYTES, FILLER, WRITABLE_BYTES};
use crate::local;
use x86::control::{Cr0, Cr4, Efer};

/// Whether instructions run one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// Whole blocks, chained.
    Blocks,
    /// One instruction per block; the monitor sees each.
    Stepped,
}

/// The CPU under test.
pub struct GuestCpu {
    machine: Machine,
    watchdog: Watchdog,
    translation: Translation,
    /// What the program in the code window occupies.
    extent: (usize, usize),
    /// Exits that are no end of a case, to be explained to the reader.
    strange: Vec<String>,
}

/// After so many steps a case has gone astray: several for each value of a 16-bit counter have not.
const STEPS: usize = 1 << 20;
/// No case takes longer, in processor time: the watchdog's kicks count only then.
const LIMIT: Duration = Duration::from_millis(300);
/// The same in looks of the watchdog.
const TICKS: u32 = 12;

impl GuestCpu {
    /// A guest with the oracle's windows mapped.
    pub fn new(translation: Translation) -> Result<Self> {
        let machine = Machine::new(image::RAM_BYTES as u64)?;
        machine.write(Gpa::new(0), Image::new().bytes());
        machine.write(image::CODE_PAGES, &[FILLER; CODE_BYTES]);
        Ok(Self {
            watchdog: machine.watchdog(TICKS),
            machine,
            translation,
            extent: (0, 0),
            strange: Vec::new(),
        })
    }

    /// Puts a program into the code window, as a monitor does: without telling the vCPU.
    fn load(&mut self, program: &Program) {
        let at = |offset: usize| Gpa::new(image::CODE_PAGES.raw() + offset as u64);
        let (start, len) = self.extent;
        self.machine.write(at(start), &vec![FILLER; len]);
        self.machine
            .write(at(program.offset as usize), program.code());
        self.extent = (program.offset as usize, program.code().len());
    }

    fn run_case(&mut self, batch: &Batch, case: &Case, program: &Program) -> Outcome {
        self.machine.write(image::DATA_PAGES, &*batch.pattern);
        for patch in &case.patches {
            let at = Gpa::new(image::DATA_PAGES.raw() + u64::from(patch.offset));
            self.machine.write(at, &patch.bytes[..patch.len as usize]);
        }
        enter(self.machine.vcpu.state_mut(), &case.state, program);
        let fpu = self.machine.vcpu.fpu_mut();
        fpu.image_mut().copy_from_slice(&case.state.extended.0);
        fpu.set_xstate_bv(7);
        let exit = self.run_to_end();
        let mut outcome = self.outcome(&exit);
        self.machine
            .read(image::DATA_PAGES, &mut outcome.memory[..WRITABLE_BYTES]);
        outcome
    }

    fn run_to_end(&mut self) -> Exit {
        let work = Work::begin();
        if self.translation == Translation::Stepped {
            self.machine.vcpu.set_guest_debug(GuestDebug {
                enabled: true,
                single_step: true,
                ..GuestDebug::default()
            });
        }
        self.watchdog.start();
        let limit = match self.translation {
            Translation::Blocks => LIMIT,
            Translation::Stepped => LIMIT * 10,
        };
        let mut exit = self.machine.run();
        for _ in 0..STEPS {
            match exit {
                Exit::Debug(_) if self.translation == Translation::Stepped => {}
                // A kick for an earlier run, or for one that got no processor.
                Exit::Interrupted if work.so_far() < limit => {}
                _ => break,
            }
            exit = self.machine.run();
        }
        self.watchdog.stop();
        exit
    }

    /// What the handler of the exception would see.
    fn outcome(&mut self, exit: &Exit) -> Outcome {
        let mut outcome = Outcome {
            ending: Ending {
                vector: Ending::FAILED,
                error_code: 0,
                cr2: 0,
            },
            state: State::initial(),
            memory: [0; WRITABLE_BYTES],
        };
        let state = self.machine.vcpu.state().clone();
        let vector = image::halted_vector(Gva::new(state.rip));
        let (Exit::Halt, Some(vector)) = (exit, vector) else {
            if *exit == Exit::Interrupted {
                outcome.ending.vector = Ending::TIMEOUT;
            } else {
                self.strange.push(format!("{exit:?} at {:#x}", state.rip));
            }
            return outcome;
        };
        outcome.ending.vector = vector;
        outcome.ending.cr2 = if vector == 14 { state.cr2 } else { 0 };
        leave(&state, &mut outcome.state);
        self.read_frame(&state, vector, &mut outcome);
        let extended = &mut outcome.state.extended.0;
        canonical(self.machine.vcpu.fpu().image(), extended);
        outcome
    }

    /// What the processor pushed (SDM 3A, 7.14.2).
    fn read_frame(&self, state: &CpuState, vector: u32, outcome: &mut Outcome) {
        let Some(stack) = image::kernel_gpa(Gva::new(state.gpr[4])) else {
            outcome.ending.vector = Ending::FAILED;
            return;
        };
        let mut frame = [0; 48];
        self.machine.read(stack, &mut frame);
        let mut words = frame.chunks(8).map(|word| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(word);
            u64::from_le_bytes(bytes)
        });
        let mut next = || words.next().unwrap_or_default();
        if image::has_error_code(vector) {
            outcome.ending.error_code = next() as u32;
        }
        outcome.state.rip = next();
        outcome.state.selectors[1] = next() as u16;
        outcome.state.rflags = next();
        outcome.state.gpr[4] = next();
        outcome.state.selectors[2] = next() as u16;
    }
}

impl Executor for GuestCpu {
    fn name(&self) -> &'static str {
        match self.translation {
            Translation::Blocks => "translated",
            Translation::Stepped => "translated one by one",
        }
    }

    fn run(&mut self, batch: &Batch, outcomes: &mut Vec<Outcome>) -> Result<()> {
        let mut loaded = None;
        for case in &batch.cases {
            let program = &batch.programs[case.program as usize];
            if loaded != Some(case.program) {
                self.load(program);
                loaded = Some(case.program);
            }
            let outcome = self.run_case(batch, case, program);
            outcomes.push(outcome);
        }
        Ok(())
    }

    fn remarks(&mut self) -> Vec<String> {
        std::mem::take(&mut self.strange)
    }
}

/// User mode with Linux's selectors, in a kernel that does nothing but halt.
fn enter(state: &mut CpuState, case: &State, program: &Program) {
    *state = CpuState::default();
    state.gpr = case.gpr;
    state.rip = program.entry();
    state.rflags = case.rflags;
    let [es, cs, ss, ds, fs, gs] = program.mode.selectors().map(segment);
    state.segments.es = es;
    state.segments.cs = cs;
    state.segments.ss = ss;
    state.segments.ds = ds;
    state.segments.fs = Segment {
        base: case.fs_base,
        ..fs
    };
    state.segments.gs = Segment {
        base: case.gs_base,
        ..gs
    };
    state.segments.ldtr = Segment {
        base: image::ldt_base().raw(),
        limit: image::LDT_LIMIT,
        selector: image::LDT_SELECTOR,
        attributes: 0x82,
        unusable: false,
    };
    state.segments.tr = Segment {
        base: image::tss_base().raw(),
        limit: image::TSS_LIMIT,
        selector: image::TSS_SELECTOR,
        attributes: 0x8b,
        unusable: false,
    };
    state.gdtr = TableRegister {
        base: image::gdt_base().raw(),
        limit: image::GDT_LIMIT,
    };
    state.idtr = TableRegister {
        base: image::idt_base().raw(),
        limit: image::IDT_LIMIT,
    };
    control_registers(state);
}

/// As Linux sets them where user code can tell.
fn control_registers(state: &mut CpuState) {
    let cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
    let cr4 = Cr4::PAE
        | Cr4::PGE
        | Cr4::OSFXSR
        | Cr4::OSXMMEXCPT
        | Cr4::OSXSAVE
        | Cr4::FSGSBASE
        | Cr4::SMEP
        | Cr4::SMAP;
    state.cr0 = cr0.bits();
    state.cr3 = image::PML4.raw();
    state.cr4 = cr4.bits();
    state.msrs.efer = (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
    state.msrs.pat = 0x0007_0406_0007_0406;
    state.xcr0 = 7;
    state.dr6 = 0xffff_0ff0;
    state.dr7 = 0x400;
}

/// What loading a selector of either table gives.
fn segment(selector: u16) -> Segment {
    if let Some(local) = local::find(selector) {
        return Segment {
            base: local.base.raw(),
            limit: local.limit.into(),
            selector,
            attributes: local.attributes(),
            unusable: false,
        };
    }
    let attributes = match selector & !3 {
        0x30 => 0xa0fb,
        0x20 => 0xc0fb,
        _ => 0xc0f3,
    };
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        attributes,
        unusable: selector & !3 == 0,
    }
}

fn leave(state: &CpuState, outcome: &mut State) {
    let segments = &state.segments;
    outcome.gpr = state.gpr;
    outcome.fs_base = segments.fs.base;
    outcome.gs_base = segments.gs.base;
    outcome.selectors = [
        segments.es,
        segments.cs,
        segments.ss,
        segments.ds,
        segments.fs,
        segments.gs,
    ]
    .map(|segment| segment.selector);
}

/// Components that `XSTATE_BV` calls initial are initial.
fn canonical(image: &[u8], to: &mut [u8; crate::case::XSAVE_BYTES]) {
    *to = crate::case::Extended::initial().0;
    let present = image[512];
    if present & 1 != 0 {
        to[..24].copy_from_slice(&image[..24]);
        to[32..160].copy_from_slice(&image[32..160]);
    }
    to[24..28].copy_from_slice(&image[24..28]);
    if present & 2 != 0 {
        to[160..416].copy_from_slice(&image[160..416]);
    }
    if present & 4 != 0 {
        to[576..832].copy_from_slice(&image[576..832]);
    }
}
