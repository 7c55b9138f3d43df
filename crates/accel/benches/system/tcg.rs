//! The image under QEMU's TCG, which boots it by the PVH protocol.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use crate::image::{DONE, ENTRY};

/// Runs the image: its lines, or why there are none.
pub(crate) fn run(image: &[u8]) -> Result<Vec<String>, String> {
    let path = std::env::temp_dir().join(format!("system-{}.elf", std::process::id()));
    std::fs::File::create(&path)
        .and_then(|mut file| file.write_all(&elf(image)))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let lines = boot(&path.to_string_lossy());
    // It is in the folder for such files.
    let _ = std::fs::remove_file(&path);
    lines
}

fn boot(kernel: &str) -> Result<Vec<String>, String> {
    let mut child = Command::new("qemu-system-x86_64")
        .args([
            "-accel", "tcg", "-cpu", "max", "-m", "32", "-display", "none",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .args(["-kernel", kernel])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("qemu-system-x86_64: {error}"))?;
    let output = child.stdout.take().into_iter();
    let lines = output.flat_map(|output| BufReader::new(output).lines());
    let mut found = Vec::new();
    let mut ended = false;
    for line in lines.map_while(Result::ok) {
        ended = line.trim_end().ends_with(DONE);
        if ended {
            break;
        }
        found.push(line);
    }
    let _ = child.kill();
    let _ = child.wait();
    if ended {
        Ok(found)
    } else {
        Err(format!(
            "qemu-system-x86_64 ended after {} rows",
            found.len()
        ))
    }
}

/// The image as an ELF file with PVH's note (Xen's `public/elfnote.h`, 18: the entry in 32-bit mode).
fn elf(image: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    const IMAGE_AT: u64 = 0x1000;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    // An executable for x86-64.
    put(&mut file, 2, &[2, 62]);
    put(&mut file, 4, &[1]);
    put(&mut file, 8, &[ENTRY, 64, 0]);
    put(&mut file, 4, &[0]);
    put(&mut file, 2, &[64, 56, 2, 64, 0, 0]);
    // PT_LOAD, all rights; PT_NOTE.
    let length = image.len() as u64;
    put(&mut file, 4, &[1, 7]);
    put(
        &mut file,
        8,
        &[IMAGE_AT, ENTRY, ENTRY, length, length, 0x1000],
    );
    put(&mut file, 4, &[4, 4]);
    put(&mut file, 8, &[HEADERS, 0, 0, NOTE, NOTE, 4]);
    put(&mut file, 4, &[4, 4, 18]);
    file.extend(b"Xen\0");
    put(&mut file, 4, &[ENTRY]);
    file.resize(IMAGE_AT as usize, 0);
    file.extend(image);
    file
}

/// Appends values of so many bytes each.
fn put(file: &mut Vec<u8>, size: usize, values: &[u64]) {
    for value in values {
        file.extend(&value.to_le_bytes()[..size]);
    }
}
