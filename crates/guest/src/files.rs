//! Files in /tmp (or where `TMPDIR` says): a tree, a large file through the page cache and mapped,
//! holes.

#![expect(unsafe_code, reason = "mapping a file is libc's")]

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File, OpenOptions},
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
};

use anyhow::{Result, ensure};

use crate::random::Random;

pub(crate) fn run(mib: u64) -> Result<()> {
    let root = env::temp_dir().join("fourfold-files");
    fs::create_dir_all(&root)?;
    let files = tree(&root.join("tree"))?;
    large(&root.join("large"), mib << 20)?;
    fs::remove_dir_all(&root)?;
    println!("files: {files} small ones, {mib} MiB in a large one");
    Ok(())
}

/// Random creations, renames, overwrites and removals, compared with a map that says what must be
/// there.
fn tree(root: &Path) -> Result<usize> {
    let mut random = Random::new(1);
    let mut expected: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for directory in 0..8 {
        fs::create_dir_all(root.join(directory.to_string()))?;
    }
    let name = |random: &mut Random| format!("{}/{}", random.below(8), random.below(60));
    for _ in 0..3000 {
        let (from, to) = (name(&mut random), name(&mut random));
        match random.below(4) {
            0 if expected.contains_key(&from) => {
                fs::rename(root.join(&from), root.join(&to))?;
                let content = expected.remove(&from).unwrap_or_default();
                expected.insert(to, content);
            }
            1 if expected.contains_key(&from) => {
                fs::remove_file(root.join(&from))?;
                expected.remove(&from);
            }
            _ => {
                let len = random.below(20_000) as usize;
                let content = random.bytes(len);
                fs::write(root.join(&from), &content)?;
                expected.insert(from, content);
            }
        }
    }
    let mut found = 0;
    for directory in fs::read_dir(root)? {
        found += fs::read_dir(directory?.path())?.count();
    }
    ensure!(
        found == expected.len(),
        "{found} files instead of {}",
        expected.len()
    );
    for (path, content) in &expected {
        ensure!(fs::read(root.join(path))? == *content, "{path} has changed");
    }
    Ok(found)
}

const PAGE: u64 = 4096;

/// Every other page is written, in random order, half of them through a mapping.
fn large(path: &Path, len: u64) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(len)?;
    let mapping = Mapping::new(&file, len as usize)?;
    let mut pages: Vec<u64> = (0..len / PAGE).step_by(2).collect();
    let mut random = Random::new(2);
    for at in (1..pages.len()).rev() {
        pages.swap(at, random.below(at as u64 + 1) as usize);
    }
    for page in &pages {
        let content = Random::new(*page).bytes(PAGE as usize);
        if page % 4 == 0 {
            file.write_all_at(&content, page * PAGE)?;
        } else {
            mapping.write((page * PAGE) as usize, &content);
        }
    }
    file.sync_all()?;
    let mut read = vec![0; PAGE as usize];
    for page in 0..len / PAGE {
        file.read_exact_at(&mut read, page * PAGE)?;
        let expected = match page % 2 {
            0 => Random::new(page).bytes(PAGE as usize),
            _ => vec![0; PAGE as usize],
        };
        ensure!(
            read == expected,
            "page {page} of the large file has changed"
        );
    }
    Ok(())
}

struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(file: &File, len: usize) -> Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping, wherever the kernel puts it.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), len, rights, libc::MAP_SHARED, fd, 0) };
        ensure!(
            start != libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        Ok(Self {
            start: start.cast(),
            len,
        })
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: inside the mapping, which nobody else refers to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
