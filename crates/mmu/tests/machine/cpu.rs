//! A CPU that is nothing but a TLB: it obeys the rules of a reader (checkpoints) and keeps every
//! translation until it is told to drop it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use addr::{Address, Gva, Hva, PageSize};
use memory::access as host;
use memory::quiesce::{Domain, Kick, Participant, Requests};
use mmu::{Fault, Mmu, PagingRegisters, TlbEffect, Translation, VcpuMmu};

use super::{READ, WRITE};

#[derive(Default)]
struct Flag(AtomicBool);

impl Kick for Flag {
    fn kick(&self, _requests: Requests) {
        self.0.store(true, Ordering::SeqCst);
    }
}

pub struct Cpu {
    pub vcpu: VcpuMmu,
    participant: Arc<Participant>,
    kicked: Arc<Flag>,
    tlb: HashMap<u64, Translation>,
}

impl Cpu {
    /// Outside guest mode.
    pub fn new(mmu: &Arc<Mmu>, domain: &Domain, id: u32) -> Self {
        let kicked = Arc::new(Flag::default());
        let participant = domain.register(Arc::clone(&kicked) as Arc<dyn Kick>);
        let mut vcpu = VcpuMmu::new(mmu, id);
        vcpu.set_participant(&participant);
        Self {
            vcpu,
            participant,
            kicked,
            tlb: HashMap::new(),
        }
    }

    pub fn enter(&mut self) {
        let requests = self.participant.enter();
        self.handle(requests);
    }

    pub fn leave(&mut self) {
        self.participant.leave();
    }

    fn handle(&mut self, requests: Requests) {
        if requests.contains(Requests::FLUSH_TLB) {
            self.tlb.clear();
        }
    }

    /// Between two instructions.
    pub fn poll(&mut self) {
        if self.kicked.0.swap(false, Ordering::SeqCst) {
            self.checkpoint();
        }
    }

    fn checkpoint(&mut self) {
        let requests = self.participant.checkpoint();
        self.handle(requests);
    }

    fn apply(&mut self, effect: TlbEffect) {
        if effect == TlbEffect::FlushAll {
            self.tlb.clear();
            self.checkpoint();
        }
    }

    /// Before the first entry.
    pub fn load_registers_outside(&mut self, registers: &PagingRegisters) {
        let _ = self.vcpu.set_registers(registers);
    }

    pub fn flush(&mut self) {
        self.tlb.clear();
        let effect = self.vcpu.invalidate_all();
        self.apply(effect);
    }

    pub fn invlpg(&mut self, gva: u64) {
        self.tlb.remove(&(gva >> 12));
        let effect = self.vcpu.invalidate_page(Gva::new(gva));
        self.apply(effect);
    }

    /// Where a write to `gva` goes.
    pub fn for_write(&mut self, gva: u64) -> Result<Hva, Fault> {
        match self.tlb.get(&(gva >> 12)) {
            Some(known) if known.writable => Ok(byte(known, gva)),
            _ => {
                let found = self.vcpu.translate(Gva::new(gva), WRITE)?;
                self.tlb.insert(gva >> 12, found);
                Ok(found.hva)
            }
        }
    }

    pub fn for_read(&mut self, gva: u64) -> Result<Hva, Fault> {
        if let Some(known) = self.tlb.get(&(gva >> 12)) {
            return Ok(byte(known, gva));
        }
        let found = self.vcpu.translate(Gva::new(gva), READ)?;
        self.tlb.insert(gva >> 12, found);
        Ok(found.hva)
    }

    pub fn store(&mut self, gva: u64, value: u64) -> Result<(), Fault> {
        let at = self.for_write(gva)?;
        host::store_word(at, value).expect("RAM is there");
        Ok(())
    }

    pub fn load(&mut self, gva: u64) -> Result<u64, Fault> {
        let at = self.for_read(gva)?;
        Ok(host::load_word(at).expect("RAM is there"))
    }
}

/// A test that fails must not make the others wait for it.
impl Drop for Cpu {
    fn drop(&mut self) {
        if self.participant.is_inside() {
            self.participant.leave();
        }
    }
}

fn byte(known: &Translation, gva: u64) -> Hva {
    let offset = gva & PageSize::Size4K.offset_mask();
    known.hva.align_down(PageSize::Size4K).wrapping_add(offset)
}
