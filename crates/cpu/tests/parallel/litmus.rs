//! Litmus tests of the memory model (SDM 3A, 10.2.3): what x86 forbids is never seen, and what it
//! allows is.
//!
//! Each round has variables of its own, a cache line apart. The vCPUs meet before each round, where
//! there are two of them; four free-running ones meet once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::threads::{Program, machine, run};
use crate::machine::{DATA, Machine};

/// Bytes between the arrays of variables; results and the counter on which they meet lie behind.
const ARRAY: u64 = 0x10_0000;
const X: u64 = DATA;
const Y: u64 = DATA + ARRAY;
const RESULTS: u64 = DATA + 2 * ARRAY;
const MEET: u64 = DATA + 3 * ARRAY;
const RBX: usize = 3;
const RSI: usize = 6;
const RDI: usize = 7;
const R8: usize = 8;

/// One vCPU's part: with `rdi` at its first variable, `rsi` at its second, it leaves what it saw in two
/// words at `rbx`.
struct Part {
    body: Vec<u8>,
    swapped: bool,
}

fn part(pieces: &[&[u8]]) -> Part {
    Part {
        body: pieces.concat(),
        swapped: false,
    }
}

/// The same with the variables exchanged.
fn swapped(pieces: &[&[u8]]) -> Part {
    Part {
        swapped: true,
        ..part(pieces)
    }
}

const STORE_FIRST: &[u8] = &[0xc7, 0x07, 1, 0, 0, 0]; // movl $1,(%rdi)
const STORE_SECOND: &[u8] = &[0xc7, 0x06, 1, 0, 0, 0]; // movl $1,(%rsi)
const XCHG_FIRST: &[u8] = &[0xb8, 1, 0, 0, 0, 0x87, 0x07]; // mov $1,%eax; xchg %eax,(%rdi)
const MFENCE: &[u8] = &[0x0f, 0xae, 0xf0];
const LOCKED: &[u8] = &[0xf0, 0x83, 0x0c, 0x24, 0]; // lock orl $0,(%rsp)
const LOAD_FIRST: &[u8] = &[0x8b, 0x2f]; // mov (%rdi),%ebp
const LOAD_SECOND: &[u8] = &[0x8b, 0x06]; // mov (%rsi),%eax
const KEEP: &[u8] = &[0x89, 0x03, 0x89, 0x6b, 0x04]; // mov %eax,(%rbx); mov %ebp,4(%rbx)

/// How often the vCPUs meet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Meet {
    EachRound,
    Once,
}

/// The program around a part.
fn around(body: &[u8], vcpus: u8, meet: Meet) -> Vec<u8> {
    // lock incl (%r8); add $vcpus,%edx; wait: cmp %edx,(%r8); jb wait
    let barrier = [
        0xf0, 0x41, 0xff, 0x00, 0x83, 0xc2, vcpus, 0x41, 0x39, 0x10, 0x72, 0xfb,
    ];
    let mut code = Vec::new();
    if meet == Meet::Once {
        code.extend(barrier);
    }
    let top = code.len();
    if meet == Meet::EachRound {
        code.extend(barrier);
    }
    code.extend([0x31, 0xc0, 0x31, 0xed]); // xor %eax,%eax; xor %ebp,%ebp
    code.extend(body);
    // add $64,%rdi; add $64,%rsi; add $8,%rbx; dec %ecx; jnz top; hlt
    code.extend([
        0x48, 0x83, 0xc7, 0x40, 0x48, 0x83, 0xc6, 0x40, 0x48, 0x83, 0xc3, 0x08, 0xff, 0xc9, 0x0f,
        0x85,
    ]);
    let back = top as i32 - (code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code.push(0xf4);
    code
}

/// What each vCPU saw in one round, in order.
type Seen = Vec<u32>;

fn rounds(machine: &Machine, vcpus: &mut [cpu::Vcpu], parts: &[Part], meet: Meet) -> Vec<Seen> {
    let count = match meet {
        Meet::EachRound => 1000,
        Meet::Once => 8000,
    };
    machine.write(X, &vec![0; (3 * ARRAY) as usize + 64]);
    let code: Vec<_> = parts
        .iter()
        .map(|part| around(&part.body, parts.len() as u8, meet))
        .collect();
    let registers: Vec<_> = parts
        .iter()
        .enumerate()
        .map(|(index, part)| {
            let (first, second) = if part.swapped { (Y, X) } else { (X, Y) };
            [
                (1, count),
                (2, 0),
                (RBX, RESULTS + 0x4_0000 * index as u64),
                (RSI, second),
                (RDI, first),
                (R8, MEET),
            ]
        })
        .collect();
    let programs: Vec<_> = code
        .iter()
        .zip(&registers)
        .map(|(code, registers)| Program { code, registers })
        .collect();
    run(machine, vcpus, &programs);
    let word = |round: u64, vcpu: usize| {
        let seen = machine.word(RESULTS + 0x4_0000 * vcpu as u64 + 8 * round);
        [seen as u32, (seen >> 32) as u32]
    };
    (0..count)
        .map(|round| (0..parts.len()).flat_map(|v| word(round, v)).collect())
        .collect()
}

/// Runs the test for a while; how often each outcome was seen.
fn outcomes(parts: &[Part], meet: Meet) -> BTreeMap<Seen, usize> {
    let (machine, mut vcpus) = machine(parts.len());
    let started = Instant::now();
    let mut seen = BTreeMap::new();
    for batch in 0.. {
        if batch >= 2 && started.elapsed() > Duration::from_millis(400) {
            break;
        }
        for outcome in rounds(&machine, &mut vcpus, parts, meet) {
            *seen.entry(outcome).or_default() += 1;
        }
    }
    println!("{seen:?}");
    seen
}

fn forbid(seen: &BTreeMap<Seen, usize>, is_forbidden: impl Fn(&[u32]) -> bool) {
    for (outcome, times) in seen {
        assert!(!is_forbidden(outcome), "{outcome:?} was seen {times} times");
    }
}

/// A load may come before an earlier store to another place: the one reordering that x86 allows.
#[test]
fn store_buffering_is_seen() {
    let body: [&[u8]; 3] = [STORE_FIRST, LOAD_SECOND, KEEP];
    for _ in 0..20 {
        let seen = outcomes(&[part(&body), swapped(&body)], Meet::EachRound);
        if seen.keys().any(|o| o[0] == 0 && o[2] == 0) {
            return;
        }
    }
    panic!("the stores and loads of translated code are never reordered");
}

#[test]
fn store_buffering_with_fences_is_not() {
    for fence in [MFENCE, LOCKED] {
        let body: [&[u8]; 4] = [STORE_FIRST, fence, LOAD_SECOND, KEEP];
        let seen = outcomes(&[part(&body), swapped(&body)], Meet::EachRound);
        forbid(&seen, |o| o[0] == 0 && o[2] == 0);
    }
    // An exchange is a fence, too; it leaves what was there in eax, so the load goes second.
    let body: [&[u8]; 3] = [XCHG_FIRST, LOAD_SECOND, KEEP];
    let seen = outcomes(&[part(&body), swapped(&body)], Meet::EachRound);
    forbid(&seen, |o| o[0] == 0 && o[2] == 0);
}

/// Stores are seen in their order, by loads that are done in theirs.
#[test]
fn message_passing() {
    for fence in [&[][..], MFENCE] {
        let writer = part(&[STORE_FIRST, fence, STORE_SECOND]);
        let reader = part(&[LOAD_SECOND, fence, LOAD_FIRST, KEEP]);
        let seen = outcomes(&[writer, reader], Meet::EachRound);
        forbid(&seen, |o| o[2] == 1 && o[3] == 0);
    }
}

/// A store doesn't come before an earlier load.
#[test]
fn load_buffering() {
    for fence in [&[][..], MFENCE] {
        let body: [&[u8]; 4] = [LOAD_SECOND, fence, STORE_FIRST, KEEP];
        let seen = outcomes(&[part(&body), swapped(&body)], Meet::EachRound);
        forbid(&seen, |o| o[0] == 1 && o[2] == 1);
    }
}

/// All vCPUs see stores of two others in the same order.
#[test]
fn independent_reads_of_independent_writes() {
    for fence in [&[][..], MFENCE] {
        let reader = [LOAD_FIRST, fence, LOAD_SECOND, KEEP];
        let parts = [
            part(&[STORE_FIRST]),
            swapped(&[STORE_FIRST]),
            part(&reader),
            swapped(&reader),
        ];
        let seen = outcomes(&parts, Meet::Once);
        // Each reader has its second load first in memory: [second, first].
        forbid(&seen, |o| o[5] == 1 && o[4] == 0 && o[7] == 1 && o[6] == 0);
    }
}
