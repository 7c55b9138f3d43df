//! Tests that fail on our KVM, and why.

/// A vCPU that fetches its code from a page makes kvm.ko map the page writable, where the host may
/// write to it, and count it dirty there and then (`make_spte`). Ours maps a page that is only read
/// for reading, and counts it when it is written to: the log holds what changed, which is what a
/// migration has to send.
const ONLY_READ: &str =
    "it counts a page that was only read as dirty, as kvm.ko does; ours logs writes alone";

/// Crate, test or example, reason.
const EXPECTED: &[(&str, &str, &str)] = &[
    (
        "kvm-ioctls",
        "ioctls::system::tests::test_kvm_getters",
        "it wants four processors of the host",
    ),
    (
        "kvm-ioctls",
        "ioctls::vcpu::tests::test_run_code",
        ONLY_READ,
    ),
    (
        "kvm-ioctls",
        "src/ioctls/vm.rs - ioctls::vm::VmFd::get_dirty_log",
        ONLY_READ,
    ),
    ("kvm-ioctls", "src/lib.rs -", ONLY_READ),
];

/// Why this test fails, if it is known to.
pub(crate) fn reason(suite: &str, test: &str) -> Option<&'static str> {
    let row = EXPECTED
        .iter()
        .find(|(known, name, _)| *known == suite && *name == test);
    row.map(|(_, _, reason)| *reason)
}
