//! Golden files: guest code and its translation, for the patterns that matter.
//!
//! `BLESS=1 cargo test -p cpu golden` writes them anew.

use std::fmt::Write as _;
use std::path::PathBuf;

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

use super::{Branches, CodeSize, Mode, PageCheck, Reach, ReturnSite, Source, Tables, Translator};
use crate::engine::frame::View;

/// Where the code cache seems to be.
const BASE: u64 = 0x10_0000;
const RIP: u64 = 0x1000;

fn listing(code: &[u8], ip: u64) -> String {
    let mut decoder = Decoder::with_ip(64, code, ip, DecoderOptions::NONE);
    let mut formatter = GasFormatter::new();
    let mut text = String::new();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        write!(text, "    {:6x}  ", instruction.ip()).expect("a string");
        formatter.format(&instruction, &mut text);
        text.push('\n');
    }
    text
}

fn translation(code: &[u8], branches: Branches) -> String {
    let mut translator = Translator::default();
    translator.asm.branches = branches;
    let source = Source {
        rip: RIP,
        mode: Mode::new(CodeSize::Bits64, View::User),
        bytes: code,
        second: None,
        reach: Reach::Canonical(48),
        returns: Some(ReturnSite {
            page: PageCheck { index: 1, id: 1 },
            miss: BASE + 0x20,
            shared: None,
        }),
    };
    translator.decode(&source);
    let mut tables = Tables::default();
    let host = translator.translate(&source, &mut tables, BASE, 0x1000);
    let mut text = format!(
        "guest\n{}\nhost\n{}",
        listing(code, RIP),
        listing(host, BASE + 0x1000)
    );
    text.push_str("\nsites\n");
    for (index, site) in tables.sites.iter().enumerate() {
        writeln!(
            text,
            "    {index}  rip {:x}  {:?}, flags {:?}",
            site.rip, site.reason, site.flags
        )
        .expect("a string");
    }
    text
}

fn check(name: &str, code: &[u8]) {
    check_with(name, code, Branches::Jrcxz);
}

fn check_with(name: &str, code: &[u8], branches: Branches) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(format!("{name}.txt"));
    let found = translation(code, branches);
    if std::env::var_os("BLESS").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("the folder of goldens");
        std::fs::write(&path, &found).expect("a golden file");
    }
    let wanted = std::fs::read_to_string(&path).expect("a golden file; BLESS=1 writes it");
    assert_eq!(found, wanted, "{name}: BLESS=1 accepts the change");
}

#[test]
fn golden_load() {
    // mov rax, [rbx+8]; add rax, rcx; ret
    let code = [0x48, 0x8b, 0x43, 0x08, 0x48, 0x01, 0xc8, 0xc3];
    check("load", &code);
}

#[test]
fn golden_load_with_live_flags() {
    // mov rax, [rbx+rcx*8]; adc rax, rdx; ret
    let code = [0x48, 0x8b, 0x04, 0xcb, 0x48, 0x11, 0xd0, 0xc3];
    check("load_with_live_flags", &code);
}

#[test]
fn golden_frame() {
    // push rbp; mov rbp, rsp; push rbx; push r15; pop r15; pop rbx; pop rbp; ret
    let code = [
        0x55, 0x48, 0x89, 0xe5, 0x53, 0x41, 0x57, 0x41, 0x5f, 0x5b, 0x5d, 0xc3,
    ];
    check("frame", &code);
}

#[test]
fn golden_compare_and_branch() {
    // l: add rax, 1; cmp rax, rbx; jne l
    let code = [0x48, 0x83, 0xc0, 0x01, 0x48, 0x39, 0xd8, 0x75, 0xf7];
    check("compare_and_branch", &code);
}

#[test]
fn golden_call() {
    // call +0x100
    check("call", &[0xe8, 0x00, 0x01, 0x00, 0x00]);
}

#[test]
fn golden_call_with_loop() {
    let code = [0xe8, 0x00, 0x01, 0x00, 0x00];
    check_with("call_with_loop", &code, Branches::Loop);
}

#[test]
fn golden_locked_update() {
    // lock xadd [rdi], r10d; jmp -2
    let code = [0xf0, 0x44, 0x0f, 0xc1, 0x17, 0xeb, 0xfe];
    check("locked_update", &code);
}
