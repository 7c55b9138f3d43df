//! The kernel's modules that the default guest loads, in an order that works.
//!
//! Debian's packages hold no `modules.dep` (it is made on installation), but each module says in its
//! `.modinfo` section which others it needs: `depends=a,b`. Newer kernels' modules are packed with
//! xz; they are unpacked here, so that the guest's `insmod` needs to know nothing of that.

use std::{
    collections::HashMap,
    fs,
    io::Cursor,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// What the default guest wants; a kernel that has one built in has no such file.
const WANTED: [&str; 6] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "virtio_console",
    // ext4 asks for it by name, at run time.
    "crc32c_generic",
    "ext4",
];

/// A module to load.
pub(super) struct Module {
    /// Its name, with underscores.
    pub(super) name: String,
    /// The ELF object.
    pub(super) object: Vec<u8>,
}

/// What the guest is to load, from the modules below `directory`, each behind those that it needs.
pub(super) fn wanted(directory: &Path) -> Result<Vec<Module>> {
    let mut files = HashMap::new();
    collect(&directory.join("kernel"), &mut files);
    let mut loader = Loader {
        files,
        modules: Vec::new(),
    };
    for name in WANTED {
        loader.add(name)?;
    }
    Ok(loader.modules)
}

/// Every module below `directory`, by name.
fn collect(directory: &Path, files: &mut HashMap<String, PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&path, files);
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file
        .strip_suffix(".ko")
        .or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(name.replace('-', "_"))
}

struct Loader {
    files: HashMap<String, PathBuf>,
    modules: Vec<Module>,
}

impl Loader {
    /// Adds a module and, in front of it, those that it needs.
    fn add(&mut self, name: &str) -> Result<()> {
        // Taken out of the map, so that modules that need each other end somewhere.
        let Some(path) = self.files.remove(name) else {
            return Ok(());
        };
        let object = read(&path).with_context(|| path.display().to_string())?;
        for needed in dependencies(&object) {
            self.add(&needed)?;
        }
        let name = name.to_owned();
        self.modules.push(Module { name, object });
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(bytes);
    }
    let mut object = Vec::new();
    lzma_rs::xz_decompress(&mut Cursor::new(bytes), &mut object)
        .map_err(|error| anyhow::anyhow!("unpacking: {error:?}"))?;
    Ok(object)
}

/// What `.modinfo` says behind `depends=`: strings there end with a NUL.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &object[at + KEY.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_module_comes_behind_what_it_needs() {
        let directory = std::env::temp_dir().join(format!("fourfold-mod-{}", std::process::id()));
        let kernel = directory.join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        for (file, info) in [
            ("virtio_pci.ko", "x\0depends=virtio_ring,virtio-pci-dev\0"),
            ("virtio_ring.ko", "\0depends=virtio\0"),
            ("virtio.ko", "\0depends=\0"),
            ("virtio-pci-dev.ko", "\0depends=virtio_pci\0"),
            ("unwanted.ko", "\0depends=\0"),
        ] {
            fs::write(kernel.join(file), info).unwrap();
        }
        let modules = wanted(&directory).unwrap();
        let names: Vec<_> = modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(
            names,
            ["virtio", "virtio_ring", "virtio_pci_dev", "virtio_pci"]
        );
        fs::remove_dir_all(directory).unwrap();
    }
}
