//! A file system on a disk image: what a package manager does to it, and whether it is whole after
//! the machine has been switched off.

use crate::host::{Image, in_guest, programs};

fn install(packages: u32, options: &[&str]) {
    let Some(image) = Image::ext4("install", 128) else {
        return;
    };
    let program = programs();
    let command = format!("mount -t ext4 /dev/vda /mnt && ./guest install /mnt {packages}");
    let mut all = vec!["--file", &program, "--disk", image.path()];
    all.extend(options);
    if in_guest(&all, &command).is_some() {
        image.assert_clean();
    }
}

#[test]
fn a_disk_is_clean_after_packages_were_installed() {
    install(5, &[]);
}

#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn a_disk_is_clean_after_many_packages() {
    for paging in ["nested", "shadow", "direct"] {
        install(150, &["--cpus", "2", "--paging", paging]);
    }
}

#[test]
#[ignore = "seconds: cargo xtask guest-tests"]
fn a_read_only_disk_stays_as_it_is() {
    let Some(image) = Image::ext4("readonly", 16) else {
        return;
    };
    let before = std::fs::read(image.path()).unwrap();
    let disk = format!("{},readonly", image.path());
    let command = "cat /sys/block/vda/ro; mount -t ext4 -o ro /dev/vda /mnt; \
        dd if=/dev/zero of=/dev/vda bs=4096 count=1 2>/dev/null && echo written; true";
    let Some(out) = in_guest(&["--disk", &disk], command) else {
        return;
    };
    assert_eq!(out, "1\n");
    assert!(
        std::fs::read(image.path()).unwrap() == before,
        "the image has changed"
    );
}
