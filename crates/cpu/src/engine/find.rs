//! From RIP to translated code: lookup, translation, chaining, and what makes code void.

use addr::{Address, Gva, Hva, PageSize};

use super::blocks::{Block, CodeContext, PageKey, check_of};
use super::code_map::{chunks, runs};
use super::frame::NO_MODE;
use super::memory::{CodePlace, read_ram};
use super::segments::bad_address;
use super::tlb::code_index;
use super::vcpu::Vcpu;
use crate::emit::{Asm, Mem, Reg};
use crate::engine::frame::frame_disp;
use crate::system::Abort;
use crate::translate::{
    By, DROP, Decoded, Flags, LONGEST, MAX_BLOCK_BYTES, Mode, PageCheck, Reach, Reason, ReturnSite,
    SITE_HOST_FAULT, SITE_INDIRECT, Site, Source, emit_drop, emit_exit, emit_page_check,
};
use crate::{Exit, InternalError};

/// Bytes of code read at once.
const WINDOW: usize = 256;

/// The start of the page behind the one that holds `gva`.
fn next_page(gva: Gva) -> Gva {
    gva.align_down(PageSize::Size4K).wrapping_add(4096)
}

impl Vcpu {
    /// Writes the stubs that every cache begins with.
    pub(super) fn write_stubs(&mut self) {
        let base = self.cache.base();
        let mut asm = Asm::default();
        asm.reset(base);
        asm.jmp_mem(Mem::base(Reg::RSP, frame_disp!(exit)));
        self.indirect_stub = asm.here() as u32;
        emit_exit(&mut asm, SITE_INDIRECT, base);
        self.trap_stub = asm.here() as u32;
        emit_exit(&mut asm, SITE_HOST_FAULT, base);
        self.cache.truncate(0);
        self.cache.push(asm.code());
        self.stubs_end = self.cache.used();
        self.forget_translations();
    }

    /// Empties the cache.
    pub(super) fn forget_translations(&mut self) {
        self.settle_x87();
        self.generation += 1;
        self.cache.truncate(self.stubs_end);
        self.blocks.clear();
        self.tables.marks.clear();
        self.tables.x87.clear();
        self.tables.strings.clear();
        self.tables.loops.clear();
        self.tables.again.clear();
        self.tables.instructions.clear();
        self.tables.sites.clear();
        for reason in [Reason::Indirect, Reason::HostFault] {
            let flags = Flags::HOST;
            self.tables.sites.push(Site {
                rip: 0,
                reason,
                flags,
            });
        }
        self.forget_pages();
        self.forget_jumps();
    }

    fn make_room(&mut self) {
        self.counters().cache_full.increment();
        self.forget_translations();
    }

    fn forget_pages(&mut self) {
        self.view().tlb().flush_code();
    }

    /// Makes the tables of the present view those of the present context.
    pub(super) fn adopt_context(&mut self, context: CodeContext) {
        self.context = context;
        let view = context.mode.view();
        let fast = &mut self.frame_mut().fast;
        fast.view = view as u32;
        fast.modes[view as usize] = if context.mode.is_64() {
            context.mode.0
        } else {
            NO_MODE
        };
        if self.contexts[view as usize] != context {
            self.contexts[view as usize] = context;
            self.view().tlb().flush_code_of(view);
        }
    }

    /// Where code can be.
    pub(super) fn reach(&self) -> Reach {
        if !self.context.mode.is_64() {
            Reach::Limit(self.context.cs_limit)
        } else if self.state().cr4 & x86::control::Cr4::LA57.bits() != 0 {
            Reach::Canonical(57)
        } else {
            Reach::Canonical(48)
        }
    }

    fn linear_ip(&self) -> Result<Gva, Abort> {
        let rip = self.state().rip;
        if !self.reach().contains(rip) {
            return Err(bad_address(1));
        }
        if self.context.mode.is_64() {
            return Ok(Gva::new(rip));
        }
        Ok(Gva::new(
            self.context.cs_base.wrapping_add(rip) & 0xffff_ffff,
        ))
    }

    /// The block at RIP; `extra` are bits of [`Mode`] for translations of a special kind.
    pub(super) fn find(&mut self, extra: u32) -> Result<u32, Abort> {
        let linear = self.linear_ip()?;
        self.memory.mmu.set_instruction(self.state().rip);
        if !self.cache.has_room(MAX_BLOCK_BYTES) {
            // What leads to blocks that are there already needs some, too.
            self.make_room();
        }
        let mut context = self.context;
        context.mode = context.mode.with(extra | self.extra);
        let mut page = self.code_page(linear, context)?;
        let offset = linear.page_offset(PageSize::Size4K) as u16;
        if let Some(number) = self.blocks.find(page, offset) {
            let block = self.blocks.blocks[number as usize];
            match block.second {
                None => return Ok(number),
                Some(second) => {
                    let generation = self.generation;
                    let now = self.code_page(next_page(linear), context)?;
                    if generation == self.generation && now == second {
                        return Ok(number);
                    }
                    page = self.code_page(linear, context)?;
                }
            }
        }
        self.translate_block(linear, context, page)
    }

    /// The number of the code page that holds `gva`, from the instruction TLB or by a walk.
    fn code_page(&mut self, gva: Gva, context: CodeContext) -> Result<u32, Abort> {
        let view = context.mode.view();
        let gvn = gva.frame();
        let at = code_index(gvn);
        let plain = context == self.contexts[view as usize];
        if plain {
            let id = self.frame().xtlb[view as usize][at];
            if self.blocks.page_ref(id).is_some_and(|p| p.key.gvn == gvn) {
                return Ok(id);
            }
        }
        let CodePlace::Ram(hva, extent) = self.memory.code_place(gva, view)? else {
            return Err(Abort::Exit(Exit::InternalError(InternalError {
                bytes: [0; 15],
                len: 0,
            })));
        };
        let key = PageKey {
            gvn,
            host: hva.frame(),
            context,
        };
        let mut id = self.blocks.page(key, self.epoch);
        if !self.is_unchanged(id)? {
            self.memory.code.void(hva.frame());
            self.memory.tell_others();
            self.take_voids();
            id = self.blocks.page(key, self.epoch);
        }
        if plain {
            self.view().tlb().fill_code(view, gva, id, extent);
        }
        Ok(id)
    }

    /// Whether a page still holds the bytes that were translated.
    fn is_unchanged(&mut self, id: u32) -> Result<bool, Abort> {
        let epoch = self.epoch;
        let Some(page) = self.blocks.page_mut(id) else {
            return Ok(true);
        };
        if page.verified == epoch {
            return Ok(true);
        }
        page.verified = epoch;
        let base = page.key.host.number() << 12;
        for run in runs(page.chunks) {
            let now = &mut self.scratch[run.clone()];
            read_ram(Hva::new(base + run.start as u64), now)?;
            if *now != page.copy[run] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Drops what the shared map has voided since the last look.
    pub(super) fn take_voids(&mut self) {
        let (voided, seen) = self.memory.code.voided_since(self.seen_voids);
        self.seen_voids = seen;
        if voided.is_empty() {
            return;
        }
        for host in voided {
            let removed = self.blocks.remove_host_page(host);
            self.view().tlb().forget_code(&removed.pages);
            for number in removed.blocks {
                if !self.cache.has_room(MAX_BLOCK_BYTES) {
                    self.make_room();
                    return;
                }
                self.void_block(number);
            }
        }
    }

    /// Makes a block's entries lead out, and then to the block that takes its place.
    fn void_block(&mut self, number: u32) {
        self.counters().blocks_void.increment();
        let block = self.blocks.blocks[number as usize];
        for entry in [Some(block.plain), block.checked].into_iter().flatten() {
            let (patch, by) = (entry + 1, By::Jump);
            let site = self.add_site(block.rip, Reason::Link { patch, by });
            let stub = self.emit(|asm, base| emit_exit(asm, site, base));
            self.cache.write_jump(entry, stub);
        }
    }

    fn add_site(&mut self, rip: u64, reason: Reason) -> u32 {
        let flags = Flags::HOST;
        self.tables.sites.push(Site { rip, reason, flags });
        self.tables.sites.len() as u32 - 1
    }

    /// Appends a small piece of code to the cache; there is always room left for some.
    pub(super) fn emit(&mut self, write: impl FnOnce(&mut Asm, u64)) -> u32 {
        let base = self.cache.base();
        self.stub.reset(base + u64::from(self.cache.used()));
        write(&mut self.stub, base);
        self.cache.push(self.stub.code())
    }

    fn translate_block(
        &mut self,
        linear: Gva,
        context: CodeContext,
        mut page: u32,
    ) -> Result<u32, Abort> {
        if !self.cache.has_room(2 * MAX_BLOCK_BYTES) {
            self.make_room();
            page = self.code_page(linear, context)?;
        }
        let rest = 4096 - linear.page_offset(PageSize::Size4K) as usize;
        loop {
            let mut bytes = [0; WINDOW + LONGEST];
            let first = rest.min(WINDOW);
            self.read_code(page, linear, &mut bytes[..first])?;
            let rip = self.state().rip;
            let mode = context.mode;
            let mut second = None;
            let mut length = self.decode(rip, mode, &bytes[..first], None);
            if length.is_none() {
                let next = next_page(linear);
                let generation = self.generation;
                let id = self.code_page(next, context)?;
                if generation != self.generation {
                    page = self.code_page(linear, context)?;
                    continue;
                }
                let tail = &mut bytes[first..first + LONGEST];
                self.read_code(id, next, tail)?;
                second = Some((next, id));
                let check = self.inline_check(next, id, context);
                length = self.decode(rip, mode, &bytes[..first + LONGEST], check);
            }
            let length = length.unwrap_or(first);
            let mut fresh = self.protect(page, linear, &bytes[..length.min(rest)])?;
            if let Some((next, id)) = second.filter(|_| length > rest) {
                fresh &= self.protect(id, next, &bytes[rest..length])?;
            }
            if fresh {
                let source = Source {
                    rip,
                    mode,
                    bytes: &bytes,
                    second: second.and_then(|(next, id)| self.inline_check(next, id, context)),
                    reach: self.reach(),
                    returns: self.return_site(linear.wrapping_add(length as u64), page, context),
                };
                let second = second.map(|(_, id)| id);
                let number = self.write_block(&source, linear, page, second);
                if let Some(landing) = self.translator.landing {
                    let behind = linear.wrapping_add(length as u64);
                    let offset = behind.page_offset(PageSize::Size4K) as u16;
                    if let Some(page) = self.blocks.page_mut(page) {
                        page.add_landing(offset, landing);
                    }
                    self.land(page, offset, landing);
                }
                return Ok(number);
            }
            // A page died meanwhile: its successor, if it is one.
            page = self.code_page(linear, context)?;
        }
    }

    /// The check of a second page inside a block. A translation of a special kind has none: the
    /// instruction TLB is not kept for it, and it is never chained, so [`Vcpu::find`] looks at both
    /// pages each time.
    fn inline_check(&self, next: Gva, id: u32, context: CodeContext) -> Option<PageCheck> {
        let plain = context == self.contexts[context.mode.view() as usize];
        plain.then(|| check_of(next.frame(), id))
    }

    /// Where a call at the end of the block returns to, if it is on the block's own page.
    fn return_site(&self, behind: Gva, page: u32, context: CodeContext) -> Option<ReturnSite> {
        if !self.translator.ends_in_call() {
            return None;
        }
        let on = self.blocks.page_ref(page)?;
        if on.key.gvn != behind.frame() {
            return None;
        }
        let offset = behind.page_offset(PageSize::Size4K) as u16;
        Some(ReturnSite {
            page: self.inline_check(behind, page, context)?,
            miss: self.cache.base() + u64::from(self.indirect_stub),
            shared: on.landing(offset).map(|landing| landing.call),
        })
    }

    fn decode(
        &mut self,
        rip: u64,
        mode: Mode,
        bytes: &[u8],
        second: Option<PageCheck>,
    ) -> Option<usize> {
        let source = Source {
            rip,
            mode,
            bytes,
            second,
            reach: self.reach(),
            returns: None,
        };
        match self.translator.decode(&source) {
            Decoded::Bytes(length) => Some(length),
            Decoded::NeedsMore => None,
        }
    }

    fn read_code(&mut self, page: u32, gva: Gva, bytes: &mut [u8]) -> Result<(), Abort> {
        let Some(page) = self.blocks.page_ref(page) else {
            return Ok(());
        };
        let hva = (page.key.host.number() << 12) + gva.page_offset(PageSize::Size4K);
        read_ram(Hva::new(hva), bytes)
    }

    /// Notes that these bytes are translated. Whether they are still there now that every write to
    /// them is noticed.
    fn protect(&mut self, id: u32, gva: Gva, bytes: &[u8]) -> Result<bool, Abort> {
        let offset = gva.page_offset(PageSize::Size4K);
        let wanted = chunks(offset, bytes.len() as u64);
        let Some(page) = self.blocks.page_ref(id) else {
            return Ok(true);
        };
        let host = page.key.host;
        let missing = wanted & !page.chunks;
        if missing == 0 {
            return Ok(true);
        }
        if self.memory.code.add(host, wanted) {
            self.flush_writes();
        }
        let mut now = [0; WINDOW + LONGEST];
        let now = &mut now[..bytes.len()];
        self.read_code(id, gva, now)?;
        let Some(page) = self.blocks.page_mut(id) else {
            return Ok(false);
        };
        let mut left = missing;
        while left != 0 {
            let at = left.trailing_zeros() as usize * 64;
            left &= left - 1;
            let hva = Hva::new((host.number() << 12) + at as u64);
            read_ram(hva, &mut page.copy[at..at + 64])?;
        }
        page.chunks |= missing;
        Ok(now == bytes && !page.dead)
    }

    /// Lets no vCPU write to a page with code unnoticed.
    fn flush_writes(&mut self) {
        self.view().tlb().flush_writes();
        let participant = std::sync::Arc::clone(&self.memory.participant);
        let late = self
            .memory
            .domain
            .request_and_wait(memory::quiesce::Requests::FLUSH_TLB, Some(&participant));
        self.memory.late |= late;
    }

    fn write_block(
        &mut self,
        source: &Source<'_>,
        linear: Gva,
        page: u32,
        second: Option<u32>,
    ) -> u32 {
        let counters = self.counters();
        counters.blocks.increment();
        counters.instructions.add(self.translator.decoded() as u64);
        let start = self.cache.used();
        let marks = self.tables.marks.len() as u32;
        let code = self
            .translator
            .translate(source, &mut self.tables, self.cache.base(), start);
        self.cache.push(code);
        let block = Block {
            rip: source.rip,
            plain: start + DROP,
            end: self.cache.used(),
            marks,
            page,
            second,
            checked: None,
            indirect: None,
        };
        let offset = linear.page_offset(PageSize::Size4K) as u16;
        self.blocks.insert(offset, block)
    }

    /// The entry of a block for jumps from other pages.
    pub(super) fn checked_entry(&mut self, number: u32) -> u32 {
        let block = self.blocks.blocks[number as usize];
        if let Some(entry) = block.checked {
            return entry;
        }
        let key = self.blocks.pages[block.page as usize - 1].key;
        let stale = self.add_site(block.rip, Reason::Stale);
        let (mode, check) = (key.context.mode, check_of(key.gvn, block.page));
        let entry = self.emit(|asm, base| {
            let plain = base + u64::from(block.plain);
            emit_drop(asm);
            emit_page_check(asm, mode, check);
            let ok = asm.jrcxz();
            emit_exit(asm, stale, base);
            asm.bind(ok);
            asm.jmp_to(plain);
        });
        let entry = entry + DROP;
        self.blocks.blocks[number as usize].checked = Some(entry);
        entry
    }

    /// Chains a direct jump or call to a block.
    pub(super) fn chain(&mut self, patch: u32, by: By, number: u32) {
        let from = self.blocks.block_at(patch).map(|b| b.page);
        let block = self.blocks.blocks[number as usize];
        let target = if from == Some(block.page) {
            block.plain
        } else {
            self.checked_entry(number)
        };
        let before = match by {
            By::Jump => 0,
            By::Call => DROP,
        };
        self.cache.patch_jump(patch, target - before);
    }

    /// Whether instructions may follow each other without a look at what else is to be done.
    pub(super) fn may_chain(&self) -> bool {
        self.extra & Mode::STEP == 0
    }
}
