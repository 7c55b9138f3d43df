//! A vCPU that translates a page, and one that writes to it: the order which `cpu::engine::code_map`
//! keeps.

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use super::*;

/// A byte of guest memory that is code, and what all vCPUs know of its page.
struct Page {
    byte: AtomicU32,
    /// Whether somebody has translated it, and how often that became void.
    map: Mutex<(bool, u32)>,
}

impl Page {
    fn new() -> Self {
        Self {
            byte: AtomicU32::new(0),
            map: Mutex::new((false, 0)),
        }
    }

    fn is_clear(&self) -> bool {
        !self.map.lock().unwrap().0
    }

    /// Whether it had no translation before.
    fn add(&self) -> bool {
        !std::mem::replace(&mut self.map.lock().unwrap().0, true)
    }

    fn voids(&self) -> u32 {
        self.map.lock().unwrap().1
    }

    /// Whether others must be told.
    fn write_noticed(&self) -> bool {
        let mut map = self.map.lock().unwrap();
        self.byte.store(1, Ordering::Relaxed);
        let was_code = std::mem::replace(&mut map.0, false);
        map.1 += u32::from(was_code);
        was_code
    }
}

/// Writes once: by a TLB entry where the page was no code when it was filled.
fn writer(domain: &Domain, vcpu: &Vcpu, page: &Page) {
    let _ = vcpu.enter();
    let mut tlb = page.is_clear();
    if !vcpu.poll().is_empty() {
        tlb = page.is_clear();
    }
    if tlb {
        page.byte.store(1, Ordering::Relaxed);
    } else if page.write_noticed() {
        let _ = domain.request_and_wait(Requests::INVALIDATE_CODE, Some(&vcpu.participant));
    }
    vcpu.leave();
}

/// Who reads the code, and when.
#[derive(Clone, Copy, PartialEq)]
enum Read {
    BehindTheFlush,
    BeforeTheFlush,
}

fn translate(domain: &Domain, vcpu: &Vcpu, page: &Page, read: Read) -> (u32, Requests) {
    let early = page.byte.load(Ordering::Relaxed);
    let mut late = Requests::empty();
    if page.add() {
        late = domain.request_and_wait(Requests::FLUSH_TLB, Some(&vcpu.participant));
    }
    let code = match read {
        Read::BehindTheFlush => page.byte.load(Ordering::Relaxed),
        Read::BeforeTheFlush => early,
    };
    (code, late)
}

fn translator_and_writer(read: Read) {
    explore(2, move || {
        let domain = Domain::new();
        let page = Arc::new(Page::new());
        let (vcpu, other) = (Vcpu::new(&domain), Vcpu::new(&domain));
        let writes = {
            let (domain, page) = (Arc::clone(&domain), Arc::clone(&page));
            let vcpu = Arc::clone(&other);
            thread::spawn(move || writer(&domain, &vcpu, &page))
        };
        let _ = vcpu.enter();
        let voids = page.voids();
        let (code, late) = translate(&domain, &vcpu, &page, read);
        let asked = late | vcpu.poll();
        vcpu.leave();
        writes.join().unwrap();
        let asked = asked | vcpu.enter();
        let void = asked.contains(Requests::INVALIDATE_CODE) && page.voids() != voids;
        assert!(
            void || code == page.byte.load(Ordering::Relaxed),
            "old code would run"
        );
        vcpu.leave();
    });
}

#[test]
fn no_translation_outlives_its_bytes() {
    translator_and_writer(Read::BehindTheFlush);
}

/// A rule broken on purpose.
#[test]
#[should_panic(expected = "old code would run")]
fn code_read_before_writers_were_told_is_found() {
    translator_and_writer(Read::BeforeTheFlush);
}
