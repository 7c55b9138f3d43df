//! Tests of kvm-ioctls that fail on our KVM, and why.

const EXPECTED: &[(&str, &str)] = &[
    (
        "ioctls::device::tests::test_create_device",
        "there are no devices of KVM_CREATE_DEVICE (VFIO)",
    ),
    (
        "ioctls::system::tests::test_kvm_getters",
        "it wants four processors of the host; fails on the kernel's KVM of a smaller machine, too",
    ),
    (
        "ioctls::vcpu::tests::test_get_and_set_nested_state",
        "no nested virtualisation",
    ),
    (
        "ioctls::vcpu::tests::test_run_code",
        "it counts a page that was only read as dirty, as kvm.ko does; ours logs writes alone",
    ),
    (
        "ioctls::vcpu::tests::test_set_tsc_khz",
        "it wants a rate of 0 refused where the TSC can't be scaled; kvm.ko takes it for the host's rate",
    ),
];

/// Why this test fails, if it is known to.
pub(crate) fn reason(test: &str) -> Option<&'static str> {
    let row = EXPECTED.iter().find(|(name, _)| *name == test);
    row.map(|(_, reason)| *reason)
}
