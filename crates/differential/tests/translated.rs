//! The translating CPU against the physical one: a quick seeded run of what
//! `cargo xtask differential` does for as long as one likes.

use std::time::Duration;

use differential::campaign::{self, Effort, Progress};
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

fn singles(mode: Mode, translation: Translation) {
    let mut native = NativeCpu::new().unwrap();
    let mut subject = GuestCpu::new(translation).unwrap();
    let mut catalogue = Catalogue::new(mode);
    let mut pair = Pair {
        native: &mut native,
        subject: &mut subject,
    };
    let tally = campaign::single_instructions(&mut catalogue, EFFORT, &mut pair).unwrap();
    for divergence in &tally.divergences {
        println!("{divergence}");
    }
    assert!(tally.cases > 5000);
    let all = &tally.diverging;
    assert!(all.is_empty(), "{mode:?}, {translation:?}: {all:?}");
}

#[test]
fn every_form_in_64_bit_mode() {
    singles(Mode::Long, Translation::Exact);
}

#[test]
fn every_form_with_dead_flags_dropped() {
    singles(Mode::Long, Translation::Fast);
}

#[test]
fn every_form_in_compatibility_mode() {
    singles(Mode::Compat32, Translation::Fast);
}

#[test]
fn every_form_in_16_bit_code() {
    singles(Mode::Compat16, Translation::Fast);
}

fn programs(mode: Mode) {
    let mut native = NativeCpu::new().unwrap();
    for translation in [Translation::Exact, Translation::Fast, Translation::Stepped] {
        let mut subject = GuestCpu::new(translation).unwrap();
        let catalogue = Catalogue::new(mode);
        let mut pair = Pair {
            native: &mut native,
            subject: &mut subject,
        };
        let tally = campaign::blocks(&catalogue, mode, EFFORT, &mut pair).unwrap();
        assert!(tally.cases > 80);
        for divergence in &tally.divergences {
            println!("{divergence}");
        }
        let all = &tally.diverging;
        assert!(all.is_empty(), "{mode:?}, {translation:?}: {all:?}");
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
