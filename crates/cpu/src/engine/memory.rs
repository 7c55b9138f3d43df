//! Guest memory as the engine's Rust code sees it: by linear address, through the paging in force.
//!
//! Guest accesses that translated code can't do itself come here, and so do the accesses of
//! [`crate::system`]. RAM is reached by `memory::access`, which reports a fault of the host instead
//! of dying of it; device memory by [`Mmio`]; writes to pages with translated code by the
//! [`CodeMap`].

use std::sync::Arc;

use addr::{Address, Gpa, Gva, Hva, PageSize};
use memory::access;
use memory::quiesce::{Domain, Participant, Requests};
use mmu::{Access, AccessKind, Fault, PagingRegisters, TlbEffect, VcpuMmu};
use x86::control::{CR3_PCID, Cr4};

use super::code_map::{CodeMap, Written};
use super::filled::Scope;
use super::frame::{InlineTlb, View, XTLB_ENTRIES};
use super::mmio::Mmio;
use super::tlb::{Extent, Rights, Tlb, TlbBook};
use crate::system::{Abort, Flush, LinearMemory, Privilege};
use crate::{CpuState, Exception, Exit, HostFault};

/// One vCPU's way to memory.
pub(crate) struct Memory {
    pub(crate) mmu: VcpuMmu,
    pub(crate) mmio: Mmio,
    pub(crate) code: Arc<CodeMap>,
    pub(crate) domain: Arc<Domain>,
    pub(crate) participant: Arc<Participant>,
    pub(crate) book: TlbBook,
    /// What others asked of this vCPU while it waited for them.
    pub(crate) late: Requests,
}

/// [`Memory`] with the TLBs of the frame.
pub(crate) struct MemoryView<'a> {
    pub(crate) memory: &'a mut Memory,
    pub(crate) tlb: &'a mut [InlineTlb; 3],
    pub(crate) xtlb: &'a mut [[u32; XTLB_ENTRIES]; 3],
}

/// Where bytes of one page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Ram(Hva),
    /// Read where it lies; written, it is a device.
    ReadOnly(Gpa, Hva),
    Device(Gpa),
}

impl Place {
    pub(crate) fn is_device(self) -> bool {
        matches!(self, Self::Device(_))
    }
}

/// Which host page a page of code lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodePlace {
    Ram(Hva, Extent),
    /// Code in device memory is not run.
    Device,
}

/// What the inline check's miss leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolved {
    /// Host address minus guest address.
    Addend(u64),
    /// Through a bounce buffer.
    Bounce,
}

pub(crate) fn privilege_of(view: View) -> mmu::Privilege {
    match view {
        View::User => mmu::Privilege::User,
        View::Supervisor => mmu::Privilege::Supervisor,
        View::SupervisorAcSet => mmu::Privilege::SupervisorAcSet,
    }
}

fn mmu_privilege(privilege: Privilege) -> mmu::Privilege {
    match privilege {
        Privilege::User => mmu::Privilege::User,
        Privilege::Supervisor => mmu::Privilege::Supervisor,
        Privilege::SupervisorAcSet => mmu::Privilege::SupervisorAcSet,
        Privilege::Implicit => mmu::Privilege::Implicit,
    }
}

/// Whose entries serve an access of [`crate::system`]: SMAP holds for implicit ones whatever AC is.
fn view_of(privilege: Privilege) -> View {
    match privilege {
        Privilege::User => View::User,
        Privilege::Supervisor | Privilege::Implicit => View::Supervisor,
        Privilege::SupervisorAcSet => View::SupervisorAcSet,
    }
}

fn host_fault(fault: access::HostFault, gpa: Option<Gpa>) -> Abort {
    Abort::HostFault(HostFault {
        gpa,
        hva: fault.hva,
    })
}

/// What a fault of the MMU is to an instruction.
fn abort_of(fault: Fault) -> Abort {
    match fault {
        Fault::Page(page) => Abort::Exception(Exception {
            vector: x86::vector::PF,
            error_code: Some(page.error_code.bits()),
            payload: Some(page.gva.raw()),
        }),
        Fault::Host(host) => Abort::HostFault(HostFault {
            gpa: Some(host.gpa),
            hva: host.hva,
        }),
        Fault::Mmio { gpa } | Fault::ReadOnly { gpa, .. } => {
            Abort::Exit(Exit::Mmio(crate::MmioExit {
                gpa,
                len: 0,
                write: None,
            }))
        }
    }
}

/// Which page of the guest it is.
fn extent(translation: &mmu::Translation) -> Extent {
    Extent {
        size: translation.guest_size,
        scope: if translation.global {
            Scope::Global
        } else {
            Scope::Local
        },
    }
}

/// The parts of `len` bytes at `gva` by page: offset and length.
fn parts(gva: Gva, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let first = (4096 - gva.page_offset(PageSize::Size4K) as usize).min(len);
    let rest = (len > first).then(|| len - first);
    [Some((0, first)), rest.map(|r| (first, r))]
        .into_iter()
        .flatten()
}

impl Memory {
    fn place(&mut self, gva: Gva, access: Access) -> Result<Place, Abort> {
        let translated = self.mmu.translate(gva, access);
        self.leave_with_full_ring(access);
        match translated {
            Ok(translation) => Ok(Place::Ram(translation.hva)),
            Err(Fault::ReadOnly { gpa, hva }) => Ok(Place::ReadOnly(gpa, hva)),
            Err(Fault::Mmio { gpa }) => Ok(Place::Device(gpa)),
            Err(fault) => Err(abort_of(fault)),
        }
    }

    /// A write may have filled the dirty ring: its last entries are for what a vCPU does on its way
    /// out.
    fn leave_with_full_ring(&mut self, access: Access) {
        if access.is_write() && self.mmu.dirty_ring_full() {
            self.late |= Requests::EXIT;
        }
    }

    /// Where code at `gva` lies.
    pub(crate) fn code_place(&mut self, gva: Gva, view: View) -> Result<CodePlace, Abort> {
        let privilege = match view {
            View::User => mmu::Privilege::User,
            _ => mmu::Privilege::Supervisor,
        };
        match self
            .mmu
            .translate(gva, Access::new(AccessKind::Execute, privilege))
        {
            Ok(translation) => Ok(CodePlace::Ram(translation.hva, extent(&translation))),
            Err(Fault::Mmio { .. } | Fault::ReadOnly { .. }) => Ok(CodePlace::Device),
            Err(fault) => Err(abort_of(fault)),
        }
    }

    pub(crate) fn read_place(&mut self, place: Place, data: &mut [u8]) -> Result<(), Abort> {
        match place {
            Place::Ram(hva) | Place::ReadOnly(_, hva) => read_ram(hva, data),
            Place::Device(gpa) => self
                .mmio
                .read(gpa, data)
                .map_err(|asked| Abort::Exit(Exit::Mmio(asked))),
        }
    }

    /// Writes bytes within one page.
    pub(crate) fn write_place(&mut self, place: Place, data: &[u8]) -> Result<(), Abort> {
        let hva = match place {
            Place::Ram(hva) => hva,
            Place::ReadOnly(gpa, _) | Place::Device(gpa) => {
                self.mmio.write(gpa, data);
                return Ok(());
            }
        };
        if self.code.is_clear(hva.frame()) {
            return write_ram(hva, data);
        }
        let code = Arc::clone(&self.code);
        let written = code.write(hva, data.len() as u64, || write_ram(hva, data))?;
        if written == Written::Code {
            self.tell_others();
        }
        Ok(())
    }

    /// Exchanges `len` bytes of one page where they are `old`; what they were. Locked.
    pub(crate) fn exchange(
        &mut self,
        hva: Hva,
        len: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, Abort> {
        if self.code.is_clear(hva.frame()) {
            return exchange_ram(hva, len, old, new);
        }
        let code = Arc::clone(&self.code);
        let mut seen = old;
        let written = code.write(hva, len as u64, || {
            seen = exchange_ram(hva, len, old, new)?;
            Ok::<(), Abort>(())
        })?;
        if written == Written::Code {
            self.tell_others();
        }
        Ok(seen)
    }

    /// Lets every other vCPU look at the log of voided pages.
    pub(crate) fn tell_others(&mut self) {
        let from = Some(&*self.participant);
        self.late |= Requests::INVALIDATE_CODE
            | self
                .domain
                .request_and_wait(Requests::INVALIDATE_CODE, from);
    }

    /// Reads through the rights of a view.
    pub(crate) fn read_as(
        &mut self,
        gva: Gva,
        data: &mut [u8],
        privilege: mmu::Privilege,
    ) -> Result<(), Abort> {
        let access = Access::new(AccessKind::Read, privilege);
        for (at, len) in parts(gva, data.len()) {
            let place = self.place(gva.wrapping_add(at as u64), access)?;
            self.read_place(place, &mut data[at..at + len])?;
        }
        Ok(())
    }

    /// Where `len` bytes at `gva` may be written, by page.
    pub(crate) fn writable(
        &mut self,
        gva: Gva,
        len: usize,
        privilege: mmu::Privilege,
    ) -> Result<[Option<(Place, usize)>; 2], Abort> {
        let access = Access::new(AccessKind::Write, privilege);
        let mut places = [None; 2];
        for ((at, len), place) in parts(gva, len).zip(&mut places) {
            *place = Some((self.place(gva.wrapping_add(at as u64), access)?, len));
        }
        Ok(places)
    }

    pub(crate) fn write_as(
        &mut self,
        gva: Gva,
        data: &[u8],
        privilege: mmu::Privilege,
    ) -> Result<(), Abort> {
        let places = self.writable(gva, data.len(), privilege)?;
        let mut at = 0;
        for (place, len) in places.into_iter().flatten() {
            self.write_place(place, &data[at..at + len])?;
            at += len;
        }
        Ok(())
    }
}

/// Reads RAM; an aligned word in one access.
pub(crate) fn read_ram(hva: Hva, data: &mut [u8]) -> Result<(), Abort> {
    let result = match data.len() {
        len @ (1 | 2 | 4 | 8) => access::load(hva, len).map(|value| {
            data.copy_from_slice(&value.to_le_bytes()[..len]);
        }),
        _ => access::read(hva, data),
    };
    result.map_err(|fault| host_fault(fault, None))
}

/// Writes RAM; an aligned word in one access.
pub(crate) fn write_ram(hva: Hva, data: &[u8]) -> Result<(), Abort> {
    let result = match data.len() {
        len @ (1 | 2 | 4 | 8) => {
            let mut bytes = [0; 8];
            bytes[..len].copy_from_slice(data);
            access::store(hva, u64::from_le_bytes(bytes), len)
        }
        _ => access::write(hva, data),
    };
    result.map_err(|fault| host_fault(fault, None))
}

/// A locked compare and exchange of 1 to 8 bytes within a page.
fn exchange_ram(hva: Hva, len: usize, old: u64, new: u64) -> Result<u64, Abort> {
    let seen = match len {
        1 => access::compare_exchange(hva, old as u8, new as u8).map(u64::from),
        2 => access::compare_exchange(hva, old as u16, new as u16).map(u64::from),
        4 => access::compare_exchange(hva, old as u32, new as u32).map(u64::from),
        _ => access::compare_exchange(hva, old, new),
    };
    seen.map_err(|fault| host_fault(fault, None))
}

impl MemoryView<'_> {
    pub(crate) fn tlb(&mut self) -> Tlb<'_> {
        Tlb {
            data: self.tlb,
            code: self.xtlb,
            book: &mut self.memory.book,
        }
    }

    /// Drops all translations of data and code.
    pub(crate) fn flush_all(&mut self) {
        self.tlb().flush();
    }

    /// Finds what an access of translated code missed, and fills the TLB.
    pub(crate) fn resolve(
        &mut self,
        gva: Gva,
        size: usize,
        kind: AccessKind,
        view: View,
    ) -> Result<Resolved, Abort> {
        let access = Access::new(kind, privilege_of(view));
        let translated = self.memory.mmu.translate(gva, access);
        self.memory.leave_with_full_ring(access);
        let translation = match translated {
            Ok(translation) => translation,
            Err(Fault::Mmio { .. } | Fault::ReadOnly { .. }) => return Ok(Resolved::Bounce),
            Err(fault) => return Err(abort_of(fault)),
        };
        let last = gva.wrapping_add(size as u64 - 1);
        if last.frame() != gva.frame() {
            return self.resolve_crossing(gva, translation.hva, size, access);
        }
        let clear = !translation.writable && kind != AccessKind::Write
            || self.memory.code.is_clear(translation.hva.frame());
        let rights = Rights {
            read: translation.readable,
            write: translation.writable && clear,
        };
        self.tlb()
            .fill(view, gva, translation.hva, extent(&translation), rights);
        if translation.size != PageSize::Size4K {
            self.fill_around(view, gva, &translation);
        }
        if kind == AccessKind::Write && !clear {
            return Ok(Resolved::Bounce);
        }
        Ok(Resolved::Addend(
            translation.hva.raw().wrapping_sub(gva.raw()),
        ))
    }

    /// Fills what is free of the TLB around an address in a large page. Kernels reach all of memory by
    /// such pages, and take new pages from it one after the other.
    fn fill_around(&mut self, view: View, gva: Gva, translation: &mmu::Translation) {
        const AROUND: usize = 8;
        const BYTES: u64 = AROUND as u64 * PageSize::Size4K.bytes();
        let offset = gva.raw() % BYTES;
        let first = Gva::new(gva.raw() - offset);
        let host = Hva::new(translation.hva.raw().wrapping_sub(offset));
        let places = std::array::from_fn::<_, AROUND, _>(|page| {
            let offset = page as u64 * PageSize::Size4K.bytes();
            (first.wrapping_add(offset), host.wrapping_add(offset))
        });
        let clear = self
            .memory
            .code
            .are_clear(places.map(|(_, hva)| hva.frame()));
        let extent = extent(translation);
        let mut tlb = self.tlb();
        for ((gva, hva), clear) in places.into_iter().zip(clear) {
            let rights = Rights {
                read: translation.readable,
                write: translation.writable && clear,
            };
            if tlb.is_free(view, gva) {
                tlb.fill(view, gva, hva, extent, rights);
            }
        }
    }

    /// Fills the TLB after an access that was done without it.
    fn learn(&mut self, gva: Gva, len: usize, kind: AccessKind, view: View) {
        if parts(gva, len).count() == 1 {
            // What can't be had by an entry is looked up each time.
            let _ = self.resolve(gva, len, kind, view);
        }
    }

    /// An access to two pages: direct if they lie side by side in the host, too.
    fn resolve_crossing(
        &mut self,
        gva: Gva,
        hva: Hva,
        size: usize,
        access: Access,
    ) -> Result<Resolved, Abort> {
        let next = gva
            .wrapping_add(size as u64 - 1)
            .align_down(PageSize::Size4K);
        let second = match self.memory.mmu.translate(next, access) {
            Ok(translation) => translation,
            Err(Fault::Mmio { .. } | Fault::ReadOnly { .. }) => return Ok(Resolved::Bounce),
            Err(fault) => return Err(abort_of(fault)),
        };
        let together = second.hva.offset_from(hva) == Some(next.raw().wrapping_sub(gva.raw()));
        let code = access.is_write()
            && !(self.memory.code.is_clear(hva.frame())
                && self.memory.code.is_clear(second.hva.frame()));
        if together && !code {
            Ok(Resolved::Addend(hva.raw().wrapping_sub(gva.raw())))
        } else {
            Ok(Resolved::Bounce)
        }
    }

    /// Between two instructions: lets the MMU take away what is too much.
    pub(crate) fn keep_limits(&mut self) {
        let effect = self.memory.mmu.keep_limits();
        self.apply(effect);
    }

    fn apply(&mut self, effect: TlbEffect) {
        if effect == TlbEffect::FlushAll {
            self.flush_all();
        }
    }
}

impl LinearMemory for MemoryView<'_> {
    fn read(&mut self, gva: Gva, data: &mut [u8], privilege: Privilege) -> Result<(), Abort> {
        let (view, len) = (view_of(privilege), data.len());
        if let Some(hva) = self.tlb().find(view, gva, len as u64, false) {
            return read_ram(hva, data);
        }
        self.memory.read_as(gva, data, mmu_privilege(privilege))?;
        self.learn(gva, len, AccessKind::Read, view);
        Ok(())
    }

    fn write(&mut self, gva: Gva, data: &[u8], privilege: Privilege) -> Result<(), Abort> {
        let (view, len) = (view_of(privilege), data.len());
        if let Some(hva) = self.tlb().find(view, gva, len as u64, true) {
            return write_ram(hva, data);
        }
        self.memory.write_as(gva, data, mmu_privilege(privilege))?;
        self.learn(gva, len, AccessKind::Write, view);
        Ok(())
    }

    fn check_write(&mut self, gva: Gva, len: usize, privilege: Privilege) -> Result<(), Abort> {
        let view = view_of(privilege);
        if self.tlb().find(view, gva, len as u64, true).is_some() {
            return Ok(());
        }
        self.memory
            .writable(gva, len, mmu_privilege(privilege))
            .map(|_| ())
    }

    fn compare_exchange(
        &mut self,
        gva: Gva,
        current: u64,
        new: u64,
        privilege: Privilege,
    ) -> Result<bool, Abort> {
        let places = self.memory.writable(gva, 8, mmu_privilege(privilege))?;
        if let [Some((Place::Ram(hva), 8)), None] = places {
            return access::compare_exchange(hva, current, new)
                .map(|seen| seen == current)
                .map_err(|fault| host_fault(fault, None));
        }
        let mut bytes = [0; 8];
        self.read(gva, &mut bytes, privilege)?;
        if u64::from_le_bytes(bytes) != current {
            return Ok(false);
        }
        self.write(gva, &new.to_le_bytes(), privilege)?;
        Ok(true)
    }

    fn read_physical(&mut self, gpa: Gpa, data: &mut [u8]) -> Result<(), Abort> {
        let table = self.memory.mmu.mmu().slots().snapshot(0);
        let hva = table.find(gpa.frame()).and_then(|slot| slot.hva_at(gpa));
        match hva {
            Some(hva) => read_ram(hva, data),
            None => self
                .memory
                .mmio
                .read(gpa, data)
                .map_err(|asked| Abort::Exit(Exit::Mmio(asked))),
        }
    }

    fn paging_changed(&mut self, state: &CpuState) {
        let registers = paging_registers(state);
        let before = *self.memory.mmu.registers();
        let effect = self.memory.mmu.set_registers(&registers);
        let cr3 = before.cr3;
        if (PagingRegisters { cr3, ..registers }) != before {
            // Rights are worked out when an entry is made.
            self.flush_all();
        } else if cr3 != registers.cr3 {
            if registers.cr4 & Cr4::PCIDE.bits() == 0 {
                self.tlb().flush_local();
            } else {
                self.tlb().switch(cr3, registers.cr3);
            }
        }
        self.apply(effect);
    }

    fn flush(&mut self, flush: Flush) {
        let present = self.memory.mmu.registers().cr3 & CR3_PCID;
        let mut tlb = self.tlb();
        match flush {
            Flush::Page(gva) => tlb.flush_page(gva),
            Flush::PcidPage(pcid, gva) if u64::from(pcid) == present => tlb.flush_page(gva),
            Flush::CurrentPcid => tlb.flush_local(),
            Flush::Pcid(pcid) if u64::from(pcid) == present => {
                tlb.flush_local();
                tlb.flush_aside(pcid);
            }
            Flush::Pcid(pcid) | Flush::PcidPage(pcid, _) => tlb.flush_aside(pcid),
            Flush::NonGlobal => tlb.flush_all_local(),
            Flush::All => tlb.flush(),
        }
        let effect = match flush {
            Flush::Page(gva) => self.memory.mmu.invalidate_page(gva),
            // A page of another PCID may stand in shadow tables that are not at hand: all go.
            _ => self.memory.mmu.invalidate_all(),
        };
        self.apply(effect);
    }
}

/// The registers that govern paging.
pub(crate) fn paging_registers(state: &CpuState) -> PagingRegisters {
    PagingRegisters {
        cr0: state.cr0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.msrs.efer,
        pdptrs: state.pdptrs,
        pkru: state.pkru,
    }
}
