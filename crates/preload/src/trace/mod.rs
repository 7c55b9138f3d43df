//! `--trace`: one line for each call, as strace would print it, with what `KVM_RUN` came back for.

mod decode;
pub(crate) mod exits;

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use kvm::Argument;
use kvm::table::IOCTLS;

/// The name of an ioctl.
pub(crate) fn name(request: u32) -> String {
    match IOCTLS.iter().find(|row| row.request == request) {
        Some(row) => row.name.to_owned(),
        None => format!("{request:#x}"),
    }
}

/// Prints one call.
pub(crate) fn call(
    fd: i32,
    request: u32,
    argument: Argument,
    (result, errno): (i32, i32),
    took: Duration,
) {
    let name = name(request);
    let mut line = format!("[{}] ioctl({fd}, {name}", thread());
    let decoded = decode::argument(&name, argument);
    // Writing to a String can't fail.
    let _ = match decoded {
        Some(text) => write!(line, ", {text}"),
        None if argument.value() == 0 => write!(line, ", 0"),
        None => write!(line, ", {:#x}", argument.value()),
    };
    let _ = if result < 0 {
        let error = std::io::Error::from_raw_os_error(errno);
        write!(line, ") = -1 {error}")
    } else {
        write!(line, ") = {result}")
    };
    if name == "KVM_RUN"
        && let Some(exit) = exits::of(fd, result)
    {
        let _ = write!(line, " {exit}");
    }
    let _ = writeln!(line, " <{:.1} us>", took.as_secs_f64() * 1e6);
    // One write, so that threads don't mix their lines; nobody to tell where it fails.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn thread() -> i32 {
    // SAFETY: no arguments, no failure.
    unsafe { libc::gettid() }
}
