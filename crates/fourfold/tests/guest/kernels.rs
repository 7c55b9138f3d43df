//! Other kernels: another line, another flavour, and the same one entered by PVH.

use std::fs;

use crate::host::{in_guest, output, scratch};

#[test]
#[ignore = "downloads 35 MB: cargo xtask guest-tests"]
fn a_second_line_of_kernels_boots() {
    let options = [
        "--kernel-package",
        "linux-image-6.12-cloud-amd64",
        "--cpus",
        "2",
    ];
    if let Some(out) = in_guest(&options, "uname -r; nproc") {
        assert!(out.starts_with("6.12.") && out.ends_with("\n2\n"), "{out}");
    }
}

#[test]
#[ignore = "downloads 70 MB: cargo xtask guest-tests"]
fn a_kernel_of_the_real_time_flavour_boots() {
    let options = ["--kernel-package", "linux-image-rt-amd64", "--cpus", "2"];
    if let Some(out) = in_guest(&options, "uname -v; nproc") {
        assert!(
            out.contains("PREEMPT_RT") && out.ends_with("\n2\n"),
            "{out}"
        );
    }
}

/// The ELF image inside Debian's bzImage has PVH's note, and is entered in protected mode.
#[test]
fn debians_kernel_boots_by_pvh() {
    if output(&["--exec", "true"]).is_none() {
        return;
    }
    let packed = scratch().join("cache/fourfold/debian-cloud/vmlinuz");
    let elf = vmm::unpacked_kernel(&packed).unwrap();
    assert!(elf.starts_with(b"\x7fELF"));
    let vmlinux = scratch().join(format!("vmlinux-{}", std::process::id()));
    fs::write(&vmlinux, elf).unwrap();
    let options = ["--kernel", vmlinux.to_str().unwrap(), "--serial", "stdio"];
    let out = in_guest(&options, "cat /proc/sys/kernel/bootloader_type; uname -s").unwrap();
    let _ = fs::remove_file(vmlinux);
    // What the kernel's entry by PVH notes there.
    assert_eq!(out, "176\nLinux\n");
}
