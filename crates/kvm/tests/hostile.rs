//! A program that hates us: ioctls with any number, any argument, any bytes, from several threads,
//! while descriptors are closed under them. Nothing panics, nothing hangs, and whatever is refused
//! gives an errno that KVM knows.
//!
//! `HOSTILE=SEED..SEED cargo test -p kvm --test hostile` for a long run.

#[expect(dead_code, reason = "not all draws are of use here")]
mod draw;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use draw::Draw;
use fastrand::Rng;
use kvm::fds::{self, Object};
use kvm::table::{IOCTLS, Ioctl, Level};
use kvm::{Argument, PagingPath, System, Vcpu};

/// Calls of one thread for one seed.
const CALLS: usize = 3000;
const THREADS: usize = 3;
const QUICK: std::ops::Range<u64> = 1..4;
/// A call that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(20);
/// Objects of one seed.
const MOST_OBJECTS: usize = 24;
/// What an argument may point to.
const BUFFER: usize = 16 << 10;
const RUN: u32 = 0xae80;

const KNOWN: &[i32] = &[
    libc::E2BIG,
    libc::EAGAIN,
    libc::EBADF,
    libc::EBUSY,
    libc::EEXIST,
    libc::EFAULT,
    libc::EINTR,
    libc::EINVAL,
    libc::EIO,
    libc::ENODEV,
    libc::ENOENT,
    libc::ENOMEM,
    libc::ENOSPC,
    libc::ENOTTY,
    libc::ENXIO,
    libc::EOPNOTSUPP,
    libc::EPERM,
];

#[derive(Default)]
struct Shared {
    /// Descriptors of ours that are open, or were a moment ago.
    open: Mutex<Vec<RawFd>>,
    /// All vCPUs: one whose descriptor is closed may still be in `KVM_RUN`.
    vcpus: Mutex<Vec<Arc<Vcpu>>>,
    done: AtomicBool,
    refused: AtomicUsize,
    made: AtomicUsize,
}

impl Shared {
    fn add(&self, fd: RawFd) {
        self.open.lock().unwrap().push(fd);
        if let Some(Object::Vcpu(vcpu)) = fds::find_object(fd) {
            self.vcpus.lock().unwrap().push(vcpu);
        }
    }
}

fn request(random: &mut Rng) -> u32 {
    let row = &IOCTLS[random.usize(..IOCTLS.len())];
    match random.u64(..12) {
        // Any number, also with a size of its own.
        0 => random.u32(..),
        1 => 0xae00 | random.u32(..256),
        2 => row.request ^ 1 << (16 + random.u64(..14)),
        _ => row.request,
    }
}

fn word(random: &mut Rng) -> u64 {
    match random.u64(..8) {
        0..4 => 0,
        4 => random.u64(..8),
        5 => 1 << random.u64(..64),
        6 => u64::MAX << random.u64(..64),
        _ => random.u64(..),
    }
}

/// Addresses that are nobody's: nothing may be written where this program lives.
fn pointer(random: &mut Rng) -> u64 {
    random.pick(&[
        0,
        1,
        8,
        0xfff,
        0x1000,
        1 << 47,
        0x8000_0000_0000_0000,
        u64::MAX,
        u64::MAX - 7,
    ])
}

/// A structure full of anything; words that may be pointers are bad ones.
fn fill(random: &mut Rng, buffer: &mut [u64]) {
    let style = random.u64(..4);
    let used = random.usize(..buffer.len());
    buffer.fill(if random.u64(..8) == 0 { u64::MAX } else { 0 });
    for slot in &mut buffer[..used.max(8)] {
        let value = match style {
            0 => 0,
            1 => word(random),
            2 => word(random) & 0xffff | (word(random) & 0xff) << 32,
            _ => random.u64(..),
        };
        *slot = if is_mapped(value) {
            pointer(random)
        } else {
            value
        };
    }
}

/// Whether this program may have memory there.
fn is_mapped(value: u64) -> bool {
    (0x1_0000..1 << 47).contains(&value)
        && (value >> 40 == 0x7f || value >> 40 == 0x55 || value >> 40 == 0x56)
}

/// Called again and again, it must stay small: no more objects than this, and no slots.
fn is_harmless(request: u32, objects: usize) -> bool {
    let creates = matches!(request, 0xae01 | 0xae41);
    !creates || objects < MOST_OBJECTS
}

fn abuse(shared: &Shared, seed: u64) {
    let mut random = Rng::with_seed(seed);
    let mut buffer = vec![0u64; BUFFER / 8];
    for _ in 0..CALLS {
        let (fd, objects) = {
            let open = shared.open.lock().unwrap();
            let index = random.usize(..open.len());
            (open[index], open.len())
        };
        let request = request(&mut random);
        if !is_harmless(request, objects) {
            continue;
        }
        fill(&mut random, &mut buffer);
        let argument = match random.u64(..10) {
            0 => Argument::new(pointer(&mut random)),
            1 => Argument::new(word(&mut random) & 0xffff),
            2 if request == 0xae01 || request == RUN => Argument::new(0),
            _ => Argument::new(buffer.as_mut_ptr() as u64),
        };
        let argument = if matches!(request, 0xae01 | RUN | 0xae41) {
            Argument::new(random.u64(..3) * u64::from(request == 0xae41))
        } else {
            argument
        };
        let start = Instant::now();
        let answer = fds::ioctl(fd, request, argument);
        let took = start.elapsed();
        assert!(took < LIMIT, "ioctl {request:#x} took {took:?}");
        judge(shared, request, answer);
        if random.u64(..200) == 0 {
            close_one(shared, &mut random);
        }
    }
}

fn judge(shared: &Shared, request: u32, answer: Option<kvm::table::Answer>) {
    match answer {
        None => {}
        Some(Err(errno)) => {
            assert!(
                KNOWN.contains(&errno.0),
                "ioctl {request:#x} gave errno {}",
                errno.0
            );
            shared.refused.fetch_add(1, Ordering::Relaxed);
        }
        Some(Ok(value)) => {
            shared.made.fetch_add(1, Ordering::Relaxed);
            if matches!(request, 0xae01 | 0xae41) {
                shared.add(value as RawFd);
            }
        }
    }
}

/// Closes a descriptor that others may be using, but for the first two: `/dev/kvm` and a VM.
fn close_one(shared: &Shared, random: &mut Rng) {
    let mut open = shared.open.lock().unwrap();
    if open.len() > 3 {
        let index = 2 + random.usize(..open.len() - 2);
        let fd = open.swap_remove(index);
        fds::close(fd);
    }
}

/// Gets every vCPU out of `KVM_RUN`, again and again.
fn kick(shared: &Shared) {
    while !shared.done.load(Ordering::Relaxed) {
        for vcpu in shared.vcpus.lock().unwrap().iter() {
            vcpu.kicker().kick();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn seeds() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("HOSTILE") else {
        return QUICK;
    };
    let (first, last) = text.split_once("..").unwrap_or((&text, ""));
    let first = first.parse().expect("a seed");
    first..last.parse().unwrap_or(first + 1)
}

#[test]
fn whatever_comes_is_answered() {
    for seed in seeds() {
        let paging =
            [PagingPath::Nested, PagingPath::Shadow, PagingPath::Direct][seed as usize % 3];
        let system = fds::open_system(&System::new(paging)).unwrap();
        let vm = fds::ioctl(system, 0xae01, Argument::new(0))
            .unwrap()
            .unwrap() as RawFd;
        let vcpu = fds::ioctl(vm, 0xae41, Argument::new(0)).unwrap().unwrap() as RawFd;
        let shared = Arc::new(Shared::default());
        for fd in [system, vm, vcpu] {
            shared.add(fd);
        }
        let threads: Vec<_> = (0..THREADS as u64)
            .map(|thread| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || abuse(&shared, seed * 100 + thread))
            })
            .collect();
        let kicker = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || kick(&shared))
        };
        for thread in threads {
            thread.join().expect("nothing panics");
        }
        shared.done.store(true, Ordering::Relaxed);
        kicker.join().unwrap();
        for fd in shared.open.lock().unwrap().drain(..) {
            fds::close(fd);
        }
        println!(
            "seed {seed}: {} calls made, {} refused",
            shared.made.load(Ordering::Relaxed),
            shared.refused.load(Ordering::Relaxed)
        );
    }
}

/// Each row of the table with bad pointers: `EFAULT`, or the call takes a number.
#[test]
fn bad_pointers_are_refused_by_every_row() {
    let system = fds::open_system(&System::new(PagingPath::Nested)).unwrap();
    let vm = fds::ioctl(system, 0xae01, Argument::new(0))
        .unwrap()
        .unwrap() as RawFd;
    let vcpu = fds::ioctl(vm, 0xae41, Argument::new(0)).unwrap().unwrap() as RawFd;
    // Without a pointer it takes the mask away.
    let pointers = |row: &&Ioctl| !row.structure.is_empty() && row.name != "KVM_SET_SIGNAL_MASK";
    for row in IOCTLS.iter().filter(pointers) {
        let fd = match row.level() {
            Level::System => system,
            Level::Vm => vm,
            Level::Vcpu => vcpu,
            Level::Device => continue,
        };
        for bad in [0, 8, 0x8000_0000_0000_0000, u64::MAX] {
            let answer = fds::ioctl(fd, row.request, Argument::new(bad)).unwrap();
            let errno = answer.expect_err(row.name).0;
            let known = [
                libc::EFAULT,
                libc::EINVAL,
                libc::ENOTTY,
                libc::ENXIO,
                libc::EPERM,
            ];
            assert!(known.contains(&errno), "{} gave {errno}", row.name);
        }
    }
    for fd in [vcpu, vm, system] {
        fds::close(fd);
    }
}
