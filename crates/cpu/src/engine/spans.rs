//! Several accesses under one check, where the check fails (see `translate::window`).
//!
//! The first access is done alone, so that it faults as it should. Where the span then still isn't
//! in the TLB, the code goes on in a translation without spans.
//!
//! A stack frame that crosses a page does so in each round of a loop, and in each process whose stack
//! happens to lie so. Its way to the other translation must not lead through here each time: after
//! the first time the cold stub leads to a *detour*,
//!
//! ```text
//!   same page?      no: the translation without spans
//!   leave           yes: the TLB doesn't know the page
//! ```
//!
//! It stands on the same page as the code that it is reached from, in the same context, so it needs
//! no check of its own; and when that page becomes void, both do. A block whose own code crosses a
//! page has two to be checked, and gets no detour.

use addr::{Address, Gva};

use super::sites::Then;
use super::vcpu::Vcpu;
use crate::Platform;
use crate::emit::asm::Width;
use crate::emit::{Asm, Mem, Reg};
use crate::system::Abort;
use crate::translate::{
    Access, Again, Flags, Mode, SCRATCH, Span, T0, T1, emit_exit, emit_flags_back,
};

/// With where a span of `length` bytes begins in `T0`: goes to `elsewhere` if it crosses a page, else
/// leaves by `site`. Keeps flags, or brings them back from where they are: the other translation finds
/// them in the host's.
fn emit_detour(asm: &mut Asm, length: i32, flags: Back, elsewhere: u64, site: u32, leave: u64) {
    asm.lea(Width::B64, SCRATCH, Mem::base(T0, length - 1));
    asm.shrx(SCRATCH, SCRATCH, Reg::RSP);
    asm.shrx(T1, T0, Reg::RSP);
    asm.not(T1);
    asm.lea(Width::B64, SCRATCH, Mem::indexed(SCRATCH, T1, 0, 1));
    let same = asm.jrcxz();
    match flags {
        Back::AreThere => {}
        Back::Aside => emit_flags_back(asm),
        Back::Again(again) => again.emit(asm),
    }
    asm.jmp_to(elsewhere);
    asm.bind(same);
    emit_exit(asm, site, leave);
}

/// How flags come back into the host's.
#[derive(Clone, Copy, Debug)]
enum Back {
    AreThere,
    Aside,
    Again(Again),
}

impl Vcpu {
    /// A span that isn't in the TLB: the first access alone, then once more the span.
    pub(super) fn on_span(
        &mut self,
        site: u32,
        access: &Access,
        span: Span,
        platform: &mut dyn Platform,
    ) -> Result<Then, Abort> {
        let rip = self.tables.sites[site as usize].rip;
        let low = self.frame().t0;
        self.frame_mut().t0 = low.wrapping_add(u64::from(span.first));
        let then = self.on_access(rip, access, platform)?;
        if then != self.resume(access) {
            return Ok(then);
        }
        let low = Gva::new(low);
        let length = u64::from(span.length);
        let view = self.context.mode.view();
        let tlb_has = self.view().tlb().find(view, low, length, span.writes);
        if tlb_has.is_some() {
            return Ok(then);
        }
        let before = (self.generation, self.seen_voids);
        let number = self.find(Mode::UNSHARED)?;
        let crosses = low.frame() != low.wrapping_add(length - 1).frame();
        if crosses && before == (self.generation, self.seen_voids) {
            self.detour(site, span, number);
        }
        Ok(self.enter_block(number))
    }

    /// Lets the cold stub of a span lead to a block without spans where the span crosses a page.
    fn detour(&mut self, site: u32, span: Span, number: u32) {
        let block = self.blocks.blocks[number as usize];
        let flags = self.flags_back(self.tables.sites[site as usize].flags);
        let Some(flags) = flags.filter(|_| block.second.is_none() && self.may_chain()) else {
            return;
        };
        let length = i32::from(span.length);
        let entry = self.emit(|asm, base| {
            let elsewhere = base + u64::from(block.plain);
            emit_detour(asm, length, flags, elsewhere, site, base);
        });
        self.cache.patch_jump(span.exit, entry);
    }

    /// How flags come back from where they are; `None` where Rust alone can do it.
    fn flags_back(&self, flags: Flags) -> Option<Back> {
        match flags.number().map(|number| self.tables.again[number]) {
            None if flags == Flags::ASIDE => Some(Back::Aside),
            None => Some(Back::AreThere),
            Some(again) => (!again.keeps_carry()).then_some(Back::Again(again)),
        }
    }
}
