//! The things looked at, each a function that gives a finding.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use accel::detect::{KernelKvm, KvmKind, user::Need};

use super::report::{Finding, Standing};

fn finding(name: &str, standing: Standing, seen: impl Into<String>, effect: &str) -> Finding {
    Finding {
        name: name.to_owned(),
        standing,
        seen: seen.into(),
        effect: effect.to_owned(),
        remedy: None,
    }
}

impl Finding {
    fn remedy(self, remedy: impl Into<String>) -> Self {
        Self {
            remedy: Some(remedy.into()),
            ..self
        }
    }
}

/// The kernel's KVM.
pub(super) fn kernel_kvm(kernel: &KernelKvm) -> Finding {
    let row = |standing, effect| finding("kernel KVM", standing, kernel.describe(), effect);
    match kernel {
        KernelKvm::Absent => row(
            Standing::Missing,
            "Guests run on `user`; `--accel kvm` is not possible.",
        )
        .remedy(remedy_for_absence()),
        KernelKvm::Denied { gid, .. } => row(
            Standing::Missing,
            "Guests run on `user`; `--accel kvm` is not possible.",
        )
        .remedy(format!(
            "add yourself to the group that owns it (`sudo usermod -aG {} $USER`, then log in \
             again), or, in a container, pass `--device /dev/kvm`",
            group_name(*gid)
        )),
        KernelKvm::Unusable { .. } => row(
            Standing::Missing,
            "Guests run on `user`; `--accel kvm` is not possible.",
        )
        .remedy("load the module: `sudo modprobe kvm_intel` or `sudo modprobe kvm_amd`"),
        KernelKvm::Open { kind, .. } => match kind {
            KvmKind::Hardware => row(Standing::Good, "Guests run on it."),
            KvmKind::Software => row(
                Standing::Limited,
                "It emulates, which is slower than `user`: guests run on `user`, and `--accel kvm` is \
                 for small ones.",
            )
            .remedy(
                "run on a machine with VT-x or SVM; in a virtual machine, have nested \
                 virtualisation turned on in its host",
            ),
            KvmKind::Broken => row(
                Standing::Limited,
                "Guests run on `user`; `--accel kvm` will fail.",
            )
            .remedy(
                "look into `dmesg` for what the module says; in a virtual machine, nested \
                 virtualisation may be turned off in its host",
            ),
        },
    }
}

fn remedy_for_absence() -> &'static str {
    match accel::detect::kernel::cpu_flag() {
        Some("vmx") => "`sudo modprobe kvm_intel`; in a container, pass `--device /dev/kvm`",
        Some(_) => "`sudo modprobe kvm_amd`; in a container, pass `--device /dev/kvm`",
        None => {
            "the CPU offers no virtualisation: enable VT-x or SVM in the firmware or, in a \
             virtual machine, nested virtualisation in its host"
        }
    }
}

fn group_name(gid: u32) -> String {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    groups
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).and_then(|id| id.parse().ok()) == Some(gid))
        .map_or_else(|| gid.to_string(), |fields| fields[0].to_owned())
}

/// One of the things that `user` relies on.
pub(super) fn need(need: &Need) -> Finding {
    match &need.problem {
        None => finding(
            need.name,
            Standing::Good,
            "works",
            &format!("`user` uses it: {}.", need.purpose),
        ),
        Some(problem) => finding(
            need.name,
            Standing::Missing,
            problem.clone(),
            &format!("`user` can't run without it: {}.", need.purpose),
        )
        .remedy(
            "if a sandbox forbids it, allow memfd_create and executable mappings in its profile; \
             a CPU feature needs a newer CPU, or a virtual CPU model that shows it",
        ),
    }
}

/// HVA to HPA.
pub(super) fn pagemap() -> Finding {
    let name = "pagemap";
    match own_frame() {
        Ok(Some(frame)) => finding(
            name,
            Standing::Good,
            format!("frame numbers are shown (this process has one at frame {frame:#x})"),
            "`explain` and `tour` show host physical addresses, too.",
        ),
        Ok(None) => finding(
            name,
            Standing::Limited,
            "readable, but frame numbers are hidden",
            "`explain` and `tour` end at host virtual addresses; all else works.",
        )
        .remedy("run as root, or give the binary CAP_SYS_ADMIN"),
        Err(error) => finding(
            name,
            Standing::Missing,
            format!("/proc/self/pagemap: {error}"),
            "`explain` and `tour` end at host virtual addresses; all else works.",
        )
        .remedy("mount /proc, and run as root where frame numbers are wanted"),
    }
}

/// The frame that holds a byte of this process's stack, if the kernel tells.
fn own_frame() -> io::Result<Option<u64>> {
    const PAGE: u64 = 4096;
    const FRAME_BITS: u64 = (1 << 55) - 1;
    let byte = std::hint::black_box(1_u8);
    let mut entry = [0; 8];
    let at = (&raw const byte).addr() as u64 / PAGE * 8;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, at)?;
    let frame = u64::from_le_bytes(entry) & FRAME_BITS;
    Ok((frame != 0).then_some(frame))
}

/// Missing pages resolved by user space.
pub(super) fn userfaultfd() -> Finding {
    let name = "userfaultfd";
    match try_userfaultfd() {
        Ok(()) => finding(
            name,
            Standing::Good,
            "works",
            "A monitor under `fourfold exec` can provide guest memory on demand, as for migration.",
        ),
        Err(error) => finding(
            name,
            Standing::Missing,
            error.to_string(),
            "Monitors under `fourfold exec` can't provide guest memory on demand; `run` needs no such.",
        )
        .remedy(
            "run as root, or `sudo sysctl vm.unprivileged_userfaultfd=1`; in a container, allow \
             the system call",
        ),
    }
}

#[expect(
    unsafe_code,
    reason = "only the system call tells whether it is allowed"
)]
fn try_userfaultfd() -> io::Result<()> {
    // SAFETY: the call takes flags and gives a descriptor, which is closed at once.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::close(fd as libc::c_int);
    }
    Ok(())
}

/// Reserved huge pages.
pub(super) fn huge_pages() -> Finding {
    let free = |size: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{size}kB/free_hugepages");
        fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    let (small, large) = (free("2048"), free("1048576"));
    let count =
        |pages: Option<u64>| pages.map_or("not offered".to_owned(), |n| format!("{n} free"));
    let seen = format!("2 MiB: {}, 1 GiB: {}", count(small), count(large));
    if small.unwrap_or(0) + large.unwrap_or(0) > 0 {
        let effect = "A monitor under `fourfold exec` that asks for them gets them; `run` takes what the next line says.";
        return finding("huge pages", Standing::Good, seen, effect);
    }
    let effect = "Guest memory uses ordinary pages, made larger by the kernel where it can.";
    finding("huge pages", Standing::Limited, seen, effect)
        .remedy("`echo 512 | sudo tee /proc/sys/vm/nr_hugepages` reserves 1 GiB in 2 MiB pages")
}

/// Huge pages that the kernel makes by itself.
pub(super) fn transparent_huge_pages() -> Finding {
    let name = "transparent huge pages";
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .ok()
        .and_then(|text| Some(text.split_once('[')?.1.split_once(']')?.0.to_owned()));
    match setting.as_deref() {
        Some("never") | None => finding(
            name,
            Standing::Limited,
            setting.unwrap_or_else(|| "not offered by this kernel".to_owned()),
            "Guest memory is 4 KiB pages on the host.",
        )
        .remedy("`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`"),
        Some(setting) => finding(name, Standing::Good, setting, "Guest memory asks for them."),
    }
}

/// What guests may be shown.
pub(super) fn cpu_features() -> Finding {
    let features = [
        ("avx", std::is_x86_feature_detected!("avx")),
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("bmi1", std::is_x86_feature_detected!("bmi1")),
        ("bmi2", std::is_x86_feature_detected!("bmi2")),
        ("aes", std::is_x86_feature_detected!("aes")),
        ("sha", std::is_x86_feature_detected!("sha")),
        ("rdrand", std::is_x86_feature_detected!("rdrand")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
    ];
    let shown: Vec<_> = features
        .iter()
        .filter(|(_, has)| *has)
        .map(|(n, _)| *n)
        .collect();
    finding(
        "CPU features",
        Standing::Good,
        shown.join(" "),
        "A guest on `user` sees at most these, and never AVX-512.",
    )
}

/// What `run` without `--kernel` needs.
pub(super) fn package_tools() -> Finding {
    let missing: Vec<_> = ["apt-get", "dpkg-deb"]
        .into_iter()
        .filter(|tool| !on_path(tool))
        .collect();
    let name = "package tools";
    if missing.is_empty() {
        let effect = "A kernel and busybox can be fetched for guests, without root.";
        return finding(
            name,
            Standing::Good,
            "apt-get and dpkg-deb are here",
            effect,
        );
    }
    let effect = "No kernel can be fetched for guests.";
    finding(
        name,
        Standing::Limited,
        format!("no {}", missing.join(", no ")),
        effect,
    )
    .remedy("bring a kernel and an initial RAM disk of your own")
}

fn on_path(tool: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| is_file(&dir.join(tool))))
}

fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
}
