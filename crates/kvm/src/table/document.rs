//! The tables as a page of documentation.

use std::fmt::Write;

use super::{CAPABILITIES, Capability, IOCTLS, Ioctl, Level, Status, Value, number};

/// `docs/ioctls.md`.
pub fn document() -> String {
    let mut page = String::from(
        "# KVM's ioctls and capabilities on `user`\n\n\
         Written by `cargo xtask ioctls` from the tables that dispatch runs on \
         (`crates/kvm/src/table`).\n\n",
    );
    summary(&mut page);
    for (level, title) in [
        (Level::System, "On `/dev/kvm`"),
        (Level::Vm, "On a VM"),
        (Level::Vcpu, "On a vCPU"),
        (Level::Device, "On a device"),
    ] {
        ioctls(&mut page, level, title);
    }
    capabilities(&mut page);
    page
}

fn summary(page: &mut String) {
    page.push_str("| | full | partial | absent |\n|---|---|---|---|\n");
    let ioctls: Vec<_> = IOCTLS.iter().map(|row| row.status).collect();
    let caps: Vec<_> = CAPABILITIES.iter().map(|row| row.status).collect();
    count(page, "ioctls", &ioctls);
    count(page, "capabilities", &caps);
}

fn count(page: &mut String, what: &str, statuses: &[Status]) {
    let of = |wanted: &str| statuses.iter().filter(|s| word(**s) == wanted).count();
    line(
        page,
        &format!(
            "| {what} | {} | {} | {} |",
            of("full"),
            of("partial"),
            of("absent")
        ),
    );
}

fn ioctls(page: &mut String, level: Level, title: &str) {
    line(page, &format!("\n## {title}\n"));
    page.push_str(
        "| ioctl | number | structure | capability | status | |\n|---|---|---|---|---|---|\n",
    );
    for row in IOCTLS.iter().filter(|row| row.level() == level) {
        ioctl(page, row);
    }
}

fn ioctl(page: &mut String, row: &Ioctl) {
    line(
        page,
        &format!(
            "| `{}` | `{}` 0x{:02x} | {} | {} | {} | {} |",
            row.name,
            number::macro_name(row.request),
            number::number(row.request),
            code(row.structure),
            code(row.capability),
            word(row.status),
            note(row.status)
        ),
    );
}

fn capabilities(page: &mut String) {
    page.push_str(
        "\n## Capabilities\n\n| capability | number | answer | status | |\n|---|---|---|---|---|\n",
    );
    for row in CAPABILITIES {
        capability(page, row);
    }
}

fn capability(page: &mut String, row: &Capability) {
    let answer = match row.value {
        Value::Fixed(value) => value.to_string(),
        Value::Host(_) => "the host's".to_owned(),
    };
    line(
        page,
        &format!(
            "| `{}` | {} | {answer} | {} | {} |",
            row.name,
            row.number,
            word(row.status),
            note(row.status)
        ),
    );
}

fn line(page: &mut String, text: &str) {
    writeln!(page, "{text}").expect("a string takes every write");
}

fn code(name: &str) -> String {
    if name.is_empty() {
        String::new()
    } else {
        format!("`{name}`")
    }
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Full | Status::As(_) => "full",
        Status::Partial(_) => "partial",
        Status::Absent(_) => "absent",
    }
}

fn note(status: Status) -> &'static str {
    match status {
        Status::Full => "",
        Status::As(note) | Status::Partial(note) | Status::Absent(note) => note,
    }
}
