//! The translating CPU against the physical one: a quick seeded run of what
//! `cargo xtask differential` does for as long as one likes.

use std::time::Duration;

use differential::campaign::{self, Effort, Progress, Tally};
use differential::case::Mode;
use differential::generate::Catalogue;
use differential::guest::{GuestCpu, Translation};
use differential::minimise::Pair;
use differential::native::NativeCpu;

const EFFORT: Effort = Effort {
    seed: 20,
    encodings: 1,
    states: 3,
    time: Duration::ZERO,
    kept: 40,
    progress: Progress::Quiet,
};

fn singles(mode: Mode) {
    let mut native = NativeCpu::new().unwrap();
    let mut subject = GuestCpu::new(Translation::Blocks).unwrap();
    let mut catalogue = Catalogue::new(mode);
    let mut pair = Pair {
        native: &mut native,
        subject: &mut subject,
    };
    let tally = campaign::single_instructions(&mut catalogue, EFFORT, &mut pair).unwrap();
    assert!(tally.cases > 5000);
    assert_none(&tally, mode, Translation::Blocks);
}

/// A host that gives two results for one case is named, and not held against the translator.
fn assert_none(tally: &Tally, mode: Mode, translation: Translation) {
    for divergence in tally.divergences.iter().chain(&tally.unsteadies) {
        println!("{divergence}");
    }
    let (all, unsteady) = (&tally.diverging, &tally.unsteady);
    assert!(all.is_empty(), "{mode:?}, {translation:?}: {all:?}");
    assert!(unsteady.len() < 3, "the host is not steady: {unsteady:?}");
}

#[test]
fn every_form_in_64_bit_mode() {
    singles(Mode::Long);
}

#[test]
fn every_form_in_compatibility_mode() {
    singles(Mode::Compat32);
}

#[test]
fn every_form_in_16_bit_code() {
    singles(Mode::Compat16);
}

fn programs(mode: Mode) {
    let mut native = NativeCpu::new().unwrap();
    for translation in [Translation::Blocks, Translation::Stepped] {
        let mut subject = GuestCpu::new(translation).unwrap();
        let catalogue = Catalogue::new(mode);
        let mut pair = Pair {
            native: &mut native,
            subject: &mut subject,
        };
        let tally = campaign::blocks(&catalogue, mode, EFFORT, &mut pair).unwrap();
        assert!(tally.cases > 80);
        assert_none(&tally, mode, translation);
    }
}

#[test]
fn whole_programs_in_64_bit_mode() {
    programs(Mode::Long);
}

#[test]
fn whole_programs_in_compatibility_mode() {
    programs(Mode::Compat32);
}

#[test]
fn whole_programs_in_16_bit_code() {
    programs(Mode::Compat16);
}
