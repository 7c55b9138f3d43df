//! Hostile code in every mode, for a second each: what `cargo xtask hostile-code` does for minutes.

use std::time::Duration;

use differential::hostile::{Attack, Mode};

fn attack(mode: Mode, seed: u64) {
    let mut attack = Attack::new(mode, seed).unwrap();
    let tally = attack.run(Duration::from_secs(1)).unwrap();
    assert!(tally.runs > 3, "only {} guests", tally.runs);
}

#[test]
fn real_mode() {
    attack(Mode::Real, 1);
}

#[test]
fn virtual_8086_mode() {
    attack(Mode::Virtual8086, 7);
}

#[test]
fn protected_mode_16() {
    attack(Mode::Protected16, 2);
}

#[test]
fn protected_mode_32() {
    attack(Mode::Protected32, 3);
}

#[test]
fn compatibility_mode() {
    attack(Mode::Compatibility, 4);
}

#[test]
fn long_mode() {
    attack(Mode::Long, 5);
}

#[test]
fn long_mode_at_cpl_3() {
    attack(Mode::LongUser, 6);
}
