//! The seam: one trait for a VM and one for a vCPU, on the kernel's KVM or on ours.

pub mod detect;
