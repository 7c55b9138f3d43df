//! Hostile input: kernels, initial RAM disks and disks that are broken in every way, and guests that
//! write garbage to every port, register and ring. The monitor answers with an error or an ending;
//! it neither panics nor hangs, and its own memory stays as it is.
//!
//! `FOURFOLD_FUZZ_SECONDS` lets each test go on for so long; `FOURFOLD_FUZZ_SEED` repeats a run.

#[path = "common/kernel.rs"]
mod kernel;

mod hostile {
    pub(super) mod garbage;
    pub(super) mod guest;
    pub(super) mod images;
    pub(super) mod life;
}

use std::{
    env,
    time::{Duration, Instant},
};

use hostile::{garbage::Garbage, guest, images, life::Life};

/// How long, and beginning with which seed.
fn budget(usual: Duration) -> (Instant, u64) {
    let number = |name: &str| env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds = number("FOURFOLD_FUZZ_SECONDS");
    let end = Instant::now() + seconds.map_or(usual, Duration::from_secs);
    (end, number("FOURFOLD_FUZZ_SEED").unwrap_or(1))
}

/// Kernels and initial RAM disks that were whole once.
#[test]
fn broken_images_end_in_an_error_or_a_short_life() {
    let (end, first) = budget(Duration::from_secs(6));
    let originals = images::originals();
    let (mut cases, mut refused) = (0_u64, 0_u64);
    while Instant::now() < end {
        let mut garbage = Garbage::new(first + cases);
        let original = &originals[garbage.below(originals.len())];
        let life = Life::of_image(&garbage.broken(original), &mut garbage);
        match life.live(Duration::from_millis(3)) {
            Ok(_) => {}
            Err(message) => {
                refused += 1;
                assert!(!message.is_empty(), "an error without a word");
            }
        }
        cases += 1;
    }
    println!("{cases} broken images, {refused} of them refused");
    assert!(cases > 50 && refused > 0 && refused < cases);
}

/// The same, made as the fuzz target `boot_image` makes them.
#[test]
fn images_of_any_bytes_end_in_an_error_or_a_short_life() {
    let (end, first) = budget(Duration::from_secs(3));
    let mut cases = 0;
    while Instant::now() < end {
        let mut garbage = Garbage::new(first + cases);
        let len = 1 + garbage.below(60);
        let image = images::from_bytes(&garbage.bytes(len));
        let life = Life::of_image(&image, &mut garbage);
        if let Err(message) = life.live(Duration::from_millis(1)) {
            assert!(!message.is_empty(), "an error without a word");
        }
        cases += 1;
    }
    println!("{cases} images");
    assert!(cases > 25);
}

/// The disk is cut, grows and changes while such a guest uses it.
#[test]
fn a_disk_that_changes_under_its_guest_harms_nothing() {
    let (end, first) = budget(Duration::from_secs(3));
    let mut lives = 0;
    while Instant::now() < end {
        let seed = first + lives;
        let life = Life::of_guest(&guest::image(seed), seed);
        let ending = life.live_on_a_changing_disk(Duration::from_millis(400));
        ending.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        lives += 1;
    }
    println!("{lives} lives on a changing disk");
    assert!(lives > 1);
}

/// A guest on two vCPUs that pokes whatever there is, life after life.
#[test]
fn a_guest_that_pokes_everything_harms_nothing() {
    let (end, first) = budget(Duration::from_secs(8));
    let witness = vec![0x5a_u8; 16 << 20];
    let mut lives = 0;
    while Instant::now() < end {
        let seed = first + lives;
        let life = Life::of_guest(&guest::image(seed), seed);
        let ending = life.live(Duration::from_millis(400));
        ending.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        lives += 1;
    }
    println!("{lives} lives");
    assert!(lives > 2);
    assert!(
        witness.iter().all(|byte| *byte == 0x5a),
        "memory of the monitor has changed"
    );
}
