//! Guest code and what it became, for the patterns that matter: `tests/golden/*.txt`.
//!
//! `BLESS=1 cargo test -p cpu --test golden` writes the files anew; a change in them is a change of
//! the translation, to be read like one.

mod machine;

use std::fmt::Write;
use std::path::Path;

use cpu::Translation;
use iced_x86::{Code, Decoder, DecoderOptions, Formatter, GasFormatter, Instruction};
use machine::{CODE, DATA, Machine};

/// Runs the code to its `HLT` and compares what it became with the golden file.
fn golden(name: &str, code: &[u8]) {
    let mut machine = Machine::new(code);
    machine.vcpu.set_branches(cpu::Branches::Jrcxz);
    machine.vcpu.state_mut().gpr[3] = DATA;
    machine.run_to_halt();
    let mut text = String::new();
    for translation in machine.vcpu.translations() {
        block(&mut text, &translation, code);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/run/{name}.txt"));
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &text).expect("the golden file can be written");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        text,
        expected,
        "{} no longer says what the translator does; BLESS=1 if it should",
        path.display()
    );
}

/// Each guest instruction, and indented what runs for it; then the cold part.
fn block(text: &mut String, translation: &Translation, code: &[u8]) {
    let start = translation.rip.raw() - CODE;
    let _ = writeln!(text, "block +{start:#x}");
    for (index, &(host, guest)) in translation.marks.iter().enumerate() {
        let at = (start + guest) as usize;
        let mut decoder = Decoder::with_ip(64, &code[at..], at as u64, DecoderOptions::NONE);
        let _ = writeln!(text, "  {}", format(&decoder.decode(), code.len()));
        let end = translation.marks.get(index + 1);
        let end = end.map_or(translation.code.len(), |next| next.0);
        host_code(text, translation, host, end);
    }
}

fn host_code(text: &mut String, translation: &Translation, start: usize, end: usize) {
    let bytes = &translation.code[start..end];
    let decoder = Decoder::with_ip(64, bytes, start as u64, DecoderOptions::NONE);
    for instruction in decoder {
        let line = format(&instruction, translation.code.len());
        let _ = writeln!(text, "    {:4x}  {line}", instruction.ip());
    }
}

/// In AT&T syntax; what differs from run to run (addresses of the host) is named, not printed.
fn format(instruction: &Instruction, len: usize) -> String {
    let mut formatter = GasFormatter::new();
    let mut text = String::new();
    let outside = instruction.near_branch_target() >= len as u64;
    let branches = instruction.is_jmp_short_or_near()
        || instruction.is_jcc_short_or_near()
        || instruction.is_call_near();
    if branches && outside {
        formatter.format_mnemonic(instruction, &mut text);
        text.push_str(" (elsewhere)");
    } else if instruction.code() == Code::Mov_r64_imm64 {
        let _ = write!(text, "movabs $(host), {:?}", instruction.op0_register());
    } else {
        formatter.format(instruction, &mut text);
    }
    text
}

#[test]
fn a_load() {
    golden("load", &[0x48, 0x8b, 0x43, 0x08, 0xf4]); // mov 8(%rbx),%rax
}

#[test]
fn a_store() {
    golden("store", &[0x48, 0x89, 0x4b, 0x10, 0xf4]); // mov %rcx,16(%rbx)
}

#[test]
fn a_push_and_a_pop() {
    golden("push", &[0x50, 0x5a, 0xf4]); // push %rax; pop %rdx
}

#[test]
fn a_compare_and_a_branch() {
    // cmp $5,(%rbx); jne 1f; inc %eax; 1: hlt
    golden("branch", &[0x83, 0x3b, 0x05, 0x75, 0x02, 0xff, 0xc0, 0xf4]);
}

#[test]
fn a_loop() {
    // mov $3,%ecx; 1: add %rcx,%rax; dec %ecx; jnz 1b; hlt
    golden(
        "loop",
        &[
            0xb9, 3, 0, 0, 0, 0x48, 0x01, 0xc8, 0xff, 0xc9, 0x75, 0xf9, 0xf4,
        ],
    );
}

#[test]
fn a_call_and_a_return() {
    // call 1f; hlt; 1: ret
    golden("call", &[0xe8, 0x01, 0, 0, 0, 0xf4, 0xc3]);
}

#[test]
fn an_indirect_jump() {
    // lea 1f(%rip),%rax; jmp *%rax; 1: hlt
    golden(
        "indirect",
        &[0x48, 0x8d, 0x05, 0x02, 0, 0, 0, 0xff, 0xe0, 0xf4],
    );
}

#[test]
fn a_locked_update() {
    golden("locked", &[0xf0, 0x48, 0xff, 0x03, 0xf4]); // lock incq (%rbx)
}

#[test]
fn a_load_while_flags_are_live() {
    // cmp %eax,%edx; mov (%rbx),%rax; sete %cl; hlt
    golden(
        "live_flags",
        &[0x39, 0xc2, 0x48, 0x8b, 0x03, 0x0f, 0x94, 0xc1, 0xf4],
    );
}

#[test]
fn registers_that_live_in_memory() {
    // add %r9,%r10; mov %r15,%rcx; imul %r11,%rsp
    golden(
        "registers",
        &[
            0x4d, 0x01, 0xca, 0x4c, 0x89, 0xf9, 0x49, 0x0f, 0xaf, 0xe3, 0xf4,
        ],
    );
}

#[test]
fn vector_arithmetic_on_memory() {
    // addps (%rbx),%xmm3; vpaddd 32(%rbx),%ymm1,%ymm2
    golden(
        "vector",
        &[0x0f, 0x58, 0x1b, 0xc5, 0xf5, 0xfe, 0x53, 0x20, 0xf4],
    );
}

#[test]
fn a_string_copy() {
    // mov %rbx,%rsi; lea 64(%rbx),%rdi; mov $4,%ecx; rep movsq
    golden(
        "string",
        &[
            0x48, 0x89, 0xde, 0x48, 0x8d, 0x7b, 0x40, 0xb9, 4, 0, 0, 0, 0xf3, 0x48, 0xa5, 0xf4,
        ],
    );
}
