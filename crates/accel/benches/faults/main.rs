//! Nested faults: a guest touches each page of 512 MiB for the first time, on the kernel's KVM and on
//! `user` with each paging, side by side.
//!
//! `cargo bench -p accel --bench faults`. Nanoseconds a page, medians:
//!
//! - *all of it*: nobody has touched the memory, so each fault has the host provide a zeroed page, too;
//! - *the second level alone*: the host's pages are there, the slot is new;
//! - *no fault*: the same loop once more.
//!
//! The first line is the host's own share: this process touches the pages itself. Huge pages of the
//! host are off for this memory, so that a page is a page everywhere; the last block has them on.

#![expect(
    unsafe_code,
    reason = "maps memory, touches it, and hands it to the guest"
)]

#[path = "../exits/guest.rs"]
#[allow(dead_code, reason = "written for the other benchmark")]
mod guest;

use std::ptr::NonNull;
use std::time::Instant;

use accel::{Accelerator, Exit, Preference, choose};
use guest::{Chips, Guest};
use kvm_bindings::kvm_userspace_memory_region;

const SIZE: usize = 512 << 20;
const PAGE: usize = 4096;
/// Where the guest sees it.
const BASE: u32 = 0x4000_0000;
const ROUNDS: usize = 3;

/// `mov edi, BASE; mov ecx, pages`; then for each page `mov byte [rdi], 1; add edi, 4096`; `out 0xe1,
/// al` and from the start.
fn toucher() -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(BASE.to_le_bytes());
    code.push(0xb9);
    code.extend(((SIZE / PAGE) as u32).to_le_bytes());
    code.extend([0xc6, 0x07, 0x01, 0x81, 0xc7]);
    code.extend((PAGE as u32).to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xf3, 0xe6, 0xe1, 0xeb, 0xe5]);
    code
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Huge {
    Never,
    Wanted,
}

/// Memory that nobody has touched.
struct Fresh(NonNull<u8>);

impl Fresh {
    fn new(huge: Huge) -> Fresh {
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        let advice = match huge {
            Huge::Never => libc::MADV_NOHUGEPAGE,
            Huge::Wanted => libc::MADV_HUGEPAGE,
        };
        // SAFETY: a new mapping at a place of the kernel's choice, and advice about it.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), SIZE, prot, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            libc::madvise(at, SIZE, advice);
            Fresh(NonNull::new(at.cast()).expect("not at 0"))
        }
    }

    /// The host's own share; nanoseconds a page.
    fn touch(&self) -> f64 {
        let start = Instant::now();
        for at in (0..SIZE).step_by(PAGE) {
            // SAFETY: inside the mapping.
            unsafe { self.0.as_ptr().add(at).write_volatile(1) };
        }
        per_page(start)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no slot leads to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), SIZE) };
    }
}

#[expect(clippy::cast_precision_loss, reason = "a time, shown with four digits")]
fn per_page(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9 / (SIZE / PAGE) as f64
}

fn slot(guest: &Guest, memory: &Fresh, size: usize) {
    let region = kvm_userspace_memory_region {
        slot: 1,
        guest_phys_addr: u64::from(BASE),
        memory_size: size as u64,
        userspace_addr: memory.0.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the slot is deleted before the memory is dropped.
    unsafe { guest.vm.set_user_memory_region(&region).expect("a slot") };
}

/// One round of the guest's; nanoseconds a page.
fn round(guest: &mut Guest) -> f64 {
    let start = Instant::now();
    loop {
        match guest.vcpus[0].run().expect("KVM_RUN") {
            Exit::IoOut { .. } => return per_page(start),
            Exit::Interrupted => {}
            other => panic!("{other:?}"),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// All of it, the second level alone, no fault.
fn faults(accelerator: &dyn Accelerator, huge: Huge) -> [f64; 3] {
    let code = toucher();
    let mut guest = Guest::new(accelerator, Chips::Message, &[&code], &[0x48, 0xcf]);
    let mut results = [const { Vec::new() }; 3];
    // The kernel's KVM may be one in software, and slow.
    let rounds = match accelerator.kind() {
        accel::Kind::Kernel => 1,
        accel::Kind::User => ROUNDS,
    };
    for _ in 0..rounds {
        let memory = Fresh::new(huge);
        slot(&guest, &memory, SIZE);
        results[0].push(round(&mut guest));
        slot(&guest, &memory, 0);
        slot(&guest, &memory, SIZE);
        results[1].push(round(&mut guest));
        results[2].push(round(&mut guest));
        slot(&guest, &memory, 0);
    }
    results.map(median)
}

fn subjects() -> Vec<(&'static str, Preference)> {
    use kvm::PagingPath::{Direct, Nested, Shadow};
    let user = |paging: kvm::PagingPath| Preference::User(paging.into());
    vec![
        ("kvm", Preference::Kernel),
        ("user, nested", user(Nested)),
        ("user, shadow", user(Shadow)),
        ("user, direct", user(Direct)),
    ]
}

fn table(huge: Huge) {
    let [mut first, mut again] = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        let memory = Fresh::new(huge);
        first.push(memory.touch());
        again.push(memory.touch());
    }
    let (first, again) = (median(first), median(again));
    println!(
        "{:<14}{first:>14.0}{:>14}{again:>14.1}",
        "the host alone", ""
    );
    for (name, preference) in subjects() {
        match choose(preference) {
            Err(refused) => println!("{name:<14}{refused}"),
            Ok(choice) => {
                let [all, second, none] = faults(&*choice.accelerator, huge);
                let rate = 1e9 / all;
                println!("{name:<14}{all:>14.0}{second:>14.0}{none:>14.1}{rate:>14.0}");
            }
        }
    }
}

fn main() {
    let head = ["all of it", "second level", "no fault", "faults/s"];
    for (title, huge) in [
        ("4 KiB pages", Huge::Never),
        ("huge pages wanted", Huge::Wanted),
    ] {
        println!("{title}, ns a page of 4 KiB");
        println!(
            "{:<14}{:>14}{:>14}{:>14}{:>14}",
            "", head[0], head[1], head[2], head[3]
        );
        table(huge);
    }
}
