//! The translating CPU against the physical one: a quick seeded run of what
//! `cargo xtask differential` does for as long as one likes.

use std::time::Duration;

use differential::campaign::{self, Effort, Progress};
use differential::case::Mode;
use differential::generate::Catalogue;
use differential::guest::{GuestCpu, Translation};
use differential::known;
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
        if known::difference(&divergence.name).is_none() {
            println!("{divergence}");
        }
    }
    let news = tally.diverging.iter();
    let news: Vec<_> = news
        .filter(|(name, _)| known::difference(name).is_none())
        .collect();
    assert!(tally.cases > 5000);
    assert!(news.is_empty(), "{mode:?}, {translation:?}: {news:?}");
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
        let all = tally.divergences.iter();
        let news: Vec<_> = all.filter(|d| !known::is_known_program(d)).collect();
        for divergence in &news {
            println!("{divergence}");
        }
        assert!(news.is_empty(), "{mode:?}, {translation:?}: {}", news.len());
    }
}

#[test]
fn whole_programs_in_64_bit_mode() {
    programs(Mode::Long);
}

#[test]
#[ignore = "in one program VMASKMOVPD gets a page fault where the host gives a general protection fault"]
fn whole_programs_in_compatibility_mode() {
    programs(Mode::Compat32);
}
