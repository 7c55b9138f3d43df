//! Facts of the architecture: paging bits, control registers, error codes, MSRs, descriptors.
