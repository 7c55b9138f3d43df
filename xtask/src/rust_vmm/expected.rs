//! Tests that fail on our KVM, and why.

/// Crate, test, reason.
const EXPECTED: &[(&str, &str, &str)] = &[
    (
        "kvm-ioctls",
        "ioctls::system::tests::test_kvm_getters",
        "it wants four processors of the host",
    ),
    (
        "kvm-ioctls",
        "ioctls::vcpu::tests::test_run_code",
        "it counts a page that was only read as dirty, as kvm.ko does; ours logs writes alone",
    ),
];

/// Why this test fails, if it is known to.
pub(crate) fn reason(suite: &str, test: &str) -> Option<&'static str> {
    let row = EXPECTED
        .iter()
        .find(|(known, name, _)| *known == suite && *name == test);
    row.map(|(_, _, reason)| *reason)
}
