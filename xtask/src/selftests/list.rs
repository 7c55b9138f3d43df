//! Which tests there are, which are the core set, and which may skip.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, ensure};

/// Tests that together touch slots, dirty logging, exits, state and interrupt controllers, and
/// take a few seconds: the gate runs them.
const CORE: &[&str] = &[
    "coalesced_io_test",
    "guest_print_test",
    "kvm_binary_stats_test",
    "set_memory_region_test",
    "steal_time",
    "x86_64/cpuid_test",
    "x86_64/cr4_cpuid_sync_test",
    "x86_64/debug_regs",
    "x86_64/fix_hypercall_test",
    "x86_64/kvm_clock_test",
    "x86_64/kvm_pv_test",
    "x86_64/platform_info_test",
    "x86_64/set_boot_cpu_id",
    "x86_64/set_sregs_test",
    "x86_64/state_test",
    "x86_64/sync_regs_test",
    "x86_64/tsc_msrs_test",
    "x86_64/userspace_io_test",
    "x86_64/userspace_msr_exit_test",
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
    ("x86_64/private_mem_", "protected VMs"),
    ("guest_memfd_test", "protected VMs"),
    ("x86_64/smm_test", "SMM"),
    ("x86_64/pmu_", "PMU"),
    ("x86_64/amx_test", "AMX"),
    (
        "x86_64/nx_huge_pages_test",
        "started by its script, against a bug of Intel's CPUs",
    ),
    (
        "x86_64/smaller_maxphyaddr_emulation_test",
        "an option of kvm_intel",
    ),
    ("x86_64/monitor_mwait_test", "MWAIT"),
    ("x86_64/tsc_scaling_sync", "TSC scaling"),
    ("x86_64/ucna_injection_test", "corrected machine checks"),
    (
        "access_tracking_perf_test",
        "idle page tracking of the host's kernel",
    ),
];

/// The built tests that match, in order of their names.
pub(crate) fn choose(folder: &Path, names: &[String], core: bool) -> Result<Vec<String>> {
    let mut tests = executables(folder, "")?;
    tests.extend(executables(&folder.join("x86_64"), "x86_64/")?);
    tests.retain(|t| names.is_empty() || names.iter().any(|n| t.contains(n.as_str())));
    tests.retain(|t| !core || CORE.contains(&t.as_str()));
    tests.sort();
    ensure!(
        !tests.is_empty(),
        "no test of that name in {}",
        folder.display()
    );
    Ok(tests)
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
