//! Is this a program that a preload library can reach?

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// ELF: offsets in the header of a 64-bit file (gABI, "ELF Header").
const PHOFF: usize = 32;
const PHENTSIZE: usize = 54;
const PHNUM: usize = 56;
/// A program header that names the dynamic linker.
const PT_INTERP: u32 = 3;

/// Finds the program as a shell would.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf> {
    let given = Path::new(name);
    if given.components().count() > 1 {
        return Ok(given.to_owned());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|folder| folder.join(given))
        .find(|p| is_executable(p))
        .with_context(|| format!("no program {} in PATH", given.display()))
}

/// Says why the library could not be loaded into this program, if so.
pub(crate) fn check(program: &Path) -> Result<()> {
    let name = program.display();
    let metadata = fs::metadata(program).with_context(|| format!("can't run {name}"))?;
    if !metadata.is_file() || !is_executable(program) {
        bail!("can't run {name}: it is no executable file");
    }
    let privileged = metadata.mode() & 0o4000 != 0 && metadata.uid() != current_user();
    if privileged {
        bail!(
            "can't run {name}: it is set-user-ID, and the dynamic linker loads no library of the \
             caller's into such a program; run it as its owner"
        );
    }
    let bytes = fs::read(program).with_context(|| format!("reading {name}"))?;
    if bytes.starts_with(b"\x7fELF") && !is_dynamic(&bytes) {
        bail!(
            "can't run {name}: it is statically linked, so no library can stand between it and \
             the kernel; take a dynamically linked build of it"
        );
    }
    Ok(())
}

fn current_user() -> u32 {
    fs::metadata("/proc/self").map_or(0, |m| m.uid())
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Whether a 64-bit ELF file asks for a dynamic linker. Anything malformed is left for `execve` to
/// refuse.
fn is_dynamic(elf: &[u8]) -> bool {
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let mut value = [0u8; 8];
        value[..bytes].copy_from_slice(elf.get(at..at.checked_add(bytes)?)?);
        usize::try_from(u64::from_le_bytes(value)).ok()
    };
    let headers = || -> Option<bool> {
        let (start, size, count) = (number(PHOFF, 8)?, number(PHENTSIZE, 2)?, number(PHNUM, 2)?);
        let types: Option<Vec<usize>> = (0..count)
            .map(|i| number(start.checked_add(i.checked_mul(size)?)?, 4))
            .collect();
        Some(types?.contains(&(PT_INTERP as usize)))
    };
    headers().unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_accepted_and_found_by_name() {
        let program = find(OsStr::new("ls")).unwrap();
        check(&program).unwrap();
    }

    #[test]
    fn a_static_program_is_refused_with_a_reason() {
        let mut elf = vec![0u8; 64];
        elf[..4].copy_from_slice(b"\x7fELF");
        let folder = env::temp_dir().join(format!("fourfold-static-{}", std::process::id()));
        fs::write(&folder, &elf).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let error = check(&folder).unwrap_err().to_string();
        fs::remove_file(&folder).unwrap();
        assert!(error.contains("statically linked"), "{error}");
    }

    #[test]
    fn truncated_headers_do_not_panic() {
        let mut elf = vec![0xffu8; 64];
        elf[..4].copy_from_slice(b"\x7fELF");
        assert!(is_dynamic(&elf));
        assert!(is_dynamic(b"\x7fELF"));
    }
}
