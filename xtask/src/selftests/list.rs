//! Which tests there are, which are the core set, and which may skip.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, ensure};

/// Tests that together touch slots, dirty logging, exits, state and interrupt controllers, and
/// take a few seconds: the gate runs them.
pub(super) const CORE: &[&str] = &[
    "coalesced_io_test",
    "guest_memfd_test",
    "guest_print_test",
    "kvm_binary_stats_test",
    "memslot_modification_stress_test",
    "pre_fault_memory_test",
    "steal_time",
    "x86_64/cpuid_test",
    "x86_64/cr4_cpuid_sync_test",
    "x86_64/debug_regs",
    "x86_64/exit_on_emulation_failure_test",
    "x86_64/fix_hypercall_test",
    "x86_64/kvm_clock_test",
    "x86_64/kvm_pv_test",
    "x86_64/platform_info_test",
    "x86_64/private_mem_conversions_test",
    "x86_64/private_mem_kvm_exits_test",
    "x86_64/set_boot_cpu_id",
    "x86_64/set_sregs_test",
    "x86_64/state_test",
    "x86_64/sync_regs_test",
    "x86_64/tsc_msrs_test",
    "x86_64/ucna_injection_test",
    "x86_64/userspace_io_test",
    "x86_64/userspace_msr_exit_test",
    "x86_64/xapic_ipi_test",
    "x86_64/xapic_state_test",
    "x86_64/xcr0_cpuid_test",
];

/// Name fragments of tests that need what Fourfold does not offer, with the reason that makes
/// their skip right.
const MAY_SKIP: &[(&str, &str)] = &[
    ("x86_64/vmx_", "nested virtualisation"),
    ("x86_64/svm_", "nested virtualisation"),
    ("x86_64/nested_", "nested virtualisation"),
    ("x86_64/triple_fault_event_test", "nested virtualisation"),
    ("x86_64/hyperv_", "Hyper-V"),
    ("x86_64/xen_", "Xen"),
    ("x86_64/sev_", "SEV"),
    ("x86_64/smm_test", "SMM"),
    ("x86_64/pmu_", "PMU"),
    ("x86_64/amx_test", "AMX"),
    (
        "x86_64/nx_huge_pages_test",
        "its script runs it, which sets parameters of the kernel's module",
    ),
    (
        "x86_64/smaller_maxphyaddr_emulation_test",
        "as on kvm_amd with nested paging; runs with --paging shadow",
    ),
    (
        "x86_64/monitor_mwait_test",
        "it asks the host's CPU itself for MWAIT, whatever the KVM; what it would test: cargo test -p kvm --test mwait",
    ),
    (
        "access_tracking_perf_test",
        "the host's kernel must have idle page tracking",
    ),
    (
        "x86_64/dirty_log_page_splitting_test",
        "the host must have 2 GiB of huge pages to reserve",
    ),
];

/// Tests that are run once more with options that show another side of them.
const VARIANTS: &[(&str, &[&str])] = &[
    ("demand_paging_test", &["-u", "MISSING", "-b", "64M"]),
    (
        "demand_paging_test",
        &["-u", "MINOR", "-s", "shmem", "-b", "64M"],
    ),
    ("demand_paging_test", &["-v", "2", "-b", "128M", "-o"]),
    ("demand_paging_test", &["-s", "anonymous_thp"]),
    ("dirty_log_perf_test", &["-v", "2", "-b", "128M"]),
    ("dirty_log_perf_test", &["-g", "-b", "128M"]),
    (
        "dirty_log_perf_test",
        &["-b", "128M", "-x", "4", "-w", "50"],
    ),
    ("dirty_log_test", &["-M", "dirty-ring", "-c", "1024"]),
    ("kvm_page_table_test", &["-v", "2", "-b", "128M"]),
    ("kvm_page_table_test", &["-s", "anonymous_thp"]),
    ("memslot_modification_stress_test", &["-v", "2"]),
];

/// Tests that are run once more with options of `fourfold exec`.
const EXEC_VARIANTS: &[(&str, &[&str])] = &[(
    "x86_64/smaller_maxphyaddr_emulation_test",
    &["--paging", "shadow"],
)];

/// Tests that take longer than the limit on any KVM of a small machine, with how many times as long
/// they get, and why.
const SLOW: &[(&str, u32)] = &[
    // Seven phases of five seconds each, and 32,764 slots made anew between them.
    ("memslot_perf_test", 2),
];

/// Tests that end on no KVM of a machine with fewer processors than this.
const WIDE: &[(&str, usize)] = &[
    // Four vCPUs in guest code and 64 busy threads, 512 times over, in which the thread that makes
    // them has to get on: two processors start 36 of the 512 in 20 s, with either KVM.
    ("hardware_disable_test", 4),
];

/// A test and its arguments.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Case {
    pub(crate) test: String,
    pub(crate) arguments: &'static [&'static str],
    /// Options of `fourfold exec`; with some, it says nothing of the kernel's KVM.
    pub(crate) options: &'static [&'static str],
}

impl Case {
    /// A test without arguments.
    pub(crate) fn plain(test: &str) -> Self {
        Self {
            test: test.to_owned(),
            arguments: &[],
            options: &[],
        }
    }

    /// How many times the usual limit it gets.
    pub(crate) fn patience(&self) -> u32 {
        let row = SLOW.iter().find(|(name, _)| *name == self.test);
        row.map_or(1, |(_, times)| *times)
    }

    /// How many processors it needs to end in any time.
    pub(crate) fn processors(&self) -> usize {
        let row = WIDE.iter().find(|(name, _)| *name == self.test);
        row.map_or(1, |(_, processors)| *processors)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let test = self.options.iter().copied().chain([self.test.as_str()]);
        let words = test.chain(self.arguments.iter().copied());
        f.pad(&words.collect::<Vec<_>>().join(" "))
    }
}

/// Which of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    /// All, and those with options once more.
    All,
    /// Those that the gate runs.
    Core,
}

/// The built tests that match, in order of their names.
pub(crate) fn choose(folder: &Path, names: &[String], set: Set) -> Result<Vec<Case>> {
    let mut tests = executables(folder, "")?;
    tests.extend(executables(&folder.join("x86_64"), "x86_64/")?);
    let mut cases: Vec<_> = tests.iter().map(|test| Case::plain(test)).collect();
    match set {
        Set::Core => cases.retain(|case| CORE.contains(&case.test.as_str())),
        Set::All => cases.extend(variants(&tests)),
    }
    cases.retain(|c| names.is_empty() || names.iter().any(|n| c.test.contains(n.as_str())));
    cases.sort();
    ensure!(
        !cases.is_empty(),
        "no test of that name in {}",
        folder.display()
    );
    Ok(cases)
}

fn variants(tests: &[String]) -> impl Iterator<Item = Case> {
    let arguments = VARIANTS.iter().map(|(test, arguments)| Case {
        arguments,
        ..Case::plain(test)
    });
    let options = EXEC_VARIANTS.iter().map(|(test, options)| Case {
        options,
        ..Case::plain(test)
    });
    arguments
        .chain(options)
        .filter(|case| tests.contains(&case.test))
}

/// Why this test may skip on our KVM, if it may.
pub(crate) fn skip_reason(test: &str) -> Option<&'static str> {
    let row = MAY_SKIP.iter().find(|(name, _)| test.starts_with(name));
    row.map(|(_, reason)| *reason)
}

fn executables(folder: &Path, prefix: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let metadata = entry.metadata()?;
        let script = Path::new(&name).extension().is_some();
        if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 && !script {
            found.push(format!("{prefix}{name}"));
        }
    }
    Ok(found)
}
