//! A file system on a disk image: what a package manager does to it, and whether it is whole after
//! the machine has been switched off.

use std::{fs, process::Stdio, time::Duration};

use crate::host::{Image, Running, in_guest, output, programs, read_until, run};

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

/// The image is cut while the guest reads it: errors for what is gone, data for what is there, and
/// the guest goes on.
#[test]
fn a_disk_that_is_cut_gives_errors_until_it_grows_again() {
    if output(&["--exec", "true"]).is_none() {
        return;
    }
    let image = Image::new("cut", 4);
    let size = |mib: u64| {
        let file = fs::OpenOptions::new().write(true).open(image.path());
        file.unwrap().set_len(mib << 20).unwrap();
    };
    let command = "read_at() { dd if=/dev/vda of=/dev/null bs=64k skip=$1 count=1 iflag=direct \
          2>/dev/null; }; \
        read_at 48 && echo whole; \
        while read_at 48; do sleep 0.1; done; read_at 0 && echo cut; \
        until read_at 48; do sleep 0.1; done; echo grown";
    let args = ["--exec", command, "--disk", image.path()];
    let mut child = Running(run(&args).stdout(Stdio::piped()).spawn().unwrap());
    let mut out = child.0.stdout.take().unwrap();
    let limit = Duration::from_secs(180);
    read_until(&mut out, limit, |seen| seen.contains("whole"));
    size(2);
    read_until(&mut out, limit, |seen| seen.contains("cut"));
    size(4);
    let seen = read_until(&mut out, limit, |_| false);
    assert!(seen.ends_with("grown\n"), "{seen}");
    assert!(child.0.wait().unwrap().success());
}

/// Damaged file systems are the guest's affair, whatever it makes of them.
#[test]
#[ignore = "a minute: cargo xtask guest-tests"]
fn damaged_file_systems_end_in_the_guests_errors() {
    let Some(image) = Image::ext4("damaged", 16) else {
        return;
    };
    let whole = fs::read(image.path()).unwrap();
    let mut state = 1_u64;
    for _ in 0..20 {
        let mut bytes = whole.clone();
        for _ in 0..200 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Superblock, group descriptors, bitmaps, inodes: the first half mebibyte.
            bytes[(state >> 33) as usize % (512 << 10)] = (state >> 20) as u8;
        }
        fs::write(image.path(), &bytes).unwrap();
        let command = "mount -t ext4 /dev/vda /mnt 2>/dev/null && ls -R /mnt >/dev/null 2>&1; \
            echo x >/mnt/file 2>/dev/null; sync; echo done";
        let out = in_guest(&["--disk", image.path()], command);
        assert!(out.is_none_or(|out| out == "done\n"));
    }
}
