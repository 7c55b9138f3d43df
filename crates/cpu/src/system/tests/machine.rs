//! The machine that the tests run on.
//!
//! | address | what                                           |
//! |---------|------------------------------------------------|
//! | 0x1000  | GDT, see [`sel`]                               |
//! | 0x2000  | IDT                                            |
//! | 0x3000  | TSS; 0x3200 a second one                       |
//! | 0x4000  | LDT                                            |
//! | 0x7000  | RIP                                            |
//! | 0x8000  | RSP; 0x9000 stack of level 0, 0xa000 of IST 1  |

use std::collections::VecDeque;

use addr::{Gpa, Gva};
use iced_x86::{Decoder, DecoderOptions};
use x86::control::{Cr0, Cr4, Efer};
use x86::vector;

use crate::fpu::FpuState;
use crate::platform::{CpuidResult, Handled, Refusal};
use crate::state::{Segment, TableRegister};
use crate::system::{
    Abort, Boundary, Context, Effects, Event, Flush, GuestDebug, Instructions, LinearMemory, Next,
    Offer, Pending, Privilege, boundary, deliver, execute,
};
use crate::{CpuState, Exception, HypercallExit, MsrExit, Platform};

/// Selectors of the GDT.
pub(super) mod sel {
    pub(in super::super) const CODE32: u16 = 0x08;
    pub(in super::super) const DATA32: u16 = 0x10;
    pub(in super::super) const USER_CODE32: u16 = 0x1b;
    pub(in super::super) const USER_DATA32: u16 = 0x23;
    pub(in super::super) const CODE64: u16 = 0x28;
    pub(in super::super) const USER_CODE64: u16 = 0x33;
    pub(in super::super) const TSS: u16 = 0x38;
    pub(in super::super) const CONFORMING: u16 = 0x48;
    pub(in super::super) const LDT: u16 = 0x50;
    pub(in super::super) const CODE16: u16 = 0x60;
    pub(in super::super) const DATA16: u16 = 0x68;
    pub(in super::super) const CALL_GATE: u16 = 0x70;
    pub(in super::super) const TSS2: u16 = 0x80;
    pub(in super::super) const ABSENT_DATA: u16 = 0x90;
    pub(in super::super) const READ_ONLY: u16 = 0x98;
    pub(in super::super) const TASK_GATE: u16 = 0xa0;
    pub(in super::super) const EXECUTE_ONLY: u16 = 0xa8;
    pub(in super::super) const USER_CALL_GATE: u16 = 0xb0;
}

pub(super) const GDT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x2000;
pub(super) const TSS: u64 = 0x3000;
pub(super) const TSS2: u64 = 0x3200;
pub(super) const RIP: u64 = 0x7000;
pub(super) const RSP: u64 = 0x8000;
pub(super) const RSP0: u64 = 0x9000;
pub(super) const IST1: u64 = 0xa000;
const MEMORY: usize = 0x10_0000;

/// Linear memory that can be made to fault.
pub(super) struct Flat {
    pub(super) bytes: Vec<u8>,
    /// An access to this page faults.
    pub(super) hole: Option<u64>,
    /// An access to this page is the host's failure.
    pub(super) host_hole: Option<u64>,
    pub(super) flushes: Vec<Flush>,
    pub(super) privileges: Vec<Privilege>,
    pub(super) paging_changes: u32,
}

impl Flat {
    pub(super) fn host_fault(&self) -> Abort {
        let hva = addr::Hva::new(self.host_hole.unwrap_or(0));
        Abort::HostFault(crate::HostFault { gpa: None, hva })
    }

    fn range(&self, gva: Gva, len: usize) -> Result<std::ops::Range<usize>, Abort> {
        let start = gva.raw();
        let touched = (start >> 12)..=((start + len as u64 - 1) >> 12);
        if self
            .host_hole
            .is_some_and(|hole| touched.contains(&(hole >> 12)))
        {
            return Err(self.host_fault());
        }
        match self.hole {
            Some(hole) if touched.contains(&(hole >> 12)) => {
                Err(Exception::page_fault(Gva::new(hole.max(start)), 2).into())
            }
            _ if start as usize + len > self.bytes.len() => {
                Err(Exception::page_fault(gva, 0).into())
            }
            _ => Ok(start as usize..start as usize + len),
        }
    }
}

impl LinearMemory for Flat {
    fn read(&mut self, gva: Gva, data: &mut [u8], privilege: Privilege) -> Result<(), Abort> {
        let range = self.range(gva, data.len())?;
        self.privileges.push(privilege);
        data.copy_from_slice(&self.bytes[range]);
        Ok(())
    }

    fn write(&mut self, gva: Gva, data: &[u8], privilege: Privilege) -> Result<(), Abort> {
        let range = self.range(gva, data.len())?;
        self.privileges.push(privilege);
        self.bytes[range].copy_from_slice(data);
        Ok(())
    }

    fn check_write(&mut self, gva: Gva, len: usize, _: Privilege) -> Result<(), Abort> {
        self.range(gva, len).map(|_| ())
    }

    fn compare_exchange(
        &mut self,
        gva: Gva,
        current: u64,
        new: u64,
        _: Privilege,
    ) -> Result<bool, Abort> {
        let range = self.range(gva, 8)?;
        let same = self.bytes[range.clone()] == current.to_le_bytes();
        if same {
            self.bytes[range].copy_from_slice(&new.to_le_bytes());
        }
        Ok(same)
    }

    fn read_physical(&mut self, gpa: Gpa, data: &mut [u8]) -> Result<(), Abort> {
        self.read(Gva::new(gpa.raw()), data, Privilege::Implicit)
    }

    fn paging_changed(&mut self, _: &CpuState) {
        self.paging_changes += 1;
    }

    fn flush(&mut self, flush: Flush) {
        self.flushes.push(flush);
    }
}

/// A platform that answers from lists and records what it is told.
#[derive(Default)]
pub(super) struct Fake {
    pub(super) interrupts: VecDeque<u8>,
    pub(super) window: bool,
    pub(super) task_priority: u8,
    /// Bytes that the known port 0x80 gives; other ports are the monitor's.
    pub(super) port_bytes: VecDeque<u8>,
    pub(super) written: Vec<(u16, Vec<u8>)>,
}

impl Platform for Fake {
    fn interrupt_pending(&mut self) -> bool {
        !self.interrupts.is_empty()
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.interrupts.pop_front()
    }
    fn interrupt_window_requested(&self) -> bool {
        self.window
    }
    fn halt(&mut self, _: &mut CpuState) -> Handled {
        if self.interrupts.is_empty() {
            Handled::No
        } else {
            Handled::Yes
        }
    }
    fn cpuid(&mut self, _: &CpuState, leaf: u32, subleaf: u32) -> CpuidResult {
        CpuidResult {
            eax: leaf + 1,
            ebx: subleaf,
            ecx: 3,
            edx: 4,
        }
    }
    fn read_msr(&mut self, _: &CpuState, index: u32) -> Result<u64, Refusal> {
        match index {
            0x1234 => Ok(0x1_0000_0002),
            0x4000_0000 => Err(Refusal::Exit(crate::Exit::Msr(MsrExit {
                index,
                write: None,
                reason: 2,
            }))),
            _ => Err(Refusal::Exception(Exception::with_code(vector::GP, 0))),
        }
    }
    fn write_msr(&mut self, _: &mut CpuState, index: u32, value: u64) -> Result<(), Refusal> {
        self.written
            .push((index as u16, value.to_le_bytes().to_vec()));
        Ok(())
    }
    fn task_priority(&self) -> u8 {
        self.task_priority
    }
    fn set_task_priority(&mut self, priority: u8) {
        self.task_priority = priority;
    }
    fn port_read(&mut self, port: u16, data: &mut [u8]) -> Handled {
        if port != 0x80 {
            return Handled::No;
        }
        for byte in data {
            *byte = self.port_bytes.pop_front().unwrap_or(0xff);
        }
        Handled::Yes
    }
    fn port_write(&mut self, port: u16, data: &[u8]) -> Handled {
        self.written.push((port, data.to_vec()));
        if port == 0x80 {
            Handled::Yes
        } else {
            Handled::No
        }
    }
    fn hypercall(&mut self, state: &mut CpuState) -> Result<u64, Refusal> {
        match state.gpr[0] {
            1 => Ok(0x99),
            nr => Err(Refusal::Exit(crate::Exit::Hypercall(HypercallExit {
                nr,
                args: [0; 4],
                long_mode: false,
            }))),
        }
    }
}

/// One vCPU with all around it.
pub(super) struct Machine {
    pub(super) state: CpuState,
    pub(super) fpu: FpuState,
    pub(super) memory: Flat,
    pub(super) platform: Fake,
    pub(super) offer: Offer,
    pub(super) pending: Pending,
    pub(super) guest_debug: GuestDebug,
    pub(super) effects: Effects,
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes,
        unusable: false,
    }
}

/// `#GP` with this error code, as `execute` returns it.
pub(super) fn general(code: u32) -> Result<Next, Abort> {
    Err(Exception::with_code(vector::GP, code).into())
}

/// `#PF` on a write to this address.
pub(super) fn page_fault(address: u64) -> Abort {
    Exception::page_fault(Gva::new(address), 2).into()
}

impl Machine {
    /// Real mode, CS 0.
    pub(super) fn real() -> Self {
        let mut state = CpuState {
            rip: RIP,
            rflags: 2,
            ..CpuState::default()
        };
        state.gpr[4] = RSP;
        let segment = Segment {
            limit: 0xffff,
            attributes: 0x93,
            ..Segment::default()
        };
        let segments = &mut state.segments;
        for one in [
            &mut segments.cs,
            &mut segments.ss,
            &mut segments.ds,
            &mut segments.es,
            &mut segments.fs,
            &mut segments.gs,
        ] {
            *one = segment;
        }
        state.idtr = TableRegister {
            base: 0,
            limit: 0x3ff,
        };
        state.dr6 = 0xffff_0ff0;
        state.dr7 = 0x400;
        let memory = Flat {
            bytes: vec![0; MEMORY],
            hole: None,
            host_hole: None,
            flushes: Vec::new(),
            privileges: Vec::new(),
            paging_changes: 0,
        };
        Self {
            state,
            fpu: FpuState::default(),
            memory,
            platform: Fake::default(),
            offer: Offer {
                cr4: 0x7f_ffff & !(1 << 13 | 1 << 14 | 1 << 15 | 1 << 19),
                efer: (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits(),
                xcr0: 7,
                physical_bits: 40,
                instructions: Instructions::all(),
                x87: crate::fpu::PointerRules::empty(),
                vendor: crate::system::Vendor::Intel,
            },
            pending: Pending::default(),
            guest_debug: GuestDebug::default(),
            effects: Effects::empty(),
        }
    }

    /// Flat 32-bit protected mode at CPL 0.
    pub(super) fn protected() -> Self {
        let mut machine = Self::real();
        machine.tables();
        let state = &mut machine.state;
        state.cr0 = Cr0::PE.bits() | Cr0::ET.bits();
        let segments = &mut state.segments;
        segments.cs = flat(sel::CODE32, 0xc09b);
        segments.ss = flat(sel::DATA32, 0xc093);
        segments.ds = segments.ss;
        segments.es = segments.ss;
        segments.fs = segments.ss;
        segments.gs = segments.ss;
        machine
    }

    /// The same at CPL 3.
    pub(super) fn user() -> Self {
        let mut machine = Self::protected();
        machine.lower(sel::USER_CODE32, 0xc0fb);
        machine
    }

    /// 64-bit mode at CPL 0.
    pub(super) fn long() -> Self {
        let mut machine = Self::protected();
        machine.state.cr0 |= Cr0::PG.bits();
        machine.state.cr4 = Cr4::PAE.bits();
        machine.state.msrs.efer = (Efer::LME | Efer::LMA | Efer::SCE).bits();
        machine.state.segments.cs = flat(sel::CODE64, 0xa09b);
        machine
    }

    /// 64-bit mode at CPL 3.
    pub(super) fn long_user() -> Self {
        let mut machine = Self::long();
        machine.lower(sel::USER_CODE64, 0xa0fb);
        machine
    }

    /// Virtual-8086 mode.
    pub(super) fn virtual8086() -> Self {
        let mut machine = Self::user();
        machine.state.rflags |= x86::rflags::VM;
        let segment = Segment {
            limit: 0xffff,
            attributes: 0xf3,
            ..Segment::default()
        };
        let segments = &mut machine.state.segments;
        segments.cs = segment;
        segments.ss = segment;
        segments.ds = Segment {
            selector: 0x123,
            base: 0x1230,
            ..segment
        };
        segments.es = segment;
        segments.fs = segment;
        segments.gs = segment;
        machine
    }

    fn lower(&mut self, cs: u16, attributes: u16) {
        let segments = &mut self.state.segments;
        segments.cs = flat(cs, attributes);
        segments.ss = flat(sel::USER_DATA32, 0xc0f3);
        segments.ds = segments.ss;
        segments.es = segments.ss;
        segments.fs = segments.ss;
        segments.gs = segments.ss;
    }

    fn tables(&mut self) {
        for (selector, raw) in [
            (sel::CODE32, 0x00cf_9b00_0000_ffff),
            (sel::DATA32, 0x00cf_9300_0000_ffff),
            (sel::USER_CODE32, 0x00cf_fb00_0000_ffff),
            (sel::USER_DATA32, 0x00cf_f300_0000_ffff),
            (sel::CODE64, 0x00af_9b00_0000_ffff),
            (sel::USER_CODE64, 0x00af_fb00_0000_ffff),
            (sel::TSS, 0x0000_8900_3000_0067),
            (sel::CONFORMING, 0x00cf_9f00_0000_ffff),
            (sel::LDT, 0x0000_8200_4000_00ff),
            (sel::CODE16, 0x0000_9b00_0000_ffff),
            (sel::DATA16, 0x0000_9300_0000_ffff),
            (sel::CALL_GATE, 0x0000_8c00_0008_5000),
            (sel::TSS2, 0x0000_8900_3200_0067),
            (sel::ABSENT_DATA, 0x00cf_1300_0000_ffff),
            (sel::READ_ONLY, 0x00cf_9100_0000_ffff),
            (sel::TASK_GATE, 0x0000_e500_0080_0000),
            (sel::EXECUTE_ONLY, 0x00cf_9900_0000_ffff),
            (sel::USER_CALL_GATE, 0x0000_ec02_0008_5000),
        ] {
            self.put_descriptor(selector, raw);
        }
        let state = &mut self.state;
        state.gdtr = TableRegister {
            base: GDT,
            limit: 0xff,
        };
        state.idtr = TableRegister {
            base: IDT,
            limit: 0xfff,
        };
        state.segments.tr = Segment {
            base: TSS,
            limit: 0x67,
            selector: sel::TSS,
            attributes: 0x8b,
            unusable: false,
        };
        state.segments.ldtr = Segment {
            unusable: true,
            ..Segment::default()
        };
    }

    pub(super) fn put_descriptor(&mut self, selector: u16, raw: u64) {
        self.put(GDT + u64::from(selector & !7), &raw.to_le_bytes());
    }

    pub(super) fn descriptor(&self, selector: u16) -> u64 {
        self.get(GDT + u64::from(selector & !7), 8)
    }

    /// A 32-bit gate of the IDT: kind 0xe interrupt, 0xf trap.
    pub(super) fn gate32(&mut self, vector: u8, kind: u64, dpl: u64, offset: u64) {
        let access = 0x80 | dpl << 5 | kind;
        let raw = offset & 0xffff
            | u64::from(sel::CODE32) << 16
            | access << 40
            | (offset & 0xffff_0000) << 32;
        self.put(IDT + u64::from(vector) * 8, &raw.to_le_bytes());
    }

    /// A 64-bit interrupt gate.
    pub(super) fn gate64(&mut self, vector: u8, ist: u64, dpl: u64, offset: u64) {
        let access = 0x8e | dpl << 5;
        let raw = offset & 0xffff
            | u64::from(sel::CODE64) << 16
            | ist << 32
            | access << 40
            | (offset & 0xffff_0000) << 32;
        self.put(IDT + u64::from(vector) * 16, &raw.to_le_bytes());
        self.put(
            IDT + u64::from(vector) * 16 + 8,
            &(offset >> 32).to_le_bytes(),
        );
    }

    /// SS0:ESP0 of the 32-bit TSS.
    pub(super) fn inner_stack32(&mut self) {
        self.put(TSS + 4, &(RSP0 as u32).to_le_bytes());
        self.put(TSS + 8, &sel::DATA32.to_le_bytes());
    }

    /// RSP0 and IST1 of the 64-bit TSS.
    pub(super) fn inner_stack64(&mut self) {
        self.put(TSS + 4, &RSP0.to_le_bytes());
        self.put(TSS + 36, &IST1.to_le_bytes());
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory.bytes[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn get(&self, at: u64, len: usize) -> u64 {
        let mut raw = [0; 8];
        raw[..len].copy_from_slice(&self.memory.bytes[at as usize..][..len]);
        u64::from_le_bytes(raw)
    }

    pub(super) fn get32(&self, at: u64) -> u64 {
        self.get(at, 4)
    }

    /// `N` slots of the stack from the top on.
    pub(super) fn stack<const N: usize>(&self, width: usize) -> [u64; N] {
        let top = self.state.gpr[4];
        std::array::from_fn(|n| self.get(top + (n * width) as u64, width))
    }

    pub(super) fn with<T>(&mut self, f: impl FnOnce(&mut Context<'_>) -> T) -> T {
        let mut ctx = Context {
            state: &mut self.state,
            fpu: &mut self.fpu,
            memory: &mut self.memory,
            platform: &mut self.platform,
            offer: &self.offer,
            pending: &mut self.pending,
            guest_debug: &self.guest_debug,
            effects: Effects::empty(),
        };
        let result = f(&mut ctx);
        self.effects = ctx.effects;
        result
    }

    /// Runs one instruction at RIP.
    pub(super) fn run(&mut self, bytes: &[u8]) -> Result<Next, Abort> {
        let cs = self.state.segments.cs.attributes;
        let bitness = if self.state.is_64bit() {
            64
        } else if cs & x86::descriptor::attributes::DB != 0 {
            32
        } else {
            16
        };
        let mut decoder = Decoder::with_ip(bitness, bytes, self.state.rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        assert_eq!(
            instruction.len(),
            bytes.len(),
            "not one instruction: {instruction:?}"
        );
        assert!(crate::system::is_system(&instruction), "{instruction:?}");
        self.with(|ctx| execute(ctx, &instruction))
    }

    /// Runs one instruction that must not change anything but fault.
    pub(super) fn faults(&mut self, bytes: &[u8], vector: u8, code: Option<u32>) {
        let before = self.state.clone();
        let exception = Exception {
            vector,
            error_code: code,
            payload: None,
        };
        assert_eq!(self.run(bytes), Err(exception.into()), "{bytes:x?}");
        assert_eq!(self.state, before, "{bytes:x?}");
    }

    pub(super) fn deliver(&mut self, event: Event) -> Result<(), Abort> {
        self.with(|ctx| deliver(ctx, event))
    }

    pub(super) fn boundary(&mut self) -> Result<Boundary, Abort> {
        self.with(boundary)
    }
}
