//! Operands that translated code can't reach in one piece: across a page, in device memory, in pages
//! with translated code.
//!
//! The instruction is translated a second time, alone, so that each access leaves first. Its operand
//! is read into a buffer, the host's CPU executes the instruction on the buffer, and written operands
//! go to memory behind it. So no instruction needs an emulator. Whether a write is allowed is known
//! before the instruction runs.
//!
//! # Locked updates
//! An operand of up to eight bytes within a page of RAM is written by the host's own locked compare and
//! exchange; where it has changed meanwhile the instruction begins again. So such an update is one for
//! all other CPUs, whatever they access it with. A locked update of more bytes, or across two pages
//! that don't lie side by side in the host, is done while every other vCPU stands still
//! ([`memory::quiesce::Domain::stop_others`]): it is one for all of them, too, but not for the monitor's
//! own threads. (Two pages that do lie side by side are accessed by the instruction itself.)

use addr::Gva;
use iced_x86::{CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic};
use memory::quiesce::Alone;

use super::frame::{BOUNCE_SIZE, BOUNCE_SLOTS};
use super::memory::Place;
use super::sites::Then;
use super::vcpu::Vcpu;
use crate::system::Abort;
use crate::translate::{Access, Mode, Use};
use crate::{DeviceInstructions, Exit, Handled, InternalError, Platform};

type Places = [Option<(Place, usize)>; 2];

/// The operands of the instruction on its way.
#[derive(Default)]
pub(crate) struct Bounce {
    slots: [Option<Operand>; BOUNCE_SLOTS],
    /// General registers and arithmetic flags before the instruction, for one that begins again.
    gpr: [u64; 16],
    arith: u16,
    pub(super) rip: u64,
    /// The instruction is to be begun again with all other vCPUs at a standstill.
    wants_alone: bool,
    /// They stand still.
    alone: Option<Alone>,
}

#[derive(Clone, Debug)]
struct Operand {
    size: usize,
    usage: Use,
    places: Places,
    /// What was read, where the write is to be one with the read.
    old: Option<u64>,
}

impl Vcpu {
    /// Goes on with a translation of the instruction at RIP that uses bounce buffers.
    pub(super) fn begin_bounce(&mut self) -> Result<u64, Abort> {
        let number = self.find(Mode::BOUNCE)?;
        self.memory.mmio.begin();
        self.bounce.slots = Default::default();
        let frame = self.frame();
        let (gpr, arith, rip) = (frame.state.gpr, frame.arith, frame.state.rip);
        self.bounce.gpr = gpr;
        self.bounce.arith = arith;
        self.bounce.rip = rip;
        let plain = self.blocks.blocks[number as usize].plain;
        Ok(self.cache.base() + u64::from(plain))
    }

    /// An access of the bounced instruction: reads the operand into its buffer.
    pub(super) fn bounce_access(
        &mut self,
        access: &Access,
        platform: &mut dyn Platform,
    ) -> Result<Bounced, Abort> {
        let gva = Gva::new(self.frame().t0);
        let size = usize::from(access.size).min(BOUNCE_SIZE);
        let privilege = super::memory::privilege_of(self.context.mode.view());
        let places = if access.usage.writes() {
            self.memory.writable(gva, size, privilege)?
        } else {
            [None; 2]
        };
        if places.iter().flatten().any(|(place, _)| place.is_device()) {
            self.check_device_instruction(platform)?;
        }
        if access.usage == Use::Write && self.must_be_alone(&places, size) {
            self.roll_back();
            self.bounce.wants_alone = true;
            return Ok(Bounced::AgainAlone);
        }
        let mut data = [0; BOUNCE_SIZE];
        let operand = &mut data[..size];
        if access.usage != Use::WriteOnly {
            let taken = self.memory.mmio.taken();
            loop {
                let read = self.read_operand(gva, operand, &places, privilege);
                if let Err(Abort::Exit(Exit::Mmio(_))) = read {
                    self.check_device_instruction(platform)?;
                }
                match read {
                    Err(Abort::Exit(Exit::Mmio(_)))
                        if self.memory.mmio.ask(platform) == Handled::Yes =>
                    {
                        self.memory.mmio.take_again(taken);
                    }
                    other => break other?,
                }
            }
        }
        let old = (access.usage == Use::Write && size <= 8).then(|| {
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(operand);
            u64::from_le_bytes(bytes)
        });
        let slot = usize::from(access.slot);
        let frame = self.frame_mut();
        frame.bounce[slot][..size].copy_from_slice(&data[..size]);
        let buffer = frame.bounce[slot].as_ptr() as u64;
        frame.t1 = buffer.wrapping_sub(gva.raw());
        self.bounce.slots[slot] = Some(Operand {
            size,
            usage: access.usage,
            places,
            old,
        });
        Ok(Bounced::Ready)
    }

    /// Whether this is a locked update that the host can't do in one access.
    fn must_be_alone(&mut self, places: &Places, size: usize) -> bool {
        let ram = |part: &Option<(Place, usize)>| !matches!(part, Some((place, _)) if !matches!(place, Place::Ram(_)));
        let whole = places[1].is_none() && size <= 8;
        self.bounce.alone.is_none() && !whole && places.iter().all(ram) && self.is_locked()
    }

    /// Whether the instruction at RIP locks its operand.
    fn is_locked(&mut self) -> bool {
        let (bytes, len) = self.instruction_bytes();
        let bits = self.context.mode.code_size().bits();
        let options = DecoderOptions::NONE;
        let instruction = Decoder::new(bits, &bytes[..usize::from(len)], options).decode();
        instruction.has_lock_prefix() || instruction.mnemonic() == Mnemonic::Xchg
    }

    /// Whether the instruction at RIP was put off to be done with all others at a standstill.
    pub(super) fn wants_alone(&mut self) -> bool {
        let wanted = std::mem::take(&mut self.bounce.wants_alone);
        wanted && self.frame().state.rip == self.bounce.rip
    }

    /// Does the instruction at RIP while all other vCPUs stand still.
    pub(super) fn alone(&mut self, platform: &mut dyn Platform) -> Result<Then, Abort> {
        let (alone, late) = self.memory.domain.stop_others(&self.memory.participant);
        self.bounce.alone = Some(alone);
        let then = match self.serve(late) {
            Ok(()) => self
                .begin_bounce()
                .and_then(|target| self.follow(target, platform)),
            Err(exit) => Err(Abort::Exit(exit)),
        };
        self.bounce.alone = None;
        then
    }

    /// Whether the instruction at RIP may touch a device at all.
    fn check_device_instruction(&mut self, platform: &dyn Platform) -> Result<(), Abort> {
        if platform.device_instructions() == DeviceInstructions::All {
            return Ok(());
        }
        let (bytes, len) = self.instruction_bytes();
        let bits = self.context.mode.code_size().bits();
        let options = DecoderOptions::NONE;
        let instruction = Decoder::new(bits, &bytes[..usize::from(len)], options).decode();
        if is_emulated(&instruction) {
            return Ok(());
        }
        self.memory.mmio.end();
        let error = InternalError { bytes, len };
        Err(Abort::Exit(Exit::InternalError(error)))
    }

    /// The bytes at RIP, as far as they can be read.
    fn instruction_bytes(&mut self) -> ([u8; 15], u8) {
        let (rip, base) = (self.bounce.rip, self.frame().state.segments.cs.base);
        let long = self.context.mode.code_size().bits() == 64;
        let at = if long {
            rip
        } else {
            base.wrapping_add(rip) & 0xffff_ffff
        };
        let privilege = super::memory::privilege_of(self.context.mode.view());
        let mut bytes = [0; 15];
        for (len, byte) in bytes.iter_mut().enumerate() {
            let gva = Gva::new(at.wrapping_add(len as u64));
            let read = self
                .memory
                .read_as(gva, std::slice::from_mut(byte), privilege);
            if read.is_err() {
                return (bytes, len as u8);
            }
        }
        (bytes, 15)
    }

    fn read_operand(
        &mut self,
        gva: Gva,
        data: &mut [u8],
        places: &Places,
        privilege: mmu::Privilege,
    ) -> Result<(), Abort> {
        if places[0].is_none() {
            return self.memory.read_as(gva, data, privilege);
        }
        let mut at = 0;
        for (place, len) in places.iter().flatten() {
            self.memory.read_place(*place, &mut data[at..at + len])?;
            at += len;
        }
        Ok(())
    }

    /// The bounced instruction is done: its results go to memory. Whether it must begin again.
    pub(super) fn commit(&mut self) -> Result<Committed, Abort> {
        for slot in 0..BOUNCE_SLOTS {
            let Some(operand) = self.bounce.slots[slot].take() else {
                continue;
            };
            if !operand.usage.writes() {
                continue;
            }
            let mut data = [0; BOUNCE_SIZE];
            data[..operand.size].copy_from_slice(&self.frame().bounce[slot][..operand.size]);
            if let Some(old) = operand.old
                && let [Some((Place::Ram(hva), len)), None] = operand.places
                && matches!(len, 1 | 2 | 4 | 8)
            {
                let mut new = [0; 8];
                new[..len].copy_from_slice(&data[..len]);
                let new = u64::from_le_bytes(new);
                if self.memory.exchange(hva, len, old, new)? != old {
                    return Ok(self.roll_back());
                }
                continue;
            }
            let mut at = 0;
            for (place, len) in operand.places.into_iter().flatten() {
                self.memory.write_place(place, &data[at..at + len])?;
                at += len;
            }
        }
        self.memory.mmio.end();
        Ok(Committed::Yes)
    }

    pub(super) fn roll_back(&mut self) -> Committed {
        let (gpr, arith, rip) = (self.bounce.gpr, self.bounce.arith, self.bounce.rip);
        let frame = self.frame_mut();
        frame.state.gpr = gpr;
        frame.arith = arith;
        frame.state.rip = rip;
        Committed::Again
    }
}

/// Whether KVM's emulator of Linux 6.12 knows this instruction, as far as memory goes.
fn is_emulated(instruction: &Instruction) -> bool {
    let vex = instruction.code().op_code().encoding() != EncodingKind::Legacy;
    let x87 = instruction.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
        )
    });
    let control = matches!(instruction.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw);
    !vex && (!x87 || control)
}

/// Whether an operand is in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bounced {
    Ready,
    /// The instruction is to begin again, with all other vCPUs at a standstill.
    AgainAlone,
}

/// Whether a bounced instruction took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Committed {
    Yes,
    Again,
}
