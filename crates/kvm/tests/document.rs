//! The table against the installed headers, and against its own documentation.

use std::collections::BTreeSet;
use std::path::PathBuf;

use kvm::table::{CAPABILITIES, IOCTLS, document, foreign, number};

const HEADER: &str = "/usr/include/linux/kvm.h";

/// `#define NAME _IOx(KVMIO, 0xNN, ...)`: name, macro, number.
fn ioctl(line: &str) -> Option<(&str, &str, u32)> {
    let rest = line.strip_prefix("#define")?.trim_start();
    let (name, value) = rest.split_once(char::is_whitespace)?;
    let value = value.trim_start();
    let (macro_name, arguments) = value.split_once('(')?;
    let (kind, rest) = arguments.split_once(',')?;
    if !macro_name.starts_with("_IO") || kind.trim() != "KVMIO" {
        return None;
    }
    let digits = rest.trim_start().strip_prefix("0x")?;
    let end = digits
        .find(|c: char| !c.is_ascii_hexdigit())
        .unwrap_or(digits.len());
    let number = u32::from_str_radix(&digits[..end], 16).ok()?;
    Some((name, macro_name, number))
}

/// `#define KVM_CAP_NAME NN`.
fn capability(line: &str) -> Option<(&str, u32)> {
    let rest = line.strip_prefix("#define")?.trim_start();
    let (name, value) = rest.split_once(char::is_whitespace)?;
    let number = value.split_whitespace().next()?.parse().ok()?;
    name.starts_with("KVM_CAP_").then_some((name, number))
}

fn header() -> Option<String> {
    match std::fs::read_to_string(HEADER) {
        Ok(text) => Some(text),
        Err(error) => {
            println!("skipped: {HEADER}: {error}");
            None
        }
    }
}

#[test]
fn every_ioctl_of_the_installed_header_has_a_row() {
    let Some(header) = header() else { return };
    let mut seen = 0;
    for (name, macro_name, nr) in header.lines().filter_map(ioctl).filter(|i| !foreign(i.0)) {
        seen += 1;
        let row = IOCTLS.iter().find(|row| row.name == name);
        let row = row.unwrap_or_else(|| panic!("{name} is in the header and not in the table"));
        assert_eq!(number::number(row.request), nr, "{name}");
        assert_eq!(number::macro_name(row.request), macro_name, "{name}");
    }
    assert!(seen > 80, "only {seen} ioctls found in the header");
}

#[test]
fn every_capability_of_the_installed_header_has_a_row() {
    let Some(header) = header() else { return };
    let caps: BTreeSet<_> = header.lines().filter_map(capability).collect();
    let ours = caps.iter().filter(|(name, _)| !foreign(name));
    let mut seen = 0;
    for (name, number) in ours {
        seen += 1;
        let row = CAPABILITIES.iter().find(|row| row.name == *name);
        let row = row.unwrap_or_else(|| panic!("{name} is in the header and not in the table"));
        assert_eq!(row.number, *number, "{name}");
    }
    assert!(seen > 100, "only {seen} capabilities found in the header");
}

#[test]
fn the_documentation_is_the_table() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/ioctls.md");
    let page = document();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "docs/ioctls.md is not what the table says: run `cargo xtask ioctls`"
    );
}
